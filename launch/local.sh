#!/usr/bin/env bash
# Several processes of one run on this machine, each with some devices of the CPU: a multi-host run, tried at home.
#
#     bash launch/local.sh --processes 4 --devices_per_process 2 -- \
#         python -m fm_jax.train --config configs/causal_lm.py:tiny --workdir runs/x
#
# See it:   process 0 prints to the terminal; every process writes RUN/logs/process_N.log.
# Stop it:  Ctrl-C, or SIGTERM: all processes save at the same step, and end.
# It comes back by the same command; with --restarts N by itself, so many times, when a process was lost.
#
#     --processes N              of the run
#     --devices_per_process N    devices of each (default 1)
#     --port N                   of process 0 (default one that is free)
#     --restarts N               starts more, when a process was lost (default 0); not after a mistake (exit code 2)
#     --dry_run                  print what would run, and no more
#
# When one process ends, the others have 15 s. The exit code is that of the process that ended first.
set -euo pipefail

processes='' devices=1 port=0 restarts=0 dry_run=''
die() { echo "launch/local.sh: $*" >&2; exit 2; }
while [ $# -gt 0 ]; do
  case $1 in
    --processes=*|--devices_per_process=*|--port=*|--restarts=*)   # as two words
      set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
    --processes|--devices_per_process|--port|--restarts)
      case ${2:-} in ''|*[!0-9]*) die "$1 ${2:-}: expected a whole number" ;; esac
      case $1 in
        --processes) processes=$2 ;;
        --devices_per_process) devices=$2 ;;
        --port) port=$2 ;;
        --restarts) restarts=$2 ;;
      esac
      shift 2 ;;
    --dry_run) dry_run=1; shift ;;
    -h|--help) sed -n '2,/^set /s/^# \{0,1\}//p' "$0"; exit 0 ;;
    --) shift; break ;;
    *) die "unknown $1 (see --help); the command follows --" ;;
  esac
done
[ "${processes:-0}" -ge 1 ] || die "--processes N is required (see --help)"
[ "$devices" -ge 1 ] || die "--devices_per_process $devices: at least 1"
[ $# -gt 0 ] || die "no command; it follows --"

free_port() {
  local at=$port
  while [ "$at" = 0 ] || (exec 3<>"/dev/tcp/127.0.0.1/$at") 2>/dev/null; do
    at=$((20000 + RANDOM % 12000))   # below the ports that the system gives to others
  done
  echo "$at"
}

# The environment of process $1, as words for env. XLA_FLAGS may have a number of devices of its own.
environment() {
  echo "-u XLA_FLAGS JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=$devices JAX_COORDINATOR_ADDRESS=127.0.0.1:$at" \
    "JAX_NUM_PROCESSES=$processes JAX_PROCESS_ID=$1"
}

if [ -n "$dry_run" ]; then
  at=$port
  [ "$at" != 0 ] || at=PORT
  for ((i = 0; i < processes; i++)); do
    echo "env $(environment "$i")$(printf ' %q' "$@") &"
  done
  exit 0
fi

pids=() stopping=''
tell() { for pid in ${pids[@]+"${pids[@]}"}; do kill "-$1" "$pid" 2>/dev/null || true; done; }
# The first Ctrl-C or SIGTERM lets the processes save and end, a second ends them.
trap 'tell "${stopping:-TERM}"; stopping=KILL' INT TERM
trap 'tell KILL' EXIT

for ((start = 0; ; start++)); do
  at=$(free_port) pids=() first='' code=0 deadline=0
  for ((i = 0; i < processes; i++)); do
    # shellcheck disable=SC2046
    env $(environment "$i") "$@" </dev/null &
    pids+=($!)
  done
  left=$processes
  while [ "$left" -gt 0 ]; do
    for ((i = 0; i < processes; i++)); do
      pid=${pids[i]:-}
      if [ -z "$pid" ] || kill -0 "$pid" 2>/dev/null; then continue; fi
      status=0
      wait "$pid" || status=$?
      unset "pids[i]"
      left=$((left - 1))
      if [ -z "$first" ]; then
        first=$i code=$status deadline=$((SECONDS + 15))
        [ "$code" = 0 ] || echo "launch/local.sh: process $i of $processes ended first, with code $code$(
          [ "$code" -le 128 ] || echo " (signal $((code - 128)))")" >&2
      fi
    done
    if [ -n "$first" ] && [ "$left" -gt 0 ] && [ $SECONDS -ge $deadline ]; then
      echo "launch/local.sh: ending $left processes that have not ended by themselves" >&2
      tell KILL
      deadline=$((SECONDS + 3600))
      [ "$code" != 0 ] || code=1
    fi
    [ "$left" = 0 ] || sleep 0.1
  done
  if [ "$code" = 0 ] || [ "$code" = 2 ] || [ -n "$stopping" ] || [ "$start" -ge "$restarts" ]; then
    exit "$code"
  fi
  echo "launch/local.sh: starting again ($((start + 1)) of $restarts)" >&2
done

#!/usr/bin/env bash
# Cloud TPU: one slice or several, on demand, reserved or spot, through queued resources. Not TPU7x (see gke.sh).
#
# From nothing to a running job (needs gcloud, logged in, and the TPU API switched on in the project):
#
#   launch/tpu_vm.sh run --name=try --zone=us-east5-b --accelerator_type=v6e-64 --spot -- \
#     python -m fm_jax.train --config configs/causal_lm.py:1b --workdir gs://BUCKET/runs/try
#
# asks for the TPU, waits for it, copies this folder as git sees it (what is ignored stays here: data/ and runs/ too),
# installs it in a virtual environment with the versions of constraints.txt, starts the command as the systemd service
# `fm_jax` on every host of every slice, and watches it to its end. The same `run` again takes the code as it is then,
# stops the job with a save, and goes on from there.
#
# See it:   launch/tpu_vm.sh status --name=try --zone=us-east5-b      also: gcloud compute tpus queued-resources list
#           launch/tpu_vm.sh logs   --name=try --zone=us-east5-b [--slice=1 --worker=3]
# Stop it:  launch/tpu_vm.sh stop   --name=try --zone=us-east5-b      saves; the TPU stays and costs
#           launch/tpu_vm.sh delete --name=try --zone=us-east5-b      the TPU goes, and all that is on its disks
# (of several slices, with the --slices of the run).
#
# How it comes back: the hosts do not need the machine that `run` runs on. A crash, or the exit of all because one host
# was lost, is started again by systemd on each host; so is a host that rebooted. A preempted TPU is gone: `run` deletes
# what is left of it, asks for it anew, and goes on. So leave `run` in tmux on a machine that stays up; where it was cut
# off, start the same `run` again. Exit codes of the command: 0 is done, 2 a mistake, neither is tried again; anything
# else is, --max_restarts times an hour; 75 says that it was told to stop and has saved.
#
# Verbs: create (without a job), run, status, logs, stop, delete.
# --name, --zone          always needed; --project where it is not gcloud's own
# --accelerator_type      as gcloud names it: v5litepod-256 (v5e:16x16), v5p-1024 (cores: v5p:8x8x8), v6e-64, v4-32, ...
# --slices=1              so many of it: the mesh axis slice (--config.mesh.slice) is over them
# --spot                  cheaper, can be preempted; --create_flag=--reserved and others of `queued-resources create`
# --runtime_version       the image of the hosts; by default the one for the accelerator type
# --setup                 a shell command that each host runs in the copied folder before every start, such as
#                         'gcloud storage cp --recursive gs://BUCKET/data .'
# --grace_s=300           how long a stop waits for the save before it kills; --max_restarts=20; --poll_s=60
# --dry_run               print the commands instead, as if all went well; nothing else is on stdout
. "$(dirname "$0")/flags.sh"
parse "create run status logs stop delete" "name= zone= project= accelerator_type= runtime_version= slices=1 spot=false
  create_flag=() setup= grace_s=300 max_restarts=20 poll_s=60 slice=0 worker=0" "$@"

need name "it names the TPU, and finds it again"
need_name name
need zone "one with this TPU: gcloud compute tpus locations list"
need_number slices grace_s max_restarts poll_s
where=(--zone="$zone")
[[ -z $project ]] || where+=(--project="$project")
nodes=$name
((slices == 1)) || nodes=$(for ((i = 0; i < slices; i++)); do echo "$name-$i"; done)

# Source: cloud.google.com/tpu/docs/runtimes, read 2026-11-22.
check_accelerator() {
  local image
  need accelerator_type "such as v5litepod-16: gcloud compute tpus accelerator-types list --zone=$zone"
  case $accelerator_type in
    v2-* | v3-* | v4-*) image=tpu-ubuntu2204-base ;;
    v5litepod-*) image=v2-alpha-tpuv5-lite ;;
    v5p-*) image=v2-alpha-tpuv5 ;;
    v6e-*) image=v2-alpha-tpuv6e ;;
    v5e-*) fail "--accelerator_type=$accelerator_type: gcloud calls it v5litepod-${accelerator_type#v5e-}" ;;
    tpu7x* | v7*) fail "--accelerator_type=$accelerator_type: Cloud TPU has no TPU7x; launch/gke.sh has" ;;
    *) fail "--accelerator_type=$accelerator_type: known are v2-, v3-, v4-, v5litepod-, v5p- and v6e-, with a size" ;;
  esac
  runtime_version=${runtime_version:-$image}
}

state() {   # ANSWER: prints the state of the queued resource, nothing where there is none
  ask "$1" gcloud compute tpus queued-resources list "${where[@]}" --filter="name~/$name\$" \
    --format='value(state.state)'
}

create() {
  local size=(--node-id="$name")
  ((slices == 1)) || size=(--node-count="$slices" --node-prefix="$name")
  ! $spot || size+=(--spot)
  call gcloud compute tpus queued-resources create "$name" "${where[@]}" --accelerator-type="$accelerator_type" \
    --runtime-version="$runtime_version" "${size[@]}" ${create_flag[@]+"${create_flag[@]}"}
}

delete() {
  call gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
}

provide() {   # comes back when the TPU is there, made where it was not
  local now answer='' last=unknown
  while :; do
    now=$(state "$answer")
    [[ $now == "$last" ]] || note "$name is ${now:-not there}"
    last=$now
    case $now in
      ACTIVE) return ;;
      '') create
          answer=ACTIVE ;;
      SUSPENDED) delete ;;   # preempted; it is never given again
      FAILED) fail "$name cannot be had; the reason: gcloud compute tpus queued-resources describe $name ${where[*]}; \
then: $0 delete --name=$name --zone=$zone" ;;
      *) sleep "$poll_s" ;;
    esac
  done
}

each_node() {   # FUNCTION [ARGUMENT...]: calls it with each slice's name added, for all slices at once
  local node pid pids='' code=0
  for node in $nodes; do
    if $dry_run; then "$@" "$node"; else "$@" "$node" & pids+=" $!"; fi   # printed in their order
  done
  for pid in $pids; do wait "$pid" || code=$?; done
  return "$code"
}

on_hosts() {   # ANSWER COMMAND NODE: runs the shell command on every host of the slice
  ask "$1" gcloud compute tpus tpu-vm ssh "$3" "${where[@]}" --worker=all --command="$2"
}

copy() {   # NODE
  call gcloud compute tpus tpu-vm scp "$archive" "$1:fm_jax.tgz" "${where[@]}" --worker=all
}

# What a host does to start the job. TPU images have Python 3.10, fm_jax needs 3.11: uv brings its own.
start_script() {
  cat <<END
set -eu
mkdir -p fm_jax && tar -xzf fm_jax.tgz -C fm_jax && cd fm_jax
if ! [ -x .venv/bin/python ]; then
  python3 -m pip install --quiet --user uv==0.13.8
  python3 -m uv venv --quiet --clear --python 3.12 .venv
fi
python3 -m uv pip install --quiet --python .venv/bin/python --constraint launch/constraints.txt --editable '.[tpu]'
$setup
cat > job.sh <<'END_OF_JOB'
export PATH="\$PWD/.venv/bin:\$PATH" PYTHONUNBUFFERED=1
exec $(quote "${command[@]}")
END_OF_JOB
sudo tee /etc/systemd/system/fm_jax.service > /dev/null <<END_OF_UNIT
[Unit]
Wants=network-online.target
After=network-online.target
StartLimitIntervalSec=3600
StartLimitBurst=$max_restarts
[Service]
User=\$(id -un)
WorkingDirectory=\$PWD
ExecStart=/bin/bash job.sh
KillMode=mixed
TimeoutStopSec=$grace_s
Restart=on-failure
RestartSec=10
RestartPreventExitStatus=2
SuccessExitStatus=75
RestartForceExitStatus=75
LimitMEMLOCK=infinity
LimitNOFILE=1048576
[Install]
WantedBy=multi-user.target
END_OF_UNIT
sudo systemctl daemon-reload
sudo systemctl reset-failed fm_jax 2> /dev/null || true
sudo systemctl enable --quiet fm_jax
sudo systemctl restart fm_jax
END
}

start() {   # each step only where the one before went well; `set -e` does not hold in what is called in a condition
  archive=${TMPDIR:-/tmp}/fm_jax-$name.tgz
  call bash -c 'cd "$1" && git ls-files -z --cached --others --exclude-standard | tar -czf "$2" --null -T -' \
    pack "$ROOT" "$archive" && each_node copy && each_node on_hosts '' "$(start_script)"
}

# One word a host. `stop` disables the service; a host that is going down has not, and its job counts as running.
# ExecMainCode is 1 once the command ended by itself, 0 where it has not run since the host booted.
HOST_STATE='
if ! systemctl is-enabled --quiet fm_jax; then echo fm_jax: stopped
elif systemctl is-failed --quiet fm_jax; then echo fm_jax: failed
elif [ "$(systemctl show --value --property=ActiveState,ExecMainCode,ExecMainStatus fm_jax | sort | xargs)" \
     = "0 1 inactive" ]; then echo fm_jax: done
else echo fm_jax: running
fi'

watch() {   # comes back with 0 when the job has ended, with 1 when the TPU is gone
  local now
  note "watching; $0 logs --name=$name --zone=$zone shows what it prints"
  while :; do
    if ! now=$(state ACTIVE); then
      note "gcloud did not answer (above); asking again in $poll_s s"
    elif [[ $now != ACTIVE ]]; then
      note "$name is ${now:-gone}"
      return 1
    else
      case $({ each_node on_hosts 'fm_jax: done' "$HOST_STATE" || echo fm_jax: unknown; } | grep -o 'fm_jax: [a-z]*') in
        *failed*) fail "a host gave up: $0 logs --name=$name --zone=$zone" ;;
        *stopped*) note "stopped by \`stop\`; the same run continues it" && return ;;
        *running*) ;;
        *unknown* | '') note "some hosts did not answer (above); asking again in $poll_s s" ;;
        *) note "done; the TPU still costs: $0 delete --name=$name --zone=$zone" && return ;;
      esac
    fi
    sleep "$poll_s"
  done
}

case $verb in
  create)
    check_accelerator
    provide ;;
  run)
    check_accelerator
    need_command /
    while :; do
      provide
      if start; then
        ! watch || break
      else
        [[ $(state ACTIVE) != ACTIVE ]] || fail "could not be started (above); the TPU stays: try again, or $0 delete"
        sleep "$poll_s"   # preempted meanwhile
      fi
    done ;;
  status)
    now=$(state ACTIVE)
    note "$name is ${now:-not there}"
    [[ $now != ACTIVE ]] || each_node on_hosts '' 'systemctl --no-pager --lines=3 status fm_jax || true' ;;
  logs)
    ((slices == 1 && slice == 0)) && node=$name || node=$name-$slice
    call gcloud compute tpus tpu-vm ssh "$node" "${where[@]}" --worker="$worker" \
      --command='sudo journalctl --unit=fm_jax --output=cat --lines=1000 --follow' ;;
  stop) each_node on_hosts '' 'sudo systemctl disable --now fm_jax' ;;
  delete) delete ;;
esac

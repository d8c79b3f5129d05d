# shellcheck shell=bash
# What tpu_vm.sh, gke.sh and slurm.sh share: flags, --help, --dry_run. They source it. Bash 3.2, as on macOS, is enough.
#
# A script is `VERB [--flags] [-- COMMAND ...]`. The comment at its head is its --help. Whatever it does goes through
# `call` and `ask`, so that --dry_run prints just that, one shell line each, on stdout; all else is on stderr.
set -euo pipefail
export LC_ALL=C   # [a-z] means the letters of ASCII
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
exec 3>&1         # where --dry_run prints, also from within $(...)

fail() {   # MESSAGE: ends the script as fm_jax ends on a mistake that the user can mend
  printf 'error: %s\n' "$1" >&2
  exit 2
}

note() { printf '%s\n' "$1" >&2; }

quote() {   # WORD...: prints the words as one line that a shell reads back as the same words
  local word rest line=
  for word; do
    case $word in
      '' | *[!a-zA-Z0-9_@%+=:,./-]*)
        rest=$word word=
        while [[ $rest == *\'* ]]; do word+="${rest%%\'*}'\\''" rest=${rest#*\'}; done
        word="'$word$rest'" ;;
    esac
    line+=" $word"
  done
  printf '%s\n' "${line# }"
}

call() {   # COMMAND...: runs it; under --dry_run prints it
  if $dry_run; then quote "$@" >&3; else "$@"; fi
}

ask() {   # ANSWER COMMAND...: prints what the command prints; under --dry_run prints ANSWER, and shows the command
  local answer=$1
  shift
  if $dry_run; then
    quote "$@" >&3
    [[ -z $answer ]] || printf '%s\n' "$answer"
  else
    "$@"
  fi
}

feed() {   # TEXT COMMAND...: runs the command with TEXT as its standard input; under --dry_run prints both
  local text=$1
  shift
  if $dry_run; then
    printf "%s <<'END_OF_INPUT'\n%s\nEND_OF_INPUT\n" "$(quote "$@")" "$text" >&3
  else
    "$@" <<< "$text"
  fi
}

# VERBS FLAGS "$@": sets `verb`, the array `command` (what follows --) and a variable for each flag. FLAGS are words
# name=default; with the default `false` a flag takes no value, with () it is an array and may be given more than once.
parse() {
  local all_verbs=$1 all_flags this_flag this_name this_value   # a flag may be called what a local is not
  all_flags=" $(xargs <<< "$2") dry_run=false "
  shift 2
  for this_flag in $all_flags; do
    this_name=${this_flag%%=*}
    if [[ $this_flag == *'=()' ]]; then eval "$this_name=()"; else printf -v "$this_name" %s "${this_flag#*=}"; fi
  done
  command=()
  case ${1-} in
    -h | --help | help) verb=--help ;;
    -* | '') fail "what shall it do? The first word is one of: $all_verbs; --help explains them" ;;
    *) verb=$1
       [[ " $all_verbs " == *" $verb "* ]] || fail "unknown verb '$verb'; known: $all_verbs" ;;
  esac
  while shift && (($#)); do
    case $1 in
      --) shift && command=("$@") && break ;;
      -h | --help) verb=--help && continue ;;
      --*) this_flag=${1#--} this_name=${1#--} this_name=${this_name%%=*} ;;
      *) fail "unexpected '$1': flags start with --, and the command to run follows --" ;;
    esac
    if [[ $all_flags != *" $this_name="* ]]; then
      [[ $all_flags != *" ${this_name//-/_}="* ]] || fail "unknown flag --$this_name; did you mean --${this_name//-/_}?"
      fail "unknown flag --$this_name; known:$(sed 's/=[^ ]*//g; s/ \([a-z]\)/ --\1/g; s/ $//' <<< "$all_flags")"
    fi
    case $all_flags in
      *" $this_name=false "*)
        [[ $this_flag == "$this_name" ]] || fail "--$this_name takes no value"
        this_value=true ;;
      *)
        if [[ $this_flag == *=* ]]; then this_value=${this_flag#*=}; else
          [[ $# -gt 1 && $2 != --* ]] || fail "--$this_name needs a value: --$this_name=VALUE"
          shift
          this_value=$1
        fi
        [[ -n $this_value ]] || fail "--$this_name is empty: --$this_name=VALUE" ;;
    esac
    case $all_flags in
      *" $this_name=() "*) eval "$this_name+=(\"\$this_value\")" ;;
      *) printf -v "$this_name" %s "$this_value" ;;
    esac
  done
  if [[ $verb == --help ]]; then
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
    exit 0
  fi
}

need() {   # FLAG HINT: refuses to go on without it
  [[ -n ${!1} ]] || fail "--$1 is required to $verb: $2"
}

need_number() {   # FLAG...: each must be a positive whole number
  local this_name
  for this_name; do
    [[ ${!this_name} =~ ^[1-9][0-9]*$ ]] || fail "--$this_name=${!this_name} is not a positive whole number"
  done
}

need_name() {   # FLAG: what clouds and schedulers accept as a name
  local form='^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$'   # bash 3.2 reads a ( from a variable alone
  [[ ${!1} =~ $form ]] ||
    fail "--$1=${!1}: lower-case letters, digits and hyphens, starting with a letter, at most 40"
}

# need_command [MOUNT]: there must be a command; with MOUNT, its --workdir must be a URL or below it ('': a URL), where
# all hosts see it, and see it again.
need_command() {
  local word last='' workdir=''
  ((${#command[@]})) ||
    fail "no command to run: end with -- python -m fm_jax.train --config configs/causal_lm.py:1b --workdir WORKDIR"
  for word in "${command[@]}"; do
    [[ $word == --workdir=* ]] && workdir=${word#*=}
    [[ $last == --workdir ]] && workdir=$word
    last=$word
  done
  [[ $# == 0 || -z $workdir || $workdir == *://* || $workdir == "${1:-://}"* ]] ||
    fail "--workdir $workdir is on each machine's own disk and lost with it: give gs://BUCKET/PATH, or a path in a \
bucket or file server that is mounted${1:+ below $1}"
}

#!/usr/bin/env bash
# SLURM: one or several nodes with NVIDIA GPUs, with or without a container.
#
# From nothing to a running job, on a login node, in a copy of this repository that the nodes see too:
#
#   pip install --constraint launch/constraints.txt --editable '.[cuda]'      # or --container, below
#   launch/slurm.sh run --name=try --nodes=4 --time=24:00:00 -- \
#     python -m fm_jax.train --config configs/causal_lm.py:1b --workdir runs/try
#
# submits one batch job. Its environment is yours at that moment, so activate the virtual environment first. Relative
# paths are relative to the repository; what the job prints is in runs/NAME.log there, all attempts in one file.
#
# See it:   launch/slurm.sh status --name=try      launch/slurm.sh logs --name=try
# Stop it:  launch/slurm.sh stop   --name=try      saves, and is not queued again; the same `run` continues it
#
# How it comes back: the batch script looks at the exit code of the command. 0 is done and 2 a mistake: the job ends. 75
# says that it was told to stop and has saved: the job queues itself again, as often as that happens. The command is
# told so --grace_s before the time limit, and by a preemption. Anything else is a failure and queues the job again too,
# until it was queued --max_restarts times in all. Where a node dies or a preemption leaves no time, SLURM queues it
# again itself. With the same name submitted twice, the second job waits for the first to end.
#
# There is one process for each GPU: what JAX assumes under SLURM (it gives process i of a node the i-th GPU that the
# process sees, so all must see all of the node's: no --gpus-per-task).
#
# Verbs: run, render (prints the batch script: to keep, change, or give to sbatch), status, logs, stop.
# --name                  always needed
# --nodes, --time         needed to run; --gpus_per_node=8 --cpus_per_gpu=8
# --partition, --account  where your cluster wants them; --sbatch_flag=--qos=high and any other flag of sbatch
# --container             pyxis:IMAGE (REGISTRY#IMAGE:TAG, or a .sqsh file) or apptainer:FILE.sif, made from Dockerfile;
#                         the repository is mounted at its own path, and --mounts=/data:/data,... besides
# --grace_s=300           how long before the time limit the command is told to stop; --max_restarts=20
# --dry_run               print the commands instead; nothing else is on stdout
. "$(dirname "$0")/flags.sh"
parse "run render status logs stop" "name= nodes= time= gpus_per_node=8 cpus_per_gpu=8 partition= account= container=
  mounts= sbatch_flag=() grace_s=300 max_restarts=20" "$@"

need name "it names the job and its log"
need_name name
log=$ROOT/runs/$name.log

check() {
  need nodes "how many, each with --gpus_per_node=$gpus_per_node GPUs"
  need_number nodes gpus_per_node cpus_per_gpu grace_s max_restarts
  need time "the limit of one attempt, such as 24:00:00; the job queues itself again before it"
  need_command
  case $container in
    '') [[ -z $mounts ]] || fail "--mounts=$mounts is for a --container; without one a job sees what the node sees" ;;
    pyxis:?* | apptainer:?*) ;;
    *) fail "--container=$container: give pyxis:IMAGE or apptainer:FILE.sif" ;;
  esac
}

directive() {   # FLAG: one line for sbatch, which splits it at spaces as a shell does
  printf '#SBATCH %s\n' "$(quote "$1")"
}

# --signal is for the steps alone: the batch shell gets nothing, and outlives the command to look at its exit code. A
# preemption may reach the shell too; its trap then lets it go on. A command that ends first must not take the others
# with it, who may still be saving: srun gives them --wait.
render() {
  local flag inside=() mounted="$ROOT:$ROOT${mounts:+,$mounts}"
  echo '#!/usr/bin/env bash'
  for flag in --job-name="$name" --chdir="$ROOT" --output="$log" --open-mode=append --nodes="$nodes" --time="$time" \
      --ntasks-per-node="$gpus_per_node" --gpus-per-node="$gpus_per_node" --cpus-per-task="$cpus_per_gpu" \
      --signal=TERM@"$grace_s" --requeue --dependency=singleton ${partition:+--partition="$partition"} \
      ${account:+--account="$account"} ${sbatch_flag[@]+"${sbatch_flag[@]}"}; do
    directive "$flag"
  done
  case $container in
    pyxis:*) inside=(--container-image="${container#pyxis:}" --container-mounts="$mounted"
                     --container-workdir="$ROOT") ;;
    apptainer:*) inside=(apptainer exec --nv --bind "$mounted" --pwd "$ROOT" "${container#apptainer:}") ;;
  esac
  cat <<END
trap : TERM
export PYTHONUNBUFFERED=1
srun --kill-on-bad-exit=0 --wait=$grace_s --gpu-bind=none --cpus-per-task=$cpus_per_gpu \\
  $(quote ${inside[@]+"${inside[@]}"} "${command[@]}")
code=\$?
restarts=\${SLURM_RESTART_COUNT:-0}
echo "\$(date '+%F %T') attempt \$((restarts + 1)) of job \$SLURM_JOB_ID ended with exit code \$code"
case \$code in
  0 | 2) exit \$code ;;
  75) ;;
  *) if ((restarts >= $max_restarts)); then echo "not again: --max_restarts=$max_restarts"; exit \$code; fi ;;
esac
# A job that was cancelled is no longer RUNNING; \`stop\` forbids the requeue.
if [ "\$(squeue --noheader --format=%T --jobs="\$SLURM_JOB_ID")" = RUNNING ]; then scontrol requeue "\$SLURM_JOB_ID"; fi
exit \$code
END
}

case $verb in
  render)
    check
    render ;;
  run)
    check
    call mkdir -p "$ROOT/runs"
    feed "$(render)" sbatch ;;
  status) call squeue --me --name="$name" ;;
  logs) call tail --lines=1000 --follow=name --retry "$log" ;;
  stop)
    call scancel --me --name="$name" --state=PENDING
    ids=$(ask JOBID squeue --me --name="$name" --noheader --states=RUNNING --format=%A)
    for id in $ids; do
      call scontrol update JobId="$id" Requeue=0
      call scancel --signal=TERM "$id"
    done ;;
esac

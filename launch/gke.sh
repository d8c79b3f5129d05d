#!/usr/bin/env bash
# Google Kubernetes Engine: TPU slices, one or several, or nodes with NVIDIA GPUs, as a JobSet (jobset.yaml).
#
# From nothing to a running job (needs gcloud, logged in, kubectl with gke-gcloud-auth-plugin, and docker):
#
#   where='--project=PROJECT --location=us-east5' image=us-east5-docker.pkg.dev/PROJECT/fm-jax/fm_jax:1
#   launch/gke.sh create $where && launch/gke.sh image --platform=tpu --image=$image &&
#   launch/gke.sh run --name=try --image=$image --topology=v6e:8x8 --slices=2 --spot -- \
#     python -m fm_jax.train --config configs/causal_lm.py:1b --workdir gs://BUCKET/runs/try
#
# `create` makes an Autopilot cluster, which brings nodes when a job asks for them and takes them away after it,
# installs JobSet in it, and makes the repository for images; do it once. `image` builds Dockerfile and pushes it; do it
# when the code changed. `run` replaces the job of that name; the job goes on from its last checkpoint. In a cluster of
# your own, skip `create` and point kubectl at it: TPU node pools with the topology must be there, one for each slice.
#
# See it:   launch/gke.sh status --name=try      launch/gke.sh logs --name=try [--slice=1 --host=3]
# Stop it:  launch/gke.sh stop --name=try        saves; the nodes go. The cluster:  launch/gke.sh delete $where
#
# How it comes back: Kubernetes does it; nothing of yours needs to run. JobSet starts all hosts again from the last
# checkpoint when one fails or is preempted. Exit codes of the command: 0 is done; 2 a mistake, the job ends; 75 says
# that it was told to stop and has saved, which like a preemption is no failure; anything else is, --max_restarts times.
#
# Verbs: create, image, run, render (prints the manifest, to keep or change), status, logs, stop, delete.
# --name, --image         needed to run; also --topology, or --gpu with --nodes
# --topology              of one slice, as fm_jax.plan takes it: v4:4x4x4, v5e:16x16, v5p:8x8x8, v6e:8x8, tpu7x:4x4x4
# --slices=1              so many of it: the mesh axis slice (--config.mesh.slice) is over them
# --gpu, --nodes          such as --gpu=nvidia-h100-80gb --nodes=4 --chips_per_host=8; one process a node
# --chips_per_host=4      TPU chips, or GPUs, of one host
# --spot                  cheaper, can be preempted, with at most 25 s to save
# --bucket                a bucket that the job sees as /bucket: --workdir /bucket/try, --config.data.train=/bucket/x
# --service_account       the Kubernetes account that may use the bucket, this one or one named by gs:// (GKE calls it
#                         workload identity)
# --cluster=fm-jax        --location and --project: for create and delete; --platform=tpu or cuda: for image
# --grace_s=300           how long a stop waits for the save before it kills; --max_restarts=20
# --dry_run               print the commands instead; nothing else is on stdout
. "$(dirname "$0")/flags.sh"
parse "create image run render status logs stop delete" "name= image= platform= topology= slices=1 gpu= nodes=
  chips_per_host= spot=false bucket= service_account= cluster=fm-jax location= project= grace_s=300 max_restarts=20
  slice=0 host=0" "$@"

JOBSET=v0.12.0   # the rules of jobset.yaml need 0.11

# Sets tpu, shape, hosts and chips_per_host of a slice, or the latter two of the nodes. A TPU host has four chips, but
# for a slice of one. Source: cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus, read 2026-11-22.
check_chips() {
  local dimensions=2 size
  if [[ -n $gpu ]]; then
    [[ -z $topology ]] || fail "--gpu=$gpu and --topology=$topology: give one"
    ((slices == 1)) || fail "--slices=$slices is for TPUs; GPUs take --nodes"
    need nodes "how many hosts with $gpu"
    chips_per_host=${chips_per_host:-8} hosts=$nodes
    need_number nodes chips_per_host
    return
  fi
  need topology "such as v6e:8x8, or --gpu=nvidia-h100-80gb with --nodes"
  [[ -z $nodes ]] || fail "--nodes=$nodes is for --gpu; the hosts of a slice follow from --topology=$topology"
  case $topology in
    v4:*) tpu='tpu-v4-podslice' dimensions=3 ;;
    v5e:*) tpu='tpu-v5-lite-podslice' ;;
    v5p:*) tpu='tpu-v5p-slice' dimensions=3 ;;
    v6e:*) tpu='tpu-v6e-slice' ;;
    tpu7x:*) tpu='tpu7x' dimensions=3 ;;
    *) fail "--topology=$topology: known are v4:, v5e:, v5p:, v6e: and tpu7x:, each with its shape, such as v6e:8x8" ;;
  esac
  shape=${topology#*:}
  if ((dimensions == 2)); then size='^[1-9][0-9]*x[1-9][0-9]*$'; else size='^[1-9][0-9]*x[1-9][0-9]*x[1-9][0-9]*$'; fi
  [[ $shape =~ $size ]] || fail "--topology=$topology: ${topology%%:*} has $dimensions dimensions, such as \
$( ((dimensions == 2)) && echo 8x8 || echo 4x4x4)"
  local chips=$((${shape//x/*}))
  chips_per_host=${chips_per_host:-$((chips < 4 ? chips : 4))}
  need_number chips_per_host
  ((chips % chips_per_host == 0)) || fail "--topology=$topology: its $chips chips are not hosts of $chips_per_host"
  hosts=$((chips / chips_per_host))
}

json() {   # WORD: prints it as a YAML string; $ is doubled, as Kubernetes puts variables in the place of $(NAME)
  local word=$1
  word=${word//\\/\\\\}
  word=${word//\"/\\\"}
  word=${word//$'\n'/\\n}
  word=${word//$'\t'/\\t}
  printf '"%s"' "${word//\$/\$\$}"
}

render() {
  local line word kinds=tpu marked='^(.*[^ ]) +# (tpu|gpu|spot|bucket|account)$'
  [[ -z $gpu ]] || kinds=gpu
  ! $spot || kinds+=' spot'
  [[ -z $bucket ]] || kinds+=' bucket'
  [[ -z $service_account ]] || kinds+=' account'
  while IFS= read -r line; do
    if [[ $line =~ $marked ]]; then
      [[ " $kinds " == *" ${BASH_REMATCH[2]} "* ]] || continue
      line=${BASH_REMATCH[1]}
    fi
    case $line in
      '#'*) continue ;;   # about the template
      *@COMMAND@) for word in "${command[@]}"; do printf '%s- %s\n' "${line%@COMMAND@}" "$(json "$word")"; done
                  continue ;;
    esac
    line=${line//@NAME@/$name}
    line=${line//@MAX_RESTARTS@/$max_restarts}
    line=${line//@SLICES@/$slices}
    line=${line//@HOSTS@/$hosts}
    line=${line//@GRACE_S@/$grace_s}
    line=${line//@SERVICE_ACCOUNT@/$service_account}
    line=${line//@TPU@/${tpu-}}
    line=${line//@TOPOLOGY@/${shape-}}
    line=${line//@GPU@/$gpu}
    line=${line//@IMAGE@/$image}
    line=${line//@CHIPS@/$chips_per_host}
    printf '%s\n' "${line//@BUCKET@/$bucket}"
  done < "$ROOT/launch/jobset.yaml"
}

check() {
  local value
  need name "it names the job, and finds it again"
  need_name name
  need image "what \`$0 image\` pushed"
  need_number slices grace_s max_restarts
  check_chips
  for value in "$image" "$gpu" "$bucket" "$service_account"; do
    [[ $value =~ ^[-a-zA-Z0-9_./:@]*$ ]] || fail "'$value': only letters, digits and -_./:@ can be in such a name"
  done
  need_command "${bucket:+/bucket/}"
}

check_cluster() {
  need location "a region with these chips, such as us-east5"
  need project "the cloud project: gcloud projects list"
  need_name cluster
  where=(--location="$location" --project="$project")
}

pods() {
  echo "jobset.sigs.k8s.io/jobset-name=$name"
}

case $verb in
  create)
    check_cluster
    call gcloud artifacts repositories create "$cluster" "${where[@]}" --repository-format=docker
    call gcloud container clusters create-auto "$cluster" "${where[@]}"
    call gcloud container clusters get-credentials "$cluster" "${where[@]}"
    call kubectl apply --server-side --filename \
      "https://github.com/kubernetes-sigs/jobset/releases/download/$JOBSET/manifests.yaml" ;;
  delete)
    check_cluster
    call gcloud container clusters delete "$cluster" "${where[@]}" --quiet ;;
  image)
    need image "where to push it, such as us-east5-docker.pkg.dev/PROJECT/fm-jax/fm_jax:1"
    need platform "tpu or cuda"
    [[ $platform == tpu || $platform == cuda ]] || fail "--platform=$platform: give tpu or cuda"
    call docker build --file "$ROOT/launch/Dockerfile" --build-arg "PLATFORM=$platform" --platform=linux/amd64 \
      --tag "$image" "$ROOT"
    call gcloud auth configure-docker "${image%%/*}" --quiet
    call docker push "$image" ;;
  render)
    check
    render ;;
  run)
    check
    call kubectl delete jobset "$name" --ignore-not-found --cascade=foreground
    feed "$(render)" kubectl create --filename - ;;
  status)
    need name "it names the job"
    call kubectl get jobset "$name"
    call kubectl get pods --selector="$(pods)" --output=wide ;;
  logs)
    need name "it names the job"
    call kubectl logs --follow --tail=1000 --container=train \
      --selector="$(pods),jobset.sigs.k8s.io/job-index=$slice,batch.kubernetes.io/job-completion-index=$host" ;;
  stop)
    need name "it names the job"
    call kubectl delete jobset "$name" --cascade=foreground ;;   # comes back when the pods are gone
esac

"""The launchers: what they would run, that it is what they run, how they stop and come back, and how they refuse.

No cloud and no cluster is at hand: stand-ins for gcloud, kubectl, docker, sbatch, ... note what they are called with
and answer as a test says. What the scripts send elsewhere, a host's start script or a batch script, runs with them too.
"""

import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import yaml

ROOT = pathlib.Path(__file__).resolve().parent.parent
LAUNCH = ROOT / "launch"
SCRIPTS = ["gke.sh", "slurm.sh", "tpu_vm.sh"]
TRAIN = ["python", "-m", "fm_jax.train", "--config", "configs/causal_lm.py:1b", "--workdir", "gs://b/runs/try"]
# Whatever a shell, systemd, YAML or Kubernetes could read something into.
NASTY = ["python", "-m", "x", "", "a b", "it's", 'say "hi"', "$HOME", "$(id)", "$$(id)", "`id`", "back\\slash", "a\\nb",
         "&& false", "*", "~", "#c", "@NAME@", "&", "%h", "two\nlines", "--config.data.train=a:0.7,b:0.3", "ü", "!1"]

# Notes its name and arguments, and its standard input where a file is expected there; then does as `answers` says.
STAND_IN = """#!/usr/bin/env bash
call=$(printf '%s\\037' "${0##*/}" "$@"; echo .)
case "${0##*/} $*" in sbatch* | *'--filename -'* | tee*) call=${call%.}$(printf '<'; cat; echo .) ;; esac
printf '%s\\036' "${call%?}" >> "$CALLS/calls"
pop() {   # FILE: prints its first line and takes it away, but the last
  head -n 1 "$CALLS/$1"
  if [ "$(wc -l < "$CALLS/$1")" -gt 1 ]; then sed -i 1d "$CALLS/$1"; fi
}
call="${0##*/} $*"
. "$CALLS/answers"
"""
TOOLS = ["gcloud", "kubectl", "docker", "sbatch", "squeue", "scancel", "scontrol", "srun", "sleep", "tail", "sudo",
         "systemctl", "python3", "apptainer", "mkdir"]


class Machine:
    """A machine with stand-ins. `answers` is shell code that each runs, with the call, as one line, in $call."""

    def __init__(self, folder):
        self.folder = folder
        (folder / "bin").mkdir()
        for tool in TOOLS:
            (folder / "bin" / tool).write_text(STAND_IN)
            (folder / "bin" / tool).chmod(0o755)

    def __call__(self, *words, answers="", text=None, cwd=None, **files):
        """Returns (exit code, stdout, stderr) of the command, having set `calls`; `files` are for `pop`."""
        for name, content in {"calls": "", "answers": answers + "\n", **files}.items():
            (self.folder / name).write_text(content)
        done = subprocess.run([*map(str, words)], input=text, capture_output=True, text=True, timeout=60, cwd=cwd,
                              env={"PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}", "CALLS": str(self.folder),
                                   "HOME": str(self.folder), "TMPDIR": str(self.folder)})
        calls = (self.folder / "calls").read_text().split("\036")[:-1]
        self.calls = [call.removesuffix("\037").split("\037") for call in calls]
        return done.returncode, done.stdout, done.stderr

    def launch(self, script, *words, **keywords):
        return self(LAUNCH / script, *words, **keywords)


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def commands(out):
    """Returns the commands of a dry run, each a list of words; what a here-document holds is the last, after <."""
    found = []
    for part in re.split(r"(<<'END_OF_INPUT'\n.*?\nEND_OF_INPUT\n)", out, flags=re.S):
        if part.startswith("<<"):
            found[-1].append("<" + part.split("\n", 1)[1].removesuffix("END_OF_INPUT\n"))
        else:
            lexer = shlex.shlex(part, posix=True, punctuation_chars="\n")
            lexer.whitespace, lexer.commenters, lexer.whitespace_split = " ", "", True
            line = []
            for token in [*lexer, "\n"]:
                if set(token) == {"\n"} and line:
                    found.append(line)
                    line = []
                elif set(token) != {"\n"}:
                    line.append(token)
    return found


TPU = ["--name=try", "--zone=z", "--accelerator_type=v6e-64"]
GKE = ["--name=try", "--image=r.dev/p/fm-jax/fm_jax:1", "--topology=v6e:8x8"]
SLURM = ["--name=try", "--nodes=2", "--time=1:00:00"]
CLUSTER = ["--project=p", "--location=l"]
LIST = shlex.split("gcloud compute tpus queued-resources list --zone=z --filter='name~/try$' "
                   "--format='value(state.state)'")
CREATE = shlex.split("gcloud compute tpus queued-resources create try --zone=z --accelerator-type=v6e-64 "
                     "--runtime-version=v2-alpha-tpuv6e --node-id=try")
DELETE = shlex.split("gcloud compute tpus queued-resources delete try --zone=z --force --quiet")
COPY = ["gcloud", "compute", "tpus", "tpu-vm", "scp"]
SSH = ["gcloud", "compute", "tpus", "tpu-vm", "ssh"]
HOST = "gcloud compute tpus tpu-vm ssh try --zone=z --worker=all "


def brief(calls):
    """Returns what a test says of each call of tpu_vm.sh: one word."""
    def word(call):
        if call[0] in ("sleep", "bash"):
            return call[0]
        return {"list": "state", "create": "create", "delete": "delete", "scp": "copy"}.get(call[4]) or (
            "look" if "is-enabled" in call[-1] else "start" if "systemctl restart" in call[-1] else call[-1])
    return [word(call) for call in calls]


# --- Dry runs --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("script, words, want", [
    ("tpu_vm.sh", ["create", *TPU], [LIST, CREATE, LIST]),
    ("tpu_vm.sh", ["create", *TPU, "--project=p", "--slices=3", "--spot", "--create_flag=--network=n",
                   "--create_flag=--labels=a=b c", "--runtime_version=r"],
     [[*LIST[:6], "--project=p", *LIST[6:]],
      shlex.split("gcloud compute tpus queued-resources create try --zone=z --project=p --accelerator-type=v6e-64 "
                  "--runtime-version=r --node-count=3 --node-prefix=try --spot --network=n '--labels=a=b c'"),
      [*LIST[:6], "--project=p", *LIST[6:]]]),
    ("tpu_vm.sh", ["status", *TPU[:2]],
     [LIST, [*shlex.split(HOST), "--command=systemctl --no-pager --lines=3 status fm_jax || true"]]),
    ("tpu_vm.sh", ["logs", *TPU[:2], "--worker=3"],
     [[*SSH, "try", "--zone=z", "--worker=3",
       "--command=sudo journalctl --unit=fm_jax --output=cat --lines=1000 --follow"]]),
    ("tpu_vm.sh", ["stop", *TPU[:2], "--slices=2"],
     [[*SSH, f"try-{i}", "--zone=z", "--worker=all", "--command=sudo systemctl disable --now fm_jax"] for i in (0, 1)]),
    ("tpu_vm.sh", ["delete", *TPU[:2]], [DELETE]),
    ("gke.sh", ["create", *CLUSTER],
     [shlex.split("gcloud artifacts repositories create fm-jax --location=l --project=p --repository-format=docker"),
      shlex.split("gcloud container clusters create-auto fm-jax --location=l --project=p"),
      shlex.split("gcloud container clusters get-credentials fm-jax --location=l --project=p"),
      shlex.split("kubectl apply --server-side --filename "
                  "https://github.com/kubernetes-sigs/jobset/releases/download/v0.12.0/manifests.yaml")]),
    ("gke.sh", ["delete", *CLUSTER, "--cluster=c"],
     [shlex.split("gcloud container clusters delete c --location=l --project=p --quiet")]),
    ("gke.sh", ["image", "--platform=tpu", "--image=r.dev/p/fm-jax/fm_jax:1"],
     [["docker", "build", "--file", str(LAUNCH / "Dockerfile"), "--build-arg", "PLATFORM=tpu",
       "--platform=linux/amd64", "--tag", "r.dev/p/fm-jax/fm_jax:1", str(ROOT)],
      ["gcloud", "auth", "configure-docker", "r.dev", "--quiet"], ["docker", "push", "r.dev/p/fm-jax/fm_jax:1"]]),
    ("gke.sh", ["status", "--name=try"],
     [shlex.split("kubectl get jobset try"),
      shlex.split("kubectl get pods --selector=jobset.sigs.k8s.io/jobset-name=try --output=wide")]),
    ("gke.sh", ["logs", "--name=try", "--slice=1", "--host=2"],
     [shlex.split("kubectl logs --follow --tail=1000 --container=train --selector=jobset.sigs.k8s.io/jobset-name=try,"
                  "jobset.sigs.k8s.io/job-index=1,batch.kubernetes.io/job-completion-index=2")]),
    ("gke.sh", ["stop", "--name=try"], [shlex.split("kubectl delete jobset try --cascade=foreground")]),
    ("slurm.sh", ["status", "--name=try"], [shlex.split("squeue --me --name=try")]),
    ("slurm.sh", ["logs", "--name=try"],
     [shlex.split("tail --lines=1000 --follow=name --retry") + [str(ROOT / "runs" / "try.log")]]),
    ("slurm.sh", ["stop", "--name=try"],
     [shlex.split("scancel --me --name=try --state=PENDING"),
      shlex.split("squeue --me --name=try --noheader --states=RUNNING --format=%A"),
      shlex.split("scontrol update JobId=JOBID Requeue=0"), shlex.split("scancel --signal=TERM JOBID")]),
])
def test_a_dry_run_prints_the_commands_and_calls_nothing(machine, script, words, want):
    code, out, err = machine.launch(script, *words, "--dry_run")
    assert code == 0 and machine.calls == [], err
    assert commands(out) == want


def test_a_dry_run_of_a_job_on_two_slices(machine):
    code, out, _ = machine.launch("tpu_vm.sh", "run", *TPU, "--slices=2", "--dry_run", "--", *TRAIN)
    found = commands(out)
    assert code == 0 and machine.calls == []
    assert [(c[5] if c[3:4] == ["tpu-vm"] else "") + w for c, w in zip(found, brief(found))] == [
        "state", "create", "state", "bash", *[f"{machine.folder}/fm_jax-try.tgzcopy"] * 2,
        "try-0start", "try-1start", "state", "try-0look", "try-1look"]
    assert [c[6] for c in found[4:6]] == ["try-0:fm_jax.tgz", "try-1:fm_jax.tgz"]
    assert all(c[-1].startswith("--command=set -eu\n") and "--worker=all" in c for c in found[6:8])


# The straight way of each script that does something, with answers by which the dry run and the real one agree.
STRAIGHT = [
    ("tpu_vm.sh", ["run", *TPU, "--", *TRAIN],
     """case $call in *"queued-resources list"*) pop states ;; *is-enabled*) echo fm_jax: done ;; esac""",
     {"states": "\nACTIVE\n"}),
    ("gke.sh", ["create", *CLUSTER], "", {}),
    ("gke.sh", ["run", *GKE, "--", *NASTY], "", {}),
    ("gke.sh", ["image", "--platform=cuda", "--image=r.dev/x:1"], "", {}),
    ("slurm.sh", ["run", *SLURM, "--", *NASTY], "", {}),
    ("slurm.sh", ["stop", "--name=try"], "case $call in squeue*) echo JOBID ;; esac", {}),
]


@pytest.mark.parametrize("script, words, answers, files", STRAIGHT, ids=lambda x: x[0] if isinstance(x, list) else None)
def test_what_runs_is_what_the_dry_run_printed(machine, script, words, answers, files):
    cut = words.index("--") if "--" in words else len(words)
    _, printed, _ = machine.launch(script, *words[:cut], "--dry_run", *words[cut:])
    code, out, err = machine.launch(script, *words, answers=answers, **files)
    assert code == 0 and out == "", err
    ran = machine.calls
    assert ran == [c for c in commands(printed) if c[0] != "bash"]
    if script != "tpu_vm.sh":   # nothing to wait for: then the print-out is a script that does the same
        code, _, err = machine("bash", "-euo", "pipefail", text=printed, answers=answers, **files)
        assert code == 0 and machine.calls == ran, err


@pytest.mark.parametrize("script, words, answers, files", STRAIGHT, ids=lambda x: x[0] if isinstance(x, list) else None)
def test_nothing_follows_a_command_that_failed(machine, script, words, answers, files):
    machine.launch(script, *words, answers=answers, **files)
    whole = machine.calls
    for n, failing in enumerate(whole):
        if "is-enabled" in failing[-1] or (script == "tpu_vm.sh" and n == len(whole) - 2):
            continue   # watching goes on where gcloud does not answer: below
        failure = f'if [ "$(tr -cd "\\036" < "$CALLS/calls" | wc -c)" = {n + 1} ]; then exit 7; fi\n'
        code, _, err = machine.launch(script, *words, answers=failure + answers, **files)
        after = [c for c in machine.calls[n + 1:] if c != LIST]   # tpu_vm.sh asks whether it was preempted meanwhile
        assert code in (2, 7) and machine.calls[:n + 1] == whole[:n + 1] and not after, (failing, err)


# --- Words survive ---------------------------------------------------------------------------------------------------

def test_the_host_of_a_tpu_runs_the_very_command(machine):
    """The start script, on a host with stand-ins: code unpacked, a unit that systemd reads, and the command's words."""
    _, out, _ = machine.launch("tpu_vm.sh", "run", *TPU, "--dry_run", "--setup", "echo 'set up' > was_set_up",
                               "--grace_s=99", "--max_restarts=5", "--", *NASTY)
    found = commands(out)
    assert machine(*next(c for c in found if c[0] == "bash"))[0] == 0   # the archive, of this repository as git sees it
    shutil.copy(machine.folder / "fm_jax-try.tgz", machine.folder / "fm_jax.tgz")
    script = next(c[-1].removeprefix("--command=") for c in found if "systemctl restart" in c[-1])
    (machine.folder / "bin" / "mkdir").unlink()
    code, out, err = machine("bash", "-c", script, cwd=machine.folder)
    assert code == 0, err
    home = machine.folder / "fm_jax"
    assert (home / "fm_jax" / "train.py").is_file() and (home / "launch" / "tpu_vm.sh").is_file()
    assert not (home / ".git").exists() and (home / "was_set_up").read_text() == "set up\n"
    ran = [c for c in machine.calls if c[0] in ("python3", "sudo")]
    assert [c[:4] for c in ran[:3]] == [["python3", "-m", "pip", "install"], ["python3", "-m", "uv", "venv"],
                                        ["python3", "-m", "uv", "pip"]]
    assert ran[2][-4:] == ["--constraint", "launch/constraints.txt", "--editable", ".[tpu]"]
    assert [c[1:] for c in ran[4:]] == [["systemctl", "daemon-reload"], ["systemctl", "reset-failed", "fm_jax"],
                                        ["systemctl", "enable", "--quiet", "fm_jax"],
                                        ["systemctl", "restart", "fm_jax"]]
    (home / ".venv" / "bin").mkdir(parents=True)
    shutil.copy(machine.folder / "bin" / "gcloud", home / ".venv" / "bin" / "python")   # a stand-in
    assert machine("bash", "job.sh", cwd=home)[0] == 0 and machine.calls == [NASTY]


def test_the_unit_of_a_tpu_host(machine):
    _, out, _ = machine.launch("tpu_vm.sh", "run", *TPU, "--dry_run", "--grace_s=99", "--max_restarts=5", "--", *TRAIN)
    script = next(c[-1] for c in commands(out) if "systemctl restart" in c[-1])
    unit = dict(line.split("=", 1) for line in script.split("END_OF_UNIT")[1].splitlines() if "=" in line)
    assert unit["TimeoutStopSec"] == "99" and unit["StartLimitBurst"] == "5" and unit["KillMode"] == "mixed"
    assert unit["Restart"] == "on-failure" and unit["RestartPreventExitStatus"] == "2"
    assert unit["SuccessExitStatus"] == unit["RestartForceExitStatus"] == "75"


def test_a_batch_script_gives_srun_the_very_command(machine):
    for container, before in [
            ([], []),
            (["--container=pyxis:r#i:1", "--mounts=/a b:/c"],
             ["--container-image=r#i:1", f"--container-mounts={ROOT}:{ROOT},/a b:/c", f"--container-workdir={ROOT}"]),
            (["--container=apptainer:/x/fm.sif", "--mounts=/d:/d"],
             ["apptainer", "exec", "--nv", "--bind", f"{ROOT}:{ROOT},/d:/d", "--pwd", str(ROOT), "/x/fm.sif"])]:
        _, script, _ = machine.launch("slurm.sh", "render", *SLURM, *container, "--grace_s=60", "--", *NASTY)
        assert machine("bash", "-c", script)[0] == 0
        (call,) = machine.calls
        assert call == ["srun", "--kill-on-bad-exit=0", "--wait=60", "--gpu-bind=none", "--cpus-per-task=8",
                        *before, *NASTY]


def kubernetes(words):
    """Returns the words as a container gets them: $$ is a dollar, and $(NAME) would be a variable's value."""
    assert not any(re.search(r"(?<!\$)(\$\$)*\$\(", word) for word in words), words
    return [word.replace("$$", "$") for word in words]


def test_a_manifest_gives_the_container_the_very_command(machine):
    _, manifest, _ = machine.launch("gke.sh", "render", *GKE, "--", *NASTY)
    assert kubernetes(container(pod(yaml.safe_load(manifest)))["command"]) == NASTY


# --- SLURM -----------------------------------------------------------------------------------------------------------

def test_the_directives_of_a_batch_script(machine):
    _, script, _ = machine.launch("slurm.sh", "render", *SLURM, "--gpus_per_node=4", "--cpus_per_gpu=6", "--grace_s=60",
                                  "--partition=gpu", "--account=me", "--sbatch_flag=--comment=it's me", "--", *TRAIN)
    lines = script.splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    directives = [shlex.split(line.removeprefix("#SBATCH ")) for line in lines if line.startswith("#SBATCH ")]
    assert sum(directives, []) == [
        "--job-name=try", f"--chdir={ROOT}", f"--output={ROOT / 'runs' / 'try.log'}", "--open-mode=append", "--nodes=2",
        "--time=1:00:00", "--ntasks-per-node=4", "--gpus-per-node=4", "--cpus-per-task=6", "--signal=TERM@60",
        "--requeue", "--dependency=singleton", "--partition=gpu", "--account=me", "--comment=it's me"]
    assert all(line.startswith("#SBATCH ") for line in lines[1:len(directives) + 1])   # sbatch reads to a command
    machine.launch("slurm.sh", "run", *SLURM, "--", *TRAIN)
    folder, call = machine.calls
    assert folder == ["mkdir", "-p", str(ROOT / "runs")]
    assert call[0] == "sbatch" and call[1].startswith("<#!/usr/bin/env bash\n#SBATCH ")


@pytest.mark.parametrize("code, restarts, state, again", [
    (0, 0, "RUNNING", False),       # done
    (2, 0, "RUNNING", False),       # a mistake
    (75, 0, "RUNNING", True),       # told to stop, and saved
    (75, 50, "RUNNING", True),
    (75, 0, "COMPLETING", False),   # cancelled by its owner
    (75, 0, "", False),
    (1, 0, "RUNNING", True),        # a crash, a lost process
    (137, 2, "RUNNING", True),
    (137, 3, "RUNNING", False),     # --max_restarts=3
])
def test_a_batch_job_queues_itself_again_or_does_not(machine, code, restarts, state, again):
    _, script, _ = machine.launch("slurm.sh", "render", *SLURM, "--max_restarts=3", "--", *TRAIN)
    answers = f"case $call in srun*) exit {code} ;; squeue*) echo {state} ;; esac"
    start = f"export SLURM_JOB_ID=12 SLURM_RESTART_COUNT={restarts}\n{script}"
    got, out, _ = machine("bash", "-c", start, answers=answers)
    assert got == code and f"attempt {restarts + 1} of job 12 ended with exit code {code}" in out
    assert (["scontrol", "requeue", "12"] in machine.calls) == again


def test_a_batch_script_outlives_the_signal(machine):
    """A preemption's SIGTERM reaches the shell too; it must still be there to look at the exit code."""
    _, script, _ = machine.launch("slurm.sh", "render", *SLURM, "--", *TRAIN)
    answers = "case $call in srun*) kill -TERM $PPID; exit 75 ;; squeue*) echo RUNNING ;; esac"
    code, _, _ = machine("bash", "-c", f"export SLURM_JOB_ID=12\n{script}", answers=answers)
    assert code == 75 and machine.calls[-1] == ["scontrol", "requeue", "12"]


# --- GKE -------------------------------------------------------------------------------------------------------------

def job(manifest):
    (replicated,) = manifest["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]


def pod(manifest):
    return job(manifest)["template"]["spec"]


def container(pod):
    (only,) = pod["containers"]
    return only


def render(machine, *words):
    code, out, err = machine.launch("gke.sh", "render", "--name=try", "--image=r.dev/x:1", *words, "--", *TRAIN)
    assert code == 0, err
    assert not re.search(r"@[A-Z_]+@|# (tpu|gpu|spot|bucket|account)$", out, flags=re.M)
    return yaml.safe_load(out)


@pytest.mark.parametrize("words, accelerator, hosts, chips", [
    # cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus: nodes of a slice, chips of a node
    (["--topology=v5e:16x16"], "tpu-v5-lite-podslice", 64, 4),
    (["--topology=v5e:1x1"], "tpu-v5-lite-podslice", 1, 1),
    (["--topology=v5e:2x4"], "tpu-v5-lite-podslice", 2, 4),
    (["--topology=v5e:2x4", "--chips_per_host=8"], "tpu-v5-lite-podslice", 1, 8),
    (["--topology=v6e:8x8"], "tpu-v6e-slice", 16, 4),
    (["--topology=v4:2x2x4"], "tpu-v4-podslice", 4, 4),
    (["--topology=v5p:8x8x8"], "tpu-v5p-slice", 128, 4),
    (["--topology=tpu7x:4x4x4"], "tpu7x", 16, 4),
])
def test_a_manifest_for_tpus(machine, words, accelerator, hosts, chips):
    manifest = render(machine, *words, "--slices=3", "--grace_s=99", "--max_restarts=7")
    assert manifest["apiVersion"] == "jobset.x-k8s.io/v1alpha2" and manifest["kind"] == "JobSet"
    assert manifest["metadata"] == {"name": "try", "annotations": {
        "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}}
    (replicated,) = manifest["spec"]["replicatedJobs"]
    assert replicated["name"] == "slice" and replicated["replicas"] == 3
    assert (job(manifest)["parallelism"], job(manifest)["completions"]) == (hosts, hosts)
    assert job(manifest)["completionMode"] == "Indexed" and job(manifest)["backoffLimit"] == 0
    assert pod(manifest)["restartPolicy"] == "Never" and pod(manifest)["terminationGracePeriodSeconds"] == 99
    assert pod(manifest)["nodeSelector"] == {"cloud.google.com/gke-tpu-accelerator": accelerator,
                                             "cloud.google.com/gke-tpu-topology": words[0].split(":")[1]}
    only = container(pod(manifest))
    assert only["image"] == "r.dev/x:1" and only["command"] == TRAIN
    assert only["resources"] == {kind: {"google.com/tpu": chips} for kind in ("requests", "limits")}
    assert [e["name"] for e in only["env"]] == ["PYTHONUNBUFFERED"]   # GKE sets the rest
    assert "serviceAccountName" not in pod(manifest)


def test_a_manifest_for_gpus(machine):
    manifest = render(machine, "--gpu=nvidia-h100-80gb", "--nodes=4", "--spot", "--bucket=my-bucket",
                      "--service_account=trainer")
    assert manifest["metadata"] == {"name": "try"} and job(manifest)["parallelism"] == 4
    spec, only = pod(manifest), container(pod(manifest))
    assert spec["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb",
                                    "cloud.google.com/gke-spot": "true"}
    assert only["resources"]["limits"] == {"nvidia.com/gpu": 8} and spec["serviceAccountName"] == "trainer"
    env = {e["name"]: e.get("value", e.get("valueFrom")) for e in only["env"]}
    # JobSet names a pod JOBSET-REPLICATEDJOB-JOB-POD, and the service that resolves it is called as the JobSet.
    assert env["JAX_COORDINATOR_ADDRESS"] == "try-slice-0-0.try:8476" and env["JAX_NUM_PROCESSES"] == "4"
    assert env["JAX_PROCESS_ID"] == {
        "fieldRef": {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}}
    assert {v["name"] for v in spec["volumes"]} == {m["name"] for m in only["volumeMounts"]} == {"shm", "bucket"}
    assert spec["volumes"][1]["csi"]["volumeAttributes"] == {"bucketName": "my-bucket"}
    assert job(manifest)["template"]["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}


def test_a_manifest_comes_back_from_all_but_mistakes(machine):
    """What JobSet does, worked out from its rules as its documentation says, for each way in which a pod can end."""
    manifest = render(machine, "--topology=v6e:8x8", "--max_restarts=7")
    policy = manifest["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 7 and policy["restartStrategy"] == "BlockingRecreate"

    def action(exit_code=None, condition=None):
        reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
        for index, rule in enumerate(job(manifest)["podFailurePolicy"]["rules"]):
            assert rule["action"] == "FailJob" and len(rule) == 2
            if exit_code in rule.get("onExitCodes", {"values": []})["values"]:
                ended = f"failed with exit code {exit_code}"
            elif any(c == {"type": condition, "status": "True"} for c in rule.get("onPodConditions", [])):
                ended = f"has condition {condition}"
            else:
                continue
            reason = "PodFailurePolicy"
            message = f"Container train for pod default/try-slice-0-0 {ended} matching FailJob rule at index {index}"
            break
        for rule in policy["rules"]:
            assert rule.keys() <= {"name", "action", "onJobFailureReasons", "onJobFailureMessagePatterns"}
            patterns = rule.get("onJobFailureMessagePatterns", [".*"])
            if reason in rule["onJobFailureReasons"] and any(re.fullmatch(p, message) for p in patterns):
                return rule["action"]
        return "RestartJobSet"

    assert action(exit_code=2) == "FailJobSet"
    assert action(exit_code=75) == "RestartJobSetAndIgnoreMaxRestarts"
    assert action(exit_code=143, condition="DisruptionTarget") == "RestartJobSetAndIgnoreMaxRestarts"
    assert action(exit_code=1) == action(exit_code=137) == action(exit_code=25) == "RestartJobSet"   # counted


# --- A TPU that comes and goes ---------------------------------------------------------------------------------------

WATCH = """case $call in
  *"queued-resources list"*) now=$(pop states); if [ "$now" = error ]; then exit 1; fi; echo "$now" ;;
  *is-enabled*) pop hosts ;;
esac"""


def watched(machine, states, hosts, *words, answers=WATCH):
    states, hosts = ("".join(f"{x}\n" for x in lines) for lines in (states, hosts))
    code, out, err = machine.launch("tpu_vm.sh", "run", *TPU, *words, "--", *TRAIN, answers=answers, states=states,
                                    hosts=hosts)
    assert out == ""
    return code, brief(machine.calls), err


def test_a_tpu_is_waited_for(machine):
    code, calls, err = watched(machine, ["", "ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"],
                               ["fm_jax: running", "fm_jax: done"])
    assert code == 0 and "done; the TPU still costs" in err
    assert calls == ["state", "create", "state", "sleep", "state", "sleep", "state", "sleep", "state", "copy", "start",
                     "state", "look", "sleep", "state", "look"]


def test_a_tpu_that_is_there_is_used(machine):
    code, calls, _ = watched(machine, ["ACTIVE"], ["fm_jax: done"])
    assert code == 0 and calls == ["state", "copy", "start", "state", "look"]


def test_a_preempted_tpu_is_asked_for_again(machine):
    code, calls, err = watched(
        machine, ["ACTIVE", "ACTIVE", "SUSPENDING", "SUSPENDING", "SUSPENDED", "", "ACTIVE", "ACTIVE"],
        ["fm_jax: running", "fm_jax: done"])
    assert code == 0 and "try is SUSPENDING" in err
    assert calls == ["state", "copy", "start", "state", "look", "sleep", "state",          # watched, gone
                     "state", "sleep", "state", "delete", "state", "create", "state",      # asked for again
                     "copy", "start", "state", "look"]


def test_a_tpu_preempted_while_the_job_is_started_is_asked_for_again(machine):
    answers = WATCH + """
case $call in *scp*) if [ ! -e "$CALLS/once" ]; then touch "$CALLS/once"; exit 1; fi ;; esac"""
    code, calls, _ = watched(machine, ["ACTIVE", "SUSPENDED", "SUSPENDED", "", "ACTIVE"], ["fm_jax: done"],
                             answers=answers)
    assert code == 0 and calls == ["state", "copy", "state", "sleep", "state", "delete", "state", "create", "state",
                                   "copy", "start", "state", "look"]


def test_watching_outlasts_a_network_that_fails(machine):
    code, calls, err = watched(machine, ["ACTIVE", "error", "ACTIVE"], ["", "fm_jax: running", "fm_jax: done"])
    assert code == 0 and "gcloud did not answer" in err and "some hosts did not answer" in err
    assert calls[3:] == ["state", "sleep", "state", "look", "sleep", "state", "look", "sleep", "state", "look"]
    code, calls, _ = watched(machine, ["error"], [""])   # but nothing is made where one cannot even ask
    assert code != 0 and calls == ["state"]


@pytest.mark.parametrize("hosts, code, message", [
    ("fm_jax: running fm_jax: failed", 2, "a host gave up"),
    ("fm_jax: stopped fm_jax: running", 0, "stopped by `stop`"),
    ("fm_jax: done fm_jax: done", 0, "done; the TPU still costs"),
])
def test_how_watching_ends(machine, hosts, code, message):
    got, calls, err = watched(machine, ["ACTIVE"], [hosts])
    assert got == code and message in err and calls[-1] == "look"


def test_a_job_is_done_when_all_hosts_are(machine):
    _, calls, _ = watched(machine, ["ACTIVE"], ["fm_jax: done fm_jax: running", "fm_jax: done fm_jax: done"])
    assert calls.count("look") == 2


def test_a_tpu_that_cannot_be_had_is_an_error(machine):
    code, calls, err = watched(machine, ["", "FAILED"], [""])
    assert code == 2 and "cannot be had" in err and calls == ["state", "create", "state"]


@pytest.mark.parametrize("enabled, failed, shown, word", [
    (1, 1, "inactive 1 0", "stopped"), (0, 0, "failed 1 1", "failed"), (0, 1, "active 0 0", "running"),
    (0, 1, "activating 1 75", "running"),   # to be started again
    (0, 1, "inactive 1 0", "done"), (0, 1, "inactive 1 75", "running"),   # the machine is going down
    (0, 1, "inactive 0 0", "running"),      # it has just come up
])
def test_what_a_host_says_of_its_job(machine, enabled, failed, shown, word):
    _, out, _ = machine.launch("tpu_vm.sh", "run", *TPU, "--dry_run", "--", *TRAIN)
    script = commands(out)[-1][-1].removeprefix("--command=")
    answers = f"""case $call in *is-enabled*) exit {enabled} ;; *is-failed*) exit {failed} ;;
      *) printf '%s\\n' {shown} ;; esac"""
    assert machine("sh", "-c", script, answers=answers)[:2] == (0, f"fm_jax: {word}\n")


# --- Refusals, help, form --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("script, words, message", [
    *[(script, [], "the first word is one of: ") for script in SCRIPTS],
    *[(script, ["go"], "unknown verb 'go'; known: ") for script in SCRIPTS],
    *[(script, ["run", "--nmae=x"], "unknown flag --nmae; known: --") for script in SCRIPTS],
    *[(script, ["run", "--dry-run"], "did you mean --dry_run?") for script in SCRIPTS],
    *[(script, ["run"], "--name is required to run: ") for script in SCRIPTS],
    *[(script, ["run", "--name=Try_1"], "--name=Try_1: lower-case letters") for script in SCRIPTS],
    *[(script, ["run", "--name"], "--name needs a value: --name=VALUE") for script in SCRIPTS],
    *[(script, ["run", "--name", "--dry_run"], "--name needs a value") for script in SCRIPTS],
    *[(script, ["run", "--name="], "--name is empty") for script in SCRIPTS],
    *[(script, ["run", "--dry_run=1"], "--dry_run takes no value") for script in SCRIPTS],
    *[(script, ["run", "python"], "unexpected 'python': flags start with --, and the command") for script in SCRIPTS],
    *[(script, ["run", *flags], "no command to run: end with -- python -m fm_jax.train") for script, flags in
      [("tpu_vm.sh", TPU), ("gke.sh", GKE), ("slurm.sh", SLURM)]],
    *[(script, ["run", *flags, "--", *TRAIN[:-1], "runs/x"], "--workdir runs/x is on each machine's own disk")
      for script, flags in [("tpu_vm.sh", TPU), ("gke.sh", GKE)]],
    *[(script, ["run", *flags, "--", *TRAIN[:-2], "--workdir=runs/x"], "lost with it: give gs://BUCKET/PATH, or a ")
      for script, flags in [("tpu_vm.sh", TPU), ("gke.sh", GKE)]],
    ("gke.sh", ["run", *GKE, "--", "python", "--workdir=/runs/x"], "or file server that is mounted"),
    ("gke.sh", ["run", *GKE, "--bucket=b", "--", "python", "--workdir=/runs/x"], "that is mounted below /bucket/"),
    ("gke.sh", ["run", *GKE, "--nodes=4", "--", *TRAIN], "--nodes=4 is for --gpu"),
    ("tpu_vm.sh", ["run", "--name=try"], "--zone is required to run: "),
    ("tpu_vm.sh", ["run", *TPU[:2], "--", *TRAIN], "--accelerator_type is required to run: such as v5litepod-16"),
    ("tpu_vm.sh", ["create", *TPU[:2], "--accelerator_type=v5e-16"], "gcloud calls it v5litepod-16"),
    ("tpu_vm.sh", ["create", *TPU[:2], "--accelerator_type=tpu7x-8"], "launch/gke.sh has"),
    ("tpu_vm.sh", ["create", *TPU[:2], "--accelerator_type=h100"], "known are v2-, v3-, v4-, v5litepod-"),
    ("tpu_vm.sh", ["create", *TPU, "--slices=two"], "--slices=two is not a positive whole number"),
    ("gke.sh", ["run", "--name=try"], "--image is required to run: "),
    ("gke.sh", ["run", *GKE[:2], "--", *TRAIN], "--topology is required to run: such as v6e:8x8, or --gpu="),
    ("gke.sh", ["run", *GKE[:2], "--topology=v9:4x4", "--", *TRAIN], "known are v4:, v5e:, v5p:, v6e: and tpu7x:"),
    ("gke.sh", ["run", *GKE[:2], "--topology=v5p:8x8", "--", *TRAIN], "v5p has 3 dimensions, such as 4x4x4"),
    ("gke.sh", ["run", *GKE[:2], "--topology=v6e:4x4x4", "--", *TRAIN], "v6e has 2 dimensions, such as 8x8"),
    ("gke.sh", ["run", *GKE[:2], "--topology=v6e:1x2", "--chips_per_host=4", "--", *TRAIN], "are not hosts of 4"),
    ("gke.sh", ["run", *GKE, "--gpu=x", "--", *TRAIN], "--gpu=x and --topology=v6e:8x8: give one"),
    ("gke.sh", ["run", *GKE[:2], "--gpu=x", "--", *TRAIN], "--nodes is required to run: how many hosts with x"),
    ("gke.sh", ["run", *GKE[:2], "--gpu=x", "--nodes=2", "--slices=2", "--", *TRAIN], "GPUs take --nodes"),
    ("gke.sh", ["run", *GKE, '--bucket=a", b', "--", *TRAIN], "only letters, digits and -_./:@"),
    ("gke.sh", ["image", "--image=x"], "--platform is required to image: tpu or cuda"),
    ("gke.sh", ["image", "--image=x", "--platform=gpu"], "--platform=gpu: give tpu or cuda"),
    ("gke.sh", ["create"], "--location is required to create: "),
    ("slurm.sh", ["run", "--name=try"], "--nodes is required to run: "),
    ("slurm.sh", ["run", *SLURM[:2]], "--time is required to run: the limit of one attempt, such as 24:00:00"),
    ("slurm.sh", ["run", *SLURM, "--container=x.sif", "--", "x"], "give pyxis:IMAGE or apptainer:FILE.sif"),
    ("slurm.sh", ["run", *SLURM, "--mounts=/a:/a", "--", "x"], "--mounts=/a:/a is for a --container"),
])
def test_refusals_name_the_remedy_and_call_nothing(machine, script, words, message):
    code, out, err = machine.launch(script, *words)
    assert code == 2 and out == "" and machine.calls == []
    assert message.lower() in err.lower() and err.startswith("error: ") and err.count("\n") == 1, err


def test_a_workdir_that_every_host_finds_again_is_taken(machine):
    for script, words, folder in [("tpu_vm.sh", ["run", *TPU], "/mnt/x"), ("gke.sh", ["run", *GKE], "s3://b/x"),
                                  ("gke.sh", ["run", *GKE, "--bucket=b"], "/bucket/x"),
                                  ("slurm.sh", ["run", *SLURM], "runs/x")]:   # a cluster's file server
        assert machine.launch(script, *words, "--dry_run", "--", *TRAIN[:-1], folder)[0] == 0


def test_a_flag_takes_its_value_in_both_ways(machine):
    a = machine.launch("slurm.sh", "render", *SLURM, "--", *TRAIN)[1]
    b = machine.launch("slurm.sh", "render", *" ".join(SLURM).replace("=", " ").split(), "--", *TRAIN)[1]
    assert a == b


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_the_head_of_the_script_and_names_every_flag_and_verb(machine, script):
    text = (LAUNCH / script).read_text()
    for words in (["--help"], ["-h"], ["run", "--name=x", "--help"]):
        code, out, err = machine.launch(script, *words)
        assert code == 0 and err == "" and machine.calls == []
    assert out.splitlines() == [line[2:] for line in re.match(r"#!.*\n((#.*\n)+)", text)[1].splitlines()]
    for part in ("From nothing to a running job", "See it:", "Stop it:", "How it comes back:", "fm_jax.train"):
        assert part in out
    known = machine.launch(script, "run", "--x")[2].split("known: ")[1].split()
    verbs = machine.launch(script)[2].split("one of: ")[1].split(";")[0].split()
    assert len(known) > 5 and not [flag for flag in known if not re.search(rf"{flag}\b", out)]
    for verb in verbs:
        assert re.search(rf"\b{verb}\b", out.split("Verbs: ")[1].split("\n")[0])


def linter(name):
    """Returns the path of the program; skips the test where it is not installed. The extra `test` has both."""
    found = shutil.which(name, path=f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    return found or pytest.skip(f"needs {name}: pip install '.[test]'")


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("*.sh")), ids=lambda path: path.name)
def test_scripts_are_sound_shell(path):
    assert subprocess.run(["bash", "-n", path], capture_output=True).stderr == b""
    if path.name in SCRIPTS:
        assert os.access(path, os.X_OK)
    done = subprocess.run([linter("shellcheck"), path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# --- The image -------------------------------------------------------------------------------------------------------

def instructions():
    """Returns [(instruction, rest)] of the Dockerfile, lines joined."""
    text = re.sub(r"^#.*\n", "", (LAUNCH / "Dockerfile").read_text(), flags=re.M)
    return [tuple(line.split(None, 1)) for line in re.sub(r"\\\n\s*", "", text).splitlines() if line]


def test_the_image_installs_the_pinned_versions():
    found = instructions()
    python = re.fullmatch(r"python:(3\.\d+)\.\d+-slim-[a-z]+", found[0][1])   # a full version, no floating tag
    assert found[0][0] == "FROM" and python[1] in ("3.11", "3.12", "3.13")
    installs = [part for name, rest in found if name == "RUN" for part in rest.split("&&") if "pip install" in part]
    assert len(installs) == 2 and all("--constraint launch/constraints.txt" in part for part in installs)
    copied = [word for name, rest in found if name == "COPY" for word in rest.split()[:-1]]
    assert all((ROOT / word).exists() for word in copied)
    assert found.index(("COPY", ". .")) > max(i for i, (name, _) in enumerate(found) if name == "RUN")
    assert json.loads(dict(found)["CMD"])[:3] == ["python", "-m", "fm_jax.train"]


@pytest.mark.parametrize("platform, code", [("tpu", 0), ("cuda", 0), ("", 2), ("gpu", 2)])
def test_the_image_is_for_an_extra_that_there_is(platform, code):
    check = next(rest for name, rest in instructions() if name == "RUN" and "case" in rest)
    assert subprocess.run(["sh", "-c", check], env={"PLATFORM": platform}, capture_output=True).returncode == code
    assert code or f'"{platform}": ["jax[' in (ROOT / "setup.py").read_text()


def test_the_image_holds_the_code_and_no_data():
    lines = (LAUNCH / "Dockerfile.dockerignore").read_text().split()
    assert lines[0] == "*" and {line[1:] for line in lines if line.startswith("!")} == {
        "configs", "fm_jax", "launch", "setup.py"}


def test_the_dockerfile_is_sound():
    done = subprocess.run([linter("hadolint"), LAUNCH / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout

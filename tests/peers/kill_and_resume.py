"""Kills processes of a run at random moments, also while it saves, and shows that nothing is lost.

    python tests/peers/kill_and_resume.py --kills 50 --output runs/kills

A run on several local processes is started by launch/local.sh; SIGKILL goes to one of its processes at a random moment:
while it starts, between steps, or while a checkpoint is written. After each kill: all processes have ended within
--within_s, the exit code is not 0, the message names the process that was killed, and the checkpoints verify. The same
command continues; each run that comes to its end has the metrics and the last state of one that nothing disturbed, to
the last bit.
"""

import argparse
import json
import lzma
import os
from pathlib import Path
import random
import shutil
import signal
import subprocess
import sys
import time

ROOT = Path(__file__).resolve().parent.parent.parent
CLOCK = ("time_s", "tokens_per_s", "step_time_s", "mfu")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--devices_per_process", type=int, default=2)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--within_s", type=float, default=20.0, help="from a kill to the end of all processes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True, help="a folder that is made; runs stay there")
    args = parser.parse_args()
    args.output.mkdir(parents=True)
    draw = random.Random(args.seed)
    command = [
        "bash", str(ROOT / "launch" / "local.sh"), "--processes", str(args.processes), "--devices_per_process",
        str(args.devices_per_process), "--", sys.executable, "-m", "fm_jax.train", "--config",
        f"{ROOT / 'configs' / 'causal_lm.py'}:tiny", f"--config.data.train={prepare(args.output)}",
        f"--config.steps={args.steps}", "--config.checkpoint.every=5", "--config.log.every=1",
        "--config.eval.every=50", "--config.eval.batches=2", "--config.mesh.fsdp=2", "--config.log.tensorboard=false"]
    straight = args.output / "straight"
    code, out, err, _ = launch([*command, f"--workdir={straight}"])
    assert code == 0, err
    print(f"undisturbed: {args.steps} steps, {checkpoints(straight)}", flush=True)
    kills, named, ends, runs, moments = 0, 0, [], 0, {"start": 0, "step": 0, "save": 0}
    while kills < args.kills:
        run = args.output / f"run{runs}"
        while True:
            kind = draw.choice(list(moments)) if kills < args.kills else ""
            code, out, err, killed = launch([*command, f"--workdir={run}"], run, kind, draw, args.processes)
            if killed is None:   # the run came to its end first
                assert code == 0, err
                break
            number, took_s = killed
            kills += 1
            moments[kind] += 1
            ends.append(took_s)
            assert code not in (0, 2) and f"process {number} of {args.processes} ended first" in err, (code, err)
            # Until all have met, only the launcher can tell.
            named += f"process {number} of {args.processes} (host " in err
            assert took_s < args.within_s, (took_s, err)
            print(f"kill {kills}: process {number} at {kind or 'end'} after {took_s:.2f} s all had ended; "
                  f"{checkpoints(run) if (run / 'checkpoints').is_dir() else 'no checkpoint yet'}", flush=True)
        compare(run, straight)
        runs += 1
        print(f"run {runs} ended as the undisturbed one, to the last bit", flush=True)
    ends.sort()
    print(json.dumps({"kills": kills, "moments": moments, "named_by_the_others": named, "runs": runs,
                      "median_end_s": round(ends[len(ends) // 2], 2), "longest_end_s": round(ends[-1], 2),
                      "bitwise_equal": True}))


def launch(command, run=None, kind="", draw=None, count=1):
    """Returns (code, stdout, stderr, None or (number of the process killed, seconds until all had ended))."""
    logs = [open(Path(command[-1].partition("=")[2] + name), "w+") for name in (".out", ".err")]
    started = subprocess.Popen(command, stdout=logs[0], stderr=logs[1])
    killed = None
    if kind:
        number = draw.randrange(count)
        if kind == "start":
            wait(started, draw.uniform(0.5, 8))
        else:
            text = lambda: Path(logs[0].name).read_text()
            while "\nstep " not in text() and started.poll() is None:
                time.sleep(0.02)
            wait(started, draw.uniform(0, 6))
            while kind == "save" and started.poll() is None and not list(
                    (run / "checkpoints").glob("*.orbax-checkpoint-tmp*")):
                time.sleep(0.001)
            if kind == "save":
                time.sleep(draw.uniform(0, 0.05))
        pids = children(command[-1])
        if started.poll() is None and number in pids:
            begin = time.monotonic()
            os.kill(pids[number], signal.SIGKILL)
            while any(alive(pid) for pid in pids.values()):
                time.sleep(0.01)
            killed = number, time.monotonic() - begin
    code = started.wait(timeout=1200)
    out, err = (Path(log.name).read_text() for log in logs)
    if killed and code == 0:   # it had done all its work
        killed = None
    return code, out, err, killed


def wait(started, seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end and started.poll() is None:
        time.sleep(0.01)


def children(workdir_flag):
    """Returns {number: process id} of the processes of a run."""
    found = {}
    for pid in map(int, filter(str.isdecimal, os.listdir("/proc"))):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if workdir_flag.encode() in words and not words[0].endswith((b"bash", b"env")):
            numbers = [int(e.partition(b"=")[2]) for e in environ if e.startswith(b"JAX_PROCESS_ID=")]
            found |= {n: pid for n in numbers}
    return found


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def prepare(output):
    """Returns a prepared folder of 80 passages, a quarter of them held out."""
    sys.path.insert(0, str(ROOT))
    from fm_jax.data import documents, prepared

    text = lzma.decompress((ROOT / "fm_jax" / "data" / "shakespeare.txt.xz").read_bytes()).decode()
    passages = [text[i : i + 500] for i in range(0, 40_000, 500)]
    (output / "passages.jsonl").write_text("".join(json.dumps({"text": p}) + "\n" for p in passages))
    prepared.prepare(documents.open_sources(str(output / "passages.jsonl")), "bytes", output / "data",
                     validation_frac=0.25, workers=1)
    return output / "data"


def checkpoints(run):
    """Returns what is there in words. Raises AssertionError where a checkpoint does not verify."""
    from fm_jax import checkpoint

    there = checkpoint.steps(run)
    problems = [problem for step in there if (problem := checkpoint.verify(run, step))]
    assert not problems, problems
    return f"checkpoints {there} verify"


def compare(run, straight):
    """Raises AssertionError where the run differs in a metric of a step, or in a bit of its last state."""
    import numpy as np

    from fm_jax import checkpoint, metrics, tree

    rows = lambda folder: [{k: v for k, v in row.items() if k not in CLOCK}
                           for row in metrics.read(folder / "metrics.jsonl")]
    assert rows(run) == rows(straight)
    state = lambda folder: {item + name: np.asarray(a).tobytes() for item in ("params", "optimizer")
                            for name, a in tree.flatten(checkpoint._read_item(
                                folder / "checkpoints" / str(checkpoint.steps(folder)[-1]) / item, None)).items()}
    assert checkpoint.steps(run)[-1] == checkpoint.steps(straight)[-1] and state(run) == state(straight)
    shutil.rmtree(run)


if __name__ == "__main__":
    main()

"""Runs of several processes on this machine: the same losses as one process, and one end for all, however it comes."""

import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from fm_jax import checkpoint, distributed, metrics
from fm_jax.distributed import Place, find
from fm_jax.errors import UserError
import train_test

ROOT = pathlib.Path(__file__).resolve().parent.parent
NOTHING = dict(coordinator_address=None, num_processes=None, process_id=None)
LOCAL = ["bash", str(ROOT / "launch" / "local.sh")]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def rows(folder):
    """Returns the lines of metrics.jsonl without what the clock says."""
    timed = ("time_s", "tokens_per_s", "step_time_s", "mfu")
    return [{k: v for k, v in r.items() if k not in timed} for r in metrics.read(folder / "metrics.jsonl")]


# --- Which process this is ------------------------------------------------------------------------------------------

SLURM = dict(SLURM_JOB_ID="4097", SLURM_STEP_NUM_TASKS="8", SLURM_PROCID="5", SLURM_LOCALID="1", SLURM_NODEID="1",
             SLURM_STEP_NODELIST="gpu[003-004]", SLURM_STEP_TASKS_PER_NODE="4(x2)", SLURM_NTASKS="8")
OPEN_MPI = dict(OMPI_COMM_WORLD_SIZE="2", OMPI_COMM_WORLD_RANK="1", OMPI_COMM_WORLD_LOCAL_SIZE="1",
                OMPI_COMM_WORLD_LOCAL_RANK="0", OMPI_MCA_orte_hnp_uri="4096.0;tcp://10.9.0.1,10.1.0.1:34911")
JAX = dict(JAX_COORDINATOR_ADDRESS="a:1", JAX_NUM_PROCESSES="4", JAX_PROCESS_ID="3")


@pytest.mark.parametrize("given, environ, place", [
    ({}, {}, None),
    ({}, JAX, Place("a:1", 4, 3)),
    (dict(num_processes=1), JAX | dict(JAX_PROCESS_ID="0"), None),
    (dict(process_id=2), JAX, Place("a:1", 4, 2)),                                    # flags win
    (dict(coordinator_address="b:2", num_processes=2, process_id=0), JAX | SLURM, Place("b:2", 2, 0)),
    ({}, SLURM, Place("gpu003:61441", 8, 5, (1,))),
    ({}, SLURM | dict(CUDA_VISIBLE_DEVICES="1"), Place("gpu003:61441", 8, 5)),        # the scheduler has chosen it
    ({}, SLURM | dict(SLURM_STEP_TASKS_PER_NODE="7,1"), Place("gpu003:61441", 8, 5)),   # one task has all devices
    ({}, SLURM | dict(SLURM_STEP_NODELIST="a[1-2]b[07,9],c"), Place("a1b07:61441", 8, 5, (1,))),
    ({}, SLURM | dict(SLURM_STEP_NUM_TASKS="1"), None),                               # a shell in a job of eight
    (dict(coordinator_address="b:2"), SLURM, Place("b:2", 8, 5, (1,))),
    ({}, OPEN_MPI, Place("10.9.0.1:61441", 2, 1)),
    ({}, OPEN_MPI | dict(OMPI_COMM_WORLD_SIZE="1"), None),
    ({}, dict(JAX, JAX_PROCESS_ID="", JOB_COMPLETION_INDEX="2"), Place("a:1", 4, 2)),
    ({}, dict(JOB_COMPLETION_INDEX="2", KUBERNETES_SERVICE_HOST="10.0.0.1"), None),   # an indexed job of single runs
    ({}, dict(TPU_WORKER_HOSTNAMES="t0,t1", TPU_WORKER_ID="1"), Place()),              # jax asks
    ({}, dict(TPU_WORKER_HOSTNAMES="localhost", TPU_WORKER_ID="0"), None),
    ({}, dict(TPU_WORKER_HOSTNAMES="t0", MEGASCALE_NUM_SLICES="2"), Place()),
    ({}, dict(TPU_WORKER_HOSTNAMES="t0,t1", JAX_PLATFORMS="cpu"), None),
])
def test_the_place_of_a_process_is_found(given, environ, place):
    assert find(NOTHING | given, environ) == place


@pytest.mark.parametrize("given, environ, message", [
    (dict(num_processes=4), {}, "--num_processes=4: a run of several processes also needs --coordinator_address .or "
     "JAX_COORDINATOR_ADDRESS. and --process_id"),
    ({}, dict(JAX, JAX_PROCESS_ID=""), "also needs --process_id .or JAX_PROCESS_ID.$"),
    ({}, {k: v for k, v in OPEN_MPI.items() if "uri" not in k}, "Open MPI: .* also needs --coordinator_address"),
    ({}, dict(JAX, JAX_PROCESS_ID="4"), r"process 4 of 4 \(JAX_PROCESS_ID=4\): processes count from 0 to 3"),
    (dict(process_id=-1), JAX, r"process -1 of 4 \(--process_id=-1\)"),
    (dict(num_processes=4), SLURM, r"process 5 of 4 \(SLURM\)"),                      # which contradict each other
    ({}, dict(JAX, JAX_NUM_PROCESSES="four"), "JAX_NUM_PROCESSES=four: expected a whole number"),
    (dict(num_processes=0), JAX, "--num_processes=0: must be at least 1"),
    (dict(coordinator_address="host"), JAX, "--coordinator_address=host: expected HOST:PORT"),
])
def test_what_is_incomplete_or_contradictory_is_refused(given, environ, message):
    with pytest.raises(UserError, match=message):
        find(NOTHING | given, environ)


# --- How processes end together -------------------------------------------------------------------------------------

# A process of a run without jax: what it needs of jax is a place where process 0 leaves a line.
PEER = """
import os, pathlib, sys, time
from fm_jax import distributed
from fm_jax.errors import UserError

class Store:
    def key_value_set(self, key, value):
        path.with_suffix(".new").write_text(value)
        path.with_suffix(".new").rename(path)

    def blocking_key_value_get(self, key, timeout_ms):
        while not path.exists():
            time.sleep(0.01)
        return path.read_text()

path, number, act = pathlib.Path(sys.argv[1], "line"), int(sys.argv[2]), sys.argv[3]
peers = distributed.Peers(number, 3, Store(), "127.0.0.1")
print("up", flush=True)
sys.stdin.readline()
if act == "bye":
    peers.bye()
    sys.exit()
if act == "error":
    peers.fail(UserError("the disk\\n is full"))
if act == "hang":
    def stuck():
        time.sleep(60)
    with distributed.Watchdog(0.5, peers) as watchdog:
        watchdog.beat("step 3")
        stuck()
time.sleep(60)
"""


def peers(folder, acts):
    children = [subprocess.Popen([sys.executable, "-c", PEER, str(folder), str(i), act], stdin=subprocess.PIPE,
                                 stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
                for i, act in enumerate(acts)]
    for child in children:
        assert child.stdout.readline() == "up\n", child.stderr.read()
    time.sleep(0.2)   # process 0 has all of them
    for child in children:
        child.stdin.write("\n")
        child.stdin.flush()
    return children


def ends(children, within_s):
    """Returns [(code, stderr)] of processes, all ended within so many seconds."""
    begin, found = time.monotonic(), []
    try:
        for child in children:
            child.wait(timeout=60)
        assert time.monotonic() - begin < within_s
        return [(child.returncode, child.stderr.read()) for child in children]
    finally:
        for child in children:
            child.kill()
            child.communicate()


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_killed_process_ends_the_others_and_is_named(lost, tmp_path):
    children = peers(tmp_path, ["wait"] * 3)
    children[lost].kill()
    # At once: the seconds are for a machine at work.
    for i, (code, err) in enumerate(ends(children, within_s=10)):
        if i == lost:
            assert code == -signal.SIGKILL
        else:
            assert code == distributed.AGAIN and f"process {lost} of 3 (host {socket.gethostname()}) is lost" in err, err


@pytest.mark.parametrize("failed", [0, 2])
def test_an_error_of_one_process_ends_the_others_with_its_words_and_code(failed, tmp_path):
    acts = ["wait"] * 3
    acts[failed] = "error"
    for i, (code, err) in enumerate(ends(peers(tmp_path, acts), within_s=15)):
        assert code == 2
        if i == failed:
            assert err == "error: the disk is full\n"
        else:
            assert f"process {failed} of 3 ended (error: the disk is full), and so does this one" in err, err


def test_a_process_that_hangs_shows_every_stack_and_ends_all(tmp_path):
    for i, (code, err) in enumerate(ends(peers(tmp_path, ["wait", "hang", "wait"]), within_s=15)):
        assert code == distributed.HUNG and "step 3 has made no progress for 0.5 s" in err, err
        assert "thread MainThread" in err and ("in stuck" in err) == (i == 1), err


def test_a_process_that_said_goodbye_may_end(tmp_path):
    children = peers(tmp_path, ["bye", "bye", "bye"])
    assert [code for code, _ in ends(children, within_s=10)] == [0, 0, 0]
    (tmp_path / "second").mkdir()
    children = peers(tmp_path / "second", ["wait", "bye", "wait"])
    children[1].wait(timeout=30)
    time.sleep(0.5)
    assert [child.poll() for child in children] == [None, 0, None]
    children[2].kill()   # those that are left are still watched
    assert [code for code, _ in ends(children, within_s=10)] == [distributed.AGAIN, 0, -signal.SIGKILL]


def test_a_stranger_at_the_port_is_not_one_of_us(tmp_path):
    children = peers(tmp_path, ["wait", "wait", "wait"])
    port = int((tmp_path / "line").read_text().split()[0])
    for words in (b"GET / HTTP/1.1\r\n\r\n", b"x 1 y\n"):
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(words)
    time.sleep(0.5)
    assert [child.poll() for child in children] == [None] * 3
    for child in children:
        child.kill()
        child.communicate()


def test_a_watchdog_lets_live_what_goes_on(tmp_path):
    code = """
        import time
        from fm_jax import distributed
        with distributed.Watchdog(0.6) as watchdog:
            for step in range(6):
                watchdog.beat(f"step {step}")
                time.sleep(0.2)
            watchdog.beat(None)
            time.sleep(1)
        with distributed.Watchdog(0) as watchdog:
            watchdog.beat("for ever")
            time.sleep(0.5)
        with distributed.Watchdog(0.3) as watchdog:
            watchdog.beat("the last")
        time.sleep(0.5)
        print("alive")
        """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout == "alive\n", done.stderr


def test_what_a_process_prints_goes_to_its_log_and_is_marked(tmp_path, capsys):
    log = distributed._Log(3)
    out, err = distributed.Output(None, log), distributed.Output(sys.stdout, log, mark="[process 3] ")
    print("early", file=out)
    out.write("\r\x1b[K10%")
    out.write("\r\x1b[K20%\n")
    out.open_log(tmp_path)
    print("one\ntwo", file=err)
    err.write("half")
    err.write(" a line\n")
    lines = (tmp_path / "logs" / "process_3.log").read_text().splitlines()
    assert [line.split(" ", 1)[1] for line in lines] == ["early", "20%", "one", "two", "half a line"]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", line.split(" ")[0]) for line in lines)
    assert capsys.readouterr().out == "".join(f"[process 3] {t}\n" for t in ("one", "two", "half a line"))


# --- launch/local.sh ------------------------------------------------------------------------------------------------

def local(*words, **how):
    return subprocess.run([*LOCAL, *map(str, words)], capture_output=True, text=True, timeout=120, **how)


def test_local_dry_run_prints_what_it_runs():
    done = local("--processes", 2, "--devices_per_process=4", "--port", 1234, "--dry_run", "--", "python", "-m",
                 "fm_jax.train", "--workdir", "a b")
    line = ("env -u XLA_FLAGS JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=4 JAX_COORDINATOR_ADDRESS=127.0.0.1:1234 "
            "JAX_NUM_PROCESSES=2 JAX_PROCESS_ID={} python -m fm_jax.train --workdir a\\ b &\n")
    assert done.returncode == 0 and done.stdout == line.format(0) + line.format(1), done.stderr


@pytest.mark.parametrize("words, message", [
    (["--", "true"], "--processes N is required"), (["--processes", "2"], "no command; it follows --"),
    (["--processes", "two", "--", "true"], "--processes two: expected a whole number"),
    (["--proceses", "2"], "unknown --proceses"), (["--processes", "0", "--", "true"], "--processes N is required"),
])
def test_local_refuses_in_one_line(words, message):
    done = local(*words)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


def test_local_ends_with_the_process_that_ended_first_and_starts_again(tmp_path):
    def script(text):
        (tmp_path / "count").write_text("")
        return ["bash", "-c", f"echo x >> {tmp_path}/count; {text}"]

    starts = lambda: (tmp_path / "count").read_text().count("x")
    done = local("--processes", 3, "--", *script("exit 0"))
    assert done.returncode == 0 and not done.stderr
    done = local("--processes", 2, "--restarts", 2, "--", *script(
        'if [ $JAX_PROCESS_ID = 1 ]; then kill -9 $$; fi; sleep 0.3; exit 75'))
    assert done.returncode == 128 + 9 and starts() == 6, done.stderr
    assert done.stderr.count("process 1 of 2 ended first, with code 137 (signal 9)") == 3
    done = local("--processes", 2, "--restarts", 2, "--", *script('sleep 0.$JAX_PROCESS_ID; exit 2'))   # a mistake
    assert done.returncode == 2 and starts() == 2 and "process 0 of 2 ended first, with code 2" in done.stderr


# --- Training -------------------------------------------------------------------------------------------------------

# A run of twelve steps on four devices. Not those of the mesh alone are shared by processes: rows of the batch are.
MESH = ["--config.mesh.data=1", "--config.mesh.fsdp=2", "--config.mesh.tensor=2", "--config.optimizer.ema_decay=0"]


def train(tiny_flags, run, *flags, processes=2, devices=2, restarts=0, **how):
    """Returns launch/local.sh, started."""
    command = [sys.executable, "-m", "fm_jax.train", *tiny_flags, *MESH, f"--workdir={run}", *flags]
    return subprocess.Popen([*LOCAL, "--processes", str(processes), "--devices_per_process", str(devices),
                             "--restarts", str(restarts), "--", *command], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, **how)


def finished(started, code=0):
    """Returns (stdout, stderr) of a launch that ends with an exit code."""
    try:
        out, err = started.communicate(timeout=300)
    finally:
        started.terminate()
    assert started.returncode == code, (out, err)
    return out, err


@pytest.fixture(scope="module")
def straight(tiny_flags, tmp_path_factory):
    """Returns (folder, stdout) of the run on two processes of two devices, that nothing disturbed."""
    run = tmp_path_factory.mktemp("straight") / "run"
    return run, finished(train(tiny_flags, run))[0]


def child(run, number):
    """Returns the process id of a process of the run."""
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        try:
            words = pathlib.Path("/proc", pid, "cmdline").read_bytes().split(b"\0")
            environ = pathlib.Path("/proc", pid, "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if f"--workdir={run}".encode() in words and b"bash" not in words[0] and \
                f"JAX_PROCESS_ID={number}".encode() in environ:
            return int(pid)
    raise AssertionError(f"no process {number}")


def signal_at(started, run, number, step, which):
    """Sends a signal to a process when the progress of `step` is shown; returns what was printed until then."""
    seen = ""
    for line in started.stdout:
        seen += line
        if line.startswith(f"step {step}/"):
            os.kill(child(run, number), which)
            return seen
    raise AssertionError(seen + started.stderr.read())


def test_two_processes_have_the_losses_of_one(straight, inline, tiny_flags, tmp_path):
    run, out = straight
    code, one, err = inline("train", *tiny_flags, *MESH, f"--workdir={tmp_path / 'one'}")
    assert code == 0, err
    got, want = rows(run), rows(tmp_path / "one")
    assert [r["step"] for r in got] == [r["step"] for r in want] and len(got) == 14
    for a, b in zip(got, want):
        for name in b:   # sums over processes in another order: 1e-6 a step, grown by Adam
            assert a[name] == pytest.approx(b[name], rel=1e-4), (name, a["step"])
    assert "on 4 cpu (fsdp 2 x tensor 2)" in out and out.count("step 12/12") == 1   # process 0 alone
    assert {p.name for p in run.iterdir()} == {"config.json", "run.json", "tokenizer", "metrics.jsonl", "tensorboard",
                                               "checkpoints", "lock", "logs"}
    logs = {p.name: p.read_text() for p in (run / "logs").iterdir()}
    assert set(logs) == {"process_0.log", "process_1.log"} and all("step 12/12" in log for log in logs.values())
    assert json.loads((run / "run.json").read_text())["starts"][0]["processes"] == 2
    assert checkpoint.steps(run) == [4, 8, 12] and not any(checkpoint.verify(run, s) for s in (4, 8, 12))


# What each process of a run does, in a word: loads the model, answers, and places batches on several meshes.
ANSWERS = """
import json, sys
from fm_jax import config, distributed
run, out = sys.argv[1:3]
def main(args):
    with distributed.processes(args):
        import fm_jax, jax
        import numpy as np
        from fm_jax import evaluate, objectives, sharding
        from fm_jax.step import Program
        lm = fm_jax.load(run, mesh={"fsdp": 2, "tensor": 2})
        print(json.dumps({
            "texts": lm.generate(["To be", "or", "not"], n=2, max_new_tokens=5, temperature=0.8),
            "logits": lm.logits(np.arange(12).reshape(3, 4)).tolist(),
            "scores": [s.logprob for s in lm.score(["To be", "To"], [" or", " not"])],
            "metrics": evaluate.evaluate(run, ["perplexity"], lm=lm, limit=3, output=out)}))
        for mesh in ({"data": 4}, {"tensor": 4}, {"data": 2, "tensor": 2}, {"fsdp": 2, "data": 2}):
            layout = sharding.Layout(sharding.make_mesh(mesh))
            program = Program(lm.config, objectives.load(lm.config, lm.tokenizer, layout), layout)
            whole = program.objective.random_batch(lm.config.batch_size, np.random.default_rng(0))
            mine = {name: array[program.rows] for name, array in whole.items()}
            for name, array in program.place(mine).items():
                for shard in array.addressable_shards:
                    np.testing.assert_array_equal(shard.data, whole[name][shard.index])
            assert len(program.rows) == (8 if mesh == {"tensor": 4} else 4)
config.run(main, distributed.define_flags, "", ["x"])
"""


@pytest.mark.slow
def test_two_processes_answer_as_one(straight, tmp_path):
    import fm_jax
    from fm_jax import evaluate

    run, _ = straight
    done = local("--processes", 2, "--devices_per_process", 2, "--", sys.executable, "-c", ANSWERS, run,
                 tmp_path / "two")
    assert done.returncode == 0, done.stderr
    got = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    lm = fm_jax.load(run)
    assert got["texts"] == lm.generate(["To be", "or", "not"], n=2, max_new_tokens=5, temperature=0.8)
    # Float32 sums over devices in another order.
    np.testing.assert_allclose(got["logits"], lm.logits(np.arange(12).reshape(3, 4)), rtol=1e-4, atol=1e-5)
    scores = [s.logprob for s in lm.score(["To be", "To"], [" or", " not"])]
    np.testing.assert_allclose(got["scores"], scores, rtol=1e-5)
    want = evaluate.evaluate(run, ["perplexity"], lm=lm, limit=3, output=str(tmp_path / "one"))
    assert got["metrics"]["perplexity"] == pytest.approx(want["perplexity"], rel=1e-4)
    assert {p.name for p in (tmp_path / "two").iterdir()} == {p.name for p in (tmp_path / "one").iterdir()}


def test_a_killed_process_ends_the_run_and_the_same_command_continues_it_bitwise(straight, tiny_flags, tmp_path):
    run = tmp_path / "run"
    started = train(tiny_flags, run, restarts=1)
    seen = signal_at(started, run, 1, 6, signal.SIGKILL)
    killed = time.monotonic()
    for line in started.stdout:   # the second start has begun
        break
    out, err = finished(started)
    assert "process 1 of 2 (host " in err and "is lost" in err, err
    assert "process 1 of 2 ended first, with code 137 (signal 9)" in err and "starting again (1 of 1)" in err
    assert "step 6/12" in seen and "from step 4" in out and time.monotonic() - killed < 120, out
    assert rows(run) == rows(straight[0])   # to the last bit: the same program on the same devices
    assert final_state(run) == final_state(straight[0])


def final_state(run):
    """Returns {name: bytes} of the parameters of the last checkpoint."""
    from fm_jax import tree

    return {n: np.asarray(a).tobytes() for n, a in tree.flatten(checkpoint.restore_params(run, 12)).items()}


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_at_one_step_and_another_mesh_goes_on(straight, inline, tiny_flags,
                                                                                tmp_path):
    run = tmp_path / "run"
    flags = ["--config.steps=100000", "--config.checkpoint.every=100000", "--config.eval.every=100000"]
    slow = ["--config.optimizer.warmup_steps=1", "--config.optimizer.schedule=constant"]
    started = train(tiny_flags, run, *flags, *slow)
    signal_at(started, run, 1, 2, signal.SIGTERM)
    begin = time.monotonic()
    out, _ = finished(started, distributed.AGAIN)
    took = time.monotonic() - begin
    found = re.search(r"stopped by SIGTERM after step (\d+), which is saved", out)
    assert found and checkpoint.steps(run) == [int(found[1])], out
    assert took < 60   # two seconds of agreement and a save; the rest is for a machine at work
    before = rows(run)
    # One process goes on, on another mesh; and all in one run of one process have the same losses.
    last = int(found[1]) + 4
    end = [*tiny_flags, *slow, "--config.optimizer.ema_decay=0", f"--config.steps={last}",
           "--config.checkpoint.every=100000", "--config.eval.every=100000"]
    code, out, err = inline("train", *end, f"--workdir={run}", "--config.mesh.data=2")
    assert code == 0 and f"from step {found[1]}" in out, err
    assert rows(run)[: len(before)] == before
    code, _, err = inline("train", *end, f"--workdir={tmp_path / 'one'}")
    assert code == 0, err
    got, want = ([r for r in rows(folder) if "train/loss" in r] for folder in (run, tmp_path / "one"))
    assert [r["step"] for r in got] == [r["step"] for r in want] == list(range(1, last + 1))
    for a, b in zip(got, want):   # as above; the mesh is another from `found` on
        assert a["train/loss"] == pytest.approx(b["train/loss"], rel=1e-3), a["step"]


@pytest.mark.slow
def test_a_workdir_that_hosts_do_not_share_is_refused(tiny_flags, tmp_path):
    """Each process has a folder of its own under the same name, as on hosts with local disks."""
    command = [sys.executable, "-m", "fm_jax.train", *tiny_flags, *MESH, "--workdir=run"]
    script = f'mkdir -p {tmp_path}/$JAX_PROCESS_ID; cd {tmp_path}/$JAX_PROCESS_ID; exec "$@"'
    done = local("--processes", 2, "--devices_per_process", 2, "--", "bash", "-c", script, "bash", *command)
    assert done.returncode == 2, done.stderr
    assert "process 1, on" in done.stderr and "name a folder that all hosts share" in done.stderr
    assert not list(tmp_path.glob("*/run/checkpoints"))


# A process whose files have room for 40 kB more from step 6 on, if it is one of these: as hosts with own quotas.
FULL_FOR = """
import os, runpy, sys
numbers = sys.argv.pop(1).split(",")
if os.environ["JAX_PROCESS_ID"] not in numbers:
    del sys.argv[1:3]
    runpy.run_module("fm_jax.train", run_name="__main__", alter_sys=True)
    sys.exit()
""" + train_test.FULL


@pytest.mark.slow
@pytest.mark.parametrize("full", ["0", "1", "0,1"])
def test_a_disk_that_is_full_for_some_ends_all_and_nothing_is_lost(full, straight, tiny_flags, tmp_path):
    run = tmp_path / "run"
    flags = [*tiny_flags, *MESH, f"--workdir={run}", "--config.checkpoint.asynchronous=false"]
    done = local("--processes", 2, "--devices_per_process", 2, "--", sys.executable, "-c", FULL_FOR, full, 6, 40_000,
                 *flags, env=os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "0"})   # it is shared
    assert done.returncode == 2, (done.returncode, done.stderr)
    assert "saving step 8 to" in done.stderr and "File too large" in done.stderr, done.stderr
    assert checkpoint.steps(run) == [4] and checkpoint.verify(run, 4) == ""
    out, _ = finished(train(tiny_flags, run))
    assert "from step 4" in out and rows(run) == rows(straight[0]) and final_state(run) == final_state(straight[0])


@pytest.mark.slow
def test_four_processes_of_two_devices_have_the_losses_of_eight(inline, tiny_flags, tmp_path):
    mesh = ["--config.mesh.data=2"]
    finished(train(tiny_flags, tmp_path / "four", *mesh, processes=4))
    code, _, err = inline("train", *tiny_flags, *MESH, *mesh, f"--workdir={tmp_path / 'one'}")
    assert code == 0, err
    for a, b in zip(rows(tmp_path / "four"), rows(tmp_path / "one"), strict=True):
        assert all(a[name] == pytest.approx(b[name], rel=1e-4) for name in b), a["step"]

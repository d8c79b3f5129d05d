"""What every test needs before jax starts: the CPU, eight devices of it, and a compilation cache; and a small run."""

import importlib
import json
import lzma
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent

# Set, not defaulted: an accelerator or flags of the machine must not change the suite. Subprocesses
# of the tests inherit all of it, and find the checkout and the cache from any folder.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
# Machine code that is made fast, not fast machine code: compiling is most of the suite's time. What XLA does to the
# programs before is all there. JAX_DISABLE_MOST_OPTIMIZATIONS=0 make test: as users compile.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.pop("XLA_FLAGS", None)   # its own device count would contradict the one above
if os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1":
    # XLA:CPU's older emitter of loops compiles a train step in half of the time (2.7 and 1.45 s of CPU, EPYC, 2026-11).
    os.environ["XLA_FLAGS"] = "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
sys.path.insert(0, str(ROOT))   # the checkout wins over an installed fm_jax


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes too long for `make test`; run by `make slow`")
    # A deprecated call of ours is an error; libraries answer for theirs.
    config.addinivalue_line("filterwarnings", "error::DeprecationWarning:fm_jax")
    config.addinivalue_line("filterwarnings", "error::PendingDeprecationWarning:fm_jax")


# --- What several files share: a small prepared folder, a short run, and the commands as processes. One of each for a
# worker, made when first asked for; a test that changes a run copies it.

@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Returns a prepared folder: 80 passages of the embedded Shakespeare as bytes, about a quarter of them held out."""
    from fm_jax.data import documents, prepared

    folder = tmp_path_factory.mktemp("data")
    text = lzma.decompress((ROOT / "fm_jax" / "data" / "shakespeare.txt.xz").read_bytes()).decode()
    passages = [text[i : i + 500] for i in range(0, 40_000, 500)]
    (folder / "passages.jsonl").write_text("".join(json.dumps({"text": p}) + "\n" for p in passages))
    prepared.prepare(documents.open_sources(str(folder / "passages.jsonl")), "bytes", folder / "prepared",
                     validation_frac=0.25, workers=1)
    return folder / "prepared"


@pytest.fixture(scope="session")
def tiny_flags(data):
    """Returns the flags of a run of 12 steps on one device, with an average of its parameters; it saves at 4, 8, 12."""
    return [f"--config={ROOT / 'configs' / 'causal_lm.py'}:tiny", f"--config.data.train={data}",
            "--config.model.max_seq_len=256", "--config.mesh.data=1", "--config.steps=12", "--config.log.every=1",
            "--config.checkpoint.every=4", "--config.checkpoint.keep_last=3", "--config.eval.every=6",
            "--config.eval.batches=2", "--config.optimizer.ema_decay=0.5"]


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory, tiny_flags):
    """Returns (folder, output) of that run, made by the command."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    result = _command("train", *tiny_flags, f"--workdir={folder}")
    assert result.returncode == 0, result.stderr
    return folder, result.stdout


@pytest.fixture(scope="session")
def command():
    """Returns a function that runs `python -m fm_jax.NAME FLAGS` as a process."""
    return _command


def _command(name, *flags, cwd=None, **environment):
    return subprocess.run([sys.executable, "-m", f"fm_jax.{name}", *map(str, flags)], capture_output=True, text=True,
                          cwd=cwd, env={**os.environ, **environment}, timeout=300)


@pytest.fixture
def inline(capsys):
    """Returns a function that runs a command line in this process, which saves its start: (exit code, out, err)."""
    def run(name, *flags):
        from fm_jax import config

        module = importlib.import_module(f"fm_jax.{name}")
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            config.run(module.main, module._flags, module.__doc__, [name, *map(str, flags)])
        out, err = capsys.readouterr()
        return exit_.value.code or 0, out, err
    return run

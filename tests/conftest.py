"""What every test needs before jax starts: the CPU, eight devices of it, and a compilation cache."""

import os
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent

# Set, not defaulted: an accelerator or flags of the machine must not change the suite. Subprocesses
# of the tests inherit all of it, and find the checkout and the cache from any folder.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
os.environ.pop("XLA_FLAGS", None)   # its own device count would contradict this one
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
sys.path.insert(0, str(ROOT))   # the checkout wins over an installed fm_jax


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes too long for `make test`; run by `make slow`")
    # A deprecated call of ours is an error; libraries answer for theirs.
    config.addinivalue_line("filterwarnings", "error::DeprecationWarning:fm_jax")
    config.addinivalue_line("filterwarnings", "error::PendingDeprecationWarning:fm_jax")

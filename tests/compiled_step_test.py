"""A train step that was compiled before: the same numbers as one compiled here, and never another program."""

import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from fm_jax.errors import UserError
import step_test
from tpu import needs_tpu_compiler

CONFIG = str(pathlib.Path(__file__).resolve().parent.parent / "configs" / "causal_lm.py")
MESH = dict(data=2, fsdp=2, tensor=2)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Returns the file of a tiny step on eight devices, compiled in another process."""
    path = tmp_path_factory.mktemp("compiled") / "tiny.step"
    code = f"""
import step_test
from fm_jax import compiled_step, topology
p = step_test.make({MESH!r})
with topology.uncached():   # XLA:CPU cannot write again what it has read
    compiled_step.save({str(path)!r}, p.traced().lower().compile(), p.layout.mesh, p.config, None)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=pathlib.Path(__file__).parent)
    return path


def loaded(path, mesh=MESH, **changes):
    program = step_test.make(mesh, compiled_step=str(path), **changes)
    program.load_compiled(None)
    return program


def test_a_step_of_another_process_trains_the_same_to_the_last_bit(file):
    program = loaded(file)
    assert isinstance(program.train_step, jax.stages.Compiled)
    data = step_test.batches(program, 3)
    got, want = step_test.run(program, data), step_test.run(step_test.make(MESH), data)
    assert got[:2] == want[:2]
    for name, array in want[3].items():
        np.testing.assert_array_equal(got[3][name], array, err_msg=name)


@pytest.mark.parametrize("mesh, changes, message", [
    (MESH, {"optimizer.learning_rate": 0.5}, r"\(optimizer.learning_rate 1.0 there, 0.5 here\): plan it again"),
    (MESH, {"batch_size": 16, "model.remat": "dots"},
     r"\(batch_size 8 there, 16 here; model.remat 'full' there, 'dots' here\)"),
    (dict(fsdp=8), {}, r"\(mesh.data 2 there, 1 here; mesh.fsdp 2 there, 8 here; mesh.tensor 2 there, 1 here\)"),
    (dict(fsdp=4), {}, "devices '8 cpu' there, '4 cpu' here"),
], ids=str)
def test_another_program_is_refused_with_what_differs(file, mesh, changes, message):
    with pytest.raises(UserError, match=message):
        loaded(file, mesh, **changes)


def test_other_code_another_compiler_or_tokenizer_is_refused(file, tmp_path):
    line, _, code = file.read_bytes().partition(b"\n")
    header = json.loads(line)
    for change, message in (({"of": header["of"] | {"code": "0"}}, "train step (code '0' there, '"),
                            ({"of": header["of"] | {"jaxlib": "0.1"}}, "train step (jaxlib '0.1' there, "),
                            ({"of": header["of"] | {"tokenizer": "x"}}, "train step (tokenizer 'x' there, None here)"),
                            ({"format": 2}, "format 2; this fm_jax reads 1")):
        (tmp_path / "other").write_bytes(json.dumps(header | change).encode() + b"\n" + code)
        with pytest.raises(UserError) as error:
            loaded(tmp_path / "other")
        assert message in str(error.value)


@pytest.mark.parametrize("harm, message", [
    (lambda whole: whole[:-5], "is damaged: .* bytes of code"),
    (lambda whole: whole[:-5] + b"12345", "is damaged"),
    (lambda whole: b"\x80nonsense", "not a file of plan --compiled_step"),
    (lambda whole: b"{}\n", "not a file of plan --compiled_step"),
], ids=["cut", "changed", "other", "empty"])
def test_a_damaged_file_is_refused(file, tmp_path, harm, message):
    (tmp_path / "bad").write_bytes(harm(file.read_bytes()))
    with pytest.raises(UserError, match=message):
        loaded(tmp_path / "bad")


def test_train_says_so_in_one_line_before_it_makes_anything(file, inline, tiny_flags, tmp_path):
    for path, message in ((file, "is of another train step (devices '8 cpu' there, '1 cpu' here"),
                          (tmp_path / "none", "cannot be read (No such file or directory); plan it")):
        code, _, err = inline("train", *tiny_flags, f"--config.compiled_step={path}", f"--workdir={tmp_path / 'run'}")
        assert code == 2 and message in err and err.count("\n") == 1, err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags, message", [
    (["--compiled_step=x"], "--compiled_step needs --topology"),
    (["--compiled_step=x", "--topology=v5e:2x2", "--analytic"], "so without --analytic"),
    (["--compiled_step=x", "--topology=v5e:2x2", "--search"], "so without --search"),
])
def test_plan_writes_it_of_one_compiled_layout(flags, message, inline):
    code, _, err = inline("plan", f"--config={CONFIG}:tiny", *flags)
    assert code == 2 and message in err and err.count("\n") == 1, err


@needs_tpu_compiler
def test_plan_writes_the_step_of_a_pod(data, tmp_path):
    """It cannot run here: what it is of is in its first line, and a CPU refuses it."""
    done = subprocess.run([sys.executable, "-m", "fm_jax.plan", f"--config={CONFIG}:tiny", "--topology=v5e:2x2",
                           "--mesh=fsdp=4", f"--config.data.train={data}", f"--compiled_step={tmp_path / 'pod'}"],
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and f"compiled step         {tmp_path / 'pod'}" in done.stdout, done.stderr
    line, _, code = (tmp_path / "pod").read_bytes().partition(b"\n")
    header = json.loads(line)
    assert header["of"]["devices"] == "4 TPU v5 lite" and header["of"]["mesh.fsdp"] == 4 and "libtpu" in header["of"]
    assert header["of"]["tokenizer"] and header["bytes"] == len(code) > 10_000
    with pytest.raises(UserError, match="devices '4 TPU v5 lite' there, '4 cpu' here"):
        loaded(tmp_path / "pod", dict(fsdp=4))

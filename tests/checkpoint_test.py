"""Checkpoints: bitwise round trips on any mesh, every damage found and named, kills and full disks survived.

References are NumPy copies taken before saving. Comparisons are bitwise: saving must not round.
"""

import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
from typing import Any
import zlib

from flax import struct
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import numpy as np
import optax
import pytest

from fm_jax import checkpoint, config as config_lib
from fm_jax.errors import UserError


@struct.dataclass
class State:
    step: Any
    params: Any
    opt_state: Any
    ema: Any


TX = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, weight_decay=0.1))
SPECS = {"w": P("fsdp", "tensor"), "table": P("tensor", "fsdp"), "scale": P()}


def make_mesh(shape):
    devices = jax.devices()[:int(np.prod(shape))]
    return jax.make_mesh(shape, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3, devices=devices)


def make_state(step=0, seed=0, mesh=None, ema=True, width=16):
    rng = np.random.default_rng(seed)
    params = {"block": {"w": rng.normal(size=(8, width)).astype(np.float32),
                        "scale": rng.normal(size=(width,)).astype(np.float32)},
              "table": rng.normal(size=(24, 8)).astype(jnp.bfloat16)}
    spec = lambda path: SPECS.get(getattr(path[-1], "key", ""), P()) if path else P()
    place = lambda path, x: jax.device_put(x, NamedSharding(mesh, spec(path)) if mesh else jax.devices()[0])
    params = jax.tree_util.tree_map_with_path(place, params)
    opt_state = jax.tree_util.tree_map_with_path(
        lambda path, x: place(path, jnp.asarray(rng.normal(size=x.shape), x.dtype)), TX.init(params))
    return State(place((), jnp.int32(step)), params, opt_state, jax.tree.map(jnp.copy, params) if ema else None)


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def bits(tree):
    return [(np.asarray(x).dtype, np.asarray(x).shape, np.asarray(x).tobytes()) for x in jax.tree.leaves(tree)]


def options(**changes):
    config = config_lib.defaults()
    config.checkpoint.update(changes)
    return config.checkpoint


def config_with(**changes):
    config = config_lib.defaults()
    config.checkpoint.update(changes)
    return config


def save(folder, *states, **changes):
    with checkpoint.Checkpoints(folder, options(**changes)) as checkpoints:
        for state in states:
            checkpoints.save(int(state.step), state)
    return folder


def files(folder, step):
    root = pathlib.Path(folder) / "checkpoints" / str(step)
    return {str(p.relative_to(root)): p for p in root.rglob("*") if p.is_file()}


# --- Round trips


@pytest.mark.parametrize("to", [(1, 1, 1), (8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4)])
def test_restores_bitwise_on_any_mesh(tmp_path, to):
    saved = make_state(7, mesh=make_mesh((2, 2, 2)))
    wanted = bits(saved)
    save(tmp_path, saved)
    target = abstract(make_state(0, seed=1, mesh=make_mesh(to)))
    restored = checkpoint.restore(tmp_path, 7, target)
    assert bits(restored) == wanted
    assert jax.tree.structure(restored) == jax.tree.structure(saved)
    assert all(x.sharding == a.sharding for x, a in zip(jax.tree.leaves(restored), jax.tree.leaves(target)))


@pytest.mark.parametrize("asynchronous", [True, False])
def test_state_may_be_donated_as_soon_as_save_returns(tmp_path, asynchronous):
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)
    state = make_state(1, mesh=make_mesh((2, 2, 2)), width=1 << 16)   # 2 MB an array: still being written below
    wanted, target = bits(state), abstract(state)
    with checkpoint.Checkpoints(tmp_path, options(asynchronous=asynchronous)) as checkpoints:
        checkpoints.save(1, state)
        assert asynchronous or checkpoint.steps(tmp_path) == [1]
        for _ in range(3):
            state = overwrite(state)
        jax.block_until_ready(state)
    assert bits(checkpoint.restore(tmp_path, 1, target)) == wanted


def test_a_saved_step_is_left_alone(tmp_path):
    save(tmp_path, make_state(1), make_state(1, seed=5))
    assert bits(checkpoint.restore_params(tmp_path)) == bits(make_state(1).params)


def test_inference_reads_parameters_only(tmp_path):
    state = make_state(3)
    state = state.replace(ema=jax.tree.map(lambda x: x + 1, state.params))
    save(tmp_path, make_state(2, seed=9), state)
    for name, path in files(tmp_path, 3).items():
        if name.startswith("optimizer/"):
            path.unlink()
    read = checkpoint.restore_params(tmp_path)
    assert bits(read) == bits(state.params) and isinstance(read["table"], np.ndarray)
    assert bits(checkpoint.restore_params(tmp_path, ema=True)) == bits(state.ema)
    assert bits(checkpoint.restore_params(tmp_path, 2)) == bits(make_state(2, seed=9).params)
    some = checkpoint.restore_params(tmp_path, abstract={"block": {"w": jax.ShapeDtypeStruct((8, 16), jnp.bfloat16)}})
    assert bits(some) == bits({"block": {"w": np.asarray(state.params["block"]["w"]).astype(jnp.bfloat16)}})
    save(tmp_path / "no_ema", make_state(1, ema=False))
    assert bits(checkpoint.restore_params(tmp_path / "no_ema", ema=True)) == bits(make_state(1).params)


def test_missing_steps_and_folders_are_named(tmp_path):
    save(tmp_path, make_state(10), make_state(20))
    with pytest.raises(UserError, match="unknown 15.*known: 10, 20"):
        checkpoint.restore_params(tmp_path, 15)
    with pytest.raises(UserError, match="nowhere.*no such folder"):
        checkpoint.restore_params(tmp_path / "nowhere")
    with pytest.raises(UserError, match="elsewhere.*no such folder"):
        checkpoint.start(tmp_path / "new", config_with(continue_from=str(tmp_path / "elsewhere")), None, None)
    with pytest.raises(UserError, match="ftp:// is not supported; name a folder, or one of a bucket"):
        checkpoint.steps("ftp://host/run")


# --- Damage


def test_any_changed_byte_is_found_and_its_file_named(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "BLOCK_BYTES", 1000)
    state = make_state(4, width=64)
    save(tmp_path, state)
    assert checkpoint.verify(tmp_path, 4) == ""
    orbax_marks = 0
    for name, path in files(tmp_path, 4).items():
        whole = path.read_bytes()
        for where in sorted({0, len(whole) // 2, len(whole) - 1}):
            changed = bytearray(whole)
            changed[where] ^= 1
            path.write_bytes(changed)
            problem = checkpoint.verify(tmp_path, 4)
            if "/" not in name and name != "meta.json":   # Orbax's marks, which nobody reads
                assert bits(checkpoint.restore(tmp_path, 4, abstract(state))) == bits(state)
                orbax_marks += 1
                continue
            if name == "meta.json" and not problem:   # only where JSON does not care: its last line end
                assert where == len(whole) - 1
                continue
            assert name in problem
            if name != "meta.json":
                assert f"from byte {where // 1000 * 1000} on" in problem
        if "/" in name or name == "meta.json":
            for content in (whole[:len(whole) // 2], whole + b"\0"):
                path.write_bytes(content)
                problem = checkpoint.verify(tmp_path, 4)
                assert name in problem if name == "meta.json" else (
                    problem == f"{name} has {len(content)} bytes instead of {len(whole)}")
            path.unlink()
            assert f"{name} is missing" in checkpoint.verify(tmp_path, 4)
        path.write_bytes(whole)
    assert checkpoint.verify(tmp_path, 4) == "" and orbax_marks <= 6


def test_checksums_tell_what_disks_do(tmp_path):
    data = np.random.default_rng(0).bytes(checkpoint.BLOCK_BYTES + 4_000_001)   # a block, pieces, and a part of one
    path = tmp_path / "file"
    checksums = lambda content: path.write_bytes(content) and [checkpoint._checksum(path, i) for i in range(2)]
    whole = checksums(data)
    assert whole == checksums(data) and len(set(whole)) == 2
    rng = np.random.default_rng(1)
    for kind in range(6):
        for _ in range(8):
            bad = bytearray(data)
            at, other = (int(i) for i in rng.integers(len(data) // 4096, size=2) * 4096)
            length = min(int(rng.integers(1, 40)) * 4096, len(data) - max(at, other))
            if kind == 0:     # one bit
                bad[at] ^= 1 << int(rng.integers(8))
            elif kind == 1:   # zeroed
                bad[at:at + length] = bytes(length)
            elif kind == 2:   # stale
                bad[at:at + length] = rng.bytes(length)
            elif kind == 3:   # exchanged, anywhere
                bad[at:at + length], bad[other:other + length] = data[other:other + length], data[at:at + length]
            elif kind == 4:   # exchanged 4096 bytes, near each other: within one piece
                other = at + 4096 * int(rng.integers(1, 200))
                if other + 4096 > len(data):
                    continue
                bad[at:at + 4096], bad[other:other + 4096] = data[other:other + 4096], data[at:at + 4096]
            else:             # all of one bit
                bad[at:at + length] = bytes(b | 64 for b in bad[at:at + length])
            if bad != data:
                assert checksums(bad) != whole, (kind, at, other, length)


def test_a_checksum_is_the_crc32_of_column_sums(tmp_path):
    data = np.random.default_rng(0).integers(2**64, size=16 * 8191 + 5, dtype=np.uint64)
    data.tofile(tmp_path / "file")
    crc = 0
    for piece in (data[:16 * 8191], data[16 * 8191:]):
        columns = [sum(int(w) for w in piece[c::8191]) % 2**64 for c in range(8191)]
        crc = zlib.crc32(np.array(columns, np.uint64).tobytes(), crc)
    assert checkpoint._checksum(tmp_path / "file", 0) == crc


def contents(folder):
    return {p: p.is_file() and p.read_bytes() for p in pathlib.Path(folder).rglob("*")}


def _damage(folder, step, item=""):
    path = max((p for n, p in files(folder, step).items() if n.startswith(item)), key=lambda p: p.stat().st_size)
    path.write_bytes(path.read_bytes()[:-100])
    return path.name


def test_corrupt_newest_stops_and_previous_serves_only_on_request(tmp_path):
    states = [make_state(s, seed=s) for s in (1, 2, 3)]
    save(tmp_path, *states, keep_last=3)
    broken = _damage(tmp_path, 3)
    fail = lambda: pytest.fail("must not start afresh")
    with pytest.raises(UserError) as e:
        checkpoint.start(tmp_path, config_with(), abstract(states[0]), fail)
    message = str(e.value)
    assert broken in message and "checkpoints/3 is corrupt" in message and "newest good one is step 2" in message
    assert "--config.checkpoint.on_corrupt=previous" in message and "\n" not in message
    config, before = config_with(on_corrupt="previous"), contents(tmp_path)
    state, _, line = checkpoint.start(tmp_path, config, abstract(states[0]), fail)
    assert contents(tmp_path) == before   # nothing is moved before all is checked
    checkpoint.describe_run(tmp_path, config, int(state.step))
    assert bits(state) == bits(states[1])
    assert "from step 2" in line and "3.corrupt" in line
    assert checkpoint.steps(tmp_path) == [1, 2] and (tmp_path / "checkpoints" / "3.corrupt").is_dir()
    save(tmp_path, states[2], keep_last=3)   # the same step again
    assert bits(checkpoint.restore(tmp_path, 3, abstract(states[0]))) == bits(states[2])
    assert (tmp_path / "checkpoints" / "3.corrupt").is_dir()

    _damage(tmp_path, 3), _damage(tmp_path, 2)
    state, _, line = checkpoint.start(tmp_path, config, abstract(states[0]), fail)
    assert bits(state) == bits(states[0]) and "now 2.corrupt, 3.corrupt1" in line
    checkpoint.describe_run(tmp_path, config, int(state.step))
    _damage(tmp_path, 1)
    with pytest.raises(UserError, match="checkpoints/1 is corrupt"):
        checkpoint.restore_params(tmp_path)
    with pytest.raises(UserError, match="every checkpoint is corrupt"):
        checkpoint.start(tmp_path, config, abstract(states[0]), fail)


def test_another_runs_corrupt_checkpoint_is_not_touched(tmp_path):
    save(tmp_path / "a", make_state(1), make_state(2))
    _damage(tmp_path / "a", 2)
    config = config_with(continue_from=str(tmp_path / "a"))
    with pytest.raises(UserError, match="on_corrupt=previous"):
        checkpoint.start(tmp_path / "b", config, abstract(make_state()), None)
    config.checkpoint.on_corrupt = "previous"
    state, _, _ = checkpoint.start(tmp_path / "b", config, abstract(make_state()), None)
    assert int(state.step) == 1 and checkpoint.steps(tmp_path / "a") == [1, 2]


def test_another_architecture_is_listed(tmp_path):
    save(tmp_path, make_state(1))
    with pytest.raises(UserError) as e:
        checkpoint.restore(tmp_path, 1, abstract(make_state(width=32)))
    assert "params.block.w: wanted float32[8, 32], found float32[8, 16]" in str(e.value)
    assert "params.block.scale" in str(e.value) and "opt_state.1.0.mu.block.w" in str(e.value)

    many = make_state(1)
    many = many.replace(params={f"p{i:02}": jnp.zeros(3) for i in range(15)})
    with pytest.raises(UserError) as e:
        checkpoint.restore(tmp_path, 1, abstract(many))
    assert "params.p09" in str(e.value) and "params.p10" not in str(e.value) and "more" in str(e.value)
    with pytest.raises(UserError, match="opt_state"):
        checkpoint.restore(tmp_path, 1, abstract(make_state()).replace(opt_state=()))
    with pytest.raises(UserError, match="block.w: wanted float32\\[8, 32\\], found float32\\[8, 16\\]"):
        checkpoint.restore_params(tmp_path, abstract=abstract(make_state(width=32)).params)


# --- Where a run begins


def test_restore_precedence(tmp_path):
    own, other, source = make_state(5, seed=5), make_state(6, seed=6), make_state(7, seed=7)
    source = source.replace(ema=jax.tree.map(lambda x: x + 1, source.params))
    fresh, target = make_state(0, seed=8), abstract(make_state())
    save(tmp_path / "own", own), save(tmp_path / "other", other), save(tmp_path / "source", source)
    config = config_with(continue_from=str(tmp_path / "other"), init_from=str(tmp_path / "source"),
                         init_pattern=r"block\..*")
    start = lambda folder: checkpoint.start(tmp_path / folder, config, target, lambda: fresh)

    state, _, line = start("own")
    assert bits(state) == bits(own) and "continuing" in line and "step 5" in line
    state, _, line = start("new")
    assert bits(state) == bits(other) and "step 6" in line and "continue_from" in line
    config.checkpoint.continue_from = ""
    state, _, line = start("new")
    assert "2 of 3 parameters" in line and "step 7" in line and "init_from" in line
    for tree in (state.params, state.ema):
        assert bits(tree) == bits({"block": source.ema["block"], "table": fresh.params["table"]})
    assert bits(state.opt_state) == bits(fresh.opt_state) and int(state.step) == 0
    assert (state.params["block"]["w"].unsafe_buffer_pointer() != state.ema["block"]["w"].unsafe_buffer_pointer())
    config.checkpoint.init_pattern = r"blok\..*"
    with pytest.raises(UserError, match="init_pattern.*blok.*block.w"):
        start("new")
    config.checkpoint.init_from = ""
    state, _, line = start("new")
    assert state is fresh and "fresh" in line
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("key", [None, "continue_from"])
def test_the_average_can_be_switched_on_and_off_on_the_way(tmp_path, key):
    without, with_ = make_state(3, ema=False), make_state(4)
    with_ = with_.replace(ema=jax.tree.map(lambda x: x + 1, with_.params))
    save(tmp_path / "without", without), save(tmp_path / "with", with_)
    wanted = with_.replace(ema=jax.tree.map(lambda x: x.astype(jnp.float32), with_.params))   # as a step keeps it

    def start(run, target):
        folder = tmp_path / ("new" if key else run)
        config = config_with(**{key: str(tmp_path / run)} if key else {})
        return checkpoint.start(folder, config, abstract(target), lambda: pytest.fail("must not start afresh"))

    state, _, line = start("without", wanted)
    assert bits(state.replace(ema=None)) == bits(without) and "it has no average of the parameters" in line
    assert bits(state.ema) == bits(jax.tree.map(lambda p: p.astype(jnp.float32), without.params))
    for (n, a), b in zip(jax.tree_util.tree_leaves_with_path(state.ema), jax.tree.leaves(state.params)):
        assert a.unsafe_buffer_pointer() != b.unsafe_buffer_pointer(), n   # both are donated
    _damage(tmp_path / "with", 4, "ema")   # it is not read, so it need not be whole
    state, _, line = start("with", with_.replace(ema=None))
    assert bits(state) == bits(with_.replace(ema=None)) and "average of the parameters is not read" in line
    with pytest.raises(UserError, match="ema/.* has .* bytes instead of"):
        start("with", wanted)


def test_initialising_reads_and_verifies_parameters_only_and_once(tmp_path, monkeypatch):
    state = make_state(3)
    save(tmp_path / "source", state)
    shutil.rmtree(tmp_path / "source" / "checkpoints" / "3" / "optimizer")
    shutil.rmtree(tmp_path / "source" / "checkpoints" / "3" / "params")   # as its average serves
    read, checksum = [], checkpoint._checksum
    monkeypatch.setattr(checkpoint, "_checksum", lambda path, i: read.append((path, i)) or checksum(path, i))
    config = config_with(init_from=str(tmp_path / "source"))
    got, _, _ = checkpoint.start(tmp_path / "new", config, abstract(state), lambda: make_state(0, seed=8))
    assert bits(got.params) == bits(state.ema) and read and len(read) == len(set(read))
    _damage(tmp_path / "source", 3, "ema")
    with pytest.raises(UserError, match="every checkpoint is corrupt .3: ema/"):
        checkpoint.start(tmp_path / "new", config, abstract(state), lambda: make_state(0, seed=8))


def test_another_tokenizer_is_refused_where_its_ids_would_change_sense(tmp_path):
    state, axes = make_state(3), {"block": {"w": ("embed", "mlp"), "scale": ("mlp",)}, "table": ("vocab", "embed")}
    other = Words()
    other.fingerprint = "xyz"
    checkpoint.describe_run(tmp_path / "source", config_with(), 0, tokenizer=Words())
    save(tmp_path / "source", state)
    start = lambda config, tokenizer: checkpoint.start(
        tmp_path / "new", config, abstract(state), lambda: make_state(0, seed=8), axes=axes, tokenizer=tokenizer)

    config = config_with(continue_from=str(tmp_path / "source"))
    assert bits(start(config, Words())[0]) == bits(state)
    with pytest.raises(UserError, match="source holds .*tokenizer: 'abc' -> 'xyz'.*init_from"):
        start(config, other)
    config.batch_size = 7   # may change: that is what it is for
    start(config, Words())
    config.objective = "another.Objective"
    with pytest.raises(UserError, match="objective: 'fm_jax.*' -> 'another.Objective'"):
        start(config, Words())

    config = config_with(init_from=str(tmp_path / "source"))
    got, _, line = start(config, Words())
    assert bits(got.params) == bits(state.params) and "3 of 3 parameters" in line and line.endswith("the others fresh")
    with pytest.raises(UserError, match="another tokenizer .'abc' -> 'xyz'.*rows of table stand.*init_pattern"):
        start(config, other)
    config.checkpoint.init_pattern = r"block\..*"   # without the vocabulary, it is as good a start as any
    got, _, line = start(config, other)
    assert bits(got.params["block"]) == bits(state.params["block"]) and "its tokenizer was another" in line
    (tmp_path / "source" / "run.json").unlink()
    assert "its tokenizer is not known" in start(config, other)[2]
    config = config_with(continue_from=str(tmp_path / "source"))
    assert "it has no run.json: its settings, tokenizer and data are not compared" in start(config, other)[2]


# --- Which are kept


def test_keeps_last_multiples_and_best(tmp_path):
    rng = np.random.default_rng(0)
    for _ in range(200):
        there = sorted(rng.choice(60, size=rng.integers(1, 12), replace=False).tolist())
        loss = dict(zip(there, rng.permutation(len(there)).astype(float)))
        loss[there[0]] = np.nan
        o = options(keep_last=int(rng.integers(1, 4)), keep_every=int(rng.integers(0, 7)),
                    keep_best=int(rng.integers(0, 4)))
        best = sorted((s for s in there if loss[s] == loss[s]), key=loss.get)[:o.keep_best]
        wanted = [s for i, s in enumerate(there) if i >= len(there) - o.keep_last
                  or (o.keep_every > 0 and s % o.keep_every == 0) or s in best]
        assert sorted(checkpoint.keep(there, o, loss.get)) == wanted

    losses = {1: 5.0, 2: 1.0, 3: 4.0, 4: 3.0, 5: 2.0, 6: 2.5}
    with checkpoint.Checkpoints(tmp_path, options(keep_last=1, keep_every=4, keep_best=2)) as checkpoints:
        for step, loss in losses.items():
            checkpoints.save(step, make_state(step), {"validation/loss": loss})
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["2", "4", "5", "6"]


# --- Full disks, kills, several processes


CHILD = """
import os, resource, signal, sys
import jax, jax.numpy as jnp
from fm_jax import checkpoint, config
from fm_jax.errors import UserError
sys.path.insert(0, {tests!r})
from checkpoint_test import State, abstract, files, make_state, options
"""


def run(code, *args, **kwargs):
    code = CHILD.format(tests=str(pathlib.Path(__file__).parent)) + textwrap.dedent(code)
    return subprocess.Popen([sys.executable, "-c", code, *map(str, args)], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, **kwargs)


def test_a_full_disk_is_one_line_and_harms_no_checkpoint(tmp_path):
    child = run("""
        c = checkpoint.Checkpoints(sys.argv[1], options())
        c.save(1, make_state(1)); c.wait()
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, resource.RLIM_INFINITY))   # as a quota would
        c.save(2, make_state(2, width=1 << 14))
        print("save returned", flush=True)
        try:
            c.wait()
        except UserError as e:
            print(e)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        c.save(2, make_state(2)); c.close()   # goes on once there is room
    """, tmp_path)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 0, err
    lines = out.splitlines()
    assert lines[0] == "save returned" and len(lines) == 2
    assert "saving step 2" in lines[1] and "File too large" in lines[1] and "intact: 1" in lines[1]
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["1", "2"]
    for step in (1, 2):
        assert checkpoint.verify(tmp_path, step) == ""
        assert bits(checkpoint.restore_params(tmp_path, step)) == bits(make_state(step).params)


def test_too_little_space_is_said_before_anything_is_written(tmp_path, monkeypatch):
    save(tmp_path, make_state(1))
    checkpoints = checkpoint.Checkpoints(tmp_path, options())
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match="saving step 2 needs .* GB free; earlier checkpoints are intact: 1"):
        checkpoints.save(2, make_state(2))
    assert os.listdir(tmp_path / "checkpoints") == ["1"]
    checkpoints.close()


def test_an_error_of_the_background_save_is_raised_by_the_next_call(tmp_path, monkeypatch):
    def fail(path, value):
        raise KeyError("a bug")

    checkpoints = checkpoint.Checkpoints(tmp_path, options())
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_write_json", fail)
        checkpoints.save(1, make_state(1))
        with pytest.raises(RuntimeError, match="saving step 1 .*KeyError.*a bug"):
            checkpoints.save(2, make_state(2))
    assert os.listdir(tmp_path / "checkpoints") == []
    checkpoints.save(2, make_state(2))
    checkpoints.close()
    assert checkpoint.steps(tmp_path) == [2]


def test_a_kill_during_a_save_leaves_only_good_checkpoints(tmp_path):
    child = run("""
        with checkpoint.Checkpoints(sys.argv[1], options(keep_last=2)) as c:
            for step in range(1, 10_000):
                c.save(step, make_state(step, width=1 << 16))
                print(step, flush=True)
    """, tmp_path)
    for line in child.stdout:
        if int(line) == 4:
            break
    child.send_signal(signal.SIGKILL)   # step 4 is being written
    child.communicate(timeout=60)
    there = checkpoint.steps(tmp_path)
    assert there and there[-1] in (3, 4)
    assert [checkpoint.verify(tmp_path, s) for s in there] == [""] * len(there)
    left = set(os.listdir(tmp_path / "checkpoints")) - set(map(str, there))
    state, _, line = checkpoint.start(tmp_path, config_with(), abstract(make_state(width=1 << 16)), None)
    assert bits(state) == bits(make_state(there[-1], width=1 << 16)) and f"step {there[-1]}" in line
    save(tmp_path, make_state(5))
    assert all(n.isdecimal() for n in os.listdir(tmp_path / "checkpoints")), f"left by the kill: {left}"


def test_two_processes_save_and_one_restores(tmp_path):
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    code = """
        jax.config.update("jax_num_cpu_devices", 2)
        jax.distributed.initialize(f"localhost:{sys.argv[2]}", 2, int(sys.argv[3]))
        from jax.sharding import AxisType
        mesh = jax.make_mesh((1, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
        state = make_state(1, mesh=mesh)
        with checkpoint.Checkpoints(sys.argv[1], options()) as c:
            c.save(1, state)
        path = next(p for name, p in files(sys.argv[1], 1).items() if "params/ocdbt.process_1/d/" in name)
        whole = path.read_bytes()
        assert checkpoint.verify(sys.argv[1], 1) == ""
        checkpoint._sync("verified")
        if jax.process_index() == 0:
            path.write_bytes(whole[:-1] + b"!")
        checkpoint._sync("damaged")
        print(checkpoint.verify(sys.argv[1], 1))
        checkpoint._sync("found")
        if jax.process_index() == 0:
            path.write_bytes(whole)
        checkpoint._sync("mended")
        with checkpoint.lock(sys.argv[1]):
            state, _, line = checkpoint.start(sys.argv[1], config.defaults(), abstract(state), None)
            checkpoint.describe_run(sys.argv[1], config.defaults(), 1)
        print(line)
        with open(os.path.join(sys.argv[1], "lock")) as file:
            if jax.process_index() == 1:   # as a process of another run would
                checkpoint.fcntl.flock(file, checkpoint.fcntl.LOCK_EX)
            checkpoint._sync("locked")
            try:
                with checkpoint.lock(sys.argv[1]):
                    pass
            except UserError as e:
                print(e)
            checkpoint._sync("refused")
    """
    env = {k: v for k, v in os.environ.items() if k not in ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS")}
    children = [run(code, tmp_path, port, i, env=env) for i in range(2)]
    try:
        outs = [c.communicate(timeout=60) for c in children]
    finally:
        for child in children:
            child.kill()
    assert [c.returncode for c in children] == [0, 0], outs
    said = [[line for line in out.splitlines() if "Gloo" not in line] for out, _ in outs]
    assert said[0] == said[1] and len(said[0]) == 3, outs
    assert "changed since it was written" in said[0][0] and "from step 1" in said[0][1]
    assert "another process trains in" in said[0][2]
    assert bits(checkpoint.restore(tmp_path, 1, abstract(make_state()))) == bits(make_state(1))


# --- The run folder


class Words:
    """A tokenizer, as far as a run folder cares."""

    fingerprint = "abc"

    def save(self, folder):
        folder.mkdir(exist_ok=True)
        (folder / "words.txt").write_text("a b c " * 10_000)


def begin(folder, config, **described):
    """Returns the line about where a run begins, as the train command would have begun it."""
    with checkpoint.lock(folder):
        state, step, line = checkpoint.start(folder, config, abstract(make_state()), make_state, **described)
        assert step == int(state.step)
        checkpoint.describe_run(folder, config, step, **described)
    return line


def test_run_folder_describes_itself(tmp_path):
    config = config_lib.defaults()
    config.steps = 123
    described = dict(tokenizer=Words(), data={"texts": "sha256:1"})
    begin(tmp_path / "run", config, **described)
    stored, _ = config_lib.load(tmp_path / "run" / "config.json")
    assert stored.to_json() == config.to_json()
    assert (tmp_path / "run" / "tokenizer" / "words.txt").read_text() == "a b c " * 10_000
    run_json = checkpoint.json.loads((tmp_path / "run" / "run.json").read_text())
    assert run_json["data"] == {"texts": "sha256:1"} and run_json["tokenizer"] == "abc"
    assert run_json["starts"][0]["jax"] == jax.__version__

    save(tmp_path / "run", make_state(1))
    config.steps, config.optimizer.learning_rate, config.model.remat = 456, 0.5, "full"   # all may change
    assert "from step 1" in begin(tmp_path / "run", config, tokenizer=Words(), data={"moved/texts": "sha256:1"})
    assert config_lib.load(tmp_path / "run" / "config.json")[0].steps == 456
    assert len(checkpoint.json.loads((tmp_path / "run" / "run.json").read_text())["starts"]) == 2


def test_a_run_with_other_settings_is_refused_before_anything_is_written(tmp_path):
    config = config_lib.defaults()
    described = dict(tokenizer=Words(), data={"texts": "sha256:1"})
    begin(tmp_path, config, **described)
    save(tmp_path, make_state(1))
    before = contents(tmp_path)

    def refused(message, config, **changes):
        with pytest.raises(UserError) as e:
            begin(tmp_path, config, **(described | changes))
        assert all(text in str(e.value) for text in message) and "\n" not in str(e.value), e.value
        assert contents(tmp_path) == before

    other = config_lib.defaults()
    other.model.num_layers, other.optimizer.name, other.batch_size = 9, "lion", 64
    refused(("model.num_layers: 4 -> 9", "optimizer.name: 'adamw' -> 'lion'", "batch_size: 32 -> 64", "--workdir",
             "continue_from"), other)
    other = config_lib.defaults()
    other.optimizer.moment_dtype = "bfloat16"
    refused(("optimizer.moment_dtype: 'float32' -> 'bfloat16'",), other)
    refused(("sha256:2",), config, data={"texts": "sha256:2"})
    tokenizer = Words()
    tokenizer.fingerprint = "xyz"
    refused(("tokenizer: 'abc' -> 'xyz'",), config, tokenizer=tokenizer)
    whole = (tmp_path / "run.json").read_bytes()
    for damaged in (b"", whole[:-20], b"[]", b"\xff"):
        (tmp_path / "run.json").write_bytes(damaged)
        before = contents(tmp_path)
        refused((f"{tmp_path / 'run.json'}: damaged (", "delete it"), config)
    (tmp_path / "run.json").unlink()
    assert "no run.json: its settings, tokenizer and data are not compared" in begin(tmp_path, config, **described)
    assert checkpoint.json.loads((tmp_path / "run.json").read_text())["tokenizer"] == "abc"


def test_a_folder_without_checkpoints_takes_another_config(tmp_path):
    config = config_lib.defaults()
    begin(tmp_path, config)
    config.model.num_layers = 9
    begin(tmp_path, config)
    assert config_lib.load(tmp_path / "config.json")[0].model.num_layers == 9


def test_a_second_run_in_a_folder_is_refused_until_the_first_is_gone(tmp_path):
    child = run("""
        with checkpoint.lock(sys.argv[1]):
            print("held", flush=True)
            signal.pause()
    """, tmp_path / "run")
    assert child.stdout.readline() == "held\n"
    with pytest.raises(UserError, match="another process trains in .*run: wait for its end, or .* --workdir"):
        begin(tmp_path / "run", config_lib.defaults())
    assert os.listdir(tmp_path / "run") == ["lock"]
    child.kill()   # leaves the file, but no lock
    child.communicate(timeout=60)
    assert "fresh start" in begin(tmp_path / "run", config_lib.defaults())
    assert "fresh start" in begin(tmp_path / "run", config_lib.defaults())   # the first has let go of it


@pytest.mark.parametrize("room", [4, 20_000])   # less than config.json has, and less than the tokenizer
def test_a_full_disk_leaves_the_description_of_a_run_whole(tmp_path, room):
    import resource

    config = config_lib.defaults()
    begin(tmp_path, config, tokenizer=Words())
    save(tmp_path, make_state(1))
    before, limits = contents(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        if room < 20_000:
            with pytest.raises(UserError, match="--workdir=.*: cannot be used \\(File too large"):
                begin(tmp_path, config, tokenizer=Words())
            assert {p: b for p, b in contents(tmp_path).items() if not p.name.endswith(".new")} == before
        else:   # the tokenizer is there: it is not written again
            assert "from step 1" in begin(tmp_path, config, tokenizer=Words())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "tokenizer" / "words.txt").read_bytes() == before[tmp_path / "tokenizer" / "words.txt"]
    assert "from step 1" in begin(tmp_path, config, tokenizer=Words())


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--workdir=.*file/run: cannot be used \\(Not a directory"):
        begin(tmp_path / "file" / "run", config_lib.defaults())


@pytest.mark.parametrize("mode", [0o555, 0o000])
def test_a_read_only_folder_is_one_line(mode):
    root = pathlib.Path(tempfile.mkdtemp())   # not tmp_path, which no other user may enter
    try:
        (root / "run").mkdir()
        root.chmod(0o755), (root / "run").chmod(mode)
        if os.geteuid() == 0:
            os.seteuid(65534)   # root may write anywhere
        with pytest.raises(UserError, match="--workdir=.*run: cannot be used \\(Permission denied: .*run"):
            begin(root / "run", config_lib.defaults())
    finally:
        os.seteuid(os.getuid())
        (root / "run").chmod(0o755)
        shutil.rmtree(root)

"""Metrics: exact means, one history after any kill, honest speed; against NumPy and jax's own tables."""

import io
import json
import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax import metrics
from fm_jax.architecture import Architecture
from fm_jax.errors import UserError


# --- Sums


def test_means_of_unequal_parts_equal_the_mean_of_the_whole():
    rng = np.random.default_rng(0)
    loss, weight = rng.normal(3, 1, 1000), rng.integers(0, 2, 1000)
    sums = metrics.Sums()
    for part in np.split(np.arange(1000), [10, 11, 500, 501, 900]):
        sums.add({"nll": ((loss * weight)[part].sum(), weight[part].sum()), "tokens": weight[part].sum()})
    means = sums.take("train/")
    # float64 sums in another order: 1000 roundings of 1e-16.
    np.testing.assert_allclose(means["train/nll"], np.average(loss, weights=weight), rtol=1e-12)
    np.testing.assert_allclose(means["train/perplexity"], np.exp(np.average(loss, weights=weight)), rtol=1e-12)
    assert means["train/tokens"] == weight.sum()
    assert sums.take() == {}


def test_sums_do_not_lose_small_steps_in_a_large_total():
    sums = metrics.Sums()
    sums.add({"n": np.float32(2**24)})
    for _ in range(100):
        sums.add({"n": np.float32(1)})   # float32 would stay at 2**24
    assert sums.take() == {"n": 2**24 + 100}


def test_no_weight_is_nan_and_a_huge_loss_is_infinite_perplexity():
    sums = metrics.Sums()
    sums.add({"nll": (jnp.float32(0), jnp.float32(0)), "other": (1e6, 1)})
    assert math.isnan(sums.take()["nll"])
    sums.add({"nll": (1e6, 1)})
    assert sums.take()["perplexity"] == math.inf


def test_values_come_one_step_late_and_each_once():
    late = metrics.Late()
    got = [late.push(step, {"loss": (jnp.float32(step), jnp.ones(()))}) for step in range(1, 5)]
    got = [*got, late.flush(), late.flush()]
    assert got[0] is None and got[-1] is None
    assert [(s, float(v["loss"][0])) for s, v in got[1:-1]] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]
    assert isinstance(got[1][1]["loss"][0], (np.ndarray, np.generic))


def test_values_come_when_the_device_has_finished_their_step():
    """So that a clock that ticks then has waited for the device: for all of the step, not for the loss alone."""
    @jax.jit
    def slow(x):
        y = jax.lax.fori_loop(0, 40, lambda i, x: x @ x / 300, x)
        return y, {"loss": (x.sum(), jnp.ones(()))}   # the loss is known long before the end

    x = jnp.ones((300, 300))
    jax.block_until_ready(slow(x))
    late, (state, values) = metrics.Late(), slow(x)
    late.push(1, values)
    late.flush()
    assert state.is_ready()


# --- Files


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def write(folder, steps, resume=0, **kwargs):
    with metrics.Writer(folder, resume, **kwargs) as writer:
        for step in steps:
            writer.write(step, {"train/loss": step / 2})


def test_resuming_drops_the_steps_that_will_be_run_again(tmp_path):
    write(tmp_path, range(1, 11), tensorboard=False)
    write(tmp_path, range(7, 13), resume=6, tensorboard=False)
    assert [(r["step"], r["train/loss"]) for r in lines(tmp_path)] == [(s, s / 2) for s in range(1, 13)]
    write(tmp_path, [1], resume=0, tensorboard=False)   # a fresh start in the same folder
    assert [r["step"] for r in lines(tmp_path)] == [1]


@pytest.mark.parametrize("torn", [b'{"step": 11, "train/lo', b'{"step": 11, "train/loss": 1.0}', b"\xff", b"{", b"12"])
def test_a_torn_last_line_is_mended(tmp_path, torn):
    write(tmp_path, range(1, 11), tensorboard=False)
    with open(tmp_path / "metrics.jsonl", "ab") as f:
        f.write(torn)
    whole = torn.endswith(b"}")
    assert [r["step"] for r in metrics.read(tmp_path / "metrics.jsonl")] == list(range(1, 12 if whole else 11))
    write(tmp_path, [11, 12], resume=10, tensorboard=False)
    assert [r["step"] for r in lines(tmp_path)] == list(range(1, 13))


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"ste\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl:2: not a line of metrics: '\{\"ste'"):
        metrics.Writer(tmp_path, 3, tensorboard=False)   # before it is entered and writes
    with pytest.raises(UserError, match="nothing.jsonl: no such file"):
        metrics.read(tmp_path / "nothing.jsonl")


def test_lines_are_strict_json_and_reach_the_disk_at_once(tmp_path):
    with metrics.Writer(tmp_path, tensorboard=False) as writer:
        writer.write(np.int32(3), {"a": jnp.float32(1.5), "b": math.nan, "c": np.float64(math.inf)})
        text = (tmp_path / "metrics.jsonl").read_text()   # before close

        def no_constants(name):
            raise AssertionError(name)

        row = json.loads(text, parse_constant=no_constants)
    assert {k: row[k] for k in ("step", "a", "b", "c")} == {"step": 3, "a": 1.5, "b": None, "c": None}
    assert row["time_s"] > 1.7e9


@pytest.mark.parametrize("room", range(0, 400, 23))
def test_a_full_disk_is_one_line_and_tears_nothing(tmp_path, room):
    """Wherever the disk fills up: in metrics.jsonl or the event file, at opening or writing, between or in records."""
    import resource

    write(tmp_path, range(1, 6))
    before = lines(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    written = 5
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.raises(UserError, match=r"(metrics\.jsonl|tfevents).*cannot be written \(File too large\)"):
            with metrics.Writer(tmp_path, 5) as writer:
                for step in range(6, 20):
                    writer.write(step, {"train/loss": step / 2})
                    written = step
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    rows = lines(tmp_path)
    assert rows[:5] == before and [r["step"] for r in rows[:written]] == list(range(1, written + 1))
    write(tmp_path, range(written + 1, 21), resume=written)   # goes on once there is room
    assert [r["step"] for r in lines(tmp_path)] == list(range(1, 21))
    assert {step for step, _ in events(tmp_path)[0]} == set(range(1, 21))


def events(folder):
    """Returns ({(step, name): value}, [step of each start]) of the event files; checks every record's checksums."""
    from tensorboardX import record_writer
    from tensorboardX.proto import event_pb2

    found, starts = {}, []
    for path in sorted((folder / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:   # a record: length (8), CRC (4), payload, CRC (4)
            n = int.from_bytes(data[:8], "little")
            assert len(data) >= 16 + n
            assert record_writer.masked_crc32c(data[:8]) == int.from_bytes(data[8:12], "little")
            assert record_writer.masked_crc32c(data[12:12 + n]) == int.from_bytes(data[12 + n:16 + n], "little")
            event = event_pb2.Event.FromString(data[12:12 + n])
            assert event.wall_time > 1.7e9
            found |= {(event.step, v.tag): v.simple_value for v in event.summary.value}
            starts += [event.step] * (event.session_log.status == event_pb2.SessionLog.START)
            data = data[16 + n:]
    return found, starts


def test_tensorboard_files_hold_every_value(tmp_path):
    write(tmp_path, range(1, 6))
    write(tmp_path, [5], resume=4)
    with metrics.Writer(tmp_path, 5) as writer:
        writer.write(6, {"a": 1.5, "b": math.nan})
        found, starts = events(tmp_path)   # before close
    assert {k: v for k, v in found.items() if k[0] < 6} == {(s, "train/loss"): s / 2 for s in range(1, 6)}
    assert found[6, "a"] == 1.5 and math.isnan(found[6, "b"])
    assert 5 in starts   # TensorBoard hides what an earlier file has from step 5 on


# --- Speed


class Now:
    """A clock that the test sets."""

    def __init__(self):
        self.t = 100.0

    def __call__(self):
        return self.t


def test_rate_counts_training_only():
    now = Now()
    clock = metrics.Clock(now)
    assert clock.rate() is None and clock.remaining_s(0, 10) is None
    now.t += 60   # compilation and the first step
    clock.tick(1, 1000)
    assert clock.rate() is None
    for step in range(2, 7):
        now.t += 2
        clock.tick(step, 1000)
        if step == 4:
            with clock.pause():
                now.t += 30   # validation
    assert clock.rate() == pytest.approx(500)
    assert clock.remaining_s(6, 16) == pytest.approx(10 * (5 * 2 + 30) / 5)   # validations will come again


def test_rate_follows_a_slow_down_within_its_window():
    now = Now()
    clock = metrics.Clock(now)
    for step in range(200):
        now.t += 1 if step < 150 else 4
        clock.tick(step, 100)
    assert clock.rate() == pytest.approx(25)


def test_mfu_is_the_share_of_the_peak():
    # PaLM 540B, table 3 of arXiv:2204.02311: 46.2% MFU at 238.3K tokens/s on 6,144 TPU v4, by 6N + 12 L H Q T
    # FLOPs per token with L=118, H=48, Q=256, T=2048.
    flops = 6 * 540.35e9 + 12 * 118 * 48 * 256 * 2048
    peak = metrics.PEAK_FLOPS["TPU v4"]
    assert metrics.mfu(238.3e3, flops, 6144, peak) == pytest.approx(0.462, abs=0.002)
    assert metrics.mfu(1e5, flops, 1, None) is None


@pytest.mark.parametrize("kind, version", [("TPU v4", "TPU_V4"), ("TPU v5e", "TPU_V5E"), ("TPU v5p", "TPU_V5P"),
                                           ("TPU v6e", "TPU_V6E"), ("TPU7x", "TPU_7X")])
def test_tpu_figures_agree_with_jax(kind, version):
    from jax.experimental.pallas import tpu

    theirs = tpu.get_tpu_info_for_chip(tpu.ChipVersion[version], 1)   # of one core
    version = theirs.chip_version
    cores = 1 if kind == "TPU7x" else version.num_physical_tensor_cores_per_chip   # a device has
    # Rounded differently (918 or 920 TFLOP/s).
    assert metrics.PEAK_FLOPS[kind] == pytest.approx(theirs.bf16_ops_per_second * cores, rel=0.01)


def test_a_cpu_has_no_peak():
    assert metrics.peak_flops(jax.devices("cpu")[0]) is None


def test_flops_per_token_count_the_matmuls_of_the_step():
    """The stated convention against the jaxpr of the real loss: its matmuls, with the causal half taken off.

    Backward is twice forward for each matmul; the jaxpr of the reference attention computes the full square.
    """
    model = pytest.importorskip("fm_jax.objectives.causal_lm", reason="the objective is not written yet")
    from fm_jax import config as config_lib

    T = 16
    arch = dict(vocab_size=96, num_layers=3, embed_dim=32, num_heads=4, num_kv_heads=2, mlp_dim=48, max_seq_len=T,
                attention_kernel="reference", loss_chunk_tokens=T)
    config = config_lib.override(config_lib.defaults(), {"seq_len": T, **{f"model.{k}": v for k, v in arch.items()}})
    objective = model.CausalLM(config)
    params = jax.eval_shape(lambda: jax.tree.map(
        lambda b: b.unbox(), objective.init(jax.random.key(0)), is_leaf=lambda b: hasattr(b, "unbox")))
    batch = objective.batch_spec(1)
    jaxpr = jax.make_jaxpr(lambda p, b: objective.loss(p, b).loss)(params, batch)
    forward = matmul_flops(jaxpr.jaxpr)
    a = Architecture(**arch)
    square = 4 * a.num_layers * a.num_heads * a.head_dim * T * T
    seen = 4 * a.num_layers * a.num_heads * a.head_dim * (T * (T + 1) / 2)
    assert 3 * (forward - square + seen) == pytest.approx(a.flops_per_token(T) * T, rel=1e-9)


def matmul_flops(jaxpr):
    total = 0.0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contract, _), _ = eqn.params["dimension_numbers"]
            k = math.prod(eqn.invars[0].aval.shape[i] for i in contract)
            total += 2.0 * k * math.prod(eqn.outvars[0].aval.shape)
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        for value in eqn.params.values():
            for sub in value if isinstance(value, (tuple, list)) else (value,):
                sub = getattr(sub, "jaxpr", sub)
                if hasattr(sub, "eqns"):
                    total += times * matmul_flops(sub)
    return total


def test_profile_traces_only_the_steps_asked_for(tmp_path, monkeypatch):
    running, traced = [], []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: running.append(folder))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: running.pop())
    with metrics.profile(tmp_path, 3, 2) as at:
        for step in range(1, 8):
            at(step, jnp.ones(()))
            traced += [step] if running else []
    assert traced == [3, 4] and not running
    with metrics.profile(tmp_path, 5, 10) as at:   # a run that ends earlier
        for step in range(1, 8):
            at(step)
    assert not running
    with metrics.profile(tmp_path, 0, 0) as at:
        at(0)
        assert not running


def test_profile_writes_a_trace(tmp_path):
    with metrics.profile(tmp_path, 2, 1) as at:
        for step in range(1, 4):
            at(step, jnp.ones(2) + step)
    assert list(tmp_path.rglob("*.xplane.pb"))


# --- Terminal and plot


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_log_file_gets_whole_lines_every_few_steps():
    out = io.StringIO()
    progress = metrics.Progress(25, every=10, out=out)
    for step in range(1, 26):
        progress.show(step, loss=2.5, tokens_per_s=51234.0, mfu=None if step < 20 else 0.4, remaining_s=125.0)
    progress.note("saved")
    progress.close()
    assert out.getvalue().splitlines() == [
        "step 10/25 | loss 2.5000 | 51.2k tokens/s | 2:05 left",
        "step 20/25 | loss 2.5000 | 51.2k tokens/s | MFU 40.0% | 2:05 left",
        "step 25/25 | loss 2.5000 | 51.2k tokens/s | MFU 40.0%", "saved"]
    metrics.Progress(1, out=out).show(1, loss=None)   # a batch without a scored token
    assert out.getvalue().splitlines()[-1] == "step 1/1"


@pytest.mark.parametrize("columns", [20, 60, 80, 200])
def test_a_terminal_gets_one_line_redrawn(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    out = Terminal()
    progress = metrics.Progress(1000, every=10, out=out)
    for step in range(1, 1001):
        progress.show(step, loss=2.5, tokens_per_s=51234.0, remaining_s=125.0)
    drawn = out.getvalue().split("\r\x1b[K")[1:]
    assert len(drawn) < 10, "redrawn more often than ten times a second"
    progress.close()
    assert out.getvalue().count("\n") == 1 and drawn[-1].startswith("step 1000/1000 100%")
    if columns >= 60:
        assert all(len(line.rstrip("\n")) < columns for line in drawn)


@pytest.mark.parametrize("value, text", [(0.5, "0.5"), (999.4, "999"), (999.9, "1k"), (51234, "51.2k"), (1e6, "1M"),
                                         (1234567, "1.23M"), (9.99e13, "99.9T"), (1.5e18, "1.5E")])
def test_quantities(value, text):
    assert metrics.quantity(value) == text


@pytest.mark.parametrize("seconds, text", [(0.4, "0:00"), (65, "1:05"), (3599.7, "1:00:00"), (3725, "1:02:05")])
def test_times(seconds, text):
    assert metrics.clock_time(seconds) == text


def test_plot_draws_train_validation_and_baselines(tmp_path):
    with metrics.Writer(tmp_path, tensorboard=False) as writer:
        for step in range(1, 51):
            writer.write(step, {"train/bits_per_byte": 2 + 6 / step, "train/grad_norm": 1.0})
            if step % 10 == 0:
                writer.write(step, {"validation/bits_per_byte": math.nan if step == 20 else 2.1 + 6 / step})
    path = tmp_path / "metrics.jsonl"
    plain, lined = tmp_path / "plain.png", tmp_path / "lined.png"
    metrics.plot(path, plain, metric="bits_per_byte")
    metrics.plot(path, lined, metric="bits_per_byte", baselines={"gzip -9": 3.1})
    image = pytest.importorskip("matplotlib.image")
    a, b = image.imread(plain), image.imread(lined)
    assert a.shape == b.shape == (600, 960, 4) and 0.01 < np.mean(a[..., :3].min(-1) < 0.9) < 0.3   # some ink
    assert (a != b).any(-1).mean(axis=1).max() > 0.3   # a line of dashes, all across
    with pytest.raises(UserError, match="no train/loss or validation/loss"):
        metrics.plot(path, plain)


def test_smoothing_is_a_centred_mean():
    y = np.random.default_rng(0).normal(size=137)
    half = 137 // 50
    naive = [np.mean(y[max(0, i - half):i + half + 1]) for i in range(137)]
    np.testing.assert_allclose(metrics._smooth(y), naive, rtol=1e-9)   # float64 sums of 5 numbers
    np.testing.assert_array_equal(metrics._smooth(y[:3]), y[:3])


def test_importing_metrics_draws_in_no_plotting_library():
    code = "import sys, fm_jax.metrics; print([m for m in ('matplotlib', 'tensorboardX') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"

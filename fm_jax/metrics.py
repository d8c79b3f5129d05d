"""Sums to means, and where they go: JSON lines, TensorBoard, the terminal, a plot; speed and MFU. Layer 2.

A step gives sums on the device, a pair (sum, weight) for what is a mean and a single number for what
is a count. They stay sums over microbatches, steps and hosts, and become means when written, so that
a mean over unequal parts is exact.

Speed is timed by the arrival of each step's values on the host: they exist only when the device has
finished the step, so the clock waits for the device and the device never waits for the host.

Try:  python -c "from fm_jax import metrics; metrics.plot('runs/x/metrics.jsonl', 'loss.png')"
"""

import collections
import contextlib
import dataclasses
import json
import math
import os
import pathlib
import shutil
import sys
import time

import jax
import numpy as np

from fm_jax.errors import UserError


# --- Sums and means


class Late:
    """Hands out each step's values one step late: the device works on the next step while the host reads."""

    def __init__(self):
        self._held = None

    def push(self, step: int, values):
        """Returns (step, values) of the push before, as NumPy on the host; None at the first.

        Starts the transfer of `values`, a tree of arrays on the device, and keeps them.
        """
        for x in jax.tree.leaves(values):
            x.copy_to_host_async()
        late = self.flush()
        self._held = step, values
        return late

    def flush(self):
        """Returns what the next `push` would, and holds nothing then. Waits for the device."""
        held, self._held = self._held, None
        return held and (held[0], jax.device_get(held[1]))


class Sums:
    """Adds up metrics on the host, in float64, and turns them into means."""

    def __init__(self):
        self._sums = {}

    def add(self, values: dict) -> None:
        """Returns nothing; adds {name: (sum, weight)} and {name: number}."""
        for name, value in values.items():
            value = np.asarray(value, np.float64)
            self._sums[name] = self._sums.get(name, 0.0) + value

    def take(self, prefix: str = "") -> dict[str, float]:
        """Returns {prefix + name: mean, or sum for a single number}, and starts anew.

        Where there is `nll`, the mean negative log-likelihood of a token, `perplexity` = exp(nll) is added.
        A mean of weight 0 is nan.
        """
        means = {}
        for name, value in self._sums.items():
            pair = value.shape == (2,)
            means[prefix + name] = float(value) if not pair else float(value[0] / value[1]) if value[1] else math.nan
        if prefix + "nll" in means:
            nll = means[prefix + "nll"]
            means[prefix + "perplexity"] = math.exp(nll) if nll < 700 else math.inf
        self._sums = {}
        return means


# --- Where they are written


def read(path) -> list[dict]:
    """Returns the lines of a metrics.jsonl, each {"step": ..., "time_s": ..., name: number or None}.

    A torn last line, of a run that was killed, is left out.

    Raises:
      UserError: no such file, or a line that is broken elsewhere (file and line number).
    """
    try:
        lines = pathlib.Path(path).read_bytes().split(b"\n")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; is this a run folder?") from None
    rows = []
    for i, line in enumerate(lines):
        try:
            if line:
                rows.append(json.loads(line))
                rows[-1]["step"]
        except (ValueError, TypeError, KeyError):
            if i == len(lines) - 1:   # what follows the last line end
                return [r for r in rows if isinstance(r, dict) and "step" in r]
            raise UserError(f"{path}:{i + 1}: not a line of metrics: {line[:60].decode(errors='replace')!r}") from None
    return rows


class Writer:
    """Writes a run's metrics to `metrics.jsonl` and `tensorboard/` of its folder. Only process 0 writes.

    The file is one history: opened at step s, lines of later steps (of a run that was killed after its last
    checkpoint) are dropped, so that each step is there once.

    Attributes:
      start: {name: value} of the metrics that the file had of the step it was opened at.
    """

    def __init__(self, folder, step: int = 0, *, tensorboard: bool = True):
        """`step`: the run goes on from here; 0 for a new one."""
        self._file = self._board = None
        path = pathlib.Path(folder) / "metrics.jsonl"
        kept = [row for row in read(path) if row["step"] <= step and step > 0] if path.exists() else []
        self.start = {k: v for row in kept if row["step"] == step for k, v in row.items() if "/" in k}
        if jax.process_index() != 0:
            return
        new = path.with_name(path.name + ".new")
        with open(new, "w", encoding="utf-8") as f:
            f.writelines(json.dumps(row) + "\n" for row in kept)
            f.flush()
            os.fsync(f.fileno())
        os.replace(new, path)
        self._file = open(path, "ab", buffering=0)   # a kill loses no line that was written
        if tensorboard:
            import tensorboardX   # protobuf: 0.2 s that evaluation and tests need not pay

            # purge_step hides what an earlier start has written from that step on. The suffix: files are named by
            # the second, and a second start within it would overwrite the first's.
            self._board = tensorboardX.SummaryWriter(str(pathlib.Path(folder) / "tensorboard"), purge_step=step + 1,
                                                     filename_suffix=f".from{step + 1}")

    def write(self, step: int, values: dict[str, float]) -> None:
        """Returns nothing; appends one line. Numbers that are not finite become null: JSON has none.

        Raises:
          UserError: the disk is full.
        """
        if self._file is None:
            return
        values = {k: float(v) for k, v in values.items()}
        finite = {k: v if math.isfinite(v) else None for k, v in values.items()}
        line = json.dumps({"step": int(step), "time_s": round(time.time(), 3), **finite}) + "\n"
        try:
            self._file.write(line.encode())
        except OSError as e:
            raise UserError(f"{self._file.name}: step {step} cannot be written ({e.strerror})") from None
        if self._board:
            for name, value in values.items():
                self._board.add_scalar(name, value, int(step))

    def close(self) -> None:
        if self._file:
            self._file.close()
        if self._board:
            self._board.close()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()


class Progress:
    """Shows how far a run is: a bar on a terminal, redrawn in place, or a line every `every` steps elsewhere.

    Not tqdm: a log file must get whole lines, and the line shows more than a count and a rate.
    """

    def __init__(self, total_steps: int, *, every: int = 10, bar: bool = True, out=None):
        self._total, self._every = total_steps, every
        self._out = sys.stdout if out is None else out
        self._silent = jax.process_index() != 0
        self._bar = bar and self._out.isatty()
        self._drawn_s = 0.0
        self._open = False   # the line of the bar has no end yet

    def show(self, step: int, *, loss: float, tokens_per_s: float | None = None, mfu: float | None = None,
             remaining_s: float | None = None) -> None:
        """Returns nothing; shows the state after `step`. What is None is left out."""
        last = step >= self._total
        due = time.monotonic() - self._drawn_s > 0.1 if self._bar else step % self._every == 0
        if self._silent or not (due or last):
            return
        frac = min(1.0, step / max(1, self._total))
        parts = [f"loss {loss:.4f}"]
        parts += [f"{quantity(tokens_per_s)} tokens/s"] if tokens_per_s is not None else []
        parts += [f"MFU {100 * mfu:.1f}%"] if mfu is not None else []
        parts += [f"{clock_time(remaining_s)} left"] if remaining_s is not None and not last else []
        head = f"step {step}/{self._total}"
        if not self._bar:
            print(" | ".join([head, *parts]), file=self._out, flush=True)
            return
        self._drawn_s = time.monotonic()
        text = " | ".join(parts)
        room = shutil.get_terminal_size().columns - len(head) - len(text) - 12
        filled = round(frac * min(30, room))
        drawn = "#" * filled + "-" * (min(30, room) - filled) + " " if room >= 5 else ""
        self._open = not last
        self._out.write(f"\r\x1b[K{head} {100 * frac:3.0f}% {drawn}{text}" + ("\n" if last else ""))
        self._out.flush()

    def note(self, text: str) -> None:
        """Returns nothing; prints a line of its own, above the bar."""
        if not self._silent:
            print(("\r\x1b[K" if self._open else "") + text, file=self._out, flush=True)

    def close(self) -> None:
        """Returns nothing; leaves the bar as it stands, and goes to the next line."""
        if self._open:
            print(file=self._out, flush=True)
        self._open = False


def quantity(x: float) -> str:
    """Returns 1234567 as "1.23M": three digits and a unit, k M G T P E Z Y."""
    for power, unit in reversed(list(enumerate("kMGTPEZY", start=1))):
        if x >= 0.9995 * 1000.0**power:   # 999.9 is 1k, not 1e+03
            return f"{x / 1000.0**power:.3g}{unit}"
    return f"{x:.3g}"


def clock_time(seconds: float) -> str:
    """Returns 3725 as "1:02:05", 65 as "1:05"."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


# --- Speed


class Clock:
    """Times training: tokens/s without the first step (compilation), validation and saving.

    Call `tick` when a step's values have arrived; wrap all that is not training in `pause`.
    """

    WINDOW = 50   # steps that `rate` looks back on: smooth, and yet shows a slow-down

    def __init__(self, now=time.perf_counter):
        self._now = now
        self._mark = None                  # end of the step before
        self._steps = collections.deque(maxlen=self.WINDOW)   # (seconds, tokens)
        self._begin = None                 # (time, step) after the first step: for the remaining time
        self.train_s = 0.0                 # of the counted steps
        self.tokens = 0

    def tick(self, step: int, tokens: int, value=None) -> None:
        """Returns nothing; counts the end of `step`, which trained on `tokens`. Waits for `value` on the device."""
        if value is not None:
            jax.block_until_ready(value)
        now = self._now()
        if self._begin is None:
            self._begin = now, step
        else:
            self._steps.append((now - self._mark, tokens))
            self.train_s += now - self._mark
            self.tokens += tokens
        self._mark = now

    @contextlib.contextmanager
    def pause(self):
        """Leaves out the time of the block. Call it with no step under way: after `Late.flush` and its `tick`."""
        begin = self._now()
        yield
        if self._mark is not None:
            self._mark += self._now() - begin

    def rate(self) -> float | None:
        """Returns tokens per second over the last steps; None before the second step."""
        seconds = sum(s for s, _ in self._steps)
        return sum(t for _, t in self._steps) / seconds if seconds else None

    def remaining_s(self, step: int, total_steps: int) -> float | None:
        """Returns the seconds that the run will last after `step`, at its pace so far, pauses included."""
        if self._begin is None or step <= self._begin[1]:
            return None
        return (total_steps - step) * (self._now() - self._begin[0]) / (step - self._begin[1])


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one JAX device can do."""

    bf16_flops: float       # per second, dense
    hbm_bytes_per_s: float
    hbm_bytes: float


# By `device_kind`. TPU: the pages of cloud.google.com/tpu/docs (v4, v5e, v5p, v6e, tpu7x), per chip; a TPU7x chip is
# two devices, so half each. GPU: NVIDIA's data sheets, dense (half of the figures "with sparsity").
CHIPS = {
    "TPU v4": Chip(275e12, 1.2e12, 32 * 2**30),
    "TPU v5 lite": Chip(197e12, 0.82e12, 16 * 2**30),
    "TPU v5e": Chip(197e12, 0.82e12, 16 * 2**30),
    "TPU v5": Chip(459e12, 2.765e12, 95 * 2**30),
    "TPU v5p": Chip(459e12, 2.765e12, 95 * 2**30),
    "TPU v6 lite": Chip(918e12, 1.64e12, 32 * 2**30),
    "TPU v6e": Chip(918e12, 1.64e12, 32 * 2**30),
    "TPU7x": Chip(2307e12 / 2, 7.38e12 / 2, 96 * 2**30),
    "NVIDIA A100-SXM4-40GB": Chip(312e12, 1.555e12, 40e9),
    "NVIDIA A100-PCIE-40GB": Chip(312e12, 1.555e12, 40e9),
    "NVIDIA A100-SXM4-80GB": Chip(312e12, 2.039e12, 80e9),
    "NVIDIA A100 80GB PCIe": Chip(312e12, 1.935e12, 80e9),
    "NVIDIA H100 80GB HBM3": Chip(989.4e12, 3.35e12, 80e9),    # SXM
    "NVIDIA H100 PCIe": Chip(756e12, 2.0e12, 80e9),
    "NVIDIA H100 NVL": Chip(835e12, 3.9e12, 94e9),
    "NVIDIA H200": Chip(989.4e12, 4.8e12, 141e9),              # SXM
    "NVIDIA H200 NVL": Chip(835e12, 4.8e12, 141e9),
    "NVIDIA GH200 480GB": Chip(989.4e12, 4.0e12, 96e9),
    "NVIDIA B200": Chip(2250e12, 7.7e12, 180e9),
    "NVIDIA GB200": Chip(2500e12, 8.0e12, 186e9),
    "NVIDIA L4": Chip(121e12, 0.3e12, 24e9),
    "NVIDIA L40S": Chip(362e12, 0.864e12, 48e9),
    "NVIDIA A10G": Chip(70e12, 0.6e12, 24e9),
}


def chip(device) -> Chip | None:
    """Returns the figures of a JAX device; None where its kind is not in the table, such as a CPU."""
    return CHIPS.get(device.device_kind)


def peak_flops(device) -> float | None:
    """Returns the peak bfloat16 FLOP/s of a JAX device; None where unknown, such as a CPU."""
    known = chip(device)
    return known and known.bf16_flops


def mfu(tokens_per_s: float, flops_per_token: float, num_devices: int, peak: float | None) -> float | None:
    """Returns the share of the devices' peak that training makes use of; None where the peak is unknown.

    `flops_per_token`: of `Architecture.flops_per_token`, which states what counts (no recomputation).
    Source: model FLOPs utilization, arXiv:2204.02311, appendix B.
    """
    return tokens_per_s * flops_per_token / (num_devices * peak) if peak else None


@contextlib.contextmanager
def profile(folder, first: int, count: int):
    """Yields `at(step, value=None)`, to be called before each step; steps first .. first+count-1 are traced.

    The trace (XProf, TensorBoard's profile plugin) goes to `folder`. `value`: an output of the step
    before, waited for, so that the trace starts and ends between steps. `count` 0: none.
    """
    running = False

    def at(step, value=None):
        nonlocal running
        if running and step >= first + count:
            jax.block_until_ready(value)
            jax.profiler.stop_trace()
            running = False
        elif not running and first <= step < first + count:
            jax.block_until_ready(value)
            jax.profiler.start_trace(str(folder))
            running = True

    try:
        yield at
    finally:
        if running:
            jax.profiler.stop_trace()


# --- The plot


def plot(metrics_jsonl, png, *, metric: str = "loss", baselines: dict[str, float] | None = None, title="") -> None:
    """Returns nothing; draws `train/METRIC` and `validation/METRIC` over the steps into a PNG.

    `baselines`: {name: value}, horizontal lines.

    Raises:
      UserError: the file has neither of the two.
    """
    from matplotlib import figure   # figure, not pyplot: no global state, no display

    rows = read(metrics_jsonl)
    curves = {}
    for part in ("train", "validation"):
        points = [(r["step"], r[f"{part}/{metric}"]) for r in rows if r.get(f"{part}/{metric}") is not None]
        curves |= {part: np.array(points)} if points else {}
    if not curves:
        raise UserError(f"{metrics_jsonl}: has no train/{metric} or validation/{metric}")
    fig = figure.Figure(figsize=(8, 5), dpi=120, layout="constrained")
    ax = fig.add_subplot()
    right = max(xy[-1, 0] for xy in curves.values())
    if "train" in curves:
        x, y = curves["train"].T
        ax.plot(x, y, color="#9ecae1", linewidth=1)
        ax.plot(x, _smooth(y), color="#2171b5", linewidth=1.8, label=f"train, smoothed ({_smooth(y)[-1]:.3f})")
    if "validation" in curves:
        x, y = curves["validation"].T
        ax.plot(x, y, "o-", color="#d94801", linewidth=1.8, markersize=4, label=f"validation ({y[-1]:.3f})")
    for name, value in (baselines or {}).items():
        ax.axhline(value, color="#636363", linewidth=1, linestyle="--")
        ax.annotate(f"{name} {value:.3f}", (right, value), ha="right", va="bottom", fontsize=9, color="#636363")
    # The first steps' loss would flatten all that follows: the axis starts where the curve has left it.
    shown = [v for xy in curves.values() for v in xy[len(xy) // 20:, 1]] + list((baselines or {}).values())
    low, high = min(shown), max(shown)
    ax.set_ylim(low - 0.05 * (high - low) - 1e-9, high + 0.05 * (high - low) + 1e-9)
    ax.set_xlabel("step")
    ax.set_ylabel(metric.replace("_", " "))
    ax.set_title(title)
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False)
    fig.savefig(png)


def _smooth(y):
    """Returns the mean of `y` over a centred window of 4% of its points; at the ends, of the part that exists."""
    window = np.ones(min(len(y), 2 * (len(y) // 50) + 1))
    return np.convolve(y, window, "same") / np.convolve(np.ones(len(y)), window, "same")

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
import itertools
import json
import math
import os
import pathlib
import re
import shutil
import socket
import struct
import sys
import time

import jax
import numpy as np

from fm_jax.distributed import Output
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
    checkpoint) are dropped, so that each step is there once. Made, it has only read the file; entered, it writes.

    Both files grow by whole records, written before `write` returns. tensorboardX's own writer is a thread behind a
    queue: on a full disk the thread dies, the queue fills, and the run hangs.

    Attributes:
      start: {name: value} of the metrics that the file had of the step it was opened at.
    """

    def __init__(self, folder, step: int = 0, *, tensorboard: bool = True):
        """`step`: the run goes on from here; 0 for a new one. Raises UserError where the file is broken."""
        self._folder, self._step, self._tensorboard = pathlib.Path(folder), step, tensorboard
        self._path = self._folder / "metrics.jsonl"
        rows = read(self._path) if step > 0 and self._path.exists() else []
        self._kept = [row for row in rows if row["step"] <= step]
        self.start = {k: v for row in self._kept if row["step"] == step for k, v in row.items() if "/" in k}
        self._file = self._board = None

    def __enter__(self):
        """Raises UserError where the folder cannot be written."""
        if jax.process_index() != 0:
            return self
        new = self._path.with_name(self._path.name + ".new")
        try:
            with open(new, "w", encoding="utf-8") as f:
                f.writelines(json.dumps(row) + "\n" for row in self._kept)
                f.flush()
                os.fsync(f.fileno())
            os.replace(new, self._path)
            self._file = open(self._path, "ab", buffering=0)   # a kill loses no line that was written
            if self._tensorboard:
                self._board = _open_board(self._folder / "tensorboard", self._step + 1)
        except OSError as e:
            raise UserError(f"{e.filename or new}: cannot be written ({e.strerror})") from None
        return self

    def write(self, step: int, values: dict[str, float]) -> None:
        """Returns nothing; appends one line. Numbers that are not finite become null: JSON has none.

        Raises:
          UserError: the disk is full. The files then end with the record before.
        """
        if self._file is None:
            return
        step, values = int(step), {k: float(v) for k, v in values.items()}
        finite = {k: v if math.isfinite(v) else None for k, v in values.items()}
        line = json.dumps({"step": step, "time_s": round(time.time(), 3), **finite}) + "\n"
        try:
            _append(self._file, line.encode())
            if self._board:
                _append(self._board, _event(step=step, summary={
                    "value": [{"tag": name, "simple_value": value} for name, value in values.items()]}))
        except OSError as e:
            raise UserError(f"{e.filename}: step {step} cannot be written ({e.strerror})") from None

    def __exit__(self, *exception):
        for file in filter(None, (self._file, self._board)):
            file.close()


def _append(file, record):
    """Writes all of `record` to an unbuffered file or, where the disk is full, nothing of it: then raises OSError."""
    begin, left = file.seek(0, os.SEEK_END), memoryview(record)
    try:
        while left:   # a disk that fills up takes a part, and says why at the next try
            left = left[file.write(left):]
    except OSError as e:
        file.truncate(begin)
        raise OSError(e.errno, e.strerror, file.name) from None


def _open_board(folder, first_step):
    """Returns a new event file; TensorBoard then hides what older ones have from `first_step` on."""
    folder.mkdir(exist_ok=True)
    # Appending: names count seconds, and two starts within one must not overwrite each other.
    name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.from{first_step}"
    file = open(folder / name, "ab", buffering=0)
    _append(file, _event(file_version="brain.Event:2") + _event(step=first_step, session_log={"status": "START"}))
    return file


def _event(**fields):
    """Returns one record of an event file: length, its checksum, a tensorboard.Event, its checksum."""
    from tensorboardX import record_writer   # protobuf: 0.2 s that evaluation and tests need not pay
    from tensorboardX.proto import event_pb2

    data = event_pb2.Event(wall_time=time.time(), **fields).SerializeToString()
    length, crc = struct.pack("<Q", len(data)), record_writer.masked_crc32c
    return length + struct.pack("<I", crc(length)) + data + struct.pack("<I", crc(data))


class Progress:
    """Shows how far a run is: a bar on a terminal, redrawn in place, or a line every `every` steps elsewhere.

    Not tqdm: a log file must get whole lines, and the line shows more than a count and a rate.
    """

    def __init__(self, total_steps: int, *, every: int = 10, bar: bool = True, out=None):
        self._total, self._every = total_steps, every
        self._out = sys.stdout if out is None else out
        # What another process prints is for its log, where it has one.
        self._silent = jax.process_index() != 0 and not isinstance(self._out, Output)
        self._bar = bar and self._out.isatty()
        self._drawn_s = 0.0
        self._open = False   # the line of the bar has no end yet

    def show(self, step: int, *, loss: float | None, tokens_per_s: float | None = None, mfu: float | None = None,
             remaining_s: float | None = None) -> None:
        """Returns nothing; shows the state after `step`. What is None is left out."""
        last = step >= self._total
        due = time.monotonic() - self._drawn_s > 0.1 if self._bar else step % self._every == 0
        if self._silent or not (due or last):
            return
        frac = min(1.0, step / max(1, self._total))
        parts = [f"loss {loss:.4f}"] if loss is not None else []
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

    def tick(self, step: int, tokens: int) -> None:
        """Returns nothing; counts the end of `step`, which trained on `tokens`."""
        now = self._now()
        if self._begin is None:
            self._begin = now, step
        else:
            self._steps.append((now - self._mark, tokens))
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


# Dense bfloat16 FLOP/s by `device_kind`. TPU: the pages of cloud.google.com/tpu/docs (v4, v5e, v5p, v6e, tpu7x), per
# chip; a TPU7x chip is two devices, so half each. GPU: NVIDIA's data sheets, half of the figures "with sparsity".
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 2307e12 / 2,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989.4e12,    # SXM
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200": 989.4e12,              # SXM
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA GH200 480GB": 989.4e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA GB200": 2500e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA A10G": 70e12,
}


def peak_flops(device) -> float | None:
    """Returns the peak bfloat16 FLOP/s of a JAX device; None where its kind is not in the table, such as a CPU."""
    return PEAK_FLOPS.get(device.device_kind)


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
    """Returns nothing; draws `train/METRIC` and `validation/METRIC`, or each `validation/NAME/METRIC`, into a PNG.

    `baselines`: {name: value}, horizontal lines.

    Raises:
      UserError: the file has neither of the two.
    """
    from matplotlib import figure   # figure, not pyplot: no global state, no display

    rows = read(metrics_jsonl)
    curves = {}
    held_out = {k.removesuffix(f"/{metric}") for r in rows for k in r if re.fullmatch(rf"validation/(\w+/)?{metric}", k)}
    for part in ("train", *sorted(held_out)):
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
    for part, color in zip(sorted(curves.keys() - {"train"}), itertools.cycle(("#d94801", "#238b45", "#756bb1"))):
        x, y = curves[part].T
        ax.plot(x, y, "o-", color=color, linewidth=1.8, markersize=4, label=f"{part.replace('/', ' ')} ({y[-1]:.3f})")
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

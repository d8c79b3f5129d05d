"""A run's folder and its checkpoints: each written whole or not at all, verified when read, on any mesh. Layer 2.

    RUN/config.json                        the resolved config
    RUN/tokenizer/                         its files
    RUN/run.json                           tokenizer and data fingerprints; versions of code and libraries at each start
    RUN/checkpoints/STEP/params/           Orbax items: so that inference never reads the optimizer's state
                        /ema/              (where the run keeps one)
                        /optimizer/        step and opt_state
                        /meta.json         step, metrics, versions; size and checksums of every file above

Orbax writes into `STEP.orbax-checkpoint-tmp`; `meta.json` comes last, still in there, and one rename
commits. So a folder named STEP is complete, a kill at any moment leaves only a folder that nobody
reads, and whatever changes a committed file later is found by `verify` and named. Arrays are stored
uncompressed: random floats do not compress, and trying costs more than half of the save.

All processes of a multi-host run call these functions together and see the same folder.
"""

from concurrent import futures
import datetime
import errno
import json
import logging
import os
import pathlib
import shutil
import subprocess
import sys
import zlib

from etils import epath
import flax
import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import orbax.checkpoint as ocp

import fm_jax
from fm_jax import config as config_lib
from fm_jax import tree
from fm_jax.errors import UserError, choose

FORMAT = 1                # of meta.json
# See `_checksum`. No two sectors of a piece share their columns, as 8191 is prime.
PIECE_SHAPE = 16, 8191               # of 64-bit words
BLOCK_BYTES = 16 * 8 * 16 * 8191     # 16 pieces have one checksum: threads share a large file, errors say where
# What may change between two starts of one run, of the sections that otherwise must not.
FIXED = ("objective", "objective_args", "model", "seed", "batch_size", "seq_len", "optimizer.name")
FREE = ("model.dtype", "model.remat", "model.scan_layers", "model.attention_kernel", "model.loss_chunk_tokens",
        "model.dropout")


# --- The run folder


def open_run(folder, config: ml_collections.ConfigDict, *, tokenizer=None, data: dict | None = None) -> None:
    """Returns nothing; checks that `folder` can hold the run of `config`, and writes what describes it.

    `tokenizer`: has `fingerprint` and `save(folder)`. `data`: {name: fingerprint}, JSON values.
    Where the folder holds checkpoints already, its config is replaced by `config`.

    Raises:
      UserError: the folder cannot be written, or holds checkpoints of a run with another model, objective,
        batch size, seed, optimizer, tokenizer or data. Nothing is written then.
    """
    folder = _local(folder)
    new = {"tokenizer": tokenizer and tokenizer.fingerprint, "data": data}
    try:
        run = json.loads((folder / "run.json").read_text()) if steps(folder) else {}
        if run:
            old, _ = config_lib.load(folder / "config.json")
            lines = _config_difference(old, config)
            lines += [f"{k}: {run[k]!r} -> {v!r}" for k, v in new.items()
                      if v is not None and k in run and _values(run[k]) != _values(v)]
            if lines:
                raise UserError(f"{folder} holds a run with other settings ({_first(lines)}): take another --workdir, "
                                f"with --config.checkpoint.continue_from={folder} to go on from that run's state")
        _sync("run folder checked")   # no process writes before all have looked
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            config_lib.save(config, folder / "config.json.new")
            os.replace(folder / "config.json.new", folder / "config.json")
            if tokenizer is not None:
                tokenizer.save(folder / "tokenizer")
            run |= {k: v for k, v in new.items() if v is not None}
            run["starts"] = [*run.get("starts", []), _versions()]
            _write_json(folder / "run.json", run)
    except OSError as e:
        raise UserError(f"--workdir={folder}: cannot be used ({e.strerror or e}: {e.filename}); name a folder that can "
                        "be written") from None


def _local(folder):
    if "://" in str(folder):
        raise UserError(f"{folder}: only folders of a mounted file system work; mount the bucket, and name that path")
    return pathlib.Path(folder)


def _values(fingerprints):
    """Returns the fingerprints without their folders' names: data may move."""
    return list(fingerprints.values()) if isinstance(fingerprints, dict) else fingerprints


def _config_difference(old, new):
    fixed = lambda c: {k: v for k, v in _flatten(c.to_dict()).items()
                       if k not in FREE and any(k == f or k.startswith(f + ".") for f in FIXED)}
    old, new = fixed(old), fixed(new)
    show = lambda c, k: repr(c[k]) if k in c else "unset"
    return [f"{k}: {show(old, k)} -> {show(new, k)}" for k in sorted({*old, *new}) if show(old, k) != show(new, k)]


def _flatten(nested, prefix=""):
    flat = {}
    for key, value in nested.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _versions():
    return {"time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "fm_jax": fm_jax.__version__, "git_commit": _git_commit(), "python": sys.version.split()[0],
            "jax": jax.__version__, "flax": flax.__version__, "optax": optax.__version__, "orbax": ocp.__version__,
            "devices": f"{jax.device_count()} {jax.devices()[0].device_kind}", "processes": jax.process_count()}


def _git_commit():
    """Returns the commit of the checkout that fm_jax runs from, with "-dirty" where files differ; None elsewhere."""
    root = pathlib.Path(fm_jax.__file__).parent.parent
    if not (root / ".git").exists() or not shutil.which("git"):
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None


# --- Reading


def steps(folder) -> list[int]:
    """Returns the steps of the committed checkpoints of a run folder, ascending."""
    checkpoints = _local(folder) / "checkpoints"
    if not checkpoints.is_dir():
        return []
    return sorted(int(d.name) for d in checkpoints.iterdir() if d.name.isdecimal() and d.is_dir())


def verify(folder, step: int, items: tuple[str, ...] = ("params", "ema", "optimizer")) -> str:
    """Returns what is wrong with a checkpoint's files, naming one, or "" where all are as they were written.

    Reads every byte of `items`, about 7 GB/s a core from memory; several processes share the work and agree.

    Raises:
      UserError: the checkpoint is of a format of a newer fm_jax.
    """
    checkpoint = _local(folder) / "checkpoints" / str(step)
    meta, problem = _read_meta(checkpoint)
    if problem:
        return problem
    blocks = []
    for name, file in sorted(meta["files"].items()):
        if name.split("/")[0] not in items:
            continue
        path = checkpoint / name
        size = path.stat().st_size if path.is_file() else None
        if size is None:
            return f"{name} is missing"
        if size != file["bytes"]:
            return f"{name} has {size} bytes instead of {file['bytes']}"
        blocks += [(path, i, checksum) for i, checksum in enumerate(file["checksums"])]
    mine = range(jax.process_index(), len(blocks), jax.process_count())
    with _threads() as pool:
        found = pool.map(lambda b: _checksum(*blocks[b][:2]), mine)
        bad = [b for b, checksum in zip(mine, found) if checksum != blocks[b][2]]
    first = min(bad, default=len(blocks))
    if jax.process_count() > 1:
        first = int(np.min(multihost_utils.process_allgather(np.int32(first))))
    if first == len(blocks):
        return ""
    path, i, _ = blocks[first]
    return f"{path.relative_to(checkpoint)} changed since it was written, from byte {i * BLOCK_BYTES} on"


def restore(folder, step: int, abstract):
    """Returns the state at `step`: arrays of the shapes, dtypes and shardings of `abstract`.

    `abstract`: a state of `jax.ShapeDtypeStruct` with shardings, of any mesh. The files are not verified here.

    Raises:
      UserError: names, shapes or dtypes differ from the checkpoint's; the first ten are listed.
    """
    checkpoint = _local(folder) / "checkpoints" / str(step)
    wanted = _items(abstract)
    lines = tree.difference(_named(abstract), _stored(checkpoint, tuple(_all_items(checkpoint))))
    if lines:
        raise UserError(f"{checkpoint} is a checkpoint of another model or optimizer, as these differ: "
                        + "; ".join(lines))
    read = {name: _read_item(checkpoint / name, item) for name, item in wanted.items()}
    return abstract.replace(params=read["params"], ema=read.get("ema"), **read["optimizer"])


def restore_params(folder, step: int | None = None, abstract=None, *, ema: bool = False):
    """Returns the parameters of a run, without reading its optimizer's state.

    `step`: default newest. `abstract`: a nested dict of `jax.ShapeDtypeStruct`, with shardings or for
    one device; its dtypes win over the stored ones. Without it, all parameters come as NumPy arrays.
    `ema`: take the average of the parameters where the checkpoint has one.

    Raises:
      UserError: no checkpoint there, it is corrupt, or lacks a parameter of that shape.
    """
    folder = _local(folder)
    there = steps(folder)
    if not there:
        raise UserError(f"{folder}: no checkpoints here" + ("" if folder.is_dir() else " (no such folder)"))
    step = there[-1] if step is None else choose(step, there, f"checkpoints of {folder}")
    checkpoint = folder / "checkpoints" / str(step)
    item = "ema" if ema and (checkpoint / "ema").is_dir() else "params"
    problem = verify(folder, step, (item,))
    if problem:
        raise UserError(f"{checkpoint} is corrupt: {problem}; steps here: {', '.join(map(str, there))}")
    if abstract is None:
        return _read_item(checkpoint / item, None)
    found = _stored(checkpoint, (item,), prefix="")
    wanted = {n: jax.ShapeDtypeStruct(a.shape, found[n].dtype if n in found else a.dtype)
              for n, a in tree.flatten(abstract).items()}
    lines = tree.difference(wanted, {n: found[n] for n in wanted if n in found})
    if lines:
        raise UserError(f"{checkpoint} is a checkpoint of another model, as these parameters differ: "
                        + "; ".join(lines))
    return _read_item(checkpoint / item, abstract)


def start(folder, config: ml_collections.ConfigDict, abstract, init):
    """Returns (state, line): the state a run begins with, and where it came from, for the user.

    Whichever comes first:
      1. this run's newest checkpoint, if the folder has any: the run continues;
      2. the newest checkpoint of `config.checkpoint.continue_from`: its state and step continue here;
      3. `init()`, with the parameters that `init_pattern` matches from the newest of `init_from` (its
         average, if it keeps one), step 0;
      4. `init()`: all fresh.
    `abstract`: the state as `jax.ShapeDtypeStruct` with shardings; `init()`: a fresh state of these.

    Raises:
      UserError: the newest checkpoint is corrupt, unless `on_corrupt` is "previous"; then the newest good one
        serves, and a corrupt one of this run is renamed to STEP.corrupt. Or it is of another architecture.
    """
    folder, options = _local(folder), config.checkpoint
    choose(options.on_corrupt, ("stop", "previous"), "config.checkpoint.on_corrupt")
    if steps(folder):
        step, note = _newest_good(folder, options.on_corrupt, set_aside=True)
        return restore(folder, step, abstract), f"continuing {folder} from step {step}{note}"
    if options.continue_from:
        step, note = _newest_good(options.continue_from, options.on_corrupt)
        return (restore(options.continue_from, step, abstract),
                f"continuing from step {step} of {options.continue_from} (checkpoint.continue_from){note}")
    if options.init_from:
        step, note = _newest_good(options.init_from, options.on_corrupt)
        chosen = tree.flatten(tree.mask(abstract.params, [options.init_pattern], "config.checkpoint.init_pattern"))
        wanted = {n: a for n, a in tree.flatten(abstract.params).items() if chosen[n]}
        read = tree.flatten(restore_params(options.init_from, step, _nest(wanted), ema=True))
        state = init()
        state = state.replace(params=tree.map_named(lambda n, p: read.get(n, p), state.params))
        if state.ema is not None:   # copies: a donated buffer must not be in the state twice
            state = state.replace(ema=tree.map_named(lambda n, p: jnp.copy(read[n]) if n in read else p, state.ema))
        return state, (f"step 0 with {len(read)} of {len(chosen)} parameters from step {step} of {options.init_from} "
                       f"(checkpoint.init_from), the others fresh{note}")
    return init(), f"fresh start, seed {config.seed}"


def _newest_good(folder, on_corrupt, set_aside=False):
    """Returns (step, note on corrupt ones). Raises UserError where there is none, or the newest is corrupt."""
    folder = _local(folder)
    there, corrupt = steps(folder), []
    if not there:
        raise UserError(f"{folder}: no checkpoints here" + ("" if folder.is_dir() else " (no such folder)"))
    for step in reversed(there):
        problem = verify(folder, step)
        if not problem:
            break
        corrupt.append((step, problem))
    else:
        raise UserError(f"{folder}: every checkpoint is corrupt ({_first([f'{s}: {p}' for s, p in corrupt])})")
    if not corrupt:
        return step, ""
    what = "; ".join(f"{folder / 'checkpoints' / str(s)} is corrupt ({p})" for s, p in corrupt)
    if on_corrupt == "stop":
        raise UserError(f"{what}; the newest good one is step {step}: add --config.checkpoint.on_corrupt=previous "
                        "to use it")
    if set_aside:
        names = []
        for s, _ in corrupt:
            names.append(next(n for i in range(len(there) + 1000)
                              if not (folder / "checkpoints" / (n := f"{s}.corrupt{i or ''}")).exists()))
        _sync("corrupt checkpoints named")
        if jax.process_index() == 0:
            for (s, _), name in zip(corrupt, names):
                (folder / "checkpoints" / str(s)).rename(folder / "checkpoints" / name)
        _sync("corrupt checkpoints set aside")
        what += f", now {', '.join(names)}"
    return step, f"; {what}"


def _all_items(checkpoint):
    return [item for item in ("params", "ema", "optimizer") if (checkpoint / item).is_dir()]


def _items(state):
    """Returns {folder of the checkpoint: tree}."""
    items = {"params": state.params, "optimizer": {"step": state.step, "opt_state": state.opt_state}}
    return items if state.ema is None else items | {"ema": state.ema}


def _named(state):
    return tree.flatten({"step": state.step, "params": state.params, "opt_state": state.opt_state, "ema": state.ema})


def _stored(checkpoint, items, prefix=None):
    """Returns {dotted name in the state: metadata with shape and dtype} of what a checkpoint holds."""
    named = {}
    for item in items:
        stored = tree.flatten(_handler().metadata(epath.Path(checkpoint.absolute() / item)).tree)
        before = ("" if item == "optimizer" else item + ".") if prefix is None else prefix
        named |= {before + n: leaf for n, leaf in stored.items()}
    return named


def _read_item(path, abstract):
    """Returns one item's tree. `abstract`: what to read of it, and how; None: everything, as NumPy arrays."""
    path = path.absolute()   # Orbax takes no other
    with ocp.Checkpointer(_handler()) as reader:
        if abstract is None:
            stored = _handler().metadata(epath.Path(path)).tree
            how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), stored)
            return reader.restore(path, args=ocp.args.PyTreeRestore(restore_args=how))
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        placed = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding or device)
        abstract = jax.tree.map(placed, abstract)
        how = ocp.checkpoint_utils.construct_restore_args(abstract)
        return reader.restore(path, args=ocp.args.PyTreeRestore(abstract, how, partial_restore=True))


def _nest(flat):
    nested = {}
    for name, leaf in flat.items():
        *parents, last = name.split(".")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return nested


# --- Writing


class Checkpoints:
    """The writer of one run's checkpoints; one per run and process.

    Usage: `save(step, state, metrics)` as often as you like, `close()` at the end. Saving copies the
    arrays to the host and returns; a thread writes them. An error there is raised by the next call.
    """

    def __init__(self, folder, options: ml_collections.ConfigDict):
        """Removes what a killed run left half written. `options`: `config.checkpoint`."""
        self._run = _local(folder)
        self._folder = self._run / "checkpoints"
        self._options = options
        self._saving = None       # step being written
        self._checkpointer = None
        self._deleting = None     # future of the folders being deleted
        self._versions = _versions()
        self._deleter = futures.ThreadPoolExecutor(1, "delete_checkpoints")
        # Orbax logs the traceback of every thread of a failed save, which `wait` raises anyway.
        logging.getLogger("absl").addFilter(_raised_anyway)
        if jax.process_index() == 0:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._delete([d for d in self._folder.iterdir() if ".orbax-checkpoint-tmp" in d.name
                          or d.name.endswith(".deleted")])
        _sync("checkpoint folder made")

    def save(self, step: int, state, metrics: dict[str, float] | None = None) -> None:
        """Returns once `state` may be donated; the checkpoint of `step` is complete after `wait`.

        Waits for the save before it, if that is still being written. A step that is saved already is
        left alone. `metrics` are stored beside it; `best_metric` among them counts for `keep_best`.

        Raises:
          UserError: this save, or the one before, did not fit on the disk. Earlier checkpoints are intact.
        """
        self.wait()
        step = int(step)
        if step in steps(self._run):
            return
        self._check_space(step, state)
        self._saving = step
        items = _items(state)
        handler = _Handler(**{name: _handler() for name in items})
        handler.meta = {"step": step, "metrics": {k: float(v) for k, v in (metrics or {}).items()}, **self._versions}
        self._checkpointer = ocp.AsyncCheckpointer(handler)
        args = {name: ocp.args.PyTreeSave(item) for name, item in items.items()}
        try:
            self._checkpointer.save(self._folder.absolute() / str(step), args=_HandlerArgs(**args))
        except Exception as e:
            raise self._failed(e) from e
        if not self._options.asynchronous:
            self.wait()

    def wait(self) -> None:
        """Returns when the last save is complete and the checkpoints that are no longer kept are out of sight.

        Raises: as `save`.
        """
        if self._saving is None:
            return
        try:
            self._checkpointer.wait_until_finished()
        except Exception as e:
            raise self._failed(e) from e
        self._checkpointer.close()
        self._saving = None
        if jax.process_index() == 0:
            there = steps(self._run)
            kept = keep(there, self._options, self._best_metric if self._options.keep_best else None)
            self._delete([self._folder / str(s) for s in there if s not in kept])

    def close(self) -> None:
        """Returns when everything is written and deleted. Raises: as `save`."""
        try:
            self.wait()
        finally:
            self._deleter.shutdown(wait=True)
            logging.getLogger("absl").removeFilter(_raised_anyway)
        if self._deleting:
            self._deleting.result()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def _best_metric(self, step):
        meta, problem = _read_meta(self._folder / str(step))
        return float("inf") if problem else meta["metrics"].get(self._options.best_metric, float("inf"))

    def _check_space(self, step, state):
        shards = [s for x in jax.tree.leaves(state) for s in x.addressable_shards if s.replica_id == 0]
        need_gb = 1.01e-9 * sum(s.data.nbytes for s in shards) + 1e-3   # and what describes them
        free_gb = lambda: shutil.disk_usage(self._folder).free / 1e9
        if self._deleting and free_gb() < need_gb:
            self._deleting.result()
        free_gb = free_gb()
        if jax.process_count() > 1:   # one verdict for all, or the others would wait for ever
            all_gb = multihost_utils.process_allgather(np.float32([need_gb, free_gb]))
            need_gb, free_gb = all_gb[:, 0].sum(), all_gb[:, 1].min()
        if free_gb < need_gb:
            raise UserError(f"saving step {step} needs {need_gb:.3g} GB, but the disk of {self._folder} has "
                            f"{free_gb:.3g} GB free; earlier checkpoints are intact: {self._intact()}")

    def _intact(self):
        return ", ".join(map(str, steps(self._run))) or "none"

    def _failed(self, error):
        """Returns the exception that tells of `error`, after removing what was written of the step."""
        step, self._saving = self._saving, None
        if jax.process_index() == 0:
            for leftover in self._folder.glob(f"{step}.orbax-checkpoint-tmp*"):
                shutil.rmtree(leftover, ignore_errors=True)
        number = getattr(error, "errno", None)
        full = [n for n in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)
                if number == n or os.strerror(n) in str(error)]
        if full:
            return UserError(f"saving step {step} to {self._folder} failed: {os.strerror(full[0])}; earlier "
                             f"checkpoints are intact: {self._intact()}")
        return RuntimeError(f"saving step {step} to {self._folder} failed: {type(error).__name__}: {error}")

    def _delete(self, folders):
        """Hides folders at once, by one rename each, and deletes them in a thread."""
        if self._deleting and self._deleting.done():
            self._deleting.result()
        hidden = [f if f.name.endswith(".deleted") else f.rename(f.with_name(f.name + ".deleted")) for f in folders]
        if hidden:
            self._deleting = self._deleter.submit(lambda: [shutil.rmtree(f) for f in hidden])


def keep(there: list[int], options: ml_collections.ConfigDict, metric=None) -> set[int]:
    """Returns which of the steps `there` (ascending) stay: the last, the multiples and the best that `options` ask for.

    `metric(step)`: lowest is best; infinite and not-a-number never are.
    """
    kept = set(there[-options.keep_last:])
    if options.keep_every:
        kept |= {s for s in there if s % options.keep_every == 0}
    if options.keep_best and metric:
        ranked = sorted((m, s) for s in there if np.isfinite(m := metric(s)))
        kept |= {s for _, s in ranked[:options.keep_best]}
    return kept


def _handler():
    return ocp.PyTreeCheckpointHandler(use_compression=False)


class _Handler(ocp.CompositeCheckpointHandler):
    """Writes `meta.json` when all items are written and the commit has not happened. Process 0, writing thread."""

    def finalize(self, directory):
        super().finalize(directory)
        root = pathlib.Path(directory)
        files = sorted(p for p in root.rglob("*") if p.is_file() and p.parent != root)   # those above: Orbax's marks
        blocks = [(p, i) for p in files for i in range(-(-p.stat().st_size // BLOCK_BYTES))]
        checksums = {p: [] for p in files}
        with _threads() as pool:
            for (path, _), checksum in zip(blocks, pool.map(lambda b: _checksum(*b), blocks)):
                checksums[path].append(checksum)
        meta = self.meta | {"format": FORMAT, "files": {
            str(p.relative_to(root)): {"bytes": p.stat().st_size, "checksums": checksums[p]} for p in files}}
        _write_json(root / "meta.json", meta | {"crc32_of_the_above": _own_crc32(meta)})


@ocp.args.register_with_handler(_Handler, for_save=True, for_restore=True)
class _HandlerArgs(ocp.args.Composite):
    """Items for `_Handler`; Orbax finds the one by the other."""


def _read_meta(checkpoint):
    """Returns (contents of meta.json, ""), or (None, what is wrong with it)."""
    try:
        meta = json.loads((checkpoint / "meta.json").read_bytes())
        crc = meta.pop("crc32_of_the_above")
    except FileNotFoundError:
        return None, "meta.json is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        return None, "meta.json is no longer readable"
    if crc != _own_crc32(meta):
        return None, "meta.json changed since it was written"
    if meta["format"] > FORMAT:
        raise UserError(f"{checkpoint}: format {meta['format']}, of fm_jax {meta['fm_jax']}; this is fm_jax "
                        f"{fm_jax.__version__}, which reads {FORMAT}")
    return meta, ""


def _own_crc32(meta):
    return zlib.crc32(json.dumps(meta, sort_keys=True).encode())


def _write_json(path, value):
    """Writes durably, and whole or not at all."""
    new = path.with_name(path.name + ".new")
    with open(new, "w", encoding="utf-8") as f:
        json.dump(value, f, indent=1)
        f.write("\n")
        f.flush()
        os.fsync(f.fileno())
    os.replace(new, path)


def _checksum(path, block):
    """Returns an int that changes with the contents of one block of a file.

    The words of each piece are summed down its columns, and the CRC-32 of the sums is taken: 0.14 s per GB, where
    the CRC-32 of everything takes 0.36 s and made save + restore slower than torch.save (one core, EPYC,
    2026-11-21). What sums miss must cancel in every column: not a flipped or lost bit, nor a burst of them, nor
    sectors that are zeroed, stale or exchanged.
    """
    crc, left, piece = 0, BLOCK_BYTES, np.zeros(PIECE_SHAPE, np.uint64)
    buffer = memoryview(piece).cast("B")
    with open(path, "rb") as f:
        f.seek(block * BLOCK_BYTES)
        while left and (n := f.readinto(buffer[:min(left, len(buffer))])):
            buffer[n:] = bytes(len(buffer) - n)
            crc, left = zlib.crc32(piece.sum(axis=0), crc), left - n
    return crc


def _threads():
    return futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1))


def _first(lines, most=10):
    return "; ".join(lines[:most]) + (f"; and {len(lines) - most} more" if len(lines) > most else "")


def _sync(name):
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _raised_anyway(record):
    return not (record.levelno == logging.ERROR and record.exc_info and "orbax" in record.pathname)

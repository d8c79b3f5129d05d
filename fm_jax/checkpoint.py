"""A run's folder and its checkpoints: each written whole or not at all, verified when read, on any mesh. Layer 2.

    RUN/config.json                        the resolved config
    RUN/tokenizer/                         its files
    RUN/run.json                           tokenizer and data fingerprints; versions of code and libraries at each start
    RUN/lock                               empty; held by the process that trains here
    RUN/checkpoints/STEP/params/           Orbax items: so that inference never reads the optimizer's state
                        /ema/              (where the run keeps one)
                        /optimizer/        step and opt_state
                        /meta.json         step, metrics, versions; size and checksums of every file above

Orbax writes into `STEP.orbax-checkpoint-tmp`; `meta.json` comes last, still in there, and one rename
commits. So a folder named STEP is complete, a kill at any moment leaves only a folder that nobody
reads, and whatever changes a committed file later is found by `verify` and named. Arrays are stored
uncompressed: random floats do not compress, and trying costs more than half of the save.

All processes of a multi-host run call these functions together and see the same folder.

In a bucket (gs://, s3://; see `storage`) nothing can be renamed at once. There `meta.json` itself commits: a step
without it is a leftover, and a step loses it before anything else of it goes. There is no lock, and no limit of space
to look up. Everything else is as above; what it costs is that each process reads back what it wrote, for the checksums,
while training goes on. A mounted bucket is tried at the start like any folder, see `lock`.
"""

from concurrent import futures
import contextlib
import datetime
import errno
import fcntl
import io
import json
import logging
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import time
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
from orbax.checkpoint import future as ocp_future

import fm_jax
from fm_jax import config as config_lib
from fm_jax import distributed, storage
from fm_jax import tokenizer as tokenizers
from fm_jax import tree
from fm_jax.errors import UserError, choose

FORMAT = 1                # of meta.json
# See `_checksum`. No two sectors of a piece share their columns, as 8191 is prime.
PIECE_SHAPE = 16, 8191               # of 64-bit words
BLOCK_BYTES = 16 * 8 * 16 * 8191     # 16 pieces have one checksum: threads share a large file, errors say where
OBJECTS_AT_ONCE = 4                  # of a bucket, being read whole, each of 400 MB at most
# What may change between two starts of one run, of the sections that otherwise must not.
FIXED = ("objective", "objective_args", "model", "seed", "batch_size", "seq_len", "optimizer.name",
         "optimizer.moment_dtype")
FREE = ("model.dtype", "model.matmul_dtype", "model.remat", "model.scan_layers", "model.attention_kernel",
        "model.loss_chunk_tokens", "model.dropout", "model.pipeline_microbatches", "model.pipeline_repeats")


# --- The run folder


@contextlib.contextmanager
def lock(folder):
    """Holds a run folder, made where it is not there, for one training run: a second one would destroy its files.

    The kernel lets go of `RUN/lock` when process 0 ends, however it ends; in a bucket there is none. What a run does in
    the folder is tried here: a wrong mount, or one that is not the same for all processes, or wrong credentials, must
    not show at the first save.

    Raises:
      UserError: another process trains there, the folder cannot be written, or not by all processes.
    """
    folder, taken = storage.place(folder), False
    if isinstance(folder, storage.Url):
        _try_bucket(folder)
        if jax.process_index() == 0:
            print(f"{folder} cannot be locked, as it is in a bucket: see to it that no other process trains there")
        yield
        return
    with contextlib.ExitStack() as held:
        if jax.process_index() == 0:
            with _writable(folder):
                folder.mkdir(parents=True, exist_ok=True)
                file = held.enter_context(open(folder / "lock", "ab"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                taken = True
            except OSError as e:   # some network file systems have no locks
                print(f"{folder} cannot be locked ({e.strerror}): see to it that no other process trains there")
        if jax.process_count() > 1:   # one verdict for all, or the others would wait for ever
            taken = bool(multihost_utils.broadcast_one_to_all(np.int32(taken)))
        if taken:
            raise UserError(f"another process trains in {folder}: wait for its end, or take another --workdir")
        _try(folder)
        yield


def _try(folder):
    """Raises UserError where not every process can write a file in a folder that process 0 makes, and then renames."""
    number, mark = jax.process_index(), _common_mark()
    trial, renamed = folder / f".trial_{mark}", folder / f".trial_{mark}.renamed"
    with _writable(folder):
        if number == 0:
            for left in folder.glob(".trial_*"):   # by a run that was killed here
                shutil.rmtree(left, ignore_errors=True)
            trial.mkdir()
        _sync("trial folder made")
        for _ in range(50):   # network file systems remember for seconds what was not there
            if trial.is_dir():
                break
            time.sleep(0.2)
        else:
            raise _unshared(folder)
        with open(trial / str(number), "wb") as file:
            file.write(b"x")
            os.fsync(file.fileno())
        _sync("trial files written")
        if number == 0:
            try:
                trial.rename(renamed)
            finally:
                shutil.rmtree(trial, ignore_errors=True)
                shutil.rmtree(renamed, ignore_errors=True)


def _try_bucket(folder):
    """Raises UserError where not every process can write, read, list and delete, and sees what process 0 writes."""
    own, mark = folder / ".trial" / str(jax.process_index()), str(_common_mark())
    own.write_text(mark)
    if own.name not in own.parent.keys():
        raise UserError(f"--workdir={folder}: what is written there is not in the list of its objects: it has to be "
                        "listed too")
    _sync("trial objects written")
    if not (own.parent / "0").is_file() or (own.parent / "0").read_text() != mark:
        raise _unshared(folder)
    _sync("trial objects read")
    own.unlink()


def _common_mark():
    """Returns a number that is the same in all processes, and another at each start."""
    mark = np.int32(int.from_bytes(os.urandom(3)))
    return int(mark if jax.process_count() == 1 else multihost_utils.broadcast_one_to_all(mark))


def _unshared(folder):
    return UserError(f"--workdir={folder}: process {jax.process_index()}, on {socket.gethostname()}, does not see what "
                     "process 0 writes there; name a folder that all hosts share")


def describe_run(folder, config: ml_collections.ConfigDict, step: int, *, tokenizer=None,
                 data: dict | None = None, base: dict | None = None) -> None:
    """Returns nothing; writes what describes the run, after `start` has found where it begins: at `step`.

    `tokenizer`: has `fingerprint` and `save(folder)`. `data`: {name: fingerprint}, JSON values. `base`: where the
    parameters are from that the checkpoints lack, see `base_of`.
    Checkpoints of later steps, which are corrupt if `start` has passed over them, are renamed to STEP.corrupt; in a
    bucket, their meta.json to meta.json.corrupt, until that step is saved again.

    Raises:
      UserError: the folder cannot be written.
    """
    folder = storage.place(folder)
    _sync("run folder read")   # no process writes before all have looked
    if jax.process_index() == 0:
        _describe(folder, config, step, tokenizer, data, base)
    _sync("run folder described")   # nor looks again before one has written


def _describe(folder, config, step, tokenizer, data, base):
    with _writable(folder), storage.local(folder) as files:
        run, here = _read_run(folder) if steps(folder) else {}, files.path
        (here / "checkpoints").mkdir(parents=True, exist_ok=True)
        for path, aside in _set_aside(folder, step):
            path.rename(aside)
        config_lib.save(config, here / "config.json.new")
        os.replace(here / "config.json.new", here / "config.json")
        if tokenizer is not None and run.get("tokenizer") != tokenizer.fingerprint:
            tokenizer.save(here / "tokenizer")
        run |= _fingerprints(tokenizer, data) | {"starts": [*run.get("starts", []), _versions()]}
        run |= {"base": base} if base else {}
        _write_json(here / "run.json", run)


@contextlib.contextmanager
def _writable(folder):
    try:
        yield
    except OSError as e:
        raise UserError(f"--workdir={folder}: cannot be used ({e.strerror or e}: {e.filename}); name a folder that can "
                        "be written") from None


def _set_aside(folder, step):
    """Returns [(path, path it is to have)] of the checkpoints after `step`."""
    checkpoints, later = folder / "checkpoints", [str(s) for s in steps(folder) if s > step]
    if isinstance(folder, storage.Url):
        return [(checkpoints / s / "meta.json", checkpoints / s / "meta.json.corrupt") for s in later]
    free = lambda s: next(p for i in range(10**6) if not (p := checkpoints / f"{s}.corrupt{i or ''}").exists())
    return [(checkpoints / s, free(s)) for s in later]


def _read_run(folder):
    """Returns the contents of run.json, {} where there is none. Raises UserError where it is damaged."""
    path = storage.place(folder) / "run.json"
    try:
        run = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as e:
        run = e
    if not isinstance(run, dict):
        raise UserError(f"{path}: damaged ({run if isinstance(run, ValueError) else 'not a JSON object'}): put a copy "
                        "back, or delete it to start without a check against that run's settings, tokenizer and data")
    return run


def base_of(folder) -> dict:
    """Returns what a run with checkpoints noted of its base, see `adapt.Adaptation.read_base`; {} where it has none."""
    return _read_run(folder).get("base", {}) if steps(folder) else {}


def load_tokenizer(folder) -> tokenizers.Tokenizer | None:
    """Returns a run's tokenizer; None of a run without text.

    Raises:
      UserError: it cannot be read, or is not the one that the checkpoints were made with.
    """
    run = _read_run(folder)
    if "starts" in run and "tokenizer" not in run:   # described, and not as having one
        return None
    with storage.local(folder, "tokenizer") as files:
        tokenizer = tokenizers.load(files.path / "tokenizer")
    wanted = run.get("tokenizer")
    if wanted not in (None, tokenizer.fingerprint):
        raise UserError(f"{storage.place(folder) / 'tokenizer'} (sha256 {tokenizer.fingerprint[:12]}) is not the "
                        f"tokenizer of the checkpoints, which by run.json has sha256 {wanted[:12]}: put that one back")
    return tokenizer


def _fingerprints(tokenizer, data):
    known = {"tokenizer": tokenizer and tokenizer.fingerprint, "data": data}
    return {k: v for k, v in known.items() if v is not None}


def _values(fingerprints):
    """Returns the fingerprints without their folders' names: data may move."""
    return list(fingerprints.values()) if isinstance(fingerprints, dict) else fingerprints


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
    checkpoints = storage.place(folder) / "checkpoints"
    if isinstance(checkpoints, storage.Url):
        return sorted(int(k.split("/")[0]) for k in checkpoints.keys() if re.fullmatch(r"\d+/meta\.json", k))
    if not checkpoints.is_dir():
        return []
    return sorted(int(d.name) for d in checkpoints.iterdir() if d.name.isdecimal() and d.is_dir())


def verify(folder, step: int, items: tuple[str, ...] = ("params", "ema", "optimizer")) -> str:
    """Returns what is wrong with a checkpoint's files, naming one, or "" where all are as they were written.

    Reads every byte of `items`, about 7 GB/s a core from memory; several processes share the work and agree.

    Raises:
      UserError: the checkpoint is of a format of a newer fm_jax.
    """
    checkpoint = storage.place(folder) / "checkpoints" / str(step)
    meta, problem = _read_meta(checkpoint)
    if problem:
        return problem
    files = [(name, file) for name, file in sorted(meta["files"].items()) if name.split("/")[0] in items]
    if isinstance(checkpoint, storage.Url):   # no object is shared: each is read once
        bad = _first_bad(files, lambda named: _checksums_of_object(checkpoint / named[0]) == named[1], OBJECTS_AT_ONCE)
        return "" if bad is None else f"{bad[0]} is missing, or changed since it was written"
    blocks = []
    for name, file in files:
        path = checkpoint / name
        size = path.stat().st_size if path.is_file() else None
        if size is None:
            return f"{name} is missing"
        if size != file["bytes"]:
            return f"{name} has {size} bytes instead of {file['bytes']}"
        blocks += [(path, i, checksum) for i, checksum in enumerate(file["checksums"])]
    bad = _first_bad(blocks, lambda block: _checksum(*block[:2]) == block[2])
    if bad is None:
        return ""
    path, i, _ = bad
    return f"{path.relative_to(checkpoint)} changed since it was written, from byte {i * BLOCK_BYTES} on"


def _first_bad(parts, good, at_once=None):
    """Returns the first of `parts` that is not `good`, None where all are; several processes share them, and agree."""
    mine = range(jax.process_index(), len(parts), jax.process_count())
    with _threads(at_once) as pool:
        bad = [i for i, right in zip(mine, pool.map(lambda i: good(parts[i]), mine)) if not right]
    first = min(bad, default=len(parts))
    if jax.process_count() > 1:
        first = int(np.min(multihost_utils.process_allgather(np.int32(first))))
    return parts[first] if first < len(parts) else None


def restore(folder, step: int, abstract):
    """Returns the state at `step`: arrays of the shapes, dtypes and shardings of `abstract`.

    `abstract`: a state of `jax.ShapeDtypeStruct` with shardings, of any mesh. Where it has an average and the
    checkpoint has none, the average is the parameters; the other way round, it is not read. The files are not
    verified here.

    Raises:
      UserError: names, shapes or dtypes differ from the checkpoint's; the first ten are listed.
    """
    checkpoint = storage.place(folder) / "checkpoints" / str(step)
    wanted, has_ema = _items(abstract), (checkpoint / "ema").is_dir()
    there = {name: name if name != "ema" or has_ema else "params" for name in wanted}
    lines = tree.difference(_named(abstract if has_ema else abstract.replace(ema=None)),
                            _stored(checkpoint, set(there.values())))
    if lines:
        raise UserError(f"{checkpoint} is a checkpoint of another model or optimizer, as these differ: "
                        + "; ".join(lines))
    read = {name: _read_item(checkpoint / there[name], item) for name, item in wanted.items()}
    return abstract.replace(params=read["params"], ema=read.get("ema"), **read["optimizer"])


def restore_params(folder, step: int | None = None, abstract=None, *, ema: bool = False):
    """Returns the parameters of a run, without reading its optimizer's state.

    `step`: default newest. `abstract`: a nested dict of `jax.ShapeDtypeStruct`, with shardings or for
    one device; its dtypes win over the stored ones. Without it, all parameters come as NumPy arrays.
    `ema`: take the average of the parameters where the checkpoint has one.

    Raises:
      UserError: no checkpoint there, it is corrupt, or lacks a parameter of that shape.
    """
    folder = storage.place(folder)
    there = _some_steps(folder)
    step = there[-1] if step is None else choose(step, there, f"checkpoints of {folder}")
    checkpoint = folder / "checkpoints" / str(step)
    item = _params_item(checkpoint, ema)
    problem = verify(folder, step, (item,))
    if problem:
        raise UserError(f"{checkpoint} is corrupt: {problem}; steps here: {', '.join(map(str, there))}")
    return _read_params(checkpoint / item, abstract)


def start(folder, config: ml_collections.ConfigDict, abstract, init, *, axes=None, model=None, tokenizer=None,
          data: dict | None = None):
    """Returns (state, its step, line): what a run begins with, and where it came from, for the user. Writes nothing.

    The step is a number of the host: a fresh state may still be in the making on the device.

    Whichever comes first:
      1. this run's newest checkpoint, if the folder has any: the run continues;
      2. the newest checkpoint of `config.checkpoint.continue_from`: its state and step continue here;
      3. `init()`, with the parameters that `init_pattern` matches from the newest of `init_from` (its
         average, if it keeps one), step 0;
      4. `init()`: all fresh.
    `abstract`: the state as `jax.ShapeDtypeStruct` with shardings; `init()`: a fresh state of these.
    `axes`: logical axes of the parameters. `model`: (all parameters of the model, their axes), where some do not train
    or are adapters. `tokenizer`, `data`: as in `describe_run`; None is not compared.

    Raises:
      UserError: the newest checkpoint is corrupt, unless `on_corrupt` is "previous"; then the newest good one
        serves. Or it is of another architecture. Or this run has had another model, objective, batch size, seed,
        optimizer, tokenizer or data; `continue_from`, another objective or tokenizer; `init_from`, another
        tokenizer, while a parameter with a vocabulary axis would come from it.
    """
    folder, options = storage.place(folder), config.checkpoint
    distributed.agree(steps(folder), folder / "checkpoints")
    if steps(folder):
        note = _check_same(folder, config, FIXED, tokenizer, data, remedy=(
            f"take another --workdir, with --config.checkpoint.continue_from={folder} to go on from that run's state, "
            "or init_from to begin with its parameters"))
        state, step, more = _continued(folder, options.on_corrupt, abstract)
        aside = ", ".join(str(new.relative_to(folder / "checkpoints")) for _, new in _set_aside(folder, step))
        return state, step, f"continuing {folder} from step {step}{note}{more}" + (f", now {aside}" if aside else "")
    if options.continue_from:
        note = _check_same(options.continue_from, config, ("objective",), tokenizer, remedy=(
            "its state cannot go on in this one; --config.checkpoint.init_from takes parameters alone"))
        state, step, more = _continued(options.continue_from, options.on_corrupt, abstract)
        line = f"continuing from step {step} of {options.continue_from} (checkpoint.continue_from){note}{more}"
        return state, step, line
    if options.init_from:
        item = lambda checkpoint: _params_item(checkpoint, ema=True)
        step, note = _newest_good(options.init_from, options.on_corrupt, lambda checkpoint: (item(checkpoint),))
        whole, whole_axes = model or (abstract.params, axes)
        chosen = tree.flatten(tree.mask(whole, [options.init_pattern], "config.checkpoint.init_pattern"))
        wanted = {n: a for n, a in tree.flatten(abstract.params).items() if chosen.get(n)}
        note += _check_vocabulary(options.init_from, [n for n in chosen if chosen[n]], whole_axes, tokenizer)
        checkpoint = storage.place(options.init_from) / "checkpoints" / str(step)
        read = tree.flatten(_read_params(checkpoint / item(checkpoint), tree.nest(wanted))) if wanted else {}
        state = init()
        state = state.replace(params=tree.map_named(lambda n, p: read.get(n, p), state.params))
        if state.ema is not None:   # copies: a donated buffer must not be in the state twice
            state = state.replace(ema=tree.map_named(lambda n, p: jnp.copy(read[n]) if n in read else p, state.ema))
        line = (f"step 0 with {len(read)} of {len(tree.flatten(state.params))} parameters from step {step} of "
                f"{options.init_from} (checkpoint.init_from), the others fresh{note}")
        return state, 0, line
    return init(), 0, f"fresh start, seed {config.seed}"


def _check_same(folder, config, sections, tokenizer, data=None, *, remedy):
    """Returns a note where nothing is there to compare. Raises UserError where the run in `folder` differs."""
    run = _read_run(folder)
    if not run:
        return "; it has no run.json: its settings, tokenizer and data are not compared"
    old, new = (tree.flatten(c.to_dict(), is_leaf=lambda value: not isinstance(value, dict))
                for c in (config_lib.load(storage.place(folder) / "config.json")[0], config))
    keys = [k for k in sorted({*old, *new}) if k not in FREE and f"{k}.".startswith(tuple(f"{s}." for s in sections))]
    show = lambda c, k: repr(c[k]) if k in c else "unset"
    lines = [f"{k}: {show(old, k)} -> {show(new, k)}" for k in keys if show(old, k) != show(new, k)]
    lines += [f"{k}: {run[k]!r} -> {v!r}" for k, v in _fingerprints(tokenizer, data).items()
              if k in run and _values(run[k]) != _values(v)]
    if lines:
        raise UserError(f"{folder} holds a run with other settings ({_first(lines)}): {remedy}")
    return ""


def _check_vocabulary(folder, wanted, axes, tokenizer):
    """Returns a note where another tokenizer made no difference. Raises UserError where its ids would change sense."""
    old = _read_run(folder).get("tokenizer")
    if tokenizer is None or old == tokenizer.fingerprint:
        return ""
    if old is None:
        return "; its tokenizer is not known, and not compared"
    axes = tree.flatten(axes, is_leaf=lambda a: isinstance(a, tuple))
    tables = [n for n in wanted if "vocab" in axes[n]]
    if tables:
        raise UserError(f"checkpoint.init_from={folder} had another tokenizer ({old!r} -> {tokenizer.fingerprint!r}), "
                        f"so the rows of {', '.join(tables)} stand for other tokens: leave that out by "
                        "--config.checkpoint.init_pattern, or prepare the data with that run's tokenizer")
    return "; its tokenizer was another"


def _continued(folder, on_corrupt, abstract):
    """Returns (state, step, note) of the newest good checkpoint of a run, its average as `abstract` wants it."""
    step, note = _newest_good(folder, on_corrupt, lambda _: tuple(_items(abstract)))
    has_ema = (storage.place(folder) / "checkpoints" / str(step) / "ema").is_dir()
    if has_ema and abstract.ema is None:
        note += "; its average of the parameters is not read (optimizer.ema_decay=0)"
    if not has_ema and abstract.ema is not None:
        note += "; it has no average of the parameters: that starts from them"
    return restore(folder, step, abstract), step, note


def _newest_good(folder, on_corrupt, items):
    """Returns (step, note on corrupt ones); verified are `items(path)`. Raises UserError if none, or newest corrupt."""
    folder, corrupt = storage.place(folder), []
    for step in reversed(_some_steps(folder)):
        problem = verify(folder, step, items(folder / "checkpoints" / str(step)))
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
    return step, f"; {what}"


def _some_steps(folder):
    if not (there := steps(folder)):
        raise UserError(f"{folder}: no checkpoints here" + ("" if folder.is_dir() else " (no such folder)"))
    return there


def _items(state):
    """Returns {folder of the checkpoint: tree}."""
    items = {"params": state.params, "optimizer": {"step": state.step, "opt_state": state.opt_state}}
    return items if state.ema is None else items | {"ema": state.ema}


def _params_item(checkpoint, ema):
    return "ema" if ema and (checkpoint / "ema").is_dir() else "params"


def _named(state):
    return tree.flatten({"step": state.step, "params": state.params, "opt_state": state.opt_state, "ema": state.ema})


def _stored(checkpoint, items):
    """Returns {dotted name in the state: metadata with shape and dtype} of what a checkpoint holds."""
    return {("" if item == "optimizer" else item + ".") + n: leaf
            for item in items for n, leaf in tree.flatten(_metadata(checkpoint / item)).items()}


def _metadata(path):
    return _handler().metadata(_for_orbax(path)).tree


def _read_params(path, abstract):
    """Returns parameters as `restore_params`, from the item at `path`."""
    if abstract is None:
        return _read_item(path, None)
    found = tree.flatten(_metadata(path))
    wanted = {n: jax.ShapeDtypeStruct(a.shape, found[n].dtype if n in found else a.dtype)
              for n, a in tree.flatten(abstract).items()}
    lines = tree.difference(wanted, {n: found[n] for n in wanted if n in found})
    if lines:
        raise UserError(f"{path.parent} is a checkpoint of another model, as these parameters differ: "
                        + "; ".join(lines))
    return _read_item(path, abstract)


def _read_item(path, abstract):
    """Returns one item's tree. `abstract`: what to read of it, and how; None: everything, as NumPy arrays."""
    path = _for_orbax(path)
    with ocp.Checkpointer(_handler()) as reader:
        if abstract is None:
            how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), _metadata(path))
            return reader.restore(path, args=ocp.args.PyTreeRestore(restore_args=how))
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        placed = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding or device)
        abstract = jax.tree.map(placed, abstract)
        how = ocp.checkpoint_utils.construct_restore_args(abstract)
        return reader.restore(path, args=ocp.args.PyTreeRestore(abstract, how, partial_restore=True))


def _for_orbax(path):
    if isinstance(path, storage.Url):
        storage.teach_orbax()
    return epath.Path(path.absolute())   # it takes no other


# --- Writing


class Checkpoints:
    """The writer of one run's checkpoints; one per run and process.

    Usage: `save(step, state, metrics)` as often as you like, `close()` at the end. Saving copies the
    arrays to the host and returns; a thread writes them. An error there is raised by the next call.
    """

    def __init__(self, folder, options: ml_collections.ConfigDict):
        """Removes what a killed run left half written. `options`: `config.checkpoint`."""
        self._run = storage.place(folder)
        self._in_bucket = isinstance(self._run, storage.Url)
        self._folder = self._run / "checkpoints"
        self._options = options
        self._saving = None       # step being written
        self._saved = set(steps(self._run))   # not looked up again: all processes must agree on what is to be saved
        self._checkpointer = None
        self._deleting = None     # future of the folders being deleted
        self._versions = _versions()
        self._deleter = futures.ThreadPoolExecutor(1, "delete_checkpoints")
        self._unhide = _hide_what_wait_raises()
        if jax.process_index() == 0:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._delete(self._leftovers())
        _sync("checkpoint folder made")
        self._identity = _identity(self._folder)   # a writing thread would make it again, if it were removed

    def save(self, step: int, state, metrics: dict[str, float] | None = None) -> None:
        """Returns once `state` may be donated; the checkpoint of `step` is complete after `wait`.

        Waits for the save before it, if that is still being written. A step that is saved already is
        left alone. `metrics` are stored beside it; `best_metric` among them counts for `keep_best`.

        Raises:
          UserError: this save, or the one before, did not fit on the disk, or the store did not take it. Earlier
            checkpoints are intact. Or the folder was removed: it is made again, and has this step.
        """
        gone, cut = _any(_identity(self._folder) != self._identity), self._saving
        try:
            self.wait()
        except Exception:
            if not gone or jax.process_count() > 1:
                raise
        step = int(step)
        if step in self._saved and not gone:
            return
        if gone:
            with _writable(self._folder):
                self._folder.mkdir(parents=True, exist_ok=True)
                if cut is not None and jax.process_index() == 0 and (half := self._folder / str(cut)).is_dir():
                    half.rename(half.with_name(f"{cut}.corrupt"))   # written partly before and partly after
            _sync("checkpoint folder made again")
            self._identity = _identity(self._folder)
        if self._in_bucket:
            self._make_way(step)
        else:
            self._check_space(step, state)
        self._saving = step
        items = _items(state)
        # In a bucket without a folder for what is not complete yet: a rename would copy it all.
        mode = ocp.options.AtomicityMode.COMMIT_FILE if self._in_bucket else ocp.options.AtomicityMode.AUTO
        atomicity = ocp.options.AtomicityOptions(mode)
        handler = _Handler(composite_options=ocp.CompositeOptions(atomicity_options=atomicity),
                           **{name: _handler() for name in items})
        handler.meta = {"step": step, "metrics": {k: float(v) for k, v in (metrics or {}).items()}, **self._versions}
        self._checkpointer = ocp.AsyncCheckpointer(handler, atomicity_options=atomicity)
        args = {name: ocp.args.PyTreeSave(item) for name, item in items.items()}
        try:
            self._checkpointer.save(_for_orbax(self._folder / str(step)), args=_HandlerArgs(**args))
        except Exception as e:
            raise self._failed(e) from e
        if gone or not self._options.asynchronous:
            self.wait()
        if gone:
            raise UserError(f"{self._folder} was removed while this run was at work; it is there again, with the state "
                            f"of step {step} alone: the same command continues from it")

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
        self._saved.add(self._saving)
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
            self._unhide()
        if self._deleting:
            self._deleting.result()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def _best_metric(self, step):
        meta, problem = _read_meta(self._folder / str(step))
        return float("inf") if problem else meta["metrics"].get(self._options.best_metric, float("inf"))

    def _leftovers(self):
        """Returns the folders of saves and deletions that a kill has cut short."""
        if not self._in_bucket:
            return [d for d in self._folder.iterdir() if ".orbax-checkpoint-tmp" in d.name
                    or d.name.endswith(".deleted")]
        marks = "meta.json", "meta.json.corrupt"   # asked for one by one: a list cut short must destroy nothing
        names = {k.split("/")[0] for k in self._folder.keys()}
        return [folder for folder in (self._folder / name for name in names if name.isdecimal())
                if not any((folder / mark).is_file() for mark in marks)]

    def _make_way(self, step):
        """Returns when nothing is left of a checkpoint of that step, which was corrupt, nor of those being deleted."""
        if jax.process_index() == 0:
            if self._deleting:
                self._deleting.result()
            (self._folder / str(step)).rmtree()
        _sync("room for a checkpoint made")

    def _check_space(self, step, state):
        shards = [s for x in jax.tree.leaves(_items(state)) for s in x.addressable_shards if s.replica_id == 0]
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
        self._unhide = lambda: None   # the last threads may end after this run
        if self._in_bucket:   # which may be gone: what is there of the step, without meta.json, goes at the next start
            return UserError(f"saving step {step} to {self._folder} failed: {storage.said(error)}; earlier checkpoints "
                             f"are intact, the newest: {max(self._saved, default='none')}")
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
        """Hides folders at once, each by one rename or without its meta.json, and deletes them in a thread."""
        if self._deleting and self._deleting.done():
            self._deleting.result()
        if self._in_bucket:
            for folder in folders:
                (folder / "meta.json").unlink()
            if folders:
                self._deleting = self._deleter.submit(lambda: [folder.rmtree() for folder in folders])
            return
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

    async def async_save(self, directory, args):
        written = await super().async_save(directory, args)
        if not isinstance(directory, storage.Url):
            return written
        own = f"/ocdbt.process_{jax.process_index()}/"   # these are most of all bytes, and nobody else's
        note = lambda: _write_json(directory / f"checksums_{jax.process_index()}.json", _checksums_of_objects(
            directory, [k for k in directory.keys() if own in k]))
        return [ocp_future.ChainedFuture(written, note)]

    def finalize(self, directory):
        super().finalize(directory)
        in_bucket = isinstance(directory, storage.Url)
        root = directory if in_bucket else pathlib.Path(directory)
        files = _gathered_checksums(root) if in_bucket else _checksums_of_files(root)
        meta = self.meta | {"format": FORMAT, "files": files}
        _write_json(root / "meta.json", meta | {"crc32_of_the_above": _own_crc32(meta)})


def _checksums_of_files(root):
    """Returns {name: {"bytes", "checksums"}} of the files in the folders of `root`; those above are Orbax's marks."""
    files = sorted(p for p in root.rglob("*") if p.is_file() and p.parent != root)
    blocks = [(p, i) for p in files for i in range(-(-p.stat().st_size // BLOCK_BYTES))]
    checksums = {p: [] for p in files}
    with _threads() as pool:
        for (path, _), checksum in zip(blocks, pool.map(lambda b: _checksum(*b), blocks)):
            checksums[path].append(checksum)
    return {str(p.relative_to(root)): {"bytes": p.stat().st_size, "checksums": checksums[p]} for p in files}


def _gathered_checksums(root):
    """Returns the same of a checkpoint in a bucket: what each process noted of its own objects, and of the others."""
    names, files = root.keys(), {}
    for path in root.glob("checksums_*.json"):
        files |= json.loads(path.read_bytes())
        path.unlink()
    return files | _checksums_of_objects(root, [k for k in names if "/" in k and k not in files])


def _checksums_of_objects(root, names):
    with _threads(OBJECTS_AT_ONCE) as pool:
        return dict(zip(names, pool.map(lambda name: _checksums_of_object(root / name), names)))


def _checksums_of_object(path):
    """Returns {"bytes", "checksums"} of an object of a bucket, None where there is none."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    file = io.BytesIO(content)
    blocks = range(-(-len(content) // BLOCK_BYTES))
    return {"bytes": len(content), "checksums": [_checksum_of_block(file) for _ in blocks]}


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
    if isinstance(path, storage.Url):
        path.write_text(json.dumps(value, indent=1) + "\n")
        return
    new = path.with_name(path.name + ".new")
    with open(new, "w", encoding="utf-8") as f:
        json.dump(value, f, indent=1)
        f.write("\n")
        f.flush()
        os.fsync(f.fileno())
    os.replace(new, path)


def _checksum(path, block):
    """Returns an int that changes with the contents of one block of a file."""
    with open(path, "rb") as f:
        f.seek(block * BLOCK_BYTES)
        return _checksum_of_block(f)


def _checksum_of_block(f):
    """Returns it of the block that begins here.

    The words of each piece are summed down its columns, and the CRC-32 of the sums is taken: 0.14 s per GB, where
    the CRC-32 of everything takes 0.36 s and made save + restore slower than torch.save (one core, EPYC,
    2026-11-21). What sums miss must cancel in every column: not a flipped or lost bit, nor a burst of them, nor
    sectors that are zeroed, stale or exchanged.
    """
    crc, left, piece = 0, BLOCK_BYTES, np.zeros(PIECE_SHAPE, np.uint64)
    buffer = memoryview(piece).cast("B")
    while left and (n := f.readinto(buffer[:min(left, len(buffer))])):
        buffer[n:] = bytes(len(buffer) - n)
        crc, left = zlib.crc32(piece.sum(axis=0), crc), left - n
    return crc


def _threads(number=None):
    return futures.ThreadPoolExecutor(number or min(8, os.cpu_count() or 1))


def _identity(path):
    """Returns what tells a folder from one that was made in its place; None where there is none, as in a bucket."""
    if isinstance(path, storage.Url):
        return None
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def _any(true):
    """Returns whether it is true in any process."""
    return bool(true if jax.process_count() == 1 else multihost_utils.process_allgather(np.bool_(true)).any())


def _first(lines, most=10):
    return "; ".join(lines[:most]) + (f"; and {len(lines) - most} more" if len(lines) > most else "")


def _sync(name):
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _hide_what_wait_raises():
    """Keeps hundreds of lines about one full disk off the terminal, and returns a function that ends this.

    Orbax logs the traceback of every thread and task of a failed save, and closes its event loop at the first error;
    TensorStore reports each later one as an error of that loop.
    """
    wanted = lambda record: not (record.levelno == logging.ERROR and record.exc_info
                                 and "orbax" in record.pathname + record.getMessage())
    loggers, hook = [logging.getLogger(name) for name in ("absl", "asyncio")], sys.unraisablehook
    for logger in loggers:
        logger.addFilter(wanted)
    sys.unraisablehook = lambda error: None if str(error.exc_value) == "Event loop is closed" else hook(error)

    def unhide():
        sys.unraisablehook = hook
        for logger in loggers:
            logger.removeFilter(wanted)

    return unhide

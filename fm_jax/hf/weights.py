"""Parameters in the tensors of Hugging Face folders, and back, through the rows of a family."""

import math
import re
from typing import NamedTuple

import jax
import numpy as np

from fm_jax import tree
from fm_jax.errors import UserError
from fm_jax.hf import safetensors
from fm_jax.hf.json_files import write_json
from fm_jax.hf.safetensors import DTYPES, Entry
from fm_jax.hf.tables import Family, Model, Row

MOST_LISTED = 10              # wrong tensors in one error


# --- In

def named(entries: dict[str, Entry], family: Family) -> dict[str, Entry]:
    """Returns the entries by the keys of the family's full model."""
    # TensorFlow's names, in BERT's older files.
    renamed = lambda key: re.sub(r"LayerNorm\.(gamma|beta)$", lambda m: "LayerNorm." + {
        "gamma": "weight", "beta": "bias"}[m[1]], key)
    entries = {renamed(key): e for key, e in entries.items()}
    if family.outer and any(key.startswith(family.outer) for key in entries):
        entries = {key.removeprefix(family.outer): e for key, e in entries.items()}
    if not any(key.startswith(family.prefix) for key in entries):   # the bare model's names
        heads = {row.key for row in family.rows if not row.key.startswith(family.prefix)}
        entries = {key if key in heads else family.prefix + key: e for key, e in entries.items()}
    return entries


def read(path, family: Family, model: Model, entries: dict[str, Entry], abstract):
    """Returns the parameters, arrays of the shapes, dtypes and shardings of `abstract`, from a folder's tensors.

    Raises:
      UserError: as `hf.read_params`.
    """
    names = tree.flatten(abstract)
    tensors = _tensors(family, model, names)
    _check(path, family, tensors, entries, names)
    where = {}   # name of ours -> the _Part of each layer and expert
    for tensor in tensors:
        for part in tensor.parts:
            where.setdefault(part.name, []).append(part._replace(entry=entries[tensor.key]))
    sizes = sizes_of(family, model)

    def one(name, leaf):
        key = where[name][0].row.key
        outer = leaf.shape[:("{}" in key) + ("{e}" in key)]   # layers, experts: each a tensor
        parts = np.fromiter(where[name], object).reshape(outer)

        def piece(index):
            chosen, inside = parts[(*index[: len(outer)], ...)], index[len(outer) :]
            shape = tuple(len(range(*cut.indices(n))) for cut, n in zip(inside, leaf.shape[len(outer) :]))
            out = np.empty((chosen.size, *shape), leaf.dtype)   # all that the host holds beside the result
            for i, part in enumerate(chosen.flat):
                out[i] = _view(part.entry.read(), part, sizes)[inside]
                if not np.isfinite(out[i]).all():
                    raise UserError(f"{part.entry.path}: {part.entry.key} has values that are not finite")
            return out.reshape((*chosen.shape, *shape))

        return jax.make_array_from_callback(leaf.shape, leaf.sharding, piece)

    return tree.map_named(one, abstract)


class _Part(NamedTuple):
    """Of a tensor, what is a parameter of ours: from `start` to `stop` of `length` along the axis marked "+"."""

    row: Row
    name: str                    # of our parameter
    at: tuple[int, ...]          # layer and expert in it
    start: int
    stop: int
    length: int = 0
    entry: "Entry | None" = None


class _Tensor(NamedTuple):
    key: str
    shape: tuple[int, ...]
    parts: tuple[_Part, ...]


def _tensors(family, model, names):
    """Returns the tensors that a model of the family with our parameters `names` has, in the table's order."""
    groups, sizes, out = {}, sizes_of(family, model), []
    for row in family.rows:
        groups.setdefault(row.key, []).append(row)
    for key, rows in groups.items():
        arch = model.stacks[rows[0].stack]
        layers = range(arch.num_layers) if "{}" in key else [None]
        experts = range(arch.num_experts) if "{e}" in key else [None]
        for l in layers:
            for e in experts:
                parts, stop = [], 0
                for row in rows:
                    name, layer = _home(row, l, arch)
                    if name in names:
                        start, stop = stop, stop + _blocks(row, sizes)[_joint(row)]
                        at = tuple(i for i in (layer, e) if i is not None)
                        parts.append(_Part(row, name, at, start, stop))
                if parts:
                    shape, blocks = [], iter(_blocks(parts[0].row, sizes, stop))
                    for axis in parts[0].row.axes.split():
                        shape.append(math.prod(next(blocks) for _ in axis.split(":")))
                    out.append(_Tensor(key.format(l, e=e), tuple(shape),
                                       tuple(part._replace(length=stop) for part in parts)))
    return out


def _home(row, layer, arch):
    """Returns (the name of the row's parameter, the layer in it): the first of a stack may be apart from the others."""
    if layer is None or layer >= arch.num_first_layers:
        return row.name, None if layer is None else layer - arch.num_first_layers
    return re.sub(r"(^|\.)layers\.", r"\1first_layers.", row.name, count=1), layer


def unwritten(family: Family, model: Model, names) -> list[str]:
    """Returns those of our parameters that no tensor of the family holds."""
    return sorted(set(names) - {part.name for tensor in _tensors(family, model, names) for part in tensor.parts})


def sizes_of(family, model):
    """Returns {stack: {letter: size}}."""
    own = family.sizes(model) if family.sizes else {}
    return {name: {
        "V": a.vocab_size, "D": a.embed_dim, "U": a.embed_dim, "K": a.num_kv_heads, "G": a.groups, "H": a.head_dim,
        "Q": a.num_heads * a.head_dim, "R": a.num_kv_heads * a.head_dim, "F": a.mlp_dim, "E": a.num_experts,
        "M": a.expert_dim, "P": a.max_seq_len + a.position_offset, "Y": a.num_token_types, "1": 1, **own}
        for name, a in model.stacks.items()}


def _blocks(row, sizes, joint: int | None = None):
    """Returns the sizes of a tensor's axes, those of "K:+H" apart; joint: of the axis marked "+", of all its rows."""
    axes, own = re.split("[ :]", row.axes), sizes[row.stack]
    return [joint if joint is not None and axis.startswith("+") else math.prod(own[c] for c in axis.strip("+"))
            for axis in axes]


def _joint(row):
    """Returns the axis of `_blocks` along which rows of one tensor follow each other."""
    return next((i for i, axis in enumerate(re.split("[ :]", row.axes)) if axis.startswith("+")), 0)


def parted(array, rows: list[Row], sizes) -> list:
    """Returns the parameter of each row of one tensor, of a layer, as views of it. sizes: as `sizes_of`."""
    ends = np.cumsum([0, *(_blocks(row, sizes)[_joint(row)] for row in rows)]).tolist()
    return [_view(array, _Part(row, row.name, (), start, stop, ends[-1]), sizes)
            for row, start, stop in zip(rows, ends, ends[1:])]


def _view(array, part, sizes):
    """Returns a row's parameter as a view of the tensor."""
    row = part.row
    array = array.reshape(_blocks(row, sizes, part.length))
    array = array[(slice(None),) * _joint(row) + (slice(part.start, part.stop),)]
    letters = re.sub("[ +:1]", "", row.axes)
    return array.reshape([sizes[row.stack][c] for c in letters]).transpose([letters.index(c) for c in row.letters])


def _check(path, family, tensors, entries, names):
    """Raises UserError where the files do not hold just what the model has."""
    wanted = {t.key: t for t in tensors}
    wrong = [f"{k} is missing" for k in wanted if k not in entries]
    for key, entry in entries.items():
        if key in wanted and entry.shape != wanted[key].shape:
            wrong.append(f"{key} has shape {list(entry.shape)} instead of {list(wanted[key].shape)}")
        elif key in wanted and entry.dtype not in DTYPES:
            wrong.append(f"{key} is of type {entry.dtype}, not one of {', '.join(DTYPES)}")
        elif not (key in wanted or re.fullmatch(family.buffers, key) or _is_copy(family, key, entries, names)):
            wrong.append(f"{key} is left over")
    if wrong:
        more = f"; and {len(wrong) - MOST_LISTED} more" if len(wrong) > MOST_LISTED else ""
        raise UserError(f"{path}: the weights are not those of its config.json: "
                        + "; ".join(wrong[:MOST_LISTED]) + more)


def _is_copy(family, key, entries, names):
    """Returns whether `key` is stored twice, such as the head of a tied model: the same bytes as another tensor."""
    keys = {row.name: row.key for row in family.rows}
    copies = dict(family.copies)
    if "embed.head" not in names:
        copies[keys.get("embed.head")] = keys.get("embed.tokens")
    if key not in copies or copies[key] not in entries:
        return False
    one, other = entries[copies[key]].read(), entries[key].read()
    return one.dtype == other.dtype and np.array_equal(one.view(np.uint8), other.view(np.uint8))


# --- Out

def save(folder, family: Family, model: Model, names: dict, file_bytes: int) -> None:
    """Writes the parameters, {our name: NumPy array}, as safetensors files of the family's tensors."""
    sizes, files, apart = sizes_of(family, model), [[]], {}
    room = file_bytes
    for tensor in _tensors(family, model, names):
        first = tensor.parts[0].row

        def make(tensor=tensor):
            arrays, rows = [names[part.name][part.at] for part in tensor.parts], [part.row for part in tensor.parts]
            return joined(arrays, rows, sizes).reshape(tensor.shape)

        dtype = np.dtype(names[tensor.parts[0].name].dtype)
        if "/" in tensor.key:   # in a folder of its own
            inside, _, key = tensor.key.rpartition("/")
            apart.setdefault(inside, []).append((key, dtype, tensor.shape, make))
            continue
        room -= (size := math.prod(tensor.shape) * dtype.itemsize)
        if room < 0 and files[-1]:
            files.append([])
            room = file_bytes - size
        files[-1].append((tensor.key, dtype, tensor.shape, make))
    for inside, tensors in apart.items():
        safetensors.write(folder / inside / "model.safetensors", tensors)
    if len(files) == 1:
        safetensors.write(folder / "model.safetensors", files[0])
        return
    where = {}
    for i, tensors in enumerate(files):
        name = f"model-{i + 1:05}-of-{len(files):05}.safetensors"
        safetensors.write(folder / name, tensors)
        where |= {key: name for key, _, _, _ in tensors}
    total = sum(p.nbytes for p in names.values())
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})


def joined(arrays: list, rows: list[Row], sizes):
    """Returns the tensor that the rows' parameters make, of a layer, with its axes as `_blocks`: `parted` backwards."""
    def block(array, row):
        letters = re.sub("[ +:1]", "", row.axes)
        return array.transpose([row.letters.index(c) for c in letters]).reshape(_blocks(row, sizes))

    return np.concatenate([block(*pair) for pair in zip(arrays, rows)], axis=_joint(rows[0]))

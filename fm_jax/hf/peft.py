"""Low-rank adapters in PEFT's format (adapter_config.json, adapter_model.safetensors), in and out.

    python -m fm_jax.convert --workdir runs/adapter --to_peft exported
    python -m fm_jax.convert --from_peft folder --base runs/base --workdir runs/adapter

Where a family keeps several of our matrices in one tensor, such as queries, keys and values, its adapter has one A and
one B for them all: ours become blocks of these, and one of theirs becomes an A for each, the same.
"""

import pathlib
import re
from typing import NamedTuple

import numpy as np

from fm_jax.errors import UserError
from fm_jax.hf import safetensors
from fm_jax.hf.json_files import read_json, write_json
from fm_jax.hf.tables import Family, Model
from fm_jax.hf.weights import joined, parted, sizes_of

CONFIG, WEIGHTS, BASE = "adapter_config.json", "adapter_model.safetensors", "fm_jax_base.json"
PREFIX, RANK = "base_model.model.", "r"
# Of adapter_config.json: the values under which an adapter is what `adapt.Lora` computes.
ONLY = {"peft_type": "LORA", "bias": "none", "lora_bias": False, "modules_to_save": None, "layers_to_transform": None,
        "alora_invocation_tokens": None, "trainable_token_indices": None, "layer_replication": None,
        "target_parameters": None, "use_qalora": False, "use_bdlora": None}


class Adapter(NamedTuple):
    """Adapters of a model's matrices; each array stacked over layers, with the axes of `adapt.Lora`."""

    rank: int
    alpha: float
    stabilized: bool    # of rank: the scale is alpha / sqrt(rank)
    dropout: float
    a: dict             # our parameter's name -> [L, *inputs, rank]
    b: dict             # [L, rank, *outputs]
    norms: dict         # [L, *outputs]: DoRA's magnitudes; {} without

    def scale(self, rank: int, alpha: float) -> float:
        return alpha / (rank ** 0.5 if self.stabilized else rank)


def save(folder, family: Family, model: Model, adapter: Adapter, base_name: str, fingerprint: str) -> int:
    """Returns the number of tensors; writes a folder that PEFT opens on the exported base.

    base_name: folder or hub name of the base's weights. fingerprint: of the base, `adapt.fingerprint`.

    Raises:
      UserError: a matrix without a linear layer of its own there; the folder exists.
    """
    folder = pathlib.Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists already and is not empty; name another folder")
    tensors, ranks, alphas, targets = [], {}, {}, []
    for key, rows in _groups(family, adapter.a).items():
        n = sum(row.name in adapter.a for row in rows)   # blocks
        target = key.removesuffix(".weight").partition("{}.")[2]
        targets.append(target)
        if adapter.norms and n < len(rows):
            raise UserError(f"DoRA of a part of {target}, one matrix in {family.architecture}, is none there; adapt "
                            + ", ".join(row.name for row in rows) + " together")
        if n > 1:
            ranks[target] = n * adapter.rank
            alphas[target] = adapter.alpha * (n ** 0.5 if adapter.stabilized else n)
        for layer in range(model.stacks[rows[0].stack].num_layers):
            name = PREFIX + key.format(layer).removesuffix(".weight")
            a, b, norms = _to_tensors(rows, adapter, layer, sizes_of(family, model))
            tensors += [(f"{name}.lora_A.weight", a), (f"{name}.lora_B.weight", b)]
            if norms is not None:
                tensors.append((f"{name}.lora_magnitude_vector", norms))
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.write(folder / WEIGHTS, [(key, x.dtype, x.shape, lambda x=x: x) for key, x in tensors])
    write_json(folder / BASE, {"fingerprint": fingerprint})
    write_json(folder / CONFIG, {
        "peft_type": "LORA", "task_type": "CAUSAL_LM" if "CausalLM" in family.architecture else None,
        "base_model_name_or_path": base_name, "r": adapter.rank, "lora_alpha": adapter.alpha,
        "lora_dropout": adapter.dropout, "use_rslora": adapter.stabilized, "use_dora": bool(adapter.norms),
        "target_modules": targets, "rank_pattern": ranks, "alpha_pattern": alphas, "bias": "none",
        "fan_in_fan_out": family.architecture.startswith("GPT2"), "inference_mode": True, "modules_to_save": None})
    return len(tensors)


def read(folder, family: Family, model: Model, shapes: dict) -> tuple[Adapter, str]:
    """Returns (adapter, fingerprint of its base, "" where it does not say) of a PEFT folder, for a base of the family.

    shapes: {our parameter's name: (shape, number of its axes that are inputs)}.

    Raises:
      UserError: another kind of adapter; tensors that are missing, left over or of another shape than the base's.
    """
    folder = pathlib.Path(folder)
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder}: no adapter here (no {CONFIG})")
    config = read_json(folder / CONFIG)
    for key, value in ONLY.items():
        if config.get(key, value) not in (value, [] if value is None else value):
            raise UserError(f"{folder / CONFIG}: {key}={config[key]!r}: adapters here are low-rank additions to "
                            "matrices alone")
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"{folder}: no {WEIGHTS} here; pickles are never read: save the adapter as safetensors")
    entries = safetensors.read_file(folder / WEIGHTS)
    known = {row.key.removesuffix(".weight"): None for row in family.rows}
    groups, sizes = {}, sizes_of(family, model)
    for key in entries:
        module, _, kind = key.removeprefix(PREFIX).partition(".lora_")
        plain = re.sub(r"\.\d+\.", ".{}.", module, count=1)
        if plain not in known or kind not in ("A.weight", "B.weight", "magnitude_vector"):
            raise UserError(f"{folder / WEIGHTS}: {key} is of no layer of the base, a model of {family.architecture}")
        groups.setdefault(plain + ".weight", set()).add(kind)
    plain = Adapter(config.get("r", 8), config.get("lora_alpha", 8), config.get("use_rslora", False),
                    config.get("lora_dropout", 0.0), {}, {}, {})
    found, wrong = {}, []
    for key, kinds in groups.items():
        rows = [row for row in family.rows if row.key == key and row.name in shapes]
        target = key.removesuffix(".weight").replace(".{}.", ".0.")
        rank, alpha = (_pattern(config.get(f"{what}_pattern"), target, default)
                       for what, default in (("rank", plain.rank), ("alpha", plain.alpha)))
        for layer in range(model.stacks[rows[0].stack].num_layers):
            of_layer = PREFIX + key.format(layer).removesuffix(".weight")
            names = {kind: f"{of_layer}.lora_{kind}" for kind in kinds}
            if lost := [name for name in names.values() if name not in entries]:
                wrong.append(f"{lost[0]} is missing")
                continue
            arrays = {kind: entries[name].read().astype(np.float32) for kind, name in names.items()}
            parts = _from_tensors(rows, arrays, rank, sizes, shapes)
            if parts is None:
                wrong.append(f"{of_layer}.lora_A and lora_B have shapes " + " and ".join(
                    str(list(arrays[kind].shape)) for kind in ("A.weight", "B.weight")))
                continue
            for name, part in parts.items():
                found.setdefault(name, (rank, plain.scale(rank, alpha), []))[2].append(part)
    if wrong:
        raise UserError(f"{folder / WEIGHTS} is not of this base: " + "; ".join(wrong[:10]))
    # One rank and scale for all: smaller factors get columns of zeros, and B what is left of their scale.
    rank = max(rank for rank, _, _ in found.values())
    whole = plain._replace(rank=rank)
    for name, (own, scale, parts) in found.items():
        a, b, norms = (np.stack([p[i] for p in parts]) if parts[0][i] is not None else None for i in range(3))
        ratio = scale / whole.scale(rank, plain.alpha)
        pad = lambda x, axis: np.pad(x, [(0, (rank - own) * (i == axis)) for i in range(x.ndim)])
        whole.a[name], whole.b[name] = pad(a, a.ndim - 1), pad(b if ratio == 1 else ratio * b, 1)
        if norms is not None:
            whole.norms[name] = norms
    stated = folder / BASE
    return whole, read_json(stated).get("fingerprint", "") if stated.is_file() else ""


def _pattern(patterns, module, default):
    """Returns what PEFT's rank_pattern or alpha_pattern says of a module."""
    return next((value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", module)), default)


def _groups(family, names):
    """Returns {key: its rows} of the tensors that hold these parameters."""
    groups, lost = {}, set(names) - {row.name for row in family.rows}
    for row in family.rows:
        groups.setdefault(row.key, []).append(row)
    groups = {key: rows for key, rows in groups.items() if any(row.name in names for row in rows)}
    if lost or any("{}" not in key or "{e}" in key for key in groups):
        raise UserError(f"PEFT's adapters are of linear layers in a stack: none of {family.architecture} is for "
                        + ", ".join(sorted(lost or {r.name for k, rows in groups.items() for r in rows
                                                    if "{}" not in k or "{e}" in k})))
    return groups


def _sides(rows, inputs: int, extra: str = ""):
    """Returns (the rows of a tensor as if it had its inputs alone, the same of its outputs), [extra, in], [out, extra].

    inputs: how many axes of our matrices are inputs. extra: one more axis, the rank's letter.
    """
    ins, outs = [], []
    for row in rows:
        own = set(row.letters[:inputs])
        axes = row.axes.split()
        inside = next(axis for axis in axes if set(re.sub("[+:]", "", axis)) == own)
        outside = next(axis for axis in axes if axis != inside)
        ins.append(row._replace(axes=f"{extra} {inside}".strip(), letters=row.letters[:inputs] + extra))
        outs.append(row._replace(axes=f"{outside} {extra}".strip(), letters=extra + row.letters[inputs:]))
    return ins, outs


def _with_rank(sizes, rank):
    return {stack: own | {RANK: rank} for stack, own in sizes.items()}


def _to_tensors(rows, adapter, layer, sizes):
    """Returns (A [n rank, in], B [out, n rank], magnitudes [out] or None) of a tensor, n of whose rows are adapted."""
    given = [row for row in rows if row.name in adapter.a]
    inputs = adapter.a[given[0].name].ndim - 2
    one, n = _with_rank(sizes, adapter.rank), len(given)
    ins, _ = _sides(given, inputs, RANK)
    a = np.concatenate([joined([adapter.a[row.name][layer]], [side], one).reshape(adapter.rank, -1)
                        for row, side in zip(given, ins)])
    _, outs = _sides(rows, inputs, RANK)
    blocks = []
    for row, side in zip(rows, outs):
        block = np.zeros((n * adapter.rank, *(sizes[row.stack][c] for c in side.letters[1:])), np.float32)
        if row in given:
            at = given.index(row) * adapter.rank
            block[at : at + adapter.rank] = adapter.b[row.name][layer]
        blocks.append(block)
    b = joined(blocks, outs, _with_rank(sizes, n * adapter.rank)).reshape(-1, n * adapter.rank)
    if not adapter.norms:
        return a, b, None
    _, plain = _sides(rows, inputs)
    return a, b, joined([adapter.norms[row.name][layer] for row in rows], plain, sizes).reshape(-1)


def _from_tensors(rows, arrays, rank, sizes, shapes):
    """Returns {our name: (A, B, magnitudes or None)} of a tensor's arrays; None where these have other shapes."""
    inputs = shapes[rows[0].name][1]
    sizes = _with_rank(sizes, rank)
    (ins, outs), (_, plain) = _sides(rows, inputs, RANK), _sides(rows, inputs)
    try:
        a = parted(arrays["A.weight"], ins[:1], sizes)[0]   # of all rows the same
        b = parted(arrays["B.weight"], outs, sizes)
        norms = parted(arrays["magnitude_vector"], plain, sizes) if "magnitude_vector" in arrays else [None] * len(rows)
    except ValueError:   # what NumPy says of a reshape
        return None
    return {row.name: (a, *of_row) for row, of_row in zip(rows, zip(b, norms))}

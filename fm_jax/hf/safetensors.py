"""The safetensors format, in and out: a length, a JSON header, raw bytes. No pickle is read.

Not by the format's own library, whose NumPy side holds a whole file in memory to write it and has no bfloat16.
"""

import json
import math
import pathlib
from typing import Callable, NamedTuple

import jax.numpy as jnp
import numpy as np

from fm_jax.errors import UserError
from fm_jax.hf.json_files import read_json

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(jnp.bfloat16)}
MOST_HEADER_BYTES = 100_000_000   # as the format's own library allows


class Entry(NamedTuple):
    path: pathlib.Path
    key: str
    dtype: str
    shape: tuple[int, ...]
    read: Callable         # returns the array: of a safetensors file a map, of a GGUF file dequantised


def read_folder(folder) -> dict[str, Entry]:
    """Returns {key: Entry} of the folder's safetensors files.

    Raises:
      UserError: no such file, only pickles, an index that does not fit, or a damaged file.
    """
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        files = read_json(index).get("weight_map")
        if not isinstance(files, dict) or not all(
                isinstance(f, str) and pathlib.PurePath(f).name == f for f in files.values()):
            raise UserError(f"{index}: not an index of safetensors files (weight_map: key to file name)")
    elif single.is_file():
        files = dict.fromkeys(read_file(single), single.name)
    else:
        pickles = sorted(p.name for p in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.pt"))
        raise UserError(f"{folder}: no model.safetensors here" + (
            f"; {pickles[0]} is a pickle, which could run any code and is never read: save the model as safetensors"
            if pickles else ""))
    headers = {name: read_file(folder / name) for name in sorted(set(files.values()))}
    absent = [key for key, name in files.items() if key not in headers[name]]
    if absent:
        raise UserError(f"{folder / files[absent[0]]}: lacks {absent[0]}, which {index.name} places there")
    return {key: headers[name][key] for key, name in files.items()}


def read_file(path):
    """Returns {key: Entry} of one file. Raises UserError where it is missing, damaged or cut short."""
    if not path.is_file():
        raise UserError(f"{path}: no such file, although the index of the weights names it")
    total = path.stat().st_size
    with open(path, "rb") as f:
        size = int.from_bytes(f.read(8), "little")
        if total < 8 or size > min(total - 8, MOST_HEADER_BYTES):
            raise UserError(f"{path}: not a safetensors file, or cut short ({total} bytes); copy it again")
        text = f.read(size)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        tensors = {key: (t["dtype"], tuple(map(int, t["shape"])), *(8 + size + at for at in t["data_offsets"]))
                   for key, t in header.items()}
        if any(len(t) != 4 for t in tensors.values()):
            raise ValueError("data_offsets")
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise UserError(f"{path}: not a safetensors file ({type(e).__name__}: {e})") from None
    for key, (dtype, shape, start, stop) in tensors.items():
        if not 8 + size <= start <= stop <= total:
            raise UserError(f"{path}: cut short: {key} ends at byte {stop}, the file at {total}; copy it again")
        if dtype in DTYPES and stop - start != math.prod(shape) * DTYPES[dtype].itemsize:
            raise UserError(f"{path}: damaged: {key} of type {dtype} and shape {list(shape)} has {stop - start} bytes")
    read = lambda dtype, shape, start: lambda: np.memmap(path, DTYPES[dtype], "r", start, shape)
    return {key: Entry(path, key, dtype, shape, read(dtype, shape, start))
            for key, (dtype, shape, start, _) in tensors.items()}


def write(path, tensors):
    """Writes one file of [(key, dtype, shape, function that makes the array)], one array in memory at a time."""
    header, end = {"__metadata__": {"format": "pt"}}, 0   # which transformers asks for
    names = {dtype: name for name, dtype in DTYPES.items()}
    for key, dtype, shape, _ in tensors:
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[key] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for _, _, _, make in tensors:
            f.write(np.ascontiguousarray(make()).view(np.uint8).data)

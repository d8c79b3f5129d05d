"""A compiled train step in a file: made by `plan` on any machine, run on the chips that it is for. Layer 3.

    python -m fm_jax.plan --config configs/causal_lm.py:8b --topology v5p:8x8x8 --mesh fsdp=512 \\
        --config.data.train=data/x --compiled_step 8b.step
    python -m fm_jax.train --config configs/causal_lm.py:8b --config.mesh.fsdp=512 --config.data.train=data/x \\
        --config.compiled_step=8b.step --workdir runs/8b

A pod so starts, and starts again after a preemption, without compiling. The file is one line of JSON, what the program
is made of and for what, and then machine code. Loading runs it: load what you made. What does not match is refused, and
not compiled instead.

A program is known by what it is made of: not by its text, in which the order of equal things differs from process to
process (jax 0.10).
"""

import hashlib
import importlib.metadata
import inspect
import json
from pathlib import Path
import zlib

import jax
from jax.experimental import serialize_executable

from fm_jax import objectives, tree
from fm_jax.errors import UserError

FORMAT = 1
# Of the config, what the program can depend on.
SETTINGS = ("objective", "seed", "steps", "batch_size", "seq_len", "accumulation_steps", "xla_flags", "model.",
            "optimizer.", "health.skip_")
PACKAGES = ("jax", "jaxlib", "flax", "optax")


def save(path, compiled, mesh, config, tokenizer) -> None:
    """Returns nothing; writes `compiled`, the train step of a resolved config and its tokenizer, for a mesh's devices.

    Raises:
      UserError: the file cannot be written.
    """
    code, _, _ = serialize_executable.serialize(compiled)
    header = {"format": FORMAT, "of": _ingredients(mesh, config, tokenizer), "bytes": len(code),
              "crc32": zlib.crc32(code)}
    path = Path(path)
    new = path.with_name(path.name + ".new")
    try:
        new.write_bytes(json.dumps(header).encode() + b"\n" + code)
        new.replace(path)
    except OSError as e:
        raise UserError(f"--compiled_step={path} cannot be written ({e.strerror}: {e.filename})") from None


def load(path, traced, mesh, config, tokenizer):
    """Returns the function in the file, which is `traced`, compiled for the devices of `mesh`.

    Raises:
      UserError: the file is not there or not whole; or is of other devices, another config, tokenizer or code, or of
        another compiler. Each with what differs.
    """
    what = f"config.compiled_step={path}"
    try:
        line, _, code = Path(path).read_bytes().partition(b"\n")
        header = json.loads(line)
        form, old, size, crc32 = (header[key] for key in ("format", "of", "bytes", "crc32"))
    except OSError as e:
        raise UserError(f"{what} cannot be read ({e.strerror}); plan it with --compiled_step, or leave it out") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{what}: not a file of plan --compiled_step") from None
    if form != FORMAT:
        raise UserError(f"{what}: format {form}; this fm_jax reads {FORMAT}: plan it again")
    if (len(code), zlib.crc32(code)) != (size, crc32):
        raise UserError(f"{what} is damaged: it has {len(code):,} bytes of code, and was written with {size:,} and "
                        "another checksum; copy or plan it again")
    new = json.loads(json.dumps(_ingredients(mesh, config, tokenizer)))
    differ = [f"{key} {old.get(key)!r} there, {new.get(key)!r} here" for key in dict.fromkeys([*new, *old])
              if old.get(key) != new.get(key)]
    if differ:
        raise UserError(f"{what} is of another train step ({'; '.join(differ[:10])}): plan it again, or leave it out "
                        "to compile here")
    devices = list(mesh.devices.flat)
    return serialize_executable.deserialize_and_load(
        code, jax.tree.structure(traced.args_info), jax.tree.structure(traced.out_info), backend=devices[0].client,
        execution_devices=devices)


def _ingredients(mesh, config, tokenizer):
    """Returns what a compiled step is made of, as JSON values."""
    kind = mesh.devices.flat[0].device_kind
    compilers = {"TPU": ["libtpu"], "NVI": ["jax-cuda12-pjrt", "jax-cuda13-pjrt"]}.get(kind[:3], [])
    versions = {}
    for name in (*PACKAGES, *compilers):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    settings = tree.flatten(config.to_dict(), is_leaf=lambda value: not isinstance(value, dict))
    return {"devices": f"{mesh.size} {kind}", **{f"mesh.{axis}": n for axis, n in mesh.shape.items()}, **versions,
            "tokenizer": tokenizer and tokenizer.fingerprint, "code": _code(config),
            **{key: value for key, value in settings.items()
               if key.startswith(SETTINGS)}}


def _code(config):
    """Returns the checksum of fm_jax's source, and of the file of an objective that lies elsewhere."""
    own = sorted(Path(__file__).parent.rglob("*.py"))
    other = Path(inspect.getsourcefile(objectives.find(config.objective)))
    return hashlib.sha256(b"".join(path.read_bytes() for path in [*own, other])).hexdigest()[:16]

"""Weights, settings and tokenizers of Hugging Face folders, in and out: one table per family. Layer 3.

    python -m fm_jax.convert --from_hf path/to/folder --workdir runs/imported
    python -m fm_jax.convert --workdir runs/x --to_hf exported
    fm_jax.load("path/to/folder")

A row of a table names a tensor of the family, its axes, our parameter and its axes, and is read in
both directions (`weights.py`); so is what follows it, from `config.json` to our config and back
(`settings.py`). What has no place in the tables is an error that names it. `tables.py` says how a family is
written down; `decoders.py`, `encoders.py` and `vision.py` are the tables.
"""

import pathlib
import re
import shutil
import tempfile
from typing import Callable, NamedTuple

import ml_collections
import numpy as np

from fm_jax import config as config_lib
from fm_jax import ctranslate2, gguf
from fm_jax import tokenizer as tokenizers
from fm_jax import tree
from fm_jax.errors import UserError, choose
from fm_jax.hf import safetensors, sentences, tokenizer_files, weights
from fm_jax.hf.json_files import read_json, write_json
from fm_jax.hf.safetensors import DTYPES, Entry
from fm_jax.hf.settings import COMPUTE, FAMILIES, find_family, model_of, settings_of
from fm_jax.hf.tables import Family

FILE_BYTES = 5_000_000_000    # of an exported file at most, but for a larger tensor: the limit of most hubs' tools


def is_folder(folder) -> bool:
    """Returns whether a folder has a config.json of Hugging Face (a run's has no model_type), or a CTranslate2 model, or
    is a GGUF file.
    """
    path = pathlib.Path(folder, "config.json")
    return _is_gguf(folder) or ctranslate2.is_folder(folder) or path.is_file() and "model_type" in read_json(path)


def _is_gguf(path):
    return pathlib.Path(path).suffix == ".gguf"


class Folder(NamedTuple):
    """A folder, also of a CTranslate2 model, or a GGUF file, whose headers have been read."""

    path: pathlib.Path
    place: str                      # of the settings, for errors
    settings: dict                  # config.json, and under its name each of the family's other files
    name: str                       # of its family
    entries: dict[str, Entry]       # of the weights, with keys as the family's full model names them
    tokenizer: Callable | None = None   # of a GGUF file: returns the tokenizer's files

    @property
    def family(self) -> Family:
        return FAMILIES[self.name]


def open_folder(path) -> Folder:
    """Returns what `read_config`, `read_tokenizer` and `read_params` read from.

    Raises:
      UserError: an unknown family, no weights, or a damaged file.
    """
    path = pathlib.Path(path)
    if _is_gguf(path):
        file = gguf.read(path)
        entries = {key: Entry(path, key, "F32", shape, read) for key, (shape, read) in file.tensors.items()}
        return Folder(path, str(path), file.settings, find_family(file.settings, str(path)), entries, file.tokenizer)
    if ctranslate2.is_folder(path):
        file = ctranslate2.read(path)
        entries = {key: Entry(path / "model.bin", key, "F32", *each) for key, each in file.tensors.items()}
        return Folder(path, str(path), file.settings, find_family(file.settings, str(path)), entries)
    settings, place = read_json(path / "config.json"), str(path / "config.json")
    projection = {}
    if (path / sentences.FILE).is_file():
        settings[sentences.FILE], projection = sentences.read(path)
    name = find_family(settings, place)
    settings |= {file: read_json(path / file) for file in FAMILIES[name].files
                 if file not in settings and (path / file).is_file()}
    entries = weights.named(safetensors.read_folder(path), FAMILIES[name]) | projection
    return Folder(path, place, settings, name, entries)


def read_config(folder: Folder, *, dtype: str = "") -> ml_collections.ConfigDict:
    """Returns the config of a run that holds the folder's model.

    dtype: of activations; default that of the stored weights. Parameters are bfloat16 where all stored ones
    are, else float32: nothing is lost.

    Raises:
      UserError: a setting that this model cannot honour.
    """
    model = model_of(folder.settings, folder.place)
    stored = {e.dtype for key, e in folder.entries.items()
              if e.dtype in DTYPES and not re.fullmatch(folder.family.buffers, key)}
    config = config_lib.defaults()
    config.objective = model.objective
    config.objective_args.update(model.args)
    config.name, config.hf_family = folder.path.resolve().name.removesuffix(".gguf"), folder.name
    dtype = dtype or (DTYPES[next(iter(stored))].name if len(stored) == 1 else "float32")
    for section, arch in model.stacks.items():
        fields = {f: getattr(arch, f) for f in config.model if f not in COMPUTE}
        if section == "model":   # what another section does not name is as here
            fields |= {"dtype": dtype, "param_dtype": "bfloat16" if stored == {"BF16"} else "float32"}
        config_lib.override(config, {f"{section}.{f}": value for f, value in fields.items()})
    config.update(model.keys)
    config.seq_len = min(config.seq_len, config.model.max_seq_len)   # of training; evaluation goes by max_seq_len
    return config


def read_params(folder: Folder, abstract):
    """Returns the parameters, arrays of the shapes, dtypes and shardings of `abstract`.

    Each process reads its own shards through memory maps; beside the result, the host holds a copy of
    one parameter's largest shard.

    Raises:
      UserError: tensors that are missing, left over or of another shape, the first ten of them; one that is not
        finite.
    """
    return weights.read(folder.path, folder.family, model_of(folder.settings, folder.place), folder.entries, abstract)


def read_tokenizer(folder: Folder) -> tokenizers.Tokenizer | None:
    """Returns the folder's tokenizer, None of a model without text; see `tokenizer_files.read`."""
    if not folder.family.has_text:
        return None
    if folder.tokenizer:
        files = folder.tokenizer()
        return tokenizers.HuggingFaceTokenizer(files["tokenizer.json"], files["tokenizer_config.json"],
                                               str(folder.path))
    return tokenizer_files.read(folder.path, folder.settings)


def save(folder, config, params, tokenizer, *, file_bytes: int = FILE_BYTES) -> str:
    """Returns a line on the tokenizer; writes a folder that transformers opens, whole or not at all.

    config: of the run; for the family see `settings_of`. params: NumPy arrays, float32, bfloat16 or float16; stored
    as they are.

    Raises:
      UserError: no family can express the model; the folder exists; a parameter has another dtype.
    """
    folder = pathlib.Path(folder)
    settings = settings_of(config)
    family, model = FAMILIES[find_family(settings, "config.json")], model_of(settings, "config.json")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists already and is not empty; name another folder")
    names = tree.flatten(params)
    if homeless := weights.unwritten(family, model, names):
        raise UserError(f"{family.architecture} has no tensor for {', '.join(homeless)}")
    dtypes = {choose(np.dtype(p.dtype), tuple(DTYPES.values()), f"{n}: dtype") for n, p in names.items()}
    settings["torch_dtype"] = dtypes.pop().name if len(dtypes) == 1 else "float32"
    if tokenizer is not None:
        if tokenizer.eos_id is not None and tokenizer.eos_id == family.ambiguous_end:
            raise UserError(f"transformers takes eos_token_id={tokenizer.eos_id} of {family.architecture} for the "
                            "highest number of a text, and it is this tokenizer's end token: export needs another")
        ids = {f"{which}_token_id": getattr(tokenizer, f"{which}_id") for which in ("bos", "eos", "pad")}
        settings |= ids
        if "text_config" in settings:   # where the towers of texts look
            settings["text_config"] |= ids
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = pathlib.Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    except OSError as e:
        raise UserError(f"{folder}: cannot be made ({e.strerror}: {e.filename}); name another folder") from None
    try:
        if sentences.FILE in settings:
            sentences.write(made, settings.pop(sentences.FILE), model.stacks["model"].embed_dim)
        for file in family.files:
            if file in settings:
                write_json(made / file, settings.pop(file))
        write_json(made / "config.json", settings)
        weights.save(made, family, model, names, file_bytes)
        framed = sentences.FILE in family.files
        note = "no tokenizer" if tokenizer is None else tokenizer_files.save(made, tokenizer, framed)
        made.chmod(0o755)   # mkdtemp's is private
        made.replace(folder)
    except BaseException as e:
        shutil.rmtree(made)
        if isinstance(e, OSError):
            raise UserError(f"{folder}: cannot be written ({e.strerror}: {e.filename}); nothing is left of it") from e
        raise
    return note

"""The files of sentence-transformers beside a model's: what becomes of its hidden states, and where texts are cut."""

import json

from fm_jax.errors import UserError, choose
from fm_jax.hf import safetensors
from fm_jax.hf.json_files import read_json, write_json

FILE = "modules.json"     # by which such a folder is known
DENSE = "2_Dense"         # where ours have a projection
POOLINGS = {"mean": "mean", "max": "max", "cls": "cls", "lasttoken": "last"}
# As older folders spell it, each True or False.
_MODES = {"mean": "mean_tokens", "max": "max_tokens", "cls": "cls_token", "lasttoken": "lasttoken",
          "mean_sqrt_len_tokens": "mean_sqrt_len_tokens", "weightedmean": "weightedmean_tokens"}
_ACTIVATIONS = {"torch.nn.modules.linear.Identity": "none", "torch.nn.modules.activation.Tanh": "tanh"}
_TYPES = ("Transformer", "Pooling", "Dense", "Normalize")   # in this order


def read(folder) -> tuple[dict, dict]:
    """Returns (settings, {key: safetensors.Entry} of the projection).

    settings: pooling, normalize, max_seq_length, prompt, projection_dim, projection_activation and projection_bias, as
    the objective's arguments; those that the folder does not say are left out.

    Raises:
      UserError: a module or setting that cannot be honoured.
    """
    place = folder / FILE
    try:
        modules = [(m["type"].rpartition(".")[2], folder / m["path"]) for m in json.loads(place.read_bytes())]
    except (ValueError, TypeError, KeyError) as e:
        raise UserError(f"{place}: not a list of modules ({type(e).__name__}: {e})") from None
    kinds = [choose(kind, _TYPES, f"{place}: type of a module") for kind, _ in modules]
    if kinds != sorted(set(kinds), key=_TYPES.index) or kinds[:2] != ["Transformer", "Pooling"]:
        raise UserError(f"{place}: modules {', '.join(kinds)}: expected {', '.join(_TYPES)}, of which the last two may "
                        "be left out")
    own = dict(modules)
    if own["Transformer"].resolve() != folder.resolve():
        raise UserError(f"{place}: the model is in {own['Transformer']}, and its files are expected beside {FILE}")
    optional = lambda path: read_json(path) if path.is_file() else {}
    settings = {"pooling": _pooling(own["Pooling"] / "config.json"), "normalize": "Normalize" in own}
    text = optional(folder / "sentence_bert_config.json")
    if text.get("do_lower_case"):
        raise UserError(f"{folder / 'sentence_bert_config.json'}: this model cannot be computed here with "
                        "do_lower_case=True, apart from what the tokenizer does")
    longest = text.get("max_seq_length") or optional(folder / "tokenizer_config.json").get("model_max_length")
    if longest:
        settings["max_seq_length"] = int(min(longest, 1 << 30))   # none: 1e30
    more = optional(folder / "config_sentence_transformers.json")
    if name := more.get("default_prompt_name"):
        settings["prompt"] = more["prompts"][name]
    if "Dense" not in own:
        return settings, {}
    place = own["Dense"] / "config.json"
    dense = read_json(place)
    if dense.get("use_residual") or dense.get("module_input_name", "sentence_embedding") != "sentence_embedding":
        raise UserError(f"{place}: this model cannot be computed here with a projection other than one of the "
                        "sentence's vector")
    kind = choose(dense.get("activation_function"), _ACTIVATIONS, f"{place}: activation_function")
    settings |= {"projection_dim": dense["out_features"], "projection_bias": dense.get("bias", True),
                 "projection_activation": _ACTIVATIONS[kind]}
    return settings, {f"{DENSE}/{key}": entry for key, entry in safetensors.read_folder(own["Dense"]).items()}


def _pooling(path):
    settings = read_json(path)
    if not (mode := settings.get("pooling_mode")):
        mode = [kind for kind, key in _MODES.items() if settings.get(f"pooling_mode_{key}")]
    modes = mode if isinstance(mode, list) else [mode]
    if len(modes) != 1:
        raise UserError(f"{path}: this model cannot be computed here with the poolings {', '.join(modes) or 'none'}")
    return POOLINGS[choose(modes[0], POOLINGS, f"{path}: pooling")]


def write(folder, settings: dict, embed_dim: int) -> None:
    """Writes what `read` reads, but for the projection's weights."""
    dim = settings["projection_dim"]
    names = ["Transformer", "Pooling", *["Dense"] * bool(dim), *["Normalize"] * settings["normalize"]]
    paths = ["", *(f"{i}_{name}" for i, name in enumerate(names) if i)]
    for path in paths[1:]:
        (folder / path).mkdir()
    modules = [{"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{name}"}
               for i, (name, path) in enumerate(zip(names, paths))]
    (folder / FILE).write_text(json.dumps(modules, indent=2) + "\n", encoding="utf-8")
    mode = {ours: theirs for theirs, ours in POOLINGS.items()}[settings["pooling"]]
    write_json(folder / paths[1] / "config.json", {"word_embedding_dimension": embed_dim, **{
        f"pooling_mode_{key}": kind == mode for kind, key in _MODES.items()}})
    if dim:
        activation = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}[settings["projection_activation"]]
        write_json(folder / DENSE / "config.json", {
            "in_features": embed_dim, "out_features": dim, "bias": settings["projection_bias"],
            "activation_function": activation})
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": settings["max_seq_length"],
                                                      "do_lower_case": False})
    prompts = {"default": settings["prompt"]} if settings["prompt"] else {}
    write_json(folder / "config_sentence_transformers.json", {
        "prompts": prompts, "default_prompt_name": "default" if prompts else None, "similarity_fn_name": "cosine"})

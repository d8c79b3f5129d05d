"""How a family's tensors and settings are written down, and what its tables may say."""

from typing import Callable, NamedTuple

from fm_jax.architecture import Architecture
from fm_jax.hf import sentences


ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "silu": "silu",
               "swish": "silu", "relu": "relu", "quick_gelu": "quick_gelu"}
# Of config.json in any family: names, special tokens, precision (the files have their own), generation, caching.
HARMLESS = frozenset((
    "model_type", "architectures", "transformers_version", "_name_or_path", "torch_dtype", "dtype", "bos_token_id",
    "eos_token_id", "pad_token_id", "unk_token_id", "use_cache", "initializer_range", "task_specific_params",
    "transformers.js_config", "_attn_implementation_autoset", "output_attentions", "output_hidden_states",
    "output_past", "return_dict", "gradient_checkpointing", "id2label", "label2id", "problem_type",
    "chunk_size_feed_forward"))


class Row(NamedTuple):
    """A parameter of ours in a tensor of the family.

    Letters: those of model.py, and P positions, Y token types, U the width once more, M hidden channels of an expert,
    Q and R channels of all heads and of all kv heads. Letters that share an axis of the tensor are merged there, the
    first outermost. "+" marks the axis along which the rows that share a tensor follow each other; "K:+H" that they do
    so for each K in turn; "1" an axis of one. No row has a letter twice.
    """

    key: str       # of the tensor; {}: the layer, {e}: the expert
    axes: str      # of the tensor, separated by spaces
    name: str      # of our parameter
    letters: str   # axes of our parameter, behind those of the layers and experts
    stack: str = "model"   # section of the config whose sizes the letters and layers are


class Model(NamedTuple):
    """What a folder's settings describe, in the words of a run's config."""

    objective: str
    stacks: dict[str, Architecture]   # by section of the config: "model", and "encoder" of a second one
    args: dict                        # of objective_args, those that the family's table names
    keys: dict                        # of the config itself, such as seq_len, the same


class Family(NamedTuple):
    """A key of config.json names what is deeper or in another file by a path: "text_config/hidden_size",
    "preprocessor_config.json/size". A field is one of Architecture in the config's section `model`; of another section
    it names that too: "encoder.num_layers", "objective_args.patch_size"; "config.seq_len" is one of the config itself.
    """

    architecture: str                  # the class in transformers, as config.json names it
    prefix: str                        # of the keys; files of a bare model without head lack it
    rows: tuple[Row, ...]
    fixed: dict                        # fields that all its models share
    # (key of config.json, field, default of the key), and where the two are not the same number: (function of the key's
    # value, function of the field's Architecture (or objective_args) that gives it back; None: the key is written
    # already).
    settings: tuple[tuple, ...]
    outer: str = ""                    # prefix that keys have in files of a full model, whose head is left out here
    model_type: str = ""               # as config.json names it; "": the family's name
    when: Callable[[dict], bool] | None = None   # of config.json: whether it is this one of those of its class
    aliases: dict = {}                 # other keys of config.json, by which some versions of transformers write it
    only: dict = {}                    # key of config.json: the one value that we honour, which is its default
    harmless: tuple[str, ...] = ()     # keys of config.json that change no logits
    windows: "Windows | None" = None   # None: every layer is global
    rope_theta: tuple[str, float] = ("rope_theta", 10000.0)   # key of config.json, and its default
    rope_frac: tuple[str, float] = ("", 1.0)                  # the same of rope_frac; "": all channels are rotated
    rope_local_theta: str = ""         # key of config.json: theta of local layers
    buffers: str = "(?!)"              # pattern of tensors that are no parameters, or another head's
    copies: dict = {}                  # tensor: the one of the table that it may repeat, to the byte
    objective: str = "fm_jax.objectives.causal_lm.CausalLM"
    ambiguous_end: int | None = None   # eos_token_id that transformers takes for the highest of a text's tokens
    has_text: bool = True              # False: there is no tokenizer
    files: tuple[str, ...] = ()        # JSON files beside config.json that hold settings
    # What the tables cannot say: of the settings by key and the place, more fields; and of the Model, their keys back.
    read: Callable[[dict, str], dict] | None = None
    keys: tuple[str, ...] = ()         # that `read` reads
    args: tuple[str, ...] = ()         # fields of objective_args that only `read` gives
    write: Callable[[Model], dict] | None = None
    sizes: Callable[[Model], dict] | None = None   # of letters of its own in rows

    @property
    def stacks(self) -> tuple[str, ...]:
        """Sections of the config that hold an Architecture of its models."""
        fields = [*self.fixed, *(field for _, field, *_ in self.settings)]
        others = {field.rpartition(".")[0] for field in fields} - {"", "model", "objective_args", "config"}
        return ("model", *sorted(others))


class Windows(NamedTuple):
    """Which layers are local, where `sliding_window` is set and `layer_types` does not say."""

    local: Callable[[dict, int], bool]   # of (config.json, number of the layer)
    default: int | None = 4096           # of sliding_window
    switch: bool = False                 # use_sliding_window must be set too
    by_layer: bool = False               # config.json has layer_types
    keys: tuple[str, ...] = ()           # what `local` reads
    key: str = "sliding_window"
    ways: tuple | None = None            # where the key's number is not ours: (function of it, function back)


def weight_and_bias(key, axes, name, letters, bias=None):
    """Returns the rows of a product or norm that adds a bias. bias: (axes, name, letters) of it, default a norm's."""
    bias = bias or (axes, name.removesuffix("scale") + "bias", letters)
    return Row(key + ".weight", axes, name, letters), Row(key + ".bias", *bias)


# Of a sentence encoder: the keys are those that `sentences.read` gives.
_SENTENCES = tuple((f"{sentences.FILE}/{key}", f"objective_args.{key}", default) for key, default in (
    ("pooling", "mean"), ("normalize", False), ("prompt", ""), ("projection_dim", 0),
    ("projection_activation", "tanh"), ("projection_bias", True)))
_CUT = (f"{sentences.FILE}/max_seq_length", "config.seq_len", 1 << 30)   # that of the model, at most


def sentence_encoder(name: str, family: Family, architecture: str, buffers: str = "(?!)") -> Family:
    """Returns the family, called `name`, without its head: what sentence-transformers makes vectors of texts with."""
    rows = [row._replace(key=row.key.removeprefix(family.prefix)) for row in family.rows
            if row.key.startswith(family.prefix)]
    weight, bias = weight_and_bias(f"{sentences.DENSE}/linear", "Z D", "projection", "DZ",
                                   ("Z", "projection_bias", "Z"))
    sizes = lambda model: {"Z": model.args["projection_dim"], **(family.sizes(model) if family.sizes else {})}
    return family._replace(
        architecture=architecture, prefix="", outer=family.prefix, rows=(*rows, weight, bias), model_type=name,
        fixed=family.fixed | {"head_transform": False, "tie_embeddings": True},
        settings=(*(s for s in family.settings if s[1] != "tie_embeddings"), *_SENTENCES, _CUT),
        only={k: v for k, v in family.only.items() if k != "tie_word_embeddings"},
        harmless=(*family.harmless, "tie_word_embeddings"), buffers=buffers, files=(sentences.FILE,),
        sizes=sizes,
        objective="fm_jax.objectives.text_embedding.TextEmbedding")

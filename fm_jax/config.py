"""Every setting of a run, with its default, and how command lines turn into one.

Layer 0, above `errors` and `architecture`; never imports jax, so that `--help` is quick.
`configs/*.py` start from `defaults()` and change what they need; an unknown key anywhere is an
error that names the nearest known one.

`ml_collections.config_flags` is not used: it prints a traceback for a mistyped key, reports a
missing file only at its first use, and loads by `load_module`, which Python 3.15 drops.

Try:  python -m fm_jax.train --config configs/causal_lm.py:small --workdir runs/x --config.seed=1
"""

import ast
import copy
import dataclasses
import difflib
import importlib.util
import inspect
import json
import os
import re
import sys
import textwrap

import ml_collections
from absl import flags, logging
from ml_collections import config_dict

from fm_jax.architecture import Architecture
from fm_jax.errors import UserError, choose

CHOICES = {
    "optimizer.name": ("adamw", "lion", "adafactor", "muon"),
    "optimizer.schedule": ("cosine", "wsd", "linear", "constant"),
    "optimizer.moment_dtype": ("float32", "bfloat16"),
    "optimizer.offload": ("none", "host"),
    "checkpoint.on_corrupt": ("stop", "previous"),
    "adapt.quantize": ("", "int8", "int4", "nf4"),
    "quantized": ("", "int8", "int4", "nf4"),
}
# Sections whose keys depend on another value. Those of `encoder` are of `model` and checked here, the others where used.
OPEN = ("objective_args", "encoder", "model.rope_scaling")


def defaults() -> ml_collections.ConfigDict:
    """Returns a new config with every key a run knows. This function is the reference of the keys.

    The config is locked: setting an unknown key raises. Sections in `OPEN` take any key.
    """
    c = ml_collections.ConfigDict()
    c.name = ""                          # free text, shown in logs
    c.hf_family = ""                     # of the weights it began with: an export takes it; "": the first that fits
    c.objective = "fm_jax.objectives.causal_lm.CausalLM"   # import path of the objective
    c.objective_args = ml_collections.ConfigDict()          # keyword arguments of the objective; each config lists them
    c.seed = 0                           # of parameters, data order, dropout: the whole run
    c.steps = _either(1000)              # length of the run: 1000, "2e9 tokens", "3 epochs"
    c.batch_size = 32                    # examples (sequences) per optimizer step, over all hosts
    c.seq_len = 256                      # tokens per example
    c.accumulation_steps = 1             # microbatches per step; equal to the large batch exactly
    c.xla_flags = "auto"                 # compiler options for the chip, see xla_flags.py; none; auto,NAME=VALUE,...
    c.quantized = ""                     # how its matrices are stored: int8, int4, nf4; set by convert --quantize
    c.compiled_step = ""                 # file of plan --compiled_step: start with its program instead of compiling

    # See architecture.py. Its field defaults, not an instance's values: a 0 there is derived from the other fields.
    c.model = ml_collections.ConfigDict({
        f.name: f.default if f.default is not dataclasses.MISSING else f.default_factory()
        for f in dataclasses.fields(Architecture)})

    # Of an objective with two stacks, whose decoder is `model`: what its encoder has otherwise, such as num_layers.
    c.encoder = ml_collections.ConfigDict()

    c.data = d = ml_collections.ConfigDict()
    d.train = ""                         # a prepared folder, or a mixture "data/a:0.7,data/b:0.3"
    d.validation = ""                    # default: the held-out split of `train`; apart: "english=data/a,code=data/b"
    d.tokenizer = ""                     # default: the tokenizer stored with the prepared data
    d.prefetch_batches = 2               # batches made ahead of the step, by threads

    c.optimizer = o = ml_collections.ConfigDict()
    o.name = "adamw"                     # adamw, lion, adafactor, muon
    o.learning_rate = 1e-3               # peak
    o.schedule = "cosine"                # cosine, wsd, linear, constant
    o.warmup_steps = _either("2%")       # 100, "1e8 tokens", "2%" of the run
    o.decay_steps = _either("20%")       # wsd: length of the final decay
    o.final_learning_rate_frac = 0.1     # of the peak, at the end of cosine, linear and wsd
    o.b1 = 0.9
    o.b2 = 0.95
    o.eps = 1e-8
    o.layer_decay = 1.0                  # a layer's rate is this times that of the next one; embeddings come first
    o.weight_decay = 0.1                 # decoupled, times the learning rate
    o.no_decay = (".*(scale|bias|magnitude)",)     # parameter-name patterns (full match) without weight decay
    o.clip_norm = 1.0                    # global gradient norm; 0: off
    o.ema_decay = 0.0                    # EMA of the parameters; 0: off
    o.muon_learning_rate = 0.02          # muon: peak for the matrices; the rest follows adamw's
    o.moment_dtype = "float32"           # of the first moment
    o.offload = "none"                   # host: the optimizer's state is on the device during its update alone

    c.adapt = a = ml_collections.ConfigDict()   # of the base `checkpoint.init_from`; patterns of names, full match
    a.freeze = ()                        # parameters that do not train; default none, but with `lora` the whole base
    a.lora = ()                          # frozen matrices that get a low-rank addition, which trains
    a.lora_rank = 8                      # columns of the one factor of the addition, rows of the other
    a.lora_alpha = 16.0                  # the addition is times lora_alpha / lora_rank,
    a.lora_rank_stabilized = False       # or lora_alpha / sqrt(lora_rank) (arXiv:2312.03732)
    a.lora_dropout = 0.0                 # of a matrix's inputs, for the addition
    a.dora = False                       # the norm of each column trains too (arXiv:2402.09353)
    a.quantize = ""                      # how frozen matrices are kept: int8, int4, nf4 (arXiv:2305.14314)

    c.mesh = m = ml_collections.ConfigDict()   # devices per axis; -1: all that remain
    m.slice = 1                          # slices or hosts joined by a slow network: gradients alone cross it
    m.data = -1                          # copies of the model, each with its part of the batch
    m.stage = 1                          # pipeline stages: each has some of the layers
    m.fsdp = 1                           # parts of the parameters and of the batch
    m.expert = 1                         # parts of the experts, and of the batch
    m.context = 1                        # parts of each sequence
    m.tensor = 1                         # parts of heads, mlp and vocabulary

    c.checkpoint = k = ml_collections.ConfigDict()
    k.every = _either("10%")             # steps between saves: 500, "1e9 tokens", "10%"
    k.keep_last = 2
    k.keep_every = 0                     # also keep every multiple of this many steps; 0: none
    k.keep_best = 0                      # also keep the n best by `best_metric`
    k.best_metric = "validation/loss"    # lowest is best
    k.on_corrupt = "stop"                # newest checkpoint unreadable: stop, or previous (use the newest good one)
    k.asynchronous = True
    k.continue_from = ""                 # another run's folder: state and step continue from its newest
    k.init_from = ""                     # another run's folder: parameters only, step 0
    k.init_pattern = ".*"                # which parameters `init_from` gives (full match)

    c.eval = e = ml_collections.ConfigDict()
    e.every = _either("10%")             # steps between validations; the last step has one too. 0: none at all
    e.batches = 0                        # validation batches; 0: the whole held-out split
    e.tasks = ()                         # tasks of fm_jax.evaluate on the way: piqa,mmlu_*,path/to/task.yaml
    e.tasks_every = _either("25%")       # steps between these, and after the last one
    e.tasks_limit = 0                    # only so many documents of each; 0: all

    c.log = g = ml_collections.ConfigDict()
    g.every = 10                         # steps between lines of metrics
    g.tensorboard = True
    g.progress = True                    # a progress bar on a terminal

    c.health = h = ml_collections.ConfigDict()
    h.skip_grad_norm_factor = 0.0        # skip a step whose gradient norm exceeds this times its running mean; 0: off
    h.skip_grad_norm_warmup_steps = 100  # no skipping before this step
    h.hang_timeout_s = 3600.0            # a step, save or validation that takes longer ends the run; 0: off
    return _lock(c)


def encoder(config: ml_collections.ConfigDict) -> Architecture:
    """Returns the encoder beside `config.model`: `config.encoder`, and what it does not name as there.

    Raises: UserError where a key or value of `config.encoder` is none of an Architecture.
    """
    _check_encoder(config.encoder, "config")
    fields = {**config.model.to_dict(), "causal": False, "cross_attention": False, **config.encoder.to_dict()}
    try:
        return Architecture(**fields)
    except UserError as e:
        raise UserError(f"config.encoder, with what it does not name as in config.model: {e}") from None


def _check_encoder(section, where):
    for name in section:
        choose(name, [f.name for f in dataclasses.fields(Architecture)], f"{where}: key of encoder")


def _lock(config):
    """Returns `config`, locked but for its open sections."""
    config.lock()
    for section in OPEN:
        _walk(config, section).unlock()
    return config


def _either(value):
    """Returns a config value that may later be an int or a string (see `duration`)."""
    return config_dict.FieldReference(value, field_type=object)


# --- Durations


def duration(value, *, batch_size: int, seq_len: int, total_steps: int | None = None,
             examples_per_epoch: int | None = None, what: str) -> int:
    """Returns the optimizer steps, an int >= 0, that `value` lasts; more than nothing is at least 1 step.

    `value` is a number of steps (int or text), or "1000 steps", "2e9 tokens", "5000 examples",
    "3 epochs" (needs `examples_per_epoch`) or "2%" of the run (needs `total_steps`). `what` is the
    key that errors name.

    Raises: UserError where `value` is none of these, negative, or lacks what its unit needs.
    """
    number, unit = _parse_duration(value, what)
    if unit == "step":
        if number != int(number):
            raise UserError(f"{what}={value!r}: steps must be a whole number")
        return int(number)
    if unit == "%" and total_steps is None:
        raise UserError(f"{what}={value!r}: a percentage needs the length of the run; give steps or tokens")
    if unit == "epoch" and examples_per_epoch is None:
        raise UserError(f"{what}={value!r}: epochs need a data set of known size; give steps or tokens")
    steps = {"token": lambda: number / (batch_size * seq_len), "example": lambda: number / batch_size,
             "epoch": lambda: number * examples_per_epoch / batch_size, "%": lambda: total_steps * number / 100}[unit]()
    return max(1, round(steps)) if number > 0 else 0


def _parse_duration(value, what):
    """Returns (number, unit), unit one of "step", "token", "example", "epoch", "%"."""
    match = re.fullmatch(r"\s*([0-9][0-9_]*\.?[0-9]*(?:e\+?[0-9]+)?)\s*(%|[a-z]*)\s*", str(value))
    unit = match and (match[2] or "step").removesuffix("s")
    if isinstance(value, bool) or unit not in ("step", "token", "example", "epoch", "%") or float(match[1]) > 1e18:
        raise UserError(f"{what}={value!r}: expected 1000, '1000 steps', '2e9 tokens', '5000 examples', '3 epochs' "
                        "or '2%'")
    return float(match[1]), unit


# --- From files and text to configs


def from_file(spec: str, overrides=None) -> ml_collections.ConfigDict:
    """Returns the config that `spec`, "FILE.py" or "FILE.py:ARG", describes, with `overrides` set.

    FILE defines `get_config()`; with ARG, `get_config(ARG)` is called. `overrides`: see `override`.

    Raises: UserError where the file is missing or sets an unknown key or a value of another type.
    """
    module, path, arg = _load_file(spec)
    if not hasattr(module, "get_config"):
        raise UserError(f"{path}: a config file must define get_config(arg)")
    try:
        inspect.signature(module.get_config).bind(*arg)
    except TypeError as e:
        raise UserError(f"--config={spec}: get_config() of {path} and the argument {arg[0] if arg else ''!r} after the "
                        f"colon do not go together ({e})") from None
    try:
        config = module.get_config(*arg)
    except (AttributeError, KeyError, TypeError) as e:
        raise _config_file_error(e, path) or e
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError(f"{path}: get_config() must return a ConfigDict, made by fm_jax.config.defaults()")
    return override(config, overrides or {})


def sweep(spec: str) -> list[tuple[str, ml_collections.ConfigDict]]:
    """Returns (name, config) for each dict of overrides that `sweep()` of the config file yields.

    The name lists the overrides, as in "learning_rate=0.001,seed=1", and can serve as a folder name.

    Raises: UserError where the file has no `sweep()`, or as `from_file`.
    """
    module, path, _ = _load_file(spec)
    if not hasattr(module, "sweep"):
        raise UserError(f"{path}: no sweep() here; define one that yields dicts such as "
                        "{'optimizer.learning_rate': 1e-3}")
    name = lambda changes: re.sub(r"[^\w.,=+-]+", "_", ",".join(f"{k.split('.')[-1]}={v}" for k, v in changes.items()))
    return [(name(changes), from_file(spec, changes)) for changes in module.sweep()]


def override(config: ml_collections.ConfigDict, changes) -> ml_collections.ConfigDict:
    """Returns `config`, changed in place: `changes` maps dotted keys to values, or to text for one.

    Text is read by the type of the key's present value: tuples as Python literals or a,b,c.

    Raises: UserError where a key is unknown, naming the nearest, or a value has the wrong type.
    """
    for key, value in changes.items():
        section, _, leaf = key.rpartition(".")
        if section == "encoder":
            choose(leaf, config.model, "key of config.encoder")
            config.encoder[leaf] = _convert(value, config.model[leaf], config.model.get_type(leaf), f"config.{key}")
            continue
        if key not in _flatten(config, sections=True) and section not in OPEN:
            raise UserError(f"unknown config key {key!r}{_did_you_mean(key, config)}")
        holder = _walk(config, section)
        if leaf not in holder:
            holder[leaf] = _literal(value) if isinstance(value, str) else value
        elif isinstance(holder[leaf], ml_collections.ConfigDict) and key not in OPEN:
            raise UserError(f"config.{key} is a section: set one of its keys ({', '.join(sorted(holder[leaf]))})")
        else:
            holder[leaf] = _convert(value, holder[leaf], holder.get_type(leaf), f"config.{key}")
    return config


def resolve(config: ml_collections.ConfigDict, *, examples_per_epoch: int | None = None) -> ml_collections.ConfigDict:
    """Returns a checked copy, durations in steps and the model's derived sizes filled in.

    Durations that need the data's size stay text until `examples_per_epoch` is given.

    Raises: UserError where a key is unknown or missing, or a value out of range.
    """
    c = copy.deepcopy(config)
    _check_keys(c, "config")
    missing = sorted(set(_flatten(defaults())) - set(_flatten(c)) - set(_open_keys(defaults())))
    if missing:
        raise UserError(f"config: missing keys {', '.join(missing)}; start from fm_jax.config.defaults()")
    for key, options in CHOICES.items():
        choose(_walk(c, key), options, f"config.{key}")
    if c.encoder:   # before the model's derived sizes are its own
        c.encoder = ml_collections.ConfigDict(dataclasses.asdict(encoder(c)))
    c.model = ml_collections.ConfigDict(dataclasses.asdict(Architecture(**c.model.to_dict())))

    def require(key, ok, rule):
        if not ok(_walk(c, key)):
            raise UserError(f"config.{key}={_walk(c, key)!r} {rule}")

    for key in ("batch_size", "seq_len", "accumulation_steps", "log.every"):
        require(key, lambda v: v >= 1, "must be at least 1")
    for key in ("data.prefetch_batches", "optimizer.weight_decay", "optimizer.clip_norm", "optimizer.eps",
                "optimizer.learning_rate", "optimizer.muon_learning_rate", "checkpoint.keep_every",
                "checkpoint.keep_best", "eval.batches", "eval.tasks_limit", "health.skip_grad_norm_factor",
                "health.hang_timeout_s"):
        require(key, lambda v: 0 <= v < float("inf"), "must be 0 or more, and finite")
    require("seed", lambda v: 0 <= v < 2 ** 32, "must be from 0 to 2**32 - 1")
    for key in ("optimizer.b1", "optimizer.b2", "optimizer.ema_decay"):
        require(key, lambda v: 0 <= v < 1, "must be in [0, 1)")
    require("optimizer.final_learning_rate_frac", lambda v: 0 <= v <= 1, "must be in [0, 1]")
    require("optimizer.layer_decay", lambda v: 0 < v <= 1, "must be above 0, and at most 1")
    require("adapt.lora_rank", lambda v: v >= 1, "must be at least 1")
    require("adapt.lora_dropout", lambda v: 0 <= v < 1, "must be in [0, 1)")
    require("checkpoint.keep_last", lambda v: v >= 1, "must be at least 1, or the run could not continue")
    require("batch_size", lambda v: v % c.accumulation_steps == 0,
            f"must be divisible by config.accumulation_steps={c.accumulation_steps}")
    require("seq_len", lambda v: v <= c.model.max_seq_len,
            f"exceeds config.model.max_seq_len={c.model.max_seq_len}; raise that or shorten this")
    for axis in c.mesh:
        require(f"mesh.{axis}", lambda v: v >= 1 or v == -1, "must be a number of devices, or -1 for all that remain")
    if sum(size == -1 for size in c.mesh.values()) > 1:
        raise UserError(f"config.mesh={c.mesh.to_dict()}: only one axis can be -1")

    total = None
    for key in ("steps", "optimizer.warmup_steps", "optimizer.decay_steps", "checkpoint.every", "eval.every",
                "eval.tasks_every"):
        value, what = _walk(c, key), f"config.{key}"
        _, unit = _parse_duration(value, what)
        if (unit == "epoch" and examples_per_epoch is None) or (unit == "%" and key != "steps" and total is None):
            continue
        steps = duration(value, batch_size=c.batch_size, seq_len=c.seq_len, total_steps=total,
                         examples_per_epoch=examples_per_epoch, what=what)
        override(c, {key: steps})
        if key in ("steps", "checkpoint.every", "eval.tasks_every"):
            require(key, lambda v: v >= 1, "must be at least one step")
        if key == "steps":
            total = steps
    return _lock(c)


def save(config: ml_collections.ConfigDict, path) -> None:
    """Returns nothing; writes `config` as JSON. Tuples survive; lists come back as tuples."""
    text = json.dumps(config.to_dict(), indent=2)
    with open(path, "w", encoding="utf-8") as f:
        f.write(text + "\n")


def load(path) -> tuple[ml_collections.ConfigDict, list[str]]:
    """Returns (config, filled): a config that `save` wrote, and the keys it lacked.

    A lacking key, of an older run, has today's default; the caller says so to the user.

    Raises: UserError where the file is missing, is no JSON object, has keys unknown today (of a
    newer run), or a value of another type.
    """
    from fm_jax import storage   # etils: 0.1 s that --help need not pay

    try:
        stored = json.loads(storage.place(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; is this a run folder?") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: not a JSON config ({e})") from None
    if not isinstance(stored, dict):
        raise UserError(f"{path}: not a config, but a JSON {type(stored).__name__}")
    stored = ml_collections.ConfigDict(_tuples(stored))
    _check_keys(stored, str(path))
    config = defaults()
    for section in OPEN:
        if section in _flatten(stored, sections=True):
            override(config, {section: _walk(stored, section).to_dict()})
    values = _flatten(stored)
    override(config, {k: v for k, v in values.items() if k not in _open_keys(stored)})
    return config, sorted(set(_flatten(defaults())) - set(values) - set(_open_keys(defaults())))


def _load_file(spec):
    """Returns (module, path, (arg,) or ()) of "FILE.py" or "FILE.py:ARG"."""
    path, colon, arg = str(spec).partition(":")
    if not os.path.isfile(path):
        folder = os.path.dirname(path) or "."
        folders = [folder] if os.path.isdir(folder) else [d.name for d in os.scandir(".") if d.is_dir()]
        folders = [d for d in folders if os.access(d, os.R_OK)]
        names = [os.path.normpath(os.path.join(d, n)) for d in folders for n in os.listdir(d) if n.endswith(".py")]
        near = difflib.get_close_matches(path, names, n=1, cutoff=0.5)
        raise UserError(f"--config: no file {path!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    module_spec = importlib.util.spec_from_file_location("fm_jax_config_file", path)
    if module_spec is None:
        raise UserError(f"--config: {path!r} is not a Python file; expected FILE.py or FILE.py:ARG")
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module, path, (arg,) if colon else ()


def _config_file_error(error, path):
    """Returns a UserError if a ConfigDict raised `error` on behalf of the config file, else None."""
    frames, tb = [], error.__traceback__
    while tb:
        frames.append((tb.tb_frame.f_code.co_filename, tb.tb_lineno))
        tb = tb.tb_next
    if os.path.basename(frames[-1][0]) != "config_dict.py":
        return None
    line = [line for name, line in frames if os.path.abspath(name) == os.path.abspath(path)][-1]
    text = str(error.args[0])
    key = re.match(r"""\W*(?:Key )?["']+(\w+)["']""", text)
    if isinstance(error, TypeError) or not key:
        return UserError(f"{path}:{line}: {text}")
    return UserError(f"{path}:{line}: unknown config key {key[1]!r}{_did_you_mean(key[1], defaults())}")


def _convert(value, current, kind, what):
    """Returns `value`, or what it says if it is text, as the type `kind` of `current`."""
    try:
        converted = _read(value, kind) if isinstance(value, str) and kind is not str else value
        if kind is float and type(converted) is int:
            converted = float(converted)
        if kind is tuple and isinstance(converted, list):
            converted = tuple(converted)
        if issubclass(kind, ml_collections.ConfigDict):
            converted = ml_collections.ConfigDict(converted)
        right = type(converted) in (int, str) if kind is object else isinstance(converted, kind)
        if not right or (kind is int and isinstance(converted, bool)):
            raise TypeError
        if kind is tuple and current and not all(isinstance(v, type(current[0])) for v in converted):
            raise TypeError
    except (ValueError, TypeError, SyntaxError, OverflowError, AttributeError):
        names = {object: "int or text", tuple: "tuple", ml_collections.ConfigDict: "dict"}
        expected = names.get(kind, kind.__name__)
        if kind is tuple and current:
            expected += f" of {type(current[0]).__name__}"
        raise UserError(f"{what}={value!r}: expected {expected}, such as {_show(current)}") from None
    return converted


def _read(text, kind):
    """Returns the value that `text` says. Raises ValueError, TypeError or SyntaxError if it says none."""
    if kind is bool:
        return {"true": True, "1": True, "false": False, "0": False}.get(text.lower(), text)
    if kind is int:
        return int(text) if re.fullmatch(r"\s*[+-]?[\d_]+\s*", text) else _whole(float(text))
    if kind is float:
        return float(text)
    if kind is object:
        return int(text) if re.fullmatch(r"\s*[\d_]+\s*", text) else text
    if kind is tuple:
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):   # bare words, such as local,global
            value = tuple(word.strip() for word in text.split(",") if word.strip())
        return tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return ast.literal_eval(text)


def _whole(number):
    if number != int(number):
        raise ValueError(number)
    return int(number)


def _literal(text):
    """Returns the Python literal that `text` is, or `text` itself: the type of a new key is not known."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _show(value):
    return repr(value.to_dict() if isinstance(value, ml_collections.ConfigDict) else value)


def _walk(config, key):
    """Returns the value at the dotted `key`; the config itself where `key` is empty."""
    for part in filter(None, key.split(".")):
        config = config[part]
    return config


def _flatten(config, prefix="", sections=False):
    """Returns {dotted key: value}; with `sections`, the sections' own keys too."""
    flat = {}
    for name, value in config.items():
        key = prefix + name
        if isinstance(value, ml_collections.ConfigDict):
            flat |= {key: value} if sections else {}
            flat |= _flatten(value, key + ".", sections)
        else:
            flat[key] = value
    return flat


def _open_keys(config):
    return [k for k in _flatten(config) if k.startswith(tuple(s + "." for s in OPEN))]


def _check_keys(config, where):
    _check_encoder(config.get("encoder", {}), where)
    known, open_keys = _flatten(defaults(), sections=True), _open_keys(config)
    for key in _flatten(config):
        if key not in known and key not in open_keys:
            raise UserError(f"{where}: unknown config key {key!r}{_did_you_mean(key, defaults())}")


def _did_you_mean(key, config):
    near = _near_keys(key, config)
    return f"; did you mean {near[0]!r}?" if near else " (fm_jax/config.py lists them)"


def _near_keys(key, config):
    """Returns [the key of `config` nearest to `key`], or [] where none is near.

    The last word counts most, and initials count (lr, wd): people forget the section first.
    """
    similarity = lambda a, b: difflib.SequenceMatcher(None, a, b).ratio()
    last = key.rpartition(".")[2]

    def score(known):
        name = known.rpartition(".")[2]
        initials = "".join(word[:1] for word in name.split("_"))
        return max(similarity(last, name), 0.8 * (len(last) > 1 and last == initials)) + 0.5 * similarity(key, known)

    near = max(_flatten(config, sections=True), key=score)
    return [near] if score(near) > 0.8 else []


def _tuples(value):
    if isinstance(value, dict):
        return {k: _tuples(v) for k, v in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


# --- Command lines


def define_config(fv: flags.FlagValues, required: bool = True) -> None:
    """Returns nothing; adds `--config FILE.py[:ARG]` to `fv`. `run` turns it into a ConfigDict.

    `run` then also takes `--config.KEY=VALUE` for every key of the config.
    """
    flags.DEFINE_string("config", None, "configuration, FILE.py or FILE.py:ARG; --config.KEY=VALUE changes one key of "
                        "it (--helpfull lists them)", flag_values=fv, required=required)


def run(main, define_flags, doc: str, argv: list[str] | None = None):
    """Returns never: runs `main(flags)` as a command line and exits with its result.

    `define_flags(fv)` adds the command's absl flags to a fresh `flags.FlagValues`; `doc`, the
    module's docstring, is the head of its `--help`. A `UserError`, or a mistake in the command
    line, is one line on stderr and exit code 2; an interrupt exits with 130; other exceptions are
    bugs and keep their traceback.
    """
    argv = sys.argv if argv is None else argv
    # Libraries report at INFO through absl; ours goes to the terminal by print and to metrics.jsonl.
    logging.set_verbosity(logging.WARNING)
    flags.FLAGS.mark_as_parsed()   # Grain's and Orbax's own flags keep their defaults
    fv = flags.FlagValues()
    define_flags(fv)
    try:
        if {"-h", "--help", "-help", "--helpfull", "-helpfull"} & set(argv):
            print(_help(fv, doc, full=any("helpfull" in a for a in argv)))
            sys.exit(0)
        _parse(fv, argv)
        sys.exit(main(fv))
    except UserError as e:
        print("error: " + " ".join(str(e).split()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _parse(fv, argv):
    """Fills `fv` from `argv`; `fv.config`, where defined and given, becomes a ConfigDict."""
    overrides, rest = _split_overrides(argv) if "config" in fv else ({}, argv)
    try:
        positional = fv(rest)[1:]
    except flags.UnrecognizedFlagError as e:
        raise UserError(f"unknown flag --{e.flagname}{_did_you_mean_flag(e.flagname, fv)}") from None
    except flags.Error as e:
        missing = re.match(r"flag --(\w+)=None: .*must have a value other than None", str(e))
        raise UserError(f"--{missing[1]} is required (see --help)" if missing else str(e)) from None
    if positional:
        raise UserError(f"unexpected argument {positional[0]!r}: flags start with --, and values with spaces need "
                        "quotes")
    if "config" in fv:
        if overrides and fv.config is None:
            raise UserError(f"--config.{next(iter(overrides))} changes a key of --config, which is not given")
        if fv.config is not None:
            fv.config = from_file(fv.config, overrides)


def _split_overrides(argv):
    """Returns ({key: text}, the other arguments); --config.a.b=1, --config.a.b 1, --config.flag, --noconfig.flag."""
    overrides, rest, i = {}, [], 0
    known = _flatten(defaults())
    known |= {key.replace("model.", "encoder."): value for key, value in known.items() if key.startswith("model.")}
    while i < len(argv):
        match = re.fullmatch(r"--?(no)?config\.([^=]*)(?:=(.*))?", argv[i], re.DOTALL)
        i += 1
        if not match:
            rest.append(argv[i - 1])
            continue
        no, key, value = match.groups()
        if no:
            value = "false"
        elif value is None and isinstance(known.get(key), bool):
            value = "true"
        elif value is None:
            if i == len(argv):
                raise UserError(f"--config.{key}: a value must follow")
            value, i = argv[i], i + 1
        overrides[key] = value
    return overrides, rest


def _did_you_mean_flag(name, fv):
    near = difflib.get_close_matches(name, list(fv), n=1, cutoff=0.7)
    if not near and "config" in fv:   # --learning_rate, --conifg.seed
        near = [f"config.{key}" for key in _near_keys(name.partition(".")[2] or name, defaults())]
    return f"; did you mean --{near[0]}?" if near else " (see --help)"


def _help(fv, doc, full):
    """Returns the text of `--help`; with `full`, also every config key and its default."""
    lines = [doc.strip(), "", "Flags:"]
    for flag in (fv[name] for name in sorted(fv) if name == fv[name].name):
        head = f"  --[no]{flag.name}" if flag.boolean else f"  --{flag.name}"
        values = getattr(flag.parser, "enum_values", None)
        head += f" {{{','.join(values)}}}" if values else ""
        default = "" if flag.default in (None, "", []) else f" (default: {flag.default})"
        lines += [head, textwrap.fill(flag.help + default, 100, initial_indent=" " * 6, subsequent_indent=" " * 6)]
    if full and "config" in fv:
        lines += ["", "Config keys and their defaults (a config file changes some; fm_jax/config.py explains them):"]
        lines += [f"  --config.{key}={_show(value)}" for key, value in _flatten(defaults()).items()]
        lines.append("  --config.encoder.KEY: as config.model.KEY, for objectives with an encoder beside the model")
    return "\n".join(lines)

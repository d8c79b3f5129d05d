"""What config.json says, in our words, and back, through the tables of a family."""

import math

from fm_jax import config as config_lib
from fm_jax import objectives
from fm_jax.architecture import ROPE_SCALINGS, Architecture
from fm_jax.errors import UserError, choose
from fm_jax.hf import decoders, encoder_decoders, encoders, sentences, vision
from fm_jax.hf.tables import ACTIVATIONS, HARMLESS, Family, Model

# The first that can express a model is the one it is exported as.
FAMILIES: dict[str, Family] = (decoders.FAMILIES | encoders.FAMILIES | encoder_decoders.FAMILIES | vision.FAMILIES)

# Fields of Architecture that say how it is computed, and not what.
COMPUTE = ("dtype", "param_dtype", "matmul_dtype", "remat", "scan_layers", "attention_kernel", "loss_chunk_tokens",
           "dropout", "pipeline_microbatches", "pipeline_repeats")
# Keys of rope_scaling: theirs to ours. `attention_factor` and what else shapes yarn are read below.
_ROPE_KEYS = {"factor": "factor", "low_freq_factor": "low_freq_factor", "high_freq_factor": "high_freq_factor",
              "original_max_position_embeddings": "original_max_seq_len", "beta_fast": "beta_fast",
              "beta_slow": "beta_slow", "attention_factor": "attention_factor"}


# --- In

def find_family(settings: dict, place: str) -> str:
    """Returns the family of a config.json: that of its class, or else the first of its model_type.

    Raises:
      UserError: an unknown model_type.
    """
    kinds = {name: family.model_type or name for name, family in FAMILIES.items()}
    kind = choose(settings.get("model_type"), tuple(dict.fromkeys(kinds.values())), f"{place}: model_type")
    names = [name for name in kinds if kinds[name] == kind
             and (FAMILIES[name].when is None or FAMILIES[name].when(settings))
             and (sentences.FILE not in settings or sentences.FILE in FAMILIES[name].files)]
    if not names:
        raise UserError(f"{place}: no sentence encoder here is a {kind}")
    classes = settings.get("architectures") or ()
    return next((name for name in names if FAMILIES[name].architecture in classes), names[0])


def model_of(settings: dict, place: str) -> Model:
    """Returns what the settings of a folder, read at `place`, describe.

    settings: config.json, and under its name each of the family's other files.

    Raises:
      UserError: an unknown family, or a setting that this model cannot honour.
    """
    family = FAMILIES[find_family(settings, place)]
    known = {key for key, *_ in family.settings} | {*family.harmless, *family.only, *family.keys}
    rope = family.fixed.get("position") == "rope"
    if rope:
        known |= {family.rope_theta[0], family.rope_frac[0], family.rope_local_theta, "rope_scaling", "rope_parameters"}
    if family.windows:
        known |= {family.windows.key, "use_sliding_window", "layer_types", *family.windows.keys}
    settings = {family.aliases.get(key, key): value for key, value in _flat(settings, known)}
    wrong = [f"{k}={v!r}" for k, v in settings.items()
             if k not in known and k.rpartition("/")[2] not in HARMLESS and v is not None]
    wrong += [f"{k}={settings[k]!r}" for k, v in family.only.items() if settings.get(k, v) not in (v, None)]
    if wrong:
        raise UserError(f"{place}: this model cannot be computed here with {', '.join(wrong)}")
    fields, plain = dict(family.fixed), Architecture()
    for key, field, default, *ways in family.settings:
        value, (section, name) = settings.get(key, default), _section(field)
        if name == "activation":
            value = ACTIVATIONS[choose(value, ACTIVATIONS, f"{place}: {key}")]
        kind = type(default if section in ("objective_args", "config") else getattr(plain, name))
        if value is not None and type(value) is not kind and not (kind is float and type(value) is int):
            raise UserError(f"{place}: {key}={value!r}: expected {kind.__name__}")
        # 0: derived from the others, or off
        fields[field] = 0 if value is None else ways[0](value) if ways else value
    if rope:
        fields |= _rope(settings, family, fields["max_seq_len"], place)
    if family.windows:
        fields |= _windows(settings, family.windows, fields["num_layers"], place)
    if family.read:
        fields |= family.read(settings, place)
    sections = {section: {} for section in ("objective_args", "config", *family.stacks)}
    for field, value in fields.items():
        section, name = _section(field)
        sections[section][name] = value
    args, keys = sections.pop("objective_args"), sections.pop("config")
    try:
        return Model(family.objective, {name: Architecture(**own) for name, own in sections.items()}, args, keys)
    except UserError as e:
        raise UserError(f"{place}: {e}") from None


def _section(field):
    """Returns (section of the config, name in it) of a table's field."""
    section, _, name = field.rpartition(".")
    return section or "model", name


def _flat(settings, known, above=""):
    """Yields (key, value), the keys of a dict that holds `known` ones as paths."""
    for key, value in settings.items():
        inside = f"{above}{key}/"
        if isinstance(value, dict) and any(path.startswith(inside) for path in known):
            yield from _flat(value, known, inside)
        else:
            yield above + key, value


LAYER_TYPES = {"full_attention": "global", "sliding_attention": "local"}


def _windows(settings, windows, num_layers, place):
    """Returns the fields layer_pattern and window of Architecture."""
    window = settings.get(windows.key, windows.default)
    if window is None or windows.switch and not settings.get("use_sliding_window", False):
        return {}
    if types := settings.get("layer_types"):
        if len(types) != num_layers:
            raise UserError(f"{place}: layer_types names {len(types)} layers, and there are {num_layers}")
        kinds = tuple(LAYER_TYPES[choose(t, LAYER_TYPES, f"{place}: layer_types")] for t in types)
    else:
        kinds = tuple("local" if windows.local(settings, i) else "global" for i in range(num_layers))
    if "local" not in kinds:
        return {}
    period = next(p for p in range(1, num_layers + 1) if all(kinds[i] == kinds[i % p] for i in range(num_layers)))
    return {"layer_pattern": kinds[:period], "window": windows.ways[0](window) if windows.ways else window}


def _rope(settings, family, max_seq_len, place):
    """Returns the fields of Architecture on rotary positions. The newest spelling is `rope_parameters`."""
    (theta_key, theta), (frac_key, frac) = family.rope_theta, family.rope_frac
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    local = {}
    if family.rope_local_theta:
        by_layer = set(rope) and set(rope) <= set(LAYER_TYPES)
        local = dict(rope.get("sliding_attention") or {}) if by_layer else {}
        rope = (rope.get("full_attention") or {}) if by_layer else rope
        if local.pop("rope_type", "default") != "default":
            raise UserError(f"{place}: this model cannot be computed here with a rope scaling of its local layers")
        local = {"rope_local_theta": float(local.pop("rope_theta", settings.get(family.rope_local_theta) or 1e4))}
    rope = {k: v for k, v in rope.items() if v is not None}
    for key, value in {theta_key: settings.get(theta_key), frac_key: settings.get(frac_key), **rope}.items():
        if value is not None and key not in ("rope_type", "type", "truncate") and type(value) not in (int, float):
            raise UserError(f"{place}: {key}={value!r}: expected a number")
    theta = rope.pop("rope_theta", settings.get(theta_key) or theta)
    frac = rope.pop("partial_rotary_factor", settings.get(frac_key) or frac)
    if frac != 1 and not frac_key:
        raise UserError(f"{place}: this model cannot be computed here with a partial_rotary_factor other than 1")
    kind, _ = rope.pop("rope_type", rope.get("type", "default")), rope.pop("type", None)
    kind = "none" if kind == "default" else choose(kind, ROPE_SCALINGS, f"{place}: rope scaling")
    known = ROPE_SCALINGS.get(kind, {})
    if known and "factor" not in rope:
        raise UserError(f"{place}: rope scaling of type {kind} lacks its factor")
    scaling = {"type": kind, **known}
    if "original_max_seq_len" in known:
        rope.setdefault("original_max_position_embeddings", max_seq_len)
    if kind == "yarn":
        mscales = rope.pop("mscale", None), rope.pop("mscale_all_dim", None)
        if all(mscales) and "attention_factor" not in rope:
            over, under = (0.1 * m * math.log(rope.get("factor", 1)) + 1 for m in mscales)
            rope["attention_factor"] = over / under
        if rope.pop("truncate", True) is not True:
            raise UserError(f"{place}: this model cannot be computed here with truncate=False in its rope scaling")
    for key, value in rope.items():
        if _ROPE_KEYS.get(key) not in known:
            raise UserError(f"{place}: this model cannot be computed here with {key}={value!r} in its rope scaling "
                            f"({kind})")
        scaling[_ROPE_KEYS[key]] = value
    return {"rope_theta": float(theta), "rope_frac": float(frac), "rope_scaling": scaling, **local}


# --- Out

def settings_of(config) -> dict:
    """Returns the config.json of a run's config, without its special tokens, and under its name any other file.

    Rotary settings and dtype are spelt as in transformers 4, which 5 reads too. A family can express a model if what
    it would write is read back as the same model. It is that of `config.hf_family`, or the first that can of those of
    the objective (of all decoders and encoders, where the objective is none of a family's).

    Raises:
      UserError: no family can; the fields that the nearest cannot express are named.
    """
    own = {family.objective for family in FAMILIES.values()}
    failed = {}
    if config.hf_family:
        names = [choose(config.hf_family, FAMILIES, "config.hf_family")]
    else:
        names = [name for name, family in FAMILIES.items() if (
            family.objective == config.objective if config.objective in own else family.stacks == ("model",))]
    for name in names:
        family = FAMILIES[name]
        if config.objective in own and family.objective != config.objective:
            failed[name] = [f"config.objective={config.objective!r}"]
            continue
        model = _model(config, family)
        settings = _express(name, model)
        failed[name] = _lost(name, model, settings)
        if not failed[name]:
            return settings
    nearest = min(failed, key=lambda name: len(failed[name]))
    raise UserError(f"no Hugging Face family here ({', '.join(failed)}) can express this model; {nearest} comes "
                    f"nearest, without {', '.join(failed[nearest])}")


def _model(config, family):
    """Returns the Model of a run's config, in the sections of a family."""
    args = {**objectives.arguments(config.objective), **config.objective_args}
    named = lambda wanted: [name for section, name in map(_section, _fields(family)) if section == wanted]
    stacks = {"model": lambda: Architecture(**config.model.to_dict()), "encoder": lambda: config_lib.encoder(config)}
    return Model(config.objective, {name: stacks[name]() for name in family.stacks},
                 {name: args[name] for name in named("objective_args") if name in args},
                 {name: config[name] for name in named("config")})


def _fields(family):
    return [*family.fixed, *family.args, *(field for _, field, *_ in family.settings)]


def _express(name, model):
    family, arch = FAMILIES[name], model.stacks["model"]
    settings = {"model_type": family.model_type or name, "architectures": [family.architecture]}
    spelt = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}

    def put(key, value):
        *sections, leaf = key.split("/")
        inside = settings
        for section in sections:
            inside = inside.setdefault(section, {})
        inside[leaf] = value

    for key, field, _, *ways in family.settings:
        section, own = _section(field)
        holder = {**model.stacks, "objective_args": model.args, "config": model.keys}[section]
        if not ways:
            value = holder[own] if isinstance(holder, dict) else getattr(holder, own)
            put(key, spelt[value] if own == "activation" else value)
        elif ways[1]:
            put(key, ways[1](holder))
    if family.fixed.get("position") == "rope":
        kind = arch.rope_scaling.get("type", "none")
        values = {**ROPE_SCALINGS.get(kind, {}), **arch.rope_scaling}
        own = {family.rope_theta[0]: arch.rope_theta, family.rope_frac[0]: arch.rope_frac,
               family.rope_local_theta: arch.rope_local_theta}
        settings |= {key: value for key, value in own.items() if key}
        settings["rope_scaling"] = None if kind == "none" else {"rope_type": kind} | {
            theirs: values[ours] for theirs, ours in _ROPE_KEYS.items() if values.get(ours)}
    if family.windows:
        window = family.windows.ways[1](arch.window) if family.windows.ways else arch.window
        settings[family.windows.key] = window if "local" in arch.layer_kinds else None
        if family.windows.switch:
            settings["use_sliding_window"] = "local" in arch.layer_kinds
        if family.windows.by_layer:
            theirs = {ours: theirs for theirs, ours in LAYER_TYPES.items()}
            settings["layer_types"] = [theirs[kind] for kind in arch.layer_kinds]
    for key, value in (family.write(model) if family.write else {}).items():
        put(key, value)
    return settings


def _lost(name, model, settings):
    """Returns [field=value] of a model that its settings in a family do not give back."""
    def meant(a):
        fields = {f: v for f, v in vars(a).items() if f not in COMPUTE}
        kind = a.rope_scaling.get("type", "none")
        local = "local" in a.layer_kinds
        # Of patches, what is of tokens alone; of tokens, what is of patches.
        none = ("vocab_size", "tie_embeddings", "embed_scale", "logit_softcap", "num_token_types", "head_transform")
        return fields | dict.fromkeys(none if a.patch_size else ("channels", "patch_bias")) | {
            "layer_pattern": a.layer_kinds, "window": a.window * local, "rope_local_theta": a.rope_local_theta * local,
            "attention_scale": a.attention_scale or a.head_dim ** -0.5, **(
                {"rope_scaling": {"type": kind, **ROPE_SCALINGS.get(kind, {}), **a.rope_scaling}}
                if a.position == "rope" else {"rope_theta": 0, "rope_frac": 0, "rope_scaling": 0})}

    family, lost = FAMILIES[name], []
    mark = lambda section: "" if section == "model" else f"{section}."
    for section, arch in model.stacks.items():
        if mark(section) + "head_dim" not in _fields(family) and arch.head_dim * arch.num_heads != arch.embed_dim:
            fixed = {own: v for f, v in family.fixed.items() for own in [_section(f)[1]] if _section(f)[0] == section}
            lost += [f"{mark(section)}{f}={getattr(arch, f)!r}"
                     for f in ("head_dim", *(f for f, v in fixed.items() if getattr(arch, f) != v))]
    if lost:
        return lost
    try:
        found = model_of(settings, "config.json")
    except UserError as e:   # what is written means no model, such as rotated heads of an odd size
        return [str(e)]
    for section, arch in model.stacks.items():
        own = meant(found.stacks[section])
        lost += [f"{mark(section)}{f}={getattr(arch, f)!r}" for f, value in meant(arch).items() if own[f] != value]
    lost += [f"objective_args.{name}={value!r}" for name, value in model.args.items() if found.args[name] != value]
    arch = model.stacks["model"]
    if name == "llama" and arch.embed_dim % arch.num_heads:   # refused by LlamaConfig
        lost.append(f"embed_dim={arch.embed_dim} that num_heads={arch.num_heads} does not divide")
    return lost

"""Families of encoders of images, alone or beside one of texts: ViT, CLIP, SigLIP."""

from fm_jax.errors import UserError, choose
from fm_jax.hf.tables import Family, Row, weight_and_bias

_FILE = "preprocessor_config.json"
_FILTERS = {2: "bilinear", 3: "bicubic"}   # as Pillow numbers them
_OTHER_FILTERS = {0: "nearest", 1: "lanczos", 4: "box", 5: "hamming"}
# What that file says beside what is read: names of classes and of programs, and how transformers goes about it.
_HARMLESS = tuple(f"{_FILE}/{key}" for key in (
    "image_processor_type", "feature_extractor_type", "processor_class", "_valid_processor_keys", "do_convert_rgb",
    "data_format", "input_data_format", "device", "default_to_square", "disable_grouping", "return_tensors",
    "do_pad", "pad_size"))
_KEYS = tuple(f"{_FILE}/{key}" for key in (
    "size", "crop_size", "resample", "do_resize", "do_center_crop", "do_normalize", "do_rescale", "rescale_factor",
    "image_mean", "image_std"))
_ARGS = tuple(f"objective_args.{name}" for name in ("image_size", "resize", "filter", "mean", "std"))
_HALF, _CLIP_MEAN, _CLIP_STD = (0.5,) * 3, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

# As transformers' older versions wrote all that a configuration can hold, in the sections of the towers too.
_DUMPED = (
    "add_cross_attention", "bad_words_ids", "begin_suppress_tokens", "cross_attention_hidden_size",
    "decoder_start_token_id", "diversity_penalty", "do_sample", "dropout", "early_stopping",
    "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id",
    "forced_eos_token_id", "initializer_factor", "is_decoder", "is_encoder_decoder", "length_penalty", "max_length",
    "min_length", "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences", "output_scores",
    "prefix", "pruned_heads", "remove_invalid_values", "repetition_penalty", "return_dict_in_generate", "sep_token_id",
    "suppress_tokens", "temperature", "tf_legacy_loss", "tie_encoder_decoder", "tie_word_embeddings", "tokenizer_class",
    "top_k", "top_p", "torchscript", "typical_p", "use_bfloat16", "attention_dropout", "projection_dim")


def _layers(key, ours, stack, *, q, out, norms, mlp):
    """Returns the rows of a stack. key: of its layers; q, out, norms, mlp: below it, q with {} for one of `qkv`."""
    names = {"q": "KGH", "k": "KH", "v": "KH"}
    rows = []
    for (one, heads), theirs in zip(names.items(), q):
        rows += weight_and_bias(key + theirs, f"{heads} D", f"{ours}attention.w{one}", f"D{heads}",
                                (heads, f"{ours}attention.{one}_bias", heads))
    rows += [*weight_and_bias(key + out, "D KGH", ours + "attention.wo", "KGHD", ("D", ours + "attention.o_bias", "D")),
             *weight_and_bias(key + norms[0], "D", ours + "attention_norm.scale", "D"),
             *weight_and_bias(key + norms[1], "D", ours + "mlp_norm.scale", "D"), *_mlp(key, ours, mlp)]
    return [row._replace(stack=stack) for row in rows]


def _mlp(key, ours, names):
    return [*weight_and_bias(key + names[0], "F D", ours + "mlp.w_up", "DF", ("F", ours + "mlp.up_bias", "F")),
            *weight_and_bias(key + names[1], "D F", ours + "mlp.w_down", "FD", ("D", ours + "mlp.down_bias", "D"))]


_CLIP_LAYER = dict(q=[f"self_attn.{one}_proj" for one in "qkv"], out="self_attn.out_proj",
                   norms=("layer_norm1", "layer_norm2"), mlp=("mlp.fc1", "mlp.fc2"))


def _vit(prefix):
    layer = "attention.attention."
    return (Row(prefix + "embeddings.cls_token", "1 1 D", "image.embed.class_token", "D"),
            Row(prefix + "embeddings.position_embeddings", "1 P D", "image.embed.positions", "PD"),
            *weight_and_bias(prefix + "embeddings.patch_embeddings.projection", "D C A B",
                             "image.embed.patches", "ABCD", ("D", "image.embed.bias", "D")),
            *_layers(prefix + "encoder.layer.{}.", "image.transformer.layers.", "model",
                     q=[layer + one for one in ("query", "key", "value")], out="attention.output.dense",
                     norms=("layernorm_before", "layernorm_after"), mlp=("intermediate.dense", "output.dense")),
            *weight_and_bias(prefix + "layernorm", "D", "image.transformer.final_norm.scale", "D"),
            *weight_and_bias("classifier", "N D", "head", "DN", ("N", "head_bias", "N")))


def _clip_images(stack, pool):
    """Returns the rows of the image tower of CLIP or, where it has a `pool`, of SigLIP."""
    at, embed = "vision_model.", "vision_model.embeddings."
    rows = [Row(embed + "patch_embedding.weight", "D C A B", "image.embed.patches", "ABCD"),
            Row(embed + "position_embedding.weight", "P D", "image.embed.positions", "PD"),
            *_layers(at + "encoder.layers.{}.", "image.transformer.layers.", stack, **_CLIP_LAYER),
            *weight_and_bias(at + "post_layernorm", "D", "image.transformer.final_norm.scale", "D")]
    if not pool:
        rows += [Row(embed + "class_embedding", "D", "image.embed.class_token", "D"),
                 *weight_and_bias(at + "pre_layrnorm", "D", "image.embed.norm.scale", "D")]
    else:
        head, ours = at + "head.", "image.pool."
        rows += [Row(embed + "patch_embedding.bias", "D", "image.embed.bias", "D"),
                 Row(head + "probe", "1 1 D", ours + "query", "D"),
                 *(Row(head + "attention.in_proj_weight", f"+{heads} D", f"{ours}attention.w{one}", f"D{heads}")
                   for one, heads in (("q", "KGH"), ("k", "KH"), ("v", "KH"))),
                 *(Row(head + "attention.in_proj_bias", f"+{heads}", f"{ours}attention.{one}_bias", heads)
                   for one, heads in (("q", "KGH"), ("k", "KH"), ("v", "KH"))),
                 *weight_and_bias(head + "attention.out_proj", "D KGH", ours + "attention.wo", "KGHD",
                                  ("D", ours + "attention.o_bias", "D")),
                 *weight_and_bias(head + "layernorm", "D", ours + "norm.scale", "D"),
                 *_mlp(head, ours, _CLIP_LAYER["mlp"])]
    return [row._replace(stack=stack) for row in rows]


def _clip_texts():
    at = "text_model."
    return [Row(at + "embeddings.token_embedding.weight", "V D", "text.embed.tokens", "VD"),
            Row(at + "embeddings.position_embedding.weight", "P D", "text.embed.positions", "PD"),
            *_layers(at + "encoder.layers.{}.", "text.transformer.layers.", "model", **_CLIP_LAYER),
            *weight_and_bias(at + "final_layer_norm", "D", "text.transformer.final_norm.scale", "D")]


def _tower(section, activation, norm_eps, width, heads, hidden, at="", layers=12):
    """Returns the settings of a tower: `section` of our config, "" the model's; `at` of theirs."""
    ours, key = section and section + ".", at and at + "/"
    return ((key + "hidden_size", ours + "embed_dim", width), (key + "num_hidden_layers", ours + "num_layers", layers),
            (key + "num_attention_heads", ours + "num_heads", heads),
            (key + "intermediate_size", ours + "mlp_dim", hidden),
            (key + "hidden_act", ours + "activation", activation),
            (key + "layer_norm_eps", ours + "norm_eps", norm_eps))


def _of_patches(section, at, patch_size):
    ours, key = section and section + ".", at and at + "/"
    return (key + "patch_size", ours + "patch_size", patch_size), (key + "num_channels", ours + "channels", 3)


def _fixed(section="", **more):
    fields = dict(norm="layernorm", norm_bias=True, gated_mlp=False, qkv_bias=True, attention_out_bias=True,
                  mlp_bias=True, position="learned", **more)
    return {f"{section}.{name}" if section else name: value for name, value in fields.items()}


def _images(section, at, patch_size, *, class_token, resize, filter, mean=_HALF, std=_HALF, more=None):
    """Returns what a Family has of functions, keys and files for its images: a dict of its fields.

    patch_size, resize, filter, mean, std: their defaults, with neither a key nor a file. more: as `Family.read`.
    """
    ours, key = section and section + ".", at and at + "/"
    place_of = lambda place: place.replace("config.json", _FILE)

    def read(settings, place):
        side, patch = settings.get(key + "image_size", 224), settings.get(key + "patch_size", patch_size)
        if type(side) is not int or type(patch) is not int or not 0 < patch <= side:
            raise UserError(f"{place}: {key}image_size={side!r}, patch_size={patch!r}: expected whole numbers, the "
                            "second at most the first")
        found = {k.removeprefix(_FILE + "/"): v for k, v in settings.items() if k.startswith(_FILE + "/")}
        for name, only in (("do_resize", True), ("do_normalize", True), ("do_rescale", True),
                           ("rescale_factor", 1 / 255)):
            if abs(found.get(name, only) - only) > 1e-9:
                raise UserError(f"{place_of(place)}: images cannot be prepared here with {name}={found[name]!r}")
        number = found.get("resample", next(n for n, name in _FILTERS.items() if name == filter))
        if number not in _FILTERS:
            choose(_OTHER_FILTERS.get(number, str(number)), tuple(_FILTERS.values()), f"{place_of(place)}: resample")
        size, how = _size(found, side, resize, place_of(place))
        return {ours + "max_seq_len": (side // patch) ** 2 + class_token, "objective_args.image_size": size,
                "objective_args.resize": how, "objective_args.filter": _FILTERS[number],
                "objective_args.mean": tuple(found.get("image_mean", mean)),
                "objective_args.std": tuple(found.get("image_std", std)), **(more(settings, place) if more else {})}

    def write(model):
        arch, args = model.stacks[section or "model"], model.args
        patches, patch, size = round(arch.patch_positions ** 0.5), arch.patch_size, args["image_size"]
        sides = {"height": size, "width": size}
        preprocessing = {"do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
                         "do_convert_rgb": True, "image_mean": list(args["mean"]), "image_std": list(args["std"]),
                         "resample": next(n for n, name in _FILTERS.items() if name == args["filter"])}
        if args["resize"] == "crop":
            preprocessing |= {"size": {"shortest_edge": size}, "do_center_crop": True, "crop_size": sides}
        else:
            preprocessing |= {"size": sides}
        # Transformers takes images of this size alone: that of the positions, and of the images where it is the same.
        return {key + "image_size": size if size // patch == patches else patches * patch,
                **{f"{_FILE}/{name}": value for name, value in preprocessing.items()}}

    return dict(files=(_FILE,), keys=(*_KEYS, key + "image_size"), args=_ARGS, read=read, write=write)


def _size(found, side, resize, place):
    """Returns (pixels of a side, "crop" or "stretch") of a preprocessing file."""
    size, crop = found.get("size", side), found.get("crop_size")
    cropped = found.get("do_center_crop", crop is not None or resize == "crop" and "size" not in found)
    one = lambda v: v if type(v) is int else v.get("shortest_edge") or (
        v.get("height") if v.get("height") == v.get("width") else None)
    edge, inner = one(size), one(crop if cropped and crop is not None else size)
    if type(edge) is not int or edge != inner:
        raise UserError(f"{place}: images cannot be prepared here with size={size!r} and crop_size={crop!r}: they are "
                        "squares, and cropped of the size to which they are resized")
    shortest = type(size) is not int and "shortest_edge" in size or type(size) is int and cropped
    if shortest != cropped:
        raise UserError(f"{place}: images cannot be prepared here with size={size!r} and do_center_crop={cropped}")
    return edge, "crop" if cropped else "stretch"


def _classes(settings, place):
    """Returns the fields num_classes and classes of a classifier."""
    names = settings.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}   # as transformers has it
    classes = tuple(names[i] for i in sorted(names, key=int))
    named = any(name != f"LABEL_{i}" for i, name in enumerate(classes))
    return {"objective_args.num_classes": len(classes), "objective_args.classes": classes if named else ()}


def _of_classes(images):
    """Returns the fields of a Family of a classifier, whose images have those."""
    def write(model):
        n = model.args["num_classes"]
        names = [str(c) for c in model.args["classes"]] or [f"LABEL_{i}" for i in range(n)]
        return images["write"](model) | {"id2label": {str(i): name for i, name in enumerate(names)},
                                         "label2id": {name: i for i, name in enumerate(names)}}
    return images | dict(args=(*_ARGS, "objective_args.num_classes", "objective_args.classes"), write=write,
                         keys=(*images["keys"], "id2label", "label2id"))


def _letters(section):
    """Returns a Family's `sizes`: A and B, rows and columns of a patch, C channels, N classes, O projected width."""
    def sizes(model):
        arch = model.stacks[section]
        return {"A": arch.patch_size, "B": arch.patch_size, "C": arch.channels, "N": model.args.get("num_classes", 0),
                "O": model.args.get("projection_dim", 0) or arch.embed_dim}
    return sizes


def _same_width(settings, place):
    text, image = settings.get("text_config/hidden_size", 768), settings.get("vision_config/hidden_size", 768)
    if (projected := settings.get("text_config/projection_size", text)) != image:
        raise UserError(f"{place}: text_config.projection_size={projected} is not vision_config.hidden_size={image}")
    return {}


def _siglip_write(images):
    return lambda model: images["write"](model) | {"text_config/projection_size": model.stacks["encoder"].embed_dim}


_CLASSIFICATION, _PAIRS = ("fm_jax.objectives." + path for path in (
    "image_classification.ImageClassification", "image_text.ImageText"))
_CLASS_TOKEN = dict(causal=False, class_token=True, pooling="first")
_POOL = dict(causal=False, class_token=False, pooling="attention")
_CLIP = dict(class_token=True, resize="crop", filter="bicubic", mean=_CLIP_MEAN, std=_CLIP_STD)
_SIGLIP = dict(class_token=False, resize="stretch", filter="bicubic")
_VIT = dict(class_token=True, resize="stretch", filter="bilinear")
_VIT_HARMLESS = (*_HARMLESS, "hidden_dropout_prob", "attention_probs_dropout_prob", "encoder_stride", "pooler_act",
                 "pooler_output_size")
_VIT_SETTINGS = (*_tower("", "gelu", 1e-12, 768, 12, 3072), *_of_patches("", "", 16), ("qkv_bias", "qkv_bias", True))
_BARE = {"objective_args.num_classes": 0}
_IN_TOWERS = tuple(f"{at}_config/{key}" for at in ("text", "vision") for key in (*_DUMPED, "model_type"))
_SIGLIP_IMAGES = _images("encoder", "vision_config", 16, **_SIGLIP, more=_same_width)
_POSITIONS = r".*\.position_ids"

FAMILIES = {
    "vit": Family(
        "ViTForImageClassification", "vit.", _vit("vit."), _fixed(**_CLASS_TOKEN), _VIT_SETTINGS,
        harmless=_VIT_HARMLESS, objective=_CLASSIFICATION, has_text=False, sizes=_letters("model"),
        buffers=r"vit\.pooler\..*",
        **_of_classes(_images("", "", 16, **_VIT, more=_classes))),
    "vit_model": Family(
        "ViTModel", "", _vit(""), _fixed(**_CLASS_TOKEN) | _BARE, _VIT_SETTINGS, model_type="vit",
        harmless=(*_VIT_HARMLESS, "id2label"), objective=_CLASSIFICATION, has_text=False, sizes=_letters("model"),
        buffers=r"pooler\..*", **_images("", "", 16, **_VIT)),
    "clip": Family(
        "CLIPModel", "text_model.",
        (*_clip_texts(), *_clip_images("encoder", pool=False),
         Row("text_projection.weight", "O D", "text_projection", "DO"),
         Row("visual_projection.weight", "O D", "image_projection", "DO", "encoder"),
         Row("logit_scale", "", "logit_scale", "")),
        _fixed(causal=True, pooling="end") | _fixed("encoder", **_CLASS_TOKEN, embed_norm=True, patch_bias=False) | {
            "objective_args.loss": "softmax", "objective_args.projection_bias": False},
        (*_tower("", "quick_gelu", 1e-5, 512, 8, 2048, "text_config"),
         *_tower("encoder", "quick_gelu", 1e-5, 768, 12, 3072, "vision_config"),
         ("text_config/vocab_size", "vocab_size", 49408), ("text_config/max_position_embeddings", "max_seq_len", 77),
         *_of_patches("encoder", "vision_config", 32), ("projection_dim", "objective_args.projection_dim", 512)),
        harmless=(*_HARMLESS, *_IN_TOWERS, "initializer_factor", "logit_scale_init_value", "text_config_dict",
                  "vision_config_dict"),
        objective=_PAIRS, sizes=_letters("encoder"), buffers=_POSITIONS, ambiguous_end=2,
        **_images("encoder", "vision_config", 32, **_CLIP)),
    "siglip": Family(
        "SiglipModel", "text_model.",
        (*_clip_texts(), *_clip_images("encoder", pool=True),
         *weight_and_bias("text_model.head", "O D", "text_projection", "DO", ("O", "text_bias", "O")),
         Row("logit_scale", "1", "logit_scale", ""), Row("logit_bias", "1", "logit_bias", "")),
        _fixed(causal=False, pooling="last") | _fixed("encoder", **_POOL) | {
            "objective_args.loss": "sigmoid", "objective_args.projection_bias": True,
            "objective_args.projection_dim": 0},
        (*_tower("", "gelu_pytorch_tanh", 1e-6, 768, 12, 3072, "text_config"),
         *_tower("encoder", "gelu_pytorch_tanh", 1e-6, 768, 12, 3072, "vision_config"),
         ("text_config/vocab_size", "vocab_size", 32000), ("text_config/max_position_embeddings", "max_seq_len", 64),
         *_of_patches("encoder", "vision_config", 16)),
        only={"vision_config/vision_use_head": True},
        harmless=(*_HARMLESS, *_IN_TOWERS, "initializer_factor"), objective=_PAIRS, sizes=_letters("encoder"),
        buffers=_POSITIONS, **_SIGLIP_IMAGES | dict(
            write=_siglip_write(_SIGLIP_IMAGES), keys=(*_SIGLIP_IMAGES["keys"], "text_config/projection_size"))),
    "clip_vision_model": Family(
        "CLIPVisionModel", "vision_model.", tuple(_clip_images("model", pool=False)),
        _fixed(**_CLASS_TOKEN, embed_norm=True, patch_bias=False) | _BARE,
        (*_tower("", "quick_gelu", 1e-5, 768, 12, 3072), *_of_patches("", "", 32)),
        harmless=(*_HARMLESS, *_DUMPED), objective=_CLASSIFICATION, has_text=False, sizes=_letters("model"),
        buffers=_POSITIONS,
        **_images("", "", 32, **_CLIP)),
    "siglip_vision_model": Family(
        "SiglipVisionModel", "vision_model.", tuple(_clip_images("model", pool=True)), _fixed(**_POOL) | _BARE,
        (*_tower("", "gelu_pytorch_tanh", 1e-6, 768, 12, 3072), *_of_patches("", "", 16)),
        only={"vision_use_head": True}, harmless=(*_HARMLESS, *_DUMPED), objective=_CLASSIFICATION,
        sizes=_letters("model"), buffers=_POSITIONS, **_images("", "", 16, **_SIGLIP)),
}

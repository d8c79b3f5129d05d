"""Turns a folder of Hugging Face weights into a run, and a run into such a folder, or into another run.

    python -m fm_jax.convert --from_hf path/to/folder --workdir runs/imported
    python -m fm_jax.convert --from_hf path/to/folder --workdir runs/imported --dtype float32 --mesh fsdp=4,tensor=2
    python -m fm_jax.convert --from_hf model.gguf --workdir runs/imported
    python -m fm_jax.convert --from_hf catalogue:minilm --workdir runs/minilm
    python -m fm_jax.convert --workdir runs/x --to_hf exported
    python -m fm_jax.convert --workdir runs/adapter --to_run runs/merged
    python -m fm_jax.convert --workdir runs/x --to_run runs/x_nf4 --quantize nf4
    python -m fm_jax.convert --workdir runs/adapter --to_peft exported
    python -m fm_jax.convert --from_peft path/to/adapter --base runs/imported --workdir runs/adapter

Reads safetensors, in one file or several, of the families gpt2, gpt_neox (Pythia), llama (SmolLM), mistral, mixtral,
qwen2, qwen3, qwen3_moe, gemma2, gemma3_text, phi3, olmo2, bert, roberta, distilbert, mpnet, modernbert, t5, whisper,
vit, clip and siglip, GGUF files of llama, qwen2 and qwen3 (dequantised; needs the package gguf), and CTranslate2 models
of Whisper. Tokenizer and chat template come along. Folders of sentence-transformers, and bare encoders (BertModel,
RobertaModel, DistilBertModel, MPNetModel, ModernBertModel), become models whose `embed` gives what theirs give; those
of mistral, qwen2 and qwen3 too. They go out as such folders.
The run it writes is at step 0, for evaluate, generate and fm_jax.load; training goes on from its weights in a run of
its own, with --config.checkpoint.init_from. What it exports opens with transformers' AutoModelForCausalLM (or
MaskedLM, Seq2SeqLM, SpeechSeq2Seq): the average of the parameters where the run keeps one, in the family that it was
imported from, else in the first that can express it (`config.hf_family`). An exported tokenizer of ours puts nothing
before a text; a prompt that is to begin where documents began in training spells it out: "<s>Once". Layer 5.

A run of adapters is merged with its base by --to_run and --to_hf. Adapters alone come and go in PEFT's format.
"""

import os
import re

from absl import flags

from fm_jax import config as config_lib
from fm_jax.architecture import CHOICES as MODEL_CHOICES
from fm_jax.config import CHOICES
from fm_jax.errors import UserError


def _flags(fv):
    flags.DEFINE_string("workdir", None, "the run's folder", flag_values=fv, required=True)
    flags.DEFINE_string("from_hf", None, "folder to import (config.json, safetensors, tokenizer), GGUF file, or "
                        "catalogue:NAME (minilm, smollm2)", flag_values=fv)
    flags.DEFINE_string("from_peft", None, "folder of an adapter to import, for the run --base", flag_values=fv)
    flags.DEFINE_string("to_hf", None, "folder to export to; made, or empty", flag_values=fv)
    flags.DEFINE_string("to_peft", None, "folder to export the run's adapters to; made, or empty", flag_values=fv)
    flags.DEFINE_string("to_run", None, "run to write, with all parameters of the model", flag_values=fv)
    flags.DEFINE_enum("quantize", "", CHOICES["quantized"], "how --to_run stores matrices", flag_values=fv)
    flags.DEFINE_string("base", "", "of adapters, the run of their base; default where it was in training",
                        flag_values=fv)
    flags.DEFINE_enum("dtype", None, MODEL_CHOICES["dtype"], "of activations in an imported model; default: of its "
                      "weights", flag_values=fv)
    flags.DEFINE_string("mesh", "", "devices per axis while importing, as in fsdp=4,tensor=2; default one device",
                        flag_values=fv)
    flags.DEFINE_integer("step", None, "of the checkpoint to export; default the newest", flag_values=fv)


WAYS = ("from_hf", "from_peft", "to_hf", "to_peft", "to_run")
OF_ONE_WAY = {"dtype": ("from_hf",), "mesh": ("from_hf",), "step": ("to_hf", "to_peft", "to_run"),
              "quantize": ("to_run",), "base": ("from_peft", "to_hf", "to_peft", "to_run")}


def main(args):
    given = [way for way in WAYS if args[way].value is not None]
    if len(given) != 1:
        raise UserError("give one of " + ", ".join(f"--{way}" for way in WAYS) + ", with its FOLDER"
                        + (f"; got --{' and --'.join(given)}" if given else ""))
    for name, ways in OF_ONE_WAY.items():
        if args[name].value not in (None, "") and given[0] not in ways:
            raise UserError(f"--{name}={args[name].value} is of --{', --'.join(ways)}, not of --{given[0]}")
    {"from_hf": _import, "from_peft": _import_adapter, "to_hf": _export, "to_peft": _export_adapter,
     "to_run": _to_run}[given[0]](args)


def _import(args):
    from fm_jax import pretrained, tree
    from fm_jax.data import catalogue

    folder, named = args.from_hf, args.from_hf.removeprefix("catalogue:")
    if named != folder:
        folder = catalogue.weights(named, os.environ.get("FM_JAX_CACHE", catalogue.DEFAULT_CACHE))
    lm = pretrained.load_hf(folder, mesh=pretrained.parse_mesh(args.mesh), dtype=args.dtype or "")
    _write_run(args.workdir, lm.config, lm.params, lm.tokenizer, flag="workdir")
    arch = lm.objective.arch
    print(f"{args.workdir}: {tree.count(lm.params):,} parameters in {arch.param_dtype}, activations in {arch.dtype}, "
          + (f"vocabulary {arch.vocab_size:,}, context {arch.max_seq_len:,}" if lm.tokenizer else "no tokenizer"))


def _write_run(folder, config, params, tokenizer, *, flag, base=None):
    """Writes a run at step 0, without the optimizer's state: what trains from it begins its own."""
    import jax
    import jax.numpy as jnp

    from fm_jax import checkpoint
    from fm_jax.step import State

    with checkpoint.lock(folder):
        if checkpoint.steps(folder):
            raise UserError(f"--{flag}={folder} holds a run already; take another")
        checkpoint.describe_run(folder, config, 0, tokenizer=tokenizer, base=base)
        with checkpoint.Checkpoints(folder, config.checkpoint) as checkpoints:
            checkpoints.save(0, State(jnp.zeros((), jnp.int32), jax.tree.map(jnp.asarray, params), {}, None))


def _export(args):
    import jax

    from fm_jax import adapt, checkpoint, hf, pretrained, tree
    from fm_jax.model import merged

    config, tokenizer = _opened(args.workdir)
    family = hf.settings_of(config)["model_type"]   # before a large checkpoint is read
    if adapt.adapts(config) or config.quantized:
        params = jax.device_get(merged(pretrained.load(args.workdir, step=args.step, base=args.base).params))
    else:
        params = checkpoint.restore_params(args.workdir, args.step, ema=True)
    note = hf.save(args.to_hf, config, params, tokenizer)
    print(f"{args.to_hf}: {tree.count(params):,} parameters as {family}; {note}")


def _opened(workdir):
    """Returns (config, tokenizer) of a run."""
    from fm_jax import checkpoint

    return config_lib.load(f"{workdir}/config.json")[0], checkpoint.load_tokenizer(workdir)


def _to_run(args):
    import jax

    from fm_jax import pretrained, quantize, sharding, tree
    from fm_jax.model import merged

    lm = pretrained.load(args.workdir, step=args.step, base=args.base)
    if lm.config.quantized and args.quantize:
        raise UserError(f"--workdir={args.workdir} is kept in {lm.config.quantized} already; quantise the run that it "
                        "was made from")
    params, config = merged(lm.params), lm.config
    config.adapt = config_lib.defaults().adapt
    config.checkpoint.init_from, config.quantized = "", args.quantize
    axes = sharding.unbox(jax.eval_shape(lm.objective.init, jax.random.key(0)))[1]
    axes = tree.flatten(axes, is_leaf=sharding.is_axes)
    kept = jax.jit(lambda params: quantize.tree_of(params, axes, args.quantize))(params)
    _write_run(args.to_run, config, kept, lm.tokenizer, flag="to_run")
    before, after = tree.nbytes(params), tree.nbytes(kept)
    print(f"{args.to_run}: {tree.count(params):,} parameters, {after / 1e6:,.2f} MB"
          + (f" in {args.quantize}, of {before / 1e6:,.2f}" if args.quantize else ""))


def _export_adapter(args):
    from fm_jax import checkpoint, hf, tree
    from fm_jax.hf import peft

    config, _ = _opened(args.workdir)
    if not config.adapt.lora:
        raise UserError(f"--workdir={args.workdir} has no adapters; --to_hf exports its whole model")
    settings, (here, layout) = hf.settings_of(config), _adaptation(config)
    params = tree.flatten(checkpoint.restore_params(args.workdir, args.step, ema=True))
    if more := sorted(set(params) - here.added):
        raise UserError(f"--workdir={args.workdir} trained more than adapters, which has no place in PEFT's format: "
                        f"{', '.join(more)}; export the whole model by --to_hf")
    frozen, base = here.read_base(config, layout, checkpoint.base_of(args.workdir), args.base)
    of = lambda kind: {n.removesuffix(kind): a for n, a in params.items() if n.endswith(kind)}
    c, norms = config.adapt, here.norms(frozen) if config.adapt.dora else {}
    adapter = peft.Adapter(c.lora_rank, c.lora_alpha, c.lora_rank_stabilized, c.lora_dropout, of(".lora_a"),
                           of(".lora_b"), {n: m * norms[n] for n, m in of(".magnitude").items()})
    family, model = hf.FAMILIES[hf.find_family(settings, "config.json")], hf.model_of(settings, "config.json")
    count = peft.save(args.to_peft, family, model, adapter, base["folder"], base["fingerprint"])
    print(f"{args.to_peft}: {count} tensors, {tree.count(params):,} numbers, an adapter of {base['folder']}")


def _import_adapter(args):
    from fm_jax import hf, optim, tree
    from fm_jax.hf import peft

    if not args.base:
        raise UserError(f"--from_peft={args.from_peft} is an adapter: name the run of its base by --base")
    config, tokenizer = _opened(args.base)
    settings, (here, _) = hf.settings_of(config), _adaptation(config)
    model, axes = (tree.flatten(part, is_leaf=lambda a: isinstance(a, tuple)) for part in here.model)
    sides = {n: optim.matrix_axes(axes[n]) for n in model}
    matrices = {n: (model[n].shape, len(of[0])) for n, of in sides.items() if of}
    adapter, fingerprint = peft.read(
        args.from_peft, hf.FAMILIES[hf.find_family(settings, "config.json")], hf.model_of(settings, "config.json"),
        matrices)
    config_lib.override(config, {"checkpoint.init_from": args.base, **{f"adapt.{key}": value for key, value in dict(
        lora=tuple(re.escape(n) for n in adapter.a), lora_rank=adapter.rank, lora_alpha=float(adapter.alpha),
        lora_rank_stabilized=adapter.stabilized, lora_dropout=float(adapter.dropout), dora=bool(adapter.norms),
        quantize=config.quantized).items()}})
    config.quantized = ""
    here, layout = _adaptation(config)
    frozen, base = here.read_base(config, layout, {})
    if fingerprint not in ("", base["fingerprint"]):
        raise UserError(f"--from_peft={args.from_peft} is of another base (parameters {fingerprint[:12]}) than --base="
                        f"{args.base} (parameters {base['fingerprint'][:12]})")
    norms = here.norms(frozen) if adapter.norms else {}
    params = {f"{n}.lora_a": a for n, a in adapter.a.items()} | {f"{n}.lora_b": b for n, b in adapter.b.items()} | {
        f"{n}.magnitude": m / norms[n] for n, m in adapter.norms.items()}
    _write_run(args.workdir, config, tree.nest(params), tokenizer, flag="workdir", base=base)
    print(f"{args.workdir}: {tree.count(params):,} numbers of adapters, rank {adapter.rank}, on {args.base}")


def _adaptation(config):
    """Returns (the Adaptation of a run's config, the layout of one device)."""
    import jax

    from fm_jax import adapt, objectives, sharding

    layout = sharding.Layout(sharding.make_mesh({"data": 1}))
    objective = objectives.load(config, None, layout)
    return adapt.Adaptation(config, *sharding.unbox(jax.eval_shape(objective.init, jax.random.key(0)))), layout


if __name__ == "__main__":
    config_lib.run(main, _flags, __doc__)

"""Turns a folder of Hugging Face weights into a run, and a run into such a folder.

    python -m fm_jax.convert --from_hf path/to/folder --workdir runs/imported
    python -m fm_jax.convert --from_hf path/to/folder --workdir runs/imported --dtype float32 --mesh fsdp=4,tensor=2
    python -m fm_jax.convert --from_hf model.gguf --workdir runs/imported
    python -m fm_jax.convert --workdir runs/x --to_hf exported

Reads safetensors, in one file or several, of the families gpt2, gpt_neox (Pythia), llama (SmolLM), mistral, mixtral,
qwen2, qwen3, qwen3_moe, gemma2, gemma3_text, phi3, olmo2, bert, roberta and distilbert, and GGUF files of architecture
llama (dequantised; needs the package gguf). Tokenizer and chat template come along.
The run it writes is at step 0, for evaluate, generate and fm_jax.load; training goes on from its weights in a run of
its own, with --config.checkpoint.init_from. What it exports opens with transformers' AutoModelForCausalLM (or
AutoModelForMaskedLM): the average of the parameters where the run keeps one, in the family that it was imported from,
else in the first that can express it (`config.hf_family`). An exported tokenizer of ours puts nothing before a text; a
prompt that is to begin where documents began in training spells it out: "<s>Once". Layer 5.
"""

from absl import flags

from fm_jax import config as config_lib
from fm_jax.architecture import CHOICES
from fm_jax.errors import UserError


def _flags(fv):
    flags.DEFINE_string("workdir", None, "the run's folder", flag_values=fv, required=True)
    flags.DEFINE_string("from_hf", None, "folder to import (config.json, safetensors, tokenizer), or GGUF file",
                        flag_values=fv)
    flags.DEFINE_string("to_hf", None, "folder to export to; made, or empty", flag_values=fv)
    flags.DEFINE_enum("dtype", None, CHOICES["dtype"], "of activations in an imported model; default: of its weights",
                      flag_values=fv)
    flags.DEFINE_string("mesh", "", "devices per axis while importing, as in fsdp=4,tensor=2; default one device",
                        flag_values=fv)
    flags.DEFINE_integer("step", None, "of the checkpoint to export; default the newest", flag_values=fv)


def main(args):
    if (args.from_hf is None) == (args.to_hf is None):
        raise UserError("give either --from_hf FOLDER, to import it, or --to_hf FOLDER, to export there")
    if args.from_hf is not None:
        if args.step is not None:
            raise UserError(f"--step={args.step} is of a run to export, and --from_hf imports")
        _import(args)
    else:
        if args.dtype is not None or args.mesh:
            raise UserError("--dtype and --mesh are of a model to import; an exported one has its run's numbers")
        _export(args)


def _import(args):
    import jax.numpy as jnp

    from fm_jax import checkpoint, pretrained, tree
    from fm_jax.step import State

    lm = pretrained.load_hf(args.from_hf, mesh=pretrained.parse_mesh(args.mesh), dtype=args.dtype or "")
    with checkpoint.lock(args.workdir):
        if checkpoint.steps(args.workdir):
            raise UserError(f"--workdir={args.workdir} holds a run already; take another")
        checkpoint.describe_run(args.workdir, lm.config, 0, tokenizer=lm.tokenizer)
        with checkpoint.Checkpoints(args.workdir, lm.config.checkpoint) as checkpoints:
            # No optimizer's state: a run that trains from these weights begins its own.
            checkpoints.save(0, State(jnp.zeros((), jnp.int32), lm.params, {}, None))
    arch = lm.objective.arch
    print(f"{args.workdir}: {tree.count(lm.params):,} parameters in {arch.param_dtype}, activations in {arch.dtype}, "
          f"vocabulary {arch.vocab_size:,}, context {arch.max_seq_len:,}")


def _export(args):
    from fm_jax import checkpoint, hf, storage, tree
    from fm_jax import tokenizer as tokenizers

    config, _ = config_lib.load(f"{args.workdir}/config.json")
    with storage.local(args.workdir, "tokenizer") as files:
        tokenizer = tokenizers.load(files.path / "tokenizer")
    family = hf.settings_of(config)["model_type"]   # before a large checkpoint is read
    params = checkpoint.restore_params(args.workdir, args.step, ema=True)
    note = hf.save(args.to_hf, config, params, tokenizer)
    print(f"{args.to_hf}: {tree.count(params):,} parameters as {family}; {note}")


if __name__ == "__main__":
    config_lib.run(main, _flags, __doc__)

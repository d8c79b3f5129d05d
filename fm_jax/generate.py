"""Continues prompts with the model of a run.

    python -m fm_jax.generate --workdir runs/x --prompt "The history of" --max_new_tokens 64
    python -m fm_jax.generate --workdir runs/x --prompt "Paris" --prompt "Rome" --temperature 0.8 --top_p 0.95 --n 3
    python -m fm_jax.generate --workdir runs/x --prompt "Paris" --mesh fsdp=4,tensor=2

Layer 5.
"""

from absl import flags

from fm_jax import config as config_lib


def _flags(fv):
    flags.DEFINE_string("workdir", None, "the run's folder", flag_values=fv, required=True)
    flags.DEFINE_multi_string("prompt", None, "text to continue; may be given several times", flag_values=fv,
                              required=True)
    flags.DEFINE_integer("max_new_tokens", 64, "most tokens to add", flag_values=fv, lower_bound=1)
    flags.DEFINE_float("temperature", 0.0, "0: always the likeliest token", flag_values=fv)
    flags.DEFINE_integer("top_k", 0, "draw from the k likeliest tokens; 0: all", flag_values=fv)
    flags.DEFINE_float("top_p", 1.0, "draw from the likeliest tokens that together have this probability",
                       flag_values=fv)
    flags.DEFINE_integer("n", 1, "continuations of each prompt", flag_values=fv, lower_bound=1)
    flags.DEFINE_integer("seed", 0, "of the draws", flag_values=fv)
    flags.DEFINE_integer("step", None, "of the checkpoint; default the newest", flag_values=fv)
    flags.DEFINE_string("mesh", "", "devices per axis, as in fsdp=4,tensor=2; default one device", flag_values=fv)


def main(args):
    import fm_jax
    from fm_jax.decode import Sampling
    from fm_jax.pretrained import parse_mesh

    Sampling(args.temperature, args.top_k, args.top_p).check()   # before a large model is loaded
    lm = fm_jax.load(args.workdir, step=args.step, mesh=parse_mesh(args.mesh))
    prompts = [p for p in args.prompt for _ in range(args.n)]
    texts = lm.generate(prompts, max_new_tokens=args.max_new_tokens, temperature=args.temperature, top_k=args.top_k,
                        top_p=args.top_p, seed=args.seed)
    for i, (prompt, text) in enumerate(zip(prompts, texts)):
        print(("" if i == 0 else "---\n") + prompt + text)


if __name__ == "__main__":
    config_lib.run(main, _flags, __doc__)

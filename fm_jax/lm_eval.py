"""lm-evaluation-harness, with fm_jax among its models: its own command line, tasks and results. Layer 5.

    python -m fm_jax.lm_eval --model fm_jax --model_args workdir=runs/x --tasks piqa --num_fewshot 5
    python -m fm_jax.lm_eval --model fm_jax --model_args workdir=exported,mesh=fsdp:4/tensor:2 --tasks gsm8k

Needs lm-eval (pip install lm-eval); `lm_eval --help` has its options. --model_args: workdir (a run, or a folder of
Hugging Face weights), step and mesh (without the signs that the harness splits at). From Python:
lm_eval.simple_evaluate(model=fm_jax.lm_eval.model_class()("runs/x"), ...).
"""

import sys

from fm_jax.errors import UserError


def model_class():
    """Returns the class of the harness's models that answers with one of ours."""
    import lm_eval.api.model

    import fm_jax
    from fm_jax import pretrained
    from fm_jax.evals import requests, yaml_task

    class FmJax(lm_eval.api.model.LM):
        """A loaded model.

        batch_size, max_batch_size and device, which the harness always names, are not used: scores do not depend on
        the batches, and jax knows its devices.
        """

        def __init__(self, workdir, step=None, mesh="", batch_size=None, max_batch_size=None, device=None):
            super().__init__()
            mesh = pretrained.parse_mesh(mesh.replace(":", "=").replace("/", ","))
            self.lm = fm_jax.load(workdir, step=step, mesh=mesh)

        def loglikelihood(self, asked, disable_tqdm=False):
            pairs = list(dict.fromkeys(request.args for request in asked))
            scores = dict(zip(pairs, self.lm.score([a for a, _ in pairs], [b for _, b in pairs])))
            return [(scores[request.args].logprob, scores[request.args].is_greedy) for request in asked]

        def loglikelihood_rolling(self, asked, disable_tqdm=False):
            return self.lm.score_texts([text for (text,) in (request.args for request in asked)])

        def generate_until(self, asked, disable_tqdm=False):
            out = [None] * len(asked)
            hows = [yaml_task.generation_of({"generation_kwargs": {"until": [], **request.args[1]}},
                                            "generation_kwargs of the task") for request in asked]
            for how in dict.fromkeys(hows):
                chosen = [i for i, each in enumerate(hows) if each == how]
                answers, _ = requests.generate_until(self.lm, [asked[i].args[0] for i in chosen], how, where="the task")
                for i, (answer,) in zip(chosen, answers):
                    out[i] = answer
            return out

        def apply_chat_template(self, chat_history, add_generation_prompt=True):
            return self.lm.tokenizer.chat(chat_history, add_generation_prompt=add_generation_prompt,
                                          continue_final_message=not add_generation_prompt)

        @property
        def tokenizer_name(self):
            return self.lm.tokenizer.fingerprint   # names the harness's cache of requests

        def chat_template(self, chat_template=False):
            return self.lm.tokenizer.chat_template

    return FmJax


def main():
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__.strip())
        return
    try:
        from lm_eval.__main__ import cli_evaluate
        from lm_eval.api.registry import model_registry
    except ImportError as error:
        sys.exit(f"error: lm-evaluation-harness is not here ({error}): pip install lm-eval")
    model_registry.register("fm_jax", target=model_class())
    try:
        cli_evaluate()
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

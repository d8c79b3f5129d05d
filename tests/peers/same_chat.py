"""Shows that chats of task files are lm-evaluation-harness's to the letter: system, turns, prefixes, requests.

As same_evaluations.py, whose tasks and hashed model it takes; the template is that of a folder's tokenizer, rendered by
fm_jax on one side and by transformers on the other. Exits with 1 where a request or a figure differs.

Try:  PYTHONPATH=. .venv-lm-eval-hf/bin/python tests/peers/same_chat.py path/to/SmolLM2-135M-Instruct
"""

import os
from pathlib import Path
import sys
import tempfile
import types

import same_evaluations as same

from fm_jax import tokenizer as tokenizers
from fm_jax.evals import requests, yaml_task

CHATS = {"turns": requests.Chat("Be brief.", True), "one turn": requests.Chat("", False),
         "one turn, system": requests.Chat("Be brief. ", False)}


class Chatting(same.Model):
    """The hashed model, with a template."""

    def __init__(self, folder):
        self.tokenizer = types.SimpleNamespace(**vars(same.Model.tokenizer), chat=tokenizers.load(folder).chat)


def harness(folder, name, path, chat):
    """Returns what the harness finds of a task: (metrics, samples)."""
    import lm_eval
    from lm_eval.tasks import TaskManager
    import transformers

    template = transformers.AutoTokenizer.from_pretrained(folder)

    class Templated(same.hashed()):
        tokenizer_name = folder

        def chat_template(self, chat_template=False):
            return template.chat_template

        def apply_chat_template(self, chat_history, add_generation_prompt=True):
            return template.apply_chat_template(chat_history, tokenize=False, continue_final_message=
                                                not add_generation_prompt, add_generation_prompt=add_generation_prompt)

    manager = TaskManager(include_path=str(path.parent), include_defaults=False)
    found = lm_eval.simple_evaluate(Templated(), tasks=[name], task_manager=manager, bootstrap_iters=same.ITERS,
                                    apply_chat_template=True, fewshot_as_multiturn=chat.fewshot_as_multiturn,
                                    system_instruction=chat.system_instruction or None)
    return found["results"][name], found["samples"][name]


def main():
    os.environ["DISABLE_MULTIPROC"] = "1"
    folder, wrong = sys.argv[1], 0
    with tempfile.TemporaryDirectory() as scratch:
        for name, path in same.write(Path(scratch)).items():
            task = yaml_task.load(path)
            if task.output_type == "loglikelihood_rolling":
                continue   # no prompt
            for how, chat in CHATS.items():
                ours = requests.evaluate(Chatting(folder), task, chat=chat, bootstrap_iters=same.ITERS)
                found = list(same.differences(name, ours, harness(folder, name, path, chat)))
                wrong += bool(found)
                print(f"{name:<24} {how:<16} " + ("equal" if not found else f"{len(found)} differ: {found[0][:600]}"))
    print(f"{wrong} differ")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()

"""A task's documents as requests to a language model, and its answers as results. Layer 4.

Prompts are put together, shots drawn and requests formed as lm-evaluation-harness 0.4.13 does it in text mode.
"""

from collections.abc import Iterator
import random
from typing import NamedTuple

from fm_jax.errors import UserError
from fm_jax.evals import filters, metrics
from fm_jax.evals.tasks import Result
from fm_jax.evals.yaml_task import Task

FEWSHOT_SEED = 1234


class Question(NamedTuple):
    """A document's requests: `pairs` of (context, continuation), or one `text`.

    The text is what is to be continued (generate_until) or scored as a whole (loglikelihood_rolling).
    """

    number: int
    doc: dict
    pairs: list[tuple[str, str]]
    text: str
    choices: list[str]
    gold: str | int | list


# --- Prompts


def questions(task: Task, limit: int = 0) -> Iterator[Question]:
    """Yields the questions of a task's documents, of the first `limit` if that is not 0.

    Shots are drawn document by document from one random.Random(1234), so a document's depend on its place and not on
    `limit`.
    """
    rng = random.Random(FEWSHOT_SEED)
    # The first document decides for all, as in the harness.
    inputs = task.doc_to_choice is not None and isinstance(task.text(task.docs[0]), int)
    any_of = isinstance(task.target(task.docs[0]), list)
    for number, doc in enumerate(task.docs[:limit] if limit else task.docs):
        before = task.head(doc) + "".join(_shot(task, shot, inputs) for shot in draw(task, doc, rng))
        target = task.target(doc)
        if isinstance(target, list) != any_of:
            raise UserError(f"{task.path}: doc_to_target gives {target!r} for document {number} of {task.data}, and "
                            f"{task.target(task.docs[0])!r} for the first; a list for all or none")
        prefix, text = task.prefix(doc, task.gen_prefix), task.text(doc)
        choices = task.choices(doc) if task.doc_to_choice is not None else []
        if inputs:
            contexts = [before + turn(q, gen_prefix=prefix, target_delimiter="") for q in choices]
            gold = text
        else:
            if not isinstance(text, str):
                raise UserError(f"{task.path}: doc_to_text gives {text!r} for document {number} of {task.data}; it "
                                "must be a text, or the number of a choice for all documents")
            contexts = [before + turn(text, gen_prefix=prefix, target_delimiter=task.target_delimiter)]
            gold = target
        yield _question(task, number, doc, contexts, inputs, choices, gold, target)


def _question(task, number, doc, contexts, inputs, choices, gold, target):
    """Returns the requests of a document for its one context, or for one of each choice where these are `inputs`."""
    where = f"document {number} of {task.data}"
    if task.output_type in ("loglikelihood", "loglikelihood_rolling") and not isinstance(target, str):
        raise UserError(f"{task.path}: doc_to_target gives {target!r} for {where}; it must be a text")
    if task.output_type == "loglikelihood":
        return Question(number, doc, [(contexts[0], target)], "", choices, gold)
    if task.output_type == "loglikelihood_rolling":
        return Question(number, doc, [], target, choices, gold)
    if task.output_type == "generate_until":
        if choices:   # the target is the number of one
            gold = choices[_index(gold, choices, task, where)]
        gold = [str(g) for g in gold] if isinstance(gold, list) else str(gold)
        return Question(number, doc, [], contexts[0], choices, gold)
    if inputs:
        pairs = [(context, f"{task.target_delimiter}{target}") for context in contexts]
    else:
        pairs = [(contexts[0], f"{task.target_delimiter}{choice}") for choice in choices]
    if any(m.name == "acc_mutual_info" for m in task.metrics):
        pairs += [("", f"{task.target_delimiter}{choice}") for choice in choices]
    gold = [_index(g, choices, task, where) for g in gold] if isinstance(gold, list) else _index(gold, choices, task,
                                                                                                 where)
    one = [m.name for m in task.metrics if m.name in ("acc_mutual_info", "f1", "mcc", "brier_score")]
    if isinstance(gold, list) and one:
        raise UserError(f"{task.path}: {one[0]} needs one right choice, doc_to_target gives {gold} for {where}")
    return Question(number, doc, pairs, "", choices, gold)


def _index(gold, choices, task, where):
    """Returns the number of a choice given by it or by its text."""
    index = choices.index(gold) if gold in choices else gold   # no choice is a number
    if not isinstance(index, int) or not 0 <= index < len(choices):
        raise UserError(f"{task.path}: the answer {gold!r} of {where} is none of its choices {choices}")
    return int(index)


def draw(task: Task, doc: dict, rng: random.Random) -> list[dict]:
    """Returns the documents of the worked examples before a question.

    Where the pool can hold the document itself, one more is drawn and the document is taken out; where it is there
    more than once, they are drawn again from the others.

    Raises:
      UserError: the pool has too few.
    """
    pool, n, excludes = task.shots.pool, task.num_fewshot, task.shots.excludes_question
    if not n:
        return []
    others = lambda: [d for d in pool if d != doc] if excludes else pool
    if task.shots.sampler == "first_n":
        found = others()[:n]
    elif len(pool) < n + excludes:
        found = []
    else:
        found = [d for d in rng.sample(pool, n + excludes) if not excludes or d != doc][:n]
        if len(found) < n <= len(others()):
            found = rng.sample(others(), n)
    if len(found) < n:
        raise UserError(f"{task.path}: {n} shots are asked for, and there are {len(others())} documents to draw from; "
                        "lower --num_fewshot")
    return found


def _shot(task, doc, inputs):
    """Returns a document as a worked example. `inputs`: its choices are questions to one answer."""
    shots = task.shots
    text, answer = task.text(doc, shots.text), task.target(doc, shots.target)
    choices = task.choices(doc, shots.choice) if shots.choice is not None else None
    if inputs:
        text, choices = choices[text], None
    elif not isinstance(text, str):
        raise UserError(f"{task.path}: doc_to_text gives {text!r} for the shot {doc}; it must be a text")
    if choices and isinstance(answer, int):
        answer = choices[answer]
    elif isinstance(answer, list):
        answer = answer[0]
    if not isinstance(answer, str):
        raise UserError(f"{task.path}: doc_to_target gives {answer!r} for the shot {doc}; it must be a text, or the "
                        "number of a choice")
    return turn(text, answer, gen_prefix=task.prefix(doc, shots.gen_prefix), target_delimiter=shots.target_delimiter,
                fewshot_delimiter=shots.fewshot_delimiter)


def turn(question: str, answer: str = "", *, gen_prefix: str | None, target_delimiter: str,
         fewshot_delimiter: str = "") -> str:
    """Returns a question with its answer, or without one up to where the answer begins.

    Without an answer nothing follows the question: the continuation brings its delimiter. `gen_prefix`, the beginning
    of the answer, is set apart only where no white space does it already.
    """
    if answer:
        delimited = not gen_prefix or _touch(question, gen_prefix)
        begun = gen_prefix + " " * _touch(gen_prefix, answer) if gen_prefix else ""
        return question + target_delimiter * delimited + begun + answer + fewshot_delimiter
    if gen_prefix:
        return question + target_delimiter * _touch(question, gen_prefix) + gen_prefix
    return question


def _touch(before, after):
    """Returns whether two texts would meet without white space."""
    return before != "" and not (before[-1].isspace() or after[0].isspace())


# --- Results


def evaluate(lm, task: Task, *, limit: int = 0, bootstrap_iters: int = metrics.BOOTSTRAP_ITERS) -> Result:
    """Returns a task's metrics on a model, "NAME,FILTER" and "NAME_stderr,FILTER", and every sample.

    `truncated_contexts`: how many requests were longer than the model's context and lost tokens at their left.
    """
    asked = list(questions(task, limit))
    answers, truncated = _ask(lm, task, asked)
    items, samples = {}, []
    for pipeline, steps in task.filters:
        if task.output_type == "generate_until":
            judged = filters.apply(steps, [list(a) for a in answers], [q.doc for q in asked], task.path, pipeline)
        else:
            judged = answers
        for question, answer, judged_answer in zip(asked, answers, judged):
            found = _items(task, question, judged_answer)
            for name, item in found.items():
                items.setdefault((name, pipeline), []).append(item)
            samples.append({"doc_id": question.number, "doc": question.doc, "target": task.target(question.doc),
                            "arguments": question.pairs or [question.text], "resps": answer,
                            "filtered_resps": judged_answer, "filter": pipeline, **found})
    out = {}
    for (name, pipeline), values in items.items():
        metric = next(m for m in task.metrics if m.name == name)
        out[f"{name},{pipeline}"] = metrics.AGGREGATIONS[metric.aggregation].total(values)
        error = metrics.stderr(metric, values, bootstrap_iters)
        if error is not None:
            out[f"{name}_stderr,{pipeline}"] = error
    return Result(out | {"documents": len(asked), "truncated_contexts": truncated}, samples)


def _ask(lm, task, asked):
    """Returns (the model's answer to each question, how many requests were cut at their left).

    An answer is a list: of (log-probability, whether greedy decoding says it) for each pair, of texts generated, or of
    one log-probability. Equal requests are made once.
    """
    if task.output_type == "loglikelihood_rolling":
        return [[x] for x in lm.score_texts([q.text for q in asked])], 0
    if task.output_type == "generate_until":
        return _generate(lm, task, asked)
    pairs = list(dict.fromkeys(pair for q in asked for pair in q.pairs))
    scores = dict(zip(pairs, lm.score([a for a, _ in pairs], [b for _, b in pairs])))
    room = lm.objective.arch.max_seq_len + 1   # the last token is only predicted
    lengths = dict(zip(pairs, map(len, lm.tokenizer.encode_batch([a + b for a, b in pairs]))))
    truncated = sum(lengths[pair] + (pair[0] == "") > room for q in asked for pair in q.pairs)
    return [[(scores[p].logprob, scores[p].is_greedy) for p in q.pairs] for q in asked], truncated


def _generate(lm, task, asked):
    how = task.generation
    room = lm.objective.arch.max_seq_len - how.max_gen_toks
    if room < 1:
        raise UserError(f"{task.path}: max_gen_toks {how.max_gen_toks} leaves no room for a question in the model's "
                        f"context of {lm.objective.arch.max_seq_len}; lower it in generation_kwargs")
    prompts = [q.text for q in asked for _ in range(task.repeats)]
    lengths = list(map(len, lm.tokenizer.encode_batch(prompts)))
    if max(lengths) > room - 1:   # the beginning-of-text token takes a place
        number = asked[lengths.index(max(lengths)) // task.repeats].number
        raise UserError(f"{task.path}: the prompt of document {number} has {max(lengths)} tokens, and the model's "
                        f"context leaves {room - 1} beside max_gen_toks {how.max_gen_toks}; lower that or "
                        "--num_fewshot")
    texts = lm.generate(prompts, max_new_tokens=how.max_gen_toks, temperature=how.temperature, top_k=how.top_k,
                        top_p=how.top_p)
    for stop in filter(None, how.until):
        texts = [text.split(stop)[0] for text in texts]
    return [texts[i : i + task.repeats] for i in range(0, len(texts), task.repeats)], 0


def _items(task, question, answer):
    """Returns {metric: item} of a question."""
    names = [m.name for m in task.metrics]
    if task.output_type == "loglikelihood":
        (logprob, greedy), = answer
        return {name: {"perplexity": logprob, "acc": int(greedy)}[name] for name in names}
    if task.output_type == "loglikelihood_rolling":
        return metrics.rolling_items(names, answer[0], question.text)
    if task.output_type == "multiple_choice":
        logprobs, greedy = zip(*answer)
        n = len(question.choices)
        return metrics.choice_items(names, logprobs[:n], logprobs[n:], greedy[:n], question.choices, question.gold)
    out = {}
    for metric in task.metrics:
        if metric.name == "exact_match":
            golds = question.gold if isinstance(question.gold, list) else [question.gold]
            out[metric.name] = metrics.exact_match(answer, golds, **metric.options)
        elif isinstance(question.gold, list):
            raise UserError(f"{task.path}: {metric.name} needs one answer a document; doc_to_target gives "
                            f"{question.gold!r} for document {question.number}")
        else:
            out[metric.name] = (question.gold, answer)
    return out

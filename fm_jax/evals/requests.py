"""A task's documents as requests to a language model, and its answers as results. Layer 4.

Prompts are put together, shots drawn and requests formed as lm-evaluation-harness 0.4.13 does it.
"""

from collections.abc import Iterator
import random
from typing import NamedTuple

from fm_jax.errors import UserError
from fm_jax.data.prepared import document_ends
from fm_jax.evals import execute, filters, metrics
from fm_jax.evals.tasks import Result
from fm_jax.evals.yaml_task import Generation, Task

FEWSHOT_SEED = 1234
SAMPLING_SEED = 1234   # of the first answer; each further one has the next number


class Chat(NamedTuple):
    """How prompts become chats, which the tokenizer's template renders.

    fewshot_as_multiturn: worked examples are turns of user and assistant; otherwise all is one turn of the user.
    """

    system_instruction: str = ""
    fewshot_as_multiturn: bool = True


class Message(NamedTuple):
    """A part of a prompt. `delimiter`: what follows it in plain text."""

    role: str   # system, user, assistant
    content: str
    delimiter: str = ""


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


def questions(task: Task, limit: int = 0, chat: Chat | None = None, tokenizer=None) -> Iterator[Question]:
    """Yields the questions of a task's documents, of the first `limit` if that is not 0.

    Prompts are plain text, or with `chat` what the tokenizer's template makes of them.

    Shots are drawn document by document from one random.Random(1234), so a document's depend on its place and not on
    `limit`.
    """
    rng = random.Random(FEWSHOT_SEED)
    # The first document decides for all, as in the harness.
    inputs = task.doc_to_choice is not None and isinstance(task.text(task.docs[0]), int)
    any_of = isinstance(task.target(task.docs[0]), list)
    heard = chat is None or _takes_system(tokenizer)
    for number, doc in enumerate(task.docs[:limit] if limit else task.docs):
        system = _join(chat.system_instruction if chat else "", task.head(doc), task.fewshot_delimiter)
        before = [Message("system", system)] if system and heard else []
        for shot in draw(task, doc, rng):
            before += _shot(task, shot, inputs)
        target = task.target(doc)
        if isinstance(target, list) != any_of:
            raise UserError(f"{task.path}: doc_to_target gives {target!r} for document {number} of {task.data}, and "
                            f"{task.target(task.docs[0])!r} for the first; a list for all or none")
        prefix, text = task.prefix(doc, task.gen_prefix), task.text(doc)
        choices = task.choices(doc) if task.doc_to_choice is not None else []
        if inputs:
            asked = [turn(q, gen_prefix=prefix, target_delimiter="") for q in choices]
            gold = text
        else:
            if not isinstance(text, str):
                raise UserError(f"{task.path}: doc_to_text gives {text!r} for document {number} of {task.data}; it "
                                "must be a text, or the number of a choice for all documents")
            asked = [turn(text, gen_prefix=prefix, target_delimiter=task.target_delimiter)]
            gold = target
        contexts = [_prompt(before + each, chat, tokenizer, continued=bool(prefix)) for each in asked]
        # A chat's answer begins anew, unless it goes on from a prefix.
        begins = chat is not None and not (task.gen_prefix and not task.gen_prefix[-1].isspace())
        delimiter = "" if begins else task.target_delimiter
        yield _question(task, number, doc, contexts, inputs, choices, gold, target, delimiter)


def _question(task, number, doc, contexts, inputs, choices, gold, target, delimiter):
    """Returns the requests of a document for its one context, or for one of each choice where these are `inputs`."""
    where = f"document {number} of {task.data}"
    if task.output_type in ("loglikelihood", "loglikelihood_rolling") and not isinstance(target, str):
        raise UserError(f"{task.path}: doc_to_target gives {target!r} for {where}; it must be a text")
    if task.output_type == "loglikelihood":
        if not target:
            raise UserError(f"{task.path}: doc_to_target is empty for {where}, so that nothing is to be scored")
        return Question(number, doc, [(contexts[0], target)], "", choices, gold)
    if task.output_type == "loglikelihood_rolling":
        return Question(number, doc, [], target, choices, gold)
    if task.output_type == "generate_until":
        if choices:   # the target is the number of one
            gold = choices[_index(gold, choices, task, where)]
        gold = [str(g) for g in gold] if isinstance(gold, list) else str(gold)
        return Question(number, doc, [], contexts[0], choices, gold)
    if inputs:
        pairs = [(context, f"{delimiter}{target}") for context in contexts]
    else:
        pairs = [(contexts[0], f"{delimiter}{choice}") for choice in choices]
    if any(m.name == "acc_mutual_info" for m in task.metrics):
        pairs += [("", f"{delimiter}{choice}") for choice in choices]
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
         fewshot_delimiter: str = "") -> list[Message]:
    """Returns a question with its answer, or without one up to where the answer begins.

    Without an answer nothing follows the question: the continuation brings its delimiter. `gen_prefix`, the beginning
    of the answer, is set apart only where no white space does it already.
    """
    if answer:
        delimited = not gen_prefix or _touch(question, gen_prefix)
        begun = gen_prefix + " " * _touch(gen_prefix, answer) if gen_prefix else ""
        return [Message("user", question, target_delimiter * delimited),
                Message("assistant", begun + answer, fewshot_delimiter)]
    if gen_prefix:
        return [Message("user", question, target_delimiter * _touch(question, gen_prefix)),
                Message("assistant", gen_prefix)]
    return [Message("user", question)]


def _prompt(messages, chat, tokenizer, continued):
    """Returns the text of messages. `continued`: the last is the beginning of the answer."""
    if chat is None:
        return _text(messages)
    if not chat.fewshot_as_multiturn:
        system, last = messages[: messages[0].role == "system"], messages[len(messages) - continued :]
        asked = messages[len(system) : len(messages) - continued]
        messages = [*system, Message("user", _text(asked[:-1]) + asked[-1].content), *last]
    return tokenizer.chat([{"role": m.role, "content": m.content} for m in messages],
                          add_generation_prompt=not continued, continue_final_message=continued)


def _takes_system(tokenizer):
    """Returns whether the chat template has a place for the system's message."""
    asked = {"role": "user", "content": "?"}
    tokenizer.chat([asked])   # where it refuses this too, it says why
    try:
        return bool(tokenizer.chat([{"role": "system", "content": "."}, asked]))
    except UserError:
        return False


def _text(messages):
    return "".join(m.content + m.delimiter for m in messages)


def _join(before, after, delimiter):
    """Returns two texts, set apart where both are there and no white space does it."""
    return before + (delimiter if before and after and _touch(before, after) else "") + after


def _touch(before, after):
    """Returns whether two texts would meet without white space."""
    return before != "" and not (before[-1].isspace() or after[0].isspace())


# --- Results


def prepare(lm, task: Task, *, limit: int = 0, chat: Chat | None = None) -> list[Question]:
    """Returns a task's questions, as `questions`, having looked for what would fail after hours of answers.

    Raises:
      UserError: what the documents, the metrics or the model's context cannot do; a package that is not installed; no
        safe way to run programs.
    """
    if _runs_code(task):
        execute.check()
        if (most := max(m.options["k"] for m in task.metrics)) > task.repeats:
            raise UserError(f"{task.path}: pass@{most} needs {most} answers to each question; set repeats: {most}")
    if task.generation:
        _room(lm, task.generation, task.path)
    if chat and (chat.system_instruction or task.description) and not _takes_system(lm.tokenizer):
        print(f"{task.name}: the chat template takes no system message: the instruction and the task's description are "
              "left out, as the harness leaves them out")
    for metric in task.metrics:
        metrics.check(metric)
    return list(questions(task, limit, chat, lm.tokenizer))


def _runs_code(task):
    return any(m.name.startswith(metrics.PASS) for m in task.metrics)


def _room(lm, how, where):
    """Returns how many tokens a prompt may have."""
    context = lm.objective.arch.max_seq_len
    if how.max_gen_toks >= context:
        raise UserError(f"{where}: max_gen_toks {how.max_gen_toks} leaves no room for a question in the model's "
                        f"context of {context}; lower it in generation_kwargs")
    return context - how.max_gen_toks


def evaluate(lm, task: Task, *, limit: int = 0, chat: Chat | None = None,
             bootstrap_iters: int = metrics.BOOTSTRAP_ITERS) -> Result:
    """Returns a task's metrics on a model, "NAME,FILTER" and "NAME_stderr,FILTER", and every sample.

    `truncated_contexts`: how many requests were longer than the model's context and lost tokens at their left.

    Raises:
      UserError: as `prepare`.
    """
    asked, runs_code = prepare(lm, task, limit=limit, chat=chat), _runs_code(task)
    answers, truncated = _ask(lm, task, asked)
    items, samples = {}, []
    # Programs are all run, unless the task says which.
    pipelines = (("none", ()),) if runs_code and task.filters == filters.DEFAULT else task.filters
    for pipeline, steps in pipelines:
        judged = answers
        if task.output_type == "generate_until":
            judged = filters.apply(steps, [list(a) for a in answers], [q.doc for q in asked], task.path, pipeline,
                                   several=runs_code)
        notes = [{} for _ in asked]
        if runs_code:
            notes = _outcomes(task, asked, judged)
        for question, answer, judged_answer, note in zip(asked, answers, judged, notes):
            found = _items(task, question, judged_answer, note)
            for name, item in found.items():
                items.setdefault((name, pipeline), []).append(item)
            samples.append({"doc_id": question.number, "doc": question.doc, "target": task.target(question.doc),
                            "arguments": question.pairs or [question.text], "resps": answer,
                            "filtered_resps": judged_answer, "filter": pipeline, **note, **found})
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
        return generate_until(lm, [q.text for q in asked], task.generation, n=task.repeats, where=task.path)
    pairs = list(dict.fromkeys(pair for q in asked for pair in q.pairs))
    scores = dict(zip(pairs, lm.score([a for a, _ in pairs], [b for _, b in pairs])))
    room = lm.objective.arch.max_seq_len + 1   # the last token is only predicted
    # A token is a byte or more, but for the one that begins a text and a space that a tokenizer puts before it.
    long = [pair for pair in pairs if len("".join(pair).encode()) + 2 > room]
    lengths = dict(zip(long, map(len, lm.encode([a + b for a, b in long]))))
    truncated = sum(lengths.get(pair, 0) + (pair[0] == "" and not lm.tokenizer.adds_bos) > room
                    for q in asked for pair in q.pairs)
    return [[(scores[p].logprob, scores[p].is_greedy) for p in q.pairs] for q in asked], truncated


def generate_until(lm, prompts: list[str], how: Generation, *, n: int = 1, where: str) -> tuple[list[list[str]], int]:
    """Returns (n answers to each prompt, how many prompts were cut at their left).

    An answer ends before the first of `how.until` or the end-of-text token. Of several to a prompt, and of several
    equal prompts, each is drawn anew; greedy ones are made once.

    Raises:
      UserError: no room for a prompt; `where` is the file to change.
    """
    tokenizer, room = lm.tokenizer, _room(lm, how, where)
    start, end = document_ends(tokenizer)
    asked = [tuple(ids) or (start,) for ids in lm.encode(prompts)]
    draws, unique = (n, asked) if how.temperature else (1, list(dict.fromkeys(asked)))
    until = [*filter(None, how.until), *(name for name, i in tokenizer.specials.items() if i == end)]
    made = lm.complete(unique, n=draws, max_new_tokens=how.max_gen_toks, temperature=how.temperature, top_k=how.top_k,
                       top_p=how.top_p, seed=SAMPLING_SEED, stop=until,
                       stop_ids=[end, *(tokenizer.specials[stop] for stop in until if stop in tokenizer.specials)])
    texts = [tokenizer.decode(each.tokens) for each in made]
    for stop in until:
        texts = [text.split(stop)[0] for text in texts]
    answers = [texts[i : i + draws] for i in range(0, len(texts), draws)]
    if not how.temperature:
        of = dict(zip(unique, answers))
        answers = [of[ids] * n for ids in asked]
    return answers, sum(len(ids) > room for ids in asked)


def _outcomes(task, asked, judged):
    """Returns {"outcomes": what became of each answer's program} for each question."""
    programs = [[task.text(q.doc) + answer + "\n" + q.gold for answer in ([a] if isinstance(a, str) else a)]
                for q, a in zip(asked, judged)]
    outcomes = iter(execute.run([program for each in programs for program in each]))
    return [{"outcomes": [next(outcomes) for _ in each]} for each in programs]


def _items(task, question, answer, note):
    """Returns {metric: item} of a question. note: the outcomes of its programs, where it has any."""
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
    out, golds = {}, question.gold if isinstance(question.gold, list) else [question.gold]
    for metric in task.metrics:
        if metric.name.startswith(metrics.PASS):
            outcomes = note["outcomes"]
            out[metric.name] = metrics.pass_at_k(len(outcomes), outcomes.count(execute.PASSED), metric.options["k"])
        elif metric.name in metrics.OF_ANSWER:
            out[metric.name] = metrics.OF_ANSWER[metric.name](answer, golds, **metric.options)
        elif isinstance(question.gold, list):
            raise UserError(f"{task.path}: {metric.name} needs one answer a document; doc_to_target gives "
                            f"{question.gold!r} for document {question.number}")
        else:
            out[metric.name] = (question.gold, answer)
    return out

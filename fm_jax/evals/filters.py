"""What happens to a generated answer before it is judged: the pipelines of a YAML task's `filter_list`. Layer 4.

A filter takes for each question the list of its answers (as many as `repeats`), and returns the same. `take_first`,
at the end, takes the one that is judged.
"""

import collections
import inspect
import re
import sys
from typing import NamedTuple
import unicodedata

from fm_jax.errors import UserError, choose

ANSWER = r"#### (\-?[0-9\.\,]+)"   # of GSM8K, the harness's default


class Step(NamedTuple):
    """A filter of FILTERS and its options."""

    name: str
    options: dict


def take_first(answers, docs):
    return [a[0] for a in answers]


def take_first_k(answers, docs, *, k: int):
    """Raises UserError: fewer than k answers."""
    if any(len(a) < k for a in answers):
        raise UserError(f"filter take_first_k: {k} answers are asked for; set repeats to that or more")
    return [a[:k] for a in answers]


def majority_vote(answers, docs):
    """The most frequent answer, the first of them where several are."""
    return [[collections.Counter(a).most_common(1)[0][0]] for a in answers]


def remove_whitespace(answers, docs):
    return [[text.strip() for text in a] for a in answers]


def lowercase(answers, docs):
    return [[text.lower() for text in a] for a in answers]


def uppercase(answers, docs):
    return [[text.upper() for text in a] for a in answers]


def map_answers(answers, docs, *, mapping_dict: dict, default_value=None):
    return [[mapping_dict.get(text, default_value) for text in a] for a in answers]


def regex(answers, docs, *, regex_pattern: str = ANSWER, group_select: int = 0, fallback: str = "[invalid]"):
    """The match number `group_select` (-1: the last), of its groups the first that is not empty.

    `fallback`: without a match, or where all of its groups are empty; an empty match without groups stays empty.
    """
    pattern = re.compile(regex_pattern)
    found = lambda text: _found(pattern, text, group_select)
    return [[fallback if (match := found(text)) is None else match for text in a] for a in answers]


def multi_choice_regex(answers, docs, *, regex_pattern: str = ANSWER, group_select: int = 0,
                       fallback: str = "[invalid]", ignore_case: bool = False, ignore_punctuation: bool = False,
                       regexes_to_ignore: list | None = None):
    """As `regex`; else "(A)" for a choice (column `choices`) that the answer spells, or for a letter behind ":"."""
    pattern = re.compile(regex_pattern)

    def plain(text):
        for ignored in regexes_to_ignore or ():
            text = re.sub(ignored, "", text)
        text = text.lower() if ignore_case else text
        return text.translate(punctuation) if ignore_punctuation else text

    punctuation = dict.fromkeys(i for i in range(sys.maxunicode) if unicodedata.category(chr(i)).startswith("P"))
    out = []
    for texts, doc in zip(answers, docs, strict=True):
        letters = [chr(ord("A") + i) for i in range(len(doc["choices"]))]
        choices = [plain(c.strip()) for c in doc["choices"]]
        spelt, lettered = dict(zip(choices, letters)), re.compile(rf":[\s]*({'|'.join(letters)})")
        # The longest first: a choice must not be taken for another that it begins with.
        any_choice = re.compile("|".join(sorted(map(re.escape, choices), key=len, reverse=True)))
        chosen = []
        for text in texts:
            found = _found(pattern, text, group_select)
            if not found and (choice := _found(any_choice, plain(text), group_select)):
                found = f"({spelt[choice]})" if choice in spelt else choice
            if not found and (letter := _found(lettered, text, group_select)):
                found = f"({letter})"
            chosen.append(found or fallback)
        out.append(chosen)
    return out


def _found(pattern, text, which):
    """Returns the chosen match without white space at its ends, None where there is none."""
    matches = pattern.findall(text)
    if not matches:
        return None
    match = matches[which]   # of several groups: a tuple
    match = next(filter(None, match), None) if isinstance(match, tuple) else match
    return None if match is None else match.strip()


FILTERS = {"take_first": take_first, "take_first_k": take_first_k, "majority_vote": majority_vote,
           "remove_whitespace": remove_whitespace, "lowercase": lowercase, "uppercase": uppercase, "map": map_answers,
           "regex": regex, "multi_choice_regex": multi_choice_regex}
DEFAULT = (("none", (Step("take_first", {}),)),)


def from_fields(filter_list, output_type: str, path: str) -> tuple[tuple[str, tuple[Step, ...]], ...]:
    """Returns (name, steps) of each pipeline of a task's filter_list.

    Raises:
      UserError: a filter or an option that is not known, or text filters on what is not generated.
    """
    if filter_list is None:
        return DEFAULT
    pipelines = []
    try:
        for pipeline in filter_list:
            steps = []
            for given in pipeline["filter"]:
                options = {k: v for k, v in given.items() if k != "function"}
                function = FILTERS[choose(given["function"], FILTERS, f"{path}: filter_list")]
                known = [p.name for p in inspect.signature(function).parameters.values() if p.kind == p.KEYWORD_ONLY]
                for option in options:
                    choose(option, known, f"{path}: filter {given['function']}")
                steps.append(Step(given["function"], options))
            pipelines.append((pipeline["name"], tuple(steps)))
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: filter_list must be a list of {{name, filter: [{{function, ...}}]}}: {error!r}"
                        ) from error
    if output_type != "generate_until" and any(s.name != "take_first" for _, steps in pipelines for s in steps):
        raise UserError(f"{path}: filter_list changes texts, and output_type {output_type} has none")
    return tuple(pipelines)


def apply(steps, answers: list[list[str]], docs: list[dict], path: str, name: str, *, several: bool = False) -> list:
    """Returns the one answer to each question that a pipeline's steps leave; a list of them is one only if `several`.

    Raises:
      UserError: they leave several, or something other than text.
    """
    for step in steps:
        try:
            answers = FILTERS[step.name](answers, docs, **step.options)
        except (TypeError, KeyError, AttributeError, IndexError, re.error) as error:
            raise UserError(f"{path}: filter {name}: {step.name} failed: {error!r}") from error
    for a in answers:
        if isinstance(a, list) and not several:
            raise UserError(f"{path}: filter {name} leaves a list of answers to each question; end it with take_first")
    return answers

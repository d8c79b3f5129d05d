"""Filters of answers, by hand."""

import pytest

from fm_jax.errors import UserError
from fm_jax.evals import filters
from fm_jax.evals.filters import Step

DOCS = [{"choices": ["red fox", "Blue-Jay", "red fox cub"]}]


def run(answers, *steps):
    return filters.apply([Step(name, options) for name, options in steps], [answers], DOCS, "t.yaml", "f")[0]


FIRST = ("take_first", {})


@pytest.mark.parametrize("text, options, found", [
    ("so #### 1,234 and #### 5", {}, "1,234"), ("so #### 1,234 and #### 5", {"group_select": -1}, "5"),
    ("none", {}, "[invalid]"), ("none", {"fallback": "?"}, "?"),
    ("x= 7 ;", {"regex_pattern": "x=(.*);"}, "7"),                       # white space at the ends goes
    ("b3", {"regex_pattern": r"(a\d)|(b\d)"}, "b3"),                       # of groups the first that is not empty
    ("xy", {"regex_pattern": "(a?)(b?)x"}, "[invalid]"), ("xy", {"regex_pattern": "(a?)x"}, "")])
def test_regex(text, options, found):
    assert run([text], ("regex", options), FIRST) == found


def test_the_simple_ones():
    assert run([" A b\n"], ("remove_whitespace", {}), ("lowercase", {}), FIRST) == "a b"
    assert run(["a"], ("uppercase", {}), ("map", {"mapping_dict": {"A": "x"}}), FIRST) == "x"
    assert run(["a"], ("map", {"mapping_dict": {}, "default_value": "none"}), FIRST) == "none"
    answers = ["1", "2", "2", "1", "3"]
    assert run(answers, ("majority_vote", {}), FIRST) == "1"                       # the first of equals
    assert run(answers, ("take_first_k", {"k": 3}), ("majority_vote", {}), FIRST) == "2"


@pytest.mark.parametrize("text, found", [
    ("The answer is (B).", "(B)"), ("it is the RED fox", "(A)"), ("a bluejay!", "(B)"), ("a red fox cub", "(C)"),
    ("I say: B", "(B)"),
    ("no idea", "[invalid]")])
def test_letters_and_choices(text, found):
    options = {"regex_pattern": r"(\([A-Z]\))", "ignore_case": True, "ignore_punctuation": True}
    assert run([text], ("multi_choice_regex", options), FIRST) == found


def test_a_pipeline_ends_with_one_answer():
    with pytest.raises(UserError, match="t.yaml: filter f leaves a list of answers to each question; end it"):
        run(["a"], ("lowercase", {}))
    with pytest.raises(UserError, match="take_first_k: 2 answers are asked for; set repeats"):
        run(["a"], ("take_first_k", {"k": 2}), FIRST)
    with pytest.raises(UserError, match="t.yaml: filter f: regex failed"):
        run(["#### 1"], ("regex", {"group_select": 3}), FIRST)

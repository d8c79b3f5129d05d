"""Prompts, shots, requests and results of task files: written out by hand, and drawn again by a naive loop.

tests/peers/same_evaluations.py compares all of it with lm-evaluation-harness itself.
"""

import json
import math
import random
import types

import pytest

from fm_jax import tokenizer as tokenizers
from fm_jax.errors import UserError
from fm_jax.evals import execute, requests, yaml_task

DOCS = [{"q": f"q{i}", "a": f"a{i}", "label": i % 2, "options": [f"x{i}", f"yy{i}"]} for i in range(6)]


class Oracle:
    """Stands for a loaded model: answers by functions, remembers what it was asked."""

    tokenizer = tokenizers.load("bytes")

    def __init__(self, logprob=lambda a, b: 0.0, answer=lambda prompt, i: "", max_seq_len=100_000):
        self.logprob, self.answer, self.asked = logprob, answer, []
        self.objective = types.SimpleNamespace(arch=types.SimpleNamespace(max_seq_len=max_seq_len))

    def score(self, contexts, continuations):
        self.asked += zip(contexts, continuations)
        found = (self.logprob(a, b) for a, b in zip(contexts, continuations))
        return [types.SimpleNamespace(logprob=x, is_greedy=x > -1) for x in found]

    def score_texts(self, texts):
        self.asked += texts
        return [self.logprob("", t) for t in texts]

    def encode(self, texts):
        return self.tokenizer.encode_batch(texts)

    def complete(self, prompts, *, n, **options):
        self.asked += [self.tokenizer.decode(ids) for ids in prompts for _ in range(n)]
        self.options = options
        answers = [self.answer(p, i) for i, p in enumerate(self.asked)]
        return [types.SimpleNamespace(tokens=ids) for ids in self.tokenizer.encode_batch(answers)]


@pytest.fixture
def load(tmp_path):
    """Returns a function (num_fewshot, documents of splits, fields) -> task; multiple choice where not said."""
    def make(num_fewshot=0, test=DOCS, train=None, **fields):
        files = {}
        for split, docs in {"test": test, "train": train}.items():
            if docs is not None:
                files[split] = str(tmp_path / f"{split}.jsonl")
                (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(d) + "\n" for d in docs))
        base = {"task": "t", "dataset_path": "json", "dataset_kwargs": {"data_files": files}, "test_split": "test",
                "output_type": "multiple_choice", "doc_to_text": "Q: {{q}}\nA:", "doc_to_target": "label",
                "doc_to_choice": "options", "num_fewshot": num_fewshot}
        (tmp_path / "t.yaml").write_text(json.dumps({k: v for k, v in (base | fields).items() if v is not None}))
        return yaml_task.load(tmp_path / "t.yaml")
    return make


GENERATE = {"output_type": "generate_until", "doc_to_choice": None, "doc_to_target": "a"}


def prompts(task):
    return [q.pairs[0][0] if q.pairs else q.text for q in requests.questions(task)]


def test_a_prompt_by_hand(load):
    train = [{"q": "T", "a": "", "label": 1, "options": ["n", "y"]}]
    task = load(1, train=train, training_split="train", description="About {{q}}.\n", test=DOCS[:1])
    (question,) = requests.questions(task)
    context = "About q0.\nQ: T\nA: y\n\nQ: q0\nA:"
    assert question.pairs == [(context, " x0"), (context, " yy0")]
    task = load(1, train=train, training_split="train", target_delimiter="=", fewshot_delimiter="#", test=DOCS[:1])
    (question,) = requests.questions(task)
    assert question.pairs[1] == ("Q: T\nA:=y#Q: q0\nA:", "=yy0")


def test_shots_may_be_written_otherwise(load):
    config = {"samples": [{"q": "S", "a": ["first", "second"], "label": 0, "options": ["n"]}], "sampler": "first_n",
              "doc_to_text": "{{q}}?", "doc_to_target": "a", "target_delimiter": "->", "fewshot_delimiter": "|"}
    assert prompts(load(1, fewshot_config=config, test=DOCS[:1])) == ["S?->first|Q: q0\nA:"]


def test_gen_prefix_is_set_apart_once(load):
    """The delimiter stands before it only where no white space does, and a space behind it in a shot likewise."""
    make = lambda prefix, text: prompts(load(1, **GENERATE, gen_prefix=prefix, doc_to_text=text, test=DOCS[1:2],
                                             train=DOCS[:1], training_split="train", target_delimiter="_"))[0]
    assert make("So", "{{q}}") == "q0_So a0\n\nq1_So" and make("So ", "{{q}}") == "q0_So a0\n\nq1_So "
    assert make("So", "{{q}} ") == "q0 So a0\n\nq1 So" and make("", "{{q}}") == "q0_a0\n\nq1"


def test_shots_are_drawn_as_the_harness_draws():
    """One random.Random(1234) for all documents in their order; one more where the document may be among them."""
    pool = [{"i": i} for i in range(9)]
    for excludes in (False, True):
        task = types.SimpleNamespace(path="t", num_fewshot=3, shots=types.SimpleNamespace(
            pool=pool, sampler="default", excludes_question=excludes))
        ours, theirs = random.Random(5), random.Random(5)
        for doc in pool:
            expected = [d for d in theirs.sample(pool, 4) if d != doc][:3] if excludes else theirs.sample(pool, 3)
            assert requests.draw(task, doc, ours) == expected
    task.shots.sampler = "first_n"
    assert requests.draw(task, pool[1], ours) == [pool[0], pool[2], pool[3]]
    task.shots.excludes_question = False
    assert requests.draw(task, pool[1], ours) == pool[:3]
    task.num_fewshot = 0
    assert requests.draw(task, pool[1], ours) == []


def test_the_seed_and_the_order_of_documents(load):
    task = load(2, train=DOCS[:5], training_split="train", doc_to_text="{{q}}", **GENERATE)
    rng = random.Random(1234)
    expected = []
    for doc in DOCS:
        shots = rng.sample(DOCS[:5], 2)
        expected.append("".join(f"{s['q']} {s['a']}\n\n" for s in shots) + doc["q"])
    assert prompts(task) == expected
    assert [q.text for q in requests.questions(task, limit=2)] == expected[:2]


def test_a_document_twice_in_the_pool_is_never_its_own_shot(load):
    twice = [DOCS[0]] * 4 + DOCS[1:3]
    made = prompts(load(2, test=twice, fewshot_split="test", doc_to_text="<{{q}}>", **GENERATE))
    for prompt, doc in zip(made, twice):
        assert prompt.count("<") == 3 and prompt.count(f"<{doc['q']}>") == 1
    with pytest.raises(UserError, match="t.yaml: 3 shots are asked for, and there are 2 documents to draw from"):
        prompts(load(3, test=twice, fewshot_split="test", **GENERATE))


def test_choices_that_are_questions(load):
    """doc_to_text is the number of the right one; each is a context, and the target is what follows all of them."""
    docs = [d | {"end": "the end"} for d in DOCS[:2]]
    task = load(1, test=docs, train=docs, training_split="train", doc_to_text="label", doc_to_target="end",
                doc_to_choice="{{['a ' + q, 'b ' + q]}}", fewshot_config={"sampler": "first_n"})
    first, second = requests.questions(task)
    assert first.pairs == [("a q0 the end\n\na q0", " the end"), ("a q0 the end\n\nb q0", " the end")]
    assert second.gold == 1
    result = requests.evaluate(Oracle(lambda a, b: -2.0 + a.endswith("b q1") + a.endswith("a q0")), task)
    assert result.metrics["acc,none"] == 1.0


def test_results_of_multiple_choice_by_hand(load):
    metric_list = [{"metric": m} for m in ("acc", "acc_norm", "acc_mutual_info")]
    task = load(test=DOCS[:4], metric_list=metric_list)   # golds x, yy, x, yy
    logprob = lambda a, b: {"x": -2.0, "y": -2.9}[b[1]] if a else {"x": -2.0, "y": -9.0}[b[1]]
    lm = Oracle(logprob)
    metrics, samples = requests.evaluate(lm, task)
    # x is likelier, yy by character (-2.9 / 3 > -2 / 2; not with the space counted), and yy gains 6.1 by the question.
    assert metrics["acc,none"] == 0.5 and metrics["acc_norm,none"] == 0.5 and metrics["acc_mutual_info,none"] == 0.5
    assert [s["acc_mutual_info"] for s in samples] == [0, 1, 0, 1] and [s["acc"] for s in samples] == [1, 0, 1, 0]
    assert [s["acc_norm"] for s in samples] == [0, 1, 0, 1]
    assert metrics["acc_stderr,none"] == pytest.approx(math.sqrt(4 * 0.25 / 3) / 2)
    assert metrics["documents"] == 4 and metrics["truncated_contexts"] == 0
    assert samples[1]["resps"] == [(-2.0, False), (-2.9, False), (-2.0, False), (-9.0, False)]
    assert samples[1]["target"] == 1 and samples[1]["doc"] == DOCS[1] and samples[1]["filter"] == "none"
    assert len(lm.asked) == len(set(lm.asked)) == 16   # of four questions, two choices, with and without question
    two = [DOCS[0], DOCS[0]]
    again = Oracle(logprob)
    assert requests.evaluate(again, load(test=two)).metrics["documents"] == 2 and len(again.asked) == 2   # asked once


def test_loglikelihood_and_rolling_by_hand(load):
    task = load(output_type="loglikelihood", doc_to_choice=None, doc_to_target=" {{a}}", test=DOCS[:2])
    lm = Oracle(lambda a, b: {" a0": -0.5, " a1": -1.5}[b])   # greedy above -1
    metrics, _ = requests.evaluate(lm, task, bootstrap_iters=1000)
    assert lm.asked == [("Q: q0\nA:", " a0"), ("Q: q1\nA:", " a1")]   # no delimiter is added
    assert metrics["perplexity,none"] == pytest.approx(math.exp(1)) and metrics["acc,none"] == 0.5
    assert "perplexity_stderr,none" in metrics
    task = load(output_type="loglikelihood_rolling", doc_to_choice=None, doc_to_text="", doc_to_target="{{q}} {{a}}",
                test=DOCS[:2])
    metrics, samples = requests.evaluate(Oracle(lambda a, b: -5.0), task)
    assert metrics["word_perplexity,none"] == pytest.approx(math.exp(10 / 4))
    assert metrics["bits_per_byte,none"] == pytest.approx(10 / 10 / math.log(2))
    assert "bits_per_byte_stderr,none" not in metrics
    assert samples[0]["arguments"] == ["q0 a0"] and samples[0]["byte_perplexity"] == (-5.0, 5)


def test_generation_stops_filters_and_judges(load):
    steps = [{"function": "regex", "regex_pattern": r"(\w\d)"}, {"function": "majority_vote"},
             {"function": "take_first"}]
    task = load(**GENERATE, test=DOCS[:2], repeats=3,
                generation_kwargs={"until": ["\n\n", "stop"], "max_gen_toks": 9, "temperature": 0.5, "do_sample": True},
                filter_list=[{"name": "vote", "filter": steps}, {"name": "raw", "filter": steps[-1:]}])
    answers = ["a9", "is a0 stop a8", "so a0\n\na8",   "a1", "a2", "a2"]
    lm = Oracle(answer=lambda prompt, i: answers[i])
    metrics, samples = requests.evaluate(lm, task)
    assert lm.asked == ["Q: q0\nA:"] * 3 + ["Q: q1\nA:"] * 3
    assert (lm.options["max_new_tokens"], lm.options["temperature"]) == (9, 0.5)
    assert samples[0]["resps"] == ["a9", "is a0 ", "so a0"] and samples[0]["filtered_resps"] == "a0"
    assert metrics["exact_match,vote"] == 0.5 and metrics["exact_match,raw"] == 0.5   # a0, a2; a9, a1
    assert [s["exact_match"] for s in samples] == [1, 0, 0, 1]


TEMPLATE = ("{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
            "{% if add_generation_prompt %}<assistant>{% endif %}")


def chats(task, *how):
    tokenizer = tokenizers.load("bytes")
    tokenizer.chat_template = TEMPLATE
    return list(requests.questions(task, chat=requests.Chat(*how), tokenizer=tokenizer))


def test_a_chat_by_hand(load):
    train = [{"q": "T", "a": "", "label": 1, "options": ["n", "y"]}]
    fields = dict(train=train, training_split="train", description="About {{q}}.", test=DOCS[:1])
    (question,) = chats(load(1, **fields), "Be brief.", True)
    head = "<system>Be brief.\n\nAbout q0.\n"
    assert question.pairs[0] == (head + "<user>Q: T\nA:\n<assistant>y\n<user>Q: q0\nA:\n<assistant>", "x0")
    (question,) = chats(load(1, **fields), "Be brief.", False)
    assert question.pairs[0] == (head + "<user>Q: T\nA: y\n\nQ: q0\nA:\n<assistant>", "x0")
    (question,) = chats(load(0, test=DOCS[:1]))
    assert question.pairs[0][0] == "<user>Q: q0\nA:\n<assistant>"


def test_a_template_without_a_system_leaves_it_out_and_says_so(load, monkeypatch, capsys):
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
    monkeypatch.setattr(Oracle, "tokenizer", tokenizers.load("bytes"))
    Oracle.tokenizer.chat_template = refuses
    task, lm = load(test=DOCS[:1], description="About {{q}}."), Oracle()
    requests.evaluate(lm, task, chat=requests.Chat("Be brief."))
    assert lm.asked[0] == ("<user>Q: q0\nA:\n<assistant>", "x0")
    assert "t: the chat template takes no system message" in capsys.readouterr().out
    requests.evaluate(lm, load(test=DOCS[:1]), chat=requests.Chat())
    assert not capsys.readouterr().out   # nothing to leave out
    Oracle.tokenizer.chat_template = "{{ raise_exception('nobody') }}"
    with pytest.raises(UserError, match="the chat template refuses this chat: nobody"):
        requests.evaluate(lm, task, chat=requests.Chat())


def test_a_chat_goes_on_from_its_prefix(load):
    """The answer is begun in the assistant's own turn, and the choice is set apart from it."""
    fields = dict(test=DOCS[1:2], train=DOCS[:1], training_split="train")
    ask = lambda *how, **more: chats(load(1, **fields, **more), "", *how)[0].pairs[0]
    assert ask(True, gen_prefix="So") == ("<user>Q: q0\nA:\n<assistant>So x0\n<user>Q: q1\nA:\n<assistant>So", " x1")
    assert ask(False, gen_prefix="So") == ("<user>Q: q0\nA: So x0\n\nQ: q1\nA:\n<assistant>So", " x1")
    assert ask(True, gen_prefix="So ")[1] == "x1" and ask(True, gen_prefix="")[1] == "x1"


def test_greedy_answers_are_made_once(load):
    task = load(**GENERATE, test=DOCS[:1] * 3, repeats=4)
    lm = Oracle(answer=lambda prompt, i: f"a{i}")
    metrics, samples = requests.evaluate(lm, task)
    assert lm.asked == ["Q: q0\nA:"] and samples[2]["resps"] == ["a0"] * 4 and metrics["exact_match,none"] == 1.0


def test_special_tokens_end_an_answer(load):
    """The end of a text does without being asked to; so does one that `until` spells; what spells them is cut off."""
    task = load(**GENERATE, test=DOCS[:1], generation_kwargs={"until": ["<pad>", "Q:"]})
    lm = Oracle(answer=lambda prompt, i: "a0</s> a1")
    _, samples = requests.evaluate(lm, task)
    assert samples[0]["resps"] == ["a0"] and lm.options["stop"] == ["<pad>", "Q:", "</s>"]
    assert set(lm.options["stop_ids"]) == {lm.tokenizer.eos_id, lm.tokenizer.pad_id}


ANSWER = {"function": "regex", "regex_pattern": r"The answer is (\-?[0-9\.\,]*[0-9]+)"}
COT = {   # fields of the harness's gsm8k_cot_self_consistency
    "output_type": "generate_until", "doc_to_choice": None, "doc_to_text": "Q: {{question}}\nA:",
    "doc_to_target": "{{answer.split('####')[-1].strip() if answer is defined else target}}", "num_fewshot": 1,
    "fewshot_config": {"sampler": "first_n", "samples": [
        {"question": "2 and 3?", "target": "2 + 3 is 5. The answer is 5."}, {"question": "no", "target": "no"}]},
    "generation_kwargs": {"until": ["Q:", "\n\n"], "do_sample": True, "temperature": 0.2}, "repeats": 5,
    "filter_list": [
        {"name": "score-first", "filter": [ANSWER, {"function": "take_first"}]},
        {"name": "maj@5", "filter": [ANSWER, {"function": "majority_vote"}, {"function": "take_first"}]},
        {"name": "maj@3", "filter": [{"function": "take_first_k", "k": 3}, ANSWER, {"function": "majority_vote"},
                                     {"function": "take_first"}]}],
    "metric_list": [{"metric": "exact_match", "ignore_case": True, "regexes_to_ignore": [",", r"\$", r"\.$"]}]}


def test_chain_of_thought_with_self_consistency(load):
    docs = [{"question": "1,000 and 1?", "answer": "so #### 1001"}, {"question": "7?", "answer": "#### 7"}]
    answers = ["The answer is 9.", "1001. The answer is 1,001.", "I think 9. The answer is 9.",
               "The answer is 1001.\n\nQ: x The answer is 9.", "The answer is 1001.",
               "The answer is 7", "hm", "hm", "hm", "The answer is 7."]
    lm = Oracle(answer=lambda prompt, i: answers[i])
    metrics, samples = requests.evaluate(lm, load(**COT, test=docs))
    assert lm.asked[0] == "Q: 2 and 3?\nA: 2 + 3 is 5. The answer is 5.\n\nQ: 1,000 and 1?\nA:"
    found = {(s["filter"], s["doc_id"]): s["filtered_resps"] for s in samples}
    assert found == {("score-first", 0): "9", ("score-first", 1): "7", ("maj@5", 0): "9", ("maj@5", 1): "[invalid]",
                     ("maj@3", 0): "9", ("maj@3", 1): "[invalid]"}
    # "1,001" and "1001" are two answers to the vote, as in the harness: what is ignored is so when it is judged.
    assert metrics["exact_match,score-first"] == 0.5 and metrics["exact_match,maj@5"] == 0.0


CODE = {"output_type": "generate_until", "doc_to_choice": None, "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{test}}\ncheck({{entry_point}})", "metric_list": [{"metric": "pass_at_k", "k": [1, 2]}],
        "repeats": 3, "generation_kwargs": {"until": ["\ndef"], "temperature": 1.0}}


def test_programs_are_run(load, monkeypatch):
    docs = [{"prompt": "def f(x):\n", "test": f"def check(f):\n    assert f({i}) == {i + 1}", "entry_point": "f"}
            for i in (1, 2)]
    answers = ["    return x + 1\ndef g(", "    return 2", "    return", "    return 2", "    1 / 0", "    x = ("]
    lm = Oracle(answer=lambda prompt, i: answers[i])
    metrics, samples = requests.evaluate(lm, load(**CODE, test=docs))
    assert [s["pass@1"] for s in samples] == pytest.approx([2 / 3, 0]) and [s["pass@2"] for s in samples] == [1, 0]
    assert metrics["pass@1,none"] == pytest.approx(1 / 3) and metrics["pass@2,none"] == 0.5
    assert samples[0]["outcomes"] == ["passed", "passed", "AssertionError: "]
    assert samples[1]["outcomes"][1] == "ZeroDivisionError: division by zero"
    assert samples[0]["resps"][0] == samples[0]["filtered_resps"][0] == "    return x + 1"
    first = [{"name": "first", "filter": [{"function": "take_first"}]}]
    metrics, _ = requests.evaluate(Oracle(answer=lambda prompt, i: answers[i]), load(**CODE | {
        "metric_list": [{"metric": "pass_at_k"}], "filter_list": first}, test=docs))
    assert metrics["pass@1,first"] == 0.5
    with pytest.raises(UserError, match="pass@2 needs 2 answers to each question; set repeats: 2"):
        requests.evaluate(lm, load(**CODE | {"repeats": 1}, test=docs))
    monkeypatch.setattr(execute, "run", lambda programs: ["no"] * len(programs))
    asked = len(lm.asked)
    with pytest.raises(UserError, match="is not run"):
        requests.evaluate(lm, load(**CODE, test=docs))
    assert len(lm.asked) == asked   # said before anything is generated


def test_several_right_answers(load):
    task = load(**GENERATE | {"doc_to_target": "options"}, test=DOCS[:2])
    metrics, _ = requests.evaluate(Oracle(answer=lambda prompt, i: ["yy0", "x0"][i]), task)
    assert metrics["exact_match,none"] == 0.5
    task = load(doc_to_target="{{[0, 1]}}", test=DOCS[:2])
    assert requests.evaluate(Oracle(), task).metrics["acc,none"] == 1.0
    with pytest.raises(UserError, match="acc_mutual_info needs one right choice"):
        list(requests.questions(load(doc_to_target="{{[0, 1]}}", metric_list=[{"metric": "acc_mutual_info"}])))


def test_cut_contexts_are_counted(load):
    """A byte is a token: 'Q: q0' + 'A:' + ' x0' is 11 of them, ' yy0' 12; the last is only predicted."""
    for room, cut in ((11, 0), (10, 6), (9, 12)):
        assert requests.evaluate(Oracle(max_seq_len=room), load()).metrics["truncated_contexts"] == cut
    with pytest.raises(UserError, match="max_gen_toks 256 leaves no room for a question in the model's context of 256"):
        requests.evaluate(Oracle(max_seq_len=256), load(**GENERATE))
    for room, cut in ((264, 0), (263, 6)):   # 'Q: q0' + 'A:' of 8, and max_gen_toks 256
        assert requests.evaluate(Oracle(max_seq_len=room), load(**GENERATE)).metrics["truncated_contexts"] == cut


@pytest.mark.parametrize("fields, message", [
    ({"doc_to_target": "{{7}}"}, "the answer 7 of document 0 of .*test.jsonl is none of its choices"),
    ({"doc_to_target": "a"}, "the answer 'a0' of document 0"),
    ({"output_type": "loglikelihood", "doc_to_choice": None, "doc_to_target": "label"}, "it must be a text"),
    ({"output_type": "loglikelihood", "doc_to_choice": None, "doc_to_target": ""}, "is empty for document 0 of"),
    ({**GENERATE, "doc_to_target": "label", "num_fewshot": 1}, "doc_to_target gives . for the shot"),
    ({"doc_to_text": "{% if label == 0 %}1{% else %}x{% endif %}"}, "'x' of document 1"),
])
def test_refused_with_the_document(fields, message, load):
    with pytest.raises(UserError, match="t.yaml: .*" + message):
        list(requests.questions(load(**fields)))

"""Batch t as a pure function of (config, seed, t): hosts, resume, epochs, validation, errors."""

import itertools
import json

import numpy as np
import pytest

from fm_jax import config as configs
from fm_jax.data import documents, prepared
from fm_jax.data.batches import Batches, batches, examples_per_epoch, fingerprints, load_tokenizer, open_batches
from fm_jax.data.mixture import Mixture
from fm_jax.errors import UserError

SEQ_LEN = 16


class Plain:
    """The least objective: examples are the rows and their seeds."""

    def examples(self, records, seeds):
        return {**records, "seed": seeds}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    for name, count in (("a", 120), ("b", 30)):
        texts = [f"{name}: document number {n} says {n * n}" for n in range(count)]
        (root / f"{name}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
        prepared.prepare(documents.open_sources(str(root / f"{name}.jsonl")), "bytes", root / name,
                         validation_frac=0.2)
    prepared.prepare(documents.open_sources(str(root / "b.jsonl")), "sentencepiece:290", root / "other",
                     validation_frac=0.2)
    return root


def make_config(folder, train="{0}/a", **changes):
    config = configs.defaults()
    config.seq_len, config.batch_size = SEQ_LEN, 8
    config.data.train = train.format(folder)
    for key, value in changes.items():
        config[key] = value
    return config


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


@pytest.mark.parametrize("train", ["{0}/a", "{0}/a:0.7,{0}/b:0.3"])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_hosts_share_one_global_batch(folder, train, split):
    config = make_config(folder, train)
    whole = take(batches(config, Plain(), split=split), 6)
    for hosts in (2, 4, 8):
        parts = [take(batches(config, Plain(), split=split, process_index=i, process_count=hosts), 6)
                 for i in range(hosts)]
        for t, batch in enumerate(whole):
            assert_equal(batch, {k: np.concatenate([p[t][k] for p in parts]) for k in batch})


@pytest.mark.parametrize("prefetch", [0, 1, 5])
def test_resuming_is_starting_at_a_step(folder, prefetch):
    config = make_config(folder, "{0}/a:2,{0}/b:1")
    config.data.prefetch_batches = prefetch
    straight = take(batches(config, Plain()), 60)
    for start in (1, 7, 55):
        for ours, theirs in zip(straight[start:], take(batches(config, Plain(), start_step=start), 60 - start)):
            assert_equal(ours, theirs)
    opened = open_batches(config, Plain())
    for step in (59, 0, 17):
        assert_equal(opened.batch(step), straight[step])
    np.testing.assert_array_equal(opened.ids(3), np.arange(24, 32))


def test_an_epoch_has_every_row_once_and_epochs_differ(folder):
    config = make_config(folder)
    rows = prepared.Rows(folder / "a", "train", SEQ_LEN)
    size = examples_per_epoch(config)
    assert size == len(rows)
    stream = np.concatenate([b["tokens"] for b in take(batches(config, Plain()), 2 * size // 8 + 1)])
    expected = rows[np.arange(size)]["tokens"]
    first, second = stream[:size], stream[size:2 * size]
    assert not (first == second).all(-1).mean() > 0.1
    for epoch in (first, second):
        np.testing.assert_array_equal(epoch[np.lexsort(epoch.T)], expected[np.lexsort(expected.T)])
    # Every token is a target once: the first of the stream never is, and the padding is no token.
    segments = np.concatenate([b["segment_ids"] for b in take(batches(config, Plain()), size // 8 + 1)])[:size]
    assert (segments[:, 1:] > 0).sum() == rows.tokens - 1


def test_seeds_are_the_examples_own_and_change_with_the_run_s(folder):
    first = np.concatenate([b["seed"] for b in take(batches(make_config(folder), Plain()), 40)])
    assert first.dtype == np.uint64 and len(np.unique(first)) == len(first) == 320
    other = take(batches(make_config(folder, seed=1), Plain()), 40)
    assert not np.isin(np.concatenate([b["seed"] for b in other]), first).any()
    ours = take(batches(make_config(folder), Plain()), 40)
    assert not all((a["tokens"] == b["tokens"]).all() for a, b in zip(other, ours))


def test_validation_is_the_whole_held_out_split_in_order_and_padded(folder):
    config = make_config(folder, "{0}/a,{0}/b")
    rows = [prepared.Rows(folder / name, "validation", SEQ_LEN) for name in "ab"]
    got = list(batches(config, Plain(), split="validation"))
    tokens = np.concatenate([b["tokens"] for b in got])
    expected = np.concatenate([r[np.arange(len(r))]["tokens"] for r in rows])
    assert len(tokens) % 8 == 0 and len(tokens) - len(expected) < 8
    np.testing.assert_array_equal(tokens[:len(expected)], expected)
    assert not np.concatenate([b["segment_ids"] for b in got])[len(expected):].any()
    assert open_batches(config, Plain(), split="validation").num_batches == len(got)
    config.eval.batches = 2
    assert len(list(batches(config, Plain(), split="validation"))) == 2
    assert list(batches(config, Plain(), split="validation", start_step=2)) == []
    config.eval.batches, config.data.validation = 0, f"{folder}/b"
    only_b = np.concatenate([b["tokens"] for b in batches(config, Plain(), split="validation")])
    np.testing.assert_array_equal(only_b[:len(rows[1])], expected[len(rows[0]):])


def test_records_of_any_kind_can_be_mixed():
    class Images:
        def __len__(self):
            return 12

        def __getitem__(self, rows):
            return {"image": rows[:, None, None] * np.ones((1, 4, 4)), "label": rows}

    class Classify:
        def examples(self, records, seeds):
            return {"pixels": records["image"] / 255, "label": records["label"]}

    opened = Batches(Mixture([Images()], seed=1), Classify(), batch_size=4, num_batches=None, seed=1)
    epoch = np.concatenate([b["label"] for b in take(opened.iterate(), 3)])
    np.testing.assert_array_equal(np.sort(epoch), np.arange(12))


def test_an_error_in_a_worker_thread_reaches_the_caller(folder):
    class Broken:
        def examples(self, records, seeds):
            raise UserError("no examples today")

    with pytest.raises(UserError, match="no examples today"):
        next(batches(make_config(folder), Broken()))


def test_fingerprints_and_tokenizer_come_from_the_prepared_folders(folder):
    config = make_config(folder, "{0}/a:0.7,{0}/b:0.3")
    of = {n: prepared.read_manifest(folder / n)["fingerprint"] for n in "ab"}
    assert fingerprints(config) == {f"{folder}/a": of["a"] + " x 0.7000", f"{folder}/b": of["b"] + " x 0.3000"}
    assert fingerprints(make_config(folder, "{0}/a:7,{0}/b:3")) == fingerprints(config)   # the same proportions
    assert fingerprints(make_config(folder, "{0}/a:7")) == {f"{folder}/a": of["a"]}
    assert load_tokenizer(config).vocab_size == 262
    config.data.tokenizer = f"{folder}/other/tokenizer"
    assert load_tokenizer(config).vocab_size == 290


@pytest.mark.parametrize("changes, message", [
    (dict(batch_size=5000), r"has \d+ rows of 16 tokens, fewer than one batch of 5000"),
    (dict(train=""), "--config.data.train is empty"),
    (dict(train="{0}/nothing"), "no prepared data at '.*nothing'"),
    (dict(train="{0}/a:much"), "'much' after the colon is no weight"),
    (dict(train="{0}/a:1,{0}/b:-1"), "must be positive"),
    (dict(train="{0}/a,{0}/other"), "other was tokenized with another tokenizer"),
])
def test_bad_data_settings_are_one_clear_line(folder, changes, message):
    with pytest.raises(UserError, match=message) as error:
        batches(make_config(folder, **changes), Plain())
    assert "\n" not in str(error.value)


def test_other_tokenizer_and_indivisible_batches_are_refused(folder):
    config = make_config(folder)
    with pytest.raises(UserError, match="batch_size=8 must be a multiple of the 3 hosts"):
        batches(config, Plain(), process_count=3)
    config.data.tokenizer = f"{folder}/other/tokenizer"
    with pytest.raises(UserError, match="a was tokenized with another tokenizer than the run's, .*other/tokenizer"):
        batches(config, Plain())

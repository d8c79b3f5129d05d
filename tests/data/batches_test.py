"""Batch t as a pure function of (config, seed, t): hosts, resume, epochs, validation, errors."""

import itertools
import json

import numpy as np
import pytest

from fm_jax import config as configs
from fm_jax.data import documents, prepared
from fm_jax.data.batches import Batches, examples_per_epoch, fingerprints, held_out_sets, load_tokenizer, open_batches
from fm_jax.data.mixture import Mixture
from fm_jax.errors import UserError

SEQ_LEN = 16


class Plain:
    """The least objective: examples are the rows and their seeds."""

    reads = "packed"

    def examples(self, records, seeds, train=True):
        return {**records, "seed": seeds, "train": np.full(len(seeds), train)}


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


def batches(config, start_step=0, **options):
    return open_batches(config, Plain(), **options).iterate(start_step)


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
    whole = take(batches(config, split=split), 6)
    for hosts in (2, 4, 8):
        # Rows one after the other, and every so many: what a mesh gives a host may lie apart.
        for rows in (np.arange(8).reshape(hosts, -1), np.arange(8).reshape(-1, hosts).T):
            parts = [take(batches(config, split=split, rows=mine), 6) for mine in rows]
            for t, batch in enumerate(whole):
                for part, mine in zip(parts, rows):
                    assert_equal({k: a[mine] for k, a in batch.items()}, part[t])


@pytest.mark.parametrize("prefetch", [0, 1, 5])
def test_resuming_is_starting_at_a_step(folder, prefetch):
    config = make_config(folder, "{0}/a:2,{0}/b:1")
    config.data.prefetch_batches = prefetch
    straight = take(batches(config), 60)
    for start in (1, 7, 55):
        for ours, theirs in zip(straight[start:], take(batches(config, start), 60 - start)):
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
    stream = np.concatenate([b["tokens"] for b in take(batches(config), 2 * size // 8 + 1)])
    expected = rows[np.arange(size)]["tokens"]
    first, second = stream[:size], stream[size:2 * size]
    assert not (first == second).all(-1).mean() > 0.1
    for epoch in (first, second):
        np.testing.assert_array_equal(epoch[np.lexsort(epoch.T)], expected[np.lexsort(expected.T)])
    # Every token is a target once: the first of the stream never is, and the padding is no token.
    segments = np.concatenate([b["segment_ids"] for b in take(batches(config), size // 8 + 1)])[:size]
    assert (segments[:, 1:] > 0).sum() == rows.tokens - 1


def test_seeds_are_the_examples_own_and_change_with_the_run_s(folder):
    first = np.concatenate([b["seed"] for b in take(batches(make_config(folder)), 40)])
    assert first.dtype == np.uint64 and len(np.unique(first)) == len(first) == 320
    other = take(batches(make_config(folder, seed=1)), 40)
    assert not np.isin(np.concatenate([b["seed"] for b in other]), first).any()
    ours = take(batches(make_config(folder)), 40)
    assert not all((a["tokens"] == b["tokens"]).all() for a, b in zip(other, ours))


def test_validation_is_the_whole_held_out_split_in_order_and_padded(folder):
    config = make_config(folder, "{0}/a,{0}/b")
    rows = [prepared.Rows(folder / name, "validation", SEQ_LEN) for name in "ab"]
    got = list(batches(config, split="validation"))
    tokens = np.concatenate([b["tokens"] for b in got])
    expected = np.concatenate([r[np.arange(len(r))]["tokens"] for r in rows])
    assert len(tokens) % 8 == 0 and len(tokens) - len(expected) < 8
    np.testing.assert_array_equal(tokens[:len(expected)], expected)
    assert not np.concatenate([b["segment_ids"] for b in got])[len(expected):].any()
    assert open_batches(config, Plain(), split="validation").num_batches == len(got)
    assert not any(b["train"].any() for b in got) and take(batches(config), 1)[0]["train"].all()
    for same, b in zip(batches(make_config(folder, "{0}/a,{0}/b", seed=1), split="validation"), got, strict=True):
        assert_equal(same, b)       # its seeds too: every run is scored on the same examples
    config.data.validation = f"{folder}/b"
    only_b = np.concatenate([b["tokens"] for b in batches(config, split="validation")])
    np.testing.assert_array_equal(only_b[:len(rows[1])], expected[len(rows[0]):])


def test_named_validation_sets_are_apart_and_together_the_whole(folder):
    config = make_config(folder, "{0}/a")
    config.data.validation = f"few={folder}/b, many={folder}/a,few={folder}/a"
    assert {name: len(folders) for name, folders in held_out_sets(config).items()} == {"few": 2, "many": 1}
    rows = {f: prepared.Rows(folder / f, "validation", SEQ_LEN) for f in "ab"}
    for name, folders in (("few", "ba"), ("many", "a"), ("", "baa")):
        got = np.concatenate([b["tokens"] for b in batches(config, split="validation", name=name)])
        expected = np.concatenate([rows[f][np.arange(len(rows[f]))]["tokens"] for f in folders])
        np.testing.assert_array_equal(got[: len(expected)], expected)
    assert list(held_out_sets(make_config(folder, "{0}/a:0.5,{0}/b"))) == [""]
    config.data.validation = f"few={folder}/b,{folder}/a"
    with pytest.raises(UserError, match="name each folder, as in english=data/a"):
        held_out_sets(config)


def test_few_validation_batches_are_of_every_source(folder):
    config = make_config(folder, "{0}/a,{0}/b")
    rows = [prepared.Rows(folder / name, "validation", SEQ_LEN) for name in "ab"]
    of_a, of_b = ({row.tobytes() for row in r[np.arange(len(r))]["tokens"]} for r in rows)
    config.eval.batches = 2
    got = list(batches(config, split="validation"))
    picked = {row.tobytes() for b in got for row in b["tokens"]}
    assert len(got) == 2 and len(picked) > 12 and picked <= of_a | of_b
    assert picked - of_a and picked - of_b
    assert list(batches(config, 2, split="validation")) == []
    whole = list(batches(make_config(folder, "{0}/a,{0}/b"), split="validation"))
    config.eval.batches = len(whole) + 1
    for ours, theirs in zip(batches(config, split="validation"), whole, strict=True):
        assert_equal(ours, theirs)


def test_what_one_folder_holds_out_no_other_trains_on(tmp_path):
    """Against the documents themselves: what is refused does leak, what is not refused does not."""
    texts = [f"shared document {n}" for n in range(60)]
    write = lambda name, texts: (tmp_path / name).write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    write("x.jsonl", texts), write("y.jsonl", [f"a document of its own {n}" for n in range(20)])
    # The last one is a held-out set as they are published: other documents, all of them held out.
    for frac, name in ((0.1, "x"), (0.3, "x"), (0.5, "x"), (1, "y")):
        prepared.prepare(documents.open_sources(str(tmp_path / f"{name}.jsonl")), "bytes", tmp_path / str(frac),
                         validation_frac=frac)
    path = {frac: str(tmp_path / str(frac)) for frac in (0.1, 0.3, 0.5, 1)}
    of = {(frac, split): set(prepared.texts(path[frac], split)) for frac in path for split in prepared.SPLITS}
    refused = 0
    for train, held_out in itertools.product([(0.1,), (0.3,), (0.3, 0.1), (0.1, 0.3), (0.3, 0.5)],
                                             [(), (0.1,), (0.3,), (0.5,), (0.1, 0.3), (1,)]):
        config = make_config(tmp_path, ",".join(path[f] for f in train), batch_size=1)
        config.data.validation = ",".join(path[f] for f in held_out)
        trained = set().union(*(of[f, "train"] for f in train))
        scored = set().union(*(of[f, "validation"] for f in held_out or train))
        for split in prepared.SPLITS:
            if trained & scored:
                first = next((t, h) for t in train for h in held_out or train if of[t, "train"] & of[h, "validation"])
                shared = len(of[first[0], "train"] & of[first[1], "validation"])
                message = f"{shared} documents that {path[first[1]]} holds out are trained on in {path[first[0]]}: "
                with pytest.raises(UserError, match=message):
                    open_batches(config, Plain(), split=split)
                refused += 1
            else:
                open_batches(config, Plain(), split=split)
    assert 0 < refused < 50 and len(of[1, "validation"]) == 20 and not of[1, "train"]


def test_records_of_any_kind_can_be_mixed():
    class Images:
        def __len__(self):
            return 12

        def __getitem__(self, rows):
            return {"image": rows[:, None, None] * np.ones((1, 4, 4)), "label": rows}

    class Classify:
        def examples(self, records, seeds, train=True):
            return {"pixels": records["image"] / 255, "label": records["label"]}

    opened = Batches(Mixture([Images()], seed=1), Classify(), batch_size=4, num_batches=None, seed=1)
    epoch = np.concatenate([b["label"] for b in take(opened.iterate(), 3)])
    np.testing.assert_array_equal(np.sort(epoch), np.arange(12))


def test_an_error_in_a_worker_thread_reaches_the_caller(folder):
    class Broken:
        reads = "packed"

        def examples(self, records, seeds, train=True):
            raise UserError("no examples today")

    with pytest.raises(UserError, match="no examples today"):
        next(open_batches(make_config(folder), Broken()).iterate())


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
        batches(make_config(folder, **changes))
    assert "\n" not in str(error.value)


def test_another_tokenizer_is_refused(folder):
    config = make_config(folder)
    config.data.tokenizer = f"{folder}/other/tokenizer"
    with pytest.raises(UserError, match="a was tokenized with another tokenizer than the run's, .*other/tokenizer"):
        batches(config)

"""Span corruption undone by hand, the loss against naive NumPy stacks, and decoding against no cache at all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax import config as config_lib
from fm_jax import decode, objectives, roofline, sharding, tree
from fm_jax.errors import UserError
from fm_jax.pretrained import Pretrained
from fm_jax.step import Program
from fm_jax.tokenizer import ByteTokenizer
import naive

TOKENIZER = ByteTokenizer()
BOS, EOS = TOKENIZER.bos_id, TOKENIZER.eos_id
SENTINELS = 9
FIRST = TOKENIZER.vocab_size + SENTINELS - 1   # the others are below
L = 48


def config(**changes):
    c = config_lib.defaults()
    c.objective = "fm_jax.objectives.seq2seq.Seq2Seq"
    c.objective_args.sentinels = SENTINELS
    c.model.update(vocab_size=FIRST + 2, num_layers=2, embed_dim=8, num_heads=2, mlp_dim=12, max_seq_len=64,
                   cross_attention=True, loss_chunk_tokens=30, position="relative", relative_buckets=8,
                   relative_max_distance=20, attention_scale=0.7, logit_scale=0.6)
    c.encoder.num_layers = 1
    c.seq_len, c.batch_size, c.data.train = L, 4, "data/x"
    return config_lib.override(c, changes)


def make(layout=None, **changes):
    return objectives.load(config(**changes), TOKENIZER, layout)


def records(n, seed=0):
    """Returns n rows of several documents each, BOS and EOS around them; some are cut by the row, some have padding."""
    rng = np.random.default_rng(seed)
    tokens, segments = np.zeros((2, n, L + 1), np.int32)
    for row in range(n):
        at = 0
        for number in range(1, 5):
            piece = np.array([BOS, *rng.integers(0, 256, rng.integers(0, 22)), EOS])[: L + 1 - at]
            tokens[row, at : at + len(piece)], segments[row, at : at + len(piece)] = piece, number
            at += len(piece)
    return {"tokens": tokens, "segment_ids": segments}


def seeds(n, first=0):
    return np.arange(first, first + n, dtype=np.uint64)


def sentinel(token):
    return FIRST - SENTINELS < token <= FIRST


def pieces(batch, row):
    """Returns {number of a document: (tokens of its source, of its target)}."""
    of = lambda tokens, segments, number: batch[tokens][row][batch[segments][row] == number].tolist()
    return {n: (of("source_tokens", "source_segment_ids", n), of("targets", "segment_ids", n))
            for n in set(batch["segment_ids"][row].tolist()) - {0}}


def test_what_is_taken_out_can_be_put_back():
    objective, r = make(**{"objective_args.corruption_rate": 0.3}), records(60)
    batch, kept, whole = objective.examples(r, seeds(60)), 0, 0
    for row in range(60):
        tokens, segments = r["tokens"][row, :L], r["segment_ids"][row, :L]
        assert set(batch["source_segment_ids"][row]) == set(batch["segment_ids"][row])
        for number, (source, target) in pieces(batch, row).items():
            assert target.pop() == EOS
            marks = [t for t in source if sentinel(t)]
            assert marks == [t for t in target if sentinel(t)] == [FIRST - i for i in range(len(marks))]
            taken = {}
            for t in target:
                if sentinel(t):
                    taken[mark := t] = []
                else:
                    taken[mark].append(t)
            back = [t for s in source for t in (taken[s] if sentinel(s) else [s])]
            document = tokens[segments == number].tolist()
            assert back == document and source[0] == document[0] and all(taken.values())
            body = len(document) - (document[-1] == EOS)
            noise = sum(map(len, taken.values()))
            assert noise == min(max(round(0.3 * body), 1), body - 1)
            assert len(taken) == min(max(round(noise / 3), 1), noise, body - noise)
            kept += 1
        whole += sum((segments == n).sum() - (tokens[segments == n][-1] == EOS) > 1 for n in set(segments) - {0})
        inputs, targets = batch["tokens"][row], batch["targets"][row]
        begins = [t for t in range(len(inputs)) if t == 0 or batch["segment_ids"][row, t] != batch["segment_ids"][row, t - 1]]
        assert all(inputs[t] == (0 if t in begins else targets[t - 1]) for t in range(len(inputs)))
    assert kept > 0.9 * whole > 100   # the others do not fit
    np.testing.assert_array_equal(batch["weights"], batch["segment_ids"] > 0)
    spec = objective.batch_spec(60)
    assert {n: (a.shape, a.dtype) for n, a in batch.items()} == {n: (a.shape, a.dtype) for n, a in spec.items()}


def test_where_spans_are_is_drawn_evenly_and_of_a_rows_seed_alone():
    tokens = np.tile(np.arange(L + 1, dtype=np.int32), (400, 1))
    r = {"tokens": tokens, "segment_ids": np.ones_like(tokens)}
    objective = make()
    batch = objective.examples(r, seeds(400))
    part = objective.examples({k: v[7:] for k, v in r.items()}, seeds(393, first=7))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[7:], b), batch, part)
    out = np.zeros(L)
    for row in range(400):
        source, target = pieces(batch, row)[1]
        out[[t for t in target[:-1] if not sentinel(t)]] += 1
    # Of 48 tokens 7 in 2 spans; the ends of the row are rarer, as a span begins behind a token that stays.
    assert out.sum() == 400 * 7 and out[0] == 0 and (np.abs(out[8:-8] - out[8:-8].mean()) < 45).all()


def params(objective, seed=3):
    rng = np.random.default_rng(seed)
    shapes = sharding.unbox(jax.eval_shape(objective.init, jax.random.key(0)))[0]
    return tree.map_named(lambda n, p: (rng.normal(0, 0.4, p.shape) + ("scale" in n)).astype(np.float32), shapes)


@pytest.fixture(scope="module")
def packed():
    objective = make(**{"objective_args.z_loss": 0.1, "objective_args.corruption_rate": 0.3})
    return objective, objective.examples(records(4), seeds(4)), params(objective)


def test_the_loss_is_that_of_numpy(packed):
    """Document by document, each from its own source alone."""
    objective, batch, p = packed
    p64 = naive._float64(p)
    table, want, correct, count = p64["embed"]["tokens"], 0.0, 0, 0
    batch = batch | {"weights": batch["weights"] * (np.arange(4) < 2)[:, None]}   # of the first two rows
    for row in range(2):
        for number, (source, targets) in pieces(batch, row).items():
            inputs = batch["tokens"][row][batch["segment_ids"][row] == number]
            encoded = naive.stack(objective.encoder, p64["encoder"], list(table[source]))
            hidden = naive.stack(objective.arch, p64["decoder"], list(table[inputs]), context=encoded)
            for x, target in zip(hidden, targets):
                logits = table @ x * 0.6
                lse = np.log(np.exp(logits).sum())
                want += lse - logits[target] + 0.1 * lse ** 2
                correct, count = correct + (logits.argmax() == target), count + 1
    loss = jax.jit(objective.loss)(p, batch)
    assert float(loss.loss) == pytest.approx(want, rel=1e-4) and float(loss.weight) == count
    assert float(loss.metrics["accuracy"][0]) == correct


def test_nothing_is_seen_of_later_tokens_and_other_documents(packed):
    objective, batch, p = packed
    places = {name: np.asarray(batch[name][3:]) for name in batch}
    number = 2

    def last_of_second(source, x):
        context = objective.module.apply({"params": p}, source, method=lambda m, x: m.encoder(
            x, segment_ids_BT=places["source_segment_ids"])[0])
        hidden = objective.module.apply({"params": p}, x, method=lambda m, x: m.decoder(
            x, segment_ids_BT=places["segment_ids"], context_BSD=context,
            context_segment_ids_BS=places["source_segment_ids"])[0])
        return hidden[0, at].sum()

    at = int(np.flatnonzero(places["segment_ids"][0] == number)[-2])
    rng = np.random.default_rng(0)
    draw = lambda name: jnp.asarray(rng.normal(size=(1, places[name].shape[1], 8)), jnp.float32)
    gradients = jax.jit(jax.grad(last_of_second, (0, 1)))(draw("source_tokens"), draw("tokens"))
    of_source, of_target = (np.abs(np.asarray(g))[0].sum(-1) > 0 for g in gradients)
    np.testing.assert_array_equal(of_source, places["source_segment_ids"][0] == number)
    np.testing.assert_array_equal(of_target, (places["segment_ids"][0] == number) & (np.arange(len(of_target)) <= at))


def test_flops_are_those_of_the_step():
    """Of the traced loss and gradient, but for causal scores, of which half count."""
    objective = make(**{"model.scan_layers": False, "model.attention_kernel": "reference", "model.embed_dim": 64,
                        "model.mlp_dim": 96})
    batch, shapes = objective.batch_spec(1), sharding.unbox(jax.eval_shape(objective.init, jax.random.key(0)))[0]
    traced = jax.make_jaxpr(jax.grad(lambda p, b: objective.loss(p, b).loss))(shapes, batch)
    assert 0.97 < objective.flops_per_example / roofline.jaxpr_flops(traced)[0] < 1


@pytest.mark.parametrize("mesh", [dict(data=2, fsdp=2, tensor=2),
                                  pytest.param(dict(stage=2, fsdp=2), marks=pytest.mark.slow),
                                  pytest.param(dict(data=8), marks=pytest.mark.slow)], ids=str)
def test_every_mesh_trains_the_same(mesh):
    changes = {"batch_size": 8, "optimizer.learning_rate": 1e-2, "encoder.num_layers": 2, "model.remat": "full"}

    def losses(mesh):
        c = config_lib.resolve(config(**changes))
        layout = sharding.Layout(sharding.make_mesh(mesh))
        program = Program(c, objectives.load(c, TOKENIZER, layout), layout)
        state, out = program.init(), []
        for step in range(3):
            batch = program.place(program.objective.examples(records(8), seeds(8)))
            state, metrics = program.train_step(state, batch, step)
            out.append(float(metrics["loss"][0] / metrics["loss"][1]))
        return out, tree.flatten(jax.device_get(state.params))["encoder.relative_bias"]

    (got, table), (want, want_table) = losses(mesh), losses(dict(data=1))
    np.testing.assert_allclose(got, want, rtol=1e-5)
    np.testing.assert_allclose(table, want_table, atol=2e-4)


def test_pairs_become_rows_of_their_own():
    objective = make(**{"objective_args.task": "pairs", "objective_args.source_length": 6,
                        "objective_args.target_length": 4})
    assert objective.reads == "examples"
    batch = objective.examples([{"source": "ab", "target": "c"}, None, {"source": "abcdefgh", "target": ""}], seeds(3))
    a, b, c = b"abc"
    np.testing.assert_array_equal(batch["source_tokens"], [[a, b, EOS, 0, 0, 0], [0] * 6, [*b"abcde", EOS]])
    np.testing.assert_array_equal(batch["source_segment_ids"], [[1, 1, 1, 0, 0, 0], [0] * 6, [1] * 6])
    np.testing.assert_array_equal(batch["targets"], [[c, EOS, 0, 0], [0] * 4, [EOS, 0, 0, 0]])
    np.testing.assert_array_equal(batch["tokens"][0, :2], [0, c])
    np.testing.assert_array_equal(batch["weights"], [[1, 1, 0, 0], [0] * 4, [1, 0, 0, 0]])
    with pytest.raises(UserError, match="a record: no text 'target' .fields here: source, label."):
        objective.examples([{"source": "ab", "label": 1}], seeds(1))


def test_decoding_with_a_cache_is_decoding_without(packed):
    """Of sources of different lengths, padded together; and greedy decoding is a beam of one."""
    objective, _, p = packed
    lm = Pretrained(config(), TOKENIZER, make(sharding.Layout(sharding.make_mesh({"data": 1}))), p)
    prompts = ["a cat", "something longer than that"]
    made = lm.complete(lm.prompt_ids(prompts), max_new_tokens=6)
    for prompt, each in zip(lm.prompt_ids(prompts), made):
        tokens = [0]
        for want in each.tokens:   # no cache, no padding
            logits = lm.logits(prompt[None], decoder_tokens=np.array([tokens]))[0, -1, : TOKENIZER.vocab_size]
            assert want == logits.argmax()
            tokens.append(want)
    sources, order = lm._sources(lm.prompt_ids(prompts)), [np.array([0])] * 2
    beams = lambda n: decode.beam_search(
        lm.objective, decode.per_layer(p), order, max_new_tokens=6, num_beams=n, vocab_size=TOKENIZER.vocab_size,
        context=lm._jitted["encode"](p, *sources))
    for each, (beam,) in zip(made, beams(1)):
        np.testing.assert_array_equal(beam.tokens, each.tokens)
    scores = [float(s.logprob) for s in lm.score(prompts, ["x y", "no"])]
    tokens = np.array([[0, *b"x y"]])
    logits = lm.logits(lm.prompt_ids(prompts)[0][None], decoder_tokens=tokens)[0].astype(np.float64)
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    assert scores[0] == pytest.approx(logits[range(4), [*b"x y", EOS]].sum(), rel=1e-4)
    texts = lm.generate(prompts, n=2, temperature=0.7, max_new_tokens=4)
    assert len(texts) == 4 and texts == lm.generate(prompts, n=2, temperature=0.7, max_new_tokens=4)


@pytest.mark.parametrize("changes, message", [
    ({"model.cross_attention": False}, "model.cross_attention must be True"), ({"encoder.causal": True}, "encoder.causal"),
    ({"encoder.embed_dim": 16}, "both share the table"), ({"model.position": "learned"}, "take relative, rope or none"),
    ({"model.vocab_size": FIRST}, "no ids are left for"), ({"objective_args.task": "pear"}, "did you mean 'pairs'"),
    ({"objective_args.corruption_rate": 1.0}, "corruption_rate=1.0"), ({"objective_args.start_id": 999}, "start_id=999"),
    ({"objective_args.source_length": 80}, "sources of 80 and targets of"),
])
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        make(**changes)


def test_context_meshes_are_refused():
    with pytest.raises(UserError, match="needs whole sequences, and mesh.context=2"):
        make(sharding.Layout(sharding.make_mesh({"context": 2})))

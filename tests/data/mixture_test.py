"""Shuffling and mixing as arithmetic: permutations, exact proportions, epochs."""

import numpy as np
import pytest

from fm_jax.data.mixture import InOrder, Mixture, hash_ints, permute
from fm_jax.errors import UserError


class Numbers:
    """A source of n records that say who they are."""

    def __init__(self, n, name=0):
        self.n, self.name = n, name

    def __len__(self):
        return self.n

    def __getitem__(self, rows):
        assert ((0 <= rows) & (rows < self.n)).all()
        return {"row": rows + 1, "source": np.full(len(rows), self.name), "image": np.ones((len(rows), 2, 2))}


@pytest.mark.parametrize("size", [*range(1, 70), 255, 256, 257, 1000, 10_007])
def test_permute_is_a_permutation(size):
    for key in (0, 1, 2 ** 63):
        np.testing.assert_array_equal(np.sort(permute(np.arange(size), size, np.uint64(key))), np.arange(size))


def test_permute_of_large_sizes_has_no_repeats():
    index = np.arange(50_000) * 10 ** 7
    out = permute(index, 10 ** 12, 7)
    assert len(np.unique(out)) == len(index) and out.max() < 10 ** 12


@pytest.mark.parametrize("size", [2, 3, 5, 7, 12, 31, 40])
def test_permute_puts_every_element_everywhere_equally_often(size):
    trials = 50_000
    keys = hash_ints(3, np.arange(trials))
    images = np.stack([permute(np.full(trials, i), size, keys) for i in range(size)])
    expected = trials / size
    for image in images:
        chi2 = (np.square(np.bincount(image, minlength=size) - expected) / expected).sum()
        # Mean size-1, deviation sqrt(2 (size-1)): six deviations, for the most extreme of a hundred draws.
        assert chi2 < size - 1 + 6 * np.sqrt(2 * (size - 1))


def test_permute_leaves_no_neighbours_together():
    out = permute(np.arange(100_000), 100_000, 1)
    # Of random permutations, 2 pairs of neighbours on average stay neighbours; Poisson: 12 never come.
    assert (np.abs(np.diff(out)) == 1).sum() < 12
    assert abs(np.corrcoef(np.arange(100_000), out)[0, 1]) < 0.02      # six deviations of 1/sqrt(n)


def test_hash_ints_differs_in_every_argument():
    grid = hash_ints(np.arange(50)[:, None, None], np.arange(50)[:, None], np.arange(50))
    assert len(np.unique(grid)) == 50 ** 3
    assert hash_ints(-1).dtype == np.uint64


def test_every_epoch_has_each_row_once_in_a_new_order():
    mixture = Mixture([Numbers(101)], seed=3)
    source, epoch, row = mixture.locate(np.arange(404))
    assert mixture.examples_per_epoch == 101 and not source.any()
    np.testing.assert_array_equal(epoch, np.repeat(np.arange(4), 101))
    orders = row.reshape(4, 101)
    np.testing.assert_array_equal(np.sort(orders, axis=1), np.tile(np.arange(101), (4, 1)))
    assert (orders[:, None] == orders[None]).mean(-1)[np.triu_indices(4, 1)].max() < 0.1
    other = Mixture([Numbers(101)], seed=4).locate(np.arange(404))[2]
    assert (other == row).mean() < 0.1


def test_weights_hold_exactly_in_every_block_and_nearly_in_every_batch():
    mixture = Mixture([Numbers(50, 0), Numbers(7, 1), Numbers(900, 2)], [0.6, 0.1, 0.3], seed=0)
    source, epoch, row = mixture.locate(np.arange(5000))
    for block in source.reshape(500, 10):
        np.testing.assert_array_equal(np.bincount(block, minlength=3), [6, 1, 3])
    spread = Mixture([Numbers(50)] * 3, [0.61, 0.09, 0.3]).locate(np.arange(4992))[0]     # blocks of 100
    for batch in spread.reshape(-1, 32):
        assert np.abs(np.bincount(batch, minlength=3) - 32 * np.array([0.61, 0.09, 0.3])).max() <= 2
    for s, n in enumerate((50, 7, 900)):     # each source runs through its own epochs
        seen = [row[(source == s) & (epoch == e)] for e in range(epoch[source == s].max())]
        for rows in seen:
            np.testing.assert_array_equal(np.sort(rows), np.arange(n))


def test_odd_weights_are_held_to_the_block_s_precision():
    weights = np.array([np.pi, np.e, 0.01])
    source, _, _ = Mixture([Numbers(10)] * 3, weights).locate(np.arange(10_000))
    np.testing.assert_allclose(np.bincount(source) / 10_000, weights / weights.sum(), atol=1e-4)


def test_records_come_from_the_located_source_and_row():
    mixture = Mixture([Numbers(50, 0), Numbers(7, 1)], [2, 1], seed=9)
    index = np.array([5, 77, 3, 1000, 5])
    records, (source, _, row) = mixture[index], mixture.locate(index)
    np.testing.assert_array_equal(records["row"], row + 1)
    np.testing.assert_array_equal(records["source"], source)
    assert records["image"].shape == (5, 2, 2)


def test_in_order_goes_through_all_sources_once_and_pads_with_zeros():
    examples = InOrder([Numbers(3, 1), Numbers(2, 2)])
    records = examples[np.arange(8)]
    assert len(examples) == 5
    assert records["row"].tolist() == [1, 2, 3, 1, 2, 0, 0, 0]
    assert records["source"].tolist() == [1, 1, 1, 2, 2, 0, 0, 0]
    assert records["image"][:5].all() and not records["image"][5:].any()


@pytest.mark.parametrize("limit", [1, 2, 7, 29, 30, 100])
def test_some_in_order_are_spread_evenly_over_all_sources(limit):
    sizes = [20, 3, 7]
    examples = InOrder([Numbers(size, name) for name, size in enumerate(sizes)], limit)
    n = min(limit, 30)
    assert len(examples) == n
    records = examples[np.arange(n + 2)]
    assert not any(values[n:].any() for values in records.values())
    place = np.array([0, 20, 23])[records["source"][:n]] + records["row"][:n] - 1
    gaps = np.diff(place)
    assert n == 1 or gaps.min() >= 30 // n and gaps.max() <= -(-30 // n)
    for name, size in enumerate(sizes):     # each source's share, to within one record
        assert abs((records["source"][:n] == name).sum() - n * size / 30) < 1


def test_bad_weights_are_refused():
    for weights, message in (([1, -1], "positive"), ([1, 0], "positive"), ([1, float("nan")], "positive"),
                             ([1, 1e-9], "below 1/10000"), ([1], "a weight for each source")):
        with pytest.raises(UserError, match=message):
            Mixture([Numbers(3), Numbers(3)], weights)

"""Names, patterns, counts and differences over nested dicts of arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax import tree
from fm_jax.errors import UserError

PARAMS = {"embed": {"tokens": np.zeros((5, 4), np.float32)},
          "layers": {"attention": {"wq": np.ones((2, 4, 3), np.float32)},
                     "norm": {"scale": jnp.ones((2, 4), jnp.bfloat16)}}}
NAMES = ["embed.tokens", "layers.attention.wq", "layers.norm.scale"]


def test_names_are_dotted_paths_in_order():
    assert list(tree.flatten(PARAMS)) == NAMES
    assert jax.tree.leaves(tree.names(PARAMS)) == NAMES
    assert tree.flatten(PARAMS)["layers.attention.wq"] is PARAMS["layers"]["attention"]["wq"]
    assert list(tree.flatten({"a": [1, (2, 3)]})) == ["a.0", "a.1.0", "a.1.1"]


def test_map_named_keeps_the_tree_and_pairs_the_rest():
    out = tree.map_named(lambda n, a, b: f"{n} {b}", PARAMS, tree.map_named(lambda n, _: len(n), PARAMS))
    assert out["layers"]["norm"]["scale"] == "layers.norm.scale 17" and set(out) == set(PARAMS)


def test_mask_matches_whole_names():
    flat = lambda *patterns: [n for n, hit in tree.flatten(tree.mask(PARAMS, patterns)).items() if hit]
    assert flat(".*scale") == ["layers.norm.scale"]
    assert flat("layers.*") == NAMES[1:]
    assert flat("embed.tokens", ".*wq") == NAMES[:2]
    assert flat() == []
    assert tree.mask({"w": 0, "w_up": 0, "q.w": 0}, ("w",)) == {"w": True, "w_up": False, "q.w": False}
    with pytest.raises(UserError, match="no_decay: 'scale' matches no parameter; nearest names: .*layers.norm.scale"):
        tree.mask(PARAMS, (".*wq", "scale"), what="no_decay")   # a part of a name is no match
    with pytest.raises(UserError, match="is not a regular expression"):
        tree.mask(PARAMS, ("(",))


def test_counts_and_bytes_of_arrays_and_shapes():
    shapes = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, PARAMS))
    for t in (PARAMS, shapes):
        assert tree.count(t) == 20 + 24 + 8
        assert tree.nbytes(t) == 4 * 44 + 2 * 8
    assert tree.count({"step": np.float32(0)}) == 1


def test_difference_names_what_differs():
    assert tree.difference(PARAMS, PARAMS) == []
    other = {"embed": {"tokens": np.zeros((6, 4), np.float32)},
             "layers": {"norm": {"scale": np.ones((2, 4), np.float32)}},
             "head": np.zeros(3, np.int32)}
    assert tree.difference(PARAMS, other) == [
        "embed.tokens: wanted float32[5, 4], found float32[6, 4]",
        "layers.attention.wq: wanted float32[2, 4, 3], found absent",
        "layers.norm.scale: wanted bfloat16[2, 4], found float32[2, 4]",
        "head: wanted absent, found int32[3]",
    ]
    many = {str(i): np.zeros(i + 1) for i in range(13)}
    lines = tree.difference(many, {})
    assert len(lines) == 11 and lines[-1] == "... and 3 more"

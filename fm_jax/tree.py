"""Parameters by name: dotted names, patterns over them, counts and sizes. Layer 0.

A parameter's name is its path in the nested dict joined by dots, such as `layers.attention.wq`.
"""

import difflib
import re

import jax
import numpy as np

from fm_jax.errors import UserError


def name(path) -> str:
    """Returns the dotted name of a `jax.tree_util` key path."""
    return ".".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def flatten(tree, is_leaf=None) -> dict:
    """Returns {dotted name: leaf} in the tree's order."""
    return {name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)}


def nest(flat: dict) -> dict:
    """Returns the nested dict that `flatten` makes {dotted name: leaf} of."""
    nested = {}
    for path, leaf in flat.items():
        *parents, last = path.split(".")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return nested


def map_named(f, tree, *rest, is_leaf=None):
    """Returns the tree with each leaf replaced by `f(dotted name, leaf, ...)`."""
    return jax.tree_util.tree_map_with_path(lambda path, *xs: f(name(path), *xs), tree, *rest, is_leaf=is_leaf)


def names(tree):
    """Returns the tree with each leaf replaced by its dotted name."""
    return map_named(lambda n, _: n, tree)


def mask(tree, patterns, what: str = "patterns"):
    """Returns a tree of bool: True where a parameter's name fully matches one of the regular expressions.

    Raises:
      UserError: a pattern that matches no parameter, with the nearest names, or is no regular expression.
    """
    known = list(flatten(tree))
    compiled = []
    for pattern in patterns:
        try:
            compiled.append(re.compile(pattern))
        except re.error as e:
            raise UserError(f"{what}: {pattern!r} is not a regular expression: {e}") from None
        if not any(compiled[-1].fullmatch(n) for n in known):
            near = difflib.get_close_matches(pattern, known, n=3, cutoff=0.0)
            raise UserError(f"{what}: {pattern!r} matches no parameter; nearest names: {', '.join(near)}")
    return map_named(lambda n, _: any(c.fullmatch(n) for c in compiled), tree)


def count(tree) -> int:
    """Returns the number of elements in all arrays (or shape structs) of the tree."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def nbytes(tree) -> int:
    """Returns the bytes of all arrays (or shape structs) of the tree, unsharded."""
    return sum(int(np.prod(leaf.shape)) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


def difference(wanted, found, most: int = 10) -> list[str]:
    """Returns a line for each of the first `most` names whose shape or dtype differs between two trees."""
    wanted, found = flatten(wanted), flatten(found)
    lines = []
    for n in [*wanted, *(n for n in found if n not in wanted)]:
        a, b = (f"{t[n].dtype}{list(t[n].shape)}" if n in t else "absent" for t in (wanted, found))
        if a != b:
            lines.append(f"{n}: wanted {a}, found {b}")
    return lines if len(lines) <= most else [*lines[:most], f"... and {len(lines) - most} more"]

"""Additions, made here: text to learn them from, and other problems with answers that can be checked.

Try:  python -c "from fm_jax.data import arithmetic; print(next(arithmetic.problems()))"
"""

from collections.abc import Iterator

import numpy as np

from fm_jax.data.mixture import hash_ints

LARGEST = 99


def texts() -> Iterator[dict]:
    """Yields {"text", "id"}: the sums of every other pair of numbers, in a pseudo-random choice."""
    for record in _records(0):
        yield {"text": record["prompt"] + record["answer"], "id": record["id"]}


def problems() -> Iterator[dict]:
    """Yields {"prompt", "answer", "id"}, none of which `texts` has."""
    yield from _records(1)


def _records(half):
    a, b = np.divmod(np.arange((LARGEST + 1) ** 2), LARGEST + 1)
    for x, y in zip(*(n[hash_ints(a, b) % np.uint64(2) == half].tolist() for n in (a, b))):
        yield {"prompt": f"{x}+{y}=", "answer": str(x + y), "id": f"{x}+{y}"}

"""How parents meet: the angle between their deltas and how far they use the same directions of the base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from ..domain.plan import Pair
from .grams import Array, Grams, block_products, overlaps


@dataclass(frozen=True, slots=True)
class Meeting:
    """The parents of one module: products of their deltas at the sizes of their weights, without the signs, which say
    nothing about the adapters; overlap of their row and column spaces; all (n, n).
    """

    parents: tuple[int, ...]
    products: Array
    rows: Array
    columns: Array


def meet(grams: Grams, weights: Sequence[float]) -> Meeting:
    """`weights` of the parents that have the module, as in `grams.blocks`."""
    parents, signs = tuple(block.parent for block in grams.blocks), np.sign(weights)
    products = block_products(grams) * np.outer(signs, signs)
    return Meeting(parents, products, overlaps(grams.a, grams.blocks), overlaps(grams.b, grams.blocks))


def pairs(meetings: Sequence[Meeting], labels: Sequence[str]) -> tuple[Pair, ...]:
    """One `Pair` for every two parents over all modules; the norms are those at their weights."""
    count = len(labels)
    products, rows, columns, shared = (np.zeros((count, count)) for _ in range(4))
    for meeting in meetings:
        place = np.ix_(meeting.parents, meeting.parents)
        products[place] += meeting.products
        rows[place] += meeting.rows
        columns[place] += meeting.columns
        shared[place] += 1
    norms = np.sqrt(np.maximum(products.diagonal(), 0.0))
    return tuple(
        Pair(
            first=labels[i],
            second=labels[j],
            shared_modules=int(shared[i, j]),
            cosine=_ratio(products[i, j], norms[i] * norms[j]),
            row_overlap=_ratio(rows[i, j], shared[i, j]),
            column_overlap=_ratio(columns[i, j], shared[i, j]),
            norm_ratio=_ratio(norms[i], norms[j]),
        )
        for i, j in combinations(range(count), 2)
    )


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole > 0 else 0.0

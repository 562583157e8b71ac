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
    """The parents of one module: products of their weighted deltas, overlap of their row and column spaces; (n, n)."""

    parents: tuple[int, ...]
    products: Array
    rows: Array
    columns: Array


def meet(grams: Grams) -> Meeting:
    parents = tuple(block.parent for block in grams.blocks)
    return Meeting(parents, block_products(grams), overlaps(grams.a, grams.blocks), overlaps(grams.b, grams.blocks))


def pairs(meetings: Sequence[Meeting], weights: Sequence[float], labels: Sequence[str]) -> tuple[Pair, ...]:
    """One `Pair` for every two parents over all modules. The signs of the weights are taken out of the cosine, for it
    describes the adapters; the norms are those at their weights.
    """
    count = len(weights)
    products, rows, columns, shared = (np.zeros((count, count)) for _ in range(4))
    for meeting in meetings:
        place = np.ix_(meeting.parents, meeting.parents)
        products[place] += meeting.products
        rows[place] += meeting.rows
        columns[place] += meeting.columns
        shared[place] += 1
    norms = np.sqrt(np.maximum(products.diagonal(), 0.0))
    signs = np.sign(weights)
    return tuple(
        Pair(
            first=labels[i],
            second=labels[j],
            shared_modules=int(shared[i, j]),
            cosine=_ratio(products[i, j] * signs[i] * signs[j], norms[i] * norms[j]),
            row_overlap=_ratio(rows[i, j], shared[i, j]),
            column_overlap=_ratio(columns[i, j], shared[i, j]),
            norm_ratio=_ratio(norms[i], norms[j]),
        )
        for i, j in combinations(range(count), 2)
    )


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole > 0 else 0.0

"""Spherical interpolation of two adapters: along the arc between them instead of the chord, so that size is kept."""

from __future__ import annotations

import math

import numpy as np

from ..core import truncate
from ..grams import Grams, Maps, block_products
from ..method import Share, merge_method

#: mergekit's limit: beyond this cosine the arc is the chord, and its formula divides by almost nothing.
STRAIGHT = 0.9995


@merge_method(
    "slerp",
    form="grams",
    rev=1,
    exact=False,
    when="two parents are to be mixed rather than added: orthogonal ones keep their size, which averaging shrinks",
    cost="O(d R²) + O(R³)",
    paper="Shoemake 1985, https://doi.org/10.1145/325334.325242",
    breaks=("monotone", "full_rank"),
    max_parents=2,
)
def slerp(grams: Grams, *, rank: int, t: Share = 0.5) -> Maps:
    """Go from the first parent to the second along the arc between their deltas, module by module.

    Args:
        grams: of the weighted parents; a weight scales its end of the arc.
        rank: of the output.
        t: how far to go: 0 is the first parent, 1 the second.

    A module that one parent alone has comes back as it is, for there is no arc.
    """
    products = block_products(grams)
    present = [place for place in range(len(grams.blocks)) if products[place, place] > 0]
    shares = np.zeros(len(grams.blocks))
    shares[present] = _shares(products[np.ix_(present, present)], t)
    by_row = np.repeat(shares, [block.stop - block.start for block in grams.blocks])
    return truncate(Grams(grams.a, grams.b, grams.c * by_row, grams.blocks), rank)


def _shares(products: np.ndarray, t: float) -> list[float]:
    """What each present parent is multiplied by."""
    if len(products) < 2:
        return [1.0] * len(products)
    squares = float(products[0, 0]), float(products[1, 1])
    size = math.sqrt(squares[0] * squares[1])
    if not 1e-150 < size < math.inf:  # beyond it the product of the squares leaves float64
        size = math.sqrt(squares[0]) * math.sqrt(squares[1])
    cosine = float(products[0, 1] / size)
    if abs(cosine) > STRAIGHT:
        return [1 - t, t]
    angle = math.acos(cosine)
    return [math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)]

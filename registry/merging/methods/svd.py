"""The best approximation of the exact sum at a given rank, by truncated SVD. PEFT's `svd` is the same, densely."""

from __future__ import annotations

from ..core import truncate
from ..grams import Grams, Maps
from ..method import merge_method


@merge_method(
    "svd",
    form="grams",
    rev=2,
    exact=False,
    when="the output rank must stay small: no other matrix of that rank is closer to the exact sum",
    cost="O(d R²) + O(R³)",
    paper="Eckart & Young 1936, https://doi.org/10.1007/BF02288367",
    coarse_grams=True,
)
def svd(grams: Grams, *, rank: int) -> Maps:
    """Keep the largest singular directions of the exact weighted sum.

    Args:
        grams: a, b (R, R) and c (R,), float64, R the sum of the parents' ranks.
        rank: 1 <= rank <= R; directions without energy come out as zeros.
    """
    return truncate(grams, rank)

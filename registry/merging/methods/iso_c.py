"""The sum with all its directions made equally strong, so that no parent drowns another."""

from __future__ import annotations

import numpy as np

from ..core import WEAKEST, truncate
from ..grams import Grams, Maps
from ..method import merge_method


@merge_method(
    "iso_c",
    form="grams",
    rev=1,
    exact=False,
    when="many tasks share one adapter and the strong ones drown the weak; the result is no longer close to the sum",
    cost="O(d R²) + O(R³)",
    paper="No Task Left Behind, https://arxiv.org/abs/2502.04959",
    breaks=("identity", "monotone", "full_rank"),
)
def iso_c(grams: Grams, *, rank: int) -> Maps:
    """Give the largest singular directions of the sum all the same strength: the mean of their singular values.

    Args:
        grams: of the weighted parents.
        rank: how many directions; those below 1e-6 of the strongest are rounding and stay out.

    The paper averages over all directions of a full matrix; a sum of low rank has no others than these.
    """
    maps = truncate(grams, rank)
    sigma = maps.spectrum[:rank]
    strong = sigma > WEAKEST * sigma[0]
    scale = np.zeros(rank)
    if strong.any():
        scale[strong] = np.sqrt(sigma[strong].mean() / sigma[strong])
    return Maps(scale[:, None] * maps.a, maps.b * scale)

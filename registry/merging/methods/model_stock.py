"""The average of adapters, drawn back to the base the more, the less they agree."""

from __future__ import annotations

from itertools import combinations

import numpy as np

from ..core import truncate
from ..grams import Array, Grams, Maps, block_products
from ..method import merge_method


@merge_method(
    "model_stock",
    form="grams",
    rev=1,
    exact=False,
    when="the parents are runs of one task that differ by seed or data; parents of different tasks cancel to nothing",
    cost="O(d R²) + O(R³)",
    paper="Model Stock, https://arxiv.org/abs/2403.19522",
    breaks=("full_rank",),
)
def model_stock(grams: Grams, *, rank: int) -> Maps:
    """Average the parents and shrink by the angle between them: t = n cos / (1 + (n - 1) cos), module by module.

    Args:
        grams: of the weighted parents; only those that have the module count in n.
        rank: of the output.

    Source: eq. 6 of the paper, with the mean cosine of all pairs. The paper has acute angles; for others t is 0 here.
    """
    products = block_products(grams)
    norms = np.sqrt(np.maximum(products.diagonal(), 0.0))
    present = [place for place in range(len(norms)) if norms[place] > 0]
    share = _ratio(products, norms, present) / max(1, len(present))
    return truncate(Grams(grams.a, grams.b, grams.c * share, grams.blocks), rank)


def _ratio(products: Array, norms: Array, present: list[int]) -> float:
    count = len(present)
    if count < 2:
        return 1.0
    cosine = float(np.mean([products[i, j] / (norms[i] * norms[j]) for i, j in combinations(present, 2)]))
    cosine = min(1.0, max(0.0, cosine))
    return count * cosine / (1 + (count - 1) * cosine)

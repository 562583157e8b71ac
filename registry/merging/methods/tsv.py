"""Task singular vectors made orthogonal to each other before they are added: each parent has its own directions."""

from __future__ import annotations

import numpy as np

from ..core import SAME_DIRECTION, canonical
from ..grams import Array, Grams, Maps
from ..method import merge_method


@merge_method(
    "tsv",
    form="grams",
    rev=1,
    exact=False,
    when="parents of different tasks use the same directions (high overlap in `plan`) and disturb each other",
    cost="O(d R²) + O(R³)",
    paper="TSV-Merge, https://arxiv.org/abs/2412.00081",
    breaks=("monotone", "full_rank"),
)
def tsv(grams: Grams, *, rank: int) -> Maps:
    """Replace the singular vectors of all parents by the nearest orthogonal ones, keep the singular values, and add.

    Args:
        grams: of the weighted parents.
        rank: of the output; the sum of the ranks keeps all of it.

    The paper first cuts each full task matrix to its share of the rank; a LoRA parent has a small rank already.
    """
    parents = canonical(grams)
    middle = _inverse_root(parents.grams.b) @ np.diag(parents.sigma) @ _inverse_root(parents.grams.a)
    return parents.product(rank, middle)


def _inverse_root(gram: Array) -> Array:
    """G^(-1/2) on the space of G: V G^(-1/2) is the orthogonal polar factor of V, Vᵀ V = G (orthogonal Procrustes)."""
    values, vectors = np.linalg.eigh(gram)
    kept = values > SAME_DIRECTION * max(values[-1], 0.0) if len(values) else values > 0
    root: Array = (vectors[:, kept] / np.sqrt(values[kept])) @ vectors[:, kept].T
    return root

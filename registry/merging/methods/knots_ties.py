"""TIES on the right singular vectors of all parents side by side, which speak of the same directions."""

from __future__ import annotations

import numpy as np

from ..core import SAME_DIRECTION, canonical, truncate
from ..deltas import Deltas
from ..elements import Density, MajoritySign, elect, largest
from ..grams import Array, Block, Grams, gram
from ..method import merge_method


@merge_method(
    "knots_ties",
    form="deltas",
    rev=1,
    exact=False,
    when="parents of different tasks disturb each other and signs are to be elected per input, without losing rank",
    cost="O(d R²) + O(R³), and a sort of R d_in elements a parent",
    paper="KnOTS, https://arxiv.org/abs/2410.19735",
    breaks=("identity", "cancellation", "monotone", "full_rank"),
)
def knots_ties(
    deltas: Deltas, *, rank: int, density: Density = 0.5, majority_sign_method: MajoritySign = "total"
) -> tuple[Array, Array]:
    """Decompose [D₁ … Dₙ] = U Σ [V₁ … Vₙ]ᵀ; trim, elect signs and average the Vᵢᵀ; multiply by U Σ; cut to the rank.

    Args:
        deltas: of the parents; their weights scale them before the rule.
        rank: of the output; that of U keeps all of it.
        density: share of the elements of each Vᵢ that is kept.
        majority_sign_method: elect signs by the sum of elements (total) or of their signs (frequency).

    With Dᵢ = Uᵢ σᵢ Wᵢᵀ decomposed on its own, Σ² and Q are the eigenvalues and vectors of σ UᵀU σ, and Vᵢᵀ = Qᵢᵀ Wᵢᵀ:
    no matrix larger than R x d_in is formed. The authors' code trims Σ Vᵢᵀ instead, of all layers at once
    (https://github.com/gstoica27/KnOTS, task_merger.py), which is another result wherever the density is below 1.
    """
    stack = deltas.stack
    parents = canonical(stack.grams())
    square = parents.sigma[:, None] * parents.grams.b * parents.sigma
    energy, vectors = np.linalg.eigh(square)
    kept = energy > SAME_DIRECTION * max(energy[-1], 0.0) if len(energy) else energy > 0
    vectors, sigma = vectors[:, kept], np.sqrt(energy[kept])
    a, b = np.zeros((rank, stack.a.shape[1])), np.zeros((len(stack.b), rank))
    if not len(sigma):
        return a, b
    prune, rows = largest(density), parents.a @ stack.a
    trimmed = np.array(
        [
            prune(vectors[block.start : block.stop].T @ rows[block.start : block.stop], "")
            for block in parents.grams.blocks
        ]
    )
    merged = elect(majority_sign_method)(trimmed, np.ones(len(trimmed)))
    count = len(sigma)
    cut = Grams(gram(merged), np.eye(count), sigma, (Block(0, 0, count),))
    maps = truncate(cut, min(rank, count))
    a[: len(maps.a)] = maps.a @ merged
    b[:, : len(maps.a)] = stack.b @ (parents.b @ ((parents.sigma[:, None] * vectors / sigma) @ maps.b))
    return a, b

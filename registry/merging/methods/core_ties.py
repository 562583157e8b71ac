"""TIES inside the small space that all parents share, where no rank is lost and the base is not needed."""

from __future__ import annotations

import math

import numpy as np

from ..core import SAME_DIRECTION, canonical
from ..elements import Density, MajoritySign, elect
from ..grams import Array, Grams, Maps
from ..method import merge_method


@merge_method(
    "core_ties",
    form="grams",
    rev=1,
    exact=False,
    when="parents of different tasks disturb each other; signs are elected without the loss of rank of ties_svd",
    cost="O(d R²) + O(R³)",
    paper="Core Space, https://arxiv.org/abs/2509.17786",
    breaks=("cancellation", "monotone", "full_rank"),
)
def core_ties(grams: Grams, *, rank: int, density: Density = 0.5, majority_sign_method: MajoritySign = "total") -> Maps:
    """Write each parent as a core in one basis of all row and column spaces; trim, elect signs and average the cores.

    Args:
        grams: of the weighted parents.
        rank: of the output.
        density: share of the elements of each core that is kept, rounded up.
        majority_sign_method: elect signs by the sum of elements (total) or of their signs (frequency).

    The paper takes the basis from the factors as they are written. Here each parent is first brought to its own
    singular value decomposition, so that the result does not depend on the gauge. A module of one parent alone has a
    diagonal core, and comes back as it is while the density leaves the diagonal.
    """
    parents = canonical(grams)
    if not len(parents.sigma):
        return parents.product(rank, np.zeros((0, 0)))
    left, right = _basis(parents.grams.b, parents.sigma), _basis(parents.grams.a, parents.sigma)
    seen_left, seen_right = left.T @ parents.grams.b, right.T @ parents.grams.a
    cores = np.array(
        [
            _trimmed((seen_left[:, rows] * parents.sigma[rows]) @ seen_right[:, rows].T, density)
            for rows in (slice(block.start, block.stop) for block in parents.grams.blocks)
        ]
    )
    merged = elect(majority_sign_method)(cores, np.ones(len(cores)))
    return parents.product(rank, left @ merged @ right.T)


def _basis(gram: Array, sigma: Array) -> Array:
    """X with V X an orthonormal basis of the vectors V with Vᵀ V = gram, each at the root of its singular value."""
    root = np.sqrt(sigma)
    values, vectors = np.linalg.eigh(root[:, None] * gram * root)
    kept = values > SAME_DIRECTION * max(values[-1], 0.0)
    basis: Array = root[:, None] * vectors[:, kept] / np.sqrt(values[kept])
    return basis


def _trimmed(core: Array, density: float) -> Array:
    sizes = np.abs(core)
    least = np.sort(sizes, axis=None)[-math.ceil(density * core.size)]
    return np.where(sizes >= least, core, 0.0)

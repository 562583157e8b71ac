"""TIES inside the small space that all parents share, where no rank is lost and the base is not needed."""

from __future__ import annotations

import numpy as np

from ..core import basis, canonical
from ..elements import Density, MajoritySign, elect, trimmed
from ..grams import Grams, Maps
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
    left, right = basis(parents.grams.b, parents.sigma), basis(parents.grams.a, parents.sigma)
    cores = np.array([trimmed(core, density) for core in parents.cores(left, right)])
    merged = elect(majority_sign_method)(cores, np.ones(len(cores)))
    return parents.product(rank, left @ merged @ right.T)

"""Compress, then merge: two subspaces of the output's rank that hold each parent's share are found before merging."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from ..core import Canonical, basis, canonical
from ..elements import Density, MajoritySign, elect, trimmed
from ..grams import ENERGY_FLOOR, Array, Grams, Maps
from ..method import Share, merge_method

#: The search ends when a sweep takes less than this off the relative error of all X; the authors' does so too.
SMALL_GAIN = 1e-6
MOST_SWEEPS = 100


@merge_method(
    "ctm",
    form="grams",
    rev=1,
    exact=False,
    when="the rank must stay small and strong parents would take all of it: each parent keeps its share of the rank",
    cost="O(d R²), and O(R³) for each of 2 to 100 sweeps",
    paper="Compress then Merge, https://arxiv.org/abs/2606.03723",
    breaks=("cancellation", "monotone", "full_rank"),
    work=10.0,
)
def ctm(
    grams: Grams,
    *,
    rank: int,
    beta: Share = 0.25,
    rule: Literal["ties", "sum"] = "ties",
    density: Density = 0.5,
    majority_sign_method: MajoritySign = "total",
) -> Maps:
    """Project each parent on `rank` columns and rows that all of them share, and merge the rank x rank cores.

    Args:
        grams: of the weighted parents.
        rank: of the subspaces, and so of the output.
        beta: how much the parents' sizes count in the choice of the subspaces: 0 not at all, 1 as they are.
        rule: of the cores: trim them, elect signs and average (ties), or add them (sum).
        density: share of the elements of each core that ties keeps, rounded up.
        majority_sign_method: ties elects signs by the sum of elements (total) or of their signs (frequency).

    With t the mean of the sizes, X = (β ‖D‖ + (1 - β) t) D / ‖D‖ stands for a parent's delta D. Orthonormal U and V
    maximise Σ ‖Uᵀ X V‖² (Tucker-2): V starts from the largest right singular vectors of all X in a column (HOSVD), then
    U is made of the largest left singular vectors of all X V in a row, and V of those of all Xᵀ U, again and again
    (HOOI). The result is U M({Uᵀ D V}) Vᵀ, with M the rule. Everything happens in the small space of core_ties.
    """
    parents = canonical(grams)
    if not len(parents.sigma):
        return parents.product(rank, np.zeros((0, 0)))
    left, right = _subspaces(parents, rank, beta)
    cores = parents.cores(left, right)
    if rule == "sum":
        return parents.product(rank, left @ cores.sum(axis=0) @ right.T)
    merged = elect(majority_sign_method)(np.array([trimmed(core, density) for core in cores]), np.ones(len(cores)))
    return parents.product(rank, left @ merged @ right.T)


def _subspaces(parents: Canonical, rank: int, beta: float) -> tuple[Array, Array]:
    """Maps (R, rank at most) of the parents' left and right singular vectors to the columns of U and of V."""
    owner = np.repeat(
        np.arange(len(parents.grams.blocks)), [block.stop - block.start for block in parents.grams.blocks]
    )
    sizes = np.sqrt(np.bincount(owner, parents.sigma**2))
    wanted = beta * sizes + (1 - beta) * sizes.mean()
    sigma, same = parents.sigma * (wanted / sizes)[owner], owner[:, None] == owner
    left, right = basis(parents.grams.b, sigma), basis(parents.grams.a, sigma)
    rows, columns = left.T @ parents.grams.b, right.T @ parents.grams.a

    def leading(here: Array, seen: Array) -> tuple[Array, float]:
        """The vectors (k, rank at most) that hold most of all X, projected to `seen` on their other side; how much."""
        weighted = seen * sigma
        energy, vectors = np.linalg.eigh(here @ (same * (weighted.T @ weighted)) @ here.T)
        energy, vectors = energy[::-1][:rank], vectors[:, ::-1][:, :rank]
        return vectors[:, energy > ENERGY_FLOOR * energy[0]], float(energy.sum())

    total, error = float(np.sum(wanted**2)), math.inf
    v, _ = leading(columns, rows)
    for _ in range(MOST_SWEEPS):
        u, _ = leading(rows, v.T @ columns)
        v, held = leading(columns, u.T @ rows)
        before, error = error, math.sqrt(max(0.0, 1 - held / total))
        if before - error < SMALL_GAIN:
            break
    return left @ u, right @ v

"""PEFT's `dare_linear_svd`: elements of the deltas are dropped at random, the rest added and cut to a rank."""

from __future__ import annotations

from ..deltas import Deltas, keep_by_chance
from ..elements import Density, add
from ..grams import Array
from ..method import merge_method


@merge_method(
    "dare_linear_svd",
    form="deltas",
    rev=2,
    exact=False,
    when="a merge like PEFT's combination_type dare_linear_svd is wanted, repeatable; svd loses less and adds no noise",
    cost="O(d_out d_in R); memory of one merged delta, 4 d_out d_in bytes, a worker",
    paper="DARE, https://arxiv.org/abs/2311.03099",
    breaks=("identity", "parent_order", "cancellation", "monotone", "full_rank"),
)
def dare_linear_svd(deltas: Deltas, *, rank: int, seed: int, density: Density = 0.5) -> tuple[Array, Array]:
    """Drop elements of each delta at random, divide the rest by the density, add, and keep the rank, as PEFT does.

    Args:
        deltas: of the parents, without their weights.
        rank: of the output; the rule leaves no low rank, so much is lost that no rank of an adapter holds.
        seed: of the masks.
        density: share of the elements of each delta that is kept.
    """
    return deltas.merged(keep_by_chance(density, seed), add).factors(rank)

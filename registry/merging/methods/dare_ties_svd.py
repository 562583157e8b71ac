"""PEFT's `dare_ties_svd`: elements of the deltas are dropped at random, signs are elected, and the rank is cut."""

from __future__ import annotations

from ..deltas import Deltas, keep_by_chance
from ..elements import Density, MajoritySign, elect
from ..grams import Array
from ..method import merge_method


@merge_method(
    "dare_ties_svd",
    form="deltas",
    rev=2,
    exact=False,
    when="a merge like PEFT's combination_type dare_ties_svd is wanted, repeatable; svd loses less and adds no noise",
    cost="O(d_out d_in R); memory of one merged delta, 4 d_out d_in bytes, a worker",
    paper="DARE, https://arxiv.org/abs/2311.03099",
    breaks=("identity", "parent_order", "absent", "cancellation", "monotone", "full_rank"),
)
def dare_ties_svd(
    deltas: Deltas, *, rank: int, seed: int, density: Density = 0.5, majority_sign_method: MajoritySign = "total"
) -> tuple[Array, Array]:
    """Drop elements of each delta at random, elect signs, average what has them, and cut to the rank, as PEFT does.

    Args:
        deltas: of the parents, without their weights.
        rank: of the output; the rule leaves no low rank, so much is lost that no rank of an adapter holds.
        seed: of the masks.
        density: share of the elements of each delta that is kept.
        majority_sign_method: elect signs by the sum of elements (total) or of their signs (frequency).
    """
    return deltas.merged(keep_by_chance(density, seed), elect(majority_sign_method)).factors(rank)

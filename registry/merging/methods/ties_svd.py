"""PEFT's `ties_svd`: trim, elect signs and average, on the elements of the deltas, then a truncated SVD."""

from __future__ import annotations

from ..deltas import Deltas, keep_largest
from ..elements import Density, MajoritySign, elect
from ..grams import Array
from ..method import merge_method


@merge_method(
    "ties_svd",
    form="deltas",
    rev=2,
    exact=False,
    when="a result of PEFT's combination_type ties_svd has to be made again; for tasks that disturb each other see tsv",
    cost="O(d_out d_in R); memory of one merged delta, 4 d_out d_in bytes, a worker",
    paper="TIES-Merging, https://arxiv.org/abs/2306.01708",
    breaks=("identity", "absent", "monotone", "full_rank"),
)
def ties_svd(
    deltas: Deltas, *, rank: int, density: Density = 0.5, majority_sign_method: MajoritySign = "total"
) -> tuple[Array, Array]:
    """Trim each parent's delta, elect signs, average the elements that have them, and cut to the rank, as PEFT does.

    Args:
        deltas: of the parents, without their weights.
        rank: of the output; the rule leaves no low rank, so much is lost that no rank of an adapter holds.
        density: share of the elements of each delta that is kept.
        majority_sign_method: elect signs by the sum of elements (total) or of their signs (frequency).
    """
    return deltas.merged(keep_largest(density), elect(majority_sign_method)).factors(rank)

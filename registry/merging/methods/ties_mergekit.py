"""TIES as mergekit has it: signs are elected by weighted deltas, and the average is a weighted one."""

from __future__ import annotations

import numpy as np

from ..deltas import Deltas, keep_largest
from ..elements import Density, MajoritySign, Rule, add, weighed
from ..grams import Array
from ..method import merge_method

#: mergekit's: weights that add up to less are not divided by.
SMALLEST_SUM = 1e-8


@merge_method(
    "ties_mergekit",
    form="deltas",
    rev=2,
    exact=False,
    when="a result of mergekit's method ties is to be had as an adapter, without the base; its weights are normalised",
    cost="O(d_out d_in R); memory of one merged delta, 4 d_out d_in bytes, a worker",
    paper="TIES-Merging, https://arxiv.org/abs/2306.01708, in the form of https://github.com/arcee-ai/mergekit",
    breaks=("identity", "homogeneity", "cancellation", "monotone", "full_rank"),
)
def ties_mergekit(
    deltas: Deltas, *, rank: int, density: Density = 0.5, majority_sign_method: MajoritySign = "total"
) -> tuple[Array, Array]:
    """Trim each delta, elect signs among the weighted elements, average by weight what has them, and cut to the rank.

    Args:
        deltas: of the parents, without their weights.
        rank: of the output; the rule leaves no low rank, so much is lost that no rank of an adapter holds.
        density: share of the elements of each delta that is kept.
        majority_sign_method: elect signs by the sum of weighted elements (total) or of their signs (frequency).

    Weights decide the election and the mean, but not the size: three times all weights give the same.
    """
    return deltas.merged(keep_largest(density), _weighted_election(majority_sign_method)).factors(rank)


def _weighted_election(majority: MajoritySign) -> Rule:
    def rule(values: Array, weights: Array) -> Array:
        weighted = weighed(values, weights)
        votes = weighted if majority == "total" else np.sign(weighted)
        elected = ((weighted > 0) == (votes.sum(axis=0) >= 0)) & (weighted != 0)
        divisor = add(elected.astype(values.dtype), weights)
        divisor[np.abs(divisor) < SMALLEST_SUM] = 1
        average: Array = (weighted * elected).sum(axis=0) / divisor
        return average

    return rule

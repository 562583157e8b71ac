"""DELLA: elements of the deltas are dropped at random, small ones rather than large ones, and signs are elected."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import numpy as np

from ...domain.errors import Problem
from ...domain.recipe import LARGEST_WEIGHT, LEAST_WEIGHT, OptionValue
from ..deltas import Deltas, keep_by_rank
from ..elements import Density, Rule, weighed
from ..grams import Array
from ..method import Share, merge_method


def _chances_are_chances(options: Mapping[str, OptionValue]) -> Problem | None:
    density, epsilon = float(options["density"]), float(options["epsilon"])
    if density >= epsilon / 2 and density + epsilon / 2 <= 1:
        return None
    return Problem(
        "bad_option",
        f"density {density:g} and epsilon {epsilon:g} keep elements with chances from {density - epsilon / 2:g}"
        f" to {density + epsilon / 2:g}, expected 0 to 1",
        f"with this density epsilon is at most {2 * min(density, 1 - density):g}",
    )


@merge_method(
    "della",
    form="deltas",
    rev=1,
    exact=False,
    when="tasks disturb each other and signs are to be elected among elements kept by chance, large ones the likelier",
    cost="O(d_out d_in R), and a sort of each row of each delta; memory as the other rules on deltas",
    paper="DELLA-Merging, https://arxiv.org/abs/2406.11617",
    breaks=("identity", "parent_order", "cancellation", "monotone", "full_rank"),
    work=6.0,
    check=_chances_are_chances,
)
def della(
    deltas: Deltas,
    *,
    rank: int,
    seed: int,
    density: Density = 0.5,
    epsilon: Share = 0.14,
    scale: Annotated[float, (LEAST_WEIGHT, LARGEST_WEIGHT)] = 1.0,
) -> tuple[Array, Array]:
    """Drop elements of each delta by rank in their row and chance, elect signs, average what has them, cut to the rank.

    Args:
        deltas: of the parents; their weights scale what is left of them, before the election.
        rank: of the output; the rule leaves no low rank, so much is lost that no rank of an adapter holds.
        seed: of the masks.
        density: share of the elements of each delta that is kept on average, one less the drop rate p of the paper.
        epsilon: how much likelier the largest element of a row is kept than the smallest; half of it is mergekit's.
        scale: what the average is multiplied by, λ of the paper and mergekit's lambda; weights times it do the same.

    Drop: an element with r of the n in its row above it is dropped with the chance 1 - density - ε/2 + r ε/n, else
    divided by the chance to stay. Elect: the sign of the sum over the parents. Fuse: the mean of what has that sign.
    """
    return deltas.merged(keep_by_rank(density, epsilon, seed), _fused(scale)).factors(rank)


def _fused(scale: float) -> Rule:
    def rule(values: Array, weights: Array) -> Array:
        weighted = weighed(values, weights)
        elected = (np.sign(weighted) == np.sign(weighted.sum(axis=0))) & (weighted != 0)
        average: Array = (weighted * elected).sum(axis=0) / np.maximum(elected.sum(axis=0, dtype=values.dtype), 1)
        return average * values.dtype.type(scale)

    return rule

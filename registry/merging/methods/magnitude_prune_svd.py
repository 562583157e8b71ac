"""PEFT's `magnitude_prune_svd`: small elements of the deltas are dropped, the rest added and cut to a rank."""

from __future__ import annotations

from ..deltas import Deltas, keep_largest
from ..elements import Density, add
from ..grams import Array
from ..method import merge_method


@merge_method(
    "magnitude_prune_svd",
    form="deltas",
    rev=2,
    exact=False,
    when="a result of PEFT's combination_type magnitude_prune_svd has to be made again; else use sum or svd",
    cost="O(d_out d_in R); memory of one merged delta, 4 d_out d_in bytes, a worker",
    paper="PEFT's add_weighted_adapter, https://huggingface.co/docs/peft/developer_guides/model_merging",
    breaks=("identity", "monotone", "full_rank"),
)
def magnitude_prune_svd(deltas: Deltas, *, rank: int, density: Density = 0.5) -> tuple[Array, Array]:
    """Keep the largest elements of each parent's delta, add them with their weights, and keep the rank, as PEFT does.

    Args:
        deltas: of the parents, without their weights.
        rank: of the output; the rule leaves no low rank, so much is lost that no rank of an adapter holds.
        density: share of the elements of each delta that is kept.
    """
    return deltas.merged(keep_largest(density), add).factors(rank)

"""PEFT's `magnitude_prune`: small elements of the factors are dropped before they are added."""

from __future__ import annotations

from ..elements import Density, Elements, add, largest
from ..grams import Array
from ..method import merge_method


@merge_method(
    "magnitude_prune",
    form="elements",
    rev=1,
    exact=False,
    when="a result of PEFT's combination_type magnitude_prune has to be made again; else use sum or svd",
    cost="O(d R log(d R))",
    paper="PEFT's add_weighted_adapter, https://huggingface.co/docs/peft/developer_guides/model_merging",
    breaks=("identity", "gauge", "padding", "full_rank"),
    equal_ranks=True,
)
def magnitude_prune(elements: Elements, *, density: Density = 0.5) -> tuple[Array, Array]:
    """Keep the largest elements of each parent's A and B, and add the factors as PEFT does.

    Args:
        elements: of parents of one rank.
        density: share of the elements of each factor that is kept.
    """
    return elements.merged(largest(density), add)

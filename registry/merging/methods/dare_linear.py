"""PEFT's `dare_linear`: elements of the factors are dropped at random, the rest enlarged, and added."""

from __future__ import annotations

from ..elements import Density, Elements, add, chance
from ..grams import Array
from ..method import merge_method


@merge_method(
    "dare_linear",
    form="elements",
    rev=1,
    exact=False,
    when="a merge like PEFT's combination_type dare_linear is wanted, but one that can be repeated",
    cost="O(d R)",
    paper="DARE, https://arxiv.org/abs/2311.03099",
    breaks=("identity", "parent_order", "gauge", "cancellation", "padding", "full_rank"),
    equal_ranks=True,
)
def dare_linear(elements: Elements, *, seed: int, density: Density = 0.5) -> tuple[Array, Array]:
    """Drop elements of each parent's A and B at random, divide the rest by the density, and add as PEFT does.

    Args:
        elements: of parents of one rank.
        seed: of the masks.
        density: share of the elements of each factor that is kept.
    """
    return elements.merged(chance(density, seed), add)

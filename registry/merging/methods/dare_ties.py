"""PEFT's `dare_ties`: elements of the factors are dropped at random, then signs are elected as in `ties`."""

from __future__ import annotations

from ..elements import Density, Elements, MajoritySign, chance, elect
from ..grams import Array
from ..method import merge_method


@merge_method(
    "dare_ties",
    form="elements",
    rev=1,
    exact=False,
    when="a merge like PEFT's combination_type dare_ties is wanted, but one that can be repeated",
    cost="O(d R)",
    paper="DARE, https://arxiv.org/abs/2311.03099",
    breaks=("identity", "parent_order", "gauge", "absent", "cancellation", "padding", "full_rank"),
    equal_ranks=True,
)
def dare_ties(
    elements: Elements, *, seed: int, density: Density = 0.5, majority_sign_method: MajoritySign = "total"
) -> tuple[Array, Array]:
    """Drop elements of A and B at random, elect a sign for each element, and average those that have it, as PEFT does.

    Args:
        elements: of parents of one rank.
        seed: of the masks.
        density: share of the elements of each factor that is kept.
        majority_sign_method: elect signs by the sum of elements (total) or of their signs (frequency).
    """
    return elements.merged(chance(density, seed), elect(majority_sign_method))

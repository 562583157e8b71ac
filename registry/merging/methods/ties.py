"""PEFT's `ties`: trim, elect signs and average, on the elements of the factors."""

from __future__ import annotations

from ..elements import Density, Elements, MajoritySign, elect, largest
from ..grams import Array
from ..method import merge_method


@merge_method(
    "ties",
    form="elements",
    rev=1,
    exact=False,
    when="a result of PEFT's combination_type ties has to be made again; for tasks that disturb each other see tsv",
    cost="O(d R log(d R))",
    paper="TIES-Merging, https://arxiv.org/abs/2306.01708",
    breaks=("identity", "gauge", "absent", "padding", "full_rank"),
    equal_ranks=True,
)
def ties(
    elements: Elements, *, density: Density = 0.5, majority_sign_method: MajoritySign = "total"
) -> tuple[Array, Array]:
    """Trim each parent's A and B, elect a sign for each element, and average those that have it, as PEFT does.

    Args:
        elements: of parents of one rank.
        density: share of the elements of each factor that is kept.
        majority_sign_method: elect signs by the sum of elements (total) or of their signs (frequency).
    """
    return elements.merged(largest(density), elect(majority_sign_method))

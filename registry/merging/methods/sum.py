"""The default: the weighted sum, exact for as long as the rank allows it."""

from __future__ import annotations

from ...domain.recipe import SUM_RANK_LIMIT
from ..method import merge_method


@merge_method(
    "sum",
    form="choice",
    rev=1,
    exact=True,
    when="you want the weighted sum of what the parents do, and have no reason to choose another method",
    cost="that of cat, or of svd beyond the limit",
    paper="task arithmetic, https://arxiv.org/abs/2212.04089",
)
def weighted_sum(full_rank: int, rank: int | None) -> tuple[str, int]:
    """Add the deltas: exactly (cat) while the ranks add up to 64 or --rank at most, as well as that rank can beyond.

    Args:
        full_rank: R, the largest sum of ranks over the modules.
        rank: the limit that the caller set, if any.
    """
    limit = rank or SUM_RANK_LIMIT
    return ("cat", full_rank) if full_rank <= limit else ("svd", limit)

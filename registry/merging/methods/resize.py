"""One adapter at a smaller rank: what `adapterctl resize` runs. A recipe of one parent, and the only one there is."""

from __future__ import annotations

from ...domain.recipe import RESIZE
from ..core import truncate
from ..grams import Grams, Maps
from ..method import merge_method


@merge_method(
    RESIZE,
    form="grams",
    rev=1,
    exact=False,
    when="one adapter shall become smaller: nothing of that rank is closer to it; see `adapterctl resize`",
    cost="O(d r²) + O(r³)",
    paper="Eckart & Young 1936, https://doi.org/10.1007/BF02288367",
    min_parents=1,
    max_parents=1,
)
def resize(grams: Grams, *, rank: int) -> Maps:
    """Keep the largest singular directions of one adapter.

    Args:
        grams: a, b (R, R) and c (R,), float64, R the rank of the adapter's module.
        rank: 1 <= rank <= R; directions without energy come out as zeros.
    """
    return truncate(grams, rank)

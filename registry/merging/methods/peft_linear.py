"""PEFT's `linear`: the sum of factors, which is not the sum of deltas. Under a name of its own, for compatibility."""

from __future__ import annotations

import numpy as np

from ..grams import Grams, Maps
from ..method import merge_method


@merge_method(
    "peft_linear",
    form="grams",
    rev=1,
    exact=False,
    when="a result of PEFT's combination_type linear has to be made again; else use sum",
    cost="O(d R)",
    paper="PEFT's add_weighted_adapter, https://huggingface.co/docs/peft/developer_guides/model_merging",
    breaks=("gauge", "full_rank"),
    equal_ranks=True,
)
def peft_linear(grams: Grams, *, rank: int) -> Maps:
    """Add the parents' A and B on their own, each times the root of its coefficient, as PEFT does.

    Args:
        grams: of parents of one rank.
        rank: of the output; rows beyond the parents' rank are zero.

    B'A' is the sum plus √|cᵢcⱼ| Bⱼ Aᵢ for every two parents: cross terms that no parent was trained for.
    """
    root = np.sqrt(np.abs(grams.c))
    maps = Maps(np.zeros((rank, grams.rank)), np.zeros((grams.rank, rank)))
    for block in grams.blocks:
        rows = np.arange(block.start, block.stop)
        maps.a[rows - block.start, rows] = np.where(grams.c[rows] < 0, -root[rows], root[rows])
        maps.b[rows, rows - block.start] = root[rows]
    return maps

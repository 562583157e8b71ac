"""The exact sum that keeps the parents' factors side by side. PEFT calls it `cat` too."""

from __future__ import annotations

import numpy as np

from ..grams import Array, Factors
from ..method import merge_method


@merge_method(
    "cat",
    form="factors",
    rev=1,
    exact=True,
    when="the ranks may add up: nothing is lost, and bytes are copied wherever weight times scaling is 1",
    cost="O(d R), mostly copying",
    paper="LoRA Soups, https://arxiv.org/abs/2410.13025",
)
def cat(c: Array) -> Factors:
    """Stack the factors: the exact weighted sum, at the sum of the parents' ranks.

    Args:
        c: (R,), weight * scaling of each row of A. All of it goes into A, so B keeps its bytes. Where that leaves the
            range of a narrow type, the receipt refuses the merge if it costs anything; svd shares it among both.
    """
    return Factors(a=c, b=np.ones_like(c))

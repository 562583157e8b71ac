"""The Karcher mean of adapters: the direction in the middle of all of them, with the size that averaging shrinks."""

from __future__ import annotations

import math

import numpy as np

from ..core import truncate
from ..grams import Array, Grams, Maps, block_products
from ..method import merge_method

#: Squared length of a convex combination of unit deltas below which they balance each other: slerp's limit for two.
BALANCED = (1 - 0.9995) / 2
#: The iteration ends at a step of this angle, in radians.
SMALL_STEP = 1e-12
MOST_STEPS = 1000


@merge_method(
    "karcher",
    form="grams",
    rev=1,
    exact=False,
    when="several parents of equal standing are to be mixed rather than added: what slerp is for two, for any number",
    cost="O(d R²) + O(R³)",
    paper="Buss & Fillmore 2001, https://doi.org/10.1145/502122.502124",
    breaks=("monotone", "full_rank"),
)
def karcher(grams: Grams, *, rank: int) -> Maps:
    """Mix the parents by their shares in the point of the sphere that is nearest to all their directions, by module.

    Args:
        grams: of the weighted parents; a weight scales what its parent adds, and does not draw the mean towards it.
        rank: of the output.

    The mean of the unit deltas u is the unit sum of sᵢ uᵢ from which the arcs to all of them add up to nothing; the
    result is the sum of sᵢ Dᵢ, so that two parents give what slerp gives at t = 1/2. A mean exists, and is the only
    one, where all parents lie on one side of some plane. Where they balance each other, such as D and -D, they are
    averaged. Only parents that have the module count; one alone comes back as it is.
    """
    products = block_products(grams)
    present = [place for place in range(len(grams.blocks)) if products[place, place] > 0]
    shares = np.zeros(len(grams.blocks))
    shares[present] = _shares(products[np.ix_(present, present)])
    by_row = np.repeat(shares, [block.stop - block.start for block in grams.blocks])
    return truncate(Grams(grams.a, grams.b, grams.c * by_row, grams.blocks), rank)


def _shares(products: Array) -> Array:
    """What each present parent is multiplied by."""
    norms = np.sqrt(products.diagonal())
    cosines = np.clip(products / np.outer(norms, norms), -1.0, 1.0)
    if not _on_one_side(cosines):
        return np.ones(len(cosines)) / len(cosines)
    shares = _unit(np.ones(len(cosines)), cosines)
    for _ in range(MOST_STEPS):
        pull, seen = _pull(shares, cosines), cosines @ shares
        tangent = (pull - (pull @ seen) * shares) / len(shares)
        angle = math.sqrt(max(0.0, float(tangent @ cosines @ tangent)))
        if angle <= SMALL_STEP:
            break
        shares = _unit(math.cos(angle) * shares + math.sin(angle) / angle * tangent, cosines)
    # parents that depend on each other have the same mean with many shares: these are its own
    return _unit(_pull(shares, cosines), cosines)


def _on_one_side(cosines: Array) -> bool:
    """Whether some combination of the directions has a positive product with each, found before a balanced one.

    Source: von Neumann's algorithm, Dantzig 1992, Stanford SOL 92-5: it goes to the point of the hull that is nearest
    to 0, whose squared length falls below 1/k in k steps.
    """
    weights = np.ones(len(cosines)) / len(cosines)
    while True:
        seen = cosines @ weights
        squared = float(weights @ seen)
        if squared <= BALANCED:
            return False
        least = int(np.argmin(seen))
        if seen[least] > 0:
            return True
        step = (squared - seen[least]) / (squared - 2 * seen[least] + 1)
        weights *= 1 - step
        weights[least] += step


def _pull(shares: Array, cosines: Array) -> Array:
    """(parents,): angle over sine of the arc from the point to each direction; the step to it is that times its
    component across the point.
    """
    angles = np.arccos(np.clip(cosines @ shares, -1.0, 1.0))
    pull: Array = 1 / np.sinc(angles / math.pi)
    return pull


def _unit(shares: Array, cosines: Array) -> Array:
    return shares / math.sqrt(float(shares @ cosines @ shares))

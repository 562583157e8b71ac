"""PEFT's rules on the factors themselves: an element of A' is made from that element of every parent's A, B' alike.

They are not rules on deltas. B'A' holds products of one parent's B with another's A, and depends on how the parents'
factors happen to be written; the receipt tells the distance from the exact sum. Source of every rule, with its
corner cases: peft/utils/merge_utils.py, 0.21. Random masks come from Philox, keyed by seed, parent, module and factor,
so they are the same in any order of modules and for any number of threads.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np

from .grams import Array
from .stack import Stack

#: Share of the elements that is kept.
Density = Annotated[float, (1e-3, 1.0)]
MajoritySign = Literal["total", "frequency"]
#: (parents, ...) elements and (parents,) weights to the merged elements (...).
Rule = Callable[[Array, Array], Array]
#: (elements of one parent, what to call them) to the elements that are left.
Prune = Callable[[Array, str], Array]


@dataclass(frozen=True, slots=True)
class Elements:
    """One module of parents of equal rank r: a (n, r, d_in), b (n, d_out, r), c (n,) weight * scaling.

    `names` tells the parents apart, by module and place in the recipe.
    """

    a: Array
    b: Array
    c: Array
    names: tuple[str, ...]

    def merged(self, prune: Prune, rule: Rule) -> tuple[Array, Array]:
        """A' (r, d_in) and B' (d_out, r); the root of a coefficient goes to each factor, its sign to A."""
        root = np.sqrt(np.abs(self.c))
        a = np.stack([prune(one, f"{name}/A") for one, name in zip(self.a, self.names, strict=True)])
        b = np.stack([prune(one, f"{name}/B") for one, name in zip(self.b, self.names, strict=True)])
        return rule(a, np.where(self.c < 0, -root, root)), rule(b, root)


def elements_of(module: str, stack: Stack) -> Elements:
    rows = [slice(block.start, block.stop) for block in stack.blocks]
    return Elements(
        a=np.stack([stack.a[place] for place in rows]).astype(np.float64),
        b=np.stack([stack.b[:, place] for place in rows]).astype(np.float64),
        c=np.array([stack.c[place.start] for place in rows]),
        names=tuple(f"{block.parent}/{module}" for block in stack.blocks),
    )


def largest(density: float) -> Prune:
    """Keep the int(density * size) elements of largest size; of equal ones the first, where PEFT leaves it open."""

    def prune(values: Array, name: str) -> Array:
        order = np.argsort(-np.abs(values), axis=None, kind="stable")
        kept = np.zeros(values.size, bool)
        kept[order[: int(density * values.size)]] = True
        return np.where(kept.reshape(values.shape), values, 0.0)

    return prune


def trimmed(values: Array, density: float) -> Array:
    """Keep the ceil(density * size) elements of largest size, and those that equal the smallest of them."""
    sizes = np.abs(values)
    least = np.sort(sizes, axis=None)[-math.ceil(density * values.size)]
    return np.where(sizes >= least, values, 0.0)


def chance(density: float, seed: int) -> Prune:
    """Keep each element with probability `density`, divided by it, so that the expected value stays (DARE)."""

    def prune(values: Array, name: str) -> Array:
        key = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:16], "little")
        # numpy promises the raw stream of a bit generator, not that of its distributions
        draws = np.random.Philox(key=key).random_raw(values.size).reshape(values.shape) >> np.uint64(11)
        return np.where(draws < density * 2.0**53, values / density, 0.0)

    return prune


def add(values: Array, weights: Array) -> Array:
    total: Array = np.tensordot(weights, values, axes=1)
    return total


def weighed(values: Array, weights: Array) -> Array:
    """Each parent's elements at its weight."""
    result: Array = values * weights.reshape(-1, *[1] * (values.ndim - 1))
    return result


def elect(majority: MajoritySign) -> Rule:
    """Average the weighted elements whose sign is the elected one; the election does not look at weights (TIES)."""

    def rule(values: Array, weights: Array) -> Array:
        votes = values if majority == "total" else np.sign(values)
        elected = ((values > 0) == (votes.sum(axis=0) >= 0)) & (values != 0)
        # a product with the mask is eight times faster than `where`; adding 0 makes a zero of each negative zero
        total = add(values * elected + values.dtype.type(0), weights)
        average: Array = total / np.maximum(elected.sum(axis=0, dtype=values.dtype), 1)
        return average

    return rule

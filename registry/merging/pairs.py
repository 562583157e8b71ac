"""How parents meet: the angle between their deltas and how far they use the same directions of the base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from ..domain.plan import Interference, Pair, place_of
from .grams import Array, Grams, block_products, overlaps
from .stack import Stack

#: Rows of a module's delta that signs are compared on.
SIGN_ROWS = 128


@dataclass(frozen=True, slots=True)
class Meeting:
    """The parents of one module: products of their deltas at the sizes of their weights, without the signs, which say
    nothing about the adapters; overlap of their row and column spaces; all (n, n).
    """

    parents: tuple[int, ...]
    products: Array
    rows: Array
    columns: Array


def meet(grams: Grams, weights: Sequence[float]) -> Meeting:
    """`weights` of the parents that have the module, as in `grams.blocks`."""
    parents, signs = tuple(block.parent for block in grams.blocks), np.sign(weights)
    products = block_products(grams) * np.outer(signs, signs)
    return Meeting(parents, products, overlaps(grams.a, grams.blocks), overlaps(grams.b, grams.blocks))


def pairs(meetings: Sequence[Meeting], labels: Sequence[str]) -> tuple[Pair, ...]:
    """One `Pair` for every two parents over all modules; the norms are those at their weights."""
    count = len(labels)
    products, rows, columns, shared = (np.zeros((count, count)) for _ in range(4))
    for meeting in meetings:
        place = np.ix_(meeting.parents, meeting.parents)
        products[place] += meeting.products
        rows[place] += meeting.rows
        columns[place] += meeting.columns
        shared[place] += 1
    norms = np.sqrt(np.maximum(products.diagonal(), 0.0))
    return tuple(
        Pair(
            first=labels[i],
            second=labels[j],
            shared_modules=int(shared[i, j]),
            cosine=_ratio(products[i, j], norms[i] * norms[j]),
            row_overlap=_ratio(rows[i, j], shared[i, j]),
            column_overlap=_ratio(columns[i, j], shared[i, j]),
            norm_ratio=_ratio(norms[i], norms[j]),
        )
        for i, j in combinations(range(count), 2)
    )


@dataclass(frozen=True, slots=True)
class Signs:
    """Of one module, for every two parents (n, n): elements of opposite signs, and elements where neither is zero."""

    opposite: Array
    both: Array


def compare_signs(stack: Stack) -> Signs:
    """Counted over at most `SIGN_ROWS` rows of the deltas, evenly spaced: they need no whole delta in memory."""
    height, count = len(stack.b), len(stack.blocks)
    rows = np.unique(np.linspace(0, height - 1, min(SIGN_ROWS, height)).round().astype(int))
    signs = [np.sign(stack.b[rows, k.start : k.stop] @ stack.a[k.start : k.stop]) for k in stack.blocks]
    opposite, both = np.zeros((count, count)), np.zeros((count, count))
    for i, j in combinations(range(count), 2):
        product = signs[i] * signs[j]
        opposite[i, j], both[i, j] = np.count_nonzero(product < 0), np.count_nonzero(product)
    return Signs(opposite, both)


def interference(
    names: Sequence[str], meetings: Sequence[Meeting], signs: Sequence[Signs], labels: Sequence[str]
) -> tuple[Interference, ...]:
    """Every two parents over all modules, and in every layer that both change; layers in order, `-` for the rest."""
    places = range(len(names))
    layers = [place_of(name)[0] for name in names]
    groups: dict[str, list[int]] = {"all": list(places)}
    for layer in [*sorted({each for each in layers if each is not None}), None]:
        groups["-" if layer is None else str(layer)] = [p for p in places if layers[p] == layer]
    found = []
    for name, chosen in groups.items():
        opposite, both = np.zeros((len(labels), len(labels))), np.zeros((len(labels), len(labels)))
        for p in chosen:
            place = np.ix_(meetings[p].parents, meetings[p].parents)
            opposite[place] += signs[p].opposite
            both[place] += signs[p].both
        described = pairs([meetings[p] for p in chosen], labels)
        for pair, (i, j) in zip(described, combinations(range(len(labels)), 2), strict=True):
            if pair.shared_modules or name == "all":
                conflict = _ratio(opposite[i, j], both[i, j])
                found.append(
                    Interference(
                        pair.first, pair.second, name, pair.cosine, pair.row_overlap, pair.column_overlap, conflict
                    )
                )
    return tuple(found)


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole > 0 else 0.0

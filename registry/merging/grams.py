"""The small matrices that say everything about a weighted sum of low-rank deltas.

A module's sum is `B @ diag(c) @ A`: the parents' rows of A stacked (R, d_in), their columns of B stacked (d_out, R),
and one coefficient a row. Norms, angles, spectra and errors of every such product follow from `A Aᵀ` and `Bᵀ B`
alone, so once these two are known no question about a merge needs the large factors again. Everything is float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

#: A norm from Gram matrices is the root of a sum that cancels. float64 leaves about this much of the norms that cancel.
GRAM_FLOOR = 1e-7
#: What float32 leaves, whose elements are off by 1.5e-6 of the norms where values are equal or few of them rule.
GRAM_FLOOR_32 = 2e-3
#: Below this smallest pivot the Cholesky root of a matrix of unit diagonal has lost half of float64.
MIN_PIVOT = 1e-5
#: A direction with less than this share of the largest eigenvalue is rounding, not signal (float64 leaves 1e-16 * R).
ENERGY_FLOOR = 1e-14


@dataclass(frozen=True, slots=True)
class Block:
    """Rows `start:stop` of the stack belong to parent `parent` (its place in the recipe)."""

    parent: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Grams:
    """`a` = A Aᵀ and `b` = Bᵀ B, both (R, R); `c` (R,) = weight * scaling of each row; `blocks` cover 0:R in order."""

    a: Array
    b: Array
    c: Array
    blocks: tuple[Block, ...]

    @property
    def rank(self) -> int:
        """R, the sum of the parents' ranks."""
        return len(self.c)

    def of(self, block: Block) -> Grams:
        """Those of one parent alone."""
        own = _of(block)
        return Grams(
            self.a[own, own], self.b[own, own], self.c[own], (Block(block.parent, 0, block.stop - block.start),)
        )


@dataclass(frozen=True, slots=True)
class Maps:
    """What a method makes of a module: A' = a @ A and B' = B @ b, with a (r, R) and b (R, r).

    `spectrum` holds the singular values of what was cut to rank r, largest first, where the method found them.
    """

    a: Array
    b: Array
    spectrum: Array = field(default_factory=lambda: np.zeros(0))


@dataclass(frozen=True, slots=True)
class Factors:
    """The factors are kept: row k of A times a[k], column k of B times b[k]. A scale of 1 copies bytes."""

    a: Array
    b: Array


def gram(rows: npt.NDArray[np.floating]) -> Array:
    """`rows @ rows.T` in float64, for rows of shape (R, d) in any memory order."""
    wide = rows.astype(np.float64, order="K", copy=False)
    return wide @ wide.T


def gram_32(rows: npt.NDArray[np.float32]) -> Array:
    """`gram` in half the time, each product and 4,096 of them at a time added in float32; infinite beyond its range."""
    with np.errstate(over="ignore", invalid="ignore"):
        return sum((block @ block.T for block in _blocks(rows)), np.zeros((len(rows), len(rows))))


def gram_in_blocks(rows: npt.NDArray[np.floating]) -> Array:
    """`gram` with 4,096 columns at a time in float64, where all of them would take too much memory."""
    return sum((gram(block) for block in _blocks(rows)), np.zeros((len(rows), len(rows))))


def _blocks(rows: npt.NDArray[np.floating]) -> Iterator[npt.NDArray[np.floating]]:
    return (rows[:, start : start + 4096] for start in range(0, rows.shape[1], 4096))


def squared_norm(grams: Grams, middle: Array) -> float:
    """||B @ middle @ A||² for `middle` (R, R); never negative."""
    return max(0.0, float(np.sum((grams.b @ middle @ grams.a) * middle)))


def exact_norm(grams: Grams) -> float:
    """||B @ diag(c) @ A||, the exact sum's; 0 where its parts cancel to less than float64 can tell from nothing."""
    norm = float(np.sqrt(max(0.0, float(grams.c @ (grams.b * grams.a) @ grams.c))))
    return norm if norm > GRAM_FLOOR * size_of_parts(grams) else 0.0


def size_of_parts(grams: Grams) -> float:
    """Sum of the norms of the rank-one parts c_k b_k a_k: what rounding is relative to, also where they cancel."""
    return float(np.sum(np.abs(grams.c) * np.sqrt(grams.a.diagonal() * grams.b.diagonal())))


def left_of(norm: float, floor: float) -> float:
    """How far the true norm may be from a computed one whose square is known to `floor`²: `floor` near nothing, and
    floor² / norm where the norm is large, for |x² - y²| = |x - y| (x + y).
    """
    return floor * min(1.0, floor / norm) if norm > 0 else floor


def error_squared(grams: Grams, maps: Maps) -> float:
    """||B (b a - diag(c)) A||²: how far a method is from the exact sum before anything is rounded."""
    return squared_norm(grams, maps.b @ maps.a - np.diag(grams.c))


def block_products(grams: Grams) -> Array:
    """(parents, parents): <c_i B_i A_i, c_j B_j A_j> between the blocks."""
    weighted = grams.b * grams.a * np.outer(grams.c, grams.c)
    count = len(grams.blocks)
    products = np.empty((count, count))
    for i, first in enumerate(grams.blocks):
        for j, second in enumerate(grams.blocks):
            products[i, j] = np.sum(weighted[_of(first), _of(second)])
    return products


def overlaps(square: Array, blocks: Sequence[Block]) -> Array:
    """(n, n): how much of the smaller of two blocks' spaces lies in the other, 0..1: the mean squared cosine of their
    principal angles.

    Source: Björck & Golub 1973, https://doi.org/10.2307/2005662 (angles), from one Gram matrix.
    """
    roots = [inverse_root(square[_of(block), _of(block)]) for block in blocks]
    result = np.eye(len(blocks))
    for i, j in combinations(range(len(blocks)), 2):
        between = roots[i] @ square[_of(blocks[i]), _of(blocks[j])] @ roots[j].T
        result[i, j] = result[j, i] = min(1.0, float(np.sum(between**2)) / max(1, min(between.shape)))
    return result


def retained(grams: Grams) -> Array:
    """Share of each delta that lies in the row and column space of the last block: ||P_U D P_V|| / ||D||, 0..1."""
    last, shares = _of(grams.blocks[-1]), []
    root_a, root_b = inverse_root(grams.a[last, last]), inverse_root(grams.b[last, last])
    for block in grams.blocks[:-1]:
        rows = _of(block)
        seen_a, seen_b = root_a @ grams.a[last, rows], root_b @ grams.b[last, rows]
        whole = float(np.sum(grams.b[rows, rows] * grams.a[rows, rows]))
        kept = float(np.sum((seen_b.T @ seen_b) * (seen_a.T @ seen_a)))
        shares.append(min(1.0, math.sqrt(max(kept, 0.0) / whole)) if whole > 0 else 1.0)
    return np.array(shares)


def cholesky(unit: Array) -> Array | None:
    """L (n, n) with L Lᵀ = unit, whose diagonal is 1; None where it would be too inexact: use the eigenvectors."""
    try:
        lower = np.linalg.cholesky(unit).astype(np.float64, copy=False)
    except np.linalg.LinAlgError:
        return None
    return lower if lower.diagonal().min() >= MIN_PIVOT else None


def inverse_root(square: Array) -> Array:
    """W (k, n) with W square Wᵀ = I on the k directions that carry energy; Wᵀ W is the inverse of `square` there."""
    scale = np.sqrt(np.diag(square))
    inverse = np.divide(1.0, scale, out=np.zeros_like(scale), where=scale > 0)
    unit = square * np.outer(inverse, inverse)
    lower = cholesky(unit)
    if lower is not None:  # in a third of the time
        return np.linalg.inv(lower).astype(np.float64, copy=False) * inverse
    values, vectors = np.linalg.eigh(unit)
    kept = values > ENERGY_FLOOR * max(values[-1], 0.0)
    roots: Array = (vectors[:, kept] / np.sqrt(values[kept])).T * inverse
    return roots


def _of(block: Block) -> slice:
    return slice(block.start, block.stop)

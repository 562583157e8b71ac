"""Exact truncated SVD of a sum of low-rank deltas, found inside (R, R) matrices; the large factors are touched twice.

With A (R, d_in), B (d_out, R) and coefficients c, the sum is B diag(c) A. Its best rank-r approximation (Eckart & Young
1936, https://doi.org/10.1007/BF02288367) is found from the two Gram matrices: one Cholesky root of one of them, one
symmetric eigenproblem, and two small maps that are applied to the factors as they are. No QR of a tall matrix, no
triangular solve and no inverse occurs. Rows of very different size (1e12 apart) keep their accuracy, because the Grams
are first scaled to unit diagonal, within sqrt(R) of the best diagonal scaling (van der Sluis 1969,
https://doi.org/10.1007/BF02165096).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .grams import ENERGY_FLOOR, Array, Block, Grams, Maps, cholesky

#: A singular direction weaker than this share of the strongest is taken for rounding where a rule would strengthen it.
WEAKEST = 1e-6
#: Directions of several parents closer than this (squared sine) are one; the map that would part them divides by it.
SAME_DIRECTION = 1e-10


def truncate(grams: Grams, rank: int, middle: Array | None = None) -> Maps:
    """The `rank` largest singular directions of B diag(c) A, or of B middle A, shared evenly between the factors.

    Returns maps with a (rank, R) and b (R, rank); A' = a @ A has orthogonal rows of norm sqrt(sigma), B' = B @ b
    orthogonal columns of the same norm. Directions without energy come out as zeros. `spectrum` has all R values.
    """
    inverse_a, inverse_b, unit_a, unit_b, c = _equilibrate(grams)
    core = np.diag(c)
    if middle is not None:
        core = _norms(grams.b)[:, None] * middle * _norms(grams.a)
    x = core.T @ _root(unit_b)
    image = unit_a @ x
    energy, vectors = np.linalg.eigh(_symmetric(x.T @ image))
    energy, vectors = energy[::-1], vectors[:, ::-1]
    kept = vectors[:, :rank]
    strong = energy[:rank] > ENERGY_FLOOR * max(energy[0], 0.0)
    sigma = np.sqrt(np.where(strong, energy[:rank], 1.0))
    a = np.where(strong, sigma**-0.5, 0.0)[:, None] * (x @ kept).T * inverse_a
    b = (inverse_b[:, None] * core) @ (image @ kept) * np.where(strong, sigma**-1.5, 0.0)
    return Maps(a, b, np.sqrt(np.maximum(energy, 0.0)))


@dataclass(frozen=True, slots=True)
class Canonical:
    """Every parent's weighted delta as its own singular value decomposition, all parents side by side.

    Column k of B @ b is a left and row k of a @ A a right singular vector, of length one, with value `sigma[k]` (a
    negative weight turns the left vector). Rules that work on these do not depend on the gauge, for (A, B) and
    (G A, B G⁻¹) have the same decomposition. `grams` are those of the vectors, with `sigma` as coefficients; parents
    without a delta have no block in them.
    """

    a: Array
    b: Array
    grams: Grams

    @property
    def sigma(self) -> Array:
        return self.grams.c

    def cores(self, left: Array, right: Array) -> Array:
        """(parents, k, l): each parent's delta between orthonormal columns of B b left and rows of rightᵀ a A."""
        seen_left, seen_right = left.T @ self.grams.b, right.T @ self.grams.a
        places = (slice(block.start, block.stop) for block in self.grams.blocks)
        return np.array([(seen_left[:, rows] * self.sigma[rows]) @ seen_right[:, rows].T for rows in places])

    def product(self, rank: int, middle: Array) -> Maps:
        """The best rank-`rank` approximation of (B b) middle (a A), as maps of the stacked factors."""
        maps = Maps(np.zeros((rank, self.a.shape[1])), np.zeros((self.b.shape[0], rank)))
        if self.grams.rank == 0:
            return maps
        found = truncate(self.grams, min(rank, self.grams.rank), middle)
        maps.a[: found.a.shape[0]] = found.a @ self.a
        maps.b[:, : found.b.shape[1]] = self.b @ found.b
        return maps


def canonical(grams: Grams) -> Canonical:
    """Decompose each parent on its own; directions below `WEAKEST` of the parent's strongest one are left out."""
    rows_a, columns_b, values, blocks = [], [], [], []
    start = 0
    for block in grams.blocks:
        place = slice(block.start, block.stop)
        part = grams.of(block)
        own = truncate(part, part.rank)
        sigma = own.spectrum
        count = int(np.sum(sigma > WEAKEST * sigma[0]))
        if count == 0:
            continue
        scale = np.sqrt(sigma[:count])
        rows = np.zeros((count, grams.rank))
        columns = np.zeros((grams.rank, count))
        rows[:, place] = own.a[:count] / scale[:, None]
        columns[place] = own.b[:, :count] / scale
        rows_a.append(rows)
        columns_b.append(columns)
        values.append(sigma[:count])
        blocks.append(Block(block.parent, start, start + count))
        start += count
    a = np.concatenate([np.zeros((0, grams.rank)), *rows_a])
    b = np.concatenate([np.zeros((grams.rank, 0)), *columns_b], axis=1)
    c = np.concatenate([np.zeros(0), *values])
    return Canonical(a, b, Grams(a @ grams.a @ a.T, b.T @ grams.b @ b, c, tuple(blocks)))


def basis(gram: Array, sigma: Array) -> Array:
    """X with V X an orthonormal basis of the vectors V with Vᵀ V = gram, each at the root of its singular value."""
    root = np.sqrt(sigma)
    values, vectors = np.linalg.eigh(root[:, None] * gram * root)
    kept = values > SAME_DIRECTION * max(values[-1], 0.0)
    found: Array = root[:, None] * vectors[:, kept] / np.sqrt(values[kept])
    return found


def spectrum(grams: Grams) -> Array:
    """Singular values of B diag(c) A, (R,), largest first."""
    _, _, unit_a, unit_b, c = _equilibrate(grams)
    x = c[:, None] * _root(unit_b)
    energy = np.linalg.eigvalsh(_symmetric(x.T @ unit_a @ x))[::-1]
    values: Array = np.sqrt(np.maximum(energy, 0.0))
    return values


def _equilibrate(grams: Grams) -> tuple[Array, Array, Array, Array, Array]:
    """Inverse row norms of A and column norms of B, both Grams at unit diagonal, and c with the norms moved into it."""
    norm_a, norm_b = _norms(grams.a), _norms(grams.b)
    inverse_a = np.divide(1.0, norm_a, out=np.zeros_like(norm_a), where=norm_a > 0)
    inverse_b = np.divide(1.0, norm_b, out=np.zeros_like(norm_b), where=norm_b > 0)
    unit_a = inverse_a[:, None] * grams.a * inverse_a
    unit_b = inverse_b[:, None] * grams.b * inverse_b
    return inverse_a, inverse_b, unit_a, unit_b, grams.c * norm_a * norm_b


def _norms(square: Array) -> Array:
    """Lengths of the vectors of a Gram matrix; 0 for one that is mere rounding, whose square may come out below 0."""
    lengths: Array = np.sqrt(np.maximum(square.diagonal(), 0.0))
    return lengths


def _root(unit: Array) -> Array:
    """L with L Lᵀ = unit."""
    lower = cholesky(unit)
    if lower is not None:
        return lower
    values, vectors = np.linalg.eigh(unit)
    root: Array = vectors * np.sqrt(np.maximum(values, 0.0))
    return root


def _symmetric(square: Array) -> Array:
    return (square + square.T) / 2

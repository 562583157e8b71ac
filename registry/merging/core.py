"""Exact truncated SVD of a sum of low-rank deltas, found inside (R, R) matrices; the large factors are touched twice.

With A (R, d_in), B (d_out, R) and coefficients c, the sum is B diag(c) A. Its best rank-r approximation (Eckart & Young
1936, https://doi.org/10.1007/BF02288367) is found from the two Gram matrices: one Cholesky root of one of them, one
symmetric eigenproblem, and two small maps that are applied to the factors as they are. No QR of a tall matrix, no
triangular solve and no inverse occurs. Rows of very different size (1e12 apart) keep their accuracy, because the Grams
are first scaled to unit diagonal, within sqrt(R) of the best diagonal scaling (van der Sluis 1969,
https://doi.org/10.1007/BF02165096).
"""

from __future__ import annotations

import numpy as np

from .grams import ENERGY_FLOOR, Array, Grams, Maps

#: Below this smallest pivot the Cholesky root has lost half of float64; the eigenvector root has not.
MIN_PIVOT = 1e-5


def truncate(grams: Grams, rank: int) -> Maps:
    """The `rank` largest singular directions of B diag(c) A, shared evenly between the factors.

    Returns maps with a (rank, R) and b (R, rank); A' = a @ A has orthogonal rows of norm sqrt(sigma), B' = B @ b
    orthogonal columns of the same norm. Directions without energy come out as zeros. `spectrum` has all R values.
    """
    inverse_a, inverse_b, unit_a, unit_b, c = _equilibrate(grams)
    x = c[:, None] * _root(unit_b)
    image = unit_a @ x
    energy, vectors = np.linalg.eigh(_symmetric(x.T @ image))
    energy, vectors = energy[::-1], vectors[:, ::-1]
    kept = vectors[:, :rank]
    strong = energy[:rank] > ENERGY_FLOOR * max(energy[0], 0.0)
    sigma = np.sqrt(np.where(strong, energy[:rank], 1.0))
    a = np.where(strong, sigma**-0.5, 0.0)[:, None] * (x @ kept).T * inverse_a
    b = (c * inverse_b)[:, None] * (image @ kept) * np.where(strong, sigma**-1.5, 0.0)
    return Maps(a, b, np.sqrt(np.maximum(energy, 0.0)))


def spectrum(grams: Grams) -> Array:
    """Singular values of B diag(c) A, (R,), largest first."""
    _, _, unit_a, unit_b, c = _equilibrate(grams)
    x = c[:, None] * _root(unit_b)
    energy = np.linalg.eigvalsh(_symmetric(x.T @ unit_a @ x))[::-1]
    values: Array = np.sqrt(np.maximum(energy, 0.0))
    return values


def _equilibrate(grams: Grams) -> tuple[Array, Array, Array, Array, Array]:
    """Inverse row norms of A and column norms of B, both Grams at unit diagonal, and c with the norms moved into it."""
    norm_a, norm_b = np.sqrt(np.diag(grams.a)), np.sqrt(np.diag(grams.b))
    inverse_a = np.divide(1.0, norm_a, out=np.zeros_like(norm_a), where=norm_a > 0)
    inverse_b = np.divide(1.0, norm_b, out=np.zeros_like(norm_b), where=norm_b > 0)
    unit_a = inverse_a[:, None] * grams.a * inverse_a
    unit_b = inverse_b[:, None] * grams.b * inverse_b
    return inverse_a, inverse_b, unit_a, unit_b, grams.c * norm_a * norm_b


def _root(unit: Array) -> Array:
    """L with L Lᵀ = unit."""
    try:
        lower = np.linalg.cholesky(unit)
    except np.linalg.LinAlgError:
        return _eigen_root(unit)
    if float(np.min(np.diag(lower))) < MIN_PIVOT:
        return _eigen_root(unit)
    root: Array = lower.astype(np.float64, copy=False)
    return root


def _eigen_root(unit: Array) -> Array:
    values, vectors = np.linalg.eigh(unit)
    root: Array = vectors * np.sqrt(np.maximum(values, 0.0))
    return root


def _symmetric(square: Array) -> Array:
    return (square + square.T) / 2

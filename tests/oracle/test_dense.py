"""Methods that work on R x R matrices, against the formulas of their papers on dense float64 deltas.

The references share no code with the methods: each forms the d x d deltas and uses numpy's SVD and inverse.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import combinations

import numpy as np
import pytest

from adapterctl.registry.merging.grams import Block, Grams
from adapterctl.registry.merging.method import find_method

Delta = np.ndarray
TOLERANCE = 1e-6
CASES = 150


def best(delta: Delta, rank: int) -> Delta:
    u, sigma, vt = np.linalg.svd(delta, full_matrices=False)
    return (u[:, :rank] * sigma[:rank]) @ vt[:rank]


def slerp(deltas: Sequence[Delta], rank: int) -> Delta:
    first, second = (delta.ravel() for delta in deltas)
    angle = math.acos(float(first @ second / np.linalg.norm(first) / np.linalg.norm(second)))
    mixed = (math.sin(0.5 * angle) * first + math.sin(0.5 * angle) * second) / math.sin(angle)
    return best(mixed.reshape(deltas[0].shape), rank)


def model_stock(deltas: Sequence[Delta], rank: int) -> Delta:
    flat = [delta.ravel() / np.linalg.norm(delta) for delta in deltas]
    cosine = max(0.0, float(np.mean([one @ other for one, other in combinations(flat, 2)])))
    ratio = len(deltas) * cosine / (1 + (len(deltas) - 1) * cosine)
    return best(ratio * sum(deltas) / len(deltas), rank)


def iso_c(deltas: Sequence[Delta], rank: int) -> Delta:
    u, sigma, vt = np.linalg.svd(sum(deltas), full_matrices=False)
    kept = int(np.sum(sigma[:rank] > 1e-9 * sigma[0]))
    return sigma[:kept].mean() * u[:, :kept] @ vt[:kept]


def tsv(deltas: Sequence[Delta], rank: int) -> Delta:
    parts = [np.linalg.svd(delta, full_matrices=False) for delta in deltas]
    counts = [int(np.sum(sigma > 1e-9 * sigma[0])) for _, sigma, _ in parts]
    u = np.concatenate([u[:, :n] for (u, _, _), n in zip(parts, counts, strict=True)], axis=1)
    vt = np.concatenate([vt[:n] for (_, _, vt), n in zip(parts, counts, strict=True)])
    sigma = np.concatenate([sigma[:n] for (_, sigma, _), n in zip(parts, counts, strict=True)])
    return best((nearest_orthogonal(u) * sigma) @ nearest_orthogonal(vt), rank)


def nearest_orthogonal(matrix: np.ndarray) -> np.ndarray:
    p, sigma, qt = np.linalg.svd(matrix, full_matrices=False)
    kept = sigma > 1e-7 * sigma[0]
    return p[:, kept] @ qt[kept]


def wudi_ridge(deltas: Sequence[Delta], rank: int) -> Delta:
    squares = [delta.T @ delta / np.sum(delta**2) for delta in deltas]
    system = sum(squares)
    ridge = 1e-2 * np.linalg.eigvalsh(system)[-1] * np.eye(len(system))
    wanted = sum(delta @ square for delta, square in zip(deltas, squares, strict=True))
    return best(wanted @ np.linalg.inv(system + ridge), rank)


REFERENCES: dict[str, Callable[[Sequence[Delta], int], Delta]] = {
    reference.__name__: reference for reference in (slerp, model_stock, iso_c, tsv, wudi_ridge)
}


@pytest.mark.parametrize("name", list(REFERENCES))
def test_the_small_matrices_give_what_the_dense_formula_gives(name: str):
    method, random = find_method(name), np.random.default_rng(0)
    for case in range(CASES):
        parents = int(random.integers(2, (method.max_parents or 4) + 1))
        d_out, d_in = (int(d) for d in random.integers(5, 40, size=2))
        ranks = [int(r) for r in random.integers(1, 6, size=parents)]
        a = random.normal(size=(sum(ranks), d_in)) + random.uniform(0, 1) * random.normal(size=d_in)
        b = random.normal(size=(d_out, sum(ranks))) + random.uniform(0, 1) * random.normal(size=(d_out, 1))
        weights = random.choice((0.3, 1.0, 2.0, -0.5), size=parents)
        edges = np.cumsum([0, *ranks])
        blocks = tuple(Block(i, int(edges[i]), int(edges[i + 1])) for i in range(parents))
        c = np.repeat(weights, ranks)
        deltas = [(b * c)[:, x.start : x.stop] @ a[x.start : x.stop] for x in blocks]
        rank = int(random.integers(1, sum(ranks) + 1))

        maps = method.function(Grams(a @ a.T, b.T @ b, c, blocks), rank=rank)

        made = (b @ maps.b) @ (maps.a @ a)
        expected = REFERENCES[name](deltas, rank)
        size = max(float(np.linalg.norm(expected)), 1e-3 * sum(float(np.linalg.norm(delta)) for delta in deltas))
        assert np.linalg.norm(made - expected) <= TOLERANCE * size, f"case {case}"

"""Methods that work on R x R matrices, against the formulas of their papers on dense float64 deltas.

The references share no code with the methods: each forms the d x d deltas and uses numpy's SVD and inverse.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pytest

from adapterctl.registry.merging.deltas import Deltas
from adapterctl.registry.merging.grams import Block, Grams
from adapterctl.registry.merging.method import find_method
from adapterctl.registry.merging.stack import Stack

Delta = np.ndarray
TOLERANCE = 1e-6
CASES = 200


def best(delta: Delta, rank: int) -> Delta:
    u, sigma, vt = np.linalg.svd(delta, full_matrices=False)
    return (u[:, :rank] * sigma[:rank]) @ vt[:rank]


def slerp(deltas: Sequence[Delta], rank: int) -> Delta:
    first, second = (delta.ravel() for delta in deltas)
    angle = math.acos(float(first @ second / np.linalg.norm(first) / np.linalg.norm(second)))
    mixed = (math.sin(0.5 * angle) * first + math.sin(0.5 * angle) * second) / math.sin(angle)
    return best(mixed.reshape(deltas[0].shape), rank)


def karcher(deltas: Sequence[Delta], rank: int) -> Delta:
    """Half steps along the mean of the arcs, on vectors as long as the deltas, from the first of them."""
    units = [delta.ravel() / np.linalg.norm(delta) for delta in deltas]
    mean, length = units[0], 1.0
    while length > 1e-14:
        arcs = [arc(mean, unit) for unit in units]
        step = sum(arcs) / (2 * len(units))
        length = float(np.linalg.norm(step))
        mean = math.cos(length) * mean + np.sinc(length / math.pi) * step
        mean /= np.linalg.norm(mean)
    shares = [angle / math.sin(angle) for angle in (math.acos(float(mean @ unit)) for unit in units)]
    size = np.linalg.norm(sum(share * unit for share, unit in zip(shares, units, strict=True)))
    return best(sum(share / size * delta for share, delta in zip(shares, deltas, strict=True)), rank)


def arc(start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """The tangent at `start` that leads to `end`, as long as the angle between them."""
    across = end - (start @ end) * start
    length = float(np.linalg.norm(across))
    return math.atan2(length, float(start @ end)) / length * across if length else across


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


def ties(values: Sequence[np.ndarray], count: int) -> np.ndarray:
    """The `count` largest elements of each, of these the ones of the elected sign, their mean: element by element."""
    merged = np.zeros(values[0].size)
    trimmed = [trim(one, count) for one in values]
    for place in range(merged.size):
        column = [one[place] for one in trimmed]
        sign = 1 if sum(column) >= 0 else -1
        agreeing = [value for value in column if value * sign > 0]
        merged[place] = sum(agreeing) / len(agreeing) if agreeing else 0
    return merged.reshape(values[0].shape)


def trim(values: np.ndarray, count: int) -> np.ndarray:
    """The `count` largest of all elements, flat."""
    flat = values.ravel().copy()
    flat[np.argsort(np.abs(flat))[: flat.size - count]] = 0
    return flat


def core_ties(deltas: Sequence[Delta], rank: int) -> Delta:
    parts = [np.linalg.svd(delta, full_matrices=False) for delta in deltas]
    u, _, _ = thin(np.concatenate([u * np.sqrt(sigma) for u, sigma, _ in parts], axis=1))
    _, _, vt = thin(np.concatenate([np.sqrt(sigma)[:, None] * vt for _, sigma, vt in parts]))
    cores = [u.T @ delta @ vt.T for delta in deltas]
    return best(u @ ties(cores, math.ceil(cores[0].size / 2)) @ vt, rank)


def knots_ties(deltas: Sequence[Delta], rank: int) -> Delta:
    u, sigma, vt = thin(np.concatenate(deltas, axis=1))
    parts = np.split(vt, len(deltas), axis=1)
    return best((u * sigma) @ ties(parts, parts[0].size // 2), rank)


def ctm(deltas: Sequence[Delta], rank: int, beta: float = 0.25, density: float = 0.5, rule: str = "ties") -> Delta:
    sizes = [float(np.linalg.norm(delta)) for delta in deltas]
    scaled = [
        (beta * size + (1 - beta) * np.mean(sizes)) / size * delta for size, delta in zip(sizes, deltas, strict=True)
    ]
    total, errors = sum(float(np.sum(x**2)) for x in scaled), [math.inf, 2.0]
    v = thin(np.concatenate(scaled))[2][:rank].T
    while len(errors) < 102 and errors[-2] - errors[-1] >= 1e-6:
        u = thin(np.concatenate([x @ v for x in scaled], axis=1))[0][:, :rank]
        v = thin(np.concatenate([x.T @ u for x in scaled], axis=1))[0][:, :rank]
        errors.append(math.sqrt(max(0.0, 1 - sum(float(np.sum((u.T @ x @ v) ** 2)) for x in scaled) / total)))
    cores = [u.T @ delta @ v for delta in deltas]
    merged = sum(cores) if rule == "sum" else ties(cores, math.ceil(density * cores[0].size))
    return u @ merged @ v.T


def thin(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    u, sigma, vt = np.linalg.svd(matrix, full_matrices=False)
    kept = sigma > 1e-5 * sigma[0]
    return u[:, kept], sigma[kept], vt[kept]


REFERENCES: dict[str, Callable[[Sequence[Delta], int], Delta]] = {
    reference.__name__: reference
    for reference in (slerp, karcher, model_stock, iso_c, tsv, wudi_ridge, core_ties, ctm, knots_ties)
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

        if method.form == "grams":
            maps = method.function(Grams(a @ a.T, b.T @ b, c, blocks), rank=rank)
            made_a, made_b = maps.a @ a, b @ maps.b
        else:
            names = tuple(map(str, range(parents)))
            made_a, made_b = method.function(
                Deltas(Stack(a, b, c, blocks), np.ones(parents), weights, names), rank=rank
            )

        made = made_b @ made_a
        expected = REFERENCES[name](deltas, rank)
        size = max(float(np.linalg.norm(expected)), 1e-3 * sum(float(np.linalg.norm(delta)) for delta in deltas))
        assert np.linalg.norm(made - expected) <= TOLERANCE * size, f"case {case}"


@pytest.mark.parametrize("options", [{"beta": 0.0, "density": 0.25}, {"beta": 1.0, "rule": "sum"}, {"rule": "sum"}])
def test_ctm_is_its_formula_with_every_option(options: dict[str, Any]):
    random = np.random.default_rng(3)
    for case in range(CASES // 4):
        a, b = random.normal(size=(9, 17)), random.normal(size=(21, 9))
        c = np.repeat(random.choice((0.1, 1.0, -3.0), size=3), 3)
        blocks = tuple(Block(i, 3 * i, 3 * i + 3) for i in range(3))
        deltas = [(b * c)[:, x.start : x.stop] @ a[x.start : x.stop] for x in blocks]

        maps = find_method("ctm").function(Grams(a @ a.T, b.T @ b, c, blocks), rank=4, **options)

        expected = ctm(deltas, 4, **options)
        assert b @ maps.b @ maps.a @ a == pytest.approx(expected, abs=TOLERANCE * np.linalg.norm(expected)), f"{case}"


def test_ties_of_mergekit_is_its_formula_element_by_element():
    random = np.random.default_rng(1)
    for case in range(CASES):
        a, b = random.normal(size=(6, 11)), random.normal(size=(9, 6))
        blocks, weights = tuple(Block(i, 2 * i, 2 * i + 2) for i in range(3)), random.choice((0.3, 1.0, -0.5), size=3)
        deltas = [b[:, x.start : x.stop] @ a[x.start : x.stop] for x in blocks]
        trimmed = np.array([trim(delta, delta.size // 2) for delta in deltas])
        expected = np.zeros(trimmed.shape[1])
        for place, column in enumerate((trimmed * weights[:, None]).T):
            sign = 1 if sum(column) >= 0 else -1
            agreeing = [i for i in range(3) if column[i] * sign > 0]
            total = sum(weights[i] for i in agreeing)
            expected[place] = sum(column[i] for i in agreeing) / (total if abs(total) >= 1e-8 else 1)

        stack = Stack(a, b, np.repeat(weights, 2), blocks)
        made_a, made_b = find_method("ties_mergekit").function(
            Deltas(stack, np.ones(3), weights, ("0", "1", "2")), rank=9
        )

        assert made_b @ made_a == pytest.approx(expected.reshape(9, 11), abs=1e-9), f"case {case}"


def test_della_is_its_formula_element_by_element():
    random = np.random.default_rng(2)
    for case in range(CASES):
        parents, d_out, d_in = (int(n) for n in random.integers((1, 2, 2), (4, 9, 12)))
        a, b = random.normal(size=(2 * parents, d_in)), random.normal(size=(d_out, 2 * parents))
        blocks = tuple(Block(i, 2 * i, 2 * i + 2) for i in range(parents))
        weights, scaling = random.choice((0.3, 1.0, -0.5), size=parents), random.uniform(0.5, 2, size=parents)
        density, epsilon, scale = random.choice(((0.5, 0.14, 1.0), (0.3, 0.6, 1.1), (0.9, 0.2, 0.4), (1.0, 0.0, 1.0)))
        deltas = [s * b[:, x.start : x.stop] @ a[x.start : x.stop] for s, x in zip(scaling, blocks, strict=True)]
        left = [magprune(delta, 1 - density, epsilon, f"7/{i}/m/BA") for i, delta in enumerate(deltas)]
        expected = np.zeros((d_out, d_in))
        for place in np.ndindex(d_out, d_in):
            column = [weight * one[place] for weight, one in zip(weights, left, strict=True)]
            agreeing = [value for value in column if value * sum(column) > 0]
            expected[place] = scale * sum(agreeing) / len(agreeing) if agreeing else 0

        stack = Stack(a, b, np.repeat(weights * scaling, 2), blocks)
        made_a, made_b = find_method("della").function(
            Deltas(stack, scaling, weights, tuple(f"{i}/m" for i in range(parents))),
            rank=d_out,
            seed=7,
            density=density,
            epsilon=epsilon,
            scale=scale,
        )

        assert made_b @ made_a == pytest.approx(expected, abs=1e-9), f"case {case}"


def magprune(delta: Delta, p: float, epsilon: float, stream: str) -> Delta:
    """Drop each element by a Bernoulli draw at p - ε/2 + r ε/n, r of the n in its row being larger, else rescale it."""
    key = int.from_bytes(hashlib.sha256(stream.encode()).digest()[:16], "little")
    raw = [int(word) for word in np.random.Philox(key=key).random_raw(delta.size)]
    left = np.zeros(delta.shape)
    for number, (i, j) in enumerate(np.ndindex(*delta.shape)):
        larger = sum(abs(other) > abs(delta[i, j]) for other in delta[i])
        drop = p - epsilon / 2 + epsilon / delta.shape[1] * larger
        draw = (raw[number // 2] >> 32 * (number % 2)) % 2**32 / 2**32
        left[i, j] = delta[i, j] / (1 - drop) if draw < 1 - drop else 0
    return left

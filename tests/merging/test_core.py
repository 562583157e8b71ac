"""The small matrices against dense float64 linear algebra, in the cases that break careless code."""

from __future__ import annotations

import numpy as np
import pytest

from adapterctl.registry.merging.core import spectrum, truncate
from adapterctl.registry.merging.grams import (
    Block,
    Grams,
    block_products,
    error_squared,
    exact_norm,
    gram,
    overlaps,
    retained,
)

R, D_OUT, D_IN = 12, 40, 60
BLOCKS = (Block(0, 0, 5), Block(1, 5, 12))


def _usual(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    return random.normal(size=(R, D_IN)), random.normal(size=(D_OUT, R))


def _graded(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    a, b = _usual(random)
    grades = np.geomspace(1, 1e12, R)
    return a * grades[:, None], b / grades


def _nearly_alike(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    a, b = _usual(random)
    a[5:10] = a[:5] + 1e-6 * random.normal(size=(5, D_IN))
    return a, b


def _twice(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    a, b = _usual(random)
    a[5:10], b[:, 5:10] = a[:5], b[:, :5]
    return a, b


def _shared_a(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    a, b = _usual(random)
    a[6:] = a[:6]
    return a, b


def _some_zero(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    a, b = _usual(random)
    a[3], b[:, 7] = 0, 0
    return a, b


CASES = {
    "usual": _usual,
    "rows from 1 to 1e12": _graded,
    "parents alike to 1e-6": _nearly_alike,
    "one parent twice": _twice,
    "one A for both": _shared_a,
    "rows of zeros": _some_zero,
}


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> tuple[np.ndarray, np.ndarray, Grams]:
    random = np.random.default_rng(3)
    a, b = CASES[request.param](random)
    c = random.uniform(-2, 2, R)
    return a, b, Grams(gram(a), gram(b.T), c, BLOCKS)


def test_truncation_is_the_best_of_its_rank(case: tuple[np.ndarray, np.ndarray, Grams]):
    a, b, grams = case
    u, sigma, vt = np.linalg.svd((b * grams.c) @ a, full_matrices=False)

    for rank in (1, 4, 9, R):
        maps = truncate(grams, rank)

        best = (u[:, :rank] * sigma[:rank]) @ vt[:rank]
        assert np.linalg.norm((b @ maps.b) @ (maps.a @ a) - best) <= 2e-7 * np.linalg.norm(sigma)


def test_truncation_shares_the_singular_values_evenly(case: tuple[np.ndarray, np.ndarray, Grams]):
    a, b, grams = case

    maps = truncate(grams, 4)

    rows, columns = maps.a @ a, b @ maps.b
    assert np.linalg.norm(rows, axis=1) == pytest.approx(np.linalg.norm(columns, axis=0), rel=1e-6)
    assert rows @ rows.T == pytest.approx(np.diag(np.diag(rows @ rows.T)), abs=1e-6 * np.linalg.norm(rows) ** 2)


def test_spectrum_and_predicted_error_are_those_of_the_dense_matrix(case: tuple[np.ndarray, np.ndarray, Grams]):
    a, b, grams = case
    sigma = np.linalg.svd((b * grams.c) @ a, compute_uv=False)[:R]
    size = float(np.linalg.norm(sigma))

    assert spectrum(grams) == pytest.approx(sigma, abs=2e-7 * size)
    assert exact_norm(grams) == pytest.approx(size)
    assert np.sqrt(error_squared(grams, truncate(grams, 4))) == pytest.approx(
        np.linalg.norm(sigma[4:]), abs=2e-7 * size
    )


def test_nothing_gives_nothing():
    zero = Grams(np.zeros((R, R)), np.zeros((R, R)), np.ones(R), BLOCKS)

    maps = truncate(zero, 3)

    assert not maps.a.any()
    assert not maps.b.any()


def test_products_of_parents_are_those_of_their_deltas():
    random = np.random.default_rng(5)
    a, b = _usual(random)
    c = random.uniform(-2, 2, R)
    deltas = [(b[:, s] * c[s]) @ a[s] for s in (slice(0, 5), slice(5, 12))]

    products = block_products(Grams(gram(a), gram(b.T), c, BLOCKS))

    assert products == pytest.approx(np.array([[np.sum(x * y) for y in deltas] for x in deltas]))


def test_overlap_is_one_for_one_space_and_zero_for_orthogonal_ones():
    identity = np.eye(R)
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(5, 5)))[0]
    same = np.vstack([identity[:5], turn @ identity[:5]])
    apart = np.vstack([identity[:5], identity[5:10]])

    blocks = Block(0, 0, 5), Block(1, 5, 10)
    assert overlaps(gram(same), blocks) == pytest.approx(np.ones((2, 2)))
    assert overlaps(gram(apart), blocks) == pytest.approx(np.eye(2))


def test_overlap_is_that_of_orthonormal_bases(case: tuple[np.ndarray, np.ndarray, Grams]):
    a, b, grams = case

    for square, rows in ((grams.a, a), (grams.b, b.T)):
        bases = []
        for block in BLOCKS:
            part = rows[block.start : block.stop]
            sizes = np.linalg.norm(part, axis=1, keepdims=True)
            _, sigma, vt = np.linalg.svd(part / np.where(sizes > 0, sizes, 1), full_matrices=False)
            bases.append(vt[sigma > 1e-9])
        shared = np.sum((bases[0] @ bases[1].T) ** 2) / min(len(bases[0]), len(bases[1]))
        assert overlaps(square, BLOCKS)[0, 1] == pytest.approx(shared, abs=1e-7)


def test_a_delta_is_retained_as_far_as_the_spaces_of_the_child_hold_it():
    random = np.random.default_rng(2)
    a, b = random.normal(size=(5, D_IN)), random.normal(size=(D_OUT, 5))
    child_a, child_b = random.normal(size=(3, D_IN)), np.hstack([b[:, :2], random.normal(size=(D_OUT, 1))])
    grams = Grams(
        gram(np.vstack([a, child_a])), gram(np.hstack([b, child_b]).T), np.ones(8), (Block(0, 0, 5), Block(1, 5, 8))
    )

    q_row, q_column = np.linalg.qr(child_a.T)[0], np.linalg.qr(child_b)[0]
    dense = np.linalg.norm(q_column @ q_column.T @ (b @ a) @ q_row @ q_row.T) / np.linalg.norm(b @ a)
    assert retained(grams) == pytest.approx([dense])


def test_a_vector_that_is_mere_rounding_counts_as_nothing():
    """Far below the others a singular vector of a parent may come out with a squared length below 0."""
    grams = Grams(np.eye(2), np.diag([4.0, -1e-9]), np.ones(2), (Block(0, 0, 1), Block(1, 1, 2)))

    assert truncate(grams, 2).spectrum == pytest.approx([2, 0])
    assert truncate(grams, 2, np.eye(2)).spectrum == pytest.approx([2, 0])

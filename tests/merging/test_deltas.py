"""Deltas in bands: exact thresholds, masks that are independent of the bands, and an iteration held against LAPACK."""

from __future__ import annotations

import math

import numpy as np
import pytest

from adapterctl.registry.merging import deltas as module
from adapterctl.registry.merging.deltas import Deltas, Prune, keep_by_chance, keep_by_rank, keep_largest
from adapterctl.registry.merging.elements import Rule, add, elect
from adapterctl.registry.merging.grams import Block
from adapterctl.registry.merging.stack import Stack

RANK = 6
#: Above `SMALL`, so that the iteration works, and of several bands.
D_OUT, D_IN = 560, 620


@pytest.fixture(autouse=True)
def several_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of these 6 bands 4 are multiplied together and then 2, as the bands of a large matrix are."""
    monkeypatch.setattr(module, "TOGETHER", 4)


@pytest.fixture(scope="module")
def made() -> Deltas:
    random = np.random.default_rng(0)
    a = random.normal(size=(2 * RANK, D_IN)).astype(np.float32)
    b = (random.normal(size=(D_OUT, 2 * RANK)) * np.tile(np.arange(1, RANK + 1) ** -0.7, 2)).astype(np.float32)
    stack = Stack(a, b, np.repeat([1.4, 0.3], RANK), (Block(0, 0, RANK), Block(1, RANK, 2 * RANK)))
    return Deltas(stack, np.array([2.0, 1.0]), np.array([0.7, 0.3]), ("0/m", "1/m"))


def dense(deltas: Deltas, place: int) -> np.ndarray:
    columns = slice(place * RANK, (place + 1) * RANK)
    return deltas.scaling[place] * (deltas.stack.b[:, columns].astype(np.float64) @ deltas.stack.a[columns])


@pytest.mark.parametrize("density", [0.001, 0.2, 0.9, 1.0])
def test_the_largest_elements_are_kept_and_no_others(made: Deltas, density: float):
    count = int(density * D_OUT * D_IN)
    rows = made.rows(0, slice(0, D_OUT))

    kept = keep_largest(density)(made, 0)(rows, 0) != 0

    assert np.count_nonzero(kept) == count
    assert np.abs(rows[kept]).min() > (np.abs(rows[~kept]).max() if count < rows.size else 0)


def test_a_sample_that_misleads_costs_time_only(made: Deltas, monkeypatch: pytest.MonkeyPatch):
    rows = made.rows(1, slice(0, D_OUT))
    expected = keep_largest(0.3)(made, 1)(rows, 0)
    monkeypatch.setattr(module, "_bracket", lambda deltas, place, count: (0.0, 1e-9))

    assert np.array_equal(keep_largest(0.3)(made, 1)(rows, 0), expected)


@pytest.mark.parametrize("prune", [keep_by_chance(0.4, 7), keep_by_rank(0.4, 0.6, 7)], ids=["chance", "rank"])
def test_no_band_changes_what_is_drawn(made: Deltas, prune: Prune):
    rows, keep = made.rows(0, slice(0, 16)), prune(made, 0)

    halves = np.concatenate([keep(rows[:8], 0), keep(rows[8:], 8 * D_IN)])

    assert np.array_equal(keep(rows, 0), halves)
    assert np.mean(halves != 0) == pytest.approx(0.4, abs=5 * math.sqrt(0.24 / rows.size))


def test_what_is_kept_by_chance_is_divided_by_the_chance(made: Deltas):
    rows = made.rows(0, slice(0, 16))

    kept = keep_by_chance(0.4, 7)(made, 0)(rows, 0)

    assert kept[kept != 0] == pytest.approx(rows[kept != 0] / 0.4)


def test_the_larger_an_element_of_its_row_the_likelier_it_stays_and_the_mean_is_left_as_it_is(made: Deltas):
    rows = made.rows(0, slice(0, 16))
    order, draws = np.argsort(-np.abs(rows), axis=1), 400

    kept = [keep_by_rank(0.4, 0.6, seed)(made, 0)(rows, 0) for seed in range(draws)]

    by_rank = np.take_along_axis(np.mean([one != 0 for one in kept], axis=0), order, axis=1).mean(axis=0)
    chances = 0.7 - 0.6 * np.arange(D_IN) / D_IN
    assert by_rank == pytest.approx(chances, abs=5 * math.sqrt(0.25 / (draws * len(rows))))
    expected = np.take_along_axis(rows, order, axis=1)
    noise = np.abs(expected) * np.sqrt((1 / chances - 1) / draws)
    assert (np.abs(np.take_along_axis(np.mean(kept, axis=0), order, axis=1) - expected) <= 6 * noise).all()


@pytest.mark.parametrize(
    ("prune", "rule"),
    [
        (keep_largest(0.3), elect("total")),
        (keep_by_chance(0.05, 1), add),
        (keep_by_chance(0.5, 2), elect("frequency")),
        (keep_by_rank(0.5, 0.14, 3), elect("total")),
        (keep_largest(1.0), add),
    ],
    ids=["ties, a flat tail", "dare, noise above all else", "dare with elected signs", "della", "the sum, of low rank"],
)
def test_the_iteration_loses_what_lapack_loses(made: Deltas, prune: Prune, rule: Rule):
    """The bound of `Merged.factors`."""
    matrix = rule(np.stack([prune(made, i)(made.rows(i, slice(0, D_OUT)), 0) for i in (0, 1)]), made.weights)
    sigma = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)

    a, b = made.merged(prune, rule).factors(RANK)

    error, least = np.linalg.norm(matrix - b @ a), np.linalg.norm(sigma[RANK:])
    assert least * (1 - 1e-6) <= error <= least * (1 + 1e-4) + 1e-5 * np.linalg.norm(sigma)


@pytest.mark.parametrize(("columns", "rows"), [(256, 1024), (5_000, 32), (8_192, 32), (8_193, 24), (131_072, 8)])
def test_bands_together_are_bounded_however_long_a_row_is(monkeypatch: pytest.MonkeyPatch, columns: int, rows: int):
    monkeypatch.setattr(module, "KEPT_BYTES", 0)
    stack = Stack(np.zeros((1, columns), np.float32), np.zeros((1_100, 1), np.float32), np.ones(1), (Block(0, 0, 1),))
    deltas = Deltas(stack, np.ones(1), np.ones(1), ("0/m",))

    _, first = next(deltas.merged(keep_largest(1.0), add)._parts())

    assert first.shape == (rows, columns)


def test_a_matrix_that_is_made_again_for_each_step_gives_the_same_bits(made: Deltas, monkeypatch: pytest.MonkeyPatch):
    kept = made.merged(keep_largest(0.3), elect("total")).factors(RANK)
    monkeypatch.setattr(module, "KEPT_BYTES", 0)

    again = made.merged(keep_largest(0.3), elect("total")).factors(RANK)

    assert all(np.array_equal(one, other) for one, other in zip(kept, again, strict=True))

"""How far apart two adapters are, against dense float64 deltas."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import LINEAR, write_tiny_adapter
from tiny_merge import WEIGHTS, deltas, distance, facts_of, write_factors

from adapterctl.registry.domain.errors import IncompatibleParents
from adapterctl.registry.merging.distance import ModuleDistance, distances, in_all
from adapterctl.registry.merging.grams import GRAM_FLOOR

MIXED = {
    "linear": LINEAR,
    "embedding": {"model.embed_tokens": (24, 16)},
    "conv": {"model.conv": (8, 4, 3, 3)},
}


def compared(one: Path, other: Path) -> list[ModuleDistance]:
    return list(distances(facts_of(one), one / WEIGHTS, facts_of(other), other / WEIGHTS))


def shared_directions(first: np.ndarray, second: np.ndarray) -> float:
    """Mean squared cosine of the principal angles between two column spaces."""
    bases = []
    for delta in (first, second):
        u, sigma, _ = np.linalg.svd(delta, full_matrices=False)
        bases.append(u[:, sigma > 1e-6 * sigma[0]])
    cosines = np.linalg.svd(bases[0].T @ bases[1], compute_uv=False)
    return float(np.mean(cosines**2))


def test_every_module_is_what_its_dense_deltas_say(tmp_path: Path):
    one = write_tiny_adapter(tmp_path / "p0", seed=0, rank=4, alpha=3, dtype="BF16", **MIXED)
    other = write_tiny_adapter(tmp_path / "p1", seed=1, rank=2, ranks={"model.conv": 6}, **MIXED)
    first, second = deltas(one), deltas(other)

    found = compared(one, other)

    assert [each.module for each in found] == sorted(first)
    for each in found:
        a, b = first[each.module], second[each.module]
        sizes = np.linalg.norm(a), np.linalg.norm(b)
        assert each.shared
        assert each.norms == pytest.approx(sizes, rel=1e-12)
        assert each.distance == pytest.approx(np.linalg.norm(a - b) / sizes[0], rel=1e-12)
        assert each.cosine == pytest.approx(np.sum(a * b) / sizes[0] / sizes[1], abs=1e-12)
        assert each.column_overlap == pytest.approx(shared_directions(a, b), rel=1e-9)
        assert each.row_overlap == pytest.approx(shared_directions(a.T, b.T), rel=1e-9)


def test_cosine_and_relative_distance_in_all(tmp_path: Path):
    one, other = write_tiny_adapter(tmp_path / "p0", seed=0), write_tiny_adapter(tmp_path / "p1", seed=1)
    first, second = deltas(one), deltas(other)

    cosine, apart = in_all(compared(one, other))

    flat = [np.concatenate([side[name].ravel() for name in sorted(side)]) for side in (first, second)]
    assert cosine == pytest.approx(float(flat[0] @ flat[1] / np.linalg.norm(flat[0]) / np.linalg.norm(flat[1])))
    assert apart == pytest.approx(distance(second, first))


def test_one_delta_written_with_other_factors_is_at_no_distance(tmp_path: Path):
    random = np.random.default_rng(0)
    a, b, turn = random.normal(size=(4, 16)), random.normal(size=(8, 4)), random.normal(size=(4, 4))
    one = write_factors(tmp_path / "p0", {"m": (a, b)})
    other = write_factors(tmp_path / "p1", {"m": (turn @ a, b @ np.linalg.inv(turn))})

    (module,) = compared(one, other)
    cosine, apart = in_all([module])

    assert (module.distance, apart) == (0, 0)
    assert (module.cosine, module.row_overlap, module.column_overlap, cosine) == pytest.approx((1, 1, 1, 1))


@given(
    seed=st.integers(0, 1000),
    first=st.floats(-6, 6),
    second=st.floats(-6, 6),
    steep=st.floats(0, 6),
    dtype=st.sampled_from(["F64", "F32"]),
)
@settings(max_examples=60, deadline=None)
def test_no_gauge_parts_a_delta_from_itself(tmp_path_factory, seed, first, second, steep, dtype):
    """Factors of any two scales, and mixed by a matrix of a condition number up to 1e6: its parts cancel."""
    folder = tmp_path_factory.mktemp("gauge")
    random = np.random.default_rng(seed)
    a, b = random.normal(size=(4, 16)), random.normal(size=(8, 4))
    turns = [np.linalg.qr(random.normal(size=(4, 4)))[0] for _ in range(2)]
    turn = 10**first * turns[0] @ np.diag(np.logspace(-steep / 2, steep / 2, 4)) @ turns[1]
    one = write_factors(folder / "p0", {"m": (10**second * a, 10**-second * b)}, dtype=dtype)
    other = write_factors(folder / "p1", {"m": (turn @ a, b @ np.linalg.inv(turn))}, dtype=dtype)
    # what rounding the factors to their type changed in the delta itself, beside the floor of the measurement
    parts = np.linalg.norm(turn @ a, axis=1) @ np.linalg.norm(b @ np.linalg.inv(turn), axis=0)
    bound = (4 * np.finfo(np.float32).eps if dtype == "F32" else GRAM_FLOOR) * parts / np.linalg.norm(b @ a)

    (module,) = compared(one, other)
    cosine, apart = in_all([module])

    assert module.distance == apart
    assert apart == 0 or apart <= bound
    assert apart == 0 or dtype == "F32"
    assert max(module.cosine, cosine, module.row_overlap, module.column_overlap) <= 1
    assert module.row_overlap == pytest.approx(1, abs=1e-3)


def test_a_difference_that_parts_in_a_wild_gauge_cannot_hide_is_told(tmp_path: Path):
    random = np.random.default_rng(0)
    a, b = random.normal(size=(4, 16)), random.normal(size=(8, 4))
    turn = np.linalg.qr(random.normal(size=(4, 4)))[0] @ np.diag(np.logspace(-2, 2, 4))
    one = write_factors(tmp_path / "p0", {"m": (1e6 * a, 1e-6 * b)})
    other = write_factors(tmp_path / "p1", {"m": (turn @ a, 1.01 * b @ np.linalg.inv(turn))})

    (module,) = compared(one, other)

    assert module.distance == pytest.approx(0.01, rel=1e-4)
    assert module.cosine == pytest.approx(1)


def test_a_small_difference_is_told_to_many_digits(tmp_path: Path):
    random = np.random.default_rng(0)
    a, b = random.normal(size=(4, 16)), random.normal(size=(8, 4))
    other = b + 1e-5 * random.normal(size=b.shape)

    (module,) = compared(
        write_factors(tmp_path / "p0", {"m": (a, b)}), write_factors(tmp_path / "p1", {"m": (a, other)})
    )

    assert module.distance == pytest.approx(np.linalg.norm((b - other) @ a) / np.linalg.norm(b @ a), rel=1e-4)


def test_a_module_that_one_lacks_counts_as_zero_there(tmp_path: Path):
    names = list(LINEAR)
    one = write_tiny_adapter(tmp_path / "p0", linear={names[0]: LINEAR[names[0]]})
    other = write_tiny_adapter(tmp_path / "p1", linear={names[1]: LINEAR[names[1]]})

    found = compared(one, other)
    cosine, apart = in_all(found)

    assert [(each.shared, each.distance) for each in found] == [(False, 1.0), (False, None)]
    assert cosine == 0
    assert apart > 1
    assert in_all(found[1:]) == (0, None)


def test_a_delta_of_zero_is_compared_too(tmp_path: Path):
    a, zero, b = np.ones((2, 16)), np.zeros((8, 2)), np.ones((8, 2))
    nothing = write_factors(tmp_path / "p0", {"m": (a, zero), "n": (a, zero)})
    something = write_factors(tmp_path / "p1", {"m": (a, b), "n": (a, zero)})

    assert [(each.distance, each.cosine) for each in compared(nothing, something)] == [(None, 0), (0.0, 0)]
    assert [each.distance for each in compared(something, nothing)] == [1.0, 0.0]


def test_adapters_of_different_bases_cannot_be_compared(tmp_path: Path):
    one = write_tiny_adapter(tmp_path / "p0", linear={"m": (8, 16)})
    other = write_tiny_adapter(tmp_path / "p1", linear={"m": (8, 24)})

    with pytest.raises(IncompatibleParents, match=r"m has another shape in each adapter, \[8, 16\] and \[8, 24\]"):
        compared(one, other)


def test_memory_does_not_grow_with_the_number_of_modules(tmp_path: Path):
    peaks = []
    for count in (4, 64):
        linear = {f"layers.{layer}.m": (256, 256) for layer in range(count)}
        one, other = (write_tiny_adapter(tmp_path / f"{count}-{seed}", seed=seed, linear=linear) for seed in (0, 1))
        facts = facts_of(one), facts_of(other)
        tracemalloc.start()
        in_all(distances(facts[0], one / WEIGHTS, facts[1], other / WEIGHTS))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()

    assert peaks[1] < 3 * peaks[0], peaks  # sixteen times the modules; their names and rows alone grow

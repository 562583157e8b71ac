"""Corner cases of single methods, on deltas small enough to be written out; their formulas are held in tests/oracle."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

import numpy as np
import pytest

from adapterctl.registry.merging.deltas import Deltas
from adapterctl.registry.merging.grams import Block, Grams
from adapterctl.registry.merging.method import find_method
from adapterctl.registry.merging.stack import Stack


def on_grams(name: str, deltas: Sequence[np.ndarray], rank: int = 9, **options: object) -> np.ndarray:
    """What a method on Grams makes of these deltas (d_out, d_in), each a parent of full rank at weight 1."""
    a, b = np.concatenate([np.eye(deltas[0].shape[1])] * len(deltas)), np.concatenate(deltas, axis=1)
    size = deltas[0].shape[1]
    blocks = tuple(Block(i, size * i, size * (i + 1)) for i in range(len(deltas)))
    maps = find_method(name).function(Grams(a @ a.T, b.T @ b, np.ones(len(a)), blocks), rank=rank, **options)
    made: np.ndarray = b @ maps.b @ maps.a @ a
    return made


def on_a_circle(*degrees: float) -> list[np.ndarray]:
    """Deltas of length 1 that lie in one plane."""
    one, other = np.diag([1.0, 0.0, 0.0]), np.diag([0.0, 1.0, 0.0])
    return [np.cos(angle) * one + np.sin(angle) * other for angle in np.radians(degrees)]


@pytest.mark.parametrize("size", [1e-90, 1e90])
def test_slerp_sees_the_angle_of_parents_whose_squares_leave_float64(size: float):
    first, second = on_a_circle(0, 60)

    made = on_grams("slerp", [size * first, size * second]) / size

    assert made == pytest.approx(on_grams("slerp", [first, second]), abs=1e-9)


@pytest.mark.parametrize("angle", [5.0, 90.0, 170.0])
def test_the_karcher_mean_of_two_is_the_middle_of_slerp(angle: float):
    first, second = on_a_circle(0, angle)

    made = on_grams("karcher", [2 * first, second])

    assert made == pytest.approx(on_grams("slerp", [2 * first, second]), abs=1e-12)


@pytest.mark.parametrize(
    ("degrees", "mean"),
    [((0, 30, 90), 40), ((0, 0, 0, 100), 25), ((-80, 80, 60), 20), ((0, 0, 0, 0, 175), 35), ((17,), 17), ((9, 9), 9)],
)
def test_the_karcher_mean_on_a_circle_is_the_mean_of_the_angles(degrees: Sequence[float], mean: float):
    deltas, (expected,) = on_a_circle(*degrees), on_a_circle(mean)

    assert all(on_grams("karcher", order) == pytest.approx(expected, abs=1e-7) for order in permutations(deltas))


@pytest.mark.parametrize(
    "degrees", [(0, 180), (0, 0, 180), (0, 120, 240), (0, 125, 235), (0, 90, 180, 270), (0, 179.5)]
)
def test_directions_that_balance_have_no_karcher_mean_and_are_averaged(degrees: Sequence[float]):
    deltas = on_a_circle(*degrees)
    expected = sum(deltas) / len(deltas)

    assert all(on_grams("karcher", order) == pytest.approx(expected, abs=1e-7) for order in permutations(deltas))


def test_a_parent_without_a_delta_does_not_draw_the_karcher_mean():
    first, second = on_a_circle(10, 70)

    made = on_grams("karcher", [first, np.zeros((3, 3)), second])

    assert made == pytest.approx(on_grams("karcher", [first, second]), abs=1e-12)


def test_the_scale_of_della_does_what_weights_do():
    random = np.random.default_rng(3)
    a, b = random.normal(size=(4, 12)), random.normal(size=(9, 4))
    blocks, names = (Block(0, 0, 2), Block(1, 2, 4)), ("0/m", "1/m")
    stack = Stack(a, b, np.ones(4), blocks)

    scaled = find_method("della").function(Deltas(stack, np.ones(2), np.ones(2), names), rank=4, seed=0, scale=3.0)
    weighted = find_method("della").function(Deltas(stack, np.ones(2), np.full(2, 3.0), names), rank=4, seed=0)

    assert scaled[1] @ scaled[0] == pytest.approx(weighted[1] @ weighted[0])


def test_an_element_at_which_della_finds_no_sign_comes_out_as_zero():
    """Kept whole, a delta and its opposite cancel everywhere; TIES would take the positive half."""
    a, b = np.ones((2, 12)), np.concatenate([np.ones((9, 1)), -np.ones((9, 1))], axis=1)
    stack = Stack(a, b, np.ones(2), (Block(0, 0, 1), Block(1, 1, 2)))
    deltas = Deltas(stack, np.ones(2), np.ones(2), ("0/m", "1/m"))

    made_a, made_b = find_method("della").function(deltas, rank=2, seed=0, density=1.0, epsilon=0.0)

    assert not (made_b @ made_a).any()


@pytest.mark.parametrize(("beta", "kept"), [(1.0, [10, 9, 0]), (0.0, [10, 0, 0.1])])
def test_ctm_leaves_a_weak_parent_its_share_of_the_rank_unless_sizes_count(beta: float, kept: Sequence[float]):
    strong, weak = np.diag([10.0, 9.0, 0.0]), np.diag([0.0, 0.0, 0.1])

    made = on_grams("ctm", [strong, weak], rank=2, beta=beta, rule="sum")

    assert made == pytest.approx(np.diag(kept), abs=1e-12)


def test_ctm_does_not_look_at_the_order_of_parents_nor_at_one_without_a_delta():
    deltas = list(np.random.default_rng(4).normal(size=(3, 4, 4)))
    made = on_grams("ctm", deltas, rank=2)

    for order in permutations([*deltas, np.zeros((4, 4))]):
        assert on_grams("ctm", order, rank=2) == pytest.approx(made, abs=1e-9)
    assert np.linalg.matrix_rank(made) == 2


def test_ctm_of_a_parent_with_itself_is_the_parent_cut_to_the_rank():
    delta = np.random.default_rng(5).normal(size=(4, 4))
    u, sigma, vt = np.linalg.svd(delta)

    assert on_grams("ctm", [delta, delta], rank=2) == pytest.approx((u[:, :2] * sigma[:2]) @ vt[:2], abs=1e-9)

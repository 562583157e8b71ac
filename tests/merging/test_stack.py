"""The factors of one module side by side, and how exact `svd` is when their Grams are taken in float32."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from tiny_merge import WEIGHTS, plan_of, write_factors

from adapterctl.registry.merging.make import make
from adapterctl.registry.merging.method import find_method
from adapterctl.registry.merging.stack import load_stack
from adapterctl.registry.merging.tensors import TensorReader

R, RANK, D_IN, D_OUT = 32, 8, 256, 320
Factors = Callable[[np.random.Generator], tuple[np.ndarray, np.ndarray]]


@pytest.mark.parametrize("wide", [np.float32, np.float64])
@pytest.mark.parametrize("types", [("BF16", "BF16"), ("F16", "F16"), ("F32", "F32"), ("BF16", "F32"), ("F64", "F16")])
def test_rows_and_columns_stand_in_the_order_of_the_parents(tmp_path: Path, types: tuple[str, str], wide: type):
    random = np.random.default_rng(1)
    # whole numbers up to 8 are the same in every type
    pairs = [(random.integers(-8, 8, (r, 5)), random.integers(-8, 8, (7, r))) for r in (2, 3)]
    folders = [
        write_factors(tmp_path / str(i), {"m": pair}, dtype=dtype)
        for i, (pair, dtype) in enumerate(zip(pairs, types, strict=True))
    ]

    with ExitStack() as files:
        readers = [files.enter_context(TensorReader(folder / WEIGHTS)) for folder in folders]
        loaded = load_stack(plan_of(folders).modules[0].parts, readers, wide)

    assert (loaded.a.dtype, loaded.b.dtype) == (wide, wide)
    assert np.array_equal(loaded.a, np.vstack([a for a, _ in pairs]))
    assert np.array_equal(loaded.b, np.hstack([b for _, b in pairs]))


def _usual(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    strength = np.tile(np.geomspace(1, 0.05, R // 2), 2)
    return random.normal(size=(R, D_IN)), random.normal(size=(D_OUT, R)) * strength


def _graded(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    a, b = _usual(random)
    grades = np.geomspace(1, 1e12, R)
    return a * grades[:, None], b / grades


def _nearly_alike(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    a, b = _usual(random)
    a[R // 2 :] = a[: R // 2] + 1e-6 * random.normal(size=(R // 2, D_IN))
    return a, b


def _weak_directions(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    return random.normal(size=(R, D_IN)), random.normal(size=(D_OUT, R)) * np.geomspace(1, 1e-6, R)


def _bad_gauge(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    a, b = _weak_directions(random)
    gauge = random.normal(size=(R, R))
    return gauge @ a, b @ np.linalg.inv(gauge)


def _nearly_cancelled(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    a, b = _usual(random)
    a[R // 2 :] = a[: R // 2] + 1e-3 * random.normal(size=(R // 2, D_IN))
    b[:, R // 2 :] = -b[:, : R // 2]
    return a, b


def _tiny(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    a, b = _usual(random)
    return a, b * 1e-25


def _tiny_against_large(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    a, b = _usual(random)
    return a * 1e15, b * 5e-23


def _beyond_float32(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    a, b = _usual(random)
    return a * 1e25, b * 1e-10


@pytest.mark.parametrize(
    "factors",
    [
        _usual,
        _graded,
        _nearly_alike,
        _weak_directions,
        _bad_gauge,
        _nearly_cancelled,
        _tiny,
        _tiny_against_large,
        _beyond_float32,
    ],
    ids=lambda factors: factors.__name__.strip("_"),
)
def test_svd_into_16_bits_loses_what_it_must_and_knows_it(tmp_path: Path, factors: Factors):
    a, b = factors(np.random.default_rng(3))
    half = R // 2
    folders = [
        write_factors(tmp_path / str(i), {"m": (a[rows], b[:, rows])}, dtype="F32")
        for i, rows in enumerate((slice(None, half), slice(half, None)))
    ]
    plan = plan_of(folders, method="svd", rank=RANK, dtype="bf16")
    with ExitStack() as files:
        readers = [files.enter_context(TensorReader(folder / WEIGHTS)) for folder in folders]
        stack = load_stack(plan.modules[0].parts, readers, np.float32)

    made = make(plan.modules[0], find_method("svd"), stack, plan.recipe)

    exact = stack.b.astype(np.float64) @ stack.a.astype(np.float64)
    least = float(np.linalg.norm(np.linalg.svd(exact, compute_uv=False)[RANK:]))
    error = float(np.linalg.norm(made.b.astype(np.float64) @ made.a.astype(np.float64) - exact))
    # what float32 products leave, and no more than 1e-6 for the Grams
    parts = float(np.sum(np.linalg.norm(stack.b.astype(float), axis=0) * np.linalg.norm(stack.a.astype(float), axis=1)))
    assert error <= least * (1 + 1e-6) + 3e-7 * parts
    promised = made.outcome.parts
    products = 2 * promised.product * float(promised.size_a @ promised.size_b)
    assert abs(error - made.outcome.error_squared**0.5) <= made.outcome.unsure + products

"""What a method makes of one module in memory: the child's factors, and how far they are from the exact weighted sum.

The one place that knows how a method of each form is called. Reads and writes no file.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..domain.plan import ModulePlan
from ..domain.recipe import Recipe
from .deltas import Deltas
from .elements import elements_of
from .grams import GRAM_FLOOR, GRAM_FLOOR_32, Grams, Maps, error_squared, exact_norm, size_of_parts, squared_norm
from .method import MethodSpec
from .stack import Stack

#: Where the parts of a sum are together so many times its size, they cancel, and float32 Grams are not enough: the
#: error of `svd` is within 1e-6 of the least up to here, and 1e-3 above it at ten times this (random gauges).
LARGE_PARTS = 16
#: The smallest float32 of full precision: what a product or a sum below it may lose.
TINY_32 = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True, slots=True)
class KnownGrams:
    """The Grams of a stack for any coefficients, in float64 and `coarse`; `c` decides which of them a method takes."""

    fine: Grams
    coarse: Grams

    @classmethod
    def of(cls, stack: Stack) -> KnownGrams:
        return cls(stack.grams(), stack.grams(coarse=True))


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the method promised for one module, before anything was rounded.

    `error_squared` is ||made - exact sum||²; `arithmetic` bounds what the floating-point products may add to the error.
    """

    error_squared: float
    arithmetic: float


@dataclass(frozen=True, slots=True)
class Made:
    """A' (r, d_in) and B' (d_out, r) of the child, not yet rounded to its type."""

    a: NDArray[np.floating]
    b: NDArray[np.floating]
    outcome: Outcome


def make(
    module: ModulePlan, method: MethodSpec, stack: Stack, recipe: Recipe, *, known: KnownGrams | None = None
) -> Made:
    """Apply a method of any form but `factors` and `choice`, which leave the parents' factors as they are.

    `known` are the Grams of the stack, where the caller has them from other coefficients. They change no bit.
    """
    if method.form == "grams":
        grams, floor = _grams(method, stack, known)
        maps = _maps(method, grams, recipe)
        outcome = Outcome(error_squared(grams, maps), _product_error(grams, maps, stack, floor))
        return Made(maps.a.astype(stack.a.dtype) @ stack.a, stack.b @ maps.b.astype(stack.b.dtype), outcome)
    a, b = _large(module, method, stack, recipe)
    return Made(a, b, _distance(stack, a, b))


def factors_of(
    module: ModulePlan, method: MethodSpec, stack: Stack, recipe: Recipe, *, known: KnownGrams | None = None
) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    """The factors (a, b) that a merge would write, before they are rounded: for candidates that get no file."""
    if method.form != "factors":
        made = make(module, method, stack, recipe, known=known)
        return made.a, made.b
    wide, factors = stack.a.dtype.type, method.function(stack.c)
    return stack.a * factors.a[:, None].astype(wide), stack.b * factors.b.astype(wide)


def promise(module: ModulePlan, method: MethodSpec, stack: Stack, recipe: Recipe) -> tuple[float, float]:
    """(||made - exact sum||², ||exact sum||²) before rounding; of a method on Grams without making anything."""
    grams = stack.grams()
    if method.form == "grams":
        return error_squared(grams, _maps(method, grams, recipe)), exact_norm(grams) ** 2
    return _distance(stack, *_large(module, method, stack, recipe)).error_squared, exact_norm(grams) ** 2


def wider(dtype: str) -> type[np.floating]:
    """A type that is wider than the output, so that the output is rounded once."""
    return np.float32 if dtype in {"BF16", "F16"} else np.float64


def arithmetic(method: MethodSpec, dtype: str) -> type[np.floating]:
    """The type in which a method computes.

    Deltas are as large as the base, and their rules compare, drop and average elements: float32 does for float32 too.
    """
    return np.float32 if method.form == "deltas" and dtype == "F32" else wider(dtype)


def _grams(method: MethodSpec, stack: Stack, known: KnownGrams | None) -> tuple[Grams, float]:
    """The Grams in the narrowest type that does, and what that type leaves of norms that cancel."""
    if method.coarse_grams and stack.a.dtype == np.float32:
        coarse = replace(known.coarse, c=stack.c) if known else stack.grams(coarse=True)
        if _float32_does(coarse, stack):
            return coarse, GRAM_FLOOR_32
    return replace(known.fine, c=stack.c) if known else stack.grams(), GRAM_FLOOR


def _float32_does(grams: Grams, stack: Stack) -> bool:
    """Whether the parts of the sum cancel little, and its norm lies far above what left the range of float32."""
    if not (np.isfinite(grams.a).all() and np.isfinite(grams.b).all()):
        return False
    squared = squared_norm(grams, np.diag(grams.c))
    if squared == 0 or size_of_parts(grams) ** 2 > LARGE_PARTS**2 * squared:
        return False
    of_a, of_b = (float(np.abs(grams.c) @ np.sqrt(square.diagonal())) ** 2 for square in (grams.a, grams.b))
    lost: float = TINY_32 * (stack.a.shape[1] * of_b + len(stack.b) * of_a)
    return lost <= GRAM_FLOOR_32**2 * squared


def _maps(method: MethodSpec, grams: Grams, recipe: Recipe) -> Maps:
    maps: Maps = method.function(grams, rank=min(recipe.rank, grams.rank), **_keywords(method, recipe))
    return maps


def _large(
    module: ModulePlan, method: MethodSpec, stack: Stack, recipe: Recipe
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The factors that a method of form `elements` or `deltas` makes."""
    made: tuple[NDArray[np.float64], NDArray[np.float64]]
    if method.form == "elements":
        made = method.function(elements_of(module.name, stack), **_keywords(method, recipe))
        return made
    made = method.function(_deltas(module, stack), rank=recipe.rank, **_keywords(method, recipe))
    return made


def _deltas(module: ModulePlan, stack: Stack) -> Deltas:
    return Deltas(
        stack=stack,
        scaling=np.array([part.scaling for part in module.parts]),
        weights=np.array([part.weight for part in module.parts]),
        names=tuple(f"{part.parent}/{module.name}" for part in module.parts),
    )


def _keywords(method: MethodSpec, recipe: Recipe) -> dict[str, Any]:
    keywords: dict[str, Any] = dict(recipe.options)
    if method.seeded:
        keywords["seed"] = recipe.seed
    return keywords


def _distance(stack: Stack, a: NDArray[np.float64], b: NDArray[np.float64]) -> Outcome:
    """How far b @ a is from the exact sum, with both in one stack as in the receipt, before they are rounded."""
    joined = Stack(
        np.concatenate([stack.a, a]), np.concatenate([stack.b, b], axis=1), np.append(stack.c, -np.ones(len(a))), ()
    ).grams()
    return Outcome(exact_norm(joined) ** 2, GRAM_FLOOR * size_of_parts(joined))


def _product_error(grams: Grams, maps: Maps, stack: Stack, floor: float) -> float:
    """Bound of what rounding inside a @ A and B @ b adds to B b a A, and inside the Grams to the promised error.

    Source: Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., eq. 3.13: |fl(XY) - XY| <= n u |X||Y|.
    """
    norm_a, norm_b = np.sqrt(grams.a.diagonal()), np.sqrt(grams.b.diagonal())
    made = float((np.abs(maps.a) @ norm_a) @ (norm_b @ np.abs(maps.b)))
    unit = float(np.finfo(stack.a.dtype).eps) / 2
    return (grams.rank + 2) * unit * 2 * made + floor * (made + size_of_parts(grams))

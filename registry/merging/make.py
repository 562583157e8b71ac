"""What a method makes of one module in memory: the child's factors, and how far they are from the exact weighted sum.

The one place that knows how a method of each form is called. Reads and writes no file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..domain.plan import ModulePlan
from ..domain.recipe import Recipe
from .deltas import Deltas
from .elements import elements_of
from .grams import (
    GRAM_FLOOR,
    GRAM_FLOOR_32,
    Array,
    Grams,
    Maps,
    error_squared,
    exact_norm,
    left_of,
    size_of_parts,
    squared_norm,
)
from .method import MethodSpec
from .stack import Stack
from .tensors import Written

#: Where the parts of a sum are together so many times its size, they cancel, and float32 Grams are not enough: the
#: error of `svd` is within 1e-6 of the least up to here, and 1e-3 above it at ten times this (random gauges).
LARGE_PARTS = 16
#: A product or a sum may lose what is below the smallest float32 of full precision: so much of a norm at most.
LOST_32 = 3e-4
TINY_32 = float(np.finfo(np.float32).tiny)
UNIT_32, UNIT_64 = (float(np.finfo(dtype).eps) / 2 for dtype in (np.float32, np.float64))


@dataclass(frozen=True, slots=True)
class KnownGrams:
    """The Grams of a stack for any coefficients, in float64 and `coarse`; `c` decides which of them a method takes."""

    fine: Grams
    coarse: Grams

    @classmethod
    def of(cls, stack: Stack) -> KnownGrams:
        return cls(stack.grams(), stack.grams(coarse=True))


@dataclass(frozen=True, slots=True)
class Parts:
    """What the child's rank-one parts b_k a_k were to be before they were rounded, each array (r,).

    `a` and `b` are the norms of row k of A' and column k of B', `inner` is <b_k a_k, exact sum>. `size_a` and `size_b`
    are sums of the norms of all that is added up to the row and the column: times `product` they bound what the matrix
    products did to them, times `floor` the root of what is not known of the squares of their norms.
    """

    a: Array
    b: Array
    inner: Array
    size_a: Array
    size_b: Array
    product: float
    floor: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the method promised for one module, before anything was rounded, and what was then written.

    `error_squared` is ||made - exact sum||²; `unsure` bounds how far its root may be from that of the true one. `parts`
    is None where the method scales the parents' factors: then every value is known from the plan.
    """

    error_squared: float
    unsure: float
    parts: Parts | None = None
    written: tuple[Written, ...] = ()


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
        outcome = _outcome(grams, maps, stack, floor)
        a, b = maps.a.astype(stack.a.dtype) @ stack.a, stack.b @ maps.b.astype(stack.b.dtype)
    else:
        a, b = _large(module, method, stack, recipe)
        outcome = _distance(stack, a, b)
    return Made(a, b, _narrowed(outcome, module, stack))


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
    return lost <= LOST_32**2 * squared


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
    error, parents, child = exact_norm(joined), slice(len(stack.c)), slice(len(stack.c), None)
    norm_a, norm_b = np.sqrt(joined.a.diagonal()[child]), np.sqrt(joined.b.diagonal()[child])
    inner = (joined.a[child, parents] * joined.b[child, parents]) @ stack.c
    parts = Parts(norm_a, norm_b, inner, norm_a, norm_b, product=0.0, floor=GRAM_FLOOR)
    return Outcome(error**2, left_of(error, GRAM_FLOOR * size_of_parts(joined)), parts)


def _narrowed(outcome: Outcome, module: ModulePlan, stack: Stack) -> Outcome:
    """The same, less sure where parents in float64 were rounded to float32 before anything was made of them."""
    if stack.a.dtype == np.float64 or all("F64" not in {part.a.dtype, part.b.dtype} for part in module.parts):
        return outcome
    norms = (np.linalg.norm(side.astype(np.float64), axis=axis) for side, axis in ((stack.a, 1), (stack.b, 0)))
    of_sum = float(np.abs(stack.c) @ np.prod(list(norms), axis=0))
    assert outcome.parts is not None
    made = float(outcome.parts.size_a @ outcome.parts.size_b)
    product, floor = outcome.parts.product + UNIT_32, max(outcome.parts.floor, GRAM_FLOOR_32)
    parts = replace(outcome.parts, product=product, floor=floor)
    return replace(outcome, unsure=outcome.unsure + 3 * UNIT_32 * (of_sum + made), parts=parts)


def _outcome(grams: Grams, maps: Maps, stack: Stack, floor: float) -> Outcome:
    """The promise of two maps, and how sure it is.

    The square of the error is the trace of G_B M G_A Mᵀ with M = b a - diag(c). Where the elements of both Grams are
    off by e = floor² of the norms that they are made of, G_B at unit diagonal is off by R e at most in the spectral
    norm, and the trace by that times the trace of D_B M G_A Mᵀ D_B; G_A alike; both at once by (R e ||D_B M D_A||)².
    To this comes what float64 leaves of G_B M and M G_A, where large maps cancel in them, and of M.

    Source of `product`, and of these: Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., eq. 3.13:
    |fl(XY) - XY| <= n u |X||Y|, and one rounding of the map.
    """
    norm_a, norm_b = np.sqrt(grams.a.diagonal()), np.sqrt(grams.b.diagonal())
    rows, columns = maps.a @ grams.a, maps.b.T @ grams.b
    parts = Parts(
        a=np.sqrt(np.maximum(np.sum(rows * maps.a, axis=1), 0.0)),
        b=np.sqrt(np.maximum(np.sum(columns * maps.b.T, axis=1), 0.0)),
        inner=np.sum(columns * grams.c * rows, axis=1),
        size_a=np.abs(maps.a) @ norm_a,
        size_b=norm_b @ np.abs(maps.b),
        product=(grams.rank + 2) * float(np.finfo(stack.a.dtype).eps) / 2,
        floor=floor,
    )
    middle = maps.b @ maps.a - np.diag(grams.c)
    left, right = grams.b @ middle, middle @ grams.a
    squared, size = max(0.0, float(np.sum(left * right))), np.abs(middle)
    off, unit = grams.rank * floor**2, (grams.rank + 2) * UNIT_64
    vague = off * float(norm_b**2 @ np.sum(right * middle, axis=1) + np.sum(left * middle, axis=0) @ norm_a**2)
    vague += off**2 * float(norm_b**2 @ size**2 @ norm_a**2)
    vague += unit * float(norm_b @ np.abs(right) @ (norm_b @ size) + (size @ norm_a) @ np.abs(left) @ norm_a)
    unsure = left_of(math.sqrt(squared), math.sqrt(max(0.0, vague))) + unit * float(parts.size_a @ parts.size_b)
    return Outcome(squared, unsure, parts)

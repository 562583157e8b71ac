"""Rules on the elements of the deltas themselves, which are as large as the base: made in bands, cut to a rank at once.

A delta s·B·A is never held whole: its bands of rows come from the factors whenever they are needed. What the rule makes
of them is full of rank, so the result is its best approximation of the output's rank: by a singular value decomposition
where the matrix is small, else by subspace iteration, which reads the matrix two times a step and keeps `KEPT_BYTES` of
it at most. Nothing here depends on the number of threads: bands, start and the order of every sum are fixed.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .elements import Rule
from .grams import Array
from .stack import Stack

Rows = npt.NDArray[np.floating]
#: (rows of one parent's delta, number of their first element) to the elements that are left.
Keep = Callable[[Rows, int], Rows]
#: (deltas, place of a parent) to what keeps its elements.
Prune = Callable[["Deltas", int], Keep]

#: Elements of a band: with the few arrays that a rule needs beside it, it stays in the cache of one core.
BAND = 1 << 16
#: Bands of `BAND` elements that are multiplied together, which takes BLAS a third less time than each on its own.
TOGETHER = 32
#: A merged matrix up to this size is kept between the steps of the iteration; a larger one is made again for each.
KEPT_BYTES = 256 << 20
#: Elements of which a sample is made to find a threshold; matrices up to this size are sorted out whole.
SAMPLE = 1 << 18
#: Up to this many rows or columns the matrix is decomposed as it is.
SMALL = 512
#: Directions beside the wanted ones that the iteration carries along.
SPARE = 16
#: The iteration ends when a step takes less than this share off the squared error; see `Merged.factors`.
SMALL_GAIN = 1e-5
#: The same, as a share of the squared norm: float32 products tell no more.
ROUNDING_GAIN = 1e-10
MOST_STEPS = 24
#: Share of the elements that the search for a threshold looks at closely on each side of where a sample puts it.
MARGIN = 0.02


@dataclass(frozen=True, slots=True)
class Deltas:
    """One module: parent i's delta is `scaling[i]` times its block of `stack.b @ stack.a`, its weight `weights[i]`.

    `names` tells the parents apart, by module and place in the recipe.
    """

    stack: Stack
    scaling: Array
    weights: Array
    names: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.stack.b), self.stack.a.shape[1]

    def bands(self) -> Iterator[slice]:
        """Rows that are worked on together: a multiple of 8, so that every band starts at a multiple of 8 elements."""
        step = max(8, BAND // self.shape[1] // 8 * 8)
        return (slice(start, min(start + step, self.shape[0])) for start in range(0, self.shape[0], step))

    def bands_together(self) -> Iterator[list[slice]]:
        """`TOGETHER` bands at a time; as many fewer, at least one, as 8 rows have more elements than a band should."""
        bands = list(self.bands())
        count = max(1, min(TOGETHER, TOGETHER * BAND // (bands[0].stop * self.shape[1])))
        return (bands[first : first + count] for first in range(0, len(bands), count))

    def rows(self, place: int, band: slice, every: int = 1) -> Rows:
        """These rows of parent `place`'s delta without its weight, all columns or each `every`th."""
        block = self.stack.blocks[place]
        columns = slice(block.start, block.stop)
        scale = self.stack.b.dtype.type(self.scaling[place])
        made: Rows = (self.stack.b[band, columns] * scale) @ self.stack.a[columns, ::every]
        return made

    def merged(self, prune: Prune, rule: Rule) -> Merged:
        return Merged(self, tuple(prune(self, place) for place in range(len(self.names))), rule)


class Merged:
    """The matrix (d_out, d_in) that a rule makes of pruned deltas."""

    def __init__(self, deltas: Deltas, keeps: tuple[Keep, ...], rule: Rule) -> None:
        self._deltas, self._keeps, self._rule = deltas, keeps, rule
        self._weights = deltas.weights.astype(deltas.stack.a.dtype)
        size = math.prod(deltas.shape) * deltas.stack.a.itemsize
        self._kept = list(self._made()) if size <= KEPT_BYTES else None

    def factors(self, rank: int) -> tuple[Array, Array]:
        """A' (rank, d_in) and B' (d_out, rank) of the best approximation of that rank, the values shared evenly.

        Where the matrix is large, their error is above the smallest possible one by 1e-4 of it, or by 1e-5 of the
        matrix, at most: the iteration ends when a step wins a tenth of the former in the squared error, and each step
        wins less than the one before. Measured against LAPACK on spectra from steep to flat in tests/merging.

        Source: Halko, Martinsson & Tropp 2011, https://doi.org/10.1137/090771806, algorithm 4.4, started from the row
        space of the parents.
        """
        d_out, d_in = self._deltas.shape
        rows = self._deltas.stack.a
        width = max(rank, len(rows)) + SPARE
        if min(d_out, d_in) <= max(SMALL, 2 * width):
            whole = np.concatenate([made for _, made in self._parts()]).astype(np.float64)
            u, sigma, vt = np.linalg.svd(whole, full_matrices=False)
            return _shared(u[:, :rank], sigma[:rank], vt[:rank], rank)
        x = np.linalg.qr(np.concatenate([rows, _signs(width - len(rows), d_in)]).T.astype(np.float64))[0]
        total, captured = sum(float(np.vdot(row, row)) for _, made in self._parts() for row in made), 0.0
        for _ in range(MOST_STEPS):
            q = np.linalg.qr(self._times(x))[0]
            x, triangle = np.linalg.qr(self._transposed_times(q))
            u, sigma, vt = np.linalg.svd(triangle.T)  # the matrix seen from its rows in q is triangleᵀ xᵀ
            before, captured = captured, float(np.sum(sigma[:rank] ** 2))
            if captured - before <= SMALL_GAIN * (total - captured) + ROUNDING_GAIN * total:
                break
        return _shared(q @ u[:, :rank], sigma[:rank], vt[:rank] @ x.T, rank)

    def _made(self) -> Iterator[tuple[slice, Rows]]:
        columns = self._deltas.shape[1]
        for some in self._deltas.bands_together():
            start, stop = some[0].start, some[-1].stop
            made = np.empty((stop - start, columns), self._weights.dtype)
            for band in some:
                first = band.start * columns
                parents = [keep(self._deltas.rows(place, band), first) for place, keep in enumerate(self._keeps)]
                made[band.start - start : band.stop - start] = self._rule(np.stack(parents), self._weights)
            yield slice(start, stop), made

    def _parts(self) -> Iterator[tuple[slice, Rows]]:
        return iter(self._kept) if self._kept is not None else self._made()

    def _times(self, x: Array) -> Array:
        narrow = x.astype(self._weights.dtype)
        return np.concatenate([made @ narrow for _, made in self._parts()]).astype(np.float64)

    def _transposed_times(self, y: Array) -> Array:
        narrow, total = y.astype(self._weights.dtype), np.zeros((self._deltas.shape[1], y.shape[1]))
        for rows, made in self._parts():
            total += made.T @ narrow[rows]
        return total


def keep_largest(density: float) -> Prune:
    """Keep the int(density * size) elements of largest size, and those that equal the smallest of them.

    PEFT keeps exactly so many, and any of those that are equal.
    """

    def prune(deltas: Deltas, place: int) -> Keep:
        if density >= 1:
            return _everything
        limit = _threshold(deltas, place, int(density * math.prod(deltas.shape)))
        return lambda values, first: values * (np.abs(values) >= limit)

    return prune


def keep_by_chance(density: float, seed: int) -> Prune:
    """Keep each element with probability `density`, divided by it, so that the expected value stays (DARE)."""

    def prune(deltas: Deltas, place: int) -> Keep:
        if density >= 1:
            return _everything
        draw = _draws(deltas, place, seed)

        def keep(values: Rows, first: int) -> Rows:
            kept: Rows = values * (draw(values.shape, first) < density * 2.0**32)
            kept /= values.dtype.type(density)
            return kept

        return keep

    return prune


def keep_by_rank(density: float, spread: float, seed: int) -> Prune:
    """Keep element r of the n in a row, the largest being 0, with the probability density + spread / 2 - r spread / n,
    divided by it, so that the expected value stays (MAGPRUNE). Of equal sizes the first counts as the larger.
    """

    def prune(deltas: Deltas, place: int) -> Keep:
        if density >= 1:
            return _everything
        draw, columns = _draws(deltas, place, seed), deltas.shape[1]
        ladder = density + spread / 2 - np.arange(columns) * (spread / columns)

        def keep(values: Rows, first: int) -> Rows:
            chance = np.empty(values.shape)
            np.put_along_axis(chance, np.argsort(-np.abs(values), axis=1, kind="stable"), ladder[None], axis=1)
            kept: Rows = values * (draw(values.shape, first) < chance * 2.0**32)
            kept /= chance.astype(values.dtype)
            return kept

        return keep

    return prune


def _draws(deltas: Deltas, place: int, seed: int) -> Callable[[tuple[int, ...], int], npt.NDArray[np.uint32]]:
    """(shape of a band, number of its first element) to one number of 32 bits for each element, in any bands the same.

    The stream is that of the parent's place in the recipe, the module and the seed.
    """
    name = f"{seed}/{deltas.names[place]}/BA"
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "little")

    def draw(shape: tuple[int, ...], first: int) -> npt.NDArray[np.uint32]:
        # numpy promises the raw stream of a bit generator, not that of its distributions; a count of Philox gives
        # 4 numbers of 64 bits, of which each element takes one of 32
        size = math.prod(shape)
        raw = np.random.Philox(key=key, counter=first // 8).random_raw(-(-size // 2))
        drawn: npt.NDArray[np.uint32] = raw.astype("<u8", copy=False).view("<u4")[:size].reshape(shape)
        return drawn

    return draw


def _everything(values: Rows, first: int) -> Rows:
    return values


def _threshold(deltas: Deltas, place: int, count: int) -> float:
    """Size of the `count`-th largest element, exactly: all elements are compared with a bracket from a sample."""
    if count == 0:
        return math.inf
    low, high = _bracket(deltas, place, count)
    found = _within(deltas, place, count, low, high)
    return found if found is not None else float(_within(deltas, place, count, 0.0, math.inf) or 0.0)


def _bracket(deltas: Deltas, place: int, count: int) -> tuple[float, float]:
    size = math.prod(deltas.shape)
    if size <= SAMPLE:
        return 0.0, math.inf
    every = max(1, math.isqrt(size // SAMPLE))
    sample = np.sort(np.abs(deltas.rows(place, slice(0, None, every), every)), axis=None)
    share = 1 - count / size
    low, high = share - MARGIN, share + MARGIN
    return (
        float(sample[int(low * len(sample))]) if low > 0 else 0.0,
        float(sample[int(high * len(sample))]) if high < 1 else math.inf,
    )


def _within(deltas: Deltas, place: int, count: int, low: float, high: float) -> float | None:
    """The `count`-th largest element where it lies in low..high; None where it does not."""
    above, near = 0, []
    for band in deltas.bands():
        sizes = np.abs(deltas.rows(place, band))
        near.append(sizes[(sizes >= low) & (sizes <= high)])
        above += int(np.count_nonzero(sizes > high))
    inside = np.concatenate(near)
    wanted = len(inside) - (count - above)
    if not 0 <= wanted < len(inside):
        return None
    return float(np.partition(inside, wanted)[wanted])


def _signs(count: int, length: int) -> Array:
    """(count, length) of 1 and -1, the same at every call."""
    raw = np.random.Philox(key=0).random_raw(-(-count * length // 64)).astype("<u8", copy=False)
    bits = np.unpackbits(raw.view(np.uint8))[: count * length]
    signs: Array = np.where(bits == 1, 1.0, -1.0).reshape(count, length)
    return signs


def _shared(u: Array, sigma: Array, vt: Array, rank: int) -> tuple[Array, Array]:
    """Factors that take the root of each singular value; zeros where there are fewer than `rank`."""
    root = np.sqrt(sigma)
    a, b = np.zeros((rank, vt.shape[1])), np.zeros((u.shape[0], rank))
    a[: len(root)], b[:, : len(root)] = root[:, None] * vt, u * root
    return a, b

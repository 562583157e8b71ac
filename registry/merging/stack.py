"""One module of a merge in memory: the factors of all parents side by side, and their Gram matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from ..domain.plan import Part
from .grams import Array, Block, Grams, gram, gram_32
from .tensors import STORED, TensorReader, place, widen

#: Values between two rows of A.
ROW_GAP = 16


@dataclass(frozen=True, slots=True)
class Stack:
    """`a` (R, d_in) and `b` (d_out, R) in one floating type, axes beyond the second flattened; `c` (R,) float64.

    The weighted sum of the parents' deltas is `b @ diag(c) @ a`.
    """

    a: NDArray[np.floating]
    b: NDArray[np.floating]
    c: Array
    blocks: tuple[Block, ...]

    def grams(self, *, coarse: bool = False) -> Grams:
        """Computed in float64, or in float32 where `coarse` and the factors are in float32."""
        product = gram_32 if coarse and self.a.dtype == np.float32 else gram
        return Grams(product(self.a), product(self.b.T), self.c, self.blocks)


def load_stack(parts: Sequence[Part], readers: Sequence[TensorReader], dtype: type[np.floating] = np.float64) -> Stack:
    """Read the parts of one module from their parents' files. Raises `Corrupt` for a file that ends too early."""
    blocks = blocks_of(parts)
    d_in, d_out = prod(parts[0].a.shape[1:]), parts[0].b.shape[0]
    # rows that lie a power of two apart share the same few lines of a cache: BLAS takes up to twice as long
    a = np.empty((blocks[-1].stop, d_in + ROW_GAP), dtype)[:, :d_in]
    b = np.empty((d_out, blocks[-1].stop), dtype)
    types = {part.b.dtype for part in parts}
    columns = np.empty(b.shape, STORED[parts[0].b.dtype])
    for part, block in zip(parts, blocks, strict=True):
        reader, rows = readers[part.parent], slice(block.start, block.stop)
        widen(reader.stored(part.a, (part.rank, d_in)), part.a.dtype, a[rows])
        stored = reader.stored(part.b, (d_out, part.rank))
        if len(types) == 1:
            place(stored, columns[:, rows])
        else:
            widen(stored, part.b.dtype, b[:, rows])
    if len(types) == 1:  # one pass over all columns is faster than one for those of each parent
        widen(columns, parts[0].b.dtype, b)
    return Stack(a, b, coefficients(parts), blocks)


def blocks_of(parts: Sequence[Part]) -> tuple[Block, ...]:
    blocks = []
    start = 0
    for part in parts:
        blocks.append(Block(part.parent, start, start + part.rank))
        start += part.rank
    return tuple(blocks)


def coefficients(parts: Sequence[Part]) -> Array:
    """c (R,): weight * scaling, once for each row."""
    return np.repeat([part.coefficient for part in parts], [part.rank for part in parts]).astype(np.float64)

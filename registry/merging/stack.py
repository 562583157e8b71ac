"""One module of a merge in memory: the factors of all parents side by side, and their Gram matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..domain.plan import Part
from .grams import Array, Block, Grams, gram
from .tensors import TensorReader


@dataclass(frozen=True, slots=True)
class Stack:
    """`a` (R, d_in) and `b` (d_out, R) in one floating type, axes beyond the second flattened; `c` (R,) float64.

    The weighted sum of the parents' deltas is `b @ diag(c) @ a`.
    """

    a: NDArray[np.floating]
    b: NDArray[np.floating]
    c: Array
    blocks: tuple[Block, ...]

    def grams(self) -> Grams:
        return Grams(gram(self.a), gram(self.b.T), self.c, self.blocks)


def load_stack(parts: Sequence[Part], readers: Sequence[TensorReader], dtype: type[np.floating] = np.float64) -> Stack:
    """Read the parts of one module from their parents' files. Raises `Corrupt` for a file that ends too early."""
    rank = sum(part.rank for part in parts)
    d_in = _flat(parts[0].a.shape[1:])
    a = np.empty((rank, d_in), dtype)
    b = np.empty((parts[0].b.shape[0], rank), dtype)
    for part, block in zip(parts, blocks_of(parts), strict=True):
        a[block.start : block.stop] = readers[part.parent].read(part.a).reshape(part.rank, d_in)
        b[:, block.start : block.stop] = readers[part.parent].read(part.b).reshape(-1, part.rank)
    return Stack(a, b, coefficients(parts), blocks_of(parts))


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


def _flat(shape: Sequence[int]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size

"""Tensors of an adapter as arrays, read from an open file at known places; and what one pass over them tells.

The file is opened once and read with `preadv`: a file that was cut short is a clean `Corrupt` instead of the bus error
that a memory map gives, any number of threads may read at once, and memory does not grow with the number of modules.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from ..domain.adapter import AdapterFacts, LoraModule, TensorEntry, canonical_name
from ..domain.digest import content_digest
from ..domain.errors import Corrupt, InvalidAdapter, Problem
from ..domain.header import open_plain_file

Array = NDArray[np.floating]

_STORED: Mapping[str, str] = {"BF16": "<u2", "F16": "<f2", "F32": "<f4", "F64": "<f8"}


class TensorReader:
    """One weights file, open for reading. Close it, or use it as a context manager; threads may share it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = open_plain_file(path)
        self._local = threading.local()

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def raw(self, entry: TensorEntry) -> memoryview:
        """The tensor's bytes as they are stored, in a buffer of this thread that its next read overwrites.

        Raises `Corrupt` when the file ends before the tensor does.
        """
        size = entry.end - entry.begin
        view = memoryview(self._buffer(size))[:size]
        done = 0
        while done < size:
            count = os.preadv(self._descriptor, [view[done:]], entry.begin + done)
            if count == 0:
                raise Corrupt(
                    f"{self.path.name} ends inside {entry.key}: byte {entry.begin + done} of {entry.end}",
                    hint="the file was cut short after it was checked; fetch it again",
                )
            done += count
        return view

    def read(self, entry: TensorEntry) -> Array:
        """The tensor as a new array in its own shape: float32 for BF16, F16 and F32 (exact), float64 for F64."""
        return decode(self.raw(entry), entry)

    def _buffer(self, size: int) -> bytearray:
        buffer: bytearray = getattr(self._local, "buffer", bytearray())
        if len(buffer) < size:
            buffer = self._local.buffer = bytearray(size)
        return buffer


def decode(raw: memoryview | bytes, entry: TensorEntry) -> Array:
    """Stored little-endian bytes as a new float32 array (float64 for F64) in the tensor's shape."""
    stored = np.frombuffer(raw, dtype=_STORED[entry.dtype]).reshape(entry.shape)
    if entry.dtype == "BF16":  # the upper half of a float32
        widened: Array = (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)
        return widened
    return stored.astype(np.float64 if entry.dtype == "F64" else np.float32)


@dataclass(frozen=True, slots=True)
class Measured:
    """What the tensors of an adapter say: its content digest, and the Frobenius norm of each module's scaled delta."""

    content_digest: str
    norms: Mapping[str, float]


def measure(path: Path, facts: AdapterFacts) -> Measured:
    """Read every tensor once. Raises `InvalidAdapter` for a value that is not finite, `Corrupt` for a short file."""
    tensors: list[tuple[str, str, tuple[int, ...], str]] = []
    norms: dict[str, float] = {}
    with TensorReader(path) as reader:
        for module in facts.modules:
            arrays: list[Array] = []
            for entry in (module.a, module.b, module.bias):
                if entry is None:
                    continue
                raw = reader.raw(entry)
                sha = hashlib.sha256(raw).hexdigest()
                tensors.append((canonical_name(entry.key), entry.dtype, entry.shape, sha))
                arrays.append(_finite(decode(raw, entry), entry))
            norms[module.name] = _norm(module, arrays[0], arrays[1])
    digest = content_digest(tensors, scaling=facts.scaling, fan_in_fan_out=facts.fan_in_fan_out)
    return Measured(digest, norms)


def _finite(array: Array, entry: TensorEntry) -> Array:
    if np.isfinite(array).all():
        return array
    count = int(array.size - np.isfinite(array).sum())
    message = f"{entry.key} holds {count:,} values that are NaN or infinite"
    raise InvalidAdapter(
        message,
        hint="the training diverged; register an earlier checkpoint",
        problems=[Problem("not_finite", message)],
    )


def _norm(module: LoraModule, a: Array, b: Array) -> float:
    """||s·B·A||_F from two R×R Gram matrices: ||BA||² = Σ (BᵀB) ∘ (AAᵀ); B·A itself is never formed."""
    wide_a = a.reshape(module.rank, -1).astype(np.float64)
    wide_b = b.reshape(-1, module.rank).astype(np.float64)
    squared = float(np.sum((wide_b.T @ wide_b) * (wide_a @ wide_a.T)))
    # rounding may leave a tiny negative sum where B·A is zero
    return abs(module.scaling) * float(np.sqrt(max(squared, 0.0)))

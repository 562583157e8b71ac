"""Tensors of an adapter as arrays, read from and written to files at known places; and what one pass over them tells.

The file is opened once and read with `preadv`: a file that was cut short is a clean `Corrupt` instead of the bus error
that a memory map gives, any number of threads may read at once, and memory does not grow with the number of modules.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import os
import threading
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..domain.adapter import AdapterFacts, LoraModule, TensorEntry, canonical_name
from ..domain.digest import content_digest
from ..domain.errors import Corrupt, InvalidAdapter, Problem, Unavailable
from ..domain.header import DTYPE_BYTES, open_plain_file

Array = NDArray[np.floating]
#: Name, dtype, shape and SHA-256 of a tensor, as the content digest takes them.
_Hashed = tuple[str, str, tuple[int, ...], str]

#: numpy type of the stored bytes; numpy has no bfloat16, so BF16 is the 16 bits as they are.
STORED: Mapping[str, str] = {"BF16": "<u2", "F16": "<f2", "F32": "<f4", "F64": "<f8"}
#: Below this bfloat16 has fewer than 8 bits, the last of which is worth 2^-133.
_SMALLEST_NORMAL = 2.0**-126
#: Of a delta: factors of 32 bits stay below 1e84, and the squares of larger ones leave the range of float64.
LARGEST_NORM = 1e100
#: Of float64, into which a tensor is widened piece by piece to be measured.
BLOCK_BYTES = 8 << 20
#: After so many bytes the kernel is asked to begin with writing them down.
WRITEBACK_BYTES = 4 << 20
_SYNC_FILE_RANGE_WRITE = 2


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
        return self.fill(memoryview(self._buffer(size))[:size], entry)

    def fill(self, view: memoryview, entry: TensorEntry, offset: int = 0) -> memoryview:
        """`view`, filled with the tensor's bytes from byte `offset` on. Raises `Corrupt` as `raw` does."""
        done = 0
        while done < len(view):
            count = os.preadv(self._descriptor, [view[done:]], entry.begin + offset + done)
            if count == 0:
                raise Corrupt(
                    f"{self.path.name} ends inside {entry.key}: byte {entry.begin + offset + done} of {entry.end}",
                    hint="the file was cut short after it was checked; fetch it again",
                )
            done += count
        return view

    def stored(self, entry: TensorEntry, shape: tuple[int, ...]) -> NDArray[Any]:
        """The values as they are stored (`STORED`), in the buffer of `raw`."""
        return np.frombuffer(self.raw(entry), STORED[entry.dtype]).reshape(shape)

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
    stored = np.frombuffer(raw, dtype=STORED[entry.dtype]).reshape(entry.shape)
    values = np.empty(entry.shape, np.float64 if entry.dtype == "F64" else np.float32)
    widen(stored, entry.dtype, values)
    return values


def widen(stored: NDArray[Any], dtype: str, out: Array) -> None:
    """Values as they are stored in `dtype` into `out`, float32 or float64, of the same shape; exact where that is."""
    if dtype != "BF16":
        out[...] = stored
        return
    # the upper half of a float32
    bits = out.view(np.uint32) if out.dtype == np.float32 else np.empty(out.shape, np.uint32)
    bits[...] = stored
    bits <<= np.uint32(16)
    if out.dtype != np.float32:
        out[...] = bits.view(np.float32)


def place(stored: NDArray[Any], out: NDArray[Any]) -> None:
    """Copy contiguous rows into rows of `out` that have others beside them: row by row, not value by value."""
    row = f"V{stored.shape[-1] * stored.itemsize}"
    out.view(row)[...] = stored.view(row)


@dataclass(frozen=True, slots=True)
class Measured:
    """What the tensors of an adapter say: its content digest, and the Frobenius norm of each module's scaled delta."""

    content_digest: str
    norms: Mapping[str, float]


def measure(path: Path, facts: AdapterFacts) -> Measured:
    """Read every tensor once.

    Raises `InvalidAdapter` for a value that is not finite or a delta beyond `LARGEST_NORM`, `Corrupt` for a short file.
    """
    hashed: list[_Hashed] = []
    norms: dict[str, float] = {}
    with TensorReader(path) as reader:
        for module in facts.modules:
            grams: list[Array] = []
            for entry, shape in zip(_entries(module), ((module.rank, -1), (-1, module.rank), (1, -1)), strict=False):
                raw = reader.raw(entry)
                hashed.append(_hash(entry, raw))
                grams.append(_gram(raw, entry, shape, along=int(entry is not module.b)))
            norms[module.name] = _within(_norm(module, grams[0], grams[1]), module)
    return Measured(_digest(hashed, facts), norms)


def digest_of(path: Path, facts: AdapterFacts) -> str:
    """The content digest alone, in a third of the time of `measure`: for files whose values are known to be sound."""
    with TensorReader(path) as reader:
        hashed = [_hash(entry, reader.raw(entry)) for module in facts.modules for entry in _entries(module)]
    return _digest(hashed, facts)


def _entries(module: LoraModule) -> list[TensorEntry]:
    return [entry for entry in (module.a, module.b, module.bias) if entry is not None]


def _hash(entry: TensorEntry, raw: memoryview) -> _Hashed:
    return canonical_name(entry.key), entry.dtype, entry.shape, hashlib.sha256(raw).hexdigest()


def _digest(hashed: Sequence[_Hashed], facts: AdapterFacts) -> str:
    return content_digest(hashed, scaling=facts.scaling, fan_in_fan_out=facts.fan_in_fan_out)


def _gram(raw: memoryview, entry: TensorEntry, shape: tuple[int, int], *, along: int) -> Array:
    """The tensor in `shape`, multiplied with itself along one axis, in float64; looked at in pieces of `BLOCK_BYTES`.

    Raises `InvalidAdapter` for values that are not finite.
    """
    stored = np.frombuffer(raw, STORED[entry.dtype]).reshape(shape)
    step = max(1, BLOCK_BYTES // (8 * max(1, stored.shape[1 - along])))
    total: Array = np.zeros((stored.shape[1 - along],) * 2)
    wrong = 0
    for start in range(0, stored.shape[along], step):
        piece = stored[:, start : start + step] if along else stored[start : start + step]
        values = np.empty(piece.shape)
        widen(piece, entry.dtype, values)
        wrong += values.size - int(np.count_nonzero(np.isfinite(values)))
        with np.errstate(over="ignore", invalid="ignore"):
            total += values @ values.T if along else values.T @ values
    check_finite(entry, wrong)
    return total


def check_finite(entry: TensorEntry, wrong: int) -> None:
    """Raise `InvalidAdapter` where `wrong` values of a tensor are not finite."""
    if wrong:
        message = f"{entry.key} holds {wrong:,} values that are NaN or infinite"
        raise InvalidAdapter(
            message,
            hint="the training diverged; take an earlier checkpoint",
            problems=[Problem("not_finite", message)],
        )


def _within(norm: float, module: LoraModule) -> float:
    if norm <= LARGEST_NORM:  # which is false for NaN, what an overflow leaves
        return norm
    message = f"{module.name} has a delta of norm {norm:.3g}, beyond {LARGEST_NORM:.0g}, so that its squares overflow"
    raise InvalidAdapter(
        message,
        hint="no factors of 32 bits are so large; the training diverged, or the file is broken",
        problems=[Problem("too_large", message)],
    )


def _norm(module: LoraModule, a: Array, b: Array) -> float:
    """||s·B·A||_F from the R×R Gram matrices AAᵀ and BᵀB: ||BA||² = Σ (BᵀB) ∘ (AAᵀ); B·A itself is never formed."""
    with np.errstate(over="ignore", invalid="ignore"):
        squared = float(np.sum(b * a))
    # rounding may leave a tiny negative sum where B·A is zero
    return abs(module.scaling) * float(np.sqrt(np.maximum(squared, 0.0)))


@dataclass(frozen=True, slots=True)
class Written:
    """What went to the disk: so many bytes of tensor `key`, and their `checksum`."""

    key: str
    size: int
    checksum: int


class TensorWriter:
    """A safetensors file of known layout, written at known places by any number of threads; it appears when complete.

    Everything goes to a hidden neighbour of `path` whose space is reserved at once, so that a full disk is found before
    the work. Leaving the context without an error makes the file durable and renames it into place; leaving with one
    removes it. Bytes that nobody writes are zeros.
    """

    def __init__(
        self, path: Path, tensors: Sequence[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]
    ) -> None:
        """`tensors`: key, safetensors dtype and shape of each, in file order."""
        self.path = path
        self._partial = path.with_name(f".{path.name}.partial")
        self._waiting = 0
        header, self.entries = _layout(tensors, metadata)
        size = max((entry.end for entry in self.entries.values()), default=len(header))
        with _disk_errors(path):
            flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
            self._descriptor = os.open(self._partial, flags, 0o644)
        try:
            with _disk_errors(path):
                os.posix_fallocate(self._descriptor, 0, size)
                _write_all(self._descriptor, memoryview(header), 0)
        except BaseException:
            self._discard()
            raise

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._discard()
            return
        try:
            with _disk_errors(self.path):
                os.fsync(self._descriptor)
                os.replace(self._partial, self.path)
                sync_folder(self.path.parent)
        except BaseException:
            self._discard()
            raise
        os.close(self._descriptor)

    def write(self, key: str, data: NDArray[Any] | memoryview, offset: int = 0) -> Written:
        """Store contiguous `data` at byte `offset` of the tensor, and say what that was.

        Raises `Unavailable` when the disk is full.
        """
        entry = self.entries[key]
        view = data.cast("B") if isinstance(data, memoryview) else data.data.cast("B")
        if entry.begin + offset + len(view) > entry.end:
            raise ValueError(f"{len(view)} bytes at {offset} do not fit into {key}")
        with _disk_errors(self.path):
            _write_all(self._descriptor, view, entry.begin + offset)
        self._waiting += len(view)  # by several threads: a hint may come twice or late
        if self._waiting >= WRITEBACK_BYTES:
            self._waiting = 0
            _begin_writeback(self._descriptor)
        return Written(key, len(view), checksum(view))

    def _discard(self) -> None:
        os.close(self._descriptor)
        self._partial.unlink(missing_ok=True)


def checksum(data: memoryview) -> int:
    """The CRC-32 of 256 sums of 64-bit words: one changed word anywhere, or a part that is missing, gives another one.

    It takes a fifth of the time that the CRC-32 of all bytes takes. Pieces of 2 KiB in another order give the same; no
    disk does that, and the proof sees it in its rows and columns.
    """
    whole = len(data) - len(data) % (256 * 8)
    sums = np.frombuffer(data[:whole], "<u8").reshape(-1, 256).sum(axis=0, dtype=np.uint64)
    return zlib.crc32(data[whole:], zlib.crc32(sums.tobytes()))


def file_size(tensors: Sequence[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]) -> int:
    """Bytes of the file that a `TensorWriter` of these arguments writes."""
    header, entries = _layout(tensors, metadata)
    return max((entry.end for entry in entries.values()), default=len(header))


def encode(array: Array, dtype: str) -> NDArray[Any]:
    """Values as they are stored in `dtype` (contiguous, little-endian), rounded to nearest, ties to even.

    To BF16 by way of float32, which rounds float64 twice: `round_once` does not.
    """
    if dtype != "BF16":
        return np.ascontiguousarray(array, dtype=STORED[dtype])
    bits = array.astype("<f4", copy=False).view(np.uint32)
    # half of the last kept bit, less one unless that bit is odd; then the lower half falls off
    rounded = np.right_shift(bits, np.uint32(16), order="C")
    rounded &= np.uint32(1)
    rounded += bits
    rounded += np.uint32(0x7FFF)
    rounded >>= np.uint32(16)
    return rounded.astype("<u2")


def round_once(values: Array, dtype: str, out: NDArray[Any]) -> None:
    """float64 `values` as they are stored in `dtype`, to nearest, ties to even; not by way of float32."""
    if dtype != "BF16":
        out[...] = values
        return
    # As float64 with 8 bits of precision they are float32, and its upper half, exactly.
    bits = values.view(np.uint64)
    kept = bits >> np.uint64(45)
    kept &= np.uint64(1)
    kept += np.uint64((1 << 44) - 1)
    kept += bits
    kept &= np.uint64((1 << 64) - (1 << 45))
    narrow = kept.view(np.float64).astype(np.float32)
    if (narrow.view(np.uint32) & np.uint32(0xFFFF)).any():  # below the normal numbers there are fewer bits than 8
        small = np.abs(values) < _SMALLEST_NORMAL
        narrow[small] = np.ldexp(np.rint(np.ldexp(values[small], 133)), -133)
    if (nan := np.isnan(values)).any():  # one whose bits are all set was carried on into a zero
        narrow[nan] = np.nan
    out[...] = narrow.view(np.uint32) >> np.uint32(16)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _layout(
    tensors: Sequence[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, TensorEntry]]:
    """Header bytes, padded with spaces to a multiple of 8 as the format asks, and where each tensor lies."""
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    place = 0
    for key, dtype, shape in tensors:
        size = math.prod(shape) * DTYPE_BYTES[dtype]
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [place, place + size]}
        place += size
    body = json.dumps(header, separators=(",", ":")).encode()
    body += b" " * (-len(body) % 8)
    start = 8 + len(body)
    entries = {
        key: TensorEntry(
            key, dtype, shape, start + header[key]["data_offsets"][0], start + header[key]["data_offsets"][1]
        )
        for key, dtype, shape in tensors
    }
    return len(body).to_bytes(8, "little") + body, entries


def _begin_writeback(descriptor: int) -> None:
    """Let the disk write while the next modules are computed, so that the last fsync has little left to wait for.

    A hint and no promise (sync_file_range(2), Linux only): fsync alone makes the file durable and tells of errors.
    """
    with suppress(AttributeError):
        ctypes.CDLL(None).sync_file_range(
            descriptor, ctypes.c_int64(0), ctypes.c_int64(0), ctypes.c_uint(_SYNC_FILE_RANGE_WRITE)
        )


def _write_all(descriptor: int, view: memoryview, place: int) -> None:
    done = 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done:], place + done)


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno or 0).lower()
        raise Unavailable(
            f"{path} cannot be written: {reason}",
            hint="free some space there, or write to another disk (ADAPTERCTL_HOME, --out)",
        ) from error

"""Writes a base with an adapter in it, from files to files: W' = W + s·B·A in float64, rounded once to what is stored.

The base is read once and in order, a few MiB at a time; what has no delta moves as bytes. Memory holds the factors of
one module and some pieces a thread, whatever the size of the model. Every piece has a checksum of what went out, and
the written files are read again and held against these. The bytes do not depend on the number of threads.
"""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from ..domain.bake_plan import BakePlan, Target, shards_of
from ..domain.errors import ReceiptFailed, Refused
from ..domain.header import DTYPE_BYTES, TensorEntry, read_header
from ..domain.version import FileRecord
from .blas import keep_freed_memory, one_thread
from .grams import Array
from .tensors import STORED, TensorReader, TensorWriter, Written, checksum, round_once, widen

#: Bytes of the base that are read, hashed and worked on together.
PIECE_BYTES = 4 << 20
#: Elements that are computed at a time, so that what is float64 of them stays in the cache of one core.
BAND = 1 << 16

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Rounding:
    """Frobenius norms over the changed tensors: of what rounding did to W + s·B·A, and of s·B·A itself.

    `worst` is the tensor that lost the largest share of its delta.
    """

    error: float
    delta: float
    worst: str
    worst_share: float

    @property
    def share(self) -> float:
        return self.error / self.delta if self.delta else 0.0


@dataclass(frozen=True, slots=True)
class Baked:
    """`base` are the SHA-256 of the base's files, in their order; `files` what was written, read again."""

    base: tuple[str, ...]
    files: tuple[FileRecord, ...]
    weight_map: Mapping[str, str]
    tensor_bytes: int
    rounding: Rounding


@dataclass(frozen=True, slots=True)
class _Done:
    """What became of one piece in one target: what was written where, and squared norms of its error and its delta."""

    target: Target
    offset: int
    written: Written
    error: float = 0.0
    delta: float = 0.0


def bake(
    plan: BakePlan,
    adapter: Path,
    base: Sequence[Path],
    out: Path,
    *,
    shard_bytes: int,
    threads: int,
    on_progress: Progress,
) -> Baked:
    """Write the weights files of the new model into the folder `out`, durable and proved.

    Args:
        adapter: its weights file. base: the files that the plan's sources are in, by their numbers.
        on_progress: called with (bytes done, bytes in all), in this thread.

    Raises `Unavailable` where the disk is full, before the work; `Refused` for a sum that its dtype cannot hold;
    `Corrupt` for a file that ends too early, `ReceiptFailed` where the disk gives back other bytes.
    """
    shards = shards_of(plan.targets, shard_bytes)
    place = {target.key: name for name, targets in shards.items() for target in targets}
    tensor_bytes = sum(target.size_bytes for target in plan.targets)
    tell = _Counter(sum(path.stat().st_size for path in base) + tensor_bytes, on_progress)
    keep_freed_memory()
    with ExitStack() as files:
        reader = files.enter_context(TensorReader(adapter))
        sources = [files.enter_context(TensorReader(path)) for path in base]
        writers = {
            name: files.enter_context(
                TensorWriter(out / name, [(each.key, each.dtype, each.shape) for each in targets], {"format": "pt"})
            )
            for name, targets in shards.items()
        }
        run = _Run(reader, sources, {key: writers[name] for key, name in place.items()}, threads, tell)
        digests, done = run.all(plan.targets)
    records = _proved(out, writers, place, done, threads, tell)
    return Baked(tuple(digests), tuple(records), place, tensor_bytes, _rounding(done))


class _Run:
    """One pass over the base: this thread reads, one hashes, the others compute and write."""

    def __init__(
        self,
        adapter: TensorReader,
        sources: Sequence[TensorReader],
        writers: Mapping[str, TensorWriter],
        threads: int,
        tell: _Counter,
    ) -> None:
        self._adapter, self._sources, self._writers = adapter, sources, writers
        self._threads, self._tell = threads, tell
        self._free: list[bytearray] = []

    def all(self, targets: Sequence[Target]) -> tuple[list[str], list[_Done]]:
        """The digests of the base's files, and what became of every piece, in order."""
        digests = []
        done: list[_Done] = []
        waiting: deque[_Piece] = deque()
        # left before the files are closed, also when something goes wrong: no thread writes into a closed file
        with one_thread(), _pool(self._threads) as workers, _pool(1) as hasher:
            for number, own in groupby(targets, key=lambda target: target.source.file):
                digest = hashlib.sha256()
                for piece, work in self._pieces(self._sources[number], list(own)):
                    piece.futures = [hasher.submit(digest.update, piece.view), *map(workers.submit, work)]
                    waiting.append(piece)
                    if len(waiting) > 2 * self._threads + 1:
                        done += self._end(waiting.popleft())
                while waiting:
                    done += self._end(waiting.popleft())
                digests.append(digest.hexdigest())
        return digests, done

    def _pieces(self, source: TensorReader, targets: Sequence[Target]) -> Iterator[tuple[_Piece, list[_Work]]]:
        """The whole file in order, header included, and what is to be done with each piece."""
        start = targets[0].source.entry.begin
        yield self._read(source, TensorEntry("its header", "U8", (start,), 0, start), 0, start), []
        for entry, own in groupby(targets, key=lambda target: target.source.entry):
            parts = [(target, _delta(target, self._adapter)) for target in own]
            columns = max(delta.columns for _, delta in parts)
            size, elements = DTYPE_BYTES[entry.dtype], math.prod(entry.shape)
            step = max(1, PIECE_BYTES // (columns * size)) * columns
            for first in range(0, elements, step):
                piece = self._read(source, entry, first * size, min(step, elements - first) * size)
                yield piece, [partial(self._do, target, delta, piece.view, first) for target, delta in parts]

    def _read(self, source: TensorReader, entry: TensorEntry, offset: int, size: int) -> _Piece:
        buffer = self._free.pop() if self._free and size <= PIECE_BYTES else bytearray(max(size, PIECE_BYTES))
        return _Piece(buffer, source.fill(memoryview(buffer)[:size], entry, offset))

    def _end(self, piece: _Piece) -> list[_Done]:
        _, *done = (future.result() for future in piece.futures)
        self._tell.add(len(piece.view))
        piece.view.release()
        if len(piece.buffer) == PIECE_BYTES:
            self._free.append(piece.buffer)
        return done

    def _do(self, target: Target, delta: _Delta, view: memoryview, first: int) -> _Done:
        """Write one piece of `target`, which begins at element `first`."""
        offset = first * DTYPE_BYTES[target.dtype]
        writer = self._writers[target.key]
        if target.kind == "copied":
            return _Done(target, offset, writer.write(target.key, view, offset))
        stored = np.frombuffer(view, STORED[target.source.entry.dtype]).reshape(-1, delta.columns)
        made = np.empty(stored.shape, STORED[target.dtype])
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            error, norm = _make(target, delta, stored, first // delta.columns, made)
        return _Done(target, offset, writer.write(target.key, made, offset), error, norm)


_Work = Callable[[], _Done]


@dataclass(slots=True)
class _Piece:
    """Bytes of the base in a buffer that is used again once the futures are done: the hash, then each target's."""

    buffer: bytearray
    view: memoryview
    futures: list[Future[Any]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Delta:
    """`left` (rows, r) @ `right` (r, columns) is the delta of a weight whose axes beyond the first are flattened; of a
    bias `right` is a 1. Where they are None nothing is added, and a tensor is one column.
    """

    columns: int = 1
    left: Array | None = None
    right: Array | None = None

    def rows(self, start: int, out: Array) -> None:
        assert self.left is not None
        assert self.right is not None
        np.matmul(self.left[start : start + len(out)], self.right, out=out)


def _delta(target: Target, adapter: TensorReader) -> _Delta:
    module = target.module
    if module is None:
        return _Delta()
    if target.part == "bias" and module.bias is not None:
        return _Delta(1, module.scaling * _float64(adapter, module.bias).reshape(-1, 1), np.ones((1, 1)))
    a = _float64(adapter, module.a).reshape(module.rank, -1)
    b = _float64(adapter, module.b).reshape(-1, module.rank) * module.scaling
    left, right = (b, a) if target.part == "plain" else (np.ascontiguousarray(a.T), np.ascontiguousarray(b.T))
    return _Delta(right.shape[1], left, right)


def _float64(adapter: TensorReader, entry: TensorEntry) -> Array:
    return adapter.read(entry).astype(np.float64)


def _make(target: Target, delta: _Delta, stored: NDArray[Any], row: int, made: NDArray[Any]) -> tuple[float, float]:
    """Fill `made` with the rows `stored` of the base, from row `row` on, plus their delta; squared norms of both.

    Raises `Refused` for what the dtype of the target cannot hold.
    """
    rows = max(1, BAND // delta.columns)
    error = norm = 0.0
    for start in range(0, len(stored), rows):
        band = slice(start, start + rows)
        values = np.empty(stored[band].shape)
        other = np.empty(values.shape)
        widen(stored[band], target.source.entry.dtype, values)
        if delta.left is not None:
            delta.rows(row + start, other)
            norm += float(np.vdot(other, other))
            values += other
        round_once(values, target.dtype, made[band])
        widen(made[band], target.dtype, other)
        if delta.left is None:  # the base itself may hold what is not finite, such as the -inf of a mask
            error = math.inf if (np.isfinite(values) > np.isfinite(other)).any() else error
            continue
        other -= values
        error += float(np.vdot(other, other))
    if not math.isfinite(error + norm):
        raise Refused(
            f"{target.key} has values that are NaN, infinite or beyond {target.dtype}",
            hint="choose another --dtype, and look whether the base has such values",
        )
    return error, norm


def _proved(
    out: Path,
    writers: Mapping[str, TensorWriter],
    place: Mapping[str, str],
    done: Sequence[_Done],
    threads: int,
    tell: _Counter,
) -> list[FileRecord]:
    """The files with their digests, read again: the layout and every piece have to be what was written."""
    by_file: dict[str, list[_Done]] = {name: [] for name in writers}
    for each in done:
        by_file[place[each.target.key]].append(each)
    records = []
    with _pool(threads) as workers:
        checks = [
            workers.submit(_reread, out / name, tuple(writer.entries.values()), by_file[name])
            for name, writer in writers.items()
        ]
        for check in checks:
            records.append(check.result())
            tell.add(records[-1].size_bytes)
    return records


def _reread(path: Path, layout: tuple[TensorEntry, ...], done: Sequence[_Done]) -> FileRecord:
    """Raises `ReceiptFailed` for other bytes than went out."""
    entries = {entry.key: entry for entry in layout}
    start = layout[0].begin
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(max([start, *(each.written.size for each in done)])))
    with TensorReader(path) as reader:
        digest.update(reader.fill(buffer[:start], TensorEntry("its header", "U8", (start,), 0, start)))
        for each in sorted(done, key=lambda each: entries[each.target.key].begin + each.offset):
            entry = entries[each.target.key]
            view = reader.fill(buffer[: each.written.size], entry, each.offset)
            digest.update(view)
            if checksum(view) != each.written.checksum:
                _fail(path, f"{entry.key} does not read back as it was written")
    if read_header(path).tensors != layout or sum(each.written.size for each in done) != layout[-1].end - start:
        _fail(path, "it does not hold the tensors that were planned")
    return FileRecord(path.name, layout[-1].end, digest.hexdigest())


def _fail(path: Path, what: str) -> NoReturn:
    raise ReceiptFailed(f"{path.name}: {what}", hint="check memory and disk of this machine, and bake again")


def _rounding(done: Sequence[_Done]) -> Rounding:
    changed = [each for each in done if each.target.module is not None]
    error, delta = (math.sqrt(math.fsum(getattr(each, side) for each in changed)) for side in ("error", "delta"))
    by_key: dict[str, list[_Done]] = {}
    for each in changed:
        by_key.setdefault(each.target.key, []).append(each)
    worst, worst_share = "", 0.0
    for key, parts in by_key.items():
        norm = math.fsum(each.delta for each in parts)
        share = math.sqrt(math.fsum(each.error for each in parts) / norm) if norm else 0.0
        if share > worst_share:
            worst, worst_share = key, share
    return Rounding(error, delta, worst, worst_share)


class _Counter:
    def __init__(self, total: int, on_progress: Progress) -> None:
        self._done, self._total, self._on_progress = 0, total, on_progress

    def add(self, count: int) -> None:
        self._done += count
        self._on_progress(self._done, self._total)


def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=threads, thread_name_prefix="bake")

"""Locks on files: the kernel drops them with the process that holds them, however it ends.

The file of a lock may be deleted, by its holder only: whoever has waited for it sees that it is no longer the file of
that name, and begins again with the new one. So lock files need not pile up. One that is deleted by somebody else is a
lock that its holder has lost, and can see that it has.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fcntl import LOCK_EX, LOCK_NB, flock
from pathlib import Path


@dataclass(frozen=True, slots=True)
class FileLock:
    """A lock that is held. `delete` lets its file go before the lock goes."""

    path: Path
    handle: int

    @property
    def is_held(self) -> bool:
        """Whether the file is still the one of that name: others would lock the new one."""
        try:
            return os.path.samestat(os.fstat(self.handle), self.path.stat())
        except FileNotFoundError:
            return False

    def delete(self) -> None:
        if self.is_held:
            self.path.unlink(missing_ok=True)


@contextmanager
def locked(path: Path) -> Iterator[FileLock]:
    """Wait for the lock of this file, which is made where it is not there, and hold it."""
    while (lock := _take(path, os.O_CREAT, LOCK_EX)) is None:
        pass  # it was deleted while we waited
    yield from _held(lock)


@contextmanager
def locked_if_free(path: Path, *, make: bool = True) -> Iterator[FileLock | None]:
    """Hold that lock, too, but only where nobody does; else None, without waiting. Without `make` also for no file."""
    absent = () if make else (FileNotFoundError,)
    try:
        while (lock := _take(path, os.O_CREAT if make else 0, LOCK_EX | LOCK_NB)) is None:
            pass
    except (BlockingIOError, *absent):
        yield None
        return
    yield from _held(lock)


def _take(path: Path, flags: int, how: int) -> FileLock | None:
    """The lock; None where the file was deleted before it was locked."""
    lock = FileLock(path, os.open(path, os.O_RDWR | flags, 0o666))
    try:
        flock(lock.handle, how)
        if lock.is_held:
            return lock
    except OSError:
        os.close(lock.handle)
        raise
    os.close(lock.handle)
    return None


def _held(lock: FileLock) -> Iterator[FileLock]:
    try:
        yield lock
    finally:
        os.close(lock.handle)

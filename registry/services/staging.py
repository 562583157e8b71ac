"""Folders where files wait until they are whole: on the artifacts' own filesystem, gone when their process ends.

Each stage folder is held by a lock that the kernel drops with its process. Whoever stages next removes what the dead
left behind, so a kill at any point leaves no partial file for long.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..domain.errors import NotAllowed, Unavailable


@contextmanager
def stage_folder(home: Path) -> Iterator[Path]:
    """A new empty folder under `home/staging`; removed on exit, with whatever is still in it.

    Raises `NotAllowed` where the home cannot be written, `Unavailable` where it is full.
    """
    root = home / "staging"
    try:
        root.mkdir(parents=True, exist_ok=True)
        sweep(root)
        lock, folder = _make(root)
    except PermissionError as error:
        raise NotAllowed(
            f"{root} cannot be written", hint="use a home of your own: --home or ADAPTERCTL_HOME"
        ) from error
    except OSError as error:
        raise Unavailable(f"{root} cannot be written: {error.strerror}", hint="free space on its disk") from error
    try:
        yield folder
    finally:
        remove(folder)
        os.close(lock)


def sweep(root: Path) -> None:
    """Remove the stage folders whose process is gone."""
    for folder in abandoned(root):
        remove(folder)


def abandoned(root: Path) -> Iterator[Path]:
    """The stage folders whose process is gone; the lock of each is held until the next one is asked for."""
    for path in sorted(root.glob("*.lock")):
        try:
            lock = os.open(path, os.O_RDWR)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield path.with_suffix("")
        except BlockingIOError:
            pass  # its owner is at work
        finally:
            os.close(lock)


def _make(root: Path) -> tuple[int, Path]:
    while True:
        folder = root / uuid.uuid4().hex
        path = _lock_path(folder)
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
        # A sweep may have taken the lock in the moment before we did, and removed the file: then begin again.
        if path.exists():
            folder.mkdir()
            return lock, folder
        os.close(lock)


def remove(folder: Path) -> None:
    """Remove a stage folder and its lock, which the caller holds."""
    shutil.rmtree(folder, ignore_errors=True)
    _lock_path(folder).unlink(missing_ok=True)


def _lock_path(folder: Path) -> Path:
    return folder.with_name(folder.name + ".lock")

"""Folders where files wait until they are whole: on the artifacts' own filesystem, gone when their process ends.

Each stage folder is held by a lock that the kernel drops with its process. Whoever stages next removes what the dead
left behind, so a kill at any point leaves no partial file for long.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ..domain.errors import Conflict, NotAllowed, Unavailable
from ..locks import locked, locked_if_free


@contextmanager
def stage_folder(home: Path) -> Iterator[Path]:
    """A new empty folder under `home/staging`; removed on exit, with whatever is still in it.

    Raises `NotAllowed` where the home cannot be written, `Unavailable` where it is full.
    """
    root = home / "staging"
    folder = root / uuid.uuid4().hex
    with ExitStack() as stack:
        _make(folder, stack)
        try:
            yield folder
        finally:
            remove(folder)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder beside `target` that gets its name when the block ends without an error, and is gone otherwise.

    Where `target` is a link, the folder that it leads to is meant. Raises `Conflict` where it exists and is not empty,
    `Unavailable` where it cannot be written.
    """
    check_new(target)
    place = target.resolve()
    # no mkdtemp: what comes out is as open as any new folder, and the umask is read by changing it, for all threads
    temporary = place.with_name(f".{place.name}.{uuid.uuid4().hex[:12]}")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
    except OSError as error:
        raise Unavailable(f"{target} cannot be written: {error.strerror}", hint="give another folder") from error
    try:
        yield temporary
        temporary.replace(place)
    except OSError as error:
        raise Unavailable(
            f"{target} cannot be written: {error.strerror}", hint="free space or give another folder"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_new(target: Path) -> None:
    """Raises `Conflict` where `target` exists and is not an empty folder."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise Conflict(f"{target} exists and is not an empty folder", hint="give a new folder")


def sweep(root: Path) -> None:
    """Remove the stage folders whose process is gone."""
    for folder in abandoned(root):
        remove(folder)


def abandoned(root: Path) -> Iterator[Path]:
    """The stage folders whose process is gone; the lock of each is held until the next one is asked for."""
    for path in sorted(root.glob("*.lock")):
        with locked_if_free(path, make=False) as lock:
            if lock is not None:
                yield path.with_suffix("")


def remove(folder: Path) -> None:
    """Remove a stage folder and its lock, which the caller holds."""
    shutil.rmtree(folder, ignore_errors=True)
    _lock_path(folder).unlink(missing_ok=True)


def _make(folder: Path, stack: ExitStack) -> None:
    """Make the folder, locked until `stack` ends."""
    root = folder.parent
    try:
        root.mkdir(parents=True, exist_ok=True)
        sweep(root)
        stack.enter_context(locked(_lock_path(folder)))
        folder.mkdir()
    except PermissionError as error:
        raise NotAllowed(
            f"{root} cannot be written", hint="use a home of your own: --home or ADAPTERCTL_HOME"
        ) from error
    except OSError as error:
        raise Unavailable(f"{root} cannot be written: {error.strerror}", hint="free space on its disk") from error


def _lock_path(folder: Path) -> Path:
    return folder.with_name(folder.name + ".lock")

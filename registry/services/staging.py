"""Folders where files wait until they are whole: on the filesystem of where they go, gone when their process ends.

Each of them is held by a lock that the kernel drops with its process. Whoever makes the next one in the same place
removes what the dead left behind, so a kill at any point leaves no partial file for long.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from errno import ENOLCK, ENOSYS, ENOTSUP
from glob import escape
from pathlib import Path

from ..domain.errors import Conflict, NotAllowed, Unavailable
from ..locks import locked, locked_if_free

_DIGITS = 12


@contextmanager
def stage_folder(home: Path) -> Iterator[Path]:
    """A new empty folder under `home/staging`; removed on exit, with whatever is still in it.

    Raises `NotAllowed` where the home cannot be written, `Unavailable` where it is full.
    """
    root = home / "staging"
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(own_folder(root))
        except PermissionError as error:
            raise NotAllowed(
                f"{root} cannot be written", hint="use a home of your own: --home or ADAPTERCTL_HOME"
            ) from error
        except OSError as error:
            raise Unavailable(f"{root} cannot be written: {error.strerror}", hint="free space on its disk") from error
        yield folder


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder that gets the name `target` when the block ends without an error, and is gone otherwise.

    Raises as `room_beside` does.
    """
    with room_beside(target) as room:
        new = room / "new"
        new.mkdir()
        yield new
        check_new(target)
        new.replace(target.resolve())


@contextmanager
def room_beside(target: Path) -> Iterator[Path]:
    """An empty folder, hidden beside `target`, from which a folder can be moved to that name.

    Where `target` is a link, the folder that it leads to is meant. Raises `Conflict` where it exists and is not empty,
    or where another process is at work on it; `Unavailable` where it cannot be written, also in the block.
    """
    place = target.resolve()
    prefix = f".{place.name}."
    try:
        living = sweep(place.parent, prefix)
        check_new(target)
        if living:
            raise Conflict(f"another command is writing to {target}", hint="wait for it, or give another folder")
        with _new_folder(place.parent, prefix) as folder:
            yield folder
    except OSError as error:
        raise Unavailable(
            f"{target} cannot be written: {error.strerror}", hint="free space or give another folder"
        ) from error


@contextmanager
def own_folder(root: Path, prefix: str = "") -> Iterator[Path]:
    """A new empty folder in `root` whose name begins with `prefix`; removed on exit, or by the next one after a kill.

    Raises `OSError` where it cannot be made. It is as open as any new folder.
    """
    sweep(root, prefix)
    with _new_folder(root, prefix) as folder:
        yield folder


@contextmanager
def _new_folder(root: Path, prefix: str) -> Iterator[Path]:
    # no mkdtemp: the umask, for the mode of what comes out, is read by changing it, for all threads
    folder = root / f"{prefix}{uuid.uuid4().hex[:_DIGITS]}"
    root.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(_lock_path(folder)))
        except OSError as error:
            if error.errno not in (ENOLCK, ENOSYS, ENOTSUP):
                raise
            # a filesystem without locks: what a kill leaves there stays, for nobody can tell that it is nobody's
            _lock_path(folder).unlink(missing_ok=True)
        folder.mkdir()
        try:
            yield folder
        finally:
            remove(folder)


def check_new(target: Path) -> None:
    """Raises `Conflict` where `target` exists and is not an empty folder."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise Conflict(f"{target} exists and is not an empty folder", hint="give a new folder")


def sweep(root: Path, prefix: str = "") -> int:
    """Remove the folders whose process is gone; how many are left of those that live."""
    for folder in abandoned(root, prefix):
        remove(folder)
    return len(_lock_files(root, prefix))


def abandoned(root: Path, prefix: str = "") -> Iterator[Path]:
    """The folders whose process is gone; the lock of each is held until the next one is asked for."""
    for path in _lock_files(root, prefix):
        # another user's may be dead or not: it is his to clear away
        with suppress(PermissionError), locked_if_free(path, make=False) as lock:
            if lock is not None:
                yield path.with_suffix("")


def remove(folder: Path) -> None:
    """Remove such a folder and its lock, which the caller holds."""
    shutil.rmtree(folder, ignore_errors=True)
    _lock_path(folder).unlink(missing_ok=True)


def _lock_files(root: Path, prefix: str) -> list[Path]:
    # beside folders of others a name has to be like ours in every letter
    digits = "[0-9a-f]" * _DIGITS if prefix else "*"
    return sorted(root.glob(f"{escape(prefix)}{digits}.lock"))


def _lock_path(folder: Path) -> Path:
    return folder.with_name(folder.name + ".lock")

"""Files of versions in folders of this machine: found, listed and moved into place.

Knows nothing of MLflow, so that `pull` and `verify` of a local registry start without importing it. A manifest lists
the files that we stored; what others add to the folder later (MLflow writes `registered_model_meta` there when it
loads a version) is no part of a version.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Sequence
from pathlib import Path

from ..domain.digest import file_digest
from ..domain.errors import Corrupt
from ..domain.version import AdapterVersion, FileRecord, local_folder

_READ_ONLY = 0o444


def own_folder(version: AdapterVersion) -> Path | None:
    """The folder of this machine that holds a version's files; None where they lie elsewhere. Raises `Corrupt`."""
    folder = local_folder(version.placement.location)
    if folder is not None and not folder.is_dir():
        raise files_are_gone(version, str(folder))
    return folder


def files_are_gone(version: AdapterVersion, place: str) -> Corrupt:
    """Nothing is left where they lay."""
    hint = "restore them from a backup"
    if version.spec.kind == "merge":
        hint += f"; where there is none, `adapterctl rm {version.label}` and merge again"
    elif local_folder(version.placement.location) is not None:
        hint += ", or register its source again, which puts them back"
    return Corrupt(f"the files of {version.label} are gone: {place}", hint=hint)


def list_files(folder: Path) -> tuple[FileRecord, ...]:
    """The manifest of a folder, by path."""
    return tuple(
        FileRecord(path.relative_to(folder).as_posix(), path.stat().st_size, file_digest(path))
        for path in _files(folder)
    )


def move_into_place(staged: Path, target: Path) -> None:
    """Make `target` be the folder `staged`, durable and read-only, in one step; what stood there before is replaced.

    The files are made read-only because MLflow hands out this very folder when a version is loaded on this machine.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    source = _on_same_filesystem(staged, target)
    for path in _files(source):
        path.chmod(_READ_ONLY)
        _sync(path)
    # a stage folder is private to its maker (mkdtemp); the artifact store has the mode of its home
    source.chmod(stat.S_IMODE(target.parent.stat().st_mode))
    _sync(source)
    if target.exists():
        shutil.rmtree(target)
    source.rename(target)
    _sync(target.parent)


def put_back(staged: Path, target: Path, files: Sequence[FileRecord]) -> None:
    """Replace what differs from the manifest in `target` by the files of `staged` that do not."""
    target.mkdir(parents=True, exist_ok=True)
    for record in files:
        source, place = staged / record.path, target / record.path
        if not source.is_file() or file_digest(source) != record.sha256:
            continue
        if place.is_file() and file_digest(place) == record.sha256:
            continue
        incoming = place.with_name(f".{place.name}.incoming")
        incoming.unlink(missing_ok=True)
        shutil.copyfile(source, incoming)
        incoming.chmod(_READ_ONLY)
        _sync(incoming)
        incoming.replace(place)
    _sync(target)


def _on_same_filesystem(staged: Path, target: Path) -> Path:
    """`staged` itself, or a copy beside `target` where a rename cannot reach it."""
    if staged.stat().st_dev == target.parent.stat().st_dev:
        return staged
    copy = target.with_name(f".{target.name}.incoming")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(staged, copy)
    shutil.rmtree(staged)
    return copy


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a filesystem that cannot sync a folder says so in this way
            raise
    finally:
        os.close(handle)

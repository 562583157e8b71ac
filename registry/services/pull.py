"""Copy a version's files out of the registry: verified against the manifest first, whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ..domain.digest import file_digest
from ..domain.errors import Corrupt
from ..domain.refs import is_below
from ..domain.version import AdapterVersion, FileRecord
from .staging import new_folder


def damage(folder: Path, files: Sequence[FileRecord], *, content: bool = True) -> list[str]:
    """What differs between a folder and its manifest, one line a file; files that are not listed do not count.

    Without `content` nothing is read: a file that is there in its size passes.
    """
    findings = []
    for record in files:
        path = folder / record.path
        if not path.is_file():
            findings.append(f"{record.path} is missing")
        elif path.stat().st_size != record.size_bytes:
            findings.append(f"{record.path} has {path.stat().st_size} bytes, the manifest says {record.size_bytes}")
        elif content and file_digest(path) != record.sha256:
            findings.append(f"{record.path} has other content than the manifest says")
    return findings


def check_intact(version: AdapterVersion, folder: Path) -> None:
    """Raises `Corrupt` naming every file that is not what was registered."""
    _check(version.label, version.placement.files, folder)


def pull(label: str, files: Sequence[FileRecord], target: Path, fetch: Callable[[FileRecord, Path], object]) -> None:
    """Get the files of a version into `target`, which must not exist or be an empty folder.

    `fetch` writes one file to a path. All are verified before the folder gets its name; a failure leaves nothing.
    """
    check_below(label, files)
    with new_folder(target) as temporary:
        try:
            for record in files:
                (temporary / record.path).parent.mkdir(parents=True, exist_ok=True)
                fetch(record, temporary / record.path)
            _check(label, files, temporary)
        except FileNotFoundError as error:
            raise Corrupt(
                f"{label} lost a file: {error.filename}", hint=f"`adapterctl verify {label} --no-rerun` names all"
            ) from error


def check_below(label: str, files: Sequence[FileRecord]) -> None:
    """Raises `Corrupt` where a version, as a server tells of it, has a file that is not below its folder."""
    outside = [record.path for record in files if not is_below(record.path)]
    if outside:
        raise Corrupt(
            f"{label} lists {outside[0]!r}, which is no file below its folder", hint="do not trust its server"
        )


def _check(label: str, files: Sequence[FileRecord], folder: Path) -> None:
    findings = damage(folder, files)
    if findings:
        raise Corrupt(
            f"the stored files of {label} are damaged: {'; '.join(findings)}",
            hint="restore them from a backup, or in a registry in folders register its source again, which mends them",
        )

"""Free what nobody refers to: what kills and removals left in the artifact store and in this machine's home.

Everything is looked at again under the lock that its makers hold, so nothing that is being made is taken. What MLflow
has a version for is not touched, even where the ledger knows nothing of it: a ledger that came from a backup knows less
than MLflow does, and `doctor` names such versions. Only what was made beside a version that the ledger names is taken.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path

from ..api import Garbage, GarbageView
from ..domain.errors import InvalidInput
from ..domain.job import LIVE, Job, JobState
from ..locks import locked_if_free
from ..ports import Ledger, VersionStore
from ..wire import to_json
from .register import lock_of
from .staging import abandoned, remove

#: The ledger's copy of a log serves those who are on another machine, and outlives the file by this.
LOGS_KEPT_S = 30 * 86_400.0
_ALL = 1_000_000


def collect(ledger: Ledger, store: VersionStore, home: Path, *, older_than_s: float, dry_run: bool) -> GarbageView:
    """Each thing is freed before the next one is looked for, so what a crash leaves is found the next time."""
    if not 0 <= older_than_s < math.inf:
        raise InvalidInput(f"older_than_s is {older_than_s}", hint="give seconds, 0 or more")
    before = ledger.now() - older_than_s
    found = tuple(
        chain(
            _removed_versions(ledger, store, dry_run=dry_run),
            _doubles(ledger, store, dry_run=dry_run),
            _attempts(ledger, store, before=before, dry_run=dry_run),
            _stages(home / "staging", dry_run=dry_run),
            _locks(home / "locks", dry_run=dry_run),
            _job_files(ledger, home, before=before, dry_run=dry_run),
            _kept_logs(ledger, before=min(before, ledger.now() - LOGS_KEPT_S), dry_run=dry_run),
        )
    )
    return GarbageView(found, sum(each.size_bytes for each in found), dry_run)


def _removed_versions(ledger: Ledger, store: VersionStore, *, dry_run: bool) -> Iterator[Garbage]:
    """Tombstones whose files a cut-short `rm` left behind, unless a job that is under way names the version.

    One that was deleted in MLflow may have live descendants: by its files they are verified and evaluated.
    """
    versions = ledger.versions(include_removed=True)
    removed = [version for version in versions if version.state == "removed"]
    live = {version.id for version in versions if version.state == "live"}
    named = "".join(to_json(job.spec) for job in _live_jobs(ledger)) if removed else ""
    for version in removed:
        size = store.stored_bytes(version)
        if not size or version.id in named or live & ledger.descendants([version.id]).keys():
            continue
        if not dry_run:
            store.remove(version)
        yield Garbage("version", version.label, size, "was removed, and its files were not")


def _doubles(ledger: Ledger, store: VersionStore, *, dry_run: bool) -> Iterator[Garbage]:
    """What was made beside a version that the ledger names; see `doubles.py`."""
    for double in store.doubles(ledger.versions(include_removed=True)):
        with ledger.try_exclusive(lock_of(double.key)) as free:
            if not free:  # its maker clears it away itself
                continue
            if not dry_run:
                store.drop_double(double)
        yield Garbage("double", double.label, double.size_bytes, f"the ledger names {double.of.label} instead")


def _attempts(ledger: Ledger, store: VersionStore, *, before: float, dry_run: bool) -> Iterator[Garbage]:
    """Runs and LoggedModels that never became a version, and that no job will go on with."""
    for attempt in store.attempts():
        lock = lock_of(attempt.key)
        if attempt.started_at > before:
            continue
        with ledger.try_exclusive(lock) as free:
            if not free or _refers(ledger, attempt.version_id, lock):
                continue
            size = store.attempt_bytes(attempt)
            if size is None:
                continue
            if not dry_run:
                store.drop_attempt(attempt)
        yield Garbage("attempt", f"run {attempt.run_id}", size, "was begun and never became a version")


def _refers(ledger: Ledger, version_id: str, lock: str) -> bool:
    """Whether the ledger has this version, or a merge that would go on under this lock."""
    if ledger.versions_by_id([version_id]):
        return True
    # the key of a merge job goes on with its terms, the key of its version does not
    return any(job.kind == "merge" and f"merge:{job.key}:".startswith(f"{lock}:") for job in _live_jobs(ledger))


def _stages(root: Path, *, dry_run: bool) -> Iterator[Garbage]:
    for folder in abandoned(root):
        found = folder.exists()  # a lock alone may belong to a folder that is about to be made
        size = _size(folder)
        if not dry_run:
            remove(folder)
        if found:
            yield Garbage("stage", str(folder), size, "its process is gone")


def _locks(root: Path, *, dry_run: bool) -> Iterator[Garbage]:
    """Files of locks whose holder was killed; who waits for one that is deleted makes it again."""
    for path in sorted(root.glob(f"{'[0-9a-f]' * 32}.lock")):
        # another user's is his to clear away
        with suppress(PermissionError), locked_if_free(path, make=False) as lock:
            if lock is None:
                continue
            size = _size(path)
            if not dry_run:
                lock.delete()
            yield Garbage("lock", str(path), size, "its process is gone")


def _job_files(ledger: Ledger, home: Path, *, before: float, dry_run: bool) -> Iterator[Garbage]:
    """Logs of ended jobs; and what succeeded ones worked with, for a failed one goes on from there when it is retried.

    Files of jobs that this ledger does not know may be another registry's.
    """
    for path in sorted([*(home / "jobs").glob("*"), *(home / "evaluations").glob("*")]):
        is_log = path.suffix == ".log"
        job = _job_of(ledger, path)
        if job is None or job.ended_at is None or not job.ended or job.ended_at > before:
            continue
        if not is_log and job.state is not JobState.SUCCEEDED:
            continue
        size = _size(path)
        if not dry_run:
            _delete(path)
        yield Garbage("log" if is_log else "work", str(path), size, f"job {job.id} {job.state}")


def _kept_logs(ledger: Ledger, *, before: float, dry_run: bool) -> Iterator[Garbage]:
    for job_id, size in ledger.old_logs(before).items():
        if not dry_run:
            ledger.drop_log(job_id)
        yield Garbage("log", f"log of job {job_id} in the ledger", size, "its job ended long ago")


def _job_of(ledger: Ledger, path: Path) -> Job | None:
    """The job of `ID.log`, `ID.trials.jsonl` or `ID-ATTEMPT`."""
    stem = path.name.partition(".")[0]
    return ledger.job(stem.rpartition("-")[0] if path.parent.name == "evaluations" else stem)


def _live_jobs(ledger: Ledger) -> list[Job]:
    return ledger.jobs(states=sorted(LIVE), limit=_ALL)


def _size(path: Path) -> int:
    files = [path] if path.is_file() else path.rglob("*")
    return sum(each.lstat().st_size for each in files if each.is_file())


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

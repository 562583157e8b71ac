"""What is configured, reachable and out of step, and how to mend it; one line a check.

Reads only, unless it is to accept what was done in MLflow (`reconcile.py`).
"""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from ..api import DAY_S, Check
from ..domain.errors import AdapterctlError, Misconfigured, NotFound, Unavailable
from ..domain.job import JobState
from ..domain.refs import first_few
from ..domain.version import AdapterVersion, local_folder
from ..domain.worker import QUEUES, Worker, served
from ..ports import Doorbell, Ledger, VersionStore
from ..settings import LEDGER_DATABASE, MLFLOW_DATABASE, Settings
from .drift import Rules, check_not_emptied, differences
from .pull import damage
from .reconcile import Adoption
from .schedule import unattended
from .views import recall_views

EVAL_PACKAGES = ("torch", "transformers", "peft", "lm_eval", "sacrebleu", "gguf")
NETWORK_FILESYSTEMS = frozenset({"nfs", "nfs4", "cifs", "smb3", "smbfs", "fuse.sshfs", "9p"})
_LOW_SPACE_BYTES = 1 << 30
_FULL_BYTES = 50 << 20
#: Failed jobs that are counted one by one.
_MANY = 100
#: Versions whose files are looked for, the newest.
MOST_VERSIONS = 10_000


def examine(
    settings: Settings,
    ledger: Ledger,
    bell: Doorbell,
    open_versions: Callable[[], VersionStore],
    rules: Rules,
    adoption: Callable[[], Adoption] | None = None,
    *,
    abroad: bool = False,
) -> list[Check]:
    """Every check, in the order in which a fault would matter. With `adoption`, what it can accept is accepted.

    `abroad` leaves out addresses and folders of ours, for callers on other machines.
    """
    checks = _examine(settings, ledger, bell, open_versions, rules, adoption, abroad=abroad)
    home = str(settings.home)
    return [replace(each, detail=each.detail.replace(home, "the home")) for each in checks] if abroad else checks


def _examine(
    settings: Settings,
    ledger: Ledger,
    bell: Doorbell,
    open_versions: Callable[[], VersionStore],
    rules: Rules,
    adoption: Callable[[], Adoption] | None,
    *,
    abroad: bool,
) -> list[Check]:
    try:
        registry_id = ledger.registry_id
    except NotFound as error:
        return [Check("home", "warning", error.message, error.hint), _evaluation()]
    return [
        *examine_home(settings.home),
        Check("ledger", "ok", f"registry {registry_id}, {ledger.count_versions()} versions"),
        *_mlflow(settings, ledger, open_versions, rules, adoption, abroad=abroad),
        *(_files(ledger) if settings.database_url is None else ()),
        *_recalled(ledger),
        *_jobs(settings, ledger),
        *(_fleet(settings, ledger, bell, abroad=abroad) if settings.broker_url else ()),
        _evaluation(),
    ]


def examine_home(home: Path) -> list[Check]:
    """The checks that need no ledger: it cannot be read where the disk is full."""
    return [_home(home), _filesystem(home), space(shutil.disk_usage(_standing(home)).free)]


def check_in_place(home: Path, mlflow_uri: str) -> None:
    """Raise `Misconfigured` where a home was copied or moved: MLflow's database and the versions' files are elsewhere.

    MLflow writes whole paths down, and the ledger keeps its address. What a copy wrote would be in the first home's
    MLflow and among its files, and known to the ledger of the copy alone.
    """
    theirs, own = Path(mlflow_uri.removeprefix("sqlite:///")), home / MLFLOW_DATABASE
    if not mlflow_uri.startswith("sqlite:") or theirs.name != MLFLOW_DATABASE:
        return
    # `Path.exists` of theirs would raise in a folder closed to us
    if own.exists():
        is_there = os.path.exists(theirs)
        is_own = is_there and theirs.samefile(own)
    else:  # before the first version; a folder that is no home is where somebody wanted MLflow
        is_there = os.path.exists(theirs.parent)
        is_own = is_there and (not os.path.exists(theirs.parent / LEDGER_DATABASE) or theirs.parent.samefile(home))
    if not is_there:
        raise Misconfigured(
            f"the registry in {home} was made in {theirs.parent}, where its MLflow and its files are expected",
            abroad="the home of this registry was moved: its MLflow and its files are expected where it was made",
            hint=f"move it back, or link it there: ln -s {shlex.quote(str(home))} {shlex.quote(str(theirs.parent))}",
        )
    if not is_own:
        raise Misconfigured(
            f"{home} is a copy of the registry in {theirs.parent}: its versions are in the MLflow there",
            abroad="the home of this registry is a copy: its versions are in the MLflow of the first one",
            hint=f"use --home {shlex.quote(str(theirs.parent))}; `adapterctl export` and `import` make a second one",
        )


def space(free_bytes: int) -> Check:
    if free_bytes < _FULL_BYTES:
        return Check(
            "space", "error", f"{free_bytes >> 20} MB free: writes fail, or will soon", "free space on the home's disk"
        )
    if free_bytes < _LOW_SPACE_BYTES:
        return Check("space", "warning", f"{free_bytes >> 20} MB free", "merges need room for their output twice")
    return Check("space", "ok", f"{free_bytes >> 30} GB free")


def filesystem_of(folder: Path, mounts: str) -> str:
    """The type of the filesystem that holds `folder`, by the longest mount point in the text of /proc/mounts."""
    best, kind = "", "unknown"
    for line in mounts.splitlines():
        fields = line.split()
        point = fields[1].replace("\\040", " ")
        if len(point) >= len(best) and (folder == Path(point) or Path(point) in folder.parents):
            best, kind = point, fields[2]
    return kind


def _home(home: Path) -> Check:
    if os.access(_standing(home), os.W_OK):
        return Check("home", "ok", str(home))
    return Check("home", "warning", f"{home} is read-only", "reads work; to write, use a home of your own (--home)")


def _standing(home: Path) -> Path:
    """The home, or the folder that it will be made in: with a shared ledger, it is made when it is first needed."""
    return next(folder for folder in (home, *home.parents) if folder.exists())


def _filesystem(home: Path) -> Check:
    mounts = Path("/proc/mounts")
    kind = filesystem_of(home.resolve(), mounts.read_text()) if mounts.exists() else "unknown"
    if kind in NETWORK_FILESYSTEMS:
        return Check(
            "filesystem", "error", f"{home} is on {kind}", "SQLite loses writes there; move the home to a local disk"
        )
    return Check("filesystem", "ok", kind)


def _mlflow(
    settings: Settings,
    ledger: Ledger,
    open_versions: Callable[[], VersionStore],
    rules: Rules,
    adoption: Callable[[], Adoption] | None,
    *,
    abroad: bool,
) -> Iterator[Check]:
    if settings.database_url is None and not ledger.has_versions() and not (settings.home / MLFLOW_DATABASE).exists():
        # to open it would make it, and looking makes nothing
        yield Check("mlflow", "ok", f"mlflow {version('mlflow')}; its database is made with the first version")
        return
    try:
        if settings.database_url is None:
            check_in_place(settings.home, ledger.mlflow_uri)
        store = open_versions()
        check_not_emptied(ledger, store)  # a server opened it long ago
    except AdapterctlError as error:
        yield _fault("mlflow", error, abroad=abroad)
        return
    yield Check("mlflow", "ok", f"mlflow {version('mlflow')}")
    if adoption is not None:
        yield from adoption().accept_all()
    else:
        yield from (each.check for each in differences(ledger, store, settings.stages, rules))


def _files(ledger: Ledger) -> Iterator[Check]:
    """Whether the files of live versions are there in the sizes of the manifest; no byte of them is read.

    Only of folders of this machine: a store elsewhere would have to be asked for each file.
    """
    live = sorted(ledger.versions(), key=lambda each: each.created_at, reverse=True)
    placed = ((each, local_folder(each.placement.location)) for each in live[:MOST_VERSIONS])
    here = [(each, folder) for each, folder in placed if folder is not None]
    found = {each.id: lines for each, folder in here if (lines := _lacking(each, folder))}
    # one that was removed meanwhile lost its files rightly
    bad = [each for each in ledger.versions_by_id(list(found)).values() if each.state == "live"] if found else []
    if bad:
        bad.sort(key=lambda each: (each.name, each.number))
        first, names = bad[0], first_few([each.label for each in bad])
        asked = f"{first.label} --no-rerun" if len(bad) == 1 else "--all"
        hint = f"adapterctl verify {asked} names all that is wrong; restore the files from a backup"
        yield Check("files", "error", f"files are damaged of {names}: {found[first.id][0]}", hint)
    elif here:
        said = f"those of {'the newest ' if len(live) > MOST_VERSIONS else ''}{len(here)} versions have their sizes"
        yield Check("files", "ok", said)


def _lacking(version: AdapterVersion, folder: Path) -> list[str]:
    try:
        return damage(folder, version.placement.files, content=False)
    except OSError as error:  # a folder that is closed to us
        return [f"{error.filename} cannot be read: {error.strerror}"]


def _recalled(ledger: Ledger) -> Iterator[Check]:
    """What serves though it is recalled: a recall moves no stage, and whoever was told of it may have left."""
    recalls = recall_views(ledger)
    held = [(stage, key) for stages in ledger.stages().values() for stage, key in stages.items() if key in recalls]
    versions = ledger.versions_by_id([key for _, key in held])
    for stage, key in held:
        name, hit = versions[key].name, recalls[key]
        said = f"{name}@{stage} is {versions[key].label}, which is recalled ({hit.ref}: {hit.reason})"
        yield Check("recalled", "error", said, f"adapterctl rollback {name} --stage {stage}, or demote")


def _jobs(settings: Settings, ledger: Ledger) -> Iterator[Check]:
    since = ledger.now() - DAY_S  # it is run daily; what failed before was told, and no row of it is ever taken away
    failed = [job for job in ledger.jobs(states=[JobState.FAILED], limit=_MANY + 1) if (job.ended_at or 0) >= since]
    waiting = sum(depth.jobs for depth in ledger.queue_depths())
    if failed:
        count = len(failed) if len(failed) <= _MANY else f"more than {_MANY}"
        yield Check(
            "jobs",
            "warning",
            f"{count} failed within a day, the last: {failed[0].title}",
            f"adapterctl jobs show {failed[0].id}",
        )
    else:
        yield Check("jobs", "ok", f"{waiting} queued or running")
    left = None if settings.broker_url else unattended(ledger, for_s=settings.ring_again_s)
    if left is not None:
        yield Check(
            "unattended",
            "warning",
            f"nobody works on {left.title}: its worker was killed, or nobody was told of it",
            f"adapterctl jobs wait {left.id} wakes one",
        )


def _fault(name: str, error: AdapterctlError, *, abroad: bool) -> Check:
    """Where the words of an error name places of ours, so may its hint, which is for those who can go there."""
    if abroad and error.abroad != error.message:
        return Check(name, "error", error.abroad, "an admin is told where")
    return Check(name, "error", error.message, error.hint)


def _fleet(settings: Settings, ledger: Ledger, bell: Doorbell, *, abroad: bool) -> Iterator[Check]:
    """Whether the broker answers, who works, and what waits for a worker that is not there."""
    try:
        bell.check()
        yield Check("broker", "ok", "answers")
    except Unavailable as error:
        yield _fault("broker", error, abroad=abroad)
    workers = ledger.workers()
    yield from silent_workers(workers)
    yield Check("workers", "ok", f"{sum(worker.alive for worker in workers)} alive")
    unserved = [queue for queue in QUEUES if queue not in served(workers)]
    for job in ledger.waiting(unserved, for_s=settings.ring_again_s):
        said = f"job {job.id} waits in the queue {job.queue}, which no worker serves"
        yield Check("queue", "error", said, f"adapterctl worker --queues {job.queue}")


def silent_workers(workers: Sequence[Worker]) -> Iterator[Check]:
    """One line for all workers of a host and its queues that ended without a word: a crash loop makes many of them.

    The ledger forgets them after a day.
    """
    places = {(each.host, tuple(each.queues)): None for each in workers if not each.alive}
    for place in places:
        here = [each for each in workers if (each.host, tuple(each.queues)) == place]
        silent = sorted((each for each in here if not each.alive), key=lambda each: each.silent_s)
        last = silent[0]
        said = f"{last.name} on {last.host} was last seen {last.silent_s:.0f} s ago"
        said += ", when it was leaving" if last.draining else ", not leaving"
        if len(silent) > 1:
            said += f"; {len(silent) - 1} before it for {'+'.join(last.queues)} since {silent[-1].silent_s:.0f} s ago"
        hint = "start it again; a job that it had goes on with the next worker that looks"
        if len(here) > len(silent):
            hint = "it was started again since; if this goes on, its log says why it ends"
        yield Check("worker", "warning", said, hint)


def _evaluation() -> Check:
    missing = [name for name in EVAL_PACKAGES if find_spec(name) is None]
    if missing:
        return Check("evaluation", "warning", f"not installed: {', '.join(missing)}", "pip install 'adapterctl[eval]'")
    try:
        return Check("evaluation", "ok", f"torch {version('torch')}, lm_eval {version('lm_eval')}")
    except PackageNotFoundError as error:
        return Check("evaluation", "warning", f"{error.name} is installed without its metadata", "install it again")

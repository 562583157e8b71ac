"""Whether the judge would notice: each safety is switched off where it matters, and the same accident is judged twice.

With the safety the registry must come out clean, without it the judge must find harm; else the runs of chaos prove
nothing. An accident is arranged at a named point, not waited for.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from forks import Fork, in_child, open_quietly
from model import Model, make_model, make_parents
from scene import Scene
from sqlalchemy import ColumnElement
from verdict import Accepted, judge

from adapterctl.bootstrap import job_handlers
from adapterctl.registry.domain.errors import WaitTimedOut
from adapterctl.registry.domain.job import Job, JobState
from adapterctl.registry.domain.recipe import MergeRequest
from adapterctl.registry.domain.refs import parse_parent
from adapterctl.registry.services.local import LocalRegistry
from adapterctl.registry.services.schedule import Done, JobHandler, Task, follow
from adapterctl.registry.settings import Settings
from adapterctl.registry.stores.mlflow_versions import MlflowVersions
from adapterctl.registry.stores.sql import jobs, ledger
from adapterctl.registry.stores.sql.ledger import SqlLedger
from adapterctl.registry.stores.sql.tables import job as job_table
from adapterctl.workers.supervisor import Supervisor

SHORT_S = 0.5
WAIT_S, PATIENCE_S = 1.5, 60.0
#: How long somebody is given who should never come.
LONG_S = 2.5

Accident = Callable[[Settings, Path, bool], None]


def show_teeth(scene: Scene) -> dict[str, dict[str, dict[str, list[str]]]]:
    """For each safety, what the judge finds after its accident: `with` it, and `without`."""
    settings = scene.machines[0]
    parents = make_parents(scene.room / "parents")
    model = make_model(1, 1, parents, scene.room / "undisturbed")
    in_child(lambda: _register(settings, parents))
    kept = scene.room / "kept"
    shutil.copytree(settings.home, kept)
    found: dict[str, dict[str, dict[str, list[str]]]] = {}
    for name, accident in ACCIDENTS.items():
        found[name] = {}
        for word, works in (("with", True), ("without", False)):
            shutil.rmtree(settings.home)
            shutil.copytree(kept, settings.home)
            room = scene.room / f"{name} {word}"
            room.mkdir()
            accepted = Accepted(**in_child(lambda: _submit(settings, model)))
            accident(settings, room, works)
            found[name][word] = in_child(partial(_judge, settings, model, accepted))
    return found


def without_fencing(settings: Settings, room: Path, works: bool) -> None:
    """An executor that lost its lease wakes up while the next one is at work, and writes that its time was up."""

    def second() -> None:
        if not works:
            jobs.held = ledger.held = _not_fenced  # type: ignore[attr-defined]
        registry = open_quietly(settings)
        zombie = registry.ledger.claim("zombie", -1)
        assert zombie is not None
        registry.ledger.reap()

        def wake_up(job: Job) -> None:
            registry.ledger.finish(job.id, zombie.attempt, JobState.FAILED, error={"code": "timed_out", "message": "-"})

        _supervisor(registry, before=wake_up).run_next()

    in_child(second)


def without_lease(settings: Settings, room: Path, works: bool) -> None:
    """An executor dies with a job in its hands; nobody but its lease knows."""
    in_child(lambda: _die_at("child.ended", replace(settings, lease_s=SHORT_S)))

    def second() -> None:
        if not works:
            SqlLedger.reap = lambda self, *, abandoned=False: []  # type: ignore[method-assign]
        registry = open_quietly(settings)
        supervisor, deadline = _supervisor(registry), time.monotonic() + LONG_S
        while time.monotonic() < deadline:
            registry.ledger.reap()
            if supervisor.run_next():
                return
            time.sleep(0.1)

    in_child(second)


def without_finding(settings: Settings, room: Path, works: bool) -> None:
    """An executor dies when MLflow has its version and the ledger does not; the next one looks by tag, or does not."""
    in_child(lambda: _die_at("register.version", settings))

    def second() -> None:
        if not works:
            MlflowVersions._version_by_key = lambda self, name, key: None  # type: ignore[method-assign]
            MlflowVersions._run_by_key = lambda self, adapter_id, key: None  # type: ignore[method-assign]
            _leave_doubles()  # for this mends the same harm
        registry = open_quietly(settings)
        registry.ledger.reap(abandoned=True)
        _supervisor(registry).run_next()

    in_child(second)


def without_lock(settings: Settings, room: Path, works: bool) -> None:
    """Two executors register one merge; without the lock, and without what mends its loss, both make it."""
    _both_register(settings, room, locks=works, clears=works)


def without_clearing(settings: Settings, room: Path, works: bool) -> None:
    """The same, and the lock was lost: what the ledger does not name is cleared away, or is not."""
    _both_register(settings, room, locks=False, clears=works)


def _both_register(settings: Settings, room: Path, *, locks: bool, clears: bool) -> None:
    """The first one is slow between looking and creating, and the second one comes then."""
    looked, done = room / "looked", room / "done"

    def switch_off() -> None:
        if not locks:
            SqlLedger.exclusive = lambda self, name: nullcontext(_Lost())  # type: ignore[assignment, method-assign]
        if not clears:
            _leave_doubles()

    def first() -> None:
        switch_off()
        create = MlflowVersions._create_run

        def create_late(self: MlflowVersions, *args: Any) -> Any:
            looked.touch()
            _wait_for(done, WAIT_S if locks else PATIENCE_S)  # the lock holds the second one back
            return create(self, *args)

        MlflowVersions._create_run = create_late  # type: ignore[assignment, method-assign]
        _supervisor(open_quietly(settings)).run_next()

    def second() -> None:
        switch_off()
        _wait_for(looked, PATIENCE_S)
        registry = open_quietly(settings)
        registry.ledger.reap(abandoned=True)  # as if the lease of the first were over
        _supervisor(registry).run_next()
        done.touch()

    forks = [Fork(first), Fork(second)]
    for fork in forks:
        fork.wait()


def without_ringing_again(settings: Settings, room: Path, works: bool) -> None:
    """The ring was lost with the client that queued the job; who follows the job rings again, or does not."""

    def second() -> None:
        registry = open_quietly(settings)
        [job] = registry.ledger.jobs()
        bell = _WorksWhenRung(registry)
        try:
            for _ in follow(registry.ledger, bell, job.id, timeout_s=LONG_S, silence_s=SHORT_S if works else 3600.0):
                pass
        except WaitTimedOut:
            return

    in_child(second)


ACCIDENTS: Mapping[str, Accident] = {
    "fencing": without_fencing,
    "lease": without_lease,
    "find by tag": without_finding,
    "lock": without_lock,
    "clearing away": without_clearing,
    "re-ring": without_ringing_again,
}


class _Lost:
    """A lock that was lost without a sign."""

    def check(self) -> None:
        return


class _WorksWhenRung:
    """A doorbell whose worker lives in this process."""

    def __init__(self, registry: LocalRegistry) -> None:
        self._registry = registry

    def ring(self, job_id: str) -> None:
        _supervisor(self._registry).run_next()

    def check(self) -> None:
        return


class _Between:
    """The real handler of merges, and something that happens before it begins."""

    def __init__(self, handler: JobHandler, before: Callable[[Job], None]) -> None:
        self._handler, self._before = handler, before

    @contextmanager
    def begin(self, job: Job) -> Iterator[Task | Done]:
        self._before(job)
        with self._handler.begin(job) as task:
            yield task

    def finish(self, job: Job, task: Task, result: Mapping[str, Any]) -> Mapping[str, Any]:
        return self._handler.finish(job, task, result)


def _register(settings: Settings, parents: Mapping[str, Path]) -> None:
    registry = open_quietly(settings)
    for name, folder in parents.items():
        registry.register(str(folder), name=name)


def _judge(settings: Settings, model: Model, accepted: Accepted) -> dict[str, list[str]]:
    return judge(open_quietly(settings), [settings], model, [accepted]).findings


def _submit(settings: Settings, model: Model) -> dict[str, Any]:
    [wanted] = model.wanted
    parents = tuple(parse_parent(f"{model.label(name)}={weight!r}") for name, weight in wanted.parents)
    submitted = open_quietly(settings).merge(MergeRequest(parents, into=wanted.into))
    assert submitted.job is not None
    return asdict(Accepted(wanted.number, submitted.recipe_digest, submitted.job.id))


def _die_at(point: str, settings: Settings) -> None:
    os.environ["ADAPTERCTL_CRASH_AT"] = point
    _supervisor(open_quietly(settings)).run_next()


def _supervisor(registry: LocalRegistry, *, before: Callable[[Job], None] = lambda job: None) -> Supervisor:
    handlers = job_handlers(registry)
    return Supervisor(registry.ledger, {"merge": _Between(handlers["merge"], before)}, registry.settings)


def _not_fenced(job_id: str, attempt: int) -> ColumnElement[bool]:
    return (job_table.c.id == job_id) & (job_table.c.state == JobState.RUNNING)


def _leave_doubles() -> None:
    MlflowVersions.doubles = lambda self, versions, key=None: []  # type: ignore[method-assign]


def _wait_for(file: Path, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(0.01)

"""The queue, as rows. Every move of a job is one conditional UPDATE and one event, committed together.

A move by a worker is fenced: it names its attempt, and touches no row that is not running under exactly that attempt.
So a worker that was taken for dead and comes back can do no harm, however late it wakes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from operator import itemgetter
from typing import Any

import uuid6
from sqlalchemy import (
    ColumnElement,
    Connection,
    Select,
    bindparam,
    case,
    delete,
    func,
    insert,
    literal,
    literal_column,
    or_,
    select,
    tuple_,
    update,
)
from sqlalchemy.exc import IntegrityError

from ... import wire
from ...domain.errors import Conflict, NotFound
from ...domain.job import (
    DEFAULT_MAX_ATTEMPTS,
    ENDED,
    LIVE,
    URGENT,
    Job,
    JobEvent,
    JobState,
    LogPiece,
    NewJob,
    Progress,
    QueueDepth,
)
from ...domain.worker import Queue
from .engine import Database, Now, UnlessTaken, among, rows, run_all, these
from .tables import job, job_event, job_live, job_log

WORKER_LOST = {
    "code": "worker_lost",
    "message": "its worker stopped without a result, as often as a job may be tried",
    "hint": "see `adapterctl jobs logs`, then `adapterctl jobs retry`",
}
#: Transactions in which jobs are queued, until one meets no other that queues or ends the same ones.
TRIES = 20

_JOB = [job.c[name] for name in Job.__dataclass_fields__]  # in the order in which `_job` reads them


class JobRows:
    """The part of the ledger that is about jobs."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def submit(self, new: NewJob) -> tuple[Job, bool]:
        return self.submit_all([new])[0]

    def submit_all(self, new: Sequence[NewJob]) -> list[tuple[Job, bool]]:
        for attempt in range(1, TRIES + 1):
            try:
                with self._db.write() as connection:
                    return queue_jobs(connection, new)
            except Conflict:
                if attempt == TRIES:
                    raise
        raise AssertionError("unreachable")

    def job(self, job_id: str) -> Job | None:
        with self._db.read() as connection:
            row = connection.execute(select(*_JOB).where(job.c.id == job_id)).one_or_none()
            return None if row is None else _job(row)

    def jobs(
        self,
        *,
        states: Sequence[JobState] = (),
        kind: str | None = None,
        limit: int = 100,
        before: str | None = None,
    ) -> list[Job]:
        """Newest first."""
        query = select(*_JOB).order_by(job.c.created_at.desc(), job.c.id.desc()).limit(limit)
        if before is not None:
            last = select(job.c.created_at, job.c.id).where(job.c.id == before)
            query = query.where(tuple_(job.c.created_at, job.c.id) < last.scalar_subquery())
        if states:
            query = query.where(job.c.state.in_(states))
        if kind is not None:
            query = query.where(job.c.kind == kind)
        with self._db.read() as connection:
            return [_job(row) for row in connection.execute(query)]

    def claim(
        self, owner: str, lease_s: float, *, kinds: Sequence[str] = (), queues: Sequence[Queue] = ()
    ) -> Job | None:
        waiting, look = _waiting(tuple(kinds), tuple(queues))
        with self._db.read() as connection:  # a worker that finds nothing disturbs no writer
            if not rows(connection, look):
                return None
        oldest = select(job.c.id).where(waiting).order_by(job.c.created_at, job.c.id).limit(1)
        first = [each.with_for_update(skip_locked=True) for each in (oldest.where(job.c.kind.in_(URGENT)), oldest)]
        with self._db.write() as connection:
            moved = _update(
                connection,
                (job.c.id == func.coalesce(*(each.scalar_subquery() for each in first))) & waiting,
                state=JobState.RUNNING,
                attempt=job.c.attempt + 1,
                owner=owner,
                lease_until=Now() + lease_s,
                started_at=Now(),
                progress=None,
            )
            if moved is not None:
                _record(connection, moved.id, "running", f"attempt {moved.attempt} of {moved.max_attempts} by {owner}")
            return moved

    def renew(self, job_id: str, attempt: int, lease_s: float, progress: Progress | None = None) -> Job | None:
        values: dict[str, Any] = {"lease_until": Now() + lease_s}
        if progress is not None:
            values["progress"] = wire.to_json(progress)
        with self._db.write() as connection:
            return _update(connection, held(job_id, attempt), **values)

    def finish(
        self,
        job_id: str,
        attempt: int,
        state: JobState,
        *,
        error: Mapping[str, str] | None = None,
        result: Mapping[str, Any] | None = None,
    ) -> bool:
        if state not in ENDED:
            raise ValueError(f"{state} does not end a job")
        with self._db.write() as connection:
            return end_job(connection, held(job_id, attempt), state, error=error, result=result) is not None

    def give_back(self, job_id: str, attempt: int, *, spent: bool = False) -> bool:
        values = {} if spent else {"max_attempts": job.c.max_attempts + 1}
        with self._db.write() as connection:
            moved = _update(connection, held(job_id, attempt), **_UNHELD, **values)
            if moved is not None:
                _record(connection, job_id, "queued", f"attempt {attempt} {'was lost' if spent else 'was given back'}")
            return moved is not None

    def request_cancel(self, job_id: str) -> Job:
        with self._db.write() as connection:
            # held, so that the job does not go from running to queued between the two looks
            connection.execute(select(job.c.id).where(job.c.id == job_id).with_for_update())
            waiting = (job.c.id == job_id) & (job.c.state == JobState.QUEUED)
            moved = end_job(connection, waiting, JobState.CANCELLED)
            if moved is not None:
                return moved
            running = (job.c.id == job_id) & (job.c.state == JobState.RUNNING)
            moved = _update(connection, running, cancel_requested=True)
            if moved is not None:
                _record(connection, job_id, "cancel", "was asked for")
                return moved
            raise Conflict(f"job {job_id} is {self._existing(connection, job_id).state} already")

    def retry(self, job_id: str) -> Job:
        ended = (job.c.id == job_id) & job.c.state.in_((JobState.FAILED, JobState.CANCELLED))
        with self._db.write() as connection:
            current = self._existing(connection, job_id)
            twin = (job.c.kind == current.kind) & (job.c.key == current.key) & job.c.state.in_(LIVE)
            live = connection.execute(select(job.c.id).where(twin, job.c.id != job_id)).scalar_one_or_none()
            if live is not None:
                raise Conflict(f"job {live} is doing the same already", hint=f"adapterctl jobs wait {live}")
            # the attempt is a fencing number and never goes back, so the limit moves up
            try:
                moved = _update(
                    connection,
                    ended,
                    **_UNHELD,
                    max_attempts=job.c.attempt + DEFAULT_MAX_ATTEMPTS,
                    cancel_requested=False,
                    ended_at=None,
                    error=None,
                )
            except IntegrityError as error:  # submitted since we looked
                raise Conflict(
                    "another job is doing the same by now", hint="adapterctl jobs ls --state live"
                ) from error
            if moved is None:
                raise Conflict(f"job {job_id} is {current.state}, only a failed or cancelled job is retried")
            _record(connection, job_id, "queued", "for another try")
            return moved

    def reap(self, *, abandoned: bool = False) -> list[Job]:
        expired = job.c.state == JobState.RUNNING
        if not abandoned:
            expired &= job.c.lease_until < Now()
        with self._db.read() as connection:
            if connection.execute(select(job.c.id).where(expired).limit(1)).first() is None:
                return []
        with self._db.write() as connection:
            lost = [_job(row) for row in connection.execute(select(*_JOB).where(expired).with_for_update())]
            return [self._reap_one(connection, each) for each in lost]

    def waiting(self, queues: Sequence[Queue], *, for_s: float, limit: int = 1) -> list[Job]:
        old = (job.c.state == JobState.QUEUED) & job.c.queue.in_(queues) & (job.c.updated_at <= Now() - for_s)
        query = select(*_JOB).where(old).order_by(job.c.created_at, job.c.id).limit(limit)
        with self._db.read() as connection:
            return [_job(row) for row in connection.execute(query)]

    def move_queued(self, source: Queue, target: Queue) -> list[Job]:
        queued = (job.c.state == JobState.QUEUED) & (job.c.queue == source)
        with self._db.read() as connection:
            if connection.execute(select(job.c.id).where(queued).limit(1)).first() is None:
                return []
        with self._db.write() as connection:
            moved = connection.execute(
                update(job).where(queued).values(queue=target, updated_at=Now()).returning(*_JOB)
            )
            jobs = [_job(row) for row in moved]
            for each in jobs:
                _record(connection, each.id, "queued", f"for {target}: no worker serves {source}")
            return jobs

    def queue_depths(self) -> list[QueueDepth]:
        age = func.max(case((job.c.state == JobState.QUEUED, Now() - job.c.updated_at), else_=0.0))
        query = select(job.c.queue, job.c.state, func.count(), age).where(job.c.state.in_(LIVE))
        with self._db.read() as connection:
            found = connection.execute(query.group_by(job.c.queue, job.c.state).order_by(job.c.queue, job.c.state))
            return [QueueDepth(queue, JobState(state), count, oldest) for queue, state, count, oldest in found]

    def record(self, job_id: str, kind: str, message: str) -> None:
        with self._db.write() as connection:
            # events are numbered under the lock of their job's row, which every move takes anyway
            connection.execute(select(job.c.id).where(job.c.id == job_id).with_for_update())
            _record(connection, job_id, kind, message)

    def events(self, job_id: str, after: int = 0) -> list[JobEvent]:
        query = select(job_event).where(job_event.c.job_id == job_id, job_event.c.seq > after).order_by(job_event.c.seq)
        with self._db.read() as connection:
            return [JobEvent(*row) for row in connection.execute(query)]

    def append_log(self, job_id: str, text: str) -> None:
        last = select(func.coalesce(func.max(job_log.c.seq), 0) + 1).where(job_log.c.job_id == job_id).scalar_subquery()
        with self._db.write() as connection:
            # numbered as events are: under the lock of the job's row
            connection.execute(select(job.c.id).where(job.c.id == job_id).with_for_update())
            connection.execute(insert(job_log).values(job_id=job_id, seq=last, text=literal(text.replace("\0", "�"))))

    def log(self, job_id: str, after: int = 0) -> list[LogPiece]:
        query = select(job_log.c.seq, job_log.c.text).where(job_log.c.job_id == job_id, job_log.c.seq > after)
        with self._db.read() as connection:
            return [LogPiece(*row) for row in connection.execute(query.order_by(job_log.c.seq))]

    def old_logs(self, before: float) -> dict[str, int]:
        old = job.c.state.in_(ENDED) & (job.c.ended_at < before)
        size = func.sum(func.length(job_log.c.text))
        query = select(job_log.c.job_id, size).join(job, job.c.id == job_log.c.job_id).where(old)
        with self._db.read() as connection:
            found = connection.execute(query.group_by(job_log.c.job_id).order_by(job_log.c.job_id))
            return {job_id: int(characters) for job_id, characters in found}

    def drop_log(self, job_id: str) -> None:
        with self._db.write() as connection:
            connection.execute(delete(job_log).where(job_log.c.job_id == job_id))

    def _reap_one(self, connection: Connection, lost: Job) -> Job:
        mine = held(lost.id, lost.attempt)
        if lost.cancel_requested:
            moved = end_job(connection, mine, JobState.CANCELLED)
        elif lost.attempt >= lost.max_attempts:
            moved = end_job(connection, mine, JobState.FAILED, error=WORKER_LOST)
        else:
            moved = _update(connection, mine, **_UNHELD)
            _record(connection, lost.id, "queued", f"attempt {lost.attempt} was lost")
        return moved or lost

    def _existing(self, connection: Connection, job_id: str) -> Job:
        row = connection.execute(select(*_JOB).where(job.c.id == job_id)).one_or_none()
        if row is None:
            raise NotFound(f"there is no job {job_id}", hint="adapterctl jobs ls")
        return _job(row)


_UNHELD: Mapping[str, Any] = {"state": JobState.QUEUED, "owner": None, "lease_until": None, "progress": None}


def queue_jobs(connection: Connection, new: Sequence[NewJob]) -> list[tuple[Job, bool]]:
    """Insert queued jobs, or find the live ones with their keys.

    Raises `Conflict` where one of several ended while it was joined: only a new transaction has them all in order.
    """
    ids = [str(uuid6.uuid7()) for _ in new]
    specs = [wire.to_json(each.spec) for each in new]
    given = [
        {**{name: getattr(each, name) for name in _NEW}, "id": job_id, "spec": spec}
        for job_id, each, spec in zip(ids, new, specs, strict=True)
    ]
    # in one order, lest two that queue the same jobs wait for each other
    run_all(connection, _QUEUE, sorted(given, key=itemgetter("kind", "key")))
    times = {job_id: at for job_id, *at in rows(connection, _QUEUED_AT, these(ids))}
    rows(connection, _FIRST_EVENTS, these(times))
    return [
        (_queued(job_id, each, spec, *times[job_id]), True)
        if job_id in times
        else _join(connection, each, alone=len(new) == 1)
        for job_id, each, spec in zip(ids, new, specs, strict=True)
    ]


def _queued(job_id: str, new: NewJob, spec: str, created_at: float, updated_at: float) -> Job:
    return Job(
        job_id,
        new.kind,
        new.key,
        new.title,
        wire.from_json(spec, dict),  # as whoever claims it will see it
        JobState.QUEUED,
        attempt=0,
        max_attempts=new.max_attempts,
        created_by=new.created_by,
        created_at=created_at,
        updated_at=updated_at,
        queue=new.queue,
    )


def _join(connection: Connection, new: NewJob, *, alone: bool) -> tuple[Job, bool]:
    found = rows(connection, _LIVE_WITH_KEY, {"kind": new.kind, "key": new.key})
    if found:
        return _job(found[0]), False
    # the one that was in the way ended just now
    if alone:
        return queue_jobs(connection, [new])[0]
    raise Conflict(f"the job that does {new.title!r} ended at this moment", hint="try again")


# Built once: every submit runs them, and to build them takes as long as to run them.
_NEW = tuple(NewJob.__dataclass_fields__)
_QUEUE = (
    insert(job)
    .values(
        {name: bindparam(name) for name in ("id", *_NEW)}
        | {"state": JobState.QUEUED.value, "attempt": 0, "created_at": Now(), "updated_at": Now()}
        | {"cancel_requested": False, "result": "{}"}
    )
    .ext(UnlessTaken())
)
_QUEUED_AT = select(job.c.id, job.c.created_at, job.c.updated_at).where(among(job.c.id))
_FIRST_EVENTS = insert(job_event).from_select(
    ["job_id", "seq", "at", "kind", "message"],
    select(job.c.id, literal(1), Now(), literal(JobState.QUEUED.value), literal("by ") + job.c.created_by).where(
        among(job.c.id)
    ),
)
# In the words of the index of live keys: with the states as values, SQLite would read every queued job instead.
_LIVE_WITH_KEY = select(*_JOB).where(job.c.kind == bindparam("kind"), job.c.key == bindparam("key"), job_live)


@lru_cache(maxsize=16)
def _waiting(kinds: Sequence[str], queues: Sequence[str]) -> tuple[ColumnElement[bool], Select[Any]]:
    """What is true of a job that such a worker may claim, and a look for one, which an idle worker takes all the time.

    The state stands in the words of the statement: as a value, SQLite would plan it anew each time.
    """
    waiting: ColumnElement[bool] = job.c.state == literal_column(f"'{JobState.QUEUED}'")
    for column, wanted in ((job.c.kind, kinds), (job.c.queue, queues)):
        if wanted:
            waiting &= or_(*(column == each for each in wanted))
    return waiting, select(job.c.id).where(waiting).limit(1)


def held(job_id: str, attempt: int) -> ColumnElement[bool]:
    """The fence: true of a job that is running under this attempt."""
    return (job.c.id == job_id) & (job.c.attempt == attempt) & (job.c.state == JobState.RUNNING)


def end_job(
    connection: Connection,
    where: ColumnElement[bool],
    state: JobState,
    *,
    error: Mapping[str, str] | None = None,
    result: Mapping[str, Any] | None = None,
) -> Job | None:
    """Move the one job of `where` to an end; None when the condition does not hold."""
    moved = _update(
        connection,
        where,
        state=state,
        lease_until=None,
        ended_at=Now(),
        error=None if error is None else wire.to_json(error),
        result=wire.to_json(result or {}),
    )
    if moved is not None:
        _record(connection, moved.id, state.value, error["message"] if error else "")
    return moved


def _update(connection: Connection, where: ColumnElement[bool], **values: Any) -> Job | None:
    row = connection.execute(update(job).where(where).values(updated_at=Now(), **values).returning(*_JOB)).one_or_none()
    return None if row is None else _job(row)


def _record(connection: Connection, job_id: str, kind: str, message: str) -> None:
    last = select(func.coalesce(func.max(job_event.c.seq), 0) + 1).where(job_event.c.job_id == job_id).scalar_subquery()
    connection.execute(insert(job_event).values(job_id=job_id, seq=last, at=Now(), kind=kind, message=literal(message)))


def _job(row: Sequence[Any]) -> Job:
    values = dict(zip(Job.__dataclass_fields__, row, strict=True))
    values["state"] = JobState(values["state"])
    values["cancel_requested"] = bool(values["cancel_requested"])  # the driver of SQLite gives a number
    for name in ("spec", "result"):
        values[name] = wire.from_json(values[name], dict)
    for name, kind in (("progress", Progress), ("error", dict)):
        values[name] = None if values[name] is None else wire.from_json(values[name], kind)
    return Job(**values)

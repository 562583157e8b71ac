"""Following a job, ringing for it again, and what its end means for who waited."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from adapterctl.registry import patience
from adapterctl.registry.domain.errors import (
    Conflict,
    Corrupt,
    InvalidInput,
    JobCancelled,
    JobFailed,
    LossTooHigh,
    NotFound,
    Unavailable,
    WaitTimedOut,
)
from adapterctl.registry.domain.job import Job, JobState, NewJob, Progress
from adapterctl.registry.services.schedule import (
    ask,
    find_job,
    follow,
    parse_states,
    raise_for,
    retry,
    submit,
    unattended,
)
from adapterctl.registry.stores.sql.ledger import SqlLedger

NEW = NewJob("merge", "k", "merge a b", {}, "ada")


class CountingBell:
    """Remembers the rings; may do something at one, as a worker would."""

    def __init__(self) -> None:
        self.rings: list[str] = []

    def ring(self, job_id: str) -> None:
        self.rings.append(job_id)


def ended(ledger: SqlLedger, state: JobState, **error: str) -> Job:
    job, _ = ledger.submit(NEW)
    ledger.claim("w", 60)
    ledger.finish(job.id, 1, state, error=error or None)
    return find_job(ledger, job.id)


def test_submit_rings_for_a_new_job_and_for_a_joined_one(sql_ledger: SqlLedger):
    bell = CountingBell()

    first, created = submit(sql_ledger, bell, NEW)
    second, again = submit(sql_ledger, bell, NEW)

    assert (created, again, second.id) == (True, False, first.id)
    assert bell.rings == [first.id, first.id]


def test_nobody_joins_a_job_that_is_being_cancelled(sql_ledger: SqlLedger):
    bell = CountingBell()
    job = ask(sql_ledger, bell, NEW)
    sql_ledger.claim("w", 60)
    assert ask(sql_ledger, bell, NEW).id == job.id
    sql_ledger.request_cancel(job.id)

    with pytest.raises(Conflict, match=f"job {job.id} does the same, and is being cancelled"):
        ask(sql_ledger, bell, NEW)

    sql_ledger.finish(job.id, 1, JobState.CANCELLED)
    assert ask(sql_ledger, bell, NEW).id != job.id


def test_retry_rings(sql_ledger: SqlLedger):
    bell = CountingBell()
    failed = ended(sql_ledger, JobState.FAILED, code="crashed", message="m")

    assert retry(sql_ledger, bell, failed.id).state is JobState.QUEUED
    assert bell.rings == [failed.id]


def test_a_follower_sees_each_change_once_and_the_end_last(sql_ledger: SqlLedger):
    job, _ = sql_ledger.submit(NEW)
    moves = iter(
        [
            lambda: sql_ledger.claim("w", 60),
            lambda: sql_ledger.renew(job.id, 1, 60, Progress("merge", 1, 2)),
            lambda: sql_ledger.finish(job.id, 1, JobState.SUCCEEDED),
        ]
    )

    seen = []
    for each in follow(sql_ledger, CountingBell(), job.id):
        seen.append((each.state, each.progress))
        next(moves, lambda: None)()

    assert seen == [
        (JobState.QUEUED, None),
        (JobState.RUNNING, None),
        (JobState.RUNNING, Progress("merge", 1, 2)),
        (JobState.SUCCEEDED, Progress("merge", 1, 2)),
    ]


def test_a_follower_of_a_silent_job_rings_again_and_gives_up_in_time(sql_ledger: SqlLedger):
    bell = CountingBell()
    job, _ = sql_ledger.submit(NEW)

    with pytest.raises(WaitTimedOut, match=f"job {job.id} is queued after") as caught:
        list(follow(sql_ledger, bell, job.id, timeout_s=0.3, silence_s=0.05))

    assert len(bell.rings) >= 2
    assert f"jobs wait {job.id}" in caught.value.hint
    assert find_job(sql_ledger, job.id).state is JobState.QUEUED


def test_a_wait_that_an_outage_cut_in_two_tells_the_time_that_was_asked_for(
    sql_ledger: SqlLedger, monkeypatch: pytest.MonkeyPatch
):
    job, _ = sql_ledger.submit(NEW)
    monkeypatch.setattr(patience, "_PAUSE_S", 0.1)
    cut = iter([True])

    def follow_once_cut(left: float | None) -> Iterator[Job]:
        for each in follow(sql_ledger, CountingBell(), job.id, timeout_s=left):
            yield each
            if next(cut, False):
                raise Unavailable("the database is started again")

    with pytest.raises(WaitTimedOut) as caught:
        list(patience.patiently(follow_once_cut, timeout_s=0.5, known=True, tell=None))

    assert str(caught.value) == f"job {job.id} is queued after 0.5 s"


def test_a_job_is_unattended_where_its_worker_is_gone_and_nobody_else_works(sql_ledger: SqlLedger):
    assert unattended(sql_ledger, for_s=0.0) is None
    first, _ = sql_ledger.submit(NEW)

    assert unattended(sql_ledger, for_s=60.0) is None  # it has only just been queued
    assert unattended(sql_ledger, for_s=0.0) == find_job(sql_ledger, first.id)

    sql_ledger.claim("w", 60)
    sql_ledger.submit(replace(NEW, key="another"))
    assert unattended(sql_ledger, for_s=0.0) is None  # the second waits for the one who works on the first

    sql_ledger.renew(first.id, 1, -1)
    assert unattended(sql_ledger, for_s=60.0) == find_job(sql_ledger, first.id)


def test_an_unknown_job_is_not_found(sql_ledger: SqlLedger):
    with pytest.raises(NotFound, match="no job nobody"):
        next(follow(sql_ledger, CountingBell(), "nobody"))


@pytest.mark.parametrize(
    ("state", "code", "raised"),
    [
        (JobState.FAILED, LossTooHigh.code, LossTooHigh),
        (JobState.FAILED, Corrupt.code, JobFailed),
        (JobState.FAILED, "crashed", JobFailed),
        (JobState.CANCELLED, "", JobCancelled),
    ],
)
def test_the_end_of_a_job_is_raised_as_what_it_was(
    sql_ledger: SqlLedger, state: JobState, code: str, raised: type[Exception]
):
    job = ended(sql_ledger, state, **({"code": code, "message": "because", "hint": "do this"} if code else {}))

    with pytest.raises(raised, match="because" if code else "was cancelled"):
        raise_for(job)


def test_success_raises_nothing(sql_ledger: SqlLedger):
    raise_for(ended(sql_ledger, JobState.SUCCEEDED))


@pytest.mark.parametrize(
    ("text", "states"),
    [
        (None, ()),
        ("failed", (JobState.FAILED,)),
        ("queued, running", (JobState.QUEUED, JobState.RUNNING)),
        ("live", (JobState.QUEUED, JobState.RUNNING)),
        ("ended", (JobState.CANCELLED, JobState.FAILED, JobState.SUCCEEDED)),
    ],
)
def test_states_are_read_by_name_or_by_group(text: str | None, states: tuple[JobState, ...]):
    assert parse_states(text) == states


def test_an_unknown_state_is_refused_with_the_known_ones():
    with pytest.raises(InvalidInput, match="'done' is unknown") as caught:
        parse_states("done")

    assert "live" in caught.value.hint

"""What any ledger promises about jobs: one live job a key, fenced moves, leases, bounded attempts."""

from __future__ import annotations

import pytest

from adapterctl.registry.domain.errors import Conflict, InvalidInput, NotFound
from adapterctl.registry.domain.job import Job, JobState, NewJob, Progress
from adapterctl.registry.ports import Ledger

OVER = -1.0  # a lease that is over when it begins


def new(key: str = "k", kind: str = "merge") -> NewJob:
    return NewJob(kind, key, f"job {key}", {"weights": [0.5, 1.5]}, "ada")


def test_the_same_live_job_is_submitted_once(ledger: Ledger):
    first, created = ledger.submit(new())
    second, again = ledger.submit(new())
    other, _ = ledger.submit(new(kind="eval"))

    assert (created, again) == (True, False)
    assert first == second
    assert (first.state, first.spec, first.attempt) == (JobState.QUEUED, {"weights": [0.5, 1.5]}, 0)
    assert other.id != first.id


def test_jobs_that_are_submitted_together_are_answered_in_their_order(ledger: Ledger):
    live, _ = ledger.submit(new("live"))
    ended, _ = ledger.submit(new("ended"))
    ledger.request_cancel(ended.id)

    answers = ledger.submit_all([new(key) for key in ("z", "live", "a", "z", "ended")])

    z, joined, a, same, again = [job for job, _ in answers]
    assert [created for _, created in answers] == [True, False, True, False, True]
    assert (joined, same) == (live, z)
    assert [each.key for each in (z, a, again)] == ["z", "a", "ended"]
    assert [ledger.job(each.id) for each in (z, a, again)] == [z, a, again]
    assert [(e.seq, e.kind, e.message) for e in ledger.events(a.id)] == [(1, "queued", "by ada")]
    assert len(ledger.events(live.id)) == 1


def test_of_jobs_that_are_submitted_together_all_are_committed_or_none(ledger: Ledger):
    no_text = NewJob("merge", "b", "\ud800", {}, "ada")

    with pytest.raises((UnicodeEncodeError, InvalidInput)):
        ledger.submit_all([new("a"), no_text, new("c")])

    assert ledger.jobs() == []


def test_an_ended_job_does_not_stand_in_the_way_of_the_next(ledger: Ledger):
    first, _ = ledger.submit(new())
    ledger.request_cancel(first.id)

    second, created = ledger.submit(new())

    assert created
    assert second.id != first.id


def test_the_oldest_job_of_a_wanted_kind_is_claimed_first(ledger: Ledger):
    jobs = [ledger.submit(new(key, kind))[0] for key, kind in [("a", "eval"), ("b", "merge"), ("c", "merge")]]

    claimed = [ledger.claim("w", 10, kinds=["merge"]), ledger.claim("w", 10), ledger.claim("w", 10, kinds=["eval"])]

    assert [job.id if job else None for job in claimed] == [jobs[1].id, jobs[0].id, None]
    assert (claimed[0].attempt, claimed[0].owner, claimed[0].state) == (1, "w", JobState.RUNNING)
    assert claimed[0].lease_until == pytest.approx(claimed[0].started_at + 10, abs=0.1)


def test_the_mark_of_a_recall_does_not_wait_behind_what_was_queued_before(ledger: Ledger):
    kinds = ["eval", "merge", "recall", "eval", "recall"]
    jobs = [ledger.submit(new(str(number), kind))[0] for number, kind in enumerate(kinds)]

    not_for_me = ledger.claim("w", 10, kinds=["merge", "eval"])
    claimed = [ledger.claim("w", 10) for _ in range(4)]

    assert [job.id for job in (not_for_me, *claimed) if job] == [jobs[k].id for k in (0, 2, 4, 1, 3)]


def test_renewal_extends_the_lease_and_carries_progress(ledger: Ledger):
    job, _ = ledger.submit(new())
    ledger.claim("w", 10)

    renewed = ledger.renew(job.id, 1, 60, Progress("merge", 3, 96))
    kept = ledger.renew(job.id, 1, 60)

    assert renewed.progress == kept.progress == Progress("merge", 3, 96)
    assert renewed.lease_until > renewed.started_at + 50


@pytest.mark.parametrize("state", [JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED])
def test_every_end_is_recorded_with_its_reason(ledger: Ledger, state: JobState):
    job, _ = ledger.submit(new())
    ledger.claim("w", 10)
    error = {"code": "corrupt", "message": "bytes differ", "hint": "verify"} if state is JobState.FAILED else None

    assert ledger.finish(job.id, 1, state, error=error, result={"version_id": "v"})

    ended = ledger.job(job.id)
    assert (ended.state, ended.error, ended.result, ended.lease_until) == (state, error, {"version_id": "v"}, None)
    assert ended.ended_at >= ended.started_at


def test_a_worker_that_was_taken_for_dead_can_change_nothing(ledger: Ledger):
    job, _ = ledger.submit(new())
    zombie = ledger.claim("slow", OVER)
    ledger.reap()
    fast = ledger.claim("fast", 10)

    refused = [
        ledger.renew(job.id, zombie.attempt, 10, Progress("merge", 9, 9)) is None,
        not ledger.finish(job.id, zombie.attempt, JobState.SUCCEEDED, result={"version_id": "stale"}),
        not ledger.finish(job.id, zombie.attempt, JobState.FAILED, error={"code": "x", "message": "y"}),
        not ledger.give_back(job.id, zombie.attempt),
        not ledger.give_back(job.id, zombie.attempt, spent=True),
    ]

    assert all(refused)
    assert ledger.job(job.id) == fast


def test_nothing_moves_once_a_job_has_ended(ledger: Ledger):
    job, _ = ledger.submit(new())
    ledger.claim("w", 10)
    ledger.finish(job.id, 1, JobState.SUCCEEDED)
    ended = ledger.job(job.id)

    assert ledger.renew(job.id, 1, 10) is None
    assert not ledger.finish(job.id, 1, JobState.FAILED)
    assert not ledger.give_back(job.id, 1)
    with pytest.raises(Conflict, match="succeeded"):
        ledger.request_cancel(job.id)
    with pytest.raises(Conflict, match="succeeded"):
        ledger.retry(job.id)
    assert ledger.job(job.id) == ended


def test_an_expired_lease_is_queued_again_until_the_attempts_are_used_up(ledger: Ledger):
    job, _ = ledger.submit(new())
    seen = []
    for _ in range(3):
        ledger.claim("w", OVER)
        (reaped,) = ledger.reap()
        seen.append((reaped.state, reaped.attempt))

    assert seen == [(JobState.QUEUED, 1), (JobState.QUEUED, 2), (JobState.FAILED, 3)]
    assert ledger.job(job.id).error["code"] == "worker_lost"
    assert ledger.reap() == []


def test_a_live_lease_is_reaped_only_by_who_knows_that_no_worker_lives(ledger: Ledger):
    job, _ = ledger.submit(new())
    ledger.claim("w", 60)

    assert ledger.reap() == []
    assert [each.id for each in ledger.reap(abandoned=True)] == [job.id]
    assert ledger.job(job.id).state is JobState.QUEUED


def test_a_job_that_was_given_back_keeps_its_number_of_attempts(ledger: Ledger):
    job, _ = ledger.submit(new())
    ledger.claim("w", 10)
    assert ledger.give_back(job.id, 1)
    assert attempts_left(ledger.job(job.id)) == 3

    ledger.claim("w", 10)
    assert ledger.give_back(job.id, 2, spent=True)
    assert attempts_left(ledger.job(job.id)) == 2


def test_cancel_ends_a_queued_job_and_flags_a_running_one(ledger: Ledger):
    queued, _ = ledger.submit(new("a"))
    assert ledger.request_cancel(queued.id).state is JobState.CANCELLED

    running, _ = ledger.submit(new("b"))
    ledger.claim("w", 10)
    flagged = ledger.request_cancel(running.id)

    assert (flagged.state, flagged.cancel_requested) == (JobState.RUNNING, True)
    assert ledger.renew(running.id, 1, 10).cancel_requested


def test_a_job_whose_worker_died_after_the_wish_to_cancel_is_cancelled(ledger: Ledger):
    job, _ = ledger.submit(new())
    ledger.claim("w", OVER)
    ledger.request_cancel(job.id)

    (reaped,) = ledger.reap()

    assert reaped.state is JobState.CANCELLED


def test_retry_gives_all_attempts_again_and_never_repeats_a_fencing_number(ledger: Ledger):
    job, _ = ledger.submit(new())
    ledger.claim("w", 10)
    ledger.finish(job.id, 1, JobState.FAILED, error={"code": "x", "message": "y"})

    again = ledger.retry(job.id)

    assert (again.state, again.error, again.ended_at, attempts_left(again)) == (JobState.QUEUED, None, None, 3)
    assert ledger.claim("w", 10).attempt == 2


def test_retry_is_refused_while_the_same_job_is_live(ledger: Ledger):
    old, _ = ledger.submit(new())
    ledger.request_cancel(old.id)
    live, _ = ledger.submit(new())

    with pytest.raises(Conflict, match=live.id):
        ledger.retry(old.id)


def test_unknown_jobs_are_said_to_be_unknown(ledger: Ledger):
    assert ledger.job("nobody") is None
    for ask in (ledger.request_cancel, ledger.retry):
        with pytest.raises(NotFound, match="nobody"):
            ask("nobody")


def test_jobs_are_listed_newest_first_by_state_and_kind(ledger: Ledger):
    ids = [ledger.submit(new(key, kind))[0].id for key, kind in [("a", "merge"), ("b", "eval"), ("c", "merge")]]
    ledger.request_cancel(ids[0])

    assert [job.id for job in ledger.jobs()] == ids[::-1]
    assert [job.id for job in ledger.jobs(states=[JobState.QUEUED], kind="merge")] == [ids[2]]
    assert [job.id for job in ledger.jobs(limit=1)] == [ids[2]]
    assert [job.id for job in ledger.jobs(limit=1, before=ids[2])] == [ids[1]]
    assert ledger.jobs(before=ids[0]) == []


def test_the_history_of_a_job_is_numbered_and_can_be_read_on(ledger: Ledger):
    job, _ = ledger.submit(new())
    ledger.claim("w", 10)
    ledger.record(job.id, "log", "module 3 of 96")
    ledger.finish(job.id, 1, JobState.FAILED, error={"code": "x", "message": "no space left"})

    events = ledger.events(job.id)

    assert [(event.seq, event.kind) for event in events] == [(1, "queued"), (2, "running"), (3, "log"), (4, "failed")]
    assert events[3].message == "no space left"
    assert ledger.events(job.id, after=3) == events[3:]


def attempts_left(job: Job) -> int:
    return job.max_attempts - job.attempt

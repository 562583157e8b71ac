"""Rules around the queue that are no single call of the ledger, and what a kind of job has to provide.

A kind of job is a `JobHandler`. The supervisor calls `begin`, gives the task to a child process, and calls `finish`
with what the child answered; all three happen under one attempt, and everything that writes is fenced by it. A handler
must be safe to run again from the start, whatever was done by an attempt before.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..crashpoints import reached
from ..domain.errors import Conflict, InvalidInput, JobCancelled, JobFailed, NotAllowed, NotFound, Refused
from ..domain.job import ENDED, LIVE, Job, JobState, NewJob
from ..domain.worker import QUEUES
from ..patience import timed_out
from ..ports import Doorbell, Ledger

# Between two looks at a followed row; a look costs 0.3 ms.
_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 0.02, 0.2


@dataclass(frozen=True, slots=True)
class Task:
    """Work for a child process. `body` is the JSON that the runner reads, `out` the empty folder that it may fill."""

    body: Mapping[str, Any]
    out: Path


@dataclass(frozen=True, slots=True)
class Done:
    """There is nothing left to do: the job's result is known."""

    result: Mapping[str, Any]


class JobHandler(Protocol):
    """One kind of job, without the child. Errors of `domain/errors.py` are final: the job fails with them at once."""

    def begin(self, job: Job) -> AbstractContextManager[Task | Done]:
        """Make the task. Open until `finish` returned: parents' folders and the stage folder are given back on exit."""
        ...

    def finish(self, job: Job, task: Task, result: Mapping[str, Any]) -> Mapping[str, Any]:
        """Record what the child answered; returns the job's result.

        Passing `job=(job.id, job.attempt)` to `Ledger.add_version` ends the job in the same transaction, and queues the
        jobs that follow (`then`) in it too; the supervisor ends a job that is still running with what is returned here.
        """
        ...


def find_job(ledger: Ledger, job_id: str) -> Job:
    """The job, or `NotFound`."""
    job = ledger.job(job_id)
    if job is None:
        raise NotFound(f"there is no job {job_id}", hint="adapterctl jobs ls")
    return job


def parse_states(text: str | None) -> tuple[JobState, ...]:
    """States from `failed`, `queued,running`, `live` or `ended`; none for None."""
    groups: dict[str, tuple[JobState, ...]] = {state.value: (state,) for state in JobState}
    groups |= {"live": tuple(sorted(LIVE)), "ended": tuple(sorted(ENDED))}
    words = [word.strip() for word in text.split(",")] if text else []
    unknown = [word for word in words if word not in groups]
    if unknown:
        raise InvalidInput(f"job state {unknown[0]!r} is unknown", hint=f"known: {', '.join(groups)}")
    return tuple(state for word in words for state in groups[word])


def raise_for(job: Job) -> None:
    """Raise what ended the job: `JobCancelled`, the refusal that it met, or `JobFailed`; nothing where it succeeded."""
    if job.state is JobState.CANCELLED:
        raise JobCancelled(f"job {job.id} was cancelled", hint=f"adapterctl jobs retry {job.id}")
    if job.state is not JobState.FAILED:
        return
    error = job.error or {}
    message, hint = error.get("message", "no reason was recorded"), error.get("hint", "")
    refusal = next((kind for kind in _refusals() if kind.code == error.get("code")), None)
    if refusal is not None:
        raise refusal(message, hint=hint)
    raise JobFailed(f"job {job.id} failed: {message}", hint=hint or f"adapterctl jobs logs {job.id}")


def submit(ledger: Ledger, bell: Doorbell, new: NewJob) -> tuple[Job, bool]:
    """Queue a job and wake a worker; or join the live job with the same key, and False.

    The row is committed before anyone is told, so a lost ring delays the job and loses nothing.
    """
    job, created = commit(ledger, [new])[0]
    bell.ring(job.id)
    return job, created


def ask(ledger: Ledger, bell: Doorbell, new: NewJob) -> Job:
    """`submit` for somebody who waits for it. Raises `Conflict` as `check_stays` does."""
    job, _ = submit(ledger, bell, new)
    check_stays(job)
    return job


def check_stays(job: Job) -> None:
    """Raise `Conflict` where a job that was joined is being cancelled: whoever joined would be cancelled with it."""
    if job.cancel_requested:
        raise Conflict(
            f"job {job.id} does the same, and is being cancelled",
            hint=f"ask again when it has ended: adapterctl jobs wait {job.id}",
        )


def commit(ledger: Ledger, new: Sequence[NewJob]) -> list[tuple[Job, bool]]:
    """`submit` for each of these jobs, in one transaction; whoever calls wakes the workers."""
    if not new:
        return []
    queued = ledger.submit_all(new)
    reached("submit.committed")
    return queued


def retry(ledger: Ledger, bell: Doorbell, job_id: str) -> Job:
    """Queue an ended job again and wake a worker."""
    job = ledger.retry(job_id)
    bell.ring(job.id)
    return job


def follow(
    ledger: Ledger, bell: Doorbell, job_id: str, *, timeout_s: float | None = None, silence_s: float = 15.0
) -> Iterator[Job]:
    """Yield the job now and whenever it changes, the ended one last. Leaving early stops nothing.

    A live job that shows no sign of life for `silence_s` has lost its worker, or its ring: then we ring again.
    Raises `NotFound`, and `WaitTimedOut` after `timeout_s`.
    """
    started = changed = time.monotonic()
    seen: Job | None = None
    pause_s = _SHORTEST_PAUSE_S
    while True:
        job, now = find_job(ledger, job_id), time.monotonic()
        if job != seen:
            yield job
            seen, changed, pause_s = job, now, _SHORTEST_PAUSE_S
        if job.ended:
            return
        if timeout_s is not None and now - started >= timeout_s:
            raise timed_out(job, timeout_s)
        if now - changed >= silence_s:
            with suppress(NotAllowed):  # who may only read cannot wake anyone, but may wait
                bell.ring(job_id)
            changed = now
        time.sleep(pause_s)
        pause_s = min(pause_s * 1.5, _LONGEST_PAUSE_S)


def unattended(ledger: Ledger, *, for_s: float) -> Job | None:
    """A job that its worker left, or that has been queued for so long, while nobody works; None where somebody does.

    Who follows a job rings for it again. One that nobody follows would wait until the next is asked for.
    """
    now = ledger.now()
    running = ledger.jobs(states=[JobState.RUNNING])
    if any(job.lease_until is not None and job.lease_until > now for job in running):
        return None
    return next(iter([*running, *ledger.waiting(QUEUES, for_s=for_s)]), None)


def _refusals() -> Iterator[type[Refused]]:
    waiting: list[type[Refused]] = [Refused]
    while waiting:
        kind = waiting.pop()
        yield kind
        waiting += kind.__subclasses__()

"""Where a job stands: its states, the moves between them, and the facts of one attempt.

Pure: no clock, no database. The ledger performs each move as one conditional UPDATE guarded by `attempt`, the fencing
number; a move that is not in `MOVES` never happens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

from .worker import Queue

JobKind = Literal["merge", "eval", "tune", "verify", "recall", "rebuild"]


#: Claimed before all others, however long those have waited: they take milliseconds, and until they ran MLflow's pages
#: recommend what the ledger knows to be recalled.
URGENT: tuple[JobKind, ...] = ("recall",)


class JobState(StrEnum):
    """`cancel_requested` is a flag on a running job, not a state: the job ends when its child stopped."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


LIVE = frozenset({JobState.QUEUED, JobState.RUNNING})
ENDED = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED})
MOVES: Mapping[JobState, frozenset[JobState]] = {
    JobState.QUEUED: frozenset({JobState.RUNNING, JobState.CANCELLED}),
    # back to queued: the lease expired, or a worker that shuts down gives the job back
    JobState.RUNNING: frozenset({JobState.QUEUED, JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED}),
    JobState.SUCCEEDED: frozenset(),
    JobState.FAILED: frozenset({JobState.QUEUED}),
    JobState.CANCELLED: frozenset({JobState.QUEUED}),
}

DEFAULT_MAX_ATTEMPTS = 3


@dataclass(frozen=True, slots=True)
class NewJob:
    """A job as submitted. `key` deduplicates live jobs of one kind (a merge: adapter id and recipe digest)."""

    kind: JobKind
    key: str
    title: str
    spec: Mapping[str, Any]
    created_by: str
    max_attempts: int = DEFAULT_MAX_ATTEMPTS
    queue: Queue = "cpu"


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the running attempt is: `done` of `total` units of `stage` (merging: modules)."""

    stage: str
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Job:
    """One durable unit of work. Times are seconds since the epoch by the database's clock.

    `error` holds code, message and hint of the failure; `result` the id of the version (merge) or a digest (eval).
    """

    id: str
    kind: JobKind
    key: str
    title: str
    spec: Mapping[str, Any]
    state: JobState
    attempt: int
    max_attempts: int
    created_by: str
    created_at: float
    updated_at: float
    owner: str | None = None
    lease_until: float | None = None
    started_at: float | None = None
    ended_at: float | None = None
    cancel_requested: bool = False
    progress: Progress | None = None
    error: Mapping[str, str] | None = None
    result: Mapping[str, Any] = field(default_factory=dict)
    queue: Queue = "cpu"

    @property
    def ended(self) -> bool:
        return self.state in ENDED


@dataclass(frozen=True, slots=True)
class QueueDepth:
    """How many jobs of a queue are in a state, and how long the oldest of them has been waiting (0 once it runs)."""

    queue: Queue
    state: JobState
    jobs: int
    oldest_s: float


@dataclass(frozen=True, slots=True)
class JobEvent:
    """One line of a job's history, numbered from 1 within the job."""

    job_id: str
    seq: int
    at: float
    kind: str
    message: str


@dataclass(frozen=True, slots=True)
class LogPiece:
    """Some of what a job's attempts wrote: whole lines, numbered from 1 within the job."""

    seq: int
    text: str

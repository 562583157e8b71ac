"""Rules around the queue that are no single call of the ledger, and what a kind of job has to provide.

A kind of job is a `JobHandler`. The supervisor calls `begin`, gives the task to a child process, and calls `finish`
with what the child answered; all three happen under one attempt, and everything that writes is fenced by it. A handler
must be safe to run again from the start, whatever was done by an attempt before.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..domain.job import Job


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

        Passing `job=(job.id, job.attempt)` to `Ledger.add_version` ends the job in the same transaction; otherwise the
        supervisor ends it with what is returned here.
        """
        ...

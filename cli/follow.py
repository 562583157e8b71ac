"""Waiting for a job: a progress line on a terminal, the job's own end as the outcome, and leaving without stopping it.

The work happens in another process; nothing that happens here can harm it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from sys import stderr
from threading import Timer
from typing import TYPE_CHECKING, Protocol

import typer

from ..registry.domain.errors import NotFound
from ..registry.domain.refs import Ref, parse_ref
from .connect import Session
from .output import INTERRUPTED, Output, is_terminal, printable

if TYPE_CHECKING:
    from ..registry.api import RegistryAPI, VersionView
    from ..registry.domain.job import Job

#: A worker that is alive and idle takes a job within `ring_again_s`; a supervisor is started within 15 s.
QUEUED_S = 30.0


def follow(session: Session, registry: RegistryAPI, job_id: str, *, timeout_s: float | None = None) -> Job:
    """Wait until the job ended, and return it when it succeeded.

    Raises `JobFailed`, `JobCancelled`, `WaitTimedOut`, or the refusal that ended the job. Ctrl-C leaves with exit
    code 130 and says how to come back.
    """
    # deferred: help waits for nothing
    from ..registry.domain.job import JobState
    from ..registry.services.schedule import raise_for

    try:
        with progress_line(session.out) as update, _no_worker(session.out, job_id) as taken:
            for job in registry.follow(job_id, timeout_s=timeout_s, tell=session.out.warn):
                if job.state is not JobState.QUEUED:
                    taken()
                at = job.progress
                if at is None:
                    update(job.state.value)
                else:
                    update(at.stage, at.done, at.total, f"{at.done}/{at.total}" if at.total else "")
    except KeyboardInterrupt:
        session.out.say(f"left; the job goes on. Come back with: adapterctl jobs wait {job_id}")
        raise typer.Exit(INTERRUPTED) from None
    raise_for(job)
    return job


@contextmanager
def _no_worker(out: Output, job_id: str) -> Iterator[Callable[[], None]]:
    """Say once that a job is still queued after a while, unless what this gives was called: a worker has taken it."""
    told = (
        f"job {job_id} is queued for {QUEUED_S:g} s now: `adapterctl jobs ls --state live` shows what is before it, "
        "`adapterctl doctor` whether anybody works"
    )
    timer = Timer(QUEUED_S, out.warn, [told])
    timer.daemon = True
    timer.start()
    try:
        yield timer.cancel
    finally:
        timer.cancel()


def version_of(registry: RegistryAPI, name: str, job: Job) -> VersionView:
    """The version that a merge job made."""
    made = job.result.get("version_id")
    with suppress(NotFound):
        newest = registry.version(Ref(name))
        if newest.id == made:  # nearly always
            return newest
    found = next((version for version in registry.versions(name) if version.id == made), None)
    if found is None:
        raise NotFound(f"job {job.id} names no version of {name}", hint=f"adapterctl jobs show {job.id}")
    return registry.version(parse_ref(found.ref))


class Update(Protocol):
    def __call__(self, stage: str, done: int = 0, total: int = 0, count: str = "") -> None:
        """Show how far a stage is; without a total that it is going on."""


@contextmanager
def progress_line(out: Output) -> Iterator[Update]:
    """A line on stderr that is gone at the end; nothing where nobody watches."""
    if not is_terminal(stderr) or out.format == "name":
        yield _show_nothing
        return
    # deferred: costs 0.1 s, and only waiting on a terminal needs it
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    parts = (
        SpinnerColumn(style="cyan"),
        TextColumn("{task.description}", markup=False),
        BarColumn(32, complete_style="cyan", finished_style="cyan", pulse_style="cyan"),
        TextColumn("{task.fields[count]}", markup=False),
        TimeElapsedColumn(),
    )
    with Progress(*parts, console=Console(stderr=True, no_color=not out.color), transient=True) as progress:
        line = progress.add_task("queued", total=None, count="")

        def update(stage: str, done: int = 0, total: int = 0, count: str = "") -> None:
            progress.update(line, description=printable(stage), completed=done, total=total or None, count=count)

        yield update


def _show_nothing(stage: str, done: int = 0, total: int = 0, count: str = "") -> None:
    """Where nobody watches."""

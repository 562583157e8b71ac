"""Waiting for a job: a progress line on a terminal, the job's own end as the outcome, and leaving without stopping it.

The work happens in another process; nothing that happens here can harm it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from sys import stderr
from typing import TYPE_CHECKING

import typer

from ..registry.domain.errors import NotFound
from ..registry.domain.refs import parse_ref
from .connect import Session
from .output import INTERRUPTED, Output, is_terminal, printable

if TYPE_CHECKING:
    from ..registry.api import RegistryAPI, VersionView
    from ..registry.domain.job import Job


def follow(session: Session, registry: RegistryAPI, job_id: str, *, timeout_s: float | None = None) -> Job:
    """Wait until the job ended, and return it when it succeeded.

    Raises `JobFailed`, `JobCancelled`, `WaitTimedOut`, or the refusal that ended the job. Ctrl-C leaves with exit
    code 130 and says how to come back.
    """
    from ..registry.services.schedule import raise_for  # deferred: help waits for nothing

    show = (
        _progress_line(session.out)
        if is_terminal(stderr) and session.out.format != "name"
        else nullcontext(_show_nothing)
    )
    try:
        with show as update:
            for job in registry.follow(job_id, timeout_s=timeout_s, tell=session.out.warn):
                update(job)
    except KeyboardInterrupt:
        session.out.say(f"left; the job goes on. Come back with: adapterctl jobs wait {job_id}")
        raise typer.Exit(INTERRUPTED) from None
    raise_for(job)
    return job


def version_of(registry: RegistryAPI, name: str, job: Job) -> VersionView:
    """The version that a merge job made."""
    made = job.result.get("version_id")
    found = next((version for version in registry.versions(name) if version.id == made), None)
    if found is None:
        raise NotFound(f"job {job.id} names no version of {name}", hint=f"adapterctl jobs show {job.id}")
    return registry.version(parse_ref(found.ref))


def _show_nothing(job: Job) -> None:
    """Where nobody watches."""


@contextmanager
def _progress_line(out: Output) -> Iterator[Callable[[Job], None]]:
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

        def update(job: Job) -> None:
            at = job.progress
            if at is None:
                progress.update(line, description=job.state.value)
                return
            count = f"{at.done}/{at.total}" if at.total else ""
            progress.update(
                line, description=printable(at.stage), completed=at.done, total=at.total or None, count=count
            )

        yield update

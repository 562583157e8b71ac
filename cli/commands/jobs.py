"""For those who watch the queue: jobs ls, show, logs, wait, cancel, retry."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ...registry.domain.errors import JobCancelled, JobFailed, Refused, Unavailable, WaitTimedOut
from .. import parse, views
from ..complete import complete_jobs
from ..connect import Session, add_verbs
from ..follow import follow
from ..output import INTERRUPTED, printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ...registry.api import RegistryAPI
    from ...registry.domain.job import Job, JobEvent, LogPiece

#: How many are listed where nobody says: of those that may have ended.
SOME = 100
JobId = Annotated[str, typer.Argument(metavar="ID", help="A job.", autocompletion=complete_jobs)]
JobIds = Annotated[list[str], typer.Argument(metavar="ID", help="Jobs.", autocompletion=complete_jobs)]


def add_to(app: typer.Typer) -> None:
    jobs = typer.Typer(
        help="List, watch, cancel and retry the queued work.", no_args_is_help=True, rich_markup_mode=None
    )
    add_verbs(
        jobs,
        {"ls": ls, "show": show, "logs": logs, "wait": wait, "cancel": cancel, "retry": retry},
    )
    app.add_typer(jobs, name="jobs", rich_help_panel="The registry")


def ls(
    session: Session,
    state: Annotated[
        str | None, typer.Option(metavar="STATE", help="queued, running, succeeded, failed, cancelled, live or ended.")
    ] = None,
    kind: Annotated[str | None, typer.Option(metavar="KIND", help="merge, eval, tune or verify.")] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Jobs at most, the newest first.  [default: 100, or all that are not ended]"
        ),
    ] = None,
) -> None:
    """List jobs.

    Example: adapterctl jobs ls --state live -q | xargs adapterctl jobs wait
    """
    # all of those: whoever waits for them, or cancels them, means each
    most = min(limit or (parse.EVERY if state in ("live", "queued", "running") else SOME), parse.EVERY)
    found = session.registry(readonly=True).jobs(state=state, kind=kind, limit=most)
    _list(session, found)
    if limit is None and len(found) == SOME:
        session.out.say(f"the newest {SOME}; --limit N for more")


def show(session: Session, job_id: JobId) -> None:
    """Show a job.

    Example: adapterctl jobs show "$(adapterctl jobs ls --limit 1 -q)"
    """
    registry = session.registry(readonly=True)
    job = registry.job(job_id)

    def text() -> str:
        told = views.job_text(job, session.out)
        if job.kind != "tune" or job.state != "succeeded":
            return told
        return f"{told}\n\n{views.tune_text(registry.tuned(job.id), session.out, explain=True)}"

    session.out.data(job, text=text, names=[job.id])


def logs(
    session: Session,
    job_id: JobId,
    follow_: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job ends.")] = False,
) -> None:
    """Print what happened to a job, then what its attempts wrote.

    JSON holds what happened alone.

    Example: adapterctl jobs logs -f "$(adapterctl jobs ls --limit 1 -q)"
    """
    registry = session.registry(readonly=True)
    events = registry.job_events(job_id)
    if not follow_:
        session.out.data(
            events,
            text=lambda: "\n".join([*map(views.event_text, events), *_lines(registry, job_id)]) or "nothing yet",
            names=[str(event.seq) for event in events],
        )
        return
    seen, written = _print_events(session, events, 0), 0
    try:
        for job in registry.follow(job_id, tell=session.out.warn):
            try:
                seen = _print_events(session, registry.job_events(job_id, after=seen), seen)
                written = _print_log(session, registry.job_log(job_id, after=written), written)
            except Unavailable:  # what is missing now is printed at the next look
                if job.ended:
                    raise
    except KeyboardInterrupt:
        session.out.say("left; the job goes on")
        raise typer.Exit(INTERRUPTED) from None


def wait(
    session: Session,
    job_ids: JobIds,
    timeout: Annotated[str | None, typer.Option(metavar="TIME", help="Wait no longer for each, e.g. 5m.")] = None,
) -> None:
    """Wait until jobs ended.

    The exit code tells how: 0 succeeded, 6 failed, 7 cancelled, 8 not yet. Of several jobs the
    first that did not succeed decides.

    Example: adapterctl jobs ls --state live -q | xargs adapterctl jobs wait
    """
    timeout_s = parse.duration_s(timeout)
    registry = session.registry()
    codes = []
    registry.job(job_ids[0])  # a server that was never there is told at once
    for job_id in job_ids:
        try:
            follow(session, registry, job_id, timeout_s=timeout_s)
        except (JobFailed, JobCancelled, WaitTimedOut, Refused) as error:
            codes.append(session.out.fail(error))
    _list(session, [registry.job(job_id) for job_id in job_ids])
    if codes:
        raise typer.Exit(codes[0])


def cancel(session: Session, job_ids: JobIds) -> None:
    """Cancel jobs.

    Queued ones end at once, running ones between two steps of their work.

    Example: adapterctl jobs ls --state queued -q | xargs adapterctl jobs cancel
    """
    registry = session.registry()
    _list(session, [registry.cancel(job_id) for job_id in job_ids])


def retry(session: Session, job_ids: JobIds) -> None:
    """Queue failed or cancelled jobs again.

    Example: adapterctl jobs ls --state failed -q | xargs adapterctl jobs retry
    """
    registry = session.registry()
    _list(session, [registry.retry(job_id) for job_id in job_ids])


def _list(session: Session, jobs: Sequence[Job]) -> None:
    session.out.data(jobs, text=lambda: views.jobs_table(jobs, session.out), names=[job.id for job in jobs])


def _lines(registry: RegistryAPI, job_id: str) -> list[str]:
    """What a job's attempts wrote, fit for a terminal: it may come from files of others."""
    return [printable(line) for piece in registry.job_log(job_id) for line in piece.text.splitlines()]


def _print_log(session: Session, pieces: Sequence[LogPiece], written: int) -> int:
    for piece in pieces:
        text = "\n".join(map(printable, piece.text.splitlines()))
        session.out.line(piece, text=text, name=str(piece.seq))
        written = piece.seq
    return written


def _print_events(session: Session, events: Sequence[JobEvent], seen: int) -> int:
    for event in events:
        session.out.line(event, text=views.event_text(event), name=str(event.seq))
        seen = event.seq
    return seen

"""For those who ask what a version can do, and what a merge kept of its parents."""

from __future__ import annotations

from typing import Annotated

import typer

from ...registry.domain.refs import parse_ref
from .. import parse, views
from ..complete import complete_names, complete_refs
from ..connect import Session, add_verbs
from ..follow import follow
from ..output import printable

GROUP = "Evaluation and stages"


def add_to(app: typer.Typer) -> None:
    add_verbs(app, {"eval": evaluate}, group=GROUP)
    suite = typer.Typer(help="Say which suite judges an adapter.", no_args_is_help=True, rich_markup_mode=None)
    add_verbs(suite, {"set": suite_set})
    app.add_typer(suite, name="suite", rich_help_panel=GROUP)


def evaluate(
    session: Session,
    refs: Annotated[list[str], typer.Argument(metavar="REF", help="Versions.", autocompletion=complete_refs)],
    suite: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE", help="A suite; may be repeated.  [default: those of the adapter and its parents]"),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, metavar="N", help="Samples a task at most.")] = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait for the result, or print the job's id.")] = True,
    timeout: Annotated[str | None, typer.Option(metavar="TIME", help="Wait no longer, e.g. 90s, 5m, 1.5h.")] = None,
) -> None:
    """Evaluate versions and tell what merges kept.

    Base and parents are evaluated beside them. Results that exist for the same bytes, suite and samples are used again.

    Example: adapterctl eval translate-chat:v1 --limit 100
    """
    timeout_s = parse.duration_s(timeout)
    wanted = [parse_ref(ref) for ref in refs]
    registry = session.registry()
    job = registry.evaluate(wanted, suites=suite or (), limit=limit)
    if not wait:
        session.out.say(f"queued; wait for it with: adapterctl jobs wait {job.id}")
        session.out.data(job, text=lambda: job.id, names=[job.id])
        return
    follow(session, registry, job.id, timeout_s=timeout_s)
    tables = [registry.retention(ref) for ref in wanted]
    session.out.data(
        tables,
        text=lambda: "\n\n".join(views.retention_text(table, session.out) for table in tables),
        names=[table.ref for table in tables],
    )


def suite_set(
    session: Session,
    name: Annotated[str, typer.Argument(metavar="NAME", help="An adapter.", autocompletion=complete_names)],
    file: Annotated[str, typer.Argument(metavar="FILE", help="A suite, or the name of a shipped one.")],
) -> None:
    """Set the suite that judges an adapter and its merges.

    Example: adapterctl suite set translate translate.yaml
    """
    session.registry().set_suite(name, file)
    session.out.say(f"{printable(name)} is judged by {printable(file)}")
    session.out.data({"name": name, "suite": file}, text=lambda: name, names=[name])

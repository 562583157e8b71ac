"""For those who would rather have their weights searched than guess them."""

from __future__ import annotations

from typing import Annotated

import typer

from ...registry.domain.errors import InvalidInput, JobCancelled, JobFailed, Refused
from ...registry.domain.refs import parse_ref
from .. import parse, views
from ..complete import complete_names, complete_refs
from ..connect import Session, add_verbs
from ..follow import follow, version_of
from .evals import BaseDtype
from .merge import Name

GROUP = "Merging"


def add_to(app: typer.Typer) -> None:
    add_verbs(app, {"tune": tune}, group=GROUP)


def tune(
    session: Session,
    parents: Annotated[
        list[str], typer.Argument(metavar="REF", help="Two versions or more.", autocompletion=complete_refs)
    ],
    suite: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE", help="What to keep; may be repeated.  [default: the parents' suites]"),
    ] = None,
    budget: Annotated[int, typer.Option(min=1, metavar="N", help="Full evaluations at most.")] = 24,
    into: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="The adapter it becomes.  [default: parents, joined]", autocompletion=complete_names
        ),
    ] = None,
    methods: Annotated[str, typer.Option(metavar="NAME,NAME", help="Merge methods to choose from.")] = "cat,svd",
    rank: Annotated[
        list[int] | None,
        typer.Option(min=1, metavar="R", help="Rank for methods with a choice; may be repeated."),
    ] = None,
    layer_groups: Annotated[
        int, typer.Option(min=1, metavar="N", help="Runs of layers, each with weights of its own.")
    ] = 1,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Seed of the proposals.")] = 0,
    limit: Annotated[int | None, typer.Option(min=1, metavar="N", help="Samples a task, both halves together.")] = None,
    base_dtype: BaseDtype = None,
    register: Annotated[int, typer.Option(min=0, metavar="K", help="Make versions of the K best.")] = 0,
    explain: Annotated[bool, typer.Option("--explain", help="Tell why the winner won.")] = False,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait for the result, or print the job's id.")] = True,
    timeout: Annotated[str | None, typer.Option(metavar="TIME", help="Wait no longer, e.g. 90s, 5m, 1.5h.")] = None,
    name: Name = None,
) -> None:
    """Search the weights that keep most of every parent.

    No candidate is merged to disk. Half of each task's samples decide, the other half gives the figure that is told.
    An interrupted search goes on: adapterctl jobs retry.

    Example: adapterctl tune translate:v3 chat:v5 --limit 80 --explain
    """
    # deferred: help searches nothing
    from ...registry.domain.tuning import TuneRequest

    timeout_s = parse.duration_s(timeout)
    names = tuple(name.strip() for name in methods.split(",") if name.strip())
    if not names:
        raise InvalidInput("--methods names none", hint="write --methods cat,svd")
    request = TuneRequest(
        parents=tuple(map(parse_ref, parents)),
        into=parse.into(into, name),
        suites=tuple(suite or ()),
        methods=names,
        ranks=tuple(rank or ()),
        budget=budget,
        seed=seed,
        limit=limit,
        keep=register,
        layer_groups=layer_groups,
        base_dtype=base_dtype,
    )
    registry = session.registry()
    job = registry.tune(request)
    if not wait:
        session.out.say(f"queued; wait for it with: adapterctl jobs wait {job.id}")
        session.out.data(job, text=lambda: job.id, names=[job.id])
        return
    follow(session, registry, job.id, timeout_s=timeout_s)
    found = registry.tuned(job.id)
    for job_id in found.jobs:
        try:
            made = follow(session, registry, job_id, timeout_s=timeout_s)
            session.out.say(f"kept as {version_of(registry, found.into, made).ref}")
            for evaluation in made.result.get("jobs", ()):
                follow(session, registry, evaluation, timeout_s=timeout_s)
        except (JobFailed, JobCancelled, Refused) as error:
            session.out.warn(f"job {job_id}: {error.message}")
    session.out.data(found, text=lambda: views.tune_text(found, session.out, explain=explain), names=[job.id])

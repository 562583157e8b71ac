"""For those who ask what a version can do, and what a merge kept of its parents."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ...registry.domain.refs import parse_ref
from .. import parse, views
from ..complete import complete_names, complete_refs
from ..connect import Session, add_verbs
from ..follow import follow
from ..output import printable

GROUP = "Evaluation and stages"

BaseDtype = Annotated[
    str | None,
    typer.Option(
        metavar="TYPE", help="The base in float32, nf4 (4 bits, as QLoRA) or nf4-dq.  [default: setting eval_dtype]"
    ),
]


class OrRun(TyperGroup):
    """`eval REF` is `eval run REF`: what does not begin with the name of a command goes to `run`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, *ctx.help_option_names):
            args = ["run", *args]
        return super().parse_args(ctx, args)

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        (refs,) = [param for param in self.commands["run"].params if param.name == "refs"]
        return [*super().shell_complete(ctx, incomplete), *refs.shell_complete(ctx, incomplete)]


def add_to(app: typer.Typer) -> None:
    evals = typer.Typer(
        cls=OrRun,
        help="Evaluate versions (`eval REF` is short for `eval run REF`), or take in results.",
        no_args_is_help=True,
        rich_markup_mode=None,
    )
    add_verbs(evals, {"run": evaluate, "import": import_})
    app.add_typer(evals, name="eval", rich_help_panel=GROUP)
    suite = typer.Typer(
        help="Say which suite judges an adapter, and look at suites.", no_args_is_help=True, rich_markup_mode=None
    )
    add_verbs(suite, {"set": suite_set, "ls": suite_ls, "show": suite_show, "check": suite_check})
    app.add_typer(suite, name="suite", rich_help_panel=GROUP)


def evaluate(
    session: Session,
    refs: Annotated[list[str], typer.Argument(metavar="REF", help="Versions.", autocompletion=complete_refs)],
    suite: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE", help="A suite; may be repeated.  [default: those of the adapter and its parents]"),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, metavar="N", help="Samples a task at most.")] = None,
    base_dtype: BaseDtype = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait for the result, or print the job's id.")] = True,
    timeout: Annotated[str | None, typer.Option(metavar="TIME", help="Wait no longer, e.g. 90s, 5m, 1.5h.")] = None,
) -> None:
    """Evaluate versions and tell what merges kept.

    Base and parents are evaluated beside them. Results that exist for the same bytes, suite and samples are used again.

    Example: adapterctl eval run translate-chat:v1 --limit 100
    """
    timeout_s = parse.duration_s(timeout)
    wanted = [parse_ref(ref) for ref in refs]
    registry = session.registry()
    job = registry.evaluate(wanted, suites=suite or (), limit=limit, base_dtype=base_dtype)
    if not wait:
        session.out.say(f"queued; wait for it with: adapterctl jobs wait {job.id}")
        session.out.data(job, text=lambda: job.id, names=[job.id])
        return
    follow(session, registry, job.id, timeout_s=timeout_s)
    tables = [registry.retention(ref) for ref in wanted]
    session.out.data(
        tables,
        text=lambda: "\n\n".join(
            views.retention_text(table, session.out, registry.version(ref))
            for table, ref in zip(tables, wanted, strict=True)
        ),
        names=[table.ref for table in tables],
    )


def import_(
    session: Session,
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A file, or runs:/ID of the registry's MLflow.")],
    ref: Annotated[str, typer.Option(metavar="REF", help="What was measured.", autocompletion=complete_refs)],
    replace: Annotated[bool, typer.Option("--replace", help="Other values that the version has of them.")] = False,
) -> None:
    """Take in results that were made elsewhere.

    Understood are lm-eval's output and {"metrics": {NAME: NUMBER}}. They become metrics of the version, marked by
    their source; a gate can ask for figures that the registry measured itself.

    Example: adapterctl eval import results.json --ref translate:v3
    """
    from ...registry.services.import_results import read_results  # deferred: help reads no files

    wanted = parse_ref(ref)
    told, metrics = (source, None) if source.startswith("runs:/") else read_results(Path(source).expanduser())
    found = session.registry().import_results(wanted, source=told, metrics=metrics, replace=replace)
    session.out.data(found, text=lambda: views.version_text(found, session.out), names=[found.ref])


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


def suite_ls(session: Session) -> None:
    """List the suites that the registry keeps, and which adapters they judge.

    Example: adapterctl suite ls
    """
    found = session.registry(readonly=True).suites()
    session.out.data(
        found, text=lambda: views.suites_table(found, session.out), names=[suite.digest for suite in found]
    )


def suite_show(
    session: Session,
    suite: Annotated[str, typer.Argument(metavar="SUITE", help="Its name, its digest or the beginning of that.")],
) -> None:
    """Show a kept suite: its tasks, settings and first rows.

    With -o json all of its rows.

    Example: adapterctl suite show translate
    """
    found = session.registry(readonly=True).suite(suite)
    session.out.data(found, text=lambda: views.suite_text(found, session.out), names=[found.digest])


def suite_check(
    session: Session, file: Annotated[Path, typer.Argument(metavar="FILE", help="A suite in YAML, with its data.")]
) -> None:
    """Check a suite and its rows; needs no model and no registry.

    Example: adapterctl suite check translate.yaml
    """
    from ...registry.services.suites import load_suite  # deferred: help reads no YAML

    found = load_suite(file)
    session.out.data(found, text=lambda: views.suite_text(found, session.out), names=[found.digest])

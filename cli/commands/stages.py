"""For those who decide which version serves: promote, rollback, demote, adopt, and the history of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...registry.domain.errors import InvalidInput
from ...registry.domain.refs import check_alias, check_name, parse_ref
from .. import views
from ..complete import complete_names, complete_refs, complete_stages
from ..connect import Session, add_verbs

if TYPE_CHECKING:
    from ...registry.api import StageEventView

GROUP = "Evaluation and stages"

Name = Annotated[str, typer.Argument(metavar="NAME", help="An adapter.", autocompletion=complete_names)]
Stage = Annotated[str, typer.Option(metavar="STAGE", help="The stage.", autocompletion=complete_stages)]
Reason = Annotated[str, typer.Option(metavar="TEXT", help="Why; it is kept in the history.")]


def add_to(app: typer.Typer) -> None:
    add_verbs(
        app,
        {"promote": promote, "rollback": rollback, "demote": demote, "adopt": adopt, "history": history},
        group=GROUP,
    )


def promote(
    session: Session,
    ref: Annotated[str, typer.Argument(metavar="REF", help="A version.", autocompletion=complete_refs)],
    to: Annotated[str, typer.Option(metavar="STAGE", help="The stage.", autocompletion=complete_stages)],
    reason: Reason = "",
) -> None:
    """Promote a version to a stage.

    MLflow's alias of that name follows, and its legacy stage for Staging and Production.

    Example: adapterctl promote translate-chat:v1 --to production --reason 'keeps both tasks'
    """
    _show(session, session.registry().promote(parse_ref(ref), to=check_alias(to), reason=reason))


def rollback(session: Session, name: Name, stage: Stage, reason: Reason = "") -> None:
    """Give a stage back to the version that held it before.

    Example: adapterctl rollback translate-chat --stage production --reason 'worse in chat'
    """
    _show(session, session.registry().rollback(check_name(name), stage=check_alias(stage), reason=reason))


def demote(session: Session, name: Name, stage: Stage, reason: Reason = "") -> None:
    """Empty a stage.

    Example: adapterctl demote translate-chat --stage staging
    """
    _show(session, session.registry().demote(check_name(name), stage=check_alias(stage), reason=reason))


def adopt(session: Session, name: Name, stage: Stage, reason: Reason = "") -> None:
    """Accept a stage that was moved in MLflow.

    Where the alias points now is recorded as a change of the stage.

    Example: adapterctl adopt translate-chat --stage production --reason 'moved in the MLflow UI'
    """
    _show(session, session.registry().adopt(check_name(name), stage=check_alias(stage), reason=reason))


def history(
    session: Session,
    name: Name,
    stage: Annotated[
        str | None, typer.Option(metavar="STAGE", help="Changes of this stage only.", autocompletion=complete_stages)
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Check that no row was edited, removed or added.")] = False,
    head: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A head kept elsewhere: finds a cut or rewritten history.")
    ] = None,
) -> None:
    """Show every change of an adapter's stages.

    Who, what, when and why. Exits with 1 when --verify finds something.

    Example: adapterctl history translate-chat --verify
    """
    if head is not None and not verify:
        raise InvalidInput("--head is for --verify", hint=f"adapterctl history {name} --verify --head {head}")
    kept = _read_head(head) if head is not None else None
    found = session.registry(readonly=True).history(check_name(name), stage=stage, verify=verify, head=kept)
    session.out.data(
        found, text=lambda: views.history_text(found, session.out), names=[event.hash for event in found.events]
    )
    if found.findings is None:
        return
    for finding in found.findings:
        session.out.warn(finding)
    if found.findings:
        raise typer.Exit(1)
    session.out.say(f"every link holds; head {found.head}")
    if kept is None:
        session.out.say("a cut or rewritten history shows only against a head kept elsewhere: --head FILE")


def _show(session: Session, event: StageEventView) -> None:
    session.out.data(event, text=lambda: views.stage_event_text(event), names=[event.ref] if event.ref else [])


def _read_head(path: Path) -> str:
    try:
        words = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(
            f"{path} cannot be read as a head: {error}", hint="keep the head that --verify prints"
        ) from error
    if len(words) != 1:
        raise InvalidInput(f"{path} holds {len(words)} words, a head is one", hint="keep the head that --verify prints")
    return words[0]

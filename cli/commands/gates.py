"""For those who say what a stage asks of a version, and for those who want to know it beforehand."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ...registry.domain.refs import check_alias, parse_ref
from .. import views
from ..complete import complete_refs, complete_stages
from ..connect import Session, add_verbs

GROUP = "Evaluation and stages"
REFUSED = 5

File = Annotated[Path, typer.Argument(metavar="FILE", help="Gates in YAML; docs/gates.md.")]


def add_to(app: typer.Typer) -> None:
    gate = typer.Typer(help="Say what a stage asks of a version.", no_args_is_help=True, rich_markup_mode=None)
    add_verbs(gate, {"set": set_, "show": show, "check": check, "lint": lint, "decision": decision})
    app.add_typer(gate, name="gate", rich_help_panel=GROUP)


def set_(session: Session, file: File) -> None:
    """Set the gates of this registry.

    They take the place of those before, for every adapter and stage; `gates: []` takes them all away.

    Example: adapterctl gate set gates.yaml
    """
    from ...registry.services.gates import load_gates  # deferred: help reads no YAML

    found = session.registry().set_gates(load_gates(file))
    session.out.data(found, text=lambda: views.gates_text(found, session.out), names=[found.digest or ""])


def show(session: Session) -> None:
    """Show the gates that count, and who set them.

    Example: adapterctl gate show -o yaml
    """
    found = session.registry(readonly=True).gates()
    names = [found.digest] if found.digest else []
    session.out.data(found, text=lambda: views.gates_text(found, session.out), names=names)


def check(
    session: Session,
    ref: Annotated[str, typer.Argument(metavar="REF", help="A version.", autocompletion=complete_refs)],
    to: Annotated[str, typer.Option(metavar="STAGE", help="The stage.", autocompletion=complete_stages)],
) -> None:
    """Check a version against the gate of a stage.

    Tells every condition with what was found, and promotes nothing. Exits with 5 when one is not met.

    Example: adapterctl gate check translate-chat:v1 --to production
    """
    found = session.registry(readonly=True).gate_check(parse_ref(ref), to=check_alias(to))
    session.out.data(found, text=lambda: views.gate_check_text(found, session.out), names=[found.verdict])
    if found.verdict != "passed":
        raise typer.Exit(REFUSED)


def lint(session: Session, file: File) -> None:
    """Check a gate file; needs no registry.

    Example: adapterctl gate lint gates.yaml
    """
    from ...registry.domain.gate import check_gates  # deferred: help reads no YAML
    from ...registry.services.gates import load_gates

    gates = check_gates(load_gates(file))
    found = [{"stage": each.stage, "adapters": each.adapters, "conditions": len(each.conditions)} for each in gates]
    told = ", ".join(f"{each.stage}: {len(each.conditions)} conditions" for each in gates) or "no gates"
    session.out.data(found, text=lambda: told, names=[each.stage for each in gates])


def decision(
    session: Session,
    digest: Annotated[str, typer.Argument(metavar="DIGEST", help="The evidence of a row, or its beginning.")],
) -> None:
    """Show what a move of a stage stood on.

    The history names it by its digest, and that is the SHA-256 of what is kept.

    Example: adapterctl gate decision 50d6f68b1b2d
    """
    found = session.registry(readonly=True).decision(digest)
    session.out.data(found, text=lambda: views.decision_text(found, session.out), names=[found.verdict.outcome])

"""For those who ask where a version comes from and what came of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ...registry.domain.errors import InvalidInput
from ...registry.domain.refs import parse_ref
from ..complete import complete_refs
from ..connect import Session, add_verbs

if TYPE_CHECKING:
    from ...registry.api import Direction

FORMATS = ("tree", "table", "json", "yaml", "name", "mermaid", "dot", "svg", "html")


def add_to(app: typer.Typer) -> None:
    add_verbs(app, {"lineage": lineage}, group="Merging", formats=FORMATS)


def lineage(
    session: Session,
    ref: Annotated[str, typer.Argument(metavar="REF", help="A version.", autocompletion=complete_refs)],
    up: Annotated[bool, typer.Option("--up", help="Ancestors only.")] = False,
    down: Annotated[bool, typer.Option("--down", help="Descendants only.")] = False,
    depth: Annotated[int | None, typer.Option(min=1, metavar="N", help="Generations at most.")] = None,
) -> None:
    """Show the ancestors and descendants of a version.

    Example: adapterctl lineage translate-chat -o mermaid
    """
    from ...registry.services import draw  # deferred: only this command draws
    from .. import lineage_text

    if up and down:
        raise InvalidInput("--up and --down are given both", hint="leave out both for the whole family")
    direction: Direction = "up" if up else "down" if down else "both"
    found = session.registry(readonly=True).lineage(parse_ref(ref), direction=direction, depth=depth)
    drawings = {
        "mermaid": lineage_text.mermaid,
        "dot": lineage_text.dot,
        "svg": draw.lineage_svg,
        "html": draw.lineage_html,
    }
    drawing = drawings.get(session.out.format)
    session.out.data(
        found,
        text=lambda: drawing(found) if drawing else lineage_text.tree(found, session.out),
        names=[version.ref for version in found.versions],
    )

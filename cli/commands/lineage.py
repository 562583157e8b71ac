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
    common: Annotated[
        str | None,
        typer.Option(metavar="REF", help="What this version is made of, too.", autocompletion=complete_refs),
    ] = None,
    path: Annotated[
        str | None, typer.Option(metavar="REF", help="The ways to this version.", autocompletion=complete_refs)
    ] = None,
    metric: Annotated[
        str | None, typer.Option(metavar="KEY", help="A table of this metric, beside the parents' values.")
    ] = None,
) -> None:
    """Show the ancestors and descendants of a version.

    With --common or --path, what lies between it and another version.

    Example: adapterctl lineage translate-chat -o mermaid
    """
    from ...registry.services import draw  # deferred: only this command draws
    from ...registry.services.trace import along
    from .. import lineage_text

    if up and down:
        raise InvalidInput("--up and --down are given both", hint="leave out both for the whole family")
    direction: Direction = "up" if up else "down" if down else "both"
    if bool(common) + bool(path) + bool(up or down or depth) > 1:
        raise InvalidInput("--common, --path and --up, --down or --depth exclude each other", hint="choose one")
    registry = session.registry(readonly=True)
    if common:
        found = registry.common_ancestors(parse_ref(ref), parse_ref(common))
    elif path:
        found = registry.path(parse_ref(ref), parse_ref(path))
    else:
        found = registry.lineage(parse_ref(ref), direction=direction, depth=depth)
    if metric is not None:
        points = along(found, metric)
        session.out.data(
            points, text=lambda: lineage_text.metric_table(points, session.out), names=[point.ref for point in points]
        )
        return
    drawings = {
        "mermaid": lineage_text.mermaid,
        "dot": lineage_text.dot,
        "svg": draw.lineage_svg,
        "html": draw.lineage_html,
    }
    drawing = drawings.get(session.out.format)

    def text() -> str:
        if drawing:
            return drawing(found)
        if common or path:
            return lineage_text.between(found, "both are made of" if common else "a shortest path", session.out)
        return lineage_text.tree(found, session.out)

    names = found.found if common or path else [version.ref for version in found.versions]
    session.out.data(found, text=text, names=names)

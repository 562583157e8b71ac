"""For those who take a family of adapters to another registry, with its lineage: export, import."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ...registry.domain.refs import parse_ref
from .. import views
from ..complete import complete_refs
from ..connect import Session, add_verbs


def add_to(app: typer.Typer) -> None:
    add_verbs(app, {"export": export, "import": import_}, group="Adapters")


def export(
    session: Session,
    refs: Annotated[list[str], typer.Argument(metavar="REF...", help="Versions.", autocompletion=complete_refs)],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where NAME/vN is written for each of them.")],
) -> None:
    """Write versions and all that they are made of to folders.

    `adapterctl import` makes the same versions and edges of them in another registry.

    Example: adapterctl export translate-chat@production ./family
    """
    from ...registry.services.carry import export as export_family  # deferred: help needs no service

    written = export_family(session.registry(readonly=True), [parse_ref(ref) for ref in refs], folder)
    session.out.say(f"{len(written)} versions are in {folder}")
    session.out.data(
        written, text=lambda: views.versions_table(written, session.out), names=[version.ref for version in written]
    )


def import_(
    session: Session,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Every adapter folder below it is read.")],
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="For adapters that no listing names.  [default: their folder's]")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell what would be done.")] = False,
    assume_converted: Annotated[
        bool, typer.Option("--assume-converted", help="Accept a PiSSA, OLoRA or similar start as already converted.")
    ] = False,
    unproven: Annotated[
        bool, typer.Option("--unproven", help="Take in as a plain import a merge that its recipe does not make here.")
    ] = False,
) -> None:
    """Register a family of adapters with its lineage.

    Merges are made again from the recipes in their headers, and must come out as the same bytes.

    Example: adapterctl import ./family --dry-run
    """
    from ...registry.services.carry import read_family, take_in  # deferred: help needs no service

    # before a registry is opened, which would make one: what is refused leaves none behind
    family = read_family(folder, name=name, assume_converted=assume_converted)
    registry = session.registry(readonly=dry_run)
    done = []
    for each in take_in(registry, family, dry_run=dry_run, unproven=unproven):
        done.append(each)
        for warning in each.warnings:
            session.out.warn(f"{each.folder}: {warning}")
    new = sum(each.action != "found" for each in done)
    session.out.say(f"{new} {'would be' if dry_run else 'are'} new, {len(done) - new} were here before")

    def text() -> str:
        rows = [[each.ref, each.action, ", ".join(each.parents) or "-", each.folder] for each in done]
        return session.out.table(["version", "action", "made of", "folder"], rows)

    session.out.data(done, text=text, names=[each.ref for each in done])

"""For those who mean one model by several names: base ls, add, alias, merge."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .. import views
from ..connect import Session, add_verbs
from ..output import printable

if TYPE_CHECKING:
    from ...registry.domain.version import Base


def add_to(app: typer.Typer) -> None:
    base = typer.Typer(
        help="Say which spellings mean the same base model.", no_args_is_help=True, rich_markup_mode=None
    )
    add_verbs(base, {"ls": ls, "add": add, "alias": alias, "merge": merge})
    app.add_typer(base, name="base", rich_help_panel="The registry")


def ls(session: Session) -> None:
    """List the base models and their spellings.

    Example: adapterctl base ls
    """
    found = session.registry(readonly=True).bases()
    session.out.data(found, text=lambda: views.bases_table(found, session.out), names=[base.name for base, _ in found])


def add(
    session: Session,
    name: Annotated[str, typer.Argument(metavar="NAME", help="As adapters write it, e.g. a hub id.")],
    folder: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Its files: pins config, weights, tokenizer.")
    ] = None,
    revision: Annotated[str | None, typer.Option(metavar="REV", help="Its revision, e.g. a commit of the hub.")] = None,
) -> None:
    """Add a base model, pinned by its files or its revision.

    Example: adapterctl base add meta-llama/Llama-2-7b-hf --revision 01c7f73d771dfac7d292323805ebc428287df4f9
    """
    _show(session, session.registry().add_base(name, folder=folder, revision=revision))


def alias(
    session: Session,
    spelling: Annotated[str, typer.Argument(metavar="SPELLING", help="How some adapters write it.")],
    base: Annotated[str, typer.Argument(metavar="BASE", help="The base that is meant.")],
) -> None:
    """Let one more spelling mean a base model.

    Example: adapterctl base alias /models/llama-2-7b meta-llama/Llama-2-7b-hf
    """
    _show(session, session.registry().alias_base(spelling, base))


def merge(
    session: Session,
    keep: Annotated[str, typer.Argument(metavar="KEEP", help="The base that stays.")],
    drop: Annotated[str, typer.Argument(metavar="DROP", help="The base that turns out to be the same.")],
) -> None:
    """Make two base models one.

    The versions of both are on KEEP then.

    Example: adapterctl base merge meta-llama/Llama-2-7b-hf NousResearch/Llama-2-7b-hf
    """
    _show(session, session.registry().merge_bases(keep, drop))


def _show(session: Session, base: Base) -> None:
    session.out.data(base, text=lambda: printable(base.name), names=[base.name])

"""For those who have one minute: the whole story on shipped adapters of a real model."""

from __future__ import annotations

import typer

from ..connect import Session, add_verbs


def add_to(app: typer.Typer) -> None:
    add_verbs(app, {"demo": demo}, group="Start here")


def demo(session: Session) -> None:
    """Run the whole story here.

    Example: adapterctl demo
    """

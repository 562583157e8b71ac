"""For those who have one minute: the whole story on shipped adapters of a real model, in a home of its own."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import typer

from ...registry.domain.errors import Refused
from ..connect import Session, add_verbs
from ..follow import follow
from ..output import write

HOME = Path("~/.adapterctl-demo")
MARK = "demo.txt"


def add_to(app: typer.Typer) -> None:
    add_verbs(app, {"demo": demo}, group="Start here")


def demo(session: Session) -> None:
    """Tell the whole story on shipped adapters.

    Two families of real LoRA adapters are registered, merged, evaluated and promoted, offline, in a home of their own
    (~/.adapterctl-demo, or --home). Takes about a minute; running it again reuses what is there.

    Example: adapterctl demo
    """
    from importlib.resources import as_file, files  # deferred: only this command reads shipped files

    from ... import examples
    from .. import story

    home = (session.home or HOME.expanduser()).absolute()
    _claim(home)
    own = replace(session, home=home)
    registry = own.registry()
    people = session.out.format == "table"
    with as_file(files(examples)) as folder:
        told = story.tell(
            registry,
            home,
            folder,
            session.out,
            write=(lambda text: write(sys.stdout, text)) if people else lambda text: None,
            wait=lambda job: follow(own, registry, job.id),
        )
    session.out.data(
        told, text=lambda: story.look_next(told, home), names=[*told.registered, *(v.ref for v in told.merged)]
    )


def _claim(home: Path) -> None:
    """Mark the folder as the demo's. Raises `Refused` for one that holds something else."""
    if (home / MARK).is_file():
        return
    if home.is_dir() and any(home.iterdir()):
        raise Refused(
            f"{home} holds something else, the demo needs a home of its own", hint="adapterctl demo --home DIR"
        )
    home.mkdir(parents=True, exist_ok=True)
    (home / MARK).write_text("A registry made by `adapterctl demo`. Delete the folder to get rid of it.\n")

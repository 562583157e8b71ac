"""For those who keep it running: doctor, and the pages of MLflow."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from ...registry.domain.errors import AdapterctlError, InvalidInput
from .. import views
from ..connect import Session, add_verbs

GROUP = "The registry"


def add_to(app: typer.Typer) -> None:
    add_verbs(app, {"ui": ui, "doctor": doctor}, group=GROUP)


def doctor(session: Session) -> None:
    """Check the registry and tell how to mend it.

    Exits with 1 when something is broken; warnings are no errors.

    Example: adapterctl doctor
    """
    from ...registry.api import Check  # deferred: help needs no views

    try:
        checks = session.registry(readonly=True).doctor()
    except AdapterctlError as error:
        checks = [Check("registry", "error", error.message, error.hint)]
    session.out.data(
        checks, text=lambda: views.checks_text(checks, session.out), names=[check.name for check in checks]
    )
    if any(check.status == "error" for check in checks):
        raise typer.Exit(1)


def ui(
    session: Session,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, metavar="PORT", help="On this machine.  [default: 5000]")
    ] = None,
    links: Annotated[bool, typer.Option("--links", help="Print the addresses and start nothing.")] = False,
) -> None:
    """Serve MLflow's pages and print their addresses.

    Runs until Ctrl-C. The pages are MLflow's own, on this machine only.

    Example: adapterctl ui --port 5001
    """
    from ...registry.stores.mlflow_server import ui_command  # deferred: help needs no server

    settings = session.settings()
    if settings.mlflow_uri and not settings.mlflow_uri.startswith("sqlite:"):
        raise InvalidInput(
            f"this registry is kept in the MLflow at {settings.mlflow_uri}", hint="open that address in a browser"
        )
    root = f"http://127.0.0.1:{port}" if port else settings.mlflow_ui
    registry = session.registry(readonly=True)
    latest = {f"{adapter.name}:{adapter.latest}" for adapter in registry.adapters()}
    shown = [version for version in registry.versions() if version.stages or version.ref in latest]
    found = [{"ref": version.ref, "url": root + version.mlflow_path} for version in shown]
    session.out.data(
        found,
        text=lambda: session.out.table(["VERSION", "ADDRESS"], [[link["ref"], link["url"]] for link in found]),
        names=[link["url"] for link in found],
    )
    if links:
        return
    session.out.say(f"serving {root} until Ctrl-C")
    command, environment = ui_command(settings, port=port)
    # The server takes the place of this process: signals reach it, and nothing is left behind.
    os.execve(command[0], command, {**os.environ, **environment})

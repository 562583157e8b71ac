"""For those who share a registry: serve it, say who may use it, and log in to one."""

from __future__ import annotations

import gc
import os
import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from ...registry.domain.access import Scope
from ...registry.domain.errors import InvalidInput
from ...registry.domain.refs import parse_ref
from ...registry.domain.worker import QUEUES
from .. import parse, views
from ..complete import complete_refs
from ..connect import Session, add_verbs
from ..output import is_terminal, printable

GROUP = "Sharing"
PORT = 5000
WORKER = "adapterctl.workers.celery_worker"
DEVICES = ("auto", "cpu", "cuda", "mps")


def add_to(app: typer.Typer) -> None:
    add_verbs(app, {"serve": serve, "worker": worker, "login": login, "logout": logout}, group=GROUP)
    tokens = typer.Typer(help="Say who may use a served registry.", no_args_is_help=True, rich_markup_mode=None)
    add_verbs(tokens, {"create": create, "ls": ls, "revoke": revoke})
    app.add_typer(tokens, name="tokens", rich_help_panel=GROUP)


def serve(
    session: Session,
    host: Annotated[str, typer.Option(metavar="HOST", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, metavar="PORT", help="0 takes a free one.  [default: 5000]")
    ] = None,
    open_: Annotated[
        str | None,
        typer.Option("--open", metavar="REF", help="Show a version in the browser.", autocompletion=complete_refs),
    ] = None,
    links: Annotated[bool, typer.Option("--links", help="Print the addresses of versions, and start nothing.")] = False,
) -> None:
    """Serve the registry: REST at /v1, MLflow's pages beside it.

    Runs until Ctrl-C. On this machine alone no token is asked for as long as none was made; an address that
    others can reach needs one first.

    Example: adapterctl serve --port 5000
    """
    if links:
        if open_:
            raise InvalidInput("--links starts nothing that --open could show", hint="leave one of them out")
        _print_links(session, f"http://{_in_address(host)}:{port}" if port else None)
        return
    # deferred: seconds, and nothing else needs them
    import uvicorn

    from ...bootstrap import application, connect, log_to_stderr
    from ...registry.rest.app import LOOPBACK, listen, own_names

    own = (*LOOPBACK, host) if host not in ("0.0.0.0", "::") else (*LOOPBACK, *own_names())
    log_to_stderr("adapterctl", "uvicorn")
    registry = connect(session.settings())
    door = application(registry, hosts=own, loopback=host in LOOPBACK)
    _settle()
    config = uvicorn.Config(
        door, host=host, log_config=None, access_log=False, server_header=False, timeout_graceful_shutdown=5
    )
    listening = listen(host, PORT if port is None else port)
    root = f"http://{_in_address(host)}:{listening.getsockname()[1]}"
    path = registry.version(parse_ref(open_)).mlflow_path if open_ else ""
    session.out.line({"url": root}, text=root + path, name=root)
    if open_:
        _show(root + path)
    with suppress(KeyboardInterrupt):
        uvicorn.Server(config).run([listening])


def _in_address(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _print_links(session: Session, root: str | None) -> None:
    """Where those versions are shown that hold a stage or are the newest of their adapter."""
    from ...registry.services.views import mlflow_path  # deferred: help shows no versions

    settings = session.settings()
    root = root or settings.server or settings.mlflow_ui
    registry = session.registry(readonly=True)
    shown = [
        (adapter.name, number)
        for adapter in registry.adapters()
        for number in sorted({int(each[1:]) for each in (adapter.latest, *adapter.stages.values())})
    ]
    found = [{"ref": f"{name}:v{number}", "url": root + mlflow_path(name, number)} for name, number in shown]
    session.out.data(
        found,
        text=lambda: session.out.table(["VERSION", "ADDRESS"], [[link["ref"], link["url"]] for link in found]),
        names=[link["url"] for link in found],
    )


def worker(
    session: Session,
    queues: Annotated[str, typer.Option(metavar="QUEUES", help="Which jobs to take: cpu, gpu or cpu,gpu.")] = "cpu",
    device: Annotated[str, typer.Option(metavar="DEVICE", help="What evaluates: auto, cpu, cuda or mps.")] = "auto",
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="What others see.  [default: host and process]")
    ] = None,
) -> None:
    """Work on the jobs of a shared registry.

    Takes one job at a time, until SIGTERM or Ctrl-C: then the job that runs is given back, and another worker
    takes it. Needs the addresses of the ledger, of MLflow and of the broker.

    Example: adapterctl worker --queues gpu --device cuda
    """
    if session.home is not None:
        raise InvalidInput("a worker belongs to a shared registry, --home names one in a folder", hint="leave it out")
    words = queues.split(",")
    if not words or set(words) - set(QUEUES):
        raise InvalidInput(f"there are no queues {queues!r}", hint=f"known: {', '.join(QUEUES)}")
    if device not in DEVICES:
        raise InvalidInput(f"device {device!r} is unknown", hint=f"known: {', '.join(DEVICES)}")
    named = ["--name", name] if name else []
    command = [sys.executable, "-P", "-m", WORKER, "--queues", queues, "--device", device, *named]
    # In place of this process, so that signals reach it; and the command line needs nothing of the workers' floor.
    os.execv(sys.executable, command)


def login(
    session: Session,
    server: Annotated[str, typer.Argument(metavar="SERVER", help="Its address, https://HOST or http://HOST:PORT.")],
) -> None:
    """Keep a token, and let commands go to that server.

    The token is read from the terminal, or from stdin. ADAPTERCTL_SERVER and ADAPTERCTL_TOKEN do the same
    for one command; --home DIR goes around both.

    Example: adapterctl login https://registry.example.org
    """
    from ...bootstrap import remote  # deferred: help logs in nowhere
    from ...registry.settings import user_config

    secret = typer.prompt("token", hide_input=True, err=True) if is_terminal(sys.stdin) else sys.stdin.readline()
    caller = remote(server, secret.strip()).whoami()
    _write_user_settings(user_config(), {"server": server, "token": secret.strip()})
    session.out.say(f"commands go to {printable(server)} now")
    session.out.data(caller, text=lambda: f"{caller.name} ({caller.scope})", names=[caller.name])


def logout(session: Session) -> None:
    """Forget the server and its token.

    Commands go to the registry of this machine again. The token stays valid: `adapterctl tokens revoke`.

    Example: adapterctl logout
    """
    from ...registry.settings import user_config  # deferred: help reads no settings

    path = user_config()
    _write_user_settings(path, {"server": None, "token": None})
    session.out.data({"file": str(path)}, text=lambda: "logged out", names=[])


def create(
    session: Session,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Whose it is; recorded with every change.")],
    scope: Annotated[Scope, typer.Option(help="What it may do; each step includes those before it.")] = Scope.READ,
    names: Annotated[
        list[str] | None, typer.Option("--adapter", metavar="GLOB", help="Adapters it may change.  [default: all]")
    ] = None,
    valid: Annotated[
        str | None, typer.Option("--valid", metavar="TIME", help="How long, e.g. 90d or 12h.  [default: for good]")
    ] = None,
) -> None:
    """Make a token and print it, once.

    Example: adapterctl tokens create ci --scope merge --adapter 'chat-*' --valid 90d
    """
    made = session.registry().create_token(
        name, scope=scope, names=names or ("*",), valid_s=parse.duration_s(valid) if valid else None
    )
    session.out.say("keep it now: it cannot be shown again")
    session.out.data(made, text=lambda: made.secret, names=[made.secret])


def ls(session: Session) -> None:
    """List the tokens.

    Example: adapterctl tokens ls
    """
    found = session.registry(readonly=True).tokens()
    session.out.data(found, text=lambda: views.tokens_table(found, session.out), names=[token.id for token in found])


def revoke(
    session: Session, token_ids: Annotated[list[str], typer.Argument(metavar="ID", help="Tokens, by their ids.")]
) -> None:
    """Make tokens invalid for good.

    Example: adapterctl tokens revoke 01932c6e-7a41-7c3e-9f0a-0c8f3e5b1d27
    """
    registry = session.registry()
    revoked = [registry.revoke_token(token_id) for token_id in token_ids]
    session.out.data(revoked, text=lambda: views.tokens_table(revoked, session.out), names=[t.id for t in revoked])


def _settle() -> None:
    """What was loaded to start stays: the collector need not look through all of MLflow while requests wait."""
    gc.collect()
    gc.freeze()
    # A thread that comes back from the disk still holds the ledger's write lock: it must not wait 5 ms for the others.
    sys.setswitchinterval(0.0005)


def _show(url: str) -> None:
    import threading  # deferred: only --open needs them
    import webbrowser

    threading.Timer(1.0, webbrowser.open, [url]).start()


def _write_user_settings(path: Path, changes: dict[str, str | None]) -> None:
    """Set or remove top-level keys of the user's TOML file and leave its other lines as they are; mode 0600."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    ours = re.compile(rf"\s*({'|'.join(changes)})\s*=")
    kept = [line for line in lines if not ours.match(line)]
    for value in changes.values():
        if value is not None and not re.fullmatch(r"[\x21\x23-\x5b\x5d-\x7e]{1,2000}", value):
            raise InvalidInput("a token or an address holds characters that none has", hint="copy it again")
    new = [f'{key} = "{value}"' for key, value in changes.items() if value is not None]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    # made closed to others: nobody can read it in between
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write("\n".join([*new, *kept]) + "\n")
    partial.replace(path)

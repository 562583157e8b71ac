"""For those who keep it running: doctor, migrate and gc."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Annotated

import typer

from ...registry.domain.errors import AdapterctlError, InvalidInput, Misconfigured, Unavailable
from .. import parse, views
from ..connect import Session, add_verbs, confirm

if TYPE_CHECKING:
    from ...registry.api import Check

GROUP = "The registry"


def add_to(app: typer.Typer) -> None:
    add_verbs(app, {"doctor": doctor, "migrate": migrate, "gc": gc}, group=GROUP)


def doctor(
    session: Session,
    adopt: Annotated[
        bool, typer.Option("--adopt", help="Accept what was renamed, deleted, made or moved in MLflow.")
    ] = False,
    force: Annotated[
        list[str] | None,
        typer.Option(
            "--force",
            metavar="NAME",
            help="With --adopt: also a rename of this adapter under which other gates or tokens hold, and versions of"
            " it that MLflow lost as by an older backup.",
        ),
    ] = None,
) -> None:
    """Check the registry and tell how to mend it.

    Exits with 1 when something is broken; warnings are no errors. Without --adopt nothing is changed: it
    shows what --adopt would accept. What a rule or a gate forbids is not adopted, and stays among the findings.

    Example: adapterctl doctor
    """
    from ...registry.api import Check  # deferred: help needs no views

    if force and not adopt:
        raise InvalidInput("--force goes with --adopt", hint="adapterctl doctor --adopt --force NAME")
    try:
        checks = session.registry(readonly=not adopt).doctor(adopt=adopt, force=force or ())
    except AdapterctlError as error:
        checks = [Check("registry", "error", error.message, error.hint)]
        if isinstance(error, Unavailable) and not session.settings().server:
            from ...registry.services.doctor import examine_home  # deferred: help examines nothing

            checks = [*examine_home(session.settings().home), *checks]
    checks += _own_settings()
    session.out.data(
        checks, text=lambda: views.checks_text(checks, session.out), names=[check.name for check in checks]
    )
    if any(check.status == "error" for check in checks):
        raise typer.Exit(1)


def _own_settings() -> list[Check]:
    """A warning where others may read the secrets of whoever asks; it is about this machine, not a server's."""
    from ...registry.api import Check  # deferred: help needs no views and no settings
    from ...registry.settings import open_secrets, user_config

    path = user_config()
    try:
        secrets = open_secrets(path)
    except Misconfigured:
        return []  # it was told why nothing was checked
    if not secrets:
        return []
    said = f"{path} holds {', '.join(secrets)} and can be read by others (mode {path.stat().st_mode & 0o777:03o})"
    return [Check("settings", "warning", said, f"chmod 600 {shlex.quote(str(path))}")]


def migrate(
    session: Session,
    check: Annotated[
        bool, typer.Option("--check", help="Change nothing; exit with 5 where the tables are behind.")
    ] = False,
) -> None:
    """Bring the tables of the registry up to date.

    Tells from which revision to which. Every command that writes does so too, this one does nothing else. There
    is no way back: back up first. Of several at once one does it, and the others wait.

    Example: adapterctl migrate --check
    """
    from ...bootstrap import migrate_tables  # deferred: help opens nothing

    done = migrate_tables(session.settings(), check=check)
    told = f"{done.before or 'no tables'} -> {done.after}" if done.before != done.after else f"{done.after}, the newest"
    session.out.data(done, text=lambda: f"{done.ledger}  {told}", names=[done.after])


def gc(
    session: Session,
    older_than: Annotated[
        str, typer.Option("--older-than", metavar="TIME", help="Younger attempts and logs stay, e.g. 12h.")
    ] = "1d",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Tell what would be freed, and free nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Free what no version, job, decision or report refers to.

    Files of removed versions, attempts that never became a version, what was made twice, abandoned stage
    folders and locks, logs and work files of ended jobs. Any other version that MLflow has stays, whoever made it.

    Example: adapterctl gc --dry-run
    """
    older_than_s = parse.duration_s(older_than) or 0.0
    registry = session.registry(readonly=dry_run)
    freed = None
    if dry_run or not yes:
        freed = registry.gc(older_than_s=older_than_s, dry_run=True)
    if freed is not None and freed.found and not dry_run:
        session.out.say(views.garbage_text(freed, session.out))
        confirm(f"free {views.size(freed.size_bytes)} for good?", f"adapterctl gc --older-than {older_than} --yes")
    if not dry_run and (freed is None or freed.found):
        freed = registry.gc(older_than_s=older_than_s)
    assert freed is not None
    session.out.data(
        freed, text=lambda: views.garbage_text(freed, session.out), names=[each.name for each in freed.found]
    )

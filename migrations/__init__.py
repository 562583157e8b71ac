"""The schema of our tables, step by step. Runs from the installed package; there is no alembic.ini.

`migrate` brings a database to the newest revision and costs one SELECT where it is there already: Alembic is imported
only when there is something to do. Our version table has a name of its own, so that a database may be shared.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from sqlalchemy import inspect, text

from ..registry.domain.errors import Misconfigured
from ..registry.stores.sql.engine import Database

#: The newest revision in `versions/`; a test holds both together.
HEAD_REVISION = "0009"
VERSION_TABLE = "adapterctl_alembic_version"

SchemaState = Literal["empty", "older", "current", "newer"]


def schema_state(url: str) -> SchemaState:
    """Where a database stands; never writes. `newer` is any revision that this installation does not know."""
    database = Database(url)
    try:
        return _state(_revision(database))
    finally:
        database.close()


def check_schema(url: str) -> None:
    """Raise `Misconfigured` unless the database can be read as it is. Never writes."""
    database = Database(url)
    try:
        revision = _revision(database)
    finally:
        database.close()
    state = _state(revision)
    if state == "newer":
        raise _too_new(database, revision)
    if state != "current":
        raise Misconfigured(
            f"{database.label} has {'no tables yet' if state == 'empty' else f'tables of revision {revision}'}",
            hint="a command that writes, such as `adapterctl register`, brings them up to date",
        )


def migrate(url: str) -> None:
    """Bring the database to the newest revision, making it where there is none; one process at a time.

    Raises `Misconfigured` for a database that a newer adapterctl has written, `NotAllowed` on a read-only home.
    """
    database = Database(url, create=True)
    try:
        database.prepare()
        if _state(_revision(database)) == "current":
            return
        with database.exclusive("migrate"):
            revision = _revision(database)
            if _state(revision) == "newer":
                raise _too_new(database, revision)
            _upgrade(database)
    finally:
        database.close()


def _state(revision: str | None) -> SchemaState:
    if revision is None:
        return "empty"
    if revision == HEAD_REVISION:
        return "current"
    known = any((Path(__file__).parent / "versions").glob(f"{revision}_*.py"))
    return "older" if known else "newer"


def _revision(database: Database) -> str | None:
    if not database.exists:
        return None
    with database.read() as connection:
        if not inspect(connection).has_table(VERSION_TABLE):
            return None
        return connection.execute(text(f"SELECT version_num FROM {VERSION_TABLE}")).scalar_one_or_none()


def _too_new(database: Database, revision: str | None) -> Misconfigured:
    return Misconfigured(
        f"{database.label} is at revision {revision}, this adapterctl knows revisions up to {HEAD_REVISION}",
        hint="install the adapterctl that wrote it, or a newer one: pip install --upgrade adapterctl",
    )


def _upgrade(database: Database) -> None:
    # deferred: Alembic takes 0.3 s, and nearly every command finds its tables ready
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    with database.write() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")

"""The schema of our tables, step by step. Runs from the installed package; there is no alembic.ini.

`migrate` brings a database to the newest revision and costs one SELECT where it is there already: Alembic is imported
only when there is something to do. Our version table has a name of its own, so that a database may be shared.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sqlalchemy import inspect, text

from ..registry.domain.errors import Misconfigured, Refused
from ..registry.stores.sql.engine import Database

#: The newest revision in `versions/`; a test holds both together.
HEAD_REVISION = "0010"
VERSION_TABLE = "adapterctl_alembic_version"

SchemaState = Literal["empty", "older", "current", "newer"]


@dataclass(frozen=True, slots=True)
class Migration:
    """What became of the tables of a database: their revisions; `before` is None where there were none."""

    ledger: str
    before: str | None
    after: str


def schema_state(url: str) -> SchemaState:
    """Where a database stands; never writes. `newer` is any revision that this installation does not know."""
    with closing(Database(url)) as database:
        return _state(_revision(database))


def check_schema(url: str) -> None:
    """Raise `Misconfigured` unless the database can be read as it is. Never writes."""
    try:
        check_newest(url)
    except Refused as error:
        raise Misconfigured(error.message, hint=error.hint) from error


def check_newest(url: str) -> Migration:
    """Raise `Refused` where tables are missing or old, `Misconfigured` where they are too new. Never writes."""
    with closing(Database(url)) as database:
        revision = _known_revision(database)
        if revision != HEAD_REVISION:
            found = "no tables yet" if revision is None else f"tables of revision {revision}"
            raise Refused(
                f"{database.label} has {found}, this adapterctl needs revision {HEAD_REVISION}",
                hint="back it up, then bring it up to date: adapterctl migrate",
            )
        return Migration(database.label, revision, revision)


def migrate(url: str) -> Migration:
    """Bring the database to the newest revision, making it where there is none; one process at a time.

    Raises `Misconfigured` for a database that a newer adapterctl has written, `NotAllowed` on a read-only home.
    """
    with closing(Database(url, create=True)) as database:
        database.prepare()
        before = _known_revision(database)
        if before != HEAD_REVISION:
            with database.exclusive("migrate"):
                before = _known_revision(database)
                _upgrade(database)
        return Migration(database.label, before, HEAD_REVISION)


def _known_revision(database: Database) -> str | None:
    """The revision of the tables, None where there are none. Raises `Misconfigured` for one of a newer adapterctl."""
    revision = _revision(database)
    if _state(revision) == "newer":
        raise Misconfigured(
            f"{database.label} is at revision {revision}, this adapterctl knows revisions up to {HEAD_REVISION}",
            hint="install the adapterctl that wrote it, or a newer one: pip install --upgrade adapterctl",
        )
    return revision


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


def _upgrade(database: Database) -> None:
    # deferred: Alembic takes 0.3 s, and nearly every command finds its tables ready
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    with database.write() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")

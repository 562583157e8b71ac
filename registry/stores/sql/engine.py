"""Connections and locks: whatever depends on the database product lives in this file and nowhere else.

SQLite as we use it: WAL, a transaction that writes begins with BEGIN IMMEDIATE (the default of the driver lost 242 of
300 concurrent updates without one error), 30 s patience, every commit synced to disk, foreign keys enforced. Where the
home cannot be written, the file is opened read-only and every write is refused before it starts.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sqlalchemy import (
    ColumnElement,
    Connection,
    Engine,
    Executable,
    Float,
    QueuePool,
    bindparam,
    create_engine,
    event,
    func,
    select,
)
from sqlalchemy.exc import DatabaseError, IntegrityError, OperationalError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

from ...domain.errors import Corrupt, Misconfigured, NotAllowed, NotFound, Unavailable

BUSY_TIMEOUT_S = 30.0
_SQLITE = "sqlite:///"


class Now(FunctionElement[float]):
    """The database's clock: seconds since the epoch. Leases must not depend on the clocks of the workers."""

    name = "now"
    type = Float()
    inherit_cache = True


@compiles(Now, "sqlite")
def _now_sqlite(element: Now, compiler: SQLCompiler, **kw: Any) -> str:
    return "((julianday('now') - 2440587.5) * 86400.0)"


def sqlite_url(home: Path) -> str:
    """Address of the embedded registry in `home`."""
    return f"{_SQLITE}{home.absolute() / 'registry.db'}"


class Database:
    """One database of one registry. Opens nothing until it is used; `create` makes the file where there is none."""

    def __init__(self, url: str, *, create: bool = False) -> None:
        if not url.startswith(_SQLITE):
            raise Misconfigured(f"{url.partition(':')[0]} is no database that the ledger speaks", hint="use a home")
        # cut by hand: SQLAlchemy would take a '?' in the path for the start of options
        self.path = Path(url.removeprefix(_SQLITE))
        self.folder = self.path.parent
        self._create = create
        self._engine: Engine | None = None

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """One snapshot: all that is read in the block fits together."""
        with _translated(self.path), self._open().begin() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """One transaction, alone among the writers. Raises `NotAllowed` where the home is read-only."""
        self._check_writable()
        with _translated(self.path), self._open().execution_options(writes=True).begin() as connection:
            yield connection

    @property
    def exists(self) -> bool:
        return self.path.exists()

    @property
    def writable(self) -> bool:
        return os.access(self.folder, os.W_OK) and (not self.exists or os.access(self.path, os.W_OK))

    @contextmanager
    def exclusive(self, name: str) -> Iterator[None]:
        """Hold the lock `name` of this registry. It dies with its process; a process must not take it twice."""
        self._check_writable()
        file = self.folder / "locks" / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.lock"
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    def close(self) -> None:
        if self._engine is not None:
            self._engine.dispose()
            self._engine = None

    def _check_writable(self) -> None:
        if not self.writable:
            raise NotAllowed(
                f"{self.folder} cannot be written", hint="use a home that is yours: --home or ADAPTERCTL_HOME"
            )

    def _open(self) -> Engine:
        if self._engine is None:
            self._engine = _sqlite_engine(self.path, create=self._create, read_only=not self.writable)
        return self._engine


def insert_once(connection: Connection, statement: Executable) -> bool:
    """Run an INSERT; False, and nothing is changed, where a unique key is taken already."""
    try:
        with connection.begin_nested():
            connection.execute(statement)
    except IntegrityError:
        return False
    return True


def among(column: ColumnElement[str]) -> ColumnElement[bool]:
    """`column IN (...)` for any number of values, which are given at execution by `these(values)`."""
    listed = func.json_each(bindparam("these")).table_valued("value")
    return column.in_(select(listed.c.value))


def these(values: Iterable[str]) -> dict[str, str]:
    """The values of `among`. They travel as one, so there is no limit to cut at, and no statement to parse anew."""
    return {"these": json.dumps(list(values))}


def append_only(table: str) -> tuple[str, ...]:
    """DDL after which rows of `table` can be added but not changed or deleted, whoever asks."""
    return tuple(
        f"CREATE TRIGGER {table}_no_{move.lower()} BEFORE {move} ON {table} "
        f"BEGIN SELECT RAISE(ABORT, '{table} is append-only'); END"
        for move in ("UPDATE", "DELETE")
    )


def _sqlite_engine(path: Path, *, create: bool, read_only: bool) -> Engine:
    if not create and not path.exists():
        raise NotFound(
            f"there is no registry in {path.parent}",
            hint="`adapterctl register` makes one, `adapterctl demo` shows one",
        )
    uri = f"file:{quote(str(path.absolute()))}"
    uri += _read_only_mode(uri) if read_only else "?mode=rwc" if create else "?mode=rw"

    def connect() -> sqlite3.Connection:
        connection = sqlite3.connect(
            uri, uri=True, timeout=BUSY_TIMEOUT_S, check_same_thread=False, isolation_level=None
        )
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA cache_size = -65536")  # KiB, taken only as needed; the default is 2 MB
        if create:  # stays with the file, so the others need not ask
            connection.execute("PRAGMA journal_mode = WAL")
        return connection

    engine = create_engine("sqlite://", creator=connect, poolclass=QueuePool)
    event.listen(engine, "begin", _begin)
    return engine


def _begin(connection: Connection) -> None:
    writes = connection.get_execution_options().get("writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _read_only_mode(uri: str) -> str:
    """How to open a file that we cannot write: a WAL that lies beside it is read, but none can be made.

    https://sqlite.org/wal.html#read_only_databases
    """
    try:
        with sqlite3.connect(f"{uri}?mode=ro", uri=True) as probe:
            probe.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except sqlite3.OperationalError:
        return "?mode=ro&immutable=1"
    return "?mode=ro"


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    try:
        yield
    except IntegrityError:
        raise  # the ledger knows which rule was broken
    except OperationalError as error:
        raise Unavailable(f"{path} cannot be used: {error.orig}", hint="see `adapterctl doctor`") from error
    except DatabaseError as error:
        raise Corrupt(f"{path} is damaged: {error.orig}", hint="restore it from a backup") from error

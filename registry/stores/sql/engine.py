"""Connections and locks: whatever depends on the database product lives in this file and nowhere else.

SQLite as we use it: WAL, a transaction that writes begins with BEGIN IMMEDIATE (the default of the driver lost 242 of
300 concurrent updates without one error), 30 s patience, every commit synced to disk, foreign keys enforced. Where the
home cannot be written, the file is opened read-only and every write is refused before it starts.

PostgreSQL: a transaction that reads is one snapshot (REPEATABLE READ, read-only), one that writes sees what others
committed meanwhile (READ COMMITTED); a write whose rule needs more locks the row that stands for it. `exclusive` is a
session-level advisory lock on a connection of its own, so it dies with its process as a file lock does.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol
from urllib.parse import quote

from sqlalchemy import (
    ClauseElement,
    ColumnElement,
    Connection,
    Dialect,
    Engine,
    Executable,
    Float,
    Insert,
    NullPool,
    QueuePool,
    Text,
    bindparam,
    create_engine,
    event,
    select,
    text,
)
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DataError, DBAPIError, IntegrityError, OperationalError
from sqlalchemy.exc import TimeoutError as NoneFree
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql import SyntaxExtension
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

from ...domain.errors import (
    AdapterctlError,
    Conflict,
    Corrupt,
    InvalidInput,
    Misconfigured,
    NotAllowed,
    NotFound,
    Unavailable,
)
from ...locks import FileLock, locked, locked_if_free
from ...ports import Lock
from ...settings import LEDGER_DATABASE, check_address

BUSY_TIMEOUT_S = 30.0
CONNECT_TIMEOUT_S = 10
MAPPED_BYTES = 1 << 28
#: What SQLite needs beside its file to read it at all.
NEEDED_BYTES = 64 << 10
_SQLITE = "sqlite:///"
_POSTGRES = ("postgresql", "postgres")
_NOTHING: Mapping[str, Any] = MappingProxyType({})
#: The option of a connection that holds what a snapshot has read.
_ANSWERS = "adapterctl_answers"
#: Two writers in each other's way, and PostgreSQL ended one: deadlock_detected, serialization_failure.
_GAVE_WAY = ("40P01", "40001")


class Now(FunctionElement[float]):
    """The database's clock: seconds since the epoch. Leases must not depend on the clocks of the workers."""

    name = "now"
    type = Float()
    inherit_cache = True


@compiles(Now, "sqlite")
def _now_sqlite(element: Now, compiler: SQLCompiler, **kw: Any) -> str:
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(Now, "postgresql")
def _now_postgresql(element: Now, compiler: SQLCompiler, **kw: Any) -> str:
    # now() would stand still while a transaction waits for a lock
    return "CAST(EXTRACT(EPOCH FROM clock_timestamp()) AS DOUBLE PRECISION)"


class _Strings(FunctionElement[str]):
    """The strings of a JSON list, as a table with the column `value`."""

    name = "strings"
    type = Text()
    inherit_cache = True


@compiles(_Strings, "sqlite")
def _strings_sqlite(element: _Strings, compiler: SQLCompiler, **kw: Any) -> str:
    return f"json_each({compiler.process(element.clauses, **kw)})"


@compiles(_Strings, "postgresql")
def _strings_postgresql(element: _Strings, compiler: SQLCompiler, **kw: Any) -> str:
    return f"json_array_elements_text(CAST({compiler.process(element.clauses, **kw)} AS JSON))"


class _Members(FunctionElement[str]):
    """The members of a JSON object of strings, as a table with the columns `key` and `value`."""

    name = "members"
    inherit_cache = True


@compiles(_Members, "sqlite")
def _members_sqlite(element: _Members, compiler: SQLCompiler, **kw: Any) -> str:
    return f"json_each({compiler.process(element.clauses, **kw)})"


@compiles(_Members, "postgresql")
def _members_postgresql(element: _Members, compiler: SQLCompiler, **kw: Any) -> str:
    return f"json_each_text(CAST({compiler.process(element.clauses, **kw)} AS JSON))"


def sqlite_url(home: Path) -> str:
    """Address of the embedded registry in `home`."""
    return f"{_SQLITE}{home.absolute() / LEDGER_DATABASE}"


def check_encoding(encoding: str | None, url: URL, setting: str) -> None:
    """Raise `Misconfigured` for a database that cannot keep every text; None was not told. `setting` names it."""
    if encoding not in (None, "UTF8"):
        raise Misconfigured(
            f"the database {_label(url)} has the encoding {encoding}, expected is UTF8",
            hint=f"make another one: createdb -E UTF8 -T template0 {url.database}_utf8, and set {setting}",
        )


def _label(url: URL) -> str:
    return f"{url.host or 'local'}:{url.port or 5432}/{url.database}"


def is_shared(url: str) -> bool:
    """Whether the address is one of a database server, which several machines may use."""
    return url.partition(":")[0].partition("+")[0] in _POSTGRES


class Database:
    """One database of one registry. Opens nothing until it is used; `create` makes the file where there is none."""

    def __init__(self, url: str, *, create: bool = False) -> None:
        self._product: _Product
        if url.startswith(_SQLITE):
            # cut by hand: SQLAlchemy would take a '?' in the path for the start of options
            self._product = _Sqlite(Path(url.removeprefix(_SQLITE)), create=create)
        elif is_shared(url):
            self._product = _Postgres(url)
        else:
            raise Misconfigured(
                f"{url.partition(':')[0]} is no database that the ledger speaks", hint="use a home, or postgresql://"
            )
        self._translated = _Translated(self._product)
        self._engines: tuple[Engine, Engine] | None = None
        self._mine = threading.local()

    @property
    def label(self) -> str:
        """The database in words, without a password."""
        return self._product.label

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """One snapshot: all that is read in the block fits together."""
        shared: Connection | None = getattr(self._mine, "snapshot", None)
        if shared is not None:
            with self._translated:
                yield shared
            return
        with self._translated, self._open()[0].begin() as connection:
            self._product.begin(connection, writes=False)
            yield connection

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """Let all reads of this thread in the block be one: they fit together, and cost one transaction, not one each.

        What is written in the block is not seen by its reads, so `rows` asks nothing twice.
        """
        with self.read() as connection:
            outer = getattr(self._mine, "snapshot", None)
            self._mine.snapshot = connection
            if outer is None:
                connection.execution_options(**{_ANSWERS: {}})
            try:
                yield
            finally:
                self._mine.snapshot = outer

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """One transaction. SQLite has one writer at a time; elsewhere a block that reads first locks what it read.

        Raises `NotAllowed` where the home is read-only.
        """
        self._product.check_writable()
        with self._product.turn(), self._translated, self._open()[1].begin() as connection:
            self._product.begin(connection, writes=True)
            yield connection

    @property
    def exists(self) -> bool:
        """Whether there is a database; its tables may be missing."""
        return self._product.exists

    def prepare(self) -> None:
        """Make the place of a new database."""
        self._product.prepare()

    def exclusive(self, name: str) -> AbstractContextManager[Lock]:
        """Hold the lock `name` of this registry. It dies with its process; a process must not take it twice."""
        return self._product.exclusive(name)

    def try_exclusive(self, name: str) -> AbstractContextManager[bool]:
        """Hold that lock, too, but only where nobody does; says so at once."""
        return self._product.try_exclusive(name)

    def close(self) -> None:
        if self._engines is not None:
            self._engines[0].dispose()
            self._engines = None

    def _open(self) -> tuple[Engine, Engine]:
        """One engine twice: as it begins a transaction that reads, and one that writes."""
        if self._engines is None:
            engine = self._product.engine()
            self._engines = (
                engine.execution_options(**self._product.reading),
                engine.execution_options(**self._product.writing),
            )
        return self._engines


class _Translated:
    """Errors of the driver in our words; which rule was broken is known to the ledger alone."""

    def __init__(self, product: _Product) -> None:
        self._product = product

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, DBAPIError) and not isinstance(error, IntegrityError):
            raise self._product.in_our_words(error) from error
        if isinstance(error, NoneFree):
            said = f"is busy: all connections to it were in use for {BUSY_TIMEOUT_S:g} s"
            raise Unavailable(f"{self._product.label} {said}", hint="try again", abroad=f"the ledger {said}") from error


def insert_once(connection: Connection, statement: Executable) -> bool:
    """Run an INSERT; False, and nothing is changed, where a unique key is taken already."""
    try:
        with connection.begin_nested():
            connection.execute(statement)
    except IntegrityError:
        return False
    return True


class UnlessTaken(SyntaxExtension, ClauseElement):
    """For `insert(...).ext()`: where a unique key is taken already, nothing is inserted, and no row returned.

    `insert_once` does the same for a statement that runs seldom; this one needs no savepoint, which costs as much as
    the INSERT itself.
    """

    _traverse_internals = []  # noqa: RUF012 - nothing in it varies, so that statements with it are compiled once

    def apply_to_insert(self, insert_stmt: Insert) -> None:
        insert_stmt.apply_syntax_extension_point(lambda existing: [*existing, self], "post_values")


@compiles(UnlessTaken)
def _unless_taken(element: UnlessTaken, compiler: SQLCompiler, **kw: Any) -> str:
    return "ON CONFLICT DO NOTHING"


def among(column: ColumnElement[str]) -> ColumnElement[bool]:
    """`column IN (...)` for any number of values, which are given at execution by `these(values)`."""
    listed = _Strings(bindparam("these", type_=Text())).table_valued("value")
    return column.in_(select(listed.c.value))


def these(values: Iterable[str]) -> dict[str, str]:
    """The values of `among`. They travel as one, so there is no limit to cut at, and no statement to parse anew."""
    return {"these": json.dumps(list(values))}


def has_member(column: ColumnElement[str], key: str, value: str) -> ColumnElement[bool]:
    """Whether the JSON object in a column has this member, a string."""
    members = _Members(column).table_valued("key", "value")
    return select(members.c.key).where(members.c.key == key, members.c.value == value).exists()


def is_remote(connection: Connection) -> bool:
    """Whether a query goes to a server and back, and is not answered in this process."""
    return connection.dialect.name != "sqlite"


def rows(connection: Connection, statement: Executable, values: Mapping[str, Any] = _NOTHING) -> list[tuple[Any, ...]]:
    """Run a statement that is built once and run often; its rows as the driver gives them, none where it has none.

    SQLAlchemy's own execution takes ten times as long as the driver's. Values go to the driver as they are. What was
    asked in the same snapshot before is answered from memory.
    """
    answers: dict[Any, list[tuple[Any, ...]]] | None = connection.get_execution_options().get(_ANSWERS)
    if answers is None:
        return _ask(connection, statement, values)
    asked = (statement, *values.items())
    if asked not in answers:
        answers[asked] = _ask(connection, statement, values)
    return answers[asked]


def run_all(connection: Connection, statement: Executable, values: Sequence[Mapping[str, Any]]) -> None:
    """Run such a statement, which returns nothing, with each of these values; one way to a server for all of them."""
    if not values:
        return
    sql, defaults, order = _driver_sql(statement, connection.dialect)
    given = [{**defaults, **each} for each in values]
    _run(connection, sql, given if order is None else [[each[name] for name in order] for each in given], many=True)


def _ask(connection: Connection, statement: Executable, values: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    sql, defaults, order = _driver_sql(statement, connection.dialect)
    given = {**defaults, **values}
    return _run(connection, sql, given if order is None else [given[name] for name in order])


def _run(
    connection: Connection, sql: str, given: Mapping[str, Any] | Sequence[Any], *, many: bool = False
) -> list[tuple[Any, ...]]:
    errors = connection.dialect.loaded_dbapi.Error
    # a server sends rows in binary form, which is read in little more than half the time that text takes
    cursor: Any = connection.connection.cursor(**({"binary": True} if is_remote(connection) else {}))
    try:
        (cursor.executemany if many else cursor.execute)(sql, given)
        return [] if cursor.description is None else list(cursor.fetchall())
    except errors as error:
        raise DBAPIError.instance(sql, None, error, errors, dialect=connection.dialect) from error
    finally:
        cursor.close()


@lru_cache(maxsize=64)
def _driver_sql(statement: ClauseElement, dialect: Dialect) -> tuple[str, Mapping[str, Any], Sequence[str] | None]:
    """The text, the values that stand in the statement itself, and the order of all values where they have no names."""
    compiled = statement.compile(dialect=dialect, compile_kwargs={"render_postcompile": True})
    assert isinstance(compiled, SQLCompiler)
    given = {name: bind.value for bind, name in compiled.bind_names.items() if not bind.required}
    return str(compiled), given, compiled.positiontup if compiled.positional else None


def append_only(table: str, dialect: str) -> tuple[str, ...]:
    """DDL after which rows of `table` can be added but not changed or deleted, whoever asks."""
    if dialect == "sqlite":
        return tuple(
            f"CREATE TRIGGER {table}_no_{move.lower()} BEFORE {move} ON {table} "
            f"BEGIN SELECT RAISE(ABORT, '{table} is append-only'); END"
            for move in ("UPDATE", "DELETE")
        )
    # the error class of a broken rule, as a CHECK would raise it
    body = f"BEGIN RAISE EXCEPTION '{table} is append-only' USING ERRCODE = 'integrity_constraint_violation'; END"
    return (
        f"CREATE FUNCTION {table}_is_append_only() RETURNS trigger LANGUAGE plpgsql AS $$ {body} $$",
        f"CREATE TRIGGER {table}_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON {table} "
        f"FOR EACH STATEMENT EXECUTE FUNCTION {table}_is_append_only()",
    )


class _Product(Protocol):
    """What differs between databases. `reading` and `writing` are SQLAlchemy's options of a transaction."""

    reading: dict[str, Any]
    writing: dict[str, Any]

    @property
    def label(self) -> str: ...
    @property
    def exists(self) -> bool: ...
    def engine(self) -> Engine: ...
    def begin(self, connection: Connection, *, writes: bool) -> None: ...
    def check_writable(self) -> None: ...
    def prepare(self) -> None: ...
    def exclusive(self, name: str) -> AbstractContextManager[Lock]: ...
    def try_exclusive(self, name: str) -> AbstractContextManager[bool]: ...
    def turn(self) -> AbstractContextManager[None]:
        """Held by a thread while it writes."""
        ...

    def in_our_words(self, error: DBAPIError) -> AdapterctlError: ...


class _Sqlite:
    """One file in a home, and its locks beside it."""

    reading: dict[str, Any] = {}  # noqa: RUF012 - never changed; the protocol wants a dict
    writing: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, path: Path, *, create: bool) -> None:
        self._path = path
        self._create = create
        self._writing = threading.Lock()

    @property
    def label(self) -> str:
        return str(self._path)

    @property
    def exists(self) -> bool:
        try:
            return self._path.exists()
        except OSError as error:  # a folder above it is closed to us
            raise NotAllowed(
                f"{self._path.parent} cannot be read: {error.strerror}",
                hint="use a home that is yours: --home or ADAPTERCTL_HOME",
            ) from error

    def prepare(self) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._not_writable(f": {error.strerror}") from error
        self.check_writable()

    def check_writable(self) -> None:
        if not self._writable:
            raise self._not_writable()

    def _not_writable(self, why: str = "") -> NotAllowed:
        hint = "use a home that is yours: --home or ADAPTERCTL_HOME"
        return NotAllowed(f"{self._path.parent} cannot be written{why}", hint=hint)

    @property
    def _writable(self) -> bool:
        return os.access(self._path.parent, os.W_OK) and (not self.exists or os.access(self._path, os.W_OK))

    @contextmanager
    def exclusive(self, name: str) -> Iterator[Lock]:
        with locked(self._lock_file(name)) as lock:
            try:
                yield _LockOnFile(lock)
            finally:
                lock.delete()  # one for each merge ever made would be many

    @contextmanager
    def try_exclusive(self, name: str) -> Iterator[bool]:
        with locked_if_free(self._lock_file(name)) as lock:
            try:
                yield lock is not None
            finally:
                if lock is not None:
                    lock.delete()

    def _lock_file(self, name: str) -> Path:
        self.check_writable()
        file = self._path.parent / "locks" / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.lock"
        file.parent.mkdir(parents=True, exist_ok=True)
        return file

    @contextmanager
    def turn(self) -> Iterator[None]:
        # SQLite lets a writer that finds another one sleep, up to 0.1 s at a time; threads of one process can queue
        if not self._writing.acquire(timeout=BUSY_TIMEOUT_S):
            said = f"is busy: others have written for {BUSY_TIMEOUT_S:g} s"
            raise Unavailable(f"{self.label} {said}", hint="try again", abroad=f"the ledger {said}")
        try:
            yield
        finally:
            self._writing.release()

    def engine(self) -> Engine:
        if not self._create and not self.exists:
            raise NotFound(
                f"there is no registry in {self._path.parent}",
                hint="`adapterctl register` makes one, `adapterctl demo` shows one",
            )
        uri = f"file:{quote(str(self._path.absolute()))}"
        uri += "?mode=rwc" if self._create else "?mode=rw" if self._writable else _read_only_mode(uri)

        def connect() -> sqlite3.Connection:
            connection = sqlite3.connect(
                uri, uri=True, timeout=BUSY_TIMEOUT_S, check_same_thread=False, isolation_level=None
            )
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA foreign_keys = ON")
            connection.execute("PRAGMA cache_size = -65536")  # KiB, taken only as needed; the default is 2 MB
            # pages of a larger file are read where the system has them, not copied: a walk takes a fifth less time
            connection.execute(f"PRAGMA mmap_size = {MAPPED_BYTES}")
            if self._create:  # stays with the file, so the others need not ask
                connection.execute("PRAGMA journal_mode = WAL")
            return connection

        return create_engine("sqlite://", creator=connect, poolclass=QueuePool, pool_timeout=BUSY_TIMEOUT_S)

    def begin(self, connection: Connection, *, writes: bool) -> None:
        _run(connection, "BEGIN IMMEDIATE" if writes else "BEGIN", ())

    def in_our_words(self, error: DBAPIError) -> AdapterctlError:
        if isinstance(error, OperationalError):
            # SQLite says "disk I/O error", for a read, too: even that takes a little room beside the file
            full = self._path.parent.exists() and shutil.disk_usage(self._path.parent).free < NEEDED_BYTES
            hint = "its disk is full: free some space there" if full else "see `adapterctl doctor`"
            return Unavailable(f"{self.label} cannot be used: {error.orig}", hint=hint, abroad=_UNUSABLE)
        return Corrupt(
            f"{self.label} is damaged: {error.orig}", hint="restore it from a backup", abroad="the ledger is damaged"
        )


@dataclass(frozen=True, slots=True)
class _LockOnFile:
    lock: FileLock

    def check(self) -> None:
        if not self.lock.is_held:
            raise _lost(f"somebody deleted {self.lock.path}")


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


class _Postgres:
    """A database on a server, through psycopg 3."""

    reading: dict[str, Any] = {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}  # noqa: RUF012
    writing: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, url: str) -> None:
        self._url = psycopg_url(url)

    @property
    def label(self) -> str:
        return _label(self._url)

    @property
    def exists(self) -> bool:
        return True

    def prepare(self) -> None:
        """The server's owner makes databases, not we."""

    def check_writable(self) -> None:
        """The server decides, when it is asked."""

    @contextmanager
    def exclusive(self, name: str) -> Iterator[Lock]:
        with self._locking("pg_advisory_lock", name) as (connection, _):
            yield _LockOnServer(connection)

    @contextmanager
    def try_exclusive(self, name: str) -> Iterator[bool]:
        with self._locking("pg_try_advisory_lock", name) as (_, got_it):
            yield bool(got_it)

    @contextmanager
    def _locking(self, function: str, name: str) -> Iterator[tuple[Connection, Any]]:
        engine = self._engine(poolclass=NullPool, isolation_level="AUTOCOMMIT")
        try:
            connection = engine.connect()
            answer = connection.execute(text(f"SELECT {function}(:key)"), {"key": _lock_key(name)}).scalar()
        except DBAPIError as error:
            raise self.in_our_words(error) from error
        try:
            yield connection, answer
        finally:
            connection.close()  # and with it the lock: the connection is in no pool

    def turn(self) -> AbstractContextManager[None]:
        return nullcontext()  # the server's rows are locked one by one

    def engine(self) -> Engine:
        # a connection that the server dropped while it lay idle is replaced before it is used
        return self._engine(pool_pre_ping=True, pool_size=10, max_overflow=30, pool_timeout=BUSY_TIMEOUT_S)

    def begin(self, connection: Connection, *, writes: bool) -> None:
        """The driver begins with the first statement."""

    def _engine(self, **options: Any) -> Engine:
        try:
            engine = create_engine(self._url, connect_args=_CONNECT, **options)
        except ImportError as error:
            raise Unavailable(
                "a ledger on PostgreSQL needs psycopg, which is not installed", hint="pip install 'adapterctl[service]'"
            ) from error
        # before SQLAlchemy's own first look at the server, which fails on text that comes as bytes
        event.listen(engine, "connect", self._check_encoding, insert=True)
        return engine

    def _check_encoding(self, connection: Any, _: object) -> None:
        try:
            check_encoding(connection.info.parameter_status("server_encoding"), self._url, "database_url")
        except Misconfigured:
            connection.close()
            raise

    def in_our_words(self, error: DBAPIError) -> AdapterctlError:
        if getattr(error.orig, "sqlstate", None) in _GAVE_WAY:
            return Conflict("two writers were in each other's way, and this one gave way", hint="try again")
        if isinstance(error, DataError):
            return InvalidInput(f"the ledger cannot keep this value: {error.orig}", hint="remove what is not text")
        return Unavailable(
            f"the ledger at {self.label} cannot be used: {' '.join(str(error.orig).split())}",
            hint="see `adapterctl doctor`",
            abroad=_UNUSABLE,
        )


@dataclass(frozen=True, slots=True)
class _LockOnServer:
    connection: Connection

    def check(self) -> None:
        try:  # as long as the server knows the connection, it knows its lock
            self.connection.execute(text("SELECT 1"))
        except DBAPIError as error:
            raise _lost("the database dropped the connection that held it") from error


def _lost(why: str) -> Unavailable:
    return Unavailable(f"the lock of this work was lost: {why}", hint="try again: what was begun is gone on with")


_UNUSABLE = "the ledger cannot be used now"
_CONNECT = {
    "connect_timeout": CONNECT_TIMEOUT_S,
    "application_name": "adapterctl",
    # a server that vanished without a word is noticed within a minute
    "keepalives_idle": 15,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,
}


def psycopg_url(url: str) -> URL:
    """A PostgreSQL address as SQLAlchemy takes it, for the one driver that is installed. Raises `Misconfigured`."""
    check_address("database_url", url)
    try:
        return make_url(url).set(drivername="postgresql+psycopg")
    except (ArgumentError, ValueError) as error:
        # the address itself stays unsaid: it may hold a password
        raise Misconfigured("database_url is no address", hint="postgresql://USER:PASSWORD@HOST:PORT/NAME") from error


def _lock_key(name: str) -> int:
    """A signed 64-bit number; other programs that lock in the same database use other ones, but for an accident."""
    return int.from_bytes(hashlib.sha256(f"adapterctl:{name}".encode()).digest()[:8], "big", signed=True)

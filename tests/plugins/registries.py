"""A registry on this machine for one test: the real ledger on SQLite, the real MLflow beside it, in the test's home.

The schemas are made once a session and copied, for migrating costs a second each time. So does a supervisor's process,
three of them: where it is not the subject, whoever queues a job lets a supervisor work in this process (`WorkHere`).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

from adapterctl.bootstrap import connect, job_handlers
from adapterctl.migrations import migrate
from adapterctl.registry.ports import VersionStore
from adapterctl.registry.services.local import LocalRegistry
from adapterctl.registry.settings import Settings, load_settings
from adapterctl.registry.stores import spawn_bell
from adapterctl.registry.stores.spawn_bell import SpawnBell, only_one
from adapterctl.registry.stores.sql.engine import Database, sqlite_url
from adapterctl.registry.stores.sql.ledger import SqlLedger
from adapterctl.workers.supervisor import Supervisor


class WorkHere:
    """A doorbell: the jobs of this home are done when `ring` returns, by a supervisor in the process of who rings.

    Supervisor and children are those of a command line; what is saved is a process that loads MLflow once more. As
    there, one of them works at a time, and what a job queues is left to the one that is at work.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def ring(self, job_id: str) -> None:
        with only_one(self._settings.home) as nobody_at_work:
            if not nobody_at_work:
                return
            registry = connect(self._settings)
            with closing(registry.ledger):
                supervisor = Supervisor(registry.ledger, job_handlers(registry), self._settings)
                supervisor.take_over()
                supervisor.work_off()

    def check(self) -> None:
        """Who rings works."""


def nobody_works(home: Path) -> bool:
    """Whether no supervisor of this home is alive, be it one that was rung for and has only begun."""
    with only_one(home) as free:
        return free and not any(_supervises(process, home) for process in Path("/proc").glob("[0-9]*"))


def _supervises(process: Path, home: Path) -> bool:
    with suppress(OSError):  # it ended meanwhile
        words = (process / "cmdline").read_bytes().split(b"\0")
        return b"adapterctl.workers.supervisor" in words and os.fsencode(home) in words
    return False


def supervise(registry: LocalRegistry, *, crash_at: str = "", once: Path | None = None) -> int:
    """Let a supervisor of its own process work until nothing is left, or die at a named point; returns its exit code.

    With `once` only the first process that gets there dies, and makes that file.
    """
    crash = {"ADAPTERCTL_CRASH_AT": crash_at} | ({"ADAPTERCTL_CRASH_ONCE": str(once)} if once else {})
    command = [sys.executable, "-P", "-m", "adapterctl.workers.supervisor", "--home", str(registry.settings.home)]
    return subprocess.run(
        command, env={**os.environ, **registry.settings.to_env(), **crash}, check=False, timeout=240
    ).returncode


@pytest.fixture(scope="session")
def ledger_schema(tmp_path_factory: pytest.TempPathFactory, clean_environment: None) -> Path:
    """An empty database of ours."""
    home = tmp_path_factory.mktemp("ledger-schema")
    migrate(sqlite_url(home))
    return home / "registry.db"


@pytest.fixture
def sql_ledger(home: Path, ledger_schema: Path) -> Iterator[SqlLedger]:
    """The ledger of an empty registry in `home`."""
    shutil.copy(ledger_schema, home / "registry.db")
    ledger = SqlLedger(Database(sqlite_url(home)))
    ledger.establish("embedded")
    yield ledger
    ledger.close()


@pytest.fixture
def version_store(home: Path, sql_ledger: SqlLedger, mlflow_schema: Path) -> VersionStore:
    """The MLflow of that registry."""
    from adapterctl.registry.stores.mlflow_versions import MlflowVersions  # deferred: MLflow takes three seconds

    shutil.copy(mlflow_schema, home / "mlflow.db")
    return MlflowVersions(None, home, sql_ledger.registry_id)


@pytest.fixture
def work_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registries that this test opens start no supervisor's process."""
    monkeypatch.setattr(spawn_bell, "SpawnBell", WorkHere)


@pytest.fixture
def in_background(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a person has it: who queues a job starts a process for it, and waits for that or does not."""
    monkeypatch.setattr(WorkHere, "ring", lambda self, job_id: SpawnBell(self._settings).ring(job_id))


@pytest.fixture(scope="module")
def two_parents(tmp_path_factory: pytest.TempPathFactory, ledger_schema: Path, mlflow_schema: Path) -> LocalRegistry:
    """A whole registry for the tests of one file, with `translate:v1` and `chat:v1`; who queues a job does it."""
    from tiny import write_tiny_adapter  # deferred: pytest wants to import its plugins itself

    home = tmp_path_factory.mktemp("two-parents")
    shutil.copy(ledger_schema, home / "registry.db")
    shutil.copy(mlflow_schema, home / "mlflow.db")
    registry = connect(load_settings({"home": home, "idle_s": 0.3}))
    registry.bell = WorkHere(registry.settings)
    for seed, name in enumerate(("translate", "chat")):
        registry.register(str(write_tiny_adapter(tmp_path_factory.mktemp(name), seed=seed)), name=name)
    return registry

"""A registry on this machine for one test: the real ledger on SQLite, the real MLflow beside it, in the test's home.

The schemas are made once a session and copied, for migrating costs a second each time.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapterctl.bootstrap import connect
from adapterctl.migrations import migrate
from adapterctl.registry.ports import VersionStore
from adapterctl.registry.services.local import LocalRegistry
from adapterctl.registry.settings import load_settings
from adapterctl.registry.stores.spawn_bell import only_one
from adapterctl.registry.stores.sql.engine import Database, sqlite_url
from adapterctl.registry.stores.sql.ledger import SqlLedger


def nobody_works(home: Path) -> bool:
    """Whether no supervisor of this home is alive."""
    with only_one(home) as free:
        return free


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


@pytest.fixture(scope="module")
def two_parents(tmp_path_factory: pytest.TempPathFactory, ledger_schema: Path, mlflow_schema: Path) -> LocalRegistry:
    """A whole registry for the tests of one file, with `translate:v1` and `chat:v1`, whose supervisors leave soon."""
    from tiny import write_tiny_adapter  # deferred: pytest wants to import its plugins itself

    home = tmp_path_factory.mktemp("two-parents")
    shutil.copy(ledger_schema, home / "registry.db")
    shutil.copy(mlflow_schema, home / "mlflow.db")
    registry = connect(load_settings({"home": home, "idle_s": 0.3}))
    for seed, name in enumerate(("translate", "chat")):
        registry.register(str(write_tiny_adapter(tmp_path_factory.mktemp(name), seed=seed)), name=name)
    return registry

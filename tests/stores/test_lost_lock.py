"""A registration loses its lock while it is inside MLflow, and another one registers the same meanwhile.

PostgreSQL drops the connection that held the lock, or somebody deletes the lock's file. The lock is lost between the
last look at it and MLflow's answer, so the loser cannot know before the harm is done.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from mlflow import MlflowClient
from postgres import PostgresServer
from tiny import write_tiny_adapter

from adapterctl.bootstrap import connect
from adapterctl.registry.api import Registered
from adapterctl.registry.domain.errors import Unavailable
from adapterctl.registry.domain.refs import parse_ref
from adapterctl.registry.services.local import LocalRegistry
from adapterctl.registry.settings import Settings

WAIT_S = 60.0
NAME, KEY = "late", "adapterctl.key"
#: The three things that are made in MLflow, and where.
STEPS = {"run": "_create_run", "model": "_create_model", "version": "_create_version"}


@dataclass(frozen=True)
class Two:
    """Two executors on one registry, and what makes the locks that are held now be lost."""

    first: LocalRegistry
    second: LocalRegistry
    lose_locks: Callable[[], None]


@pytest.fixture
def two(request: pytest.FixtureRequest, home: Path, tmp_path: Path) -> Iterator[Two]:
    if request.param == "sqlite":
        shutil.copy(request.getfixturevalue("ledger_schema"), home / "registry.db")
        shutil.copy(request.getfixturevalue("mlflow_schema"), home / "mlflow.db")
        settings = Settings(home=home, actor="ada")

        def lose_locks() -> None:
            for file in (home / "locks").iterdir():
                file.unlink()
    else:
        server: PostgresServer = request.getfixturevalue("postgres")
        settings = Settings(
            home=home,
            database_url=request.getfixturevalue("postgres_url"),
            mlflow_uri=request.getfixturevalue("new_database")(request.getfixturevalue("postgres_mlflow_schema")),
            artifacts=(tmp_path / "artifacts").as_uri(),
            actor="ada",
        )

        def lose_locks() -> None:
            server.run("SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND granted")

    first, second = connect(settings), connect(settings)
    yield Two(first, second, lose_locks)
    first.ledger.close()
    second.ledger.close()


def made(registry: LocalRegistry) -> dict[str, list[Any]]:
    """What MLflow holds of the adapter: versions, runs and models."""
    client = MlflowClient(registry.version_store.uri, registry.version_store.uri)
    experiment = client.get_experiment_by_name("adapters").experiment_id
    return {
        "versions": [int(each.version) for each in client.search_model_versions(f"name = '{NAME}'")],
        "runs": [each.info.run_id for each in client.search_runs([experiment])],
        "models": [each.model_id for each in client.search_logged_models([experiment])],
    }


@dataclass
class Late:
    """A method that is slow at its start: `inside` is set there, and it goes on when told to."""

    method: Callable[..., Any]
    inside: Event
    go_on: Event

    def __call__(self, *asked: Any, **named: Any) -> Any:
        self.inside.set()
        assert self.go_on.wait(WAIT_S)
        return self.method(*asked, **named)


@contextmanager
def overtaken(
    two: Two, owner: Any, method: str, source: str, patch: pytest.MonkeyPatch
) -> Iterator[Future[Registered]]:
    """The first one registers and is held up at the start of a method; in the block it has lost its lock there."""
    late = Late(getattr(owner, method), Event(), Event())
    patch.setattr(owner, method, late)
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(two.first.register, source, name=NAME)
        try:
            assert late.inside.wait(WAIT_S)
            two.lose_locks()
            yield slow
        finally:
            late.go_on.set()


def assert_once(two: Two, source: str, registered: Registered) -> None:
    """One version, one run and one model, which are those of the ledger, and files that are whole."""
    version = two.second.ledger.version_by_number(NAME, registered.version.number)
    assert version is not None
    placement = version.placement
    assert made(two.first) == {
        "versions": [version.number],
        "runs": [placement.run_id],
        "models": [placement.model_id],
    }
    assert [each.id for each in two.first.ledger.versions()] == [version.id]
    assert two.first.verify(parse_ref(version.label)).files == "intact"
    assert two.first.register(source, name=NAME).version.ref == version.label


@pytest.mark.parametrize(
    ("two", "step"), [*(("postgres", step) for step in STEPS), ("sqlite", "version")], indirect=["two"]
)
def test_who_lost_its_lock_inside_mlflow_doubles_nothing(
    two: Two, step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    source = str(write_tiny_adapter(tmp_path / "adapter", seed=1))

    with overtaken(two, two.first.version_store, STEPS[step], source, monkeypatch) as slow:
        registered = two.second.register(source, name=NAME)

    with pytest.raises(Unavailable, match="lock"):
        slow.result(WAIT_S)
    assert_once(two, source, registered)


@pytest.mark.parametrize("two", ["postgres"], indirect=True)
def test_who_lost_its_lock_when_mlflow_had_all_finds_its_own_version(
    two: Two, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    source = str(write_tiny_adapter(tmp_path / "adapter", seed=1))

    with overtaken(two, two.first.ledger, "add_version", source, monkeypatch) as slow:
        registered = two.second.register(source, name=NAME)

    assert slow.result(WAIT_S).version.ref == registered.version.ref
    assert_once(two, source, registered)

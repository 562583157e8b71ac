"""A registry with two parents, ready to be merged by real supervisors and real children."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tiny import TinyAdapter

from adapterctl.bootstrap import connect, job_handlers
from adapterctl.registry.domain.job import Job
from adapterctl.registry.domain.recipe import MergeRequest
from adapterctl.registry.domain.refs import parse_parent
from adapterctl.registry.services.local import LocalRegistry
from adapterctl.registry.settings import Settings
from adapterctl.workers.supervisor import Supervisor


class NobodyHears:
    """A doorbell that starts nothing: each test decides itself who works, and when."""

    def ring(self, job_id: str) -> None:
        return


@pytest.fixture
def settings(home: Path) -> Settings:
    return Settings(home=home, actor="ada", threads=1, lease_s=10.0, idle_s=0.3)


@pytest.fixture
def registry(
    settings: Settings, ledger_schema: Path, mlflow_schema: Path, tiny_adapter: TinyAdapter, tmp_path: Path
) -> Iterator[LocalRegistry]:
    """Holds `a:v1` and `b:v1`, which can be merged."""
    shutil.copy(ledger_schema, settings.home / "registry.db")
    shutil.copy(mlflow_schema, settings.home / "mlflow.db")
    registry = connect(settings)
    registry.bell = NobodyHears()
    for seed, name in enumerate("ab"):
        registry.register(str(tiny_adapter(tmp_path / name, seed=seed)), name=name)
    yield registry
    registry.ledger.close()


@pytest.fixture
def submit(registry: LocalRegistry) -> Callable[..., Job]:
    """Queue a merge of both parents; another weight is another recipe."""

    def queue(weight: float = 1.0, *, into: str = "merged") -> Job:
        parents = (parse_parent(f"a:v1={weight}"), parse_parent("b:v1"))
        job = registry.merge(MergeRequest(parents, into=into)).job
        assert job is not None
        return job

    return queue


@pytest.fixture
def new_supervisor(registry: LocalRegistry, settings: Settings) -> Callable[..., Supervisor]:
    """A supervisor in this process; handlers may be replaced by kind."""

    def make(settings: Settings = settings, **handlers: object) -> Supervisor:
        return Supervisor(registry.ledger, {**job_handlers(registry), **handlers}, settings)

    return make

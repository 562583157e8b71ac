"""A real MLflow on SQLite, and versions to put into it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import mlflow
import pytest

from adapterctl.registry.domain.adapter import AdapterFacts, LoraModule, TensorEntry
from adapterctl.registry.domain.digest import json_digest
from adapterctl.registry.domain.version import AdapterVersion, Base, NewVersion, Summary, VersionSpec
from adapterctl.registry.ports import Parent
from adapterctl.registry.stores.mlflow_server import embedded_uri
from adapterctl.registry.stores.mlflow_versions import MlflowVersions

REGISTRY_ID = "0192aaaa-registry"
BASE = Base("base-1", "tiny/base")


class Shelf:
    """The version store of one home, and MLflow's own client for the same."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.registry_id = REGISTRY_ID
        self.store = MlflowVersions(None, home, REGISTRY_ID)
        self.client = mlflow.MlflowClient(tracking_uri=embedded_uri(home), registry_uri=embedded_uri(home))

    def runs(self, condition: str = "") -> list[mlflow.entities.Run]:
        found = self.client.search_runs([self.client.get_experiment_by_name("adapters").experiment_id], condition)
        return [self.client.get_run(run.info.run_id) for run in found]  # a search leaves model inputs out

    def stage(self, weights: str) -> Path:
        """A stage folder as a merge leaves it: three files, private to its maker."""
        folder = Path(mkdtemp(prefix="stage-", dir=self.home))
        (folder / "adapter_model.safetensors").write_text(weights)
        (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
        (folder / "README.md").write_text("an adapter\n")
        return folder

    def put(self, name: str, weights: str, parents: Sequence[Parent] = (), **fields: Any) -> AdapterVersion:
        """Place a version and give it back as the ledger would hold it."""
        spec = spec_of(name, weights, **fields)
        self.store.ensure_adapter(name, f"id-of-{name}", spec.base)
        version_id, placement = self.store.place(
            spec,
            adapter_id=f"id-of-{name}",
            version_id=f"version-{name}-{weights}",
            key=f"{name}-{weights}",
            staged=self.stage(weights),
            parents=parents,
        )
        return recorded(spec, version_id, placement)

    def put_family(self) -> dict[str, AdapterVersion]:
        """translate:v1 and chat:v1, and their merge at 0.6 and 0.4, by name."""
        translate = self.put(
            "translate", "t", metrics={"chrf,none": 41.5}, dataset="gettext catalogues", params={"lr": "1e-3"}
        )
        chat = self.put("chat", "c", kind="train", tags={"team": "search"})
        merged = self.put(
            "translate-chat",
            "m",
            [Parent(translate, 0.6), Parent(chat, 0.4)],
            kind="merge",
            recipe={"method": "cat", "seed": None, "options": {}},
            recipe_digest=json_digest("recipe"),
            receipt={"loss": 0.25, "identity": True},
        )
        return {version.name: version for version in (translate, chat, merged)}


def spec_of(name: str, weights: str, **fields: Any) -> NewVersion:
    """A version to be: its content digest follows from the text that stands for its weights."""
    a = TensorEntry("q.lora_A.weight", "F32", (2, 4), 0, 32)
    b = TensorEntry("q.lora_B.weight", "F32", (4, 2), 32, 64)
    facts = AdapterFacts((LoraModule("q", "linear", 2, 1.0, a, b),), BASE.name, None, "CAUSAL_LM", False, {}, {})
    fixed = {"kind": "import", "base": BASE, "facts": facts, "content_digest": json_digest(weights)}
    return NewVersion(adapter=name, **{**fixed, **fields})


def recorded(spec: NewVersion, version_id: str, placement: Any) -> AdapterVersion:
    kept = VersionSpec(**{field: getattr(spec, field) for field in VersionSpec.__dataclass_fields__})
    summary = Summary(rank=2, dtype="F32", modules=1, parameters=16)
    return AdapterVersion(version_id, f"id-of-{spec.adapter}", 0.0, "me", "live", kept, summary, placement)


@pytest.fixture(name="spec_of")
def _spec_of() -> Callable[..., NewVersion]:
    return spec_of


@pytest.fixture(name="recorded")
def _recorded() -> Callable[..., AdapterVersion]:
    return recorded


@pytest.fixture
def mlflow_home(home: Path, mlflow_schema: Path) -> Path:
    shutil.copy(mlflow_schema, home / "mlflow.db")
    return home


@pytest.fixture
def shelf(mlflow_home: Path) -> Shelf:
    """An empty one."""
    return Shelf(mlflow_home)


@pytest.fixture
def store(shelf: Shelf) -> MlflowVersions:
    return shelf.store


@pytest.fixture
def client(shelf: Shelf) -> mlflow.MlflowClient:
    return shelf.client


@pytest.fixture
def stage(shelf: Shelf) -> Callable[[str], Path]:
    return shelf.stage


@pytest.fixture
def put(shelf: Shelf) -> Callable[..., AdapterVersion]:
    return shelf.put


@pytest.fixture
def family(shelf: Shelf) -> dict[str, AdapterVersion]:
    return shelf.put_family()


@pytest.fixture(scope="module")
def shared(mlflow_schema: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Shelf, dict[str, AdapterVersion]]:
    """A shelf with the family on it, for all tests of a file that leave the family alone."""
    home = tmp_path_factory.mktemp("shared-home")
    shutil.copy(mlflow_schema, home / "mlflow.db")
    shelf = Shelf(home)
    return shelf, shelf.put_family()

"""A real MLflow on SQLite for each test, and versions to put into it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest

from adapterctl.registry.domain.adapter import AdapterFacts, LoraModule, TensorEntry
from adapterctl.registry.domain.digest import json_digest
from adapterctl.registry.domain.version import AdapterVersion, Base, NewVersion, Summary, VersionSpec
from adapterctl.registry.ports import Parent
from adapterctl.registry.stores.mlflow_versions import MlflowVersions

REGISTRY_ID = "0192aaaa-registry"
BASE = Base("base-1", "tiny/base")


@pytest.fixture
def mlflow_home(home: Path, mlflow_schema: Path) -> Path:
    shutil.copy(mlflow_schema, home / "mlflow.db")
    return home


@pytest.fixture
def store(mlflow_home: Path) -> MlflowVersions:
    return MlflowVersions(None, mlflow_home, REGISTRY_ID)


@pytest.fixture
def spec_of() -> Callable[..., NewVersion]:
    """A version to be: its content digest follows from the text that stands for its weights."""

    def make(name: str, weights: str, **fields: Any) -> NewVersion:
        a = TensorEntry("q.lora_A.weight", "F32", (2, 4), 0, 32)
        b = TensorEntry("q.lora_B.weight", "F32", (4, 2), 32, 64)
        module = LoraModule("q", "linear", 2, 1.0, a, b)
        facts = AdapterFacts((module,), BASE.name, None, "CAUSAL_LM", False, {}, {})
        fixed = {"kind": "import", "base": BASE, "facts": facts, "content_digest": json_digest(weights)}
        return NewVersion(adapter=name, **{**fixed, **fields})

    return make


@pytest.fixture
def stage(mlflow_home: Path) -> Callable[[str], Path]:
    """A stage folder as a merge leaves it: three files, private to its maker."""

    def make(weights: str) -> Path:
        folder = Path(mkdtemp(prefix="stage-", dir=mlflow_home))
        (folder / "adapter_model.safetensors").write_text(weights)
        (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
        (folder / "README.md").write_text("an adapter\n")
        return folder

    return make


@pytest.fixture
def put(
    store: MlflowVersions, spec_of: Callable[..., NewVersion], stage: Callable[[str], Path]
) -> Callable[..., AdapterVersion]:
    """Place a version and give it back as the ledger would hold it."""

    def make(name: str, weights: str, parents: Sequence[Parent] = (), **fields: Any) -> AdapterVersion:
        spec = spec_of(name, weights, **fields)
        store.ensure_adapter(name, f"id-of-{name}", spec.base)
        version_id, placement = store.place(
            spec,
            adapter_id=f"id-of-{name}",
            version_id=f"version-{name}-{weights}",
            key=f"{name}-{weights}",
            staged=stage(weights),
            parents=parents,
        )
        kept = VersionSpec(**{f: getattr(spec, f) for f in VersionSpec.__dataclass_fields__})
        summary = Summary(rank=2, dtype="F32", modules=1, parameters=16)
        return AdapterVersion(version_id, f"id-of-{name}", 0.0, "me", "live", kept, summary, placement)

    return make


@pytest.fixture
def family(put: Callable[..., AdapterVersion]) -> dict[str, AdapterVersion]:
    """translate:v1 and chat:v1, and their merge at 0.6 and 0.4."""
    translate = put("translate", "t", metrics={"chrf,none": 41.5}, dataset="gettext catalogues", params={"lr": "1e-3"})
    chat = put("chat", "c", kind="train", tags={"team": "search"})
    merged = put(
        "translate-chat",
        "m",
        [Parent(translate, 0.6), Parent(chat, 0.4)],
        kind="merge",
        recipe={"method": "cat", "seed": None, "options": {}},
        recipe_digest=json_digest("recipe"),
        receipt={"loss": 0.25, "identity": True},
    )
    return {version.name: version for version in (translate, chat, merged)}

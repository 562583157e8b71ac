"""What every ledger has to pass is written once; a fixture gives each test a new, empty ledger of each kind."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import uuid6

from adapterctl.registry.domain.adapter import AdapterFacts, LoraModule, TensorEntry
from adapterctl.registry.domain.version import AdapterVersion, Base, Edge, FileRecord, NewVersion, Placement
from adapterctl.registry.ports import Ledger

AddVersion = Callable[..., AdapterVersion]


@pytest.fixture(params=["sql_ledger", "postgres_ledger"])
def ledger(request: pytest.FixtureRequest) -> Ledger:
    """An empty ledger of each kind; the parameter names the fixture that makes it."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def address(ledger: Ledger, request: pytest.FixtureRequest) -> str:
    """What leads another process to that ledger: a home, or an address."""
    shared = request.node.callspec.params["ledger"] == "postgres_ledger"
    return str(request.getfixturevalue("postgres_url" if shared else "home"))


@pytest.fixture
def facts() -> AdapterFacts:
    a, b = (
        TensorEntry("q.lora_A.weight", "F32", (4, 8), 0, 128),
        TensorEntry("q.lora_B.weight", "F32", (16, 4), 128, 384),
    )
    module = LoraModule("q", "linear", 4, 2.0, a, b)
    return AdapterFacts((module,), "tiny", None, "CAUSAL_LM", False, {"r": 4, "lora_alpha": 8}, {"format": "pt"})


@pytest.fixture
def add_version(ledger: Ledger, facts: AdapterFacts) -> AddVersion:
    """Add a version to the ledger; whatever is not given is made up, so that no two have the same content."""
    digests = (f"{n:064x}" for n in itertools.count(1))
    numbers: dict[str, Iterator[int]] = {}

    def add(
        name: str = "translate",
        *,
        parents: Sequence[AdapterVersion] = (),
        version_id: str | None = None,
        job: tuple[str, int] | None = None,
        then: Sequence[Any] = (),
        **spec: Any,
    ) -> AdapterVersion:
        adapter_id = ledger.ensure_adapter(name)
        version_id = version_id or str(uuid6.uuid7())
        base = spec.pop("base", None) or ledger.add_base(Base("base-1", "tiny"), ["tiny"])
        number = spec.pop("number", None) or next(numbers.setdefault(name, itertools.count(1)))
        values = {"kind": "merge" if parents else "import", "content_digest": next(digests), **spec}
        files = (FileRecord("adapter_model.safetensors", 384, "0" * 64),)
        return ledger.add_version(
            version_id,
            adapter_id,
            NewVersion(adapter=name, base=base, facts=facts, **values),
            Placement(number, f"m-{version_id}", "run", "file:///artifacts", files),
            [Edge(version_id, i, parent.id, "merge", 1.0) for i, parent in enumerate(parents)],
            created_by="ada",
            job=job,
            then=then,
        )

    return add

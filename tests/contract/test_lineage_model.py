"""Edges, recalls, stages and tombstones against a model in plain Python: whatever order of deeds, both say the same.

More steps than the default: `LINEAGE_STEPS=10000 pytest --timeout=0 tests/contract/test_lineage_model.py`.
"""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass, field, replace

import pytest
import uuid6
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from walks import around

from adapterctl.registry.domain.errors import HasDescendants, Recalled, Refused, StageMoved
from adapterctl.registry.domain.version import Base, Edge, FileRecord, NewVersion, Placement
from adapterctl.registry.ports import Ledger

STEPS = 50
_numbers = itertools.count(1)
Pick = st.integers(0, 10_000)
NAMES, STAGES = ("translate", "chat", "omni"), ("staging", "production")


@dataclass
class Model:
    """What a registry is, as sets and dicts. Edges are (child, position, parent, kind)."""

    versions: list[str] = field(default_factory=list)
    adapter: dict[str, str] = field(default_factory=dict)
    edges: set[tuple[str, int, str, str]] = field(default_factory=set)
    removed: set[str] = field(default_factory=set)
    recalled: set[str] = field(default_factory=set)
    stages: dict[tuple[str, str], str] = field(default_factory=dict)

    def live(self) -> list[str]:
        return [each for each in self.versions if each not in self.removed]

    def made_of(self, version: str) -> set[str]:
        parents = {parent for child, _, parent, kind in self.edges if child == version and kind != "supersedes"}
        return parents.union(*(self.made_of(parent) for parent in parents)) if parents else parents

    def is_recalled(self, version: str) -> bool:
        return bool(({version} | self.made_of(version)) & self.recalled)

    def needed(self, version: str) -> bool:
        below = {each for each in self.versions if version in self.made_of(each)}
        return bool(below - self.removed) or version in self.stages.values()


class Lineage(RuleBasedStateMachine):
    """Rules are the deeds of people as the ledger sees them; a deed that the model forbids has to be refused."""

    ledger: Ledger  # set by the test, with `facts`
    facts: object

    def __init__(self) -> None:
        super().__init__()
        self.model = Model()
        self.run = next(_numbers)
        self.touched: str | None = None

    def _pick(self, among: list[str], pick: int) -> str:
        return among[pick % len(among)]

    def _add(self, name: str, edges: list[tuple[str, str]]) -> None:
        """A version in adapter `name` with edges (parent, kind); refused where a parent is removed."""
        adapter = f"{name}-{self.run}"
        adapter_id, version_id, number = self.ledger.ensure_adapter(adapter), str(uuid6.uuid7()), next(_numbers)
        kind = "merge" if any(kind == "merge" for _, kind in edges) else "train" if edges else "import"
        digest = f"{number:064x}"
        spec = NewVersion(
            adapter=adapter,
            kind=kind,
            content_digest=digest,
            base=self.ledger.add_base(Base("base-1", "tiny"), ["tiny"]),
            facts=self.facts,
            recipe_digest=digest if kind == "merge" else None,
        )
        placement = Placement(number, "m", "run", "file:///x", (FileRecord("adapter_model.safetensors", 1, "0" * 64),))
        rows = [Edge(version_id, at, parent, kind) for at, (parent, kind) in enumerate(edges)]
        if {parent for parent, _ in edges} & self.model.removed:
            with pytest.raises(Refused, match="removed meanwhile"):
                self.ledger.add_version(version_id, adapter_id, spec, placement, rows, created_by="ada")
            assert self.ledger.version(version_id) is None
            return
        self.ledger.add_version(version_id, adapter_id, spec, placement, rows, created_by="ada")
        self.model.versions.append(version_id)
        self.model.adapter[version_id] = adapter_id
        self.model.edges |= {(version_id, at, parent, kind) for at, (parent, kind) in enumerate(edges)}
        self.touched = version_id

    @rule(name=st.sampled_from(NAMES))
    def register(self, name: str) -> None:
        self._add(name, [])

    @precondition(lambda self: self.model.versions)
    @rule(name=st.sampled_from(NAMES), first=Pick, second=Pick)
    def merge(self, name: str, first: int, second: int) -> None:
        self._add(name, [(self._pick(self.model.versions, pick), "merge") for pick in (first, second)])

    @precondition(lambda self: self.model.versions)
    @rule(name=st.sampled_from(NAMES), parent=Pick, kind=st.sampled_from(["trained_from", "imported"]))
    def train_or_import(self, name: str, parent: int, kind: str) -> None:
        self._add(name, [(self._pick(self.model.versions, parent), kind)])

    @precondition(lambda self: self.model.versions)
    @rule(name=st.sampled_from(NAMES), parents=st.tuples(Pick, Pick), old=Pick)
    def rebuild(self, name: str, parents: tuple[int, int], old: int) -> None:
        merged = [(self._pick(self.model.versions, pick), "merge") for pick in parents]
        self._add(name, [*merged, (self._pick(self.model.versions, old), "supersedes")])

    @precondition(lambda self: self.model.versions)
    @rule(pick=Pick)
    def remove(self, pick: int) -> None:
        version = self.touched = self._pick(self.model.versions, pick)
        if self.model.needed(version):
            with pytest.raises((HasDescendants, Refused)):
                self.ledger.remove_version(version, actor="ada", reason="")
            return
        self.ledger.remove_version(version, actor="ada", reason="")
        self.model.removed.add(version)

    @precondition(lambda self: self.model.versions)
    @rule(pick=Pick)
    def lose(self, pick: int) -> None:
        """What MLflow has lost becomes a tombstone whatever is made of it."""
        version = self.touched = self._pick(self.model.versions, pick)
        if version in self.model.stages.values():
            with pytest.raises(Refused):
                self.ledger.remove_version(version, actor="ada", reason="", lost=True)
            return
        self.ledger.remove_version(version, actor="ada", reason="", lost=True)
        self.model.removed.add(version)

    @precondition(lambda self: self.model.versions)
    @rule(pick=Pick, to=st.integers(0, 3))
    def rename(self, pick: int, to: int) -> None:
        version = self.touched = self._pick(self.model.versions, pick)
        adapter_id, known = self.model.adapter[version], self.ledger.version(version)
        assert known is not None
        name, holder = f"renamed-{to}-{self.run}", self.ledger.adapter_id(f"renamed-{to}-{self.run}")
        if holder not in (None, adapter_id):
            with pytest.raises(Refused, match="another adapter is"):
                self.ledger.rename_adapter(adapter_id, name, actor="ada")
            return
        self.ledger.rename_adapter(adapter_id, name, actor="ada")
        assert self.ledger.version_by_number(name, known.number) == replace(
            known, spec=replace(known.spec, adapter=name)
        )
        assert known.name == name or self.ledger.former_names()[known.name] == name

    @precondition(lambda self: self.model.versions)
    @rule(pick=Pick, action=st.sampled_from(["recall", "recall", "undo"]))
    def recall(self, pick: int, action: str) -> None:
        version = self.touched = self._pick(self.model.versions, pick)
        self.ledger.recall(version, action, actor="ada", reason="because")
        (self.model.recalled.add if action == "recall" else self.model.recalled.discard)(version)

    @precondition(lambda self: self.model.versions)
    @rule(pick=Pick, stage=st.sampled_from(STAGES), action=st.sampled_from(["promote", "rollback", "adopt", "force"]))
    def promote(self, pick: int, stage: str, action: str) -> None:
        version = self.touched = self._pick(self.model.versions, pick)
        place = (self.model.adapter[version], stage)
        asked = {"version_id": version, "action": action, "actor": "ada", "reason": "", "expected": None}
        held = self.model.stages.get(place)
        if held is not None:
            with pytest.raises(StageMoved):
                self.ledger.move_stage(*place, **asked)
        asked["expected"] = held
        if version in self.model.removed or self.model.is_recalled(version):
            with pytest.raises(Refused if version in self.model.removed else Recalled):
                self.ledger.move_stage(*place, **asked)
            return
        self.ledger.move_stage(*place, **asked)
        self.model.stages[place] = version

    @precondition(lambda self: self.model.stages)
    @rule(pick=Pick)
    def demote(self, pick: int) -> None:
        place, held = sorted(self.model.stages.items())[pick % len(self.model.stages)]
        self.ledger.move_stage(*place, version_id=None, expected=held, action="demote", actor="ada", reason="")
        del self.model.stages[place]

    @invariant()
    def both_say_the_same(self) -> None:
        ours = set(self.model.versions)
        assert self.ledger.recalls().keys() & ours == {each for each in ours if self.model.is_recalled(each)}
        adapters = set(self.model.adapter.values())
        stages = {
            (adapter, stage): held
            for adapter, of_adapter in self.ledger.stages().items()
            if adapter in adapters
            for stage, held in of_adapter.items()
        }
        assert stages == self.model.stages
        if self.touched is None:
            return
        for edges, up in ((self.ledger.edges_up(self.touched), True), (self.ledger.edges_down(self.touched), False)):
            found = {(each.child_id, each.position, each.parent_id, each.kind) for each in edges}
            assert len(found) == len(edges)
            assert found == around(self.model.edges, self.touched, up=up)
        below = {each for each in ours if self.touched in self.model.made_of(each)}
        assert set(self.ledger.descendants([self.touched])) == below | {self.touched}
        version = self.ledger.version(self.touched)
        assert version is not None
        assert (version.state == "removed") == (self.touched in self.model.removed)


def test_lineage_obeys_its_model(ledger: Ledger, facts, request: pytest.FixtureRequest):
    shared = request.node.callspec.params["ledger"] == "postgres_ledger"
    steps = int(os.environ.get("LINEAGE_STEPS", "150" if shared else "500"))

    run_state_machine_as_test(
        type("Lineage", (Lineage,), {"ledger": ledger, "facts": facts}),
        settings=settings(
            max_examples=max(1, steps // STEPS),
            stateful_step_count=STEPS,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
        ),
    )

"""Our edges against a model in plain Python while people work through every verb, and in MLflow behind our back.

The real ledger and the real MLflow; merges by the real engine, in this process. How many steps: `LINEAGE_STEPS=525
pytest --timeout=0 tests/services/test_lineage_model.py`. tests/contract has the ledger's part,
which is quick enough for ten thousand.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from tiny import write_tiny_adapter
from walks import around

from adapterctl.bootstrap import job_handlers
from adapterctl.registry.domain.errors import HasDescendants, Recalled, Refused
from adapterctl.registry.domain.job import JobState
from adapterctl.registry.domain.recipe import MergeRequest
from adapterctl.registry.domain.refs import parse_parent, parse_ref
from adapterctl.registry.services.carry import export, read_family, take_in
from adapterctl.registry.services.local import LocalRegistry
from adapterctl.registry.services.schedule import Done
from adapterctl.workers import runner

STEPS = 25
NAMES = ("translate", "chat", "omni")
Pick = st.integers(0, 10_000)
_numbers = itertools.count(1)
Row = tuple[str, int, str, str, float | None]  # child, position, parent, kind, weight


class Silent:
    def ring(self, job_id: str) -> None:
        """Nobody is there: the test does the jobs itself."""


class Quiet(runner.Conversation):
    def say(self, line: Mapping[str, Any]) -> None:
        """Nobody listens."""


def work_off(registry: LocalRegistry) -> None:
    """What a supervisor and its children do, in this process."""
    handlers = job_handlers(registry)
    while (job := registry.ledger.claim("test", 600.0)) is not None:
        with handlers[job.kind].begin(job) as task:
            if isinstance(task, Done):
                result = task.result
            else:
                made = runner.run(json.loads(json.dumps(task.body)), Quiet())
                result = handlers[job.kind].finish(job, task, made)
        registry.ledger.finish(job.id, job.attempt, JobState.SUCCEEDED, result=result)


@dataclass
class Model:
    """Versions by their label, in the order in which they came."""

    versions: list[str] = field(default_factory=list)
    edges: set[Row] = field(default_factory=set)
    removed: set[str] = field(default_factory=set)
    lost: set[str] = field(default_factory=set)  # deleted in MLflow
    recalled: set[str] = field(default_factory=set)
    stages: dict[str, str] = field(default_factory=dict)

    def parents(self, version: str) -> set[str]:
        return {parent for child, _, parent, kind, _ in self.edges if child == version and kind != "supersedes"}

    def made_of(self, version: str) -> set[str]:
        parents = self.parents(version)
        return parents.union(*(self.made_of(parent) for parent in parents)) if parents else parents

    def usable(self) -> list[str]:
        """Live, with its files, and not recalled."""
        gone = self.removed | self.lost
        return [v for v in self.versions if v not in gone and not ({v} | self.made_of(v)) & self.recalled]

    def needed(self, version: str) -> bool:
        below = {each for each in self.versions if version in self.made_of(each)}
        return bool(below - self.removed) or version in self.stages.values()


class Lineage(RuleBasedStateMachine):
    registry: LocalRegistry  # set by the test, with `room`
    room: Path

    def __init__(self) -> None:
        super().__init__()
        self.model = Model()
        self.run = next(_numbers)
        self.touched: str | None = None

    def _pick(self, among: list[str], pick: int) -> str:
        return among[pick % len(among)]

    def _client(self) -> Any:
        return self.registry.version_store._client

    def _learn(self, label: str, edges: list[tuple[str, str, float | None]]) -> None:
        assert label not in self.model.versions
        self.model.versions.append(label)
        self.model.edges |= {(label, at, parent, kind, weight) for at, (parent, kind, weight) in enumerate(edges)}
        self.touched = label

    def _register(self, name: str, parent: str | None) -> str:
        number = next(_numbers)
        folder = write_tiny_adapter(self.room / str(number), seed=number, rank=2)
        asked: dict[str, Any] = {"kind": "train", "trained_from": parse_ref(parent)} if parent else {}
        label = self.registry.register(str(folder), name=f"{name}-{self.run}", **asked).version.ref
        self._learn(label, [(parent, "trained_from", None)] if parent else [])
        return label

    @rule(name=st.sampled_from(NAMES))
    def register(self, name: str) -> None:
        self._register(name, None)

    @precondition(lambda self: self.model.usable())
    @rule(name=st.sampled_from(NAMES), pick=Pick)
    def train(self, name: str, pick: int) -> None:
        self._register(name, self._pick(self.model.usable(), pick))

    @precondition(lambda self: len(self.model.usable()) > 1)
    @rule(name=st.sampled_from(NAMES), pick=Pick, other=Pick)
    def merge(self, name: str, pick: int, other: int) -> None:
        first = self._pick(self.model.usable(), pick)
        second = self._pick([each for each in self.model.usable() if each != first], other)
        weight = 1 + next(_numbers) / 1024  # another weight, another recipe
        parents = (parse_parent(f"{first}={weight}"), parse_parent(f"{second}=0.5"))
        into = f"{name}-{self.run}"
        job = self.registry.merge(MergeRequest(parents, into=into, method="svd", rank=2)).job
        assert job is not None
        work_off(self.registry)
        self._learn(self._made_by(job.id), [(first, "merge", weight), (second, "merge", 0.5)])

    def _made_by(self, job_id: str) -> str:
        job = self.registry.ledger.job(job_id)
        assert job is not None
        assert job.result is not None
        version = self.registry.ledger.version(job.result["version_id"])
        assert version is not None
        return version.label

    @precondition(lambda self: self._replaceable())
    @rule(pick=Pick)
    def rebuild(self, pick: int) -> None:
        """One child of a version is made again of a new one; that it supersedes the old child is an edge, too."""
        child, old = self._replaceable()[pick % len(self._replaceable())]
        new = self._register(old.partition("-")[0], None)
        planned = self.registry.rebuild(parse_ref(old), parse_ref(new), until=parse_ref(child))
        work_off(self.registry)
        edges = sorted(edge for edge in self.model.edges if edge[0] == child and edge[3] == "merge")
        made = [(new if parent == old else parent, "merge", weight) for _, _, parent, _, weight in edges]
        assert planned.job is not None
        self._learn(self._made_by(planned.job.id), [*made, (child, "supersedes", None)])

    def _replaceable(self) -> list[tuple[str, str]]:
        """Merges, each with a parent that is no parent of another parent: between them there is one step."""
        usable = self.model.usable()
        return [
            (child, old)
            for child, _, old, kind, _ in sorted(self.model.edges, key=lambda edge: edge[:3])
            if kind == "merge" and child in usable and self.model.parents(child) <= set(usable)
            if not any(old in self.model.made_of(each) for each in self.model.parents(child))
        ]

    @precondition(lambda self: self.model.usable())
    @rule(pick=Pick)
    def remove(self, pick: int) -> None:
        version = self.touched = self._pick(self.model.usable(), pick)
        if self.model.needed(version):
            with pytest.raises((HasDescendants, Refused)):
                self.registry.remove(parse_ref(version), reason="tidy")
            return
        self.registry.remove(parse_ref(version), reason="tidy")
        self.model.removed.add(version)

    @precondition(lambda self: self.model.versions)
    @rule(pick=Pick)
    def recall(self, pick: int) -> None:
        version = self.touched = self._pick(self.model.versions, pick)
        if version in self.model.removed | self.model.lost:
            return
        if version in self.model.recalled:
            self.registry.undo_recall(parse_ref(version), reason="was fine")
            self.model.recalled.discard(version)
            return
        self.registry.recall(parse_ref(version), reason="leaked")
        self.model.recalled.add(version)

    @precondition(lambda self: self.model.versions)
    @rule(pick=Pick)
    def promote(self, pick: int) -> None:
        version = self.touched = self._pick(self.model.versions, pick)
        if version in self.model.removed | self.model.lost:
            return
        if version not in self.model.usable():
            with pytest.raises(Recalled):
                self.registry.promote(parse_ref(version), to="staging")
            return
        if self.model.stages.get(version.partition(":")[0]) in self.model.lost:
            return
        self.registry.promote(parse_ref(version), to="staging")
        self.model.stages[version.partition(":")[0]] = version

    @precondition(lambda self: self.model.usable())
    @rule(pick=Pick)
    def delete_in_mlflow(self, pick: int) -> None:
        version = self.touched = self._pick(self.model.usable(), pick)
        if version in self.model.stages.values():
            return
        name, _, number = version.partition(":v")
        self._client().delete_model_version(name, number)
        self.model.lost.add(version)
        assert any(check.name == "deleted" and check.detail.startswith(version) for check in self.registry.doctor())

    @precondition(lambda self: self.model.usable())
    @rule(pick=Pick, adopt=st.sampled_from([False, False, True]))
    def rename_in_mlflow_and_back(self, pick: int, *, adopt: bool) -> None:
        version = self.touched = self._pick(self.model.usable(), pick)
        name, _, number = version.partition(":")
        self._client().rename_registered_model(name, f"{name}-elsewhere")
        assert any(check.name == "renamed" for check in self.registry.doctor())
        self.both_say_the_same()
        if adopt:
            found = self.registry.version(parse_ref(version))
            self._adopt()
            there = self.registry.version(parse_ref(f"{name}-elsewhere:{number}"))
            assert (there.id, there.content_digest) == (found.id, found.content_digest)
        self._client().rename_registered_model(f"{name}-elsewhere", name)
        if adopt:
            self._adopt()

    @precondition(lambda self: self.model.lost)
    @rule()
    def adopt_what_was_deleted(self) -> None:
        self._adopt()

    def _adopt(self) -> None:
        """Nothing is left to tell: what MLflow has lost is a tombstone, also where something live is made of it."""
        left = {check.name for check in self.registry.doctor(adopt=True)}
        assert not left & {"renamed", "deleted", "unknown", "stage", "description"}
        self.model.removed |= self.model.lost
        self.model.lost.clear()
        states = {version.ref: version.state for version in self.registry.versions(removed=True)}
        known = [each for each in self.model.versions if each in states]  # others have another name just now
        assert all((states[each] == "removed") == (each in self.model.removed) for each in known)

    @precondition(lambda self: self.model.usable())
    @rule(pick=Pick)
    def export_and_import(self, pick: int) -> None:
        """What comes back from folders is found to be what is there."""
        version = self.touched = self._pick(self.model.usable(), pick)
        if self.model.made_of(version) - set(self.model.usable()):
            return
        folder = self.room / f"export-{next(_numbers)}"
        export(self.registry, [parse_ref(version)], folder)
        list(take_in(self.registry, read_family(folder)))

    @invariant()
    def both_say_the_same(self) -> None:
        if self.touched is None:
            return
        ledger = self.registry.ledger
        labels = {each.id: each.label for each in ledger.versions(include_removed=True)}
        ours = {label for label in labels.values() if label.partition(":")[0].endswith(f"-{self.run}")}
        assert ours == set(self.model.versions)
        root = next(version_id for version_id, label in labels.items() if label == self.touched)
        for edges, up in ((ledger.edges_up(root), True), (ledger.edges_down(root), False)):
            found = {(labels[e.child_id], e.position, labels[e.parent_id], e.kind, e.weight) for e in edges}
            assert len(found) == len(edges)
            assert found == around(self.model.edges, self.touched, up=up)


def test_edges_obey_their_model_on_the_real_mlflow(two_parents: LocalRegistry, tmp_path: Path):
    two_parents.bell = Silent()
    steps = int(os.environ.get("LINEAGE_STEPS", "150"))

    run_state_machine_as_test(
        type("Lineage", (Lineage,), {"registry": two_parents, "room": tmp_path}),
        settings=settings(
            max_examples=max(1, steps // STEPS),
            stateful_step_count=STEPS,
            deadline=None,
            report_multiple_bugs=False,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
        ),
    )

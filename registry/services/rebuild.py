"""Rebuild: the recipes of all that is made of a version, run again with another version in its place.

The plan is a chain of jobs, parents before children. Each job makes one version and queues the next job in the write
that registers it, so a kill loses nothing, and a child never starts before its rebuilt parents are there. What was
trained on from an affected version cannot be run again; it, and what is made of it, is named and left alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from graphlib import TopologicalSorter
from typing import Any

from ..api import RebuildStep, RebuildView
from ..domain.digest import json_digest
from ..domain.errors import InvalidInput, NotFound, Refused
from ..domain.job import Job, NewJob
from ..domain.recipe import MergeRequest, recipe_from_json, request_again
from ..domain.refs import Ref, first_few
from ..domain.version import AdapterVersion, Edge
from ..ports import Doorbell, Ledger
from .merge import MergeHandler, preflight
from .recall import check_not_recalled
from .resolve import resolve
from .schedule import Done, Task, ask


def rebuild(
    ledger: Ledger, bell: Doorbell, old: Ref, new: Ref, *, until: Ref | None = None, dry_run: bool = False, actor: str
) -> RebuildView:
    """Plan to make all that descends from `old` anew from `new`, and queue the first step unless `dry_run`.

    `until` rebuilds that descendant only, with what lies between. Raises `InvalidInput` where there is no such
    descendant, `Refused` where nothing of it can be run again.
    """
    outdated, instead = resolve(ledger, old), resolve(ledger, new)
    _check_pair(ledger, outdated, instead)
    versions, parents = _affected(ledger, outdated, instead, until)
    steps = _steps(outdated, instead, versions, parents)
    todo = [version.id for version, step in zip(versions, steps, strict=True) if step.action == "merge"]
    if not todo:
        raise Refused(
            f"nothing that is made of {outdated.label} can be run again",
            hint=first_few([step.note for step in steps if step.note]) or f"adapterctl lineage {outdated.label} --down",
        )
    job = None
    if not dry_run:
        chain = json_digest([outdated.id, instead.id, todo])[:16]
        job = ask(ledger, bell, _next(chain, todo, {outdated.id: instead.id}, versions[0].label, actor))
    return RebuildView(outdated.label, instead.label, steps, job)


class RebuildHandler:
    """One step of the chain as the supervisor runs it: a merge whose parents are known only now."""

    def __init__(self, ledger: Ledger, merges: MergeHandler) -> None:
        """`merges` queues what `following` gives after each of its versions."""
        self._ledger = ledger
        self._merges = merges

    def begin(self, job: Job) -> AbstractContextManager[Task | Done]:
        return self._merges.begin(self._as_merge(job))

    def finish(self, job: Job, task: Task, result: Mapping[str, Any]) -> Mapping[str, Any]:
        return self._merges.finish(self._as_merge(job), task, result)

    def _as_merge(self, job: Job) -> Job:
        """The same job as a merge: the recipe of the old version, resolved again over the parents of now."""
        version_id, replaced = job.spec["steps"][0], job.spec["replaced"]
        version = self._ledger.versions_by_id([version_id])[version_id]
        ready = preflight(self._ledger, _request(self._ledger, version, replaced))
        spec = {
            **job.spec,
            "into": ready.into,
            "adapter_id": version.adapter_id,
            "recipe": ready.recipe.to_json(),
            "parents": [parent.id for parent in ready.parents],
            "suites": [],  # those that the parents carry judge it
            "supersedes": version.id,
        }
        return replace(job, spec=spec)


def following(ledger: Ledger, job: Job, version_id: str) -> Sequence[NewJob]:
    """The next step of a rebuild whose first step made `version_id`; nothing after the last."""
    done, *left = job.spec["steps"]
    if not left:
        return ()
    label = ledger.versions_by_id(left[:1])[left[0]].label
    return [_next(job.spec["chain"], left, {**job.spec["replaced"], done: version_id}, label, job.created_by)]


def _next(chain: str, steps: Sequence[str], replaced: Mapping[str, str], label: str, actor: str) -> NewJob:
    return NewJob(
        kind="rebuild",
        key=f"{chain}:{steps[0]}",
        title=f"rebuild {label}",
        spec={"chain": chain, "steps": list(steps), "replaced": dict(replaced)},
        created_by=actor,
    )


def _check_pair(ledger: Ledger, old: AdapterVersion, new: AdapterVersion) -> None:
    if old.id == new.id:
        raise InvalidInput(f"{old.label} cannot replace itself", hint="--replace translate:v3=translate:v4")
    check_not_recalled(ledger, [new], "replace it by another version")
    if new.id in ledger.descendants([old.id]):
        raise Refused(f"{new.label} is itself made of {old.label}", hint="replace it by a version that is not")


def _affected(
    ledger: Ledger, old: AdapterVersion, new: AdapterVersion, until: Ref | None
) -> tuple[list[AdapterVersion], dict[str, tuple[Edge, ...]]]:
    """The live versions to make anew, parents before children, and the edges to the parents of each."""
    ids = [version_id for version_id in ledger.descendants([old.id]) if version_id != old.id]
    if until is not None and (last := resolve(ledger, until)).id != old.id:
        if last.id not in ids:
            raise InvalidInput(f"{last.label} is not made of {old.label}", hint=f"adapterctl lineage {last.label} --up")
        between = _made_of(ledger, last.id)
        ids = [version_id for version_id in ids if version_id in between]
    known = ledger.versions_by_id(ids)
    live = {version_id: known[version_id] for version_id in ids if known[version_id].state == "live"}
    if not live:
        raise NotFound(f"nothing is made of {old.label}", hint=f"adapterctl lineage {old.label} --down")
    parents = ledger.parent_edges(list(live))
    above = {i: [edge.parent_id for edge in parents.get(i, ()) if edge.parent_id in live] for i in live}
    return [live[version_id] for version_id in TopologicalSorter(above).static_order()], parents


def _made_of(ledger: Ledger, version_id: str) -> set[str]:
    """The version and its ancestors, without what it superseded: nothing of that is in it."""
    parents: dict[str, list[str]] = {}
    for edge in ledger.edges_up(version_id):
        if edge.kind != "supersedes":
            parents.setdefault(edge.child_id, []).append(edge.parent_id)
    found, waiting = set(), [version_id]
    while waiting:
        if (child := waiting.pop()) not in found:
            found.add(child)
            waiting += parents.get(child, ())
    return found


def _steps(
    old: AdapterVersion,
    new: AdapterVersion,
    versions: Sequence[AdapterVersion],
    parents: Mapping[str, Sequence[Edge]],
) -> tuple[RebuildStep, ...]:
    labels = {old.id: new.label}
    blocked: dict[str, str] = {}
    steps = []
    for version in versions:
        edges = parents[version.id]
        waits = next((blocked[edge.parent_id] for edge in edges if edge.parent_id in blocked), None)
        if version.spec.kind != "merge":
            blocked[version.id] = version.label
            done = "trained" if version.spec.kind == "train" else "made elsewhere"
            note = f"{version.label} was {done}, and has to be {done} again"
        elif waits is not None:
            blocked[version.id] = waits
            note = f"{version.label} waits for {waits} to be made again"
        else:
            labels[version.id] = f"the new {version.label}"
            merged = tuple(labels[edge.parent_id] for edge in edges if edge.parent_id in labels)
            steps.append(RebuildStep(version.label, "merge", merged))
            continue
        steps.append(RebuildStep(version.label, "skip", (), note))
    return tuple(steps)


def _request(ledger: Ledger, version: AdapterVersion, replaced: Mapping[str, str]) -> MergeRequest:
    recipe = recipe_from_json(ledger.detail(version.id).recipe or {})
    edges = ledger.parent_edges([version.id])[version.id]
    known = ledger.versions_by_id([replaced.get(edge.parent_id, edge.parent_id) for edge in edges])
    parents = [known[replaced.get(edge.parent_id, edge.parent_id)] for edge in edges]
    refs = [Ref(parent.name, number=parent.number) for parent in parents]
    return request_again(recipe, refs, into=version.name)

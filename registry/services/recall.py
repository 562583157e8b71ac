"""Recall: the bytes of a version and all that is made of them should be used no more. Who is hit, and what serves now.

The ledger is right at once: every verb that asks it sees the recall. MLflow's pages follow by a job, for it takes them
milliseconds a version; the job writes what the ledger says when it runs, so any number of them end in the same state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from uuid6 import uuid7

from ..api import RecallImpact, StageHit
from ..domain.errors import Recalled, Refused
from ..domain.job import Job, NewJob
from ..domain.recall import Recall, RecallAction, check_reason
from ..domain.version import AdapterVersion
from ..ports import Doorbell, Ledger, VersionStore
from .schedule import Done, Task
from .views import cause, iso_time, recall_views

#: Held while recalls are written to MLflow: each writer reads the ledger first, so that the last one has the last word.
MARKS_LOCK = "recall-marks"


def recall(
    ledger: Ledger, bell: Doorbell, version: AdapterVersion, action: RecallAction, *, actor: str, reason: str
) -> RecallImpact:
    """Record the recall of `version`, or that it is taken back; the answer names whom that hits, or sets free.

    Saying again what stands already adds nothing, and sets MLflow's pages right. Raises `InvalidInput` without a
    reason, `Refused` where there is no recall of this very version to take back.
    """
    check_reason(reason)
    if action == "undo":
        _check_undo(ledger, version)
    said, jobs = ledger.recall(
        version.id, action, actor=actor, reason=reason, then=[_marking(version, action, actor=actor)]
    )
    for job in jobs:
        bell.ring(job.id)
    return _impact(ledger, version, said)


def check_not_recalled(ledger: Ledger, versions: Sequence[AdapterVersion], instead: str) -> None:
    """Raise `Recalled` for the first of the versions that a recall hits; `instead` is what to do."""
    recalls = recall_views(ledger)
    for version in versions:
        if (hit := recalls.get(version.id)) is not None:
            raise Recalled.of(version.label, hit.ref, hit.reason, instead)


def mark(ledger: Ledger, versions: VersionStore, version: AdapterVersion) -> None:
    """Let MLflow's page of a new version say that it is recalled, where it was born so."""
    hit = recall_views(ledger).get(version.id)
    if hit is not None:
        versions.mark_recall(version, cause(hit))


class RecallHandler:
    """Lets MLflow's pages of a version and its descendants say what the ledger says. Needs no child."""

    def __init__(self, ledger: Ledger, *, open_versions: Callable[[], VersionStore]) -> None:
        self._ledger = ledger
        self._open_versions = open_versions

    @contextmanager
    def begin(self, job: Job) -> Iterator[Task | Done]:
        with self._ledger.exclusive(MARKS_LOCK):
            hit = self._ledger.descendants([job.spec["version_id"]], copies=True)
            versions = self._ledger.versions_by_id(list(hit))
            live = [version for version in versions.values() if version.state == "live"]
            write_marks(self._ledger, self._open_versions(), live)
        yield Done({"marked": len(live)})

    def finish(self, job: Job, task: Task, result: Mapping[str, Any]) -> Mapping[str, Any]:
        raise AssertionError("a recall has no task")


def write_marks(ledger: Ledger, store: VersionStore, versions: Sequence[AdapterVersion]) -> None:
    """Let MLflow's pages of these versions say what the ledger says. Under `MARKS_LOCK`."""
    recalls = recall_views(ledger)
    for version in versions:
        store.mark_recall(version, cause(recalls.get(version.id)))


def _marking(version: AdapterVersion, action: RecallAction, *, actor: str) -> NewJob:
    done = "recalled" if action == "recall" else "no longer recalled"
    return NewJob(
        kind="recall",
        key=str(uuid7()),  # never joined: one that runs already may have read the ledger before this
        title=f"mark {version.label} and its descendants as {done}",
        spec={"version_id": version.id},
        created_by=actor,
    )


def _check_undo(ledger: Ledger, version: AdapterVersion) -> None:
    hit = recall_views(ledger).get(version.id)
    if hit is None:
        raise Refused(f"{version.label} is not recalled", hint="there is nothing to take back")
    if hit.ref != version.label:
        raise Refused(
            f"{version.label} itself is not recalled, it is made of {hit.ref}",
            hint=f"adapterctl recall --undo {hit.ref}",
        )


def _impact(ledger: Ledger, version: AdapterVersion, said: Recall) -> RecallImpact:
    hit = dict.fromkeys(ledger.descendants([version.id], copies=True))
    if said.action == "undo":
        still = ledger.recalls()  # by way of another version
        hit = dict.fromkeys(each for each in hit if each not in still)
    versions = {key: each for key, each in ledger.versions_by_id(list(hit)).items() if each.state == "live"}
    held = (
        (stage, versions[key])
        for stages in ledger.stages(sorted({each.adapter_id for each in versions.values()})).values()
        for stage, key in stages.items()
        if key in versions
    )
    return RecallImpact(
        ref=version.label,
        action=said.action,
        reason=said.reason,
        by=said.actor,
        at=iso_time(said.at),
        descendants=tuple(versions[key].label for key in hit if key in versions and key != version.id),
        stages=tuple(StageHit(each.name, stage, each.label) for stage, each in held),
    )

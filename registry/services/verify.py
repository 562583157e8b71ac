"""Is a version still what was registered, and does its recipe still give it?

The stored bytes are compared with the manifest here; the recipe is run again by a job, in the child, and its result is
compared there: equal bytes where the fingerprints are equal, else a distance within the bound of the output's dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ..api import RegistryAPI, Verification, Verifications, VersionView
from ..domain.errors import AdapterctlError, Conflict, Corrupt, JobFailed, NotFound, Refused
from ..domain.job import Job, NewJob
from ..domain.recipe import recipe_from_json
from ..domain.refs import parse_ref
from ..domain.version import AdapterVersion
from ..ports import Folders, Ledger
from ..wire import from_builtins
from .merge import merge_task
from .pull import damage
from .schedule import Done, Task
from .staging import stage_folder
from .views import signature_views


@dataclass(frozen=True, slots=True)
class Comparison:
    """The child's verdict on a recipe that was run again; `distance` is the relative one of the deltas, None where only
    the new ones are not zero.
    """

    verdict: Literal["identical", "equal within bound", "different"]
    distance: float | None
    details: tuple[str, ...] = ()


def check_files(folders: Folders, version: AdapterVersion) -> list[str]:
    """What is wrong with the stored files of `version`, one line a file."""
    with folders(version) as folder:
        return damage(folder, version.placement.files)


def new_verification(version: AdapterVersion, *, actor: str) -> NewJob:
    """The job that runs the recipe of a merged version again."""
    return NewJob(
        kind="verify",
        key=version.id,
        title=f"verify {version.label}",
        spec={"version_id": version.id},
        created_by=actor,
    )


def outcome_of(job: Job) -> Comparison:
    """What the rerun of a recipe found, from its ended job."""
    return from_builtins(job.result, Comparison)


def verification(
    ledger: Ledger, version: AdapterVersion, findings: Sequence[str], outcome: Comparison | None
) -> Verification:
    """Both verdicts in one answer; `outcome` is None where the recipe was not run."""
    files: Literal["intact", "damaged"] = "damaged" if findings else "intact"
    signatures = signature_views(ledger, version)
    if outcome is None:
        skipped: Literal["skipped", "not a merge"] = "skipped" if version.spec.recipe_digest else "not a merge"
        return Verification(version.label, files, skipped, None, tuple(findings), signatures)
    details = (*findings, *outcome.details)
    return Verification(version.label, files, outcome.verdict, outcome.distance, details, signatures)


def verify_all(registry: RegistryAPI, *, rerun: bool = False) -> Verifications:
    """Check the stored bytes of every live version, wherever the registry is; with `rerun` make its merges again.

    A version that cannot be checked is among the bad ones, with the reason, and ends nothing. What concerns all of
    them is raised, such as `Unavailable` for a server that is gone.
    """
    checked, rerun_count, bad = 0, 0, []
    for view in registry.versions():
        found, reason = _verify_one(registry, view, rerun=False)
        if found is None:
            if _is_gone(registry, view):
                continue
            found = Verification(view.ref, "damaged", "skipped", None, (str(reason),))
        elif rerun and found.files == "intact" and view.recipe_digest is not None:
            again, reason = _verify_one(registry, view, rerun=True)
            found = again or replace(found, details=(f"its recipe cannot be run again: {reason}",))
            rerun_count += again is not None
        checked += 1
        if reason is not None or found.files == "damaged" or found.recipe == "different":
            bad.append(found)
    return Verifications(checked, rerun_count, tuple(bad))


def _verify_one(
    registry: RegistryAPI, view: VersionView, *, rerun: bool
) -> tuple[Verification, None] | tuple[None, AdapterctlError]:
    """What was found, or why this version cannot be checked."""
    try:
        return registry.verify(parse_ref(view.ref), rerun=rerun), None
    except (Conflict, Corrupt, JobFailed, NotFound, Refused) as error:
        return None, error


def _is_gone(registry: RegistryAPI, view: VersionView) -> bool:
    """Whether it was removed since it was listed."""
    try:
        return registry.version(parse_ref(view.ref)).state == "removed"
    except NotFound:
        return True


class VerifyHandler:
    """Verify jobs as the supervisor runs them: the merge again, into a stage folder that is thrown away."""

    def __init__(self, ledger: Ledger, *, folders: Folders, home: Path, threads: int) -> None:
        self._ledger = ledger
        self._folders = folders
        self._home = home
        self._threads = threads

    @contextmanager
    def begin(self, job: Job) -> Iterator[Task | Done]:
        version = self._ledger.versions_by_id([job.spec["version_id"]])[job.spec["version_id"]]
        detail = self._ledger.detail(version.id)
        if detail.recipe is None:
            raise Corrupt(f"{version.label} has no recipe", hint="only merged versions can be run again")
        edges = self._ledger.parent_edges([version.id])[version.id]
        known = self._ledger.versions_by_id([edge.parent_id for edge in edges])
        parents = [known[edge.parent_id] for edge in edges]
        with ExitStack() as opened:
            out = opened.enter_context(stage_folder(self._home))
            folders = [opened.enter_context(self._folders(parent)) for parent in parents]
            stored = opened.enter_context(self._folders(version))
            task = merge_task(
                self._ledger,
                recipe_from_json(detail.recipe),
                parents,
                folders,
                out=out,
                threads=self._threads,
            )
            compare = {"folder": str(stored), "fingerprint": (detail.receipt or {}).get("fingerprint")}
            yield Task({**task, "compare": compare}, out)

    def finish(self, job: Job, task: Task, result: Mapping[str, Any]) -> Mapping[str, Any]:
        """The child's verdict, as a `Comparison`."""
        return dict(result["comparison"])

"""A merge from request to version: preflight, queue, hand the worker its task, register what it made.

`MergeRequest -> Recipe -> MergePlan` happens from facts in the ledger alone; tensors are read by the child only (and by
`plan_merge`, which forecasts from Grams). The same recipe into the same adapter is never computed twice.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..api import MethodView, OptionView, ParentView, PlanView, Submitted, VersionView
from ..domain.adapter import AdapterFacts
from ..domain.digest import json_digest
from ..domain.errors import (
    AdapterctlError,
    Conflict,
    IncompatibleParents,
    InvalidInput,
    LossTooHigh,
    Problem,
    Recalled,
    Refused,
    Unavailable,
    raise_all,
)
from ..domain.job import Job, NewJob
from ..domain.plan import MergePlan, build_plan, check_parents, parent_warnings
from ..domain.prompts import prompt_warnings, tokenizer_warnings
from ..domain.recipe import RESIZE, MergeRequest, Recipe, recipe_from_json
from ..domain.refs import check_name, is_name
from ..domain.suite import Suite
from ..domain.version import AdapterVersion, NewVersion
from ..ports import Doorbell, Folders, Ledger, Parent, VersionStore
from ..wire import from_builtins, to_builtins
from . import schedule
from .recall import check_not_recalled
from .register import WEIGHTS_FILE, check_word, publish
from .resolve import resolve
from .schedule import Done, Task
from .staging import stage_folder
from .suites import find_suite, forms_of
from .views import recall_views, version_view

#: Sets of parents that a process keeps in mind.
SEEN_KEPT = 256


@dataclass(frozen=True, slots=True)
class Preflight:
    """A request that can be merged exactly: pinned parents in recipe order, the recipe they resolve to, its digest."""

    into: str
    parents: tuple[AdapterVersion, ...]
    recipe: Recipe
    digest: str
    facts: tuple[AdapterFacts, ...]
    warnings: tuple[str, ...]

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(parent.label for parent in self.parents)

    def plan(self) -> MergePlan:
        """Spelled out tensor by tensor; a request that is only queued does without."""
        return build_plan(self.recipe, self.facts)

    @property
    def parent_views(self) -> tuple[ParentView, ...]:
        weights = (parent.weight for parent in self.recipe.parents)
        return tuple(ParentView(v.label, w, "merge") for v, w in zip(self.parents, weights, strict=True))


def preflight(ledger: Ledger, request: MergeRequest) -> Preflight:
    """Pin the parents and plan the merge, without opening a file.

    Raises `NotFound` for an unknown parent, `InvalidInput` for options, `IncompatibleParents` with every reason why
    these parents cannot be merged exactly.
    """
    # deferred: the merge methods import numpy, which reads of the registry never need
    from ..merging.method import resolve as resolve_recipe

    if not request.parents:
        raise InvalidInput("the merge names no parents", hint="give two or more: adapterctl merge translate:v3 chat:v5")
    parents = tuple(resolve(ledger, parent.ref) for parent in request.parents)
    facts = tuple(ledger.detail(parent.id).facts for parent in parents)
    unfit, warnings = _seen_together(parents, facts)
    problems = [*_check_recalls(ledger, parents), *_check_bases(parents), *unfit]
    raise_all(IncompatibleParents, "these adapters cannot be merged:", problems)
    recipe = resolve_recipe(request, facts, [parent.spec.content_digest for parent in parents])
    digest = recipe.digest
    if request.expect and digest != request.expect[0]:
        raise Refused(
            f"these parents and options make the recipe {digest[:12]}, expected was {request.expect[0][:12]}",
            hint="the recipe was changed, or written by an adapterctl whose methods had other rules",
        )
    return Preflight(_target(request), parents, recipe, digest, facts, warnings)


def request_merge(ledger: Ledger, bell: Doorbell, request: MergeRequest, *, actor: str) -> Submitted:
    """Commit the job and ring; or return the version, or the live job, that the same recipe has already.

    What exists is held to the terms of this request too: raises `LossTooHigh` where it lost more than `max_loss`, and
    queues a job where `suites` are asked for. Jobs of one recipe are joined only where their terms are the same.
    """
    answer = request_merges(ledger, [(actor, request)])[0]
    if isinstance(answer, AdapterctlError):
        raise answer
    if answer.job is not None:
        bell.ring(answer.job.id)
    return answer


def request_merges(ledger: Ledger, asked: Sequence[tuple[str, MergeRequest]]) -> list[Submitted | AdapterctlError]:
    """`request_merge` for several actors, in one transaction that reads and one that writes; the caller rings.

    Each gets an answer or a refusal of its own. What hits them all is raised, and nothing is queued then.
    """
    with ledger.snapshot():
        looked = [_look(ledger, request, actor) for actor, request in asked]
    jobs = iter(schedule.commit(ledger, [each.job(ledger) for each in looked if isinstance(each, _Wanted)]))
    return [each.answer(*next(jobs)) if isinstance(each, _Wanted) else each for each in looked]


def _look(ledger: Ledger, request: MergeRequest, actor: str) -> _Wanted | Submitted | AdapterctlError:
    """What a request needs: a job, or nothing but this answer. Raises `Unavailable`, which hits the others too."""
    try:
        for key, value in request.tags.items():
            check_word("tag", key, value)
        ready = preflight(ledger, request)
        warnings = _warnings(ledger, ready)
        adapter_id = ledger.adapter_id(ready.into)
        existing = ledger.live_version(adapter_id, recipe=ready.digest) if adapter_id else None
        suites = [find_suite(ledger, suite) for suite in request.suites]
        if existing is not None:
            check_not_recalled(ledger, [existing], "merge with another recipe")
            _check_loss(ledger, existing, request.max_loss)
            _check_content(existing.spec.content_digest, request.expect)
            warnings = _with_lost_tags(warnings, request, existing.label, existing.spec.tags)
            if not suites:
                return _submitted(ready, warnings, version=version_view(ledger, existing))
        return _Wanted(request, actor, ready, warnings, adapter_id, suites, exists=existing is not None)
    except Unavailable:
        raise
    except AdapterctlError as error:
        return error


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A merge that is to be queued. Without an `adapter_id` it is the first one of that name.

    Where the version `exists`, only the suites are left to do, and its tags are what counts, not those of a job.
    """

    request: MergeRequest
    actor: str
    ready: Preflight
    warnings: tuple[str, ...]
    adapter_id: str | None
    suites: Sequence[Suite]
    exists: bool

    def job(self, ledger: Ledger) -> NewJob:
        return new_merge(
            self.ready,
            self.adapter_id or ledger.ensure_adapter(self.ready.into),
            self.suites,
            max_loss=self.request.max_loss,
            expect=self.request.expect,
            tags=self.request.tags,
            actor=self.actor,
        )

    def answer(self, job: Job, created: bool) -> Submitted | AdapterctlError:
        try:
            schedule.check_stays(job)
        except Conflict as error:
            return error
        warnings = self.warnings
        if not created and not self.exists:
            warnings = _with_lost_tags(warnings, self.request, self.ready.into, job.spec.get("tags", {}))
        return _submitted(self.ready, warnings, job=job, deduplicated=not created)


def _with_lost_tags(
    warnings: tuple[str, ...], request: MergeRequest, there: str, tags: Mapping[str, str]
) -> tuple[str, ...]:
    """A warning where the same merge was asked for before with other `tags`, to which those of now are not added."""
    words = [f"{key}={value}" for key, value in request.tags.items() if tags.get(key) != value]
    if not words:
        return warnings
    command = f"adapterctl tag REF {shlex.join(words)}"
    return (*warnings, f"{there} was merged, or asked for, before: tags are not added, `{command}` does")


def new_merge(
    ready: Preflight,
    adapter_id: str,
    suites: Sequence[Suite],
    *,
    max_loss: float | None = None,
    tags: Mapping[str, str] | None = None,
    expect: tuple[str, str] | None = None,
    base_dtype: str | None = None,
    actor: str,
) -> NewJob:
    """The job that makes what was planned; `tags` go to the version, and say for instance which search proposed it.

    `base_dtype` is for the evaluation that follows.
    """
    verb = RESIZE if ready.recipe.method == RESIZE else "merge"
    return NewJob(
        kind="merge",
        key=":".join([adapter_id, ready.digest, *_terms(max_loss, suites, expect, base_dtype)]),
        title=f"{verb} {' '.join(view.ref for view in ready.parent_views)} into {ready.into}",
        spec={
            "into": ready.into,
            "adapter_id": adapter_id,
            "recipe": ready.recipe.to_json(),
            "parents": [parent.id for parent in ready.parents],
            "suites": [to_builtins(suite) for suite in suites],
            "max_loss": max_loss,
            "tags": dict(tags or {}),
            "expect": expect,
            **({"base_dtype": base_dtype} if base_dtype else {}),
        },
        created_by=actor,
    )


def plan_merge(ledger: Ledger, folders: Folders, request: MergeRequest, *, most_work: float = math.inf) -> PlanView:
    """The preflight, and what each method would give: reads the parents' factors, writes nothing.

    Raises `Refused` where that takes more than `most_work`; see `forecast`.
    """
    # deferred: see preflight
    from ..merging.forecast import forecast

    ready = preflight(ledger, request)
    plan = ready.plan()
    adapter_id = ledger.adapter_id(ready.into)
    existing = ledger.live_version(adapter_id, recipe=ready.digest) if adapter_id else None
    with ExitStack() as open_folders:
        files = [open_folders.enter_context(folders(parent)) / WEIGHTS_FILE for parent in ready.parents]
        forecasts, pairs, interference = forecast(plan, files, ready.labels, most_work=most_work)
    return PlanView(
        into=ready.into,
        recipe_digest=ready.digest,
        method=ready.recipe.method,
        rank=ready.recipe.rank,
        dtype=ready.recipe.dtype,
        size_bytes=plan.size_bytes,
        base=ready.parents[0].spec.base.name,
        parents=ready.parent_views,
        forecasts=forecasts,
        pairs=pairs,
        warnings=_warnings(ledger, ready),
        exists=existing.label if existing else None,
        interference=interference,
    )


def merge_task(
    ledger: Ledger,
    recipe: Recipe,
    parents: Sequence[AdapterVersion],
    parent_folders: Sequence[Path],
    *,
    out: Path,
    threads: int,
    max_loss: float | None = None,
) -> dict[str, Any]:
    """The task of the child that executes `recipe`: plan and files, nothing that leads to a database or a server."""
    facts = [ledger.detail(parent.id).facts for parent in parents]
    plan = build_plan(recipe, facts)
    return {
        "kind": "merge",
        "plan": to_builtins(replace(plan, max_loss=max_loss)),
        "parents": [
            {"folder": str(folder), "sha256": {file.path: file.sha256 for file in parent.placement.files}}
            for parent, folder in zip(parents, parent_folders, strict=True)
        ],
        "out": str(out),
        "threads": threads,
    }


def method_views() -> list[MethodView]:
    """Every registered merge method, with the options that its signature takes."""
    # deferred: see preflight
    from ..merging.method import LAWS, methods

    return [
        MethodView(
            name=spec.name,
            summary=spec.summary,
            when=spec.when,
            exact=spec.exact,
            cost=spec.cost,
            paper=spec.paper,
            options=tuple(OptionView(o.name, o.type, o.default, o.help) for o in spec.options),
            breaks=tuple(law for law in LAWS if law in spec.breaks),
            max_parents=spec.max_parents,
            equal_ranks=spec.equal_ranks,
        )
        for spec in methods().values()
    ]


class MergeHandler:
    """Merge jobs as the supervisor runs them. Safe to run again from the start: all is keyed by the recipe."""

    def __init__(
        self,
        ledger: Ledger,
        *,
        open_versions: Callable[[], VersionStore],
        folders: Folders,
        home: Path,
        threads: int,
        then: Callable[[Job, str], Sequence[NewJob]],
        bell: Doorbell,
    ) -> None:
        """`then` gives the jobs that follow a merge, for the id of its version; `bell` tells of them."""
        self._ledger = ledger
        self._open_versions = open_versions
        self._folders = folders
        self._home = home
        self._threads = threads
        self._then = then
        self._bell = bell

    @contextmanager
    def begin(self, job: Job) -> Iterator[Task | Done]:
        """Pin the parents' files and make the child's task; `Done` when the version exists already."""
        recipe = recipe_from_json(job.spec["recipe"])
        existing = self._ledger.live_version(job.spec["adapter_id"], recipe=recipe.digest)
        if existing is not None:
            _check_loss(self._ledger, existing, job.spec.get("max_loss"))
            _check_content(existing.spec.content_digest, job.spec.get("expect"))
            queued = [schedule.submit(self._ledger, self._bell, new)[0].id for new in self._then(job, existing.id)]
            yield Done({"version_id": existing.id, "jobs": queued})
            return
        parents = job_parents(self._ledger, job)
        with ExitStack() as opened:
            out = opened.enter_context(stage_folder(self._home))
            folders = [opened.enter_context(self._folders(parent)) for parent in parents]
            max_loss = job.spec.get("max_loss")
            yield Task(
                merge_task(self._ledger, recipe, parents, folders, out=out, threads=self._threads, max_loss=max_loss),
                out,
            )

    def finish(self, job: Job, task: Task, result: Mapping[str, Any]) -> Mapping[str, Any]:
        """Register what the child staged, with its edges and the end of the job in one fenced write."""
        _check_content(result["content_digest"], job.spec.get("expect"))
        parents = job_parents(self._ledger, job)
        recipe = recipe_from_json(job.spec["recipe"])
        version = publish(
            self._ledger,
            self._open_versions(),
            NewVersion(
                adapter=job.spec["into"],
                kind="merge",
                content_digest=result["content_digest"],
                base=parents[0].spec.base,
                facts=from_builtins(result["facts"], AdapterFacts),
                norms=result["norms"],
                license=_joint_license(parents),
                recipe_digest=recipe.digest,
                recipe=recipe.to_json(),
                receipt=result["receipt"],
                tags=job.spec.get("tags", {}),
            ),
            task.out,
            parents=[Parent(v, p.weight) for v, p in zip(parents, recipe.parents, strict=True)],
            key=f"merge:{job.spec['adapter_id']}:{recipe.digest}",
            created_by=job.created_by,
            supersedes=job.spec.get("supersedes"),
            job=(job.id, job.attempt),
            then=lambda version_id: self._then(job, version_id),
        )
        ended = self._ledger.job(job.id)
        for follower in ended.result.get("jobs", ()) if ended else ():
            self._bell.ring(follower)
        return {"version_id": version.id}


def job_parents(ledger: Ledger, job: Job) -> list[AdapterVersion]:
    """The pinned parents of a merge job. Raises `IncompatibleParents` when one was removed or recalled meanwhile."""
    known = ledger.versions_by_id(job.spec["parents"])
    parents = [known[version_id] for version_id in job.spec["parents"]]
    gone = [Problem("removed", f"{each.label} was removed") for each in parents if each.state == "removed"]
    problems = [*gone, *_check_recalls(ledger, parents)]
    raise_all(IncompatibleParents, "the merge lost a parent:", problems, hint="submit the merge again")
    return parents


_Seen = tuple[Sequence[Problem], tuple[str, ...]]
_seen: dict[tuple[tuple[str, str], ...], _Seen] = {}


def _seen_together(parents: Sequence[AdapterVersion], facts: Sequence[AdapterFacts]) -> _Seen:
    """Why the files of these parents have no exact sum, and what is odd about them.

    It is so for good, and to look through their modules takes as long as all else that a server does for a merge.
    """
    labels = [parent.label for parent in parents]
    key = tuple(zip((parent.id for parent in parents), labels, strict=True))
    seen = _seen.get(key)
    if seen is None:
        if len(_seen) >= SEEN_KEPT:
            _seen.clear()
        seen = _seen[key] = check_parents(facts, labels), parent_warnings(facts, labels)
    return seen


def _check_recalls(ledger: Ledger, parents: Sequence[AdapterVersion]) -> list[Problem]:
    recalls = recall_views(ledger)
    return [
        Problem(Recalled.code, Recalled.words(parent.label, hit.ref, hit.reason))
        for parent in parents
        if (hit := recalls.get(parent.id)) is not None
    ]


def _check_bases(parents: Sequence[AdapterVersion]) -> list[Problem]:
    first = parents[0]
    return [
        Problem(
            "base",
            f"{first.label} applies to {first.spec.base.name}, {other.label} to {other.spec.base.name}",
            "if both names mean one model, run `adapterctl base merge`",
        )
        for other in parents[1:]
        if other.spec.base.id != first.spec.base.id
    ]


def _target(request: MergeRequest) -> str:
    """Raises `InvalidInput` where nobody said that the merge shall be the newest version of its own parent."""
    name = request.target
    if not request.into and name == request.parents[0].ref.name:
        raise InvalidInput(
            f"all parents are versions of {name}, so the merge needs a name",
            hint=f"--into {name}-merged, or --into {name} to make it the newest version there",
        )
    if not request.into and not is_name(name):
        raise InvalidInput(
            f"the names of {len(request.parents)} parents, joined, are no name of an adapter: {len(name)} characters",
            hint="name the merge with --into NAME",
        )
    return check_name(name)


def _terms(
    max_loss: float | None, suites: Sequence[Suite], expect: tuple[str, str] | None, base_dtype: str | None
) -> list[str]:
    """What a caller asks beyond the recipe, as a part of the job's key; nothing where nothing is asked."""
    terms = [max_loss, [suite.digest for suite in suites], *(expect or ()), *([base_dtype] if base_dtype else [])]
    return [json_digest(terms)[:16]] if max_loss is not None or suites or expect or base_dtype else []


def _check_content(made: str, expect: Sequence[str] | None) -> None:
    """Hold what a recipe gave to the bytes that the caller has. Raises `Refused` where they are others."""
    if expect and made != expect[1]:
        raise Refused(
            f"the recipe gives the content {made[:12]}, expected was {expect[1][:12]}",
            hint="one of the file and its recipe was changed, or another machine rounded otherwise",
        )


def _check_loss(ledger: Ledger, version: AdapterVersion, max_loss: float | None) -> None:
    """Hold a version that exists to the limit, as its receipt measured it; rounding is not what the limit is about."""
    receipt = ledger.detail(version.id).receipt
    if max_loss is None or receipt is None:
        return
    loss = receipt["loss"] - receipt["loss_bound"]
    if loss > max_loss:
        raise LossTooHigh(
            f"{version.label} has this recipe and lost {receipt['loss']:.4f} of the exact sum, "
            f"--max-loss allows {max_loss:g}",
            hint="raise --rank, use --method cat or --dtype f32, or allow more; `adapterctl plan` shows all losses",
        )


def _joint_license(parents: Sequence[AdapterVersion]) -> str | None:
    """The parents' licence where they agree; a joint one is for people to decide."""
    licenses = {parent.spec.license for parent in parents}
    return licenses.pop() if len(licenses) == 1 else None


def _submitted(
    ready: Preflight,
    warnings: tuple[str, ...],
    *,
    job: Job | None = None,
    version: VersionView | None = None,
    deduplicated: bool = True,
) -> Submitted:
    return Submitted(
        into=ready.into,
        recipe_digest=ready.digest,
        method=ready.recipe.method,
        rank=ready.recipe.rank,
        parents=ready.parent_views,
        job=job,
        version=version,
        deduplicated=deduplicated,
        warnings=warnings,
    )


def _warnings(ledger: Ledger, ready: Preflight) -> tuple[str, ...]:
    """What is odd about these parents but no reason to refuse: their modules, their prompts, their tokenizers."""
    tags = [parent.spec.tags for parent in ready.parents]
    prompts = prompt_warnings(ready.labels, forms_of(ledger, ready.parents))
    return (*ready.warnings, *prompts, *tokenizer_warnings(ready.labels, tags))

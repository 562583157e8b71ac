"""A search for merge weights from request to finding: what is searched, what the child is told, what becomes of it.

The child computes and keeps a journal; MLflow gets one run with every trial; winners become versions by the ordinary
merge path, and only where that was asked for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..api import HeldOutView, ParentView, TrialView, TuneView
from ..crashpoints import reached
from ..domain.base_dtype import FULL, check_dtype, told
from ..domain.digest import json_digest
from ..domain.errors import Conflict, InvalidInput, NotFound, Refused, Unavailable
from ..domain.eval_plan import Subject
from ..domain.job import Job, JobState, NewJob
from ..domain.plan import MergePlan, build_plan
from ..domain.recipe import MergeRequest, Recipe, RecipeParent, recipe_from_json
from ..domain.refs import ParentRef, Ref
from ..domain.suite import Suite
from ..domain.tuning import (
    PLAIN,
    Finding,
    Trial,
    TunePlan,
    TuneRequest,
    TuneTask,
    advice,
    by_layer,
    explain,
    layer_groups,
    searched,
    split,
)
from ..domain.version import AdapterVersion
from ..ports import Doorbell, Folders, Ledger, VersionStore
from ..settings import Settings
from ..wire import from_builtins, to_builtins
from .evaluate import EXTRA, check_installed, dtype_of, engine_facts, folder_of, locate
from .fleet import queue_for_gpu_work
from .merge import job_parents, new_merge, preflight
from .pictures import pareto_picture, trials_picture, weights_picture
from .schedule import Done, Task, ask, submit
from .suites import find_suite, keep_suite, suites_of

MAX_BUDGET, MAX_REGISTERED = 1000, 16
#: Tags of a version that a search proposed.
TUNE_TAG, TRIAL_TAG = "tune", "tune_trial"


def request_tune(
    ledger: Ledger,
    bell: Doorbell,
    request: TuneRequest,
    *,
    settings: Settings,
    made_on_demand: Mapping[str, str] | None = None,
) -> Job:
    """Queue a search; or return the live one that was asked for in the same words.

    Raises `InvalidInput` for a budget that is too small or a suite that cannot be halved, `IncompatibleParents` where
    these parents cannot be merged, `Unavailable` where the extra or the base is not here.
    """
    check_installed()
    check_dtype(request.base_dtype)
    if find_spec("optuna") is None:
        raise Unavailable("a search needs optuna, which is not installed", hint=EXTRA)
    kinds, parents, into = _kinds(ledger, request)
    suites = _suites(ledger, request, parents)
    for suite in suites:
        for task in suite.tasks:
            split(task, request.limit)
    finalists = max(1, request.keep)
    smallest = finalists + 3  # they and the plain one are held out, and two candidates are looked at
    if not smallest <= request.budget <= MAX_BUDGET or request.keep > MAX_REGISTERED:
        raise InvalidInput(
            f"--budget {request.budget} with --register {request.keep} is no search",
            hint=f"give a budget of {smallest} to {MAX_BUDGET}, and register {MAX_REGISTERED} at most",
        )
    modules = [module.name for parent in parents for module in ledger.detail(parent.id).facts.modules]
    groups = layer_groups(modules, request.layer_groups)
    base = parents[0].spec.base
    dtype = dtype_of(locate(ledger, base, settings, made_on_demand), base, request.base_dtype, settings)
    spec = {
        "parents": [parent.id for parent in parents],
        "kinds": [kind.to_json() for kind in kinds],
        "into": into,
        "suites": [keep_suite(ledger, suite) for suite in suites],
        "budget": request.budget,
        "seed": request.seed,
        "limit": request.limit,
        "keep": request.keep,
        # without groups a search has the key that it had before there were any, and joins one from then
        **({"layer_groups": list(groups)} if groups else {}),
        # and so has one on the full base
        **({} if dtype == FULL else {"base_dtype": dtype}),
    }
    names = " ".join(parent.label for parent in parents)
    new = NewJob(
        kind="tune",
        key=json_digest(spec),
        title=f"tune {names}{told(dtype)}",
        spec=spec,
        created_by=settings.actor,
        queue=queue_for_gpu_work(ledger, settings),
    )
    return ask(ledger, bell, new)


def tune_view(ledger: Ledger, job: Job) -> TuneView:
    """What an ended search found. Raises `NotFound` for another kind of job, `Conflict` while it runs."""
    if job.kind != "tune":
        raise NotFound(f"job {job.id} is no search", hint="adapterctl jobs ls --kind tune")
    if job.state is not JobState.SUCCEEDED:
        raise Conflict(f"job {job.id} is {job.state}", hint=f"adapterctl jobs wait {job.id}")
    return _Told(ledger, job).view()


class TuneHandler:
    """Searches as the supervisor runs them: see `JobHandler`. The journal outlives every attempt."""

    def __init__(
        self,
        ledger: Ledger,
        settings: Settings,
        *,
        open_versions: Callable[[], VersionStore],
        folders: Folders,
        bell: Doorbell,
        made_on_demand: Mapping[str, str] | None = None,
    ) -> None:
        """`bell` tells of the merges that register finalists."""
        self._ledger = ledger
        self._bell = bell
        self._settings = settings
        self._open_versions = open_versions
        self._folders = folders
        self._made_on_demand = made_on_demand

    @contextmanager
    def begin(self, job: Job) -> Iterator[Task | Done]:
        parents = job_parents(self._ledger, job)
        home = self._settings.home
        with ExitStack() as opened:
            folders = [opened.enter_context(self._folders(parent)) for parent in parents]
            body = {
                "kind": "tune",
                "plan": to_builtins(self._plan(job, parents, folders)),
                "journal": str(home / "jobs" / f"{job.id}.trials.jsonl"),
                "threads": self._settings.threads,
            }
            yield Task(body, home / "jobs")

    def finish(self, job: Job, task: Task, result: Mapping[str, Any]) -> Mapping[str, Any]:
        """Log the search to MLflow, and queue the merges that were asked for; both are safe to do again."""
        told = _Told(self._ledger, replace(job, result=result))
        self._open_versions().log_search(
            job.id,
            f"tune {told.into}",
            told.parents,
            params=told.params(),
            series=told.series(),
            files=told.files(),
        )
        merges = []
        for number in told.finding.finalists[: job.spec["keep"]]:
            merges.append(submit(self._ledger, self._bell, self._merge(job, told, number))[0].id)
            reached("tune.queued")
        return {**result, "jobs": merges}

    def _plan(self, job: Job, parents: Sequence[AdapterVersion], folders: Sequence[Path]) -> TunePlan:
        engine = engine_facts(self._settings, job.spec.get("base_dtype", FULL))
        base = folder_of(self._ledger, parents[0].spec.base, engine, self._settings, self._made_on_demand)
        return TunePlan(
            base_folder=str(base),
            parents=tuple(
                Subject(parent.spec.content_digest, parent.label, str(folder))
                for parent, folder in zip(parents, folders, strict=True)
            ),
            kinds=tuple(_merge_plan(self._ledger, recipe_from_json(kind), parents) for kind in job.spec["kinds"]),
            tasks=tuple(_tasks(self._ledger, job, parents)),
            budget=job.spec["budget"],
            seed=job.spec["seed"],
            finalists=max(1, job.spec["keep"]),
            engine=engine,
            groups=_groups(job),
        )

    def _merge(self, job: Job, told: _Told, number: int) -> NewJob:
        """The ordinary merge of a trial, evaluated on the suites that the search used."""
        ready = preflight(self._ledger, told.request(told.finding.trials[number]))
        suites = [find_suite(self._ledger, digest) for digest in job.spec["suites"]]
        tags = {TUNE_TAG: job.id, TRIAL_TAG: str(number)}
        adapter_id = self._ledger.ensure_adapter(ready.into)
        dtype = job.spec.get("base_dtype", FULL)
        other = dtype if dtype != self._settings.eval_dtype else None
        return new_merge(ready, adapter_id, suites, tags=tags, base_dtype=other, actor=job.created_by)


class _Told:
    """An ended search in words, numbers and pictures."""

    def __init__(self, ledger: Ledger, job: Job) -> None:
        known = ledger.versions_by_id(job.spec["parents"])
        self.parents = [known[version_id] for version_id in job.spec["parents"]]
        self.into: str = job.spec["into"]
        self.finding = from_builtins(job.result["finding"], Finding)
        self._job = job
        self._recipes = [recipe_from_json(kind) for kind in job.spec["kinds"]]
        self._tasks = _tasks(ledger, job, self.parents)
        self.labels = [parent.label for parent in self.parents]
        self.kinds = [f"{recipe.method} r{recipe.rank}" for recipe in self._recipes]
        self.names = [task.task.name for task in self._tasks]
        self._groups = _groups(job)
        self.searched = searched(self.labels, self._groups)

    def explain(self) -> list[str]:
        return explain(self.finding, self.searched, self.kinds, self.names)

    def request(self, trial: Trial) -> MergeRequest:
        recipe = self._recipes[trial.kind]
        weights, layers = by_layer(trial.weights, self._groups)
        return MergeRequest(
            parents=tuple(
                ParentRef(Ref(parent.name, number=parent.number), weight)
                for parent, weight in zip(self.parents, weights, strict=True)
            ),
            into=self.into,
            method=recipe.method,
            rank=recipe.rank,
            layers=layers,
        )

    def view(self) -> TuneView:
        finding, job = self.finding, self._job
        return TuneView(
            job=job.id,
            into=self.into,
            parents=tuple(self.labels),
            tasks=tuple(self.names),
            owners=tuple(self.labels[owner] for owner in finding.owners),
            budget=float(job.spec["budget"]),
            used=finding.used,
            seed=job.spec["seed"],
            tuning_samples=sum(len(task.tuning) for task in self._tasks),
            heldout_samples=sum(len(task.heldout) for task in self._tasks),
            winner=finding.winner.number,
            plain=PLAIN,
            front=finding.front,
            trials=tuple(map(self._trial, finding.trials)),
            heldout=tuple(
                HeldOutView(
                    row.trial, self.names[row.task], row.metric, row.base, row.parent, row.child, row.retention,
                    row.gain_kept, row.note,
                )
                for row in finding.heldout
            ),
            explanation=tuple(self.explain()),
            jobs=tuple(job.result.get("jobs", ())),
            layer_groups=self._groups,
            less_plain=finding.less_plain,
            advice=tuple(advice(finding)),
            base_dtype=job.spec.get("base_dtype", FULL),
        )  # fmt: skip

    def _trial(self, trial: Trial) -> TrialView:
        recipe = self._recipes[trial.kind]
        of_parents, layers = by_layer(trial.weights, self._groups)
        weights = (ParentView(label, weight, "merge") for label, weight in zip(self.labels, of_parents, strict=True))
        shares = dict(zip(self.names, trial.shares, strict=True))
        return TrialView(
            trial.number, recipe.method, recipe.rank, tuple(weights), trial.samples, trial.complete, shares,
            trial.worst, layers,
        )  # fmt: skip

    def params(self) -> dict[str, str]:
        spec = self._job.spec
        return {
            "parents": ", ".join(self.labels),
            "kinds": ", ".join(self.kinds),
            "tasks": ", ".join(self.names),
            "budget": str(spec["budget"]),
            "seed": str(spec["seed"]),
            "limit": str(spec["limit"]),
            "base_dtype": spec.get("base_dtype", FULL),
            **({"layer_groups": ", ".join(self._groups)} if self._groups else {}),
            "winner": self.explain()[1],
        }

    def series(self) -> dict[str, list[tuple[int, float]]]:
        """Figures by trial, which MLflow draws: the smallest share, each share, each weight; and those held out."""
        trials = self.finding.trials
        series = {"worst": [(trial.number, trial.worst) for trial in trials]}
        for place, name in enumerate(self.names):
            series[f"kept/{name}"] = [(trial.number, trial.shares[place]) for trial in trials]
        for place, label in enumerate(self.searched):
            series[f"weight/{label}"] = [(trial.number, trial.weights[place]) for trial in trials]
        for row in self.finding.heldout:
            if row.retention is not None:
                name = f"heldout/{self.names[row.task]}"
                series.setdefault(name, []).append((row.trial, row.retention.value))
        return series

    def files(self) -> dict[str, str | bytes]:
        view = self.view()
        return {
            "trials.json": json.dumps(to_builtins(view), indent=1, ensure_ascii=False),
            "explanation.md": "\n".join(f"* {line}" for line in view.explanation) + "\n",
            "pareto.png": pareto_picture(view),
            "weights.png": weights_picture(view),
            "trials.png": trials_picture(view),
        }


def _kinds(ledger: Ledger, request: TuneRequest) -> tuple[list[Recipe], list[AdapterVersion], str]:
    """The ways to merge that are searched, as recipes with every weight 1; parents; and the name of the result."""
    # deferred: the merge methods import numpy, which reads of the registry never need
    from ..merging.method import find_method

    found: dict[tuple[str, int], Recipe] = {}
    for method in request.methods:
        has_choice = find_method(method).form != "factors" and not find_method(method).equal_ranks
        for rank in (request.ranks or (None,)) if has_choice else (None,):
            asked = MergeRequest(tuple(map(ParentRef, request.parents)), request.into, method, rank)
            ready = preflight(ledger, asked)
            if any(module.bias for facts in ready.facts for module in facts.modules):
                raise Refused("a parent has biases, which a search does not take", hint="use merge and eval")
            found.setdefault((ready.recipe.method, ready.recipe.rank), ready.recipe)
    if not found:
        raise InvalidInput("a search needs a merge method", hint="--methods cat,svd")
    return list(found.values()), list(ready.parents), ready.into


def _suites(ledger: Ledger, request: TuneRequest, parents: Sequence[AdapterVersion]) -> list[Suite]:
    """The suites that were given, or else those of the parents."""
    given = [find_suite(ledger, text) for text in request.suites]
    suites = given or [suite for parent in parents for suite in suites_of(ledger, parent)]
    if not suites:
        raise InvalidInput(
            f"{', '.join(parent.label for parent in parents)} have no evaluation suite",
            hint="give one: --suite FILE; docs/evaluation.md shows how it is written",
        )
    return list({suite.digest: suite for suite in suites}.values())


def _groups(job: Job) -> tuple[str, ...]:
    return tuple(job.spec.get("layer_groups", ()))  # searches of earlier versions have none


def _tasks(ledger: Ledger, job: Job, parents: Sequence[AdapterVersion]) -> list[TuneTask]:
    own = [{suite.digest for suite in suites_of(ledger, parent)} for parent in parents]
    tasks = []
    for digest in job.spec["suites"]:
        suite = find_suite(ledger, digest)
        owners = [position for position, digests in enumerate(own) if digest in digests]
        for task in suite.tasks:
            tuning, heldout = split(task, job.spec["limit"])
            alone = replace(task, metrics=(task.primary,), rows=())
            tasks.append(TuneTask(suite.name, alone, tuple(owners or range(len(parents))), tuning, heldout))
    return tasks


def _merge_plan(ledger: Ledger, recipe: Recipe, parents: Sequence[AdapterVersion]) -> MergePlan:
    assert recipe.parents == tuple(RecipeParent(parent.spec.content_digest, 1.0) for parent in parents)
    return build_plan(recipe, [ledger.detail(parent.id).facts for parent in parents])

"""An evaluation from request to figures: which reports are missing, what the child is told, where its answers go.

Reports are cached by a key over everything that decides them, so only missing pairs of subject and suite are computed,
and an evaluation that was killed goes on where it stopped. The model itself runs in the child alone.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version as installed_version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..crashpoints import reached
from ..domain.base_dtype import BITSANDBYTES, FULL, check_dtype, told
from ..domain.digest import is_digest, json_digest
from ..domain.errors import Corrupt, InvalidInput, JobFailed, Refused, Unavailable
from ..domain.eval_plan import BASE, EvalPlan, Pair, Subject, report_key
from ..domain.evals import HERE, EvalReport
from ..domain.job import Job, NewJob
from ..domain.refs import Ref
from ..domain.suite import Suite
from ..domain.version import AdapterVersion, Base, Edge
from ..domain.worker import Queue
from ..ports import Beside, Doorbell, Folders, Ledger, VersionStore
from ..settings import Settings
from ..wire import from_builtins, from_json, to_builtins
from .fleet import queue_for_gpu_work
from .locate_base import check_weights, locate_base, quantised_to
from .resolve import resolve
from .schedule import Done, Task, ask
from .suites import find_suite, keep_suite, suites_of

EXTRA, FOUR_BIT_EXTRA = "pip install 'adapterctl[eval]'", "pip install 'adapterctl[4bit]'"
ENGINE_PACKAGES = ("lm_eval", "torch", "transformers", "peft")
BATCH_SIZE = 8
#: Provenance of reports that came with a file instead of being computed here.
IMPORTED = "committed result"


def request_evaluation(
    ledger: Ledger,
    bell: Doorbell,
    refs: Sequence[Ref],
    *,
    suites: Sequence[str] = (),
    limit: int | None = None,
    base_dtype: str | None = None,
    settings: Settings,
    made_on_demand: Mapping[str, str] | None = None,
) -> Job:
    """Queue the evaluation of versions of one base; a merged version brings its parents and their suites along.

    `suites` are paths of YAML files or digests of kept suites; without any, the versions' own are taken. Without a
    `base_dtype` it is that of the settings, or of the base's files where those are quantised.

    Raises `InvalidInput` without a suite or with several bases, `Unavailable` when an extra or the base is not here.
    """
    check_installed()
    check_dtype(base_dtype)
    if limit is not None and limit < 1:
        raise InvalidInput(f"--limit {limit} is not a number of samples", hint="give 1 or more")
    versions = list({version.id: version for version in (resolve(ledger, ref) for ref in refs)}.values())
    given = [find_suite(ledger, text) for text in suites]
    chosen = _choose_suites(ledger, versions, given)
    base = _one_base(versions)
    dtype = dtype_of(locate(ledger, base, settings, made_on_demand), base, base_dtype, settings)
    labels = ", ".join(version.label for version in versions)
    ids = [version.id for version in versions]
    queue = queue_for_gpu_work(ledger, settings)
    new = _new_job(ledger, ids, labels, chosen, limit=limit, dtype=dtype, actor=settings.actor, queue=queue)
    return ask(ledger, bell, new)


def evaluation_of_merge(
    ledger: Ledger, job: Job, version_id: str, *, settings: Settings, made_on_demand: Mapping[str, str] | None = None
) -> list[NewJob]:
    """The evaluation that follows a merge job: on the suites that it names and those that its parents carry.

    None where there is no suite. Where only the parents carry one, a machine that cannot evaluate merges all the same.
    """
    parents = ledger.versions_by_id(job.spec["parents"])
    given = [from_builtins(body, Suite) for body in job.spec["suites"]]
    inherited = [suite for i in job.spec["parents"] for suite in suites_of(ledger, parents[i])]
    suites = list({suite.digest: suite for suite in [*inherited, *given]}.values())
    base = parents[job.spec["parents"][0]].spec.base
    asked = job.spec.get("base_dtype")
    dtype = _possible_dtype(ledger, base, asked, settings, made_on_demand) if suites else None
    if dtype is None and not given:
        return []
    dtype = dtype or asked or settings.eval_dtype
    queue = queue_for_gpu_work(ledger, settings)
    into, actor = job.spec["into"], job.created_by
    return [_new_job(ledger, [version_id], into, suites, limit=None, dtype=dtype, actor=actor, queue=queue)]


def check_installed() -> None:
    """Raises `Unavailable` unless the extra `eval` is there. Imports none of it."""
    if missing := _missing():
        raise Unavailable(f"evaluation needs {', '.join(missing)}, which is not installed", hint=EXTRA)


def dtype_of(folder: Path, base: Base, asked: str | None, settings: Settings) -> str:
    """What the base in `folder` is computed with: what it is quantised to as it is stored, else what is asked for.

    Raises `InvalidInput` where it is stored in something else than asked, `Unavailable` without bitsandbytes.
    """
    stored = quantised_to(folder)
    _check_stored(base, stored, asked)
    dtype = stored or asked or settings.eval_dtype
    if _lacks_bitsandbytes(dtype):
        raise Unavailable(f"a base in {dtype} needs bitsandbytes, which is not installed", hint=FOUR_BIT_EXTRA)
    return dtype


def _check_stored(base: Base, stored: str | None, asked: str | None) -> None:
    if stored and asked not in (None, stored):
        raise InvalidInput(
            f"the base {base.name} is stored in {stored} and cannot be evaluated in {asked}",
            hint="leave out --base-dtype; another form of the model is another base",
        )


def _lacks_bitsandbytes(dtype: str) -> bool:
    return dtype in BITSANDBYTES and find_spec("bitsandbytes") is None


def _missing() -> list[str]:
    return [name for name in ENGINE_PACKAGES if find_spec(name) is None]


def _versions() -> dict[str, str]:
    # the part after "+" names a build of the same release: 2.13.0+cpu
    return {name: installed_version(name).partition("+")[0] for name in ENGINE_PACKAGES}


def _possible_dtype(
    ledger: Ledger, base: Base, asked: str | None, settings: Settings, made_on_demand: Mapping[str, str] | None
) -> str | None:
    """What this machine would evaluate the base in; None where it cannot."""
    try:
        check_installed()
        return dtype_of(locate(ledger, base, settings, made_on_demand), base, asked, settings)
    except (Refused, Unavailable):
        return None


def locate(ledger: Ledger, base: Base, settings: Settings, made_on_demand: Mapping[str, str] | None) -> Path:
    spellings = [spelling for spelling, base_id in ledger.base_aliases().items() if base_id == base.id]
    return locate_base(
        base, spellings, home=settings.home, base_paths=settings.base_paths, made_on_demand=made_on_demand
    )


def folder_of(
    ledger: Ledger,
    base: Base,
    engine: Mapping[str, str],
    settings: Settings,
    made_on_demand: Mapping[str, str] | None,
) -> Path:
    """Where the base is on the machine that computes, with the weights that it is pinned to.

    Raises `InvalidInput` where it is stored otherwise there, `Refused` where it is another model.
    """
    folder = locate(ledger, base, settings, made_on_demand)
    check_weights(base, folder, settings.home)
    _check_stored(base, quantised_to(folder), engine["dtype"])
    return folder


def engine_facts(settings: Settings, dtype: str = FULL) -> dict[str, str]:
    """Settings and versions that a report depends on, read without importing anything.

    Raises `JobFailed` where a worker lacks what `dtype` takes: it would lack it again in the next attempt.
    """
    if _lacks_bitsandbytes(dtype):
        raise JobFailed(
            f"a base in {dtype} needs bitsandbytes, which is not installed where the job ran",
            hint=f"{FOUR_BIT_EXTRA} there, then adapterctl jobs retry",
        )
    facts = {"device": device_of(settings), "dtype": dtype, "batch_size": str(BATCH_SIZE), **_versions()}
    return facts | ({"bitsandbytes": installed_version("bitsandbytes")} if dtype in BITSANDBYTES else {})


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a job asks for: every subject on every suite, each under its key.

    A subject is named by its content; it may be that of several versions, and of none where it is the bare base.
    """

    base: Base
    subjects: Mapping[str, Sequence[AdapterVersion]]
    suites: Mapping[str, Suite]
    limit: int | None
    engine: Mapping[str, str]

    @property
    def pairs(self) -> list[Pair]:
        return [
            Pair(subject, digest, report_key(subject, self.base, digest, suite.counts(self.limit), self.engine))
            for subject in self.subjects
            for digest, suite in self.suites.items()
        ]


class EvalHandler:
    """Evaluation for the supervisor: see `JobHandler`. Reports are kept one by one, as the child finishes them."""

    def __init__(
        self,
        ledger: Ledger,
        settings: Settings,
        *,
        open_versions: Callable[[], VersionStore],
        folders: Folders,
        beside: Callable[[AdapterVersion, Suite, str], Beside],
        made_on_demand: Mapping[str, str] | None = None,
    ) -> None:
        """`beside` gives what a merge, evaluated in a dtype, shows of its parents once their reports are there too."""
        self._ledger = ledger
        self._settings = settings
        self._beside = beside
        self._open_versions = open_versions
        self._folders = folders
        self._made_on_demand = made_on_demand

    @contextmanager
    def begin(self, job: Job) -> Iterator[Task | Done]:
        """The missing pairs as a task; what an earlier attempt finished before it died is taken in first."""
        root = self._settings.home / "evaluations"
        for left in sorted(root.glob(f"{job.id}-*")):
            self._take_in(left)
        wanted = self._wanted(job)
        known = self._ledger.reports([pair.key for pair in wanted.pairs])
        missing = [pair for pair in wanted.pairs if pair.key not in known]
        if not missing:
            yield Done(self._record(wanted))
            return
        out = root / f"{job.id}-{job.attempt}"
        out.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            stack.callback(self._take_in, out)
            body = {
                "kind": "eval",
                "plan": to_builtins(self._plan(wanted, missing, stack)),
                "out": str(out),
                "threads": self._settings.threads,
            }
            yield Task(body, out)

    def finish(self, job: Job, task: Task, result: Mapping[str, Any]) -> Mapping[str, Any]:
        """Store the reports and show their figures on the versions. `result` is not needed: the files say all."""
        self._take_in(task.out)
        return self._record(self._wanted(job))

    def _wanted(self, job: Job) -> Wanted:
        known = self._ledger.versions_by_id(job.spec["refs"])
        versions = [known[version_id] for version_id in job.spec["refs"]]
        subjects: dict[str, list[AdapterVersion]] = {BASE: []}
        asked = [*(parent for child in versions for parent in merged_from(self._ledger, child)), *versions]
        for version in {version.id: version for version in asked}.values():
            subjects.setdefault(version.spec.content_digest, []).append(version)
        return Wanted(
            base=_one_base(versions),
            subjects=subjects,
            suites={digest: find_suite(self._ledger, digest) for digest in job.spec["suites"]},
            limit=job.spec["limit"],
            engine=engine_facts(self._settings, job.spec.get("base_dtype", FULL)),
        )

    def _plan(self, wanted: Wanted, missing: Sequence[Pair], stack: ExitStack) -> EvalPlan:
        subjects = []
        for digest in dict.fromkeys(pair.subject for pair in missing):
            version = next(reversed(wanted.subjects[digest]), None)  # any would do, for they have the same bytes
            folder = str(stack.enter_context(self._folders(version))) if version is not None else None
            subjects.append(Subject(digest, version.label if version is not None else BASE, folder))
        return EvalPlan(
            base_id=wanted.base.id,
            base_folder=str(folder_of(self._ledger, wanted.base, wanted.engine, self._settings, self._made_on_demand)),
            subjects=tuple(subjects),
            suites={digest: wanted.suites[digest] for digest in dict.fromkeys(pair.suite for pair in missing)},
            pairs=tuple(missing),
            limit=wanted.limit,
            engine=wanted.engine,
        )

    def _take_in(self, folder: Path) -> None:
        """Put every finished report into the ledger; then the folder is not needed any more, nor are their tasks."""
        for path in sorted(folder.glob("*.json")):
            self._ledger.put_report(from_json(path.read_bytes(), EvalReport))
            reached("eval.taken")
            for task in folder.parent.glob(f"{path.stem}-*.task"):
                task.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)

    def _record(self, wanted: Wanted) -> Mapping[str, Any]:
        """Show the figures on each version, here and in MLflow; what is there already stays as it is."""
        pairs = wanted.pairs
        reports = self._ledger.reports([pair.key for pair in pairs])
        lost = [pair for pair in pairs if pair.key not in reports]
        if lost:
            raise Corrupt(f"the evaluation ended without {len(lost)} of its {len(pairs)} reports", hint="run it again")
        for pair in pairs:
            for version in wanted.subjects[pair.subject]:
                if version.state == "live":
                    self._show(version, reports[pair.key], wanted.suites[pair.suite])
        return {"reports": [pair.key for pair in pairs]}

    def _show(self, version: AdapterVersion, report: EvalReport, suite: Suite) -> None:
        show_metrics(self._ledger, version, report)
        self._open_versions().log_report(
            version, report, dataset_digest=suite.data_digest, beside=self._beside(version, suite, report.dtype)
        )


def show_metrics(ledger: Ledger, version: AdapterVersion, report: EvalReport) -> None:
    """Put the report's figures among the version's metrics, unless they stand there already."""
    current = ledger.metrics([version.id]).get(version.id, {})
    fresh = {name: value for name, value in report.metrics.items() if current.get(name) != value}
    if fresh:
        ledger.set_metrics(version.id, fresh, source=report.engine.get("source", f"{HERE}{report.suite}"))


def is_imported(report: EvalReport) -> bool:
    """Whether the report came from elsewhere instead of being computed by this registry."""
    return "source" in report.engine


def parents_of(ledger: Ledger, version: AdapterVersion) -> list[AdapterVersion]:
    """The versions that this one was merged or trained from, in the recipe's order."""
    return _ends(ledger, ledger.parent_edges([version.id]).get(version.id, ()))


def merged_from(ledger: Ledger, version: AdapterVersion) -> list[AdapterVersion]:
    """The parents that it was merged of, by this registry or before it came here; none where it was trained."""
    edges = ledger.parent_edges([version.id]).get(version.id, ())
    return _ends(ledger, [edge for edge in edges if edge.weight is not None])


def _ends(ledger: Ledger, edges: Sequence[Edge]) -> list[AdapterVersion]:
    known = ledger.versions_by_id([edge.parent_id for edge in edges])
    return [known[edge.parent_id] for edge in edges]


def read_reports(folder: Path) -> list[EvalReport]:
    """The reports in the JSON files of a folder."""
    return [
        report for path in sorted(folder.glob("*.json")) for report in from_json(path.read_bytes(), list[EvalReport])
    ]


def import_reports(ledger: Ledger, reports: Sequence[EvalReport]) -> int:
    """Take in reports that were made elsewhere, where this registry knows their base; returns how many were taken.

    They get the keys that an evaluation here would give them, so that it need not be run, and say where they are from.
    A report names its subject and suite by content; it means nothing for an adapter with other bytes, nor for these on
    another base. Raises `InvalidInput`, before any is taken, for a subject that is no whole digest.
    """
    for report in reports:
        if report.subject != BASE and not is_digest(report.subject):
            raise InvalidInput(
                f"{report.subject!r} is no subject of a report",
                hint=f"expected the SHA-256 of an adapter's content, or {BASE}",
            )
    versions = {} if _missing() else _versions()  # without the extra there is nothing that they could spare
    taken = 0
    for report in reports:
        base = ledger.find_base(report.base_id)
        if base is None:
            continue
        samples = [len(task.samples) for task in report.tasks]
        key = report_key(report.subject, base, report.suite_digest, samples, {**report.engine, **versions})
        report = replace(report, key=key, base_id=base.id, engine={**report.engine, "source": IMPORTED})
        ledger.put_report(report)
        for version in ledger.versions_by_digest(report.subject) if report.subject != BASE else []:
            if version.spec.base.id == base.id:
                show_metrics(ledger, version, report)
        taken += 1
    return taken


def _new_job(
    ledger: Ledger,
    ids: Sequence[str],
    labels: str,
    suites: Sequence[Suite],
    *,
    limit: int | None,
    dtype: str,
    actor: str,
    queue: Queue,
) -> NewJob:
    # a job on the full base has the key and the spec that it always had
    chosen = {} if dtype == FULL else {"base_dtype": dtype}
    digests = [keep_suite(ledger, suite) for suite in suites]
    return NewJob(
        kind="eval",
        key=json_digest([sorted(ids), sorted(digests), limit, *chosen.values()]),
        title=f"evaluate {labels} on {', '.join(suite.name for suite in suites)}{told(dtype)}",
        spec={"refs": list(ids), "suites": digests, "limit": limit, **chosen},
        created_by=actor,
        queue=queue,
    )


def _choose_suites(ledger: Ledger, versions: Sequence[AdapterVersion], given: Sequence[Suite]) -> list[Suite]:
    """The given suites, else the versions' own; and always those of the parents of a merge."""
    own = [] if given else [suite for version in versions for suite in suites_of(ledger, version)]
    inherited = [
        suite for version in versions for parent in merged_from(ledger, version) for suite in suites_of(ledger, parent)
    ]
    chosen = {suite.digest: suite for suite in [*inherited, *given, *own]}
    if not chosen:
        raise InvalidInput(
            f"{', '.join(version.label for version in versions)} has no evaluation suite",
            hint="give one: --suite FILE; docs/evaluation.md shows how it is written",
        )
    return list(chosen.values())


def _one_base(versions: Sequence[AdapterVersion]) -> Base:
    bases = {version.spec.base.id: version.spec.base for version in versions}
    if len(bases) != 1:
        raise InvalidInput(
            f"these versions apply to {len(bases)} bases: {', '.join(base.name for base in bases.values())}",
            hint="evaluate the versions of one base at a time",
        )
    return next(iter(bases.values()))


def device_of(settings: Settings) -> str:
    """What evaluates on this machine: cpu, cuda or mps."""
    if settings.eval_device != "auto":
        return settings.eval_device
    # without importing torch: a build for CUDA, and the driver's control device
    cuda = find_spec("torch") and "+cpu" not in installed_version("torch") and Path("/dev/nvidiactl").exists()
    return "cuda" if cuda else "cpu"

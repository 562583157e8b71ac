"""What a merged or further trained version kept of its parents: their own suites, on base, parents and child.

Reads reports that are stored already. Figures are compared only where samples, device, dtype and the versions of the
engine are the same for all: one comparison for each dtype that the base was evaluated in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ..api import RetentionRow, RetentionView
from ..domain.base_dtype import full_first, marked
from ..domain.eval_plan import BASE
from ..domain.evals import (
    CONFIDENCE,
    LEAST_SAMPLES,
    MEASURES,
    EvalReport,
    Metric,
    TaskResult,
    behaviour_note,
    kept,
    switched,
)
from ..domain.suite import Suite
from ..domain.version import AdapterVersion
from ..ports import Ledger
from .evaluate import is_imported, parents_of
from .suites import suites_of

#: So many answers stand side by side.
SHOWN = 20
#: More answers than these in another parent's manner are told.
SWITCHED = 0.1


@dataclass(frozen=True, slots=True)
class Setting:
    """What must be equal before reports on one suite are compared: samples of each task, device, dtype of the base, and
    all else that the engine says of itself, such as its versions: torch 2.13 is no parent of torch 2.14.

    `rest` is None for results that came with a file: they stand beside any versions, and are told to be from elsewhere.
    """

    samples: tuple[int, ...]
    device: str
    dtype: str
    rest: tuple[tuple[str, str], ...] | None

    @classmethod
    def of(cls, report: EvalReport) -> Setting:
        rest = {key: value for key, value in report.engine.items() if key not in ("device", "dtype")}
        samples = tuple(len(task.samples) for task in report.tasks)
        return cls(samples, report.engine["device"], report.dtype, None if is_imported(report) else _items(rest))


def _items(facts: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(facts.items()))


@dataclass(frozen=True, slots=True)
class _Compared:
    """The reports of one suite under one setting: base, parents in order, child."""

    base: EvalReport
    parents: tuple[EvalReport, ...]
    child: EvalReport


def retention_view(
    ledger: Ledger,
    version: AdapterVersion,
    *,
    confidence: float = CONFIDENCE,
    judging: bool = False,
    dtype: str | None = None,
) -> RetentionView:
    """One row for each metric of each task of the parents' suites; suites without reports are named as missing.

    Whatever else the version was evaluated on is shown as well, unless only `judging` suites are asked for. `dtype`
    leaves only what was evaluated on the base in it. Where there are several, only metrics of the full one are primary.
    """
    parents = parents_of(ledger, version)
    if not parents:
        return RetentionView(version.label, ())
    subjects = _subjects(version, parents)
    reports = _reports(ledger, version, subjects)
    owners, names = _suite_owners(ledger, version, parents)
    for digest, each in reports[version.spec.content_digest].items() if not judging else ():
        names.setdefault(digest, next(iter(each.values())).suite)
    rows: list[RetentionRow] = []
    missing: list[str] = []
    imported: dict[str, list[str]] = {}
    for digest, name in names.items():
        found = _compare([reports[subject].get(digest, {}) for subject in subjects], dtype)
        if not found:
            missing.append(name)
            continue
        own = owners.get(digest, range(len(parents)))
        labels = dict(zip(subjects, [BASE, *(p.label for p in parents), version.label], strict=True))
        for compared in found:
            rows += _rows(compared, [p.label for p in parents], own, confidence, primary=compared is found[0])
            for report in (compared.base, *compared.parents, compared.child):
                if is_imported(report):
                    imported.setdefault(report.engine["source"], []).append(labels[report.subject])
    notes = (f"{', '.join(dict.fromkeys(whose))}: {source}" for source, whose in imported.items())
    return RetentionView(version.label, tuple(rows), tuple(missing), tuple(notes))


def side_by_side(ledger: Ledger, version: AdapterVersion, suite: Suite, dtype: str) -> list[dict[str, str]]:
    """The first answers of base, parents and child to the same prompts, a column each; empty where none were made.

    All of them on the base in `dtype`.
    """
    parents = parents_of(ledger, version)
    subjects = _subjects(version, parents)
    reports = _reports(ledger, version, subjects)
    found = _compare([reports[subject].get(suite.digest, {}) for subject in subjects], dtype) if parents else []
    if not found:
        return []
    compared = found[0]
    labels = [BASE, *(parent.label for parent in parents), version.label]
    columns = dict(zip(labels, (compared.base, *compared.parents, compared.child), strict=True))
    rows = {(task.name, row.id): row for task in suite.tasks for row in task.rows}
    answers = [{(o["task"], o["id"]): str(o["output"]) for o in report.outputs} for report in columns.values()]
    shown = [key for key in answers[-1] if key in rows and all(key in each for each in answers)][:SHOWN]
    return [
        {
            "prompt": rows[key].prompt,
            "expected": rows[key].target,
            **{label: each[key] for label, each in zip(columns, answers, strict=True)},
        }
        for key in shown
    ]


def _subjects(version: AdapterVersion, parents: Sequence[AdapterVersion]) -> list[str]:
    return [BASE, *(parent.spec.content_digest for parent in parents), version.spec.content_digest]


def _reports(
    ledger: Ledger, version: AdapterVersion, subjects: Sequence[str]
) -> dict[str, dict[str, dict[Setting, EvalReport]]]:
    base_id = version.spec.base.id
    return {subject: _by_suite(ledger.reports_for(subject, base_id)) for subject in dict.fromkeys(subjects)}


def _suite_owners(
    ledger: Ledger, version: AdapterVersion, parents: Sequence[AdapterVersion]
) -> tuple[dict[str, list[int]], dict[str, str]]:
    """Which parents (by position) each suite belongs to, and the suites' names, in the order they are shown."""
    owners: dict[str, list[int]] = {}
    names: dict[str, str] = {}
    for position, parent in enumerate(parents):
        for suite in suites_of(ledger, parent):
            owners.setdefault(suite.digest, []).append(position)
            names[suite.digest] = suite.name
    for suite in suites_of(ledger, version):
        names.setdefault(suite.digest, suite.name)
    return owners, names


def _by_suite(reports: Sequence[EvalReport]) -> dict[str, dict[Setting, EvalReport]]:
    """The newest report of each suite under each setting, the newest setting last; `reports` are the oldest first."""
    found: dict[str, dict[Setting, EvalReport]] = {}
    for report in reports:
        ours, setting = found.setdefault(report.suite_digest, {}), Setting.of(report)
        ours.pop(setting, None)
        ours[setting] = report
    return found


def _compare(found: Sequence[dict[Setting, EvalReport]], dtype: str | None) -> list[_Compared]:
    """Reports of all subjects for each dtype of the base, the full one first: under the setting with the most samples
    that all of them have, of several the newest.
    """
    best: dict[str, list[EvalReport]] = {}
    settings = [setting for reports in reversed(found) for setting in reversed(reports)]
    for setting in dict.fromkeys(settings):
        under = [reports.get(setting) or reports.get(replace(setting, rest=None)) for reports in found]
        shared = [report for report in under if report is not None]
        before = best.get(setting.dtype)
        if len(shared) < len(found) or dtype not in (None, setting.dtype):
            continue
        if before is None or sum(setting.samples) > sum(Setting.of(before[-1]).samples):
            best[setting.dtype] = shared
    return [_Compared(base, tuple(parents), child) for base, *parents, child in map(best.__getitem__, full_first(best))]


def _rows(
    compared: _Compared, labels: Sequence[str], owners: Sequence[int], confidence: float, *, primary: bool
) -> list[RetentionRow]:
    rows: list[RetentionRow] = []
    suite = compared.child.suite
    for position, child in enumerate(compared.child.tasks):
        base = compared.base.tasks[position]
        parents = [report.tasks[position] for report in compared.parents]
        best = _best(parents, owners)
        owner, like_others = labels[best], _switched(compared, child.task, best)
        by_label = dict(zip(labels, parents, strict=True))
        metrics = [metric for name, metric in MEASURES.items() if name in child.metrics]
        rows += [_row(suite, metric, base, by_label, owner, child, like_others, confidence) for metric in metrics]
    here = not any(is_imported(report) for report in (compared.base, *compared.parents, compared.child))
    dtype = compared.child.dtype
    return [
        replace(row, metric=marked(row.metric, dtype), dtype=dtype, primary=primary and row.primary, here=here)
        for row in rows
    ]


def _row(
    suite: str,
    metric: Metric,
    base: TaskResult,
    parents: Mapping[str, TaskResult],
    owner: str,
    child: TaskResult,
    like_others: float | None,
    confidence: float,
) -> RetentionRow:
    result = kept(metric, base.samples, parents[owner].samples, child.samples, confidence=confidence)
    notes = [result.note]
    if len(child.samples) < LEAST_SAMPLES:
        notes.append(f"an interval takes {LEAST_SAMPLES} samples, no gate goes by fewer")
    if metric.generated:
        notes.append(behaviour_note(parents[owner].metrics, child.metrics))
        if like_others is not None and like_others > SWITCHED:
            notes.append(f"{like_others:.0%} of answers read more like another parent's")
    assert metric.direction is not None
    return RetentionRow(
        suite=suite,
        task=child.task,
        metric=metric.name,
        direction=metric.direction,
        owner=owner,
        samples=len(child.samples),
        base=base.metrics[metric.name],
        parents={label: task.metrics[metric.name] for label, task in parents.items()},
        child=child.metrics[metric.name],
        retention=result.retention,
        gain_kept=result.gain_kept,
        note="; ".join(filter(None, notes)),
        primary=metric.name == child.primary,
        switched=like_others if metric.generated else None,
    )


def _switched(compared: _Compared, task: str, owner: int) -> float | None:
    """How often the child answers like another parent than the owner, where all of them answered."""
    *parents, child = (
        [str(row["output"]) for row in report.outputs if row["task"] == task]
        for report in (*compared.parents, compared.child)
    )
    if not child or any(len(answers) != len(child) for answers in parents):
        return None
    return switched(child, parents[owner], [answers for i, answers in enumerate(parents) if i != owner])


def _best(parents: Sequence[TaskResult], owners: Sequence[int]) -> int:
    """The owner that does best by the primary metric: a child is measured against the best it could have kept."""
    sign = 1 if parents[0].direction == "higher" else -1
    return max(owners, key=lambda position: sign * parents[position].metrics[parents[position].primary])

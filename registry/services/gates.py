"""Gates in use: the file that counts, the facts that it asks for about a version, and the decision.

Reads what is stored already and computes no more than intervals; an evaluation that is missing is said to be missing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..api import GateCheck, GatesView
from ..domain.access import Scope, Token
from ..domain.base_dtype import full_first, marked
from ..domain.digest import canonical_json, json_digest
from ..domain.errors import GateRefused, InvalidInput, NotFound, Problem, raise_all
from ..domain.eval_plan import report_key
from ..domain.evals import BEHAVIOUR, HERE, MEASURES, EvalReport, spread
from ..domain.gate import Condition, Gate, Kind, check_gates, conditions_for
from ..domain.refs import first_few, is_like
from ..domain.stage import approvals
from ..domain.suite import Suite
from ..domain.verdict import Decision, Evidence, Figure, Receipt, Retained, decide, record_digest
from ..domain.version import AdapterVersion
from ..ports import GateFile, Ledger
from ..wire import from_json
from .evaluate import is_imported, merged_from, parents_of
from .read_yaml import parse_yaml, read_limited
from .retain import retention_view
from .signatures import evidence_of
from .suites import suites_of
from .views import iso_time, recall_views

MAX_GATE_BYTES = 1 << 20
HINT = "docs/gates.md shows how gates are written"
_MEASURED: frozenset[Kind] = frozenset({"metric", "fresh", "evaluated_here", "evaluation_age"})
_HOUR_S = 3600.0


def load_gates(path: Path) -> Any:
    """What the gate file at `path` holds. Raises `InvalidInput` with the file and every problem of it."""
    value = parse_yaml(read_limited(path, MAX_GATE_BYTES, hint=HINT), path, hint=HINT)
    try:
        check_gates(value)
    except InvalidInput as error:
        raise_all(InvalidInput, f"{path} holds no gates:", error.problems, hint=HINT)
    return value


def set_gates(ledger: Ledger, value: Any, *, stages: Sequence[str], actor: str) -> GatesView:
    """Let these gates count from now on. Setting them again changes nothing."""
    check_gates(value, stages=stages)
    ledger.set_gate_file(json_digest(value), canonical_json(value).decode(), set_by=actor)
    return gates_view(ledger)


def gates_view(ledger: Ledger) -> GatesView:
    kept = ledger.gate_file()
    if kept is None:
        return GatesView(None)
    return GatesView(kept.digest, tuple(json.loads(kept.body)["gates"]), kept.set_by, iso_time(kept.at))


def check_gate(ledger: Ledger, version: AdapterVersion, stage: str) -> GateCheck:
    """Every condition of a stage, held against a version; moves nothing."""
    made = decide_on(ledger, version, stage)
    return GateCheck(version.label, stage, made.gate, made.verdict.outcome, made.verdict.conditions)


def asks_for_key(ledger: Ledger, adapter: str, keyid: str) -> bool:
    """Whether a gate of any stage asks for a signature of this adapter by the key of that id."""
    gates = [gate for gate in _gates(ledger.gate_file()) if is_like(adapter, gate.adapters)]
    return any(key == keyid for gate in gates for condition in gate.conditions for _, key in condition.keys)


def changed_by_name(ledger: Ledger, tokens: Sequence[Token], former: str, name: str) -> list[str]:
    """What gates ask and tokens may for an adapter that is called `name`, where it is other than for `former`."""
    gates = _gates(ledger.gate_file())
    changed = []
    for stage in dict.fromkeys(gate.stage for gate in gates):
        before, after = (conditions_for(gates, each, stage) for each in (former, name))
        for asked, other, word in ((before, after, "no longer asks"), (after, before, "also asks")):
            texts = [repr(each.text) for each in asked if each not in other]
            changed += [f"{stage} {word} for {first_few(texts)}"] if texts else []
    now = ledger.now()
    for token in tokens:
        ended = token.revoked_at is not None or (token.expires_at is not None and token.expires_at <= now)
        could, can = (is_like(each, token.names) for each in (former, name))
        if could != can and not ended and token.scope.covers(Scope.MERGE):
            changed.append(f"the token {token.name} may {'change it' if can else 'no longer change it'}")
    return changed


def decide_on(ledger: Ledger, version: AdapterVersion, stage: str) -> Decision:
    """Whether `version` may hold `stage` by the gates that count now, with all that this stands on."""
    kept = ledger.gate_file()
    conditions = conditions_for(_gates(kept), version.name, stage)
    evidence = collect(ledger, version, stage, conditions)
    return Decision(stage, kept.digest if kept is not None else None, evidence, decide(conditions, evidence))


def require(decision: Decision, *, force: bool, reason: str) -> bool:
    """Return whether the gate had to be forced. Raises `GateRefused`, with force for what was recalled meanwhile."""
    evidence, verdict = decision.evidence, decision.verdict
    if force and not reason.strip():
        raise InvalidInput("--force needs a reason", hint="say why: --reason TEXT; it is kept in the history")
    if verdict.passed or (force and not evidence.recalled):
        return not verdict.passed
    problems = [
        Problem(judged.verdict, f"{judged.condition}: {judged.reason}" + _short_of(judged.distance))
        for judged in verdict.conditions
        if judged.verdict != "passed"
    ]
    raise_all(
        GateRefused,
        f"{evidence.ref} may not hold {decision.stage}, {len(problems)} of {len(verdict.conditions)} conditions fail:",
        problems,
        hint=f"`adapterctl gate check {evidence.ref} --to {decision.stage}` shows all of them",
    )
    raise AssertionError("unreachable")


def kept_decision(ledger: Ledger, digest: str) -> Decision:
    """The decision that the history refers to, by its digest or the beginning of it.

    Raises `NotFound`, also for one that was edited, and `InvalidInput` where several begin so.
    """
    found = ledger.decisions_like(digest) if re.fullmatch("[0-9a-f]{8,64}", digest) else {}
    if len(found) > 1:
        raise InvalidInput(f"several decisions begin with {digest}", hint="give more of the digest")
    for known, record in found.items():
        if record_digest(record) == known:
            return from_json(record, Decision)
    raise NotFound(f"no decision {digest[:80]} is kept here", hint="adapterctl history NAME shows their digests")


def collect(ledger: Ledger, version: AdapterVersion, stage: str, conditions: Sequence[Condition]) -> Evidence:
    """The facts that the conditions look at; what none of them asks for is not read."""
    kinds = {condition.kind for condition in conditions}
    now = ledger.now()
    parents = parents_of(ledger, version)
    reports: list[EvalReport] = []
    suites: dict[str, Suite] = {}
    if kinds & _MEASURED:
        reports = ledger.reports_for(version.spec.content_digest, version.spec.base.id)
        judged_by = [suite for each in (version, *parents) for suite in suites_of(ledger, each)]
        suites = {suite.digest: suite for suite in judged_by}
    current = _current(reports, suites, conditions)
    measured = {report.suite_digest for report in current}
    kept, missing = _kept(ledger, version, conditions) if kinds & {"retention", "gain_kept"} else ((), ())
    return Evidence(
        ref=version.label,
        version_id=version.id,
        content_digest=version.spec.content_digest,
        is_merge=bool(merged_from(ledger, version)),
        has_parents=bool(parents),
        recalled=_recalled(ledger, version),
        figures=tuple(_figures(ledger, version, conditions, current)) if "metric" in kinds else (),
        kept=kept,
        missing=missing,
        receipt=_receipt(ledger, version) if kinds & {"receipt", "loss"} else None,
        changed={
            "suite": tuple(suite.name for digest, suite in suites.items() if digest not in measured),
            "base": tuple(_changed_bases(version, current)),
        },
        evaluated_here=sum(not is_imported(report) for report in (current if suites else reports)),
        evaluation_age=_evaluation_age(ledger, current if suites else reports, now),
        version_age=round((now - version.created_at) / _HOUR_S, 4),
        approvals=approvals(ledger.stage_history(version.adapter_id, stage), version.id, stage),
        signatures=evidence_of(ledger, version, {key for each in conditions for _, key in each.keys}),
        tags=version.spec.tags,
        license=version.spec.license,
    )


def _gates(kept: GateFile | None) -> tuple[Gate, ...]:
    return check_gates(json.loads(kept.body)) if kept is not None else ()


def _recalled(ledger: Ledger, version: AdapterVersion) -> tuple[str, ...]:
    """The version whose recall hits this one: itself, or the nearest that it is made of."""
    hit = recall_views(ledger).get(version.id)
    return () if hit is None else (hit.ref,)


def _current(reports: Sequence[EvalReport], suites: Iterable[str], conditions: Sequence[Condition]) -> list[EvalReport]:
    """The report of each suite that counts: on the full base where there is one, of those with the most samples the
    newest; and the same of every other dtype whose metrics a condition names.
    """
    named = [name for each in conditions for name in (each.name, dict(each.places).get("metric", ""))]
    found = []
    for suite in suites:
        ours = [report for report in reversed(reports) if report.suite_digest == suite]
        for place, dtype in enumerate(full_first({report.dtype for report in ours})):
            if place == 0 or any(name.endswith(marked("", dtype)) for name in named):
                found.append(max((r for r in ours if r.dtype == dtype), key=_samples))
    return found


def _samples(report: EvalReport) -> int:
    return sum(len(task.samples) for task in report.tasks)


def _figures(
    ledger: Ledger, version: AdapterVersion, conditions: Sequence[Condition], current: Sequence[EvalReport]
) -> Iterable[Figure]:
    """Each metric that is asked for: as the suites that judge the version measured it, else as it was last told."""
    told = ledger.metrics([version.id]).get(version.id, {})
    sources = ledger.metric_sources(version.id)
    wanted = {(each.name, each.looks_at): None for each in conditions if each.kind == "metric"}
    for name, confidence in wanted:
        measured = _measured(name, confidence, current)
        if measured is not None:
            yield measured
        elif name in told:
            source = sources[name]
            yield Figure(name, confidence, told[name], None, None, source, source.startswith(HERE))


def _measured(name: str, confidence: float, reports: Iterable[EvalReport]) -> Figure | None:
    for report in reports:
        for task in report.tasks:
            own = name.removeprefix(f"{task.task}/").removesuffix(marked("", report.dtype))
            metric = {**MEASURES, **BEHAVIOUR}.get(own)
            if metric is None or name not in report.metrics or metric.name not in task.metrics:
                continue
            interval = spread(metric, task.samples, confidence=confidence)
            source = report.engine.get("source", f"{HERE}{report.suite}")
            low, high, count = interval.low, interval.high, len(task.samples)
            return Figure(name, confidence, interval.value, low, high, source, not is_imported(report), count)
    return None


def _kept(
    ledger: Ledger, version: AdapterVersion, conditions: Sequence[Condition]
) -> tuple[tuple[Retained, ...], tuple[str, ...]]:
    asked = [each.looks_at for each in conditions if each.kind in ("retention", "gain_kept")]
    rows: list[Retained] = []
    missing: tuple[str, ...] = ()
    for confidence in dict.fromkeys(asked):
        view = retention_view(ledger, version, confidence=confidence, judging=True)
        missing = view.missing
        rows += [
            Retained(
                suite=row.suite,
                task=row.task,
                metric=row.metric,
                primary=row.primary,
                owner=row.owner,
                confidence=confidence,
                retention=row.retention,
                gain_kept=row.gain_kept,
                note=row.note,
                here=row.here,
                samples=row.samples,
            )
            for row in view.rows
        ]
    return tuple(rows), missing


def _receipt(ledger: Ledger, version: AdapterVersion) -> Receipt | None:
    receipt = ledger.detail(version.id).receipt
    return None if receipt is None else Receipt(bool(receipt.get("passed")), version.summary.loss)


def _changed_bases(version: AdapterVersion, reports: Iterable[EvalReport]) -> Iterable[str]:
    """The base by its name where a report's key was made of other facts about it than are known now."""
    base = version.spec.base
    for report in reports:
        samples = [len(task.samples) for task in report.tasks]
        # the key of a report from elsewhere was made with the versions that were installed when it was taken in
        same = report.key == report_key(report.subject, base, report.suite_digest, samples, report.engine)
        if not (report.base_id == base.id if is_imported(report) else same):
            yield base.name
            return


def _evaluation_age(ledger: Ledger, reports: Iterable[EvalReport], now: float) -> float | None:
    times = ledger.report_times([report.key for report in reports])
    return round((now - min(times.values())) / _HOUR_S, 4) if times else None


def _short_of(distance: float | None) -> str:
    return "" if distance is None else f" (distance {distance:.4g})"

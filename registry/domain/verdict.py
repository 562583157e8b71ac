"""Whether a version may hold a stage: the facts that were found, and what each condition of the gates makes of them.

Pure: no clock, no store. A measured figure is decided by the bound of its interval, never by the estimate: all of the
interval on the right side has passed, all of it on the wrong side has failed, and what lies across the bound is
inconclusive, which is no pass: it says that more samples are needed. So are fewer samples than an interval takes, and
samples that are all alike, whatever the figure. What was never measured has failed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

from .digest import canonical_json
from .evals import BEHAVIOUR, LEAST_SAMPLES, Interval
from .gate import Comparison, Condition, Kind

Outcome = Literal["passed", "failed", "inconclusive"]

#: The worst first: what a verdict as a whole is.
_ORDER: tuple[Outcome, ...] = ("failed", "inconclusive", "passed")


@dataclass(frozen=True, slots=True)
class Figure:
    """A metric of the version. `low` and `high` are those of its interval, None where there are no samples of it.

    `samples` is how many there are, None as well in decisions from before they were counted.
    """

    name: str
    confidence: float
    value: float
    low: float | None
    high: float | None
    source: str
    here: bool
    samples: int | None = None


@dataclass(frozen=True, slots=True)
class Retained:
    """What the version kept of a parent on one metric of one task; `owner` is the parent that it is compared with."""

    suite: str
    task: str
    metric: str
    primary: bool
    owner: str
    confidence: float
    retention: Interval | None
    gain_kept: Interval | None
    note: str
    here: bool
    samples: int | None = None


@dataclass(frozen=True, slots=True)
class Receipt:
    passed: bool
    loss: float | None


@dataclass(frozen=True, slots=True)
class Signed:
    """A signature of the version, by the id of its key; `fault` is why it does not count, nothing where it does."""

    key: str
    fault: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """All that a verdict stands on. Ages are in hours, `evaluation_age` that of the oldest evaluation that counts.

    `recalled` names the version itself or an ancestor that was recalled; `changed` are suites and bases that are no
    longer what was evaluated, by what `fresh` calls them; `missing` are suites of its parents without an evaluation.
    """

    ref: str
    version_id: str
    content_digest: str
    is_merge: bool
    has_parents: bool
    recalled: tuple[str, ...] = ()
    figures: tuple[Figure, ...] = ()
    kept: tuple[Retained, ...] = ()
    missing: tuple[str, ...] = ()
    receipt: Receipt | None = None
    changed: Mapping[str, tuple[str, ...]]
    evaluated_here: int = 0
    evaluation_age: float | None = None
    version_age: float = 0.0
    approvals: tuple[str, ...] = ()
    signatures: tuple[Signed, ...] = ()
    tags: Mapping[str, str]
    license: str | None = None


@dataclass(frozen=True, slots=True)
class Judged:
    """One condition. `value` is what was found, `distance` how far the deciding figure is on the right side of it.

    `found` says it in words where it is no number, and `reason` why it did not pass, or what else is to be known.
    """

    condition: str
    verdict: Outcome
    bound: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    distance: float | None = None
    found: str = ""
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Every condition, in the order of the gates. `outcome` is that of the worst."""

    outcome: Outcome
    conditions: tuple[Judged, ...]

    @property
    def passed(self) -> bool:
        return self.outcome == "passed"

    @property
    def reasons(self) -> list[str]:
        """Why it did not pass: one line for every condition that did not."""
        return [judged.reason for judged in self.conditions if judged.verdict != "passed"]


@dataclass(frozen=True, slots=True)
class Decision:
    """A verdict with what it stood on. `gate` is the digest of the gate file, None where none is set."""

    stage: str
    gate: str | None
    evidence: Evidence
    verdict: Verdict

    def record(self) -> str:
        """Canonical JSON of all of it: what is kept, and what the digest in the history is taken of."""
        return canonical_json({"v": 1, **asdict(self)}).decode()


def record_digest(record: str) -> str:
    """The SHA-256 under which a decision is kept and by which the history refers to it."""
    return hashlib.sha256(record.encode()).hexdigest()


def decide(conditions: Sequence[Condition], evidence: Evidence) -> Verdict:
    """Hold the evidence against every condition; none is left out because another one failed."""
    judged = tuple(_JUDGES[condition.kind](condition, evidence) for condition in conditions)
    return Verdict(min((each.verdict for each in judged), key=_ORDER.index, default="passed"), judged)


def _recalled(condition: Condition, evidence: Evidence) -> Judged:
    if not evidence.recalled:
        return _yes(condition, "nothing was recalled")
    names = ", ".join(evidence.recalled)
    own = evidence.ref in evidence.recalled
    return _no(condition, names, f"{names} was recalled" if own else f"it is made of {names}, which was recalled")


def _metric(condition: Condition, evidence: Evidence) -> Judged:
    figures = [each for each in evidence.figures if each.name == condition.name]
    found = next((each for each in figures if each.confidence == condition.looks_at), None)
    if found is None:
        return _no(
            condition, "not measured", f"{condition.name} was not measured, the gate asks for {_asked(condition)}"
        )
    interval = Interval(found.value, _or(found.low, found.value), _or(found.high, found.value))
    if condition.strict and found.low is None:
        return _inconclusive(
            condition,
            interval,
            f"{condition.name} is {found.value:.4g} from {found.source}, without samples to take an interval from",
        )
    return _measured(condition, interval, condition.name, found.samples)


def _retention(condition: Condition, evidence: Evidence) -> Judged:
    """The worst of the tasks that the condition looks at: by default each by its primary metric."""
    if not evidence.has_parents:
        return _yes(condition, "no parents", "has no parents that it could have lost anything of")
    places = dict(condition.places)
    rows = [each for each in evidence.kept if each.confidence == condition.looks_at and _at(each, places)]
    missing = [name for name in evidence.missing if places.get("suite", name) == name]
    judged = [_kept(condition, row) for row in rows]
    if missing:
        names = ", ".join(missing)
        judged.append(
            _no(condition, "not evaluated", f"{_subject(condition)}: {names} was not evaluated on all of them")
        )
    if not judged:
        judged.append(_no(condition, "not evaluated", f"{_subject(condition)}: no such task was evaluated"))
    return min(judged, key=lambda each: (_ORDER.index(each.verdict), _or(each.distance, -1e308)))


def _kept(condition: Condition, row: Retained) -> Judged:
    interval = row.retention if condition.kind == "retention" else row.gain_kept
    what = f"{condition.kind.replace('_', ' ')} of {row.owner} on {row.task} by {row.metric}"
    if interval is None:
        return Judged(
            condition.text, "inconclusive", _bound(condition), found="n/a", reason=f"{what}: {row.note or 'n/a'}"
        )
    return _measured(condition, interval, what, row.samples)


def _loss(condition: Condition, evidence: Evidence) -> Judged:
    if not evidence.is_merge:
        return _yes(condition, "no merge", "is no merge, nothing was lost")
    if evidence.receipt is None or evidence.receipt.loss is None:
        return _no(condition, "unknown", "its receipt tells no loss")
    return _counted(condition, evidence.receipt.loss, "the loss of the merge")


def _receipt(condition: Condition, evidence: Evidence) -> Judged:
    if not evidence.is_merge:
        return _yes(condition, "no merge", "is no merge, there is nothing to prove")
    if evidence.receipt is None:
        return _no(condition, "none", "there is no receipt")
    return _yes(condition, "passed") if evidence.receipt.passed else _no(condition, "failed", "its receipt failed")


def _fresh(condition: Condition, evidence: Evidence) -> Judged:
    changed = evidence.changed.get(condition.name, ())
    if not changed:
        return _yes(condition, "unchanged")
    return _no(condition, "changed", f"{condition.name} {', '.join(changed)} is not what was evaluated")


def _evaluated_here(condition: Condition, evidence: Evidence) -> Judged:
    elsewhere = [f"{each.name} ({each.source})" for each in evidence.figures if not each.here]
    elsewhere += [f"{each.task}/{each.metric} of {each.owner}" for each in evidence.kept if not each.here]
    if elsewhere:
        names = ", ".join(dict.fromkeys(elsewhere))
        return _no(condition, "elsewhere", f"not evaluated by this registry: {names}")
    if not evidence.evaluated_here:
        return _no(condition, "never", "this registry has not evaluated it")
    return _yes(condition, f"{evidence.evaluated_here} reports")


def _version_age(condition: Condition, evidence: Evidence) -> Judged:
    return _counted(condition, evidence.version_age, "the age of the version", unit=" h")


def _evaluation_age(condition: Condition, evidence: Evidence) -> Judged:
    if evidence.evaluation_age is None:
        return _no(condition, "never", "it was not evaluated")
    return _counted(condition, evidence.evaluation_age, "the age of its evaluation", unit=" h")


def _approvals(condition: Condition, evidence: Evidence) -> Judged:
    judged = _counted(condition, float(len(evidence.approvals)), "the number of approvals")
    return replace(judged, found=", ".join(evidence.approvals) or "nobody")


def _signatures(condition: Condition, evidence: Evidence) -> Judged:
    """Each key counts once, however often it signed; a signature that does not hold counts for nobody."""
    good = {each.key for each in evidence.signatures if not each.fault}
    faults = {each.key: each.fault for each in evidence.signatures}
    signers = [name for name, key in condition.keys if key in good]
    others = [
        f"{name} did not sign" if key not in faults else f"what {name} signed does not count, for {faults[key]}"
        for name, key in condition.keys
        if key not in good
    ]
    judged = _counted(condition, float(len(signers)), "the number of signatures")
    reason = f"{judged.reason}: {'; '.join(others)}" if judged.reason else ""
    return replace(judged, found=", ".join(signers) or "nobody", reason=reason)


def _tag(condition: Condition, evidence: Evidence) -> Judged:
    value = evidence.tags.get(condition.name)
    if value is None:
        return _no(condition, "absent", f"it has no tag {condition.name}")
    if condition.values and value not in condition.values:
        return _no(condition, value, f"its tag {condition.name} is {value!r}, expected {' or '.join(condition.values)}")
    return _yes(condition, value)


def _license(condition: Condition, evidence: Evidence) -> Judged:
    # SPDX: identifiers are the same in small letters and in capitals
    if evidence.license is not None and evidence.license.lower() in map(str.lower, condition.values):
        return _yes(condition, evidence.license)
    found = evidence.license or "none"
    return _no(condition, found, f"its license is {found}, expected {' or '.join(condition.values)}")


_JUDGES: Mapping[Kind, Callable[[Condition, Evidence], Judged]] = {
    "recalled": _recalled,
    "metric": _metric,
    "retention": _retention,
    "gain_kept": _retention,
    "loss": _loss,
    "receipt": _receipt,
    "fresh": _fresh,
    "evaluated_here": _evaluated_here,
    "version_age": _version_age,
    "evaluation_age": _evaluation_age,
    "approvals": _approvals,
    "signatures": _signatures,
    "tag": _tag,
    "license": _license,
}


def _measured(condition: Condition, interval: Interval, what: str, samples: int | None) -> Judged:
    """A figure with its interval: the bound of it decides, unless the condition goes by the estimate."""
    if condition.confidence is None:
        interval, samples = Interval(interval.value, interval.value, interval.value), None
    shown = f"{what} is {interval.value:.4g}"
    if interval.low != interval.high:
        shown += f" [{interval.low:.4g}, {interval.high:.4g}]"
    if samples is not None and (lack := _lack(condition, interval, samples)):
        return replace(_inconclusive(condition, interval, f"{shown} on {lack}"), distance=None)
    upward = condition.comparison in (">=", ">")
    worst, best = (interval.low, interval.high) if upward else (interval.high, interval.low)
    if _holds(worst, condition.comparison, condition.bound):
        return _number(condition, "passed", interval, "")
    if not _holds(best, condition.comparison, condition.bound):
        return _number(condition, "failed", interval, f"{shown}, the gate asks for {_asked(condition)}")
    return _inconclusive(condition, interval, f"{shown}, across the bound: the gate asks for {_asked(condition)}")


def _lack(condition: Condition, interval: Interval, samples: int) -> str:
    """Why an interval says nothing about other samples, as the end of a sentence; empty where it does."""
    if samples < LEAST_SAMPLES:
        few = f"{samples} sample{'s' if samples > 1 else ''}"
        return f"{few}, an interval takes {LEAST_SAMPLES} at least: evaluate more, with a higher --limit or more rows"
    # what equals its parent (or the base) on every sample has no interval either
    equal = condition.kind != "metric" and interval.value in (0, 1)
    # answers that are all as long as they should be are no accident of a few
    behaves = condition.name.rpartition("/")[2].partition(".")[0] in BEHAVIOUR
    if interval.low == interval.high and not equal and not behaves:
        return f"each of {samples} samples, which are all alike: evaluate others"
    return ""


def _counted(condition: Condition, value: float, what: str, *, unit: str = "") -> Judged:
    """A figure without an interval."""
    interval = Interval(value, value, value)
    if _holds(value, condition.comparison, condition.bound):
        return _number(condition, "passed", interval, "")
    reason = f"{what} is {value:.4g}{unit}, the gate asks for {_asked(condition)}{unit}"
    return _number(condition, "failed", interval, reason)


def _inconclusive(condition: Condition, interval: Interval, reason: str) -> Judged:
    return _number(condition, "inconclusive", interval, reason)


def _number(condition: Condition, verdict: Outcome, interval: Interval, reason: str) -> Judged:
    upward = condition.comparison in (">=", ">")
    distance = interval.low - condition.bound if upward else condition.bound - interval.high
    return Judged(
        condition.text, verdict, _bound(condition), interval.value, interval.low, interval.high, distance, reason=reason
    )


def _yes(condition: Condition, found: str, note: str = "") -> Judged:
    return Judged(condition.text, "passed", _bound(condition), found=found, reason=note)


def _no(condition: Condition, found: str, reason: str) -> Judged:
    return Judged(condition.text, "failed", _bound(condition), found=found, reason=reason)


def _bound(condition: Condition) -> str:
    if not condition.comparison:
        return ""
    at = f" @ {condition.confidence:.3g}" if condition.confidence is not None else ""
    return f"{condition.comparison} {condition.bound:.6g}{at}"


_WORDS: Mapping[Comparison, str] = {">=": "at least ", "<=": "at most ", ">": "more than ", "<": "less than ", "": ""}


def _asked(condition: Condition) -> str:
    return f"{_WORDS[condition.comparison]}{condition.bound:.6g}"


def _subject(condition: Condition) -> str:
    where = " ".join(f"{place} {name}" for place, name in condition.places)
    return f"{condition.kind.replace('_', ' ')}{f' on {where}' if where else ''}"


def _at(row: Retained, places: Mapping[str, str]) -> bool:
    return (
        places.get("suite", row.suite) == row.suite
        and places.get("task", row.task) == row.task
        and places.get("owner", row.owner) in (row.owner, row.owner.partition(":")[0])
        and (row.metric == places["metric"] if "metric" in places else row.primary)
    )


def _holds(value: float, comparison: Comparison, bound: float) -> bool:
    return {">=": value >= bound, "<=": value <= bound, ">": value > bound, "<": value < bound, "": False}[comparison]


def _or(value: float | None, default: float) -> float:
    return default if value is None else value

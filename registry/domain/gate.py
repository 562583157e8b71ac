"""What a version has to show before it may hold a stage: the gates of a registry, and the check of a file of them.

A gate is data and never code: fixed keys, and conditions of one line each, `SUBJECT COMPARISON BOUND`. What they are
held against, and how it is decided, is in `verdict.py`. Nothing here opens a file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .errors import InvalidInput, Problem, raise_all
from .evals import CONFIDENCE
from .fields import Fields, kind_of
from .refs import check_alias, is_like
from .signature import read_public_key

GATE_KEYS = ("stage", "adapters", "require", "receipt", "fresh", "evaluated_here", "tags", "license", "signatures")
ASKING = frozenset(GATE_KEYS) - {"stage", "adapters"}
FRESH = ("suite", "base")
MAX_GATES, MAX_CONDITIONS, MAX_VALUES, MAX_TEXT = 64, 100, 64, 250
#: Where a retention condition may look instead of at the primary metric of every task.
PLACES = ("suite", "task", "owner", "metric")

Kind = Literal[
    "recalled",
    "metric",
    "retention",
    "gain_kept",
    "loss",
    "receipt",
    "fresh",
    "evaluated_here",
    "version_age",
    "evaluation_age",
    "approvals",
    "signatures",
    "tag",
    "license",
]
Comparison = Literal["", ">=", "<=", ">", "<"]

#: What a line may begin with, beside the name of a metric.
SUBJECTS: Mapping[str, Kind] = {
    "retention.min": "retention",
    "gain_kept.min": "gain_kept",
    "receipt.loss": "loss",
    "approvals": "approvals",
    "version.age": "version_age",
    "evaluation.age": "evaluation_age",
}
_RESERVED = re.compile(r"(retention|gain_kept|receipt|version|evaluation|approvals)([.\[].*)?")
_LINE = re.compile(
    r"(?P<subject>\S+)\s*(?P<comparison>>=|<=|>|<)\s*(?P<bound>[^\s@]+)(?P<places>(\s+on(\s+[a-z]+\s+[a-z0-9_.:-]{1,140})+)?)"
    r"(\s*@\s*((?P<confidence>[0-9]{2}(\.[0-9]+)?)\s*%\s*confidence|(?P<estimate>estimate)))?"
)
_METRIC = re.compile(r"[\w./%-]{1,250}", re.ASCII)
_NUMBER = re.compile(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]{1,3})?")
_AGE = re.compile(r"([0-9]+(?:\.[0-9]+)?)(h|d|w)")
_HOURS = {"h": 1, "d": 24, "w": 168}
_GLOB = re.compile(r"[a-z0-9._*?-]{1,128}")
_EXAMPLE = "'SUBJECT >= NUMBER', for example 'retention.min >= 0.95 @ 90% confidence'"


@dataclass(frozen=True, slots=True)
class Condition:
    """One thing that a version has to show. `text` is how it was written.

    `confidence` is that of the interval whose bound decides, None where the estimate does. `strict` says that it was
    asked for in so many words, so that a figure without an interval is not enough. `keys` are pairs of the name that
    the gate gives a key and the id of the key.
    """

    text: str
    kind: Kind
    comparison: Comparison = ""
    bound: float = 0.0
    confidence: float | None = None
    strict: bool = False
    name: str = ""
    places: tuple[tuple[str, str], ...] = ()
    values: tuple[str, ...] = ()
    keys: tuple[tuple[str, str], ...] = ()

    @property
    def looks_at(self) -> float:
        """The confidence of the figures that it needs, also where it then goes by their estimate."""
        return CONFIDENCE if self.confidence is None else self.confidence


@dataclass(frozen=True, slots=True)
class Gate:
    """Conditions of a stage, for the adapters whose name is like one of the globs."""

    stage: str
    adapters: tuple[str, ...]
    conditions: tuple[Condition, ...]

    def concerns(self, adapter: str, stage: str) -> bool:
        return stage == self.stage and is_like(adapter, self.adapters)


#: Holds for every stage, whatever the gates say, and cannot be forced.
NEVER_RECALLED = Condition("not recalled", "recalled")


def conditions_for(gates: Sequence[Gate], adapter: str, stage: str) -> tuple[Condition, ...]:
    """What `adapter` has to show for `stage`: every gate that concerns it counts, and that nothing was recalled."""
    wanted = [condition for gate in gates if gate.concerns(adapter, stage) for condition in gate.conditions]
    return (NEVER_RECALLED, *dict.fromkeys(wanted))


def check_gates(value: Any, *, stages: Sequence[str] | None = None) -> tuple[Gate, ...]:
    """Turn what YAML gave into gates, or raise `InvalidInput` with every problem: where, what, what was expected.

    `stages` are those of the registry; without them any name that a stage may have is taken.
    """
    problems: list[Problem] = []
    top = Fields(value, "file", ("gates",), problems, of="a gate file")
    entries = top.get("gates", list, None if isinstance(value, dict) else [])
    if len(entries) > MAX_GATES:
        top.problem("gates", f"holds {len(entries)} gates, expected at most {MAX_GATES}")
    gates = [_check_gate(entry, f"gates[{i}]", stages, problems) for i, entry in enumerate(entries[:MAX_GATES])]
    raise_all(InvalidInput, "these are no gates:", problems, hint="see docs/gates.md")
    return tuple(gates)


def _check_gate(entry: Any, where: str, stages: Sequence[str] | None, problems: list[Problem]) -> Gate:
    fields = Fields(entry, where, GATE_KEYS, problems, of="a gate", inside=True)
    stage = fields.text("stage")
    if stage:
        _check_stage(fields, stage, stages)
    adapters = fields.texts("adapters", ["*"])
    for glob in adapters:
        if not _GLOB.fullmatch(glob):
            fields.problem("adapters", f"is {glob!r}, expected names such as 'translate' or 'chat-*'")
    if not adapters:
        fields.problem("adapters", "is an empty list, expected names; leave it out for all of them")
    conditions = [
        *_check_lines(fields, where, problems),
        *_check_keys(fields, entry if isinstance(entry, dict) else {}),
        *_check_signatures(entry, where, problems),
    ]
    if isinstance(entry, dict) and not entry.keys() & ASKING:
        fields.problem("require", "is missing, and no other key asks for anything: the gate would be open")
    return Gate(stage, tuple(adapters), tuple(conditions))


def _check_stage(fields: Fields, stage: str, stages: Sequence[str] | None) -> None:
    if stages is not None and stage not in stages:
        fields.problem("stage", f"is {stage[:80]!r}, expected one of {', '.join(stages)}")
        return
    try:
        check_alias(stage)
    except InvalidInput as error:
        fields.problem("stage", f"is {stage[:80]!r}, expected the name of a stage", error.hint)


def _check_lines(fields: Fields, where: str, problems: list[Problem]) -> list[Condition]:
    lines: list[Any] = fields.get("require", list, [])
    if len(lines) > MAX_CONDITIONS:
        fields.problem("require", f"holds {len(lines)} conditions, expected at most {MAX_CONDITIONS}")
    found = []
    for position, line in enumerate(lines[:MAX_CONDITIONS]):
        try:
            found.append(parse_condition(line))
        except InvalidInput as error:
            problems.append(Problem(f"{where}.require[{position}]", error.message, error.hint))
    return found


def parse_condition(line: Any) -> Condition:
    """Read one line of `require`. Raises `InvalidInput` with what it is and what was expected."""
    match = _LINE.fullmatch(line.strip()) if isinstance(line, str) else None
    if match is None:
        shown = repr(line[:120]) if isinstance(line, str) else kind_of(line)
        raise InvalidInput(f"is {shown}, expected {_EXAMPLE}")
    subject, kind = match["subject"], SUBJECTS.get(match["subject"], "metric")
    if kind == "metric" and (_RESERVED.fullmatch(subject) or not _METRIC.fullmatch(subject)):
        raise InvalidInput(f"asks for {subject!r}, expected a metric or one of {', '.join(SUBJECTS)}")
    comparison: Any = match["comparison"]
    _check_comparison(subject, kind, comparison)
    measured = kind in ("metric", "retention", "gain_kept")
    if not measured and (match["confidence"] or match["estimate"]):
        raise InvalidInput(f"asks for {subject} with a confidence, expected none: it is counted, not measured")
    return Condition(
        text=" ".join(line.split()),
        kind=kind,
        comparison=comparison,
        bound=_bound(subject, kind, match["bound"]),
        confidence=_confidence(match["confidence"]) if measured and not match["estimate"] else None,
        strict=match["confidence"] is not None,
        name=subject if kind == "metric" else "",
        places=_places(subject, kind, match["places"]),
    )


def _check_comparison(subject: str, kind: Kind, comparison: str) -> None:
    upward = comparison in (">=", ">")
    if kind in ("retention", "gain_kept", "approvals") and not upward:
        raise InvalidInput(f"asks for {subject} {comparison}, expected >= or >")
    if kind in ("loss", "version_age", "evaluation_age") and upward:
        raise InvalidInput(f"asks for {subject} {comparison}, expected <= or <")


def _bound(subject: str, kind: Kind, text: str) -> float:
    """A number, a share such as `95%`, or for an age hours, days or weeks; ages come out in hours."""
    if kind in ("version_age", "evaluation_age"):
        age = _AGE.fullmatch(text)
        if age is None:
            raise InvalidInput(f"has the bound {text[:40]!r}, expected an age such as 36h, 30d or 2w")
        return float(age[1]) * _HOURS[age[2]]
    share = text.endswith("%")
    if not _NUMBER.fullmatch(text.removesuffix("%")) or (share and kind in ("metric", "approvals")):
        raise InvalidInput(f"has the bound {text[:40]!r}, expected a number")
    value = float(text.removesuffix("%")) / (100 if share else 1)
    if kind == "approvals" and (value != int(value) or not 1 <= value <= MAX_VALUES):
        raise InvalidInput(f"has the bound {text}, expected 1 to {MAX_VALUES} approvals")
    if abs(value) > 1e300:
        raise InvalidInput(f"has the bound {text}, expected a number that a metric can reach")
    return value


def _confidence(text: str | None) -> float:
    value = CONFIDENCE if text is None else round(float(text) / 100, 12)
    if not 0.5 <= value <= 0.999:
        raise InvalidInput(f"has a confidence of {text} %, expected 50 to 99.9")
    return value


def _places(subject: str, kind: Kind, text: str) -> tuple[tuple[str, str], ...]:
    words = text.split()[1:]
    places = list(zip(words[0::2], words[1::2], strict=True))
    if places and kind not in ("retention", "gain_kept"):
        raise InvalidInput(f"says where for {subject}, expected that of retention.min and gain_kept.min only")
    unknown = [place for place, _ in places if place not in PLACES]
    if unknown or len(dict(places)) < len(places):
        raise InvalidInput(f"says 'on {' '.join(words)}', expected each of {', '.join(PLACES)} once at most")
    return tuple(places)


def _check_keys(fields: Fields, entry: Mapping[Any, Any]) -> list[Condition]:
    """The conditions that are keys of the gate."""
    found: list[Condition] = []
    if "receipt" in entry:
        if fields.text("receipt") not in ("passed", ""):
            fields.problem("receipt", f"is {entry['receipt']!r}, expected 'passed'")
        found.append(Condition("receipt: passed", "receipt"))
    for what in dict.fromkeys(fields.texts("fresh", [])):
        if what not in FRESH:
            fields.problem("fresh", f"names {what!r}, expected {' or '.join(FRESH)}")
        found.append(Condition(f"fresh: {what}", "fresh", name=what))
    if "evaluated_here" in entry:
        if entry["evaluated_here"] is not True:
            fields.problem("evaluated_here", f"is {entry['evaluated_here']!r}, expected true, or no such key")
        found.append(Condition("evaluated_here: true", "evaluated_here"))
    found += _check_tags(fields, entry)
    if "license" in entry:
        known = fields.texts("license", [])
        if not 1 <= len(known) <= MAX_VALUES or not all(map(_is_word, known)):
            fields.problem("license", f"is {str(known)[:80]}, expected 1 to {MAX_VALUES} identifiers")
        found.append(Condition(f"license: {', '.join(known)}", "license", values=tuple(known)))
    return found


def _check_tags(fields: Fields, entry: Mapping[Any, Any]) -> list[Condition]:
    """`tags: [key]` asks that a tag is there, `tags: {key: value}` for its value, or for one of a list of values."""
    tags = entry.get("tags", {})
    if isinstance(tags, list):
        tags = {key: [] for key in fields.texts("tags", [])}
    if not isinstance(tags, dict) or len(tags) > MAX_VALUES:
        fields.problem("tags", f"is {kind_of(tags)}, expected at most {MAX_VALUES} keys, or keys and values")
        return []
    found = []
    for key, given in tags.items():
        values = given if isinstance(given, list) else [given]
        if not all(map(_is_word, (key, *values))):
            fields.problem("tags", f"has {key!r}: {given!r}, expected texts (write 'yes' in quotes)")
            continue
        asked = f" is {' or '.join(values)}" if values else ""
        found.append(Condition(f"tag {key}{asked}", "tag", name=key, values=tuple(values)))
    return found


def _check_signatures(entry: Any, where: str, problems: list[Problem]) -> list[Condition]:
    """`signatures: {keys: {NAME: KEY}, at_least: N}`; the names are the gate's own, for its answers."""
    if not isinstance(entry, dict) or "signatures" not in entry:
        return []
    asked = entry["signatures"]
    fields = Fields(asked, f"{where}.signatures", ("keys", "at_least"), problems, of="signatures", inside=True)
    given = asked.get("keys") if isinstance(asked, dict) else None
    if not isinstance(given, dict) or not 1 <= len(given) <= MAX_VALUES:
        if isinstance(asked, dict):
            said = f"{len(given)} keys" if isinstance(given, dict) else kind_of(given)
            fields.problem("keys", f"is {said}, expected 1 to {MAX_VALUES} names, each with its public key")
        return []
    keys: dict[str, str] = {}
    for name, text in given.items():
        try:
            if not _is_word(name):
                raise InvalidInput("is no name, expected a text (write '1' in quotes)")
            key = read_public_key(text if isinstance(text, str) else repr(text)).id
        except InvalidInput as error:
            fields.problem(f"keys.{name}", error.message, error.hint)
            continue
        if key in keys:
            fields.problem(f"keys.{name}", f"is the key of {keys[key]}, expected another one")
        keys[key] = name
    at_least = fields.number("at_least", 1, 1, len(given))
    text = f"signatures: {at_least} of {', '.join(keys.values())}"
    pairs = tuple((name, key) for key, name in keys.items())
    return [Condition(text, "signatures", ">=", float(at_least), keys=pairs)]


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and 1 <= len(value) <= MAX_TEXT and value.isprintable()

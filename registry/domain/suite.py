"""What an evaluation suite is: tasks over rows of text, and the check that a mapping read from YAML is one.

A suite is data and never code: known keys only, and templates that know `{{ field }}` and nothing else. Checking
renders the rows, so a `Suite` holds every text that a model will see. Nothing here opens a file.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import Any

from .digest import json_digest
from .errors import AdapterctlError, InvalidInput, Problem, raise_all
from .evals import MEASURES
from .fields import Fields
from .refs import NAME_PATTERN

SUITE_KEYS = ("name", "tasks")
TASK_KEYS = ("name", "data", "prompt", "target", "metrics", "primary", "max_new_tokens", "stop", "limit", "seed")
#: Samples a task evaluates unless it says otherwise: what shows a loss of 5 % by likelihood, and by generated text.
DEFAULT_LIMIT, DEFAULT_LIMIT_GENERATED = 100, 400
MAX_TASKS, MAX_ROWS, MAX_NEW_TOKENS, MAX_STOPS = 32, 10_000, 1024, 8
#: So many problems of one data file are told; the others are likely the same.
TOLD_ROWS = 5

_FIELD = re.compile(r"\{\{ *([A-Za-z_][A-Za-z0-9_]*) *\}\}")
_CODE = re.compile(r"\{\{|\}\}|\{%|\{#")


@dataclass(frozen=True, slots=True)
class Row:
    """One sample as the model sees it. White space is meant: a target usually begins with a space."""

    id: str
    prompt: str
    target: str


@dataclass(frozen=True, slots=True)
class SuiteTask:
    """One task. `data_sha256` is the digest of the data file's bytes; `limit` is of samples, chosen by `seed`."""

    name: str
    data: str
    data_sha256: str
    prompt: str
    target: str
    metrics: tuple[str, ...]
    primary: str
    max_new_tokens: int
    stop: tuple[str, ...]
    limit: int
    seed: int
    rows: tuple[Row, ...]

    @property
    def generates(self) -> bool:
        return any(MEASURES[name].generated for name in self.metrics)

    def samples(self, limit: int | None = None) -> tuple[Row, ...]:
        """The rows that are evaluated, in the file's order; a smaller limit takes a subset of a larger one's."""
        count = min(len(self.rows), self.limit if limit is None else limit)
        # not `Random.sample`: Python promises the same sequence for `random()` alone
        rng = random.Random(self.seed)
        lots = [rng.random() for _ in self.rows]
        chosen = sorted(range(len(self.rows)), key=lots.__getitem__)[:count]
        return tuple(self.rows[i] for i in sorted(chosen))


@dataclass(frozen=True, slots=True)
class Suite:
    name: str
    tasks: tuple[SuiteTask, ...]

    @property
    def digest(self) -> str:
        """SHA-256 over all that decides the result: names, settings, templates, data bytes and rows."""
        return json_digest({"v": 1, **asdict(self)})

    def counts(self, limit: int | None = None) -> list[int]:
        """How many samples of each task are evaluated."""
        return [len(task.samples(limit)) for task in self.tasks]

    @property
    def data_digest(self) -> str:
        """SHA-256 over the data files alone, in the order of the tasks."""
        return json_digest([task.data_sha256 for task in self.tasks])


def check_suite(value: Any, read: Callable[[str], bytes]) -> Suite:
    """Turn what YAML gave into a suite, or raise `InvalidInput` with every problem that it has.

    `read` gives the bytes of a data file by its path as the suite writes it; its own errors become problems too.
    """
    problems: list[Problem] = []
    top = Fields(value, "suite", SUITE_KEYS, problems, of="a suite")
    name = top.text("name", pattern=NAME_PATTERN)
    entries = top.get("tasks", list, [])
    if not 1 <= len(entries) <= MAX_TASKS:
        top.problem("tasks", f"holds {len(entries)} tasks, expected 1 to {MAX_TASKS}")
    tasks = [_check_task(entry, f"tasks[{i}]", read, problems) for i, entry in enumerate(entries[:MAX_TASKS])]
    names = [task.name for task in tasks]
    problems += [Problem("tasks", f"task name {n!r} is used twice") for n in sorted(set(names)) if names.count(n) > 1]
    raise_all(InvalidInput, "this is not an evaluation suite:", problems, hint="see docs/evaluation.md")
    return Suite(name, tuple(tasks))


def check_known_suite(suite: Suite) -> None:
    """Check a suite whose rows are there already, as another machine sends it, by the rules of `check_suite`."""
    problems = [
        Problem(f"tasks[{i}]", f"has a template or a digest that no suite has: {text[:80]!r}")
        for i, task in enumerate(suite.tasks)
        for text, right in (
            (task.prompt, _is_template(task.prompt)),
            (task.target, _is_template(task.target)),
            (task.data, _stays_inside(task.data)),
            (task.data_sha256, re.fullmatch("[0-9a-f]{64}", task.data_sha256)),
        )
        if not right
    ]
    raise_all(InvalidInput, "this is not an evaluation suite:", problems, hint="see docs/evaluation.md")
    rows = {f"{i}.jsonl": task.rows for i, task in enumerate(suite.tasks)}
    settings = ("name", "metrics", "primary", "max_new_tokens", "stop", "limit", "seed")
    tasks = [
        {key: list(value) if isinstance(value := getattr(task, key), tuple) else value for key in settings}
        | {"data": data}
        for task, data in zip(suite.tasks, rows, strict=True)
    ]
    again = check_suite(
        {"name": suite.name, "tasks": tasks},
        lambda data: b"\n".join(json.dumps(asdict(row)).encode() for row in rows[data]),
    )
    if [task.rows for task in again.tasks] != [task.rows for task in suite.tasks]:
        raise InvalidInput(
            "this is not an evaluation suite: its rows cannot be read back", hint="see docs/evaluation.md"
        )


def _is_template(text: str) -> bool:
    return bool(text) and not _CODE.search(_FIELD.sub("", text))


def render(template: str, row: Mapping[str, Any]) -> str:
    """Put fields of `row` into `{{ field }}`. Raises `KeyError` for a field that the row lacks."""
    return _FIELD.sub(lambda match: str(row[match.group(1)]), template)


def _check_task(entry: Any, where: str, read: Callable[[str], bytes], problems: list[Problem]) -> SuiteTask:
    fields = Fields(entry, where, TASK_KEYS, problems, of="a suite", inside=True)
    metrics = tuple(fields.texts("metrics", ["nll"]))
    for metric in metrics:
        if metric not in MEASURES:
            fields.problem("metrics", f"names {metric!r}, known are {', '.join(MEASURES)}")
    if not metrics or len(set(metrics)) < len(metrics):
        fields.problem("metrics", "is empty or names a metric twice")
    generates = any(metric in MEASURES and MEASURES[metric].generated for metric in metrics)
    primary = fields.text("primary", metrics[0] if metrics else "nll")
    if primary not in metrics:
        fields.problem("primary", f"is {primary!r}, which is not among the metrics")
    data = fields.text("data")
    prompt, target = _template(fields, "prompt"), _template(fields, "target")
    name = fields.text("name", pattern=NAME_PATTERN)
    content, rows = _check_rows(data, name, (prompt, target), read, fields)
    stops = fields.texts("stop", [])
    if len(stops) > MAX_STOPS or "" in stops:
        fields.problem("stop", f"must be at most {MAX_STOPS} texts, none of them empty")
    return SuiteTask(
        name=name,
        data=data,
        data_sha256=hashlib.sha256(content).hexdigest(),
        prompt=prompt,
        target=target,
        metrics=metrics,
        primary=primary,
        max_new_tokens=fields.number("max_new_tokens", 64, 1, MAX_NEW_TOKENS),
        stop=tuple(stops),
        limit=fields.number("limit", DEFAULT_LIMIT_GENERATED if generates else DEFAULT_LIMIT, 1, MAX_ROWS),
        seed=fields.number("seed", 0, 0, 2**32 - 1),
        rows=rows,
    )


def _template(fields: Fields, key: str) -> str:
    value = fields.text(key, f"{{{{ {key} }}}}")
    if _CODE.search(_FIELD.sub("", value)):
        fields.problem(key, f"is {value!r}: templates know {{{{ field }}}} and nothing else")
        return ""
    return value


def _check_rows(
    data: str, task: str, templates: tuple[str, str], read: Callable[[str], bytes], fields: Fields
) -> tuple[bytes, tuple[Row, ...]]:
    if not data:
        return b"", ()
    if not _stays_inside(data):
        fields.problem("data", f"is {data!r}, expected a .jsonl file inside the suite's folder")
        return b"", ()
    try:
        content = read(data)
    except AdapterctlError as error:
        fields.problem("data", error.message)
        return b"", ()
    rows: list[Row] = []
    findings: list[str] = []
    lines = [line for line in content.splitlines() if line.strip()]
    for number, line in enumerate(lines[:MAX_ROWS], start=1):
        try:
            rows.append(_check_row(line, f"{task}-{number:04d}", templates))
        except InvalidInput as error:
            findings.append(f"{data} line {number} {error.message}")
    if not 1 <= len(lines) <= MAX_ROWS:
        findings.insert(0, f"{data} has {len(lines)} lines, expected 1 to {MAX_ROWS}")
    ids = {row.id for row in rows}
    if len(ids) < len(rows):
        findings.append(f"{data} uses an id twice")
    if len(findings) > TOLD_ROWS:
        findings[TOLD_ROWS:] = [f"{data} has {len(findings) - TOLD_ROWS} more lines like these"]
    for finding in findings:
        fields.problem("data", finding)
    return content, tuple(rows)


def _check_row(line: bytes, default_id: str, templates: tuple[str, str]) -> Row:
    try:
        value = json.loads(line)
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise InvalidInput(f"is not JSON: {error}") from error
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise InvalidInput("is not an object of texts")
    try:
        prompt, target = (render(template, value) for template in templates)
    except KeyError as error:
        raise InvalidInput(f"lacks the field {error.args[0]!r}") from error
    if not prompt.strip() or not target.strip():
        raise InvalidInput("has an empty prompt or target")
    return Row(value.get("id") or default_id, prompt, target)


def _stays_inside(path: str) -> bool:
    parts = PurePosixPath(path).parts
    return not path.startswith("/") and ".." not in parts and "\\" not in path and path.endswith(".jsonl")

"""What an evaluation says about one adapter (or the bare base) on one suite, task by task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class TaskResult:
    """Metrics of one task. `primary` names the metric that retention is computed from.

    `samples` holds, in the task's order, what paired statistics need per item: one mapping of numbers an item.
    """

    task: str
    primary: str
    direction: Literal["higher", "lower"]
    metrics: Mapping[str, float]
    samples: tuple[Mapping[str, float], ...]


@dataclass(frozen=True, slots=True)
class EvalReport:
    """One run of one suite. `subject` is a content digest, or `base` for the base without an adapter.

    `key` is the cache key: a digest over subject, base, tokenizer, suite, data, limits and engine versions.
    """

    key: str
    subject: str
    base_id: str
    suite: str
    suite_digest: str
    limit: int | None
    engine: Mapping[str, str]
    tasks: tuple[TaskResult, ...]
    seconds: float
    outputs: tuple[Mapping[str, Any], ...] = ()

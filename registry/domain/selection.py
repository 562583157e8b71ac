"""Which versions a list has: by base, tags, stage, dataset, and conditions on metrics such as `bleu>0.3`."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from .errors import InvalidInput

#: Of two numbers, or of two columns of numbers.
COMPARE: Mapping[str, Callable[[Any, Any], Any]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "!=": operator.ne,
    "<": operator.lt,
    ">": operator.gt,
    "=": operator.eq,
}
_CONDITION = re.compile(r"\s*([\w./-]{1,250}?)\s*(<=|>=|!=|<|>|=)\s*([-+.\deE]{1,32})\s*", re.ASCII)


@dataclass(frozen=True, slots=True)
class Condition:
    """A bound on one metric; a version without that metric does not meet it."""

    metric: str
    comparison: str
    bound: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """All that is given holds of a version. `base` is a base's name or id; `ids` are those of versions."""

    base: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    stage: str | None = None
    dataset: str | None = None
    metrics: tuple[Condition, ...] = ()
    ids: Collection[str] | None = None


EVERY = Selection()


def parse_condition(text: str) -> Condition:
    """Read `NAME OP NUMBER`. Raises `InvalidInput`."""
    match = _CONDITION.fullmatch(text)
    try:
        return Condition(match[1], match[2], float(match[3])) if match else _not_a_condition(text)
    except ValueError:
        return _not_a_condition(text)


def _not_a_condition(text: str) -> Condition:
    raise InvalidInput(f"{text!r} is not a condition on a metric", hint="write NAME>NUMBER, for example 'bleu>0.3'")

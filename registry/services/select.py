"""Which versions `ls` shows: filters by base, tag, stage and metric conditions such as `bleu>0.3`."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..api import VersionView
from ..domain.errors import InvalidInput

_COMPARE: Mapping[str, Callable[[float, float], bool]] = {
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

    def holds(self, metrics: Mapping[str, float]) -> bool:
        return self.metric in metrics and _COMPARE[self.comparison](metrics[self.metric], self.bound)


def parse_condition(text: str) -> Condition:
    """Read `NAME OP NUMBER`. Raises `InvalidInput`."""
    match = _CONDITION.fullmatch(text)
    try:
        return Condition(match[1], match[2], float(match[3])) if match else _not_a_condition(text)
    except ValueError:
        return _not_a_condition(text)


def select(
    views: Sequence[VersionView],
    *,
    base: str | None = None,
    tag: Mapping[str, str] | None = None,
    stage: str | None = None,
    metric: Sequence[str] = (),
) -> list[VersionView]:
    """The views that meet every filter, in their order; `base` is a base's name or id."""
    conditions = [parse_condition(text) for text in metric]
    return [
        view
        for view in views
        if (base is None or base in (view.base, view.base_id))
        and (stage is None or stage in view.stages)
        and all(view.tags.get(key) == value for key, value in (tag or {}).items())
        and all(condition.holds(view.metrics) for condition in conditions)
    ]


def _not_a_condition(text: str) -> Condition:
    raise InvalidInput(f"{text!r} is not a condition on a metric", hint="write NAME>NUMBER, for example 'bleu>0.3'")

"""Which versions `ls` shows: filters by base, tag, stage, dataset, ancestry, and conditions such as `bleu>0.3`."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from ..api import VersionView
from ..domain.errors import InvalidInput
from ..domain.refs import Ref, check_name
from ..domain.version import AdapterVersion
from ..ports import Ledger
from .resolve import known_adapter, resolve

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


def candidates(
    ledger: Ledger,
    name: str | None,
    *,
    removed: bool = False,
    stage: str | None = None,
    trained_on: str | None = None,
    descends_from: Ref | None = None,
) -> list[AdapterVersion]:
    """The versions that need a closer look, by name and number: what an index knows is settled here.

    Descent follows the edges of merges and of training on; a version does not descend from itself.
    """
    if name is not None:
        known_adapter(ledger, check_name(name))
    wanted: set[str] | None = None
    if stage is not None:
        wanted = {held for stages in ledger.stages().values() for key, held in stages.items() if key == stage}
    if descends_from is not None:
        root = resolve(ledger, descends_from, removed=True).id
        wanted = _both(wanted, ledger.descendants([root]).keys() - {root})
    if trained_on is not None:
        wanted = _both(wanted, ledger.descendants(ledger.trained_on(trained_on)).keys())
    if wanted is None:
        return ledger.versions(name, include_removed=removed)
    found = ledger.versions_by_id(sorted(wanted)).values()
    kept = [each for each in found if name in (None, each.name) and (removed or each.state == "live")]
    return sorted(kept, key=lambda each: (each.name, each.number))


def _both(first: set[str] | None, second: AbstractSet[str]) -> set[str]:
    return set(second) if first is None else first & second


def select(
    views: Sequence[VersionView],
    *,
    base: str | None = None,
    tag: Mapping[str, str] | None = None,
    stage: str | None = None,
    metric: Sequence[str] = (),
    dataset: str | None = None,
) -> list[VersionView]:
    """The views that meet every filter, in their order; `base` is a base's name or id."""
    conditions = [parse_condition(text) for text in metric]
    return [
        view
        for view in views
        if (base is None or base in (view.base, view.base_id))
        and (stage is None or stage in view.stages)
        and (dataset is None or dataset == view.dataset)
        and all(view.tags.get(key) == value for key, value in (tag or {}).items())
        and all(condition.holds(view.metrics) for condition in conditions)
    ]


def _not_a_condition(text: str) -> Condition:
    raise InvalidInput(f"{text!r} is not a condition on a metric", hint="write NAME>NUMBER, for example 'bleu>0.3'")

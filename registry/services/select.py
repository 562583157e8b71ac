"""Which versions `ls` shows: what has to be looked up before the ledger is asked for a list."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet

from ..domain.refs import Ref, check_name
from ..domain.selection import Selection, parse_condition
from ..domain.version import AdapterVersion
from ..ports import Ledger
from .resolve import known_adapter, resolve


def select(
    ledger: Ledger,
    name: str | None,
    *,
    base: str | None = None,
    tag: Mapping[str, str] | None = None,
    stage: str | None = None,
    metric: Sequence[str] = (),
    removed: bool = False,
    dataset: str | None = None,
    trained_on: str | None = None,
    descends_from: Ref | None = None,
    after: tuple[str, int] | None = None,
    limit: int | None = None,
) -> list[AdapterVersion]:
    """The versions that meet every filter, by name and number; the first `limit` of those `after` a name and number.

    Descent follows the edges of merges and of training on; a version does not descend from itself.
    """
    if name is not None:
        known_adapter(ledger, check_name(name))
    conditions = tuple(parse_condition(text) for text in metric)
    wanted: AbstractSet[str] | None = None
    if descends_from is not None:
        root = resolve(ledger, descends_from, removed=True).id
        wanted = ledger.descendants([root]).keys() - {root}
    if trained_on is not None:
        made_of = ledger.descendants(ledger.trained_on(trained_on)).keys()
        wanted = made_of if wanted is None else wanted & made_of
    only = Selection(base=base, tags=tag or {}, stage=stage, dataset=dataset, metrics=conditions, ids=wanted)
    return ledger.versions(name, include_removed=removed, only=only, after=after, limit=limit)

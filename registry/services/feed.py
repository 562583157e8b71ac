"""What happened in a registry, page by page or as it goes on."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..api import EventsView, EventView
from ..domain.errors import InvalidInput
from ..domain.event import Event, EventKind, read_kinds
from ..domain.refs import check_name, is_glob, parse_ref
from ..ports import Ledger
from .promote import check_stage_name
from .resolve import known_adapter
from .views import iso_time

#: Between two looks of one who listens; a look at which nothing is new reads one row.
PAUSE_S = 0.5
#: Events that are read at once by one who listens.
PAGE = 1000


@dataclass(frozen=True, slots=True)
class Filter:
    """Which events are asked for. `names` is a glob, or the `name` of one adapter."""

    names: str | None = None
    name: str | None = None
    kinds: tuple[EventKind, ...] = ()
    stage: str | None = None


def check_filter(ledger: Ledger, asked: Filter, stages: Sequence[str]) -> Filter:
    """Return it; raise `InvalidInput` for a stage that the settings do not name and no event does."""
    if asked.stage is not None and asked.stage not in stages:
        told, _ = ledger.feed(0, limit=1, stage=asked.stage) if asked.stage.isprintable() else ((), 0)
        check_stage_name(asked.stage, stages, kept=[event.stage for event in told])
    return asked


def read_filter(name: str | None, kind: Sequence[str], stage: str | None) -> Filter:
    """Raises `InvalidInput` for a kind that is none, and for a name that no adapter can have."""
    exact = check_name(name) if name is not None and not is_glob(name) else None
    return Filter(names=name, name=exact, kinds=read_kinds(kind), stage=stage)


def events(ledger: Ledger, after: int | None, asked: Filter, *, limit: int) -> EventsView:
    """The first events after that one; see `RegistryAPI.events`."""
    if limit < 1 or (after is not None and after < 0):
        raise InvalidInput(f"{limit} events after event {after} cannot be told", hint="events count from 1")
    if asked.name is not None and ledger.adapter_id(asked.name) is None:
        known_adapter(ledger, asked.name)
    found, last = ledger.feed(after, limit=limit + 1, kinds=asked.kinds, stage=asked.stage, names=asked.names)
    more = len(found) > limit
    shown = tuple(map(_view, found[:limit]))
    return EventsView(events=shown, cursor=shown[-1].id if more else last, more=more)


def listen(ledger: Ledger, after: int | None, asked: Filter) -> Iterator[tuple[int, EventView | None]]:
    """Each event after that one with its id, for ever; after each look the id up to which was looked, and None."""
    while True:
        page = events(ledger, after, asked, limit=PAGE)
        for event in page.events:
            yield event.id, event
        after = page.cursor
        yield after, None
        if not page.more:
            time.sleep(PAUSE_S)


def _view(event: Event) -> EventView:
    return EventView(
        id=event.id,
        at=iso_time(event.at),
        kind=event.kind,
        name=event.name,
        ref=event.ref,
        stage=event.stage,
        previous=event.previous,
        actor=event.actor,
        reason=event.reason,
        evidence=event.evidence,
        link=_link(event),
    )


def _link(event: Event) -> str:
    if event.ref is not None:
        ref = parse_ref(event.ref)
        return f"/adapters/{ref.name}/v{ref.number}"
    return f"/adapters/{event.name}" if event.name is not None else "/v1/gates"

"""What happened in a registry, printed: as it is now, or going on as things happen."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import typer

from ..registry.domain.errors import InvalidInput
from . import views
from .connect import Session
from .output import INTERRUPTED

if TYPE_CHECKING:
    from ..registry.api import EventView, RegistryAPI

_PAGE = 1000


def show_events(session: Session, after: str | None, follow: bool, **asked: Any) -> None:
    """Print the events after `after` (an id, or `now`); with `follow` one a line, and go on until Ctrl-C.

    Raises `InvalidInput` for an `after` that is neither.
    """
    start = _read_after(after)
    registry = session.registry(readonly=True)
    if not follow:
        found = list(_all(registry, start, asked))
        session.out.data(
            found, text=lambda: views.events_table(found, session.out), names=[str(event.id) for event in found]
        )
        return
    try:
        for event in registry.follow_events(after=start, tell=session.out.warn, **asked):
            session.out.line(event, text=views.feed_text(event), name=str(event.id))
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None


def _read_after(text: str | None) -> int | None:
    """The event of `--after`; None for the last one that there is."""
    if text == "now":
        return None
    if text is not None and not (text.isascii() and text.isdigit() and len(text) < 10):
        raise InvalidInput(f"{text[:80]!r} is no event", hint="its number, as `adapterctl history` shows it, or now")
    return int(text or 0)


def _all(registry: RegistryAPI, after: int | None, asked: dict[str, Any]) -> Iterator[EventView]:
    more = True
    while more:
        page = registry.events(after=after, limit=_PAGE, **asked)
        yield from page.events
        after, more = page.cursor, page.more

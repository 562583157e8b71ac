"""Server-sent events: a job with its history, its state whenever that changes, its end; and what happens in a registry.

A stream ends without a word where the server stops, or nothing can be read any more: whoever listens comes back with
the last id that it has seen, and is told then. https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from threading import Event

from starlette.concurrency import run_in_threadpool
from starlette.responses import StreamingResponse

from .. import wire
from ..api import EventsView, ServedRegistry
from ..domain.errors import AdapterctlError
from ..domain.job import Job, JobEvent

_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 0.02, 0.5
#: Between two signs of life on an idle stream; proxies cut what is silent.
PING_S = 10.0
#: A job that shows no life for so long lost its worker, or its ring.
SILENCE_S = 15.0
#: A stream without an end is ended after so long, and its caller is looked up again when it comes back.
LIFE_S = 300.0


def stream(messages: AsyncIterator[bytes]) -> StreamingResponse:
    """The answer that sends messages as they come, past proxies that would collect or keep them."""
    headers = {"x-accel-buffering": "no", "cache-control": "no-store"}
    return StreamingResponse(messages, media_type="text/event-stream", headers=headers)


async def registry_events(look: Callable[[int], EventsView], after: int, leaving: Event) -> AsyncIterator[bytes]:
    """Every event after that one as a message `event` with its id; in between the id up to which there is nothing."""
    began = said = time.monotonic()
    yield _nothing_up_to(after)
    while not leaving.is_set() and time.monotonic() - began < LIFE_S:
        try:
            page = await run_in_threadpool(look, after)
        except AdapterctlError:
            return
        for event in page.events:
            yield _message("event", wire.to_json(event), str(event.id))
        after = page.cursor
        if page.events:
            said = time.monotonic()
        elif time.monotonic() - said >= PING_S:
            yield _nothing_up_to(after)
            said = time.monotonic()
        if not page.more:
            await asyncio.sleep(_LONGEST_PAUSE_S)


async def job_events(registry: ServedRegistry, job_id: str, after: int, leaving: Event) -> AsyncIterator[bytes]:
    """Bytes of the stream, from the event after `after` to the end of the job."""
    seen: Job | None = None
    said = changed = time.monotonic()
    pause_s = _SHORTEST_PAUSE_S
    while not leaving.is_set():
        job, events = await run_in_threadpool(_look, registry, job_id, after)
        now = time.monotonic()
        for event in events:
            yield _message("event", wire.to_json(event), str(event.seq))
            after = event.seq
        if job != seen:
            yield _message("job", wire.to_json(job))
            seen, said, changed, pause_s = job, now, now, _SHORTEST_PAUSE_S
        if job.ended:
            yield _message("end", "{}")
            return
        if now - said >= PING_S:
            yield b": still here\n\n"
            said = now
        if now - changed >= SILENCE_S:
            await run_in_threadpool(registry.wake, job_id)
            changed = now
        await asyncio.sleep(pause_s)
        pause_s = min(pause_s * 1.5, _LONGEST_PAUSE_S)


def _look(registry: ServedRegistry, job_id: str, after: int) -> tuple[Job, list[JobEvent]]:
    # the job first: events that come meanwhile are told too early rather than not at all
    job = registry.job(job_id)
    return job, registry.job_events(job_id, after)


def _nothing_up_to(event_id: int) -> bytes:
    """A comment, for proxies, and an id alone: it is kept for the next visit, and no message comes of it."""
    return f": still here\nid: {event_id}\n\n".encode()


def _message(kind: str, data: str, event_id: str = "") -> bytes:
    head = f"id: {event_id}\n" if event_id else ""
    return f"{head}event: {kind}\ndata: {data}\n\n".encode()

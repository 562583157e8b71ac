"""Server-sent events: a job with its history, its state whenever that changes, its end; and what happens in a registry.

A stream ends without a word where the server stops, the token does, or nothing can be read any more: whoever listens
comes back with the last id that it has seen, and is told then.
https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from threading import Event

from starlette.concurrency import run_in_threadpool
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from .. import wire
from ..api import EventsView, ServedRegistry
from ..domain.errors import AdapterctlError, TooManyRequests
from ..domain.job import Job, JobEvent

_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 0.02, 0.5
#: Between two signs of life on an idle stream; proxies cut what is silent.
PING_S = 10.0
#: A job that shows no life for so long lost its worker, or its ring.
SILENCE_S = 15.0
#: A stream without an end is ended after so long; whoever listens comes back.
LIFE_S = 300.0
#: When to come back where too many are open.
WAIT_S = 5.0


class Streams:
    """How many streams are open, by token: each costs a look at the ledger every half second. For one event loop."""

    def __init__(self, *, in_all: int, per_token: int) -> None:
        self._in_all, self._per_token = in_all, per_token
        self._open: Counter[str] = Counter()

    @contextmanager
    def one_more(self, token_id: str) -> Iterator[None]:
        """Count one while it is open. Raises `TooManyRequests`."""
        own, all_ = self._open[token_id], self._open.total()
        if own >= self._per_token or all_ >= self._in_all:
            whose = f"of this token: {own}" if own >= self._per_token else f"in all: {all_}"
            raise TooManyRequests(
                f"too many streams of events are open {whose}",
                hint="close some, or ask for JSON now and then: without Accept: text/event-stream",
                wait_s=WAIT_S,
            )
        self._open[token_id] += 1
        try:
            yield
        finally:
            self._open[token_id] -= 1
            self._open += Counter()  # forget the tokens that have none


class Stream(StreamingResponse):
    """The answer that sends messages as they come, past proxies that would collect or keep them."""

    def __init__(
        self,
        messages: AsyncIterator[bytes],
        streams: Streams,
        token_id: str,
        still_valid: Callable[[], Awaitable[bool]],
    ) -> None:
        headers = {"x-accel-buffering": "no", "cache-control": "no-store"}
        super().__init__(_while_valid(messages, still_valid), media_type="text/event-stream", headers=headers)
        self._streams, self._token_id = streams, token_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # counted here, for a client that is gone by now has its messages never begun, and so never ended
        with self._streams.one_more(self._token_id):
            await super().__call__(scope, receive, send)


async def _while_valid(
    messages: AsyncIterator[bytes], still_valid: Callable[[], Awaitable[bool]]
) -> AsyncIterator[bytes]:
    """Up to the first message for a token that was revoked, or has ended, meanwhile."""
    async for message in messages:
        if not await still_valid():
            return
        yield message


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

"""A job as server-sent events: its history, its state whenever that changes, its end.

https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

from starlette.concurrency import run_in_threadpool

from .. import wire
from ..api import ServedRegistry
from ..domain.job import Job, JobEvent

_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 0.02, 0.5
#: Between two signs of life on an idle stream; proxies cut what is silent.
PING_S = 10.0
#: A job that shows no life for so long lost its worker, or its ring.
SILENCE_S = 15.0


async def job_events(registry: ServedRegistry, job_id: str, after: int) -> AsyncIterator[bytes]:
    """Bytes of the stream, from the event after `after` to the end of the job."""
    seen: Job | None = None
    said = changed = time.monotonic()
    pause_s = _SHORTEST_PAUSE_S
    while True:
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


def _message(kind: str, data: str, event_id: str = "") -> bytes:
    head = f"id: {event_id}\n" if event_id else ""
    return f"{head}event: {kind}\ndata: {data}\n\n".encode()

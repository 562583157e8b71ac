"""A wait for a job outlasts its database, or its server, being started again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from .domain.errors import Unavailable
from .domain.job import Job

#: A database or a server that is started again is back within this time.
PATIENCE_S, _PAUSE_S = 120.0, 1.0


def patiently(
    follow: Callable[[float | None], Iterator[Job]],
    *,
    timeout_s: float | None,
    known: bool,
    tell: Callable[[str], None] | None,
) -> Iterator[Job]:
    """The job whenever it changes; `follow(seconds that are left)` is taken up again where it ends in `Unavailable`.

    Args:
        known: whether those who are asked have answered before: an address that is wrong deserves no patience.
        tell: called once for each outage, with what is to be said of it.

    Raises that error after `PATIENCE_S` without an answer, or after `timeout_s`.
    """
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    left, gone_since, seen = timeout_s, None, None
    while True:
        try:
            for job in follow(left):
                gone_since = None
                if job != seen:
                    seen = job
                    yield job
            return
        except Unavailable as error:
            now = time.monotonic()
            if not (known or seen) or (gone_since and now - gone_since >= PATIENCE_S) or (deadline and now >= deadline):
                raise
            if gone_since is None:
                gone_since = now
                if tell is not None:
                    tell(f"{error.message}; the job goes on, asking again for {PATIENCE_S:g} s")
        time.sleep(_PAUSE_S)
        left = None if deadline is None else max(0.0, deadline - time.monotonic())

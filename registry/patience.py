"""A wait for a job, or for what happens, outlasts its database, or its server, being started again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from .domain.errors import Unavailable, WaitTimedOut
from .domain.job import Job

T = TypeVar("T")
Tell = Callable[[str], None]

#: A database or a server that is started again is back within this time.
PATIENCE_S, _PAUSE_S = 120.0, 1.0


class Patience:
    """With those who do not answer, for `PATIENCE_S` from their first silence; each silence is told once."""

    def __init__(self, tell: Tell | None, comfort: str) -> None:
        self._tell, self._comfort = tell, comfort
        self._gone_since: float | None = None

    def answered(self) -> None:
        self._gone_since = None

    def wait(self, error: Unavailable) -> None:
        """Wait a little. Raises the error where it has been long enough."""
        now = time.monotonic()
        if self._gone_since is None:
            self._gone_since = now
            if self._tell is not None:
                self._tell(f"{error.message}; {self._comfort}, asking again for {PATIENCE_S:g} s")
        elif now - self._gone_since >= PATIENCE_S:
            raise error
        time.sleep(_PAUSE_S)


def patiently(
    follow: Callable[[float | None], Iterator[Job]], *, timeout_s: float | None, known: bool, tell: Tell | None
) -> Iterator[Job]:
    """The job whenever it changes; `follow(seconds that are left)` is taken up again where it ends in `Unavailable`.

    Args:
        known: whether those who are asked have answered before: an address that is wrong deserves no patience.
        tell: called once for each outage, with what is to be said of it.

    Raises that error after `PATIENCE_S` without an answer, or after `timeout_s`; `WaitTimedOut` where it was answered.
    """
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    left, seen, patience = timeout_s, None, Patience(tell, "the job goes on")
    while True:
        try:
            for job in follow(left):
                patience.answered()
                if job != seen:
                    seen = job
                    yield job
            return
        except WaitTimedOut as error:
            if seen is None or timeout_s is None:
                raise
            raise timed_out(seen, timeout_s) from error  # it speaks of the seconds that were left
        except Unavailable as error:
            if not (known or seen) or (deadline and time.monotonic() >= deadline):
                raise
            patience.wait(error)
        left = None if deadline is None else max(0.0, deadline - time.monotonic())


def timed_out(job: Job, timeout_s: float) -> WaitTimedOut:
    """The error of a wait that took as long as it may."""
    return WaitTimedOut(
        f"job {job.id} is {job.state} after {timeout_s:g} s", hint=f"it goes on: adapterctl jobs wait {job.id}"
    )


def listen_patiently(
    listen: Callable[[int | None], Iterator[tuple[int, T | None]]], after: int | None, *, known: bool, tell: Tell | None
) -> Iterator[T]:
    """What is heard after a place; `listen(place)` is taken up where it ended in `Unavailable`, as in `patiently`.

    It yields each place that it comes to, with what it heard there, or None: then it was answered, and that is all.
    """
    patience = Patience(tell, "nothing will be missed")
    while True:
        try:
            for place, heard in listen(after):
                known, after = True, place
                patience.answered()
                if heard is not None:
                    yield heard
        except Unavailable as error:
            if not known:
                raise
            patience.wait(error)

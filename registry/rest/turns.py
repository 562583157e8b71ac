"""Whose turn it is to have the server itself compute: plans and comparisons, which read tensors while a caller waits.

Few at once, so that the threads and cores that all other requests need stay free; a few more wait without a thread; who
comes after them is told to come back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from starlette.concurrency import run_in_threadpool

from ..domain.errors import Unavailable

T = TypeVar("T")

AT_ONCE = 2
WAITING = 8


class Turns:
    """One for a server; belongs to its event loop."""

    def __init__(self) -> None:
        self._free = asyncio.Semaphore(AT_ONCE)
        self._here = 0

    async def take(self, work: Callable[[], T]) -> T:
        """What `work` gives, in a thread, once it is its turn. Raises `Unavailable` where too many wait."""
        if self._here >= AT_ONCE + WAITING:
            raise Unavailable(f"{self._here} plans and comparisons are under way", hint="ask again in a moment")
        self._here += 1
        try:
            async with self._free:
                return await run_in_threadpool(work)
        finally:
            self._here -= 1

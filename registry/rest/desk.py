"""Where merges are asked for: one thread works for all who wait, in one transaction.

Who comes first is served at once. Who comes while the thread is at work waits for its return, and goes with all others
who wait then. So a commit, which takes longer than all else, is shared by as many as there are, and nobody waits for
more to come. Each gets an answer of its own after the commit, and what is wrong with one request spoils no other.
Workers are woken last: a ring that is lost delays a job, and a broker that is slow keeps nobody waiting.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.concurrency import run_in_threadpool

from ..api import ServedRegistry, Submitted
from ..domain.errors import AdapterctlError, Unavailable
from ..domain.recipe import MergeRequest

#: Who goes together at most: the first is answered no earlier than the last.
MOST = 64
#: After this time another thread begins with those who wait. The first one may wait for a lock that they do not need,
#: or for a database that is far away.
PATIENCE_S = 0.01

_log = logging.getLogger("adapterctl.rest")


@dataclass(frozen=True, slots=True)
class _Caller:
    asks: tuple[str, MergeRequest]
    answer: asyncio.Future[Submitted]


class Desk:
    """One for a server. Its methods belong to the event loop, but for those that say otherwise."""

    def __init__(self, registry: ServedRegistry) -> None:
        self._registry = registry
        self._waiting: list[_Caller] = []
        self._at_work: set[asyncio.Task[None]] = set()  # the loop itself keeps no task alive
        self._is_open = False

    async def merge(self, actor: str, request: MergeRequest) -> Submitted:
        """As `RegistryAPI.merge`, for a request that names no stage."""
        caller = _Caller((actor, request), asyncio.get_running_loop().create_future())
        self._waiting.append(caller)
        if not self._is_open:
            self._is_open = True
            self._start(self._work_off())
        return await caller.answer

    async def _work_off(self) -> None:
        while self._waiting:
            together, self._waiting = self._waiting[:MOST], self._waiting[MOST:]
            await asyncio.wait(
                [self._start(run_in_threadpool(self._serve, together, asyncio.get_running_loop()))], timeout=PATIENCE_S
            )
        self._is_open = False

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._at_work.add(task)
        task.add_done_callback(self._at_work.discard)
        return task

    def _serve(self, together: Sequence[_Caller], loop: asyncio.AbstractEventLoop) -> None:
        """In a thread."""
        answers = self._ask([each.asks for each in together])
        try:
            loop.call_soon_threadsafe(_hand_out, together, answers)
        finally:  # also where the server has ended: what is committed is to be worked on
            for answer in answers:
                if isinstance(answer, Submitted) and answer.job is not None:
                    self._ring(answer.job.id)

    def _ask(self, together: Sequence[tuple[str, MergeRequest]]) -> list[Submitted | Exception]:
        """In a thread. Where they do not succeed together each is tried alone, as long as the ledger answers."""
        try:
            return list(self._registry.merge_all(together))
        except Exception as error:  # noqa: BLE001 - whatever it is, the one who asked for it is told
            if len(together) == 1:
                return [error]
        answers: list[Submitted | Exception] = []
        for each in together:
            away = bool(answers) and isinstance(answers[-1], Unavailable)
            answers += answers[-1:] if away else self._ask([each])
        return answers

    def _ring(self, job_id: str) -> None:
        try:
            self._registry.ring(job_id)
        except (AdapterctlError, OSError) as error:  # it is queued and answered
            _log.warning("nobody was told of job %s, who follows it will ring: %s", job_id, error)


def _hand_out(together: Sequence[_Caller], answers: Sequence[Submitted | Exception]) -> None:
    for each, answer in zip(together, answers, strict=True):
        if each.answer.done():  # it was given up
            continue
        if isinstance(answer, Exception):
            each.answer.set_exception(answer)
        else:
            each.answer.set_result(answer)

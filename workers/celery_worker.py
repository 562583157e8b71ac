"""`adapterctl worker`: a Celery worker whose one pool process supervises children, job by job, until none is queued.

Two processes. This one takes messages from the broker, tells the ledger every two seconds that it is there, and looks
after the queue (`services/fleet.py`); it loads neither MLflow nor anything that computes. The pool process is forked
from it, opens the registry once, and on each message runs the supervisor. What the message says is of no interest: the
oldest job in our queues is claimed, so a lost message is made up for by the next.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from types import FrameType
from typing import TYPE_CHECKING, Any

import uuid6
from celery import signals
from celery.worker import state

from ..bootstrap import connect, job_handlers, log_to_stderr, warm_up
from ..registry.domain.errors import AdapterctlError, Misconfigured
from ..registry.domain.worker import BEAT_S, QUEUES, Queue
from ..registry.services.evaluate import device_of
from ..registry.services.fleet import tend
from ..registry.settings import Settings, load_settings
from ..registry.stores.celery_bell import WORK, celery_app
from .supervisor import Supervisor

if TYPE_CHECKING:
    from ..registry.services.local import LocalRegistry

_log = logging.getLogger("adapterctl.worker")


@dataclass(frozen=True, slots=True)
class Me:
    """This worker, as both of its processes know it."""

    id: str
    pid: int
    name: str
    queues: Sequence[Queue]
    device: str
    settings: Settings


def main(arguments: Sequence[str] | None = None) -> int:
    me = introduce(arguments)
    log_to_stderr("adapterctl", "celery", "kombu")
    registry = connect(me.settings)
    _add(registry, me)
    registry.ledger.close()  # connections are not for two processes: the pool process is forked with none open
    presence = Presence(registry, me)
    app = celery_app(str(me.settings.broker_url))
    pool = PoolProcess(me)
    app.task(pool.work, name=WORK, ignore_result=True)
    signals.setup_logging.connect(_keep_logging, weak=False)
    signals.worker_process_init.connect(pool.begin, weak=False)
    signals.worker_ready.connect(presence.begin, weak=False)
    signals.worker_shutting_down.connect(presence.drain, weak=False)
    worker = app.Worker(
        hostname=f"{me.name}@{socket.gethostname()}",
        queues=list(me.queues),
        pool="prefork",
        concurrency=1,
        quiet=True,
        without_gossip=True,
        without_mingle=True,
        without_heartbeat=True,
    )
    worker.start()
    presence.leave()
    return int(worker.exitcode or 0)


def introduce(arguments: Sequence[str] | None = None) -> Me:
    """Who this worker is. Raises `Misconfigured` where the registry is not a shared one."""
    parser = argparse.ArgumentParser(prog="adapterctl worker")
    parser.add_argument("--queues", default="cpu")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--name")
    given = parser.parse_args(arguments)
    settings = replace(load_settings(), eval_device=given.device)
    if not settings.database_url or not settings.broker_url:
        raise Misconfigured(
            "a worker needs the shared ledger and the broker",
            hint="set ADAPTERCTL_DATABASE_URL and ADAPTERCTL_BROKER_URL",
        )
    queues = tuple(queue for queue in QUEUES if queue in given.queues.split(","))
    name = given.name or f"{socket.gethostname()}-{os.getpid()}"
    return Me(str(uuid6.uuid7()), os.getpid(), name, queues, device_of(settings), settings)


class PoolProcess:
    """What happens in the process that is forked to do the work."""

    def __init__(self, me: Me) -> None:
        self._me = me
        self._registry: LocalRegistry | None = None
        self._supervisor: Supervisor | None = None

    def begin(self, **_: Any) -> None:
        """Called by Celery in the new process; before the first message, so that it finds everything ready."""
        signal.signal(signal.SIGTERM, self._on_term)
        try:
            self._open()
        except AdapterctlError as error:  # the ledger is away; the first message tries again
            _log.warning("%s", error.message)

    def work(self, *_: Any, **__: Any) -> None:
        """The task. Its arguments are taken from whoever can reach the broker, so none of them is looked at."""
        try:
            registry = self._open()
            self._supervisor = Supervisor(
                registry.ledger,
                job_handlers(registry),
                self._me.settings,
                queues=self._me.queues,
                dismissed=lambda: self._dismissed(registry),
                prepare=warm_up,
            )
            self._supervisor.work_off()
        except AdapterctlError as error:  # the ledger is away: the job waits there until a worker rings again
            _log.warning("%s", error.message)
        finally:
            self._supervisor = None

    def _open(self) -> LocalRegistry:
        if self._registry is None:
            self._registry = connect(self._me.settings)
        return self._registry

    def _dismissed(self, registry: LocalRegistry) -> bool:
        """Whether the main process is gone, or told the ledger that it takes no more jobs."""
        if os.getppid() != self._me.pid:
            return True
        with suppress(AdapterctlError):
            return any(worker.draining for worker in registry.ledger.workers() if worker.id == self._me.id)
        return False

    def _on_term(self, number: int, frame: FrameType | None) -> None:
        """Give the job back; leave at once where there is none."""
        if self._supervisor is None:
            raise SystemExit(0)
        self._supervisor.stop()


class Presence(threading.Thread):
    """Tells the ledger that the worker is there, or that it is leaving, and looks after the queue between."""

    def __init__(self, registry: LocalRegistry, me: Me) -> None:
        super().__init__(daemon=True)
        self._registry = registry
        self._me = me
        self._draining = False
        self._hurry = threading.Event()
        self._over = False

    def begin(self, **_: Any) -> None:
        self.start()

    def drain(self, **_: Any) -> None:
        """Called by Celery inside its signal handler: sets flags, and nothing else."""
        self._draining = True
        self._hurry.set()

    def leave(self) -> None:
        """The worker stopped its work: nobody waits for it any more."""
        self._over = True
        self._hurry.set()
        self.join(BEAT_S)
        with suppress(AdapterctlError):
            self._registry.ledger.remove_worker(self._me.id)

    def run(self) -> None:
        while not self._over:
            try:
                self._beat()
            except AdapterctlError as error:  # the ledger is away; the next beat may find it again
                _log.warning("%s", error.message)
            if self._hurry.wait(BEAT_S) and not self._over:
                self._hurry.clear()

    def _beat(self) -> None:
        ledger = self._registry.ledger
        if not ledger.see_worker(self._me.id, draining=self._draining):
            _add(self._registry, self._me)
        idle = not self._draining and not state.active_requests and not state.reserved_requests
        tend(ledger, self._registry.bell, self._me.settings, queues=self._me.queues, idle=idle)


def _add(registry: LocalRegistry, me: Me) -> None:
    registry.ledger.add_worker(me.id, name=me.name, host=socket.gethostname(), queues=me.queues, device=me.device)


def _keep_logging(**_: Any) -> None:
    """Celery leaves logging alone where someone listens to this signal."""


if __name__ == "__main__":
    try:
        sys.exit(main())
    except AdapterctlError as error:
        sys.stderr.write(f"error: {error.message}\nhint: {error.hint}\n")
        sys.exit(2)

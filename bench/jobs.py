"""What a job costs beside its work: the wait for an idle worker, what one job takes beyond its child, and what a worker
costs that has nothing to do.

The worker is the embedded supervisor, a process of its own as `adapterctl merge` starts it. A child is seen in the
list of its parent's children, the start of its work by the first file that it writes (Linux).
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from measure import Figure, bench
from service import two_adapters
from sqlalchemy import Pool, event

from adapterctl.bootstrap import job_handlers
from adapterctl.registry.api import RegistryAPI
from adapterctl.registry.domain.job import JobState
from adapterctl.registry.domain.recipe import MergeRequest
from adapterctl.registry.domain.refs import parse_parent
from adapterctl.registry.services.local import LocalRegistry
from adapterctl.registry.stores.spawn_bell import SUPERVISOR, only_one
from adapterctl.workers.supervisor import Supervisor

JOBS, IDLE_S, LOOK_S = 40, 10.0, 0.002


@dataclass(frozen=True)
class Job:
    """When a merge came so far, in seconds since it was submitted; `work` is the first file that its child wrote."""

    child: float
    work: float
    child_ended: float
    ended: float

    @property
    def overhead(self) -> float:
        return self.ended - (self.child_ended - self.child)


@bench(
    "start_p99_ms",
    "99th percentile from the submit of a merge to the start of its child's work, by an idle worker",
    unit=" ms",
    at_most=300,
)
def start_p99_ms(room: Path) -> Figure:
    jobs = _jobs()
    waits = sorted(job.work for job in jobs)
    child = statistics.median(job.child for job in jobs)
    return Figure(
        waits[int(len(waits) * 0.99)] * 1000,
        f"{len(jobs)} merges, median {statistics.median(waits) * 1000:.0f} ms; the child is started after "
        f"{child * 1000:.0f} ms",
    )


@bench("job_overhead_s", "submit of a merge to its registered version, less its child", unit=" s", at_most=1)
def job_overhead_s(room: Path) -> Figure:
    jobs = _jobs()
    whole = statistics.median(job.ended for job in jobs)
    child = statistics.median(job.child_ended - job.child for job in jobs)
    return Figure(statistics.median(job.overhead for job in jobs), f"{whole:.2f} s, of them {child:.2f} s the child")


@bench("idle_worker_cpu", "CPU of a worker that has nothing to do, in hundredths of a core", unit=" %", at_most=2)
def idle_worker_cpu(room: Path) -> Figure:
    registry = two_adapters(room)
    settings = replace(registry.settings, idle_s=IDLE_S)
    worker = Supervisor(registry.ledger, job_handlers(registry), settings)
    transactions = itertools.count()

    def count(*_: object) -> None:
        next(transactions)

    event.listen(Pool, "checkout", count)
    begun, cpu = time.perf_counter(), time.thread_time()
    worker.drain()
    seconds, cpu = time.perf_counter() - begun, time.thread_time() - cpu
    event.remove(Pool, "checkout", count)
    return Figure(100 * cpu / seconds, f"{next(transactions) / seconds:.0f} transactions a second on its database")


@cache
def _jobs() -> list[Job]:
    """Merges one after another, each submitted at a moment that the worker cannot know; measured once for all."""
    chance = random.Random(1)
    with TemporaryDirectory() as folder:
        registry = two_adapters(Path(folder))
        with _worker(Path(folder)) as pid:
            _merge(registry, 0, pid)  # not measured: it imports MLflow
            jobs = []
            for number in range(1, JOBS + 1):
                time.sleep(0.1 + 0.1 * chance.random())
                jobs.append(_merge(registry, number, pid))
    return jobs


def _merge(registry: LocalRegistry, number: int, worker: int) -> Job:
    children, staging = Path(f"/proc/{worker}/task/{worker}/children"), registry.settings.home / "staging"
    request = MergeRequest((parse_parent(f"translate:v1={1 + number / 1e6}"), parse_parent("chat:v1")), into="timed")
    begun = time.perf_counter()

    def until(seen: Callable[[], object]) -> float:
        while not seen():
            time.sleep(LOOK_S)
        return time.perf_counter() - begun

    job = registry.merge(request).job
    assert job is not None
    child = until(children.read_text)
    work = until(lambda: any(staging.glob("*/*")))
    child_ended = until(lambda: not children.read_text())
    ended = until(lambda: _ended(registry, job.id))
    return Job(child, work, child_ended, ended)


def _ended(registry: RegistryAPI, job_id: str) -> bool:
    job = registry.job(job_id)
    if job.ended and job.state is not JobState.SUCCEEDED:
        raise RuntimeError(f"a merge that was timed ended {job.state}: {job.error}")
    return job.ended


@contextlib.contextmanager
def _worker(home: Path) -> Iterator[int]:
    """A supervisor that waits for jobs until it is told to stop."""
    environment = {**os.environ, "ADAPTERCTL_IDLE_S": "3600"}
    process = subprocess.Popen([sys.executable, "-m", SUPERVISOR, "--home", str(home)], env=environment)
    try:
        while _is_free(home):
            time.sleep(LOOK_S)
        yield process.pid
    finally:
        process.terminate()
        process.wait(30)


def _is_free(home: Path) -> bool:
    with only_one(home) as mine:
        return mine

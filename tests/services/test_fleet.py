"""Which queue a job that gains from a GPU goes to, and what an idle worker does for jobs that nobody can take."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from adapterctl.registry.domain.job import Job, NewJob
from adapterctl.registry.domain.worker import Worker
from adapterctl.registry.services.doctor import silent_workers, space
from adapterctl.registry.services.fleet import queue_for_gpu_work, tend
from adapterctl.registry.settings import Settings
from adapterctl.registry.stores.sql.ledger import SqlLedger

Add = Callable[[str], None]


@pytest.fixture
def add(sql_ledger: SqlLedger) -> Add:
    """A worker of one queue, which has its name."""
    return lambda queue: sql_ledger.add_worker(queue, name=queue, host="h", queues=(queue,), device="cpu")


def settings(gpu_queue: str, ring_again_s: float = 3600.0) -> Settings:
    return Settings(home=Path("unused"), gpu_queue=gpu_queue, ring_again_s=ring_again_s)


def queued(ledger: SqlLedger, queue: str) -> Job:
    return ledger.submit(NewJob("eval", queue, f"on {queue}", {}, "ada", queue=queue))[0]


def tended(ledger: SqlLedger, given: Settings, *, queues: tuple[str, ...] = ("cpu",), idle: bool = False) -> list[str]:
    """The jobs that a worker rang for."""
    rung: list[str] = []
    tend(ledger, SimpleNamespace(ring=rung.append), given, queues=queues, idle=idle)
    return rung


@pytest.mark.parametrize(("gpu_queue", "alone", "with_gpu"), [
    ("prefer", "cpu", "gpu"),
    ("require", "gpu", "gpu"),
    ("never", "cpu", "cpu"),
])  # fmt: skip
def test_work_for_a_gpu_goes_where_the_setting_and_the_workers_say(
    sql_ledger: SqlLedger, add: Add, gpu_queue: str, alone: str, with_gpu: str
):
    add("cpu")
    before = queue_for_gpu_work(sql_ledger, settings(gpu_queue))
    add("gpu")
    there = queue_for_gpu_work(sql_ledger, settings(gpu_queue))
    sql_ledger.see_worker("gpu", draining=True)
    leaving = queue_for_gpu_work(sql_ledger, settings(gpu_queue))

    assert (before, there, leaving) == (alone, with_gpu, alone)


def test_what_waits_for_a_gpu_moves_when_the_last_worker_with_one_is_gone(sql_ledger: SqlLedger, add: Add):
    add("cpu")
    add("gpu")
    waits, other = queued(sql_ledger, "gpu"), queued(sql_ledger, "cpu")

    assert tended(sql_ledger, settings("prefer")) == []
    assert sql_ledger.job(waits.id).queue == "gpu"
    sql_ledger.remove_worker("gpu")
    assert tended(sql_ledger, settings("prefer")) == [waits.id]

    assert sql_ledger.job(waits.id).queue == "cpu"
    claimed = [sql_ledger.claim("w", 60, queues=("cpu",)).id for _ in range(2)]
    assert claimed == [waits.id, other.id]


@pytest.mark.parametrize("gpu_queue", ["require", "never"])
def test_a_job_is_moved_by_those_alone_who_prefer_a_gpu(sql_ledger: SqlLedger, add: Add, gpu_queue: str):
    add("cpu")
    waits = queued(sql_ledger, "gpu")

    assert tended(sql_ledger, settings(gpu_queue)) == []
    assert sql_ledger.job(waits.id).queue == "gpu"
    assert sql_ledger.claim("w", 60, queues=("cpu",)) is None


def test_only_an_idle_worker_rings_again_and_for_its_own_queues(sql_ledger: SqlLedger):
    at_once = settings("require", ring_again_s=0.0)
    on_cpu, on_gpu = queued(sql_ledger, "cpu"), queued(sql_ledger, "gpu")

    assert tended(sql_ledger, at_once, idle=False) == []
    assert tended(sql_ledger, at_once, idle=True) == [on_cpu.id]
    assert tended(sql_ledger, at_once, idle=True, queues=("gpu",)) == [on_gpu.id]
    assert tended(sql_ledger, settings("require"), idle=True) == []


def worker(name: str, silent_s: float, *, host: str = "one", draining: bool = False) -> Worker:
    return Worker(name, name, host, ("cpu",), "cpu", 0.0, 0.0, draining, silent_s)


def test_doctor_counts_the_ends_of_a_worker_that_dies_at_every_start():
    restarts = [worker(f"one-{n}", 3600.0 - n) for n in range(40)]

    crashing = list(
        silent_workers([*restarts, worker("two-1", 99.0, host="two", draining=True), worker("one-99", 1.0)])
    )

    assert [(check.status, check.detail) for check in crashing] == [
        (
            "warning",
            "one-39 on one was last seen 3561 s ago, not leaving; 39 before it for cpu since 3600 s ago",
        ),
        ("warning", "two-1 on two was last seen 99 s ago, when it was leaving"),
    ]
    assert [check.hint.partition(";")[0] for check in crashing] == ["it was started again since", "start it again"]
    assert "was queued" not in crashing[1].hint  # nobody may have looked yet
    assert not list(silent_workers([worker("alive", 1.0)]))


def test_a_disk_on_which_writes_fail_is_an_error():
    assert [space(free << 20).status for free in (0, 49, 51, 1023, 1025)] == [
        "error", "error", "warning", "warning", "ok",
    ]  # fmt: skip

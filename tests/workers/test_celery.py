"""Workers as real processes on real PostgreSQL and Redis: kills, an empty broker and orders to stop lose nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import redis
from broker import PASSWORD, WORKER_PASSWORD, Broker, start_worker
from postgres import PASSWORD as DATABASE_PASSWORD
from tiny import write_tiny_adapter

from adapterctl.bootstrap import connect
from adapterctl.registry.domain.job import Job, JobState
from adapterctl.registry.domain.recipe import MergeRequest
from adapterctl.registry.domain.refs import parse_parent
from adapterctl.registry.services.local import LocalRegistry
from adapterctl.registry.settings import Settings

CANARIES = [secret.encode() for secret in (PASSWORD, WORKER_PASSWORD, DATABASE_PASSWORD)]


@dataclass
class Fleet:
    """A shared registry with `a:v1` and `b:v1`, and its workers."""

    registry: LocalRegistry
    settings: Settings
    folder: Path
    workers: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    asked: int = 0
    held: list[int] = field(default_factory=list)

    def start(self, name: str) -> None:
        settings = replace(self.settings, home=self.folder / name)
        self.workers[name] = start_worker(settings, name, self.folder / f"{name}.log")

    def submit(self) -> Job:
        self.asked += 1
        parents = (parse_parent(f"a:v1={self.asked}"), parse_parent("b:v1"))
        job = self.registry.merge(MergeRequest(parents, into="merged")).job
        assert job is not None
        return job

    def hold(self, job: Job) -> tuple[int, int]:
        """Stop the child of the job; returns the pool process and the main process of its worker."""
        child = wait_for(lambda: _child_of(self.registry.job(job.id)))
        os.kill(child, signal.SIGSTOP)
        self.held.append(child)
        pool = int(str(self.registry.job(job.id).owner).rpartition(":")[2])
        return pool, _parent_of(pool)

    def end(self, job: Job) -> Job:
        *_, ended = self.registry.follow(job.id, timeout_s=120)
        return ended


@pytest.fixture(scope="module")
def fleet(
    new_database: Callable[[str], str], postgres_schema: str, broker: Broker, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("fleet")
    settings = Settings(
        home=folder / "home",
        actor="ada",
        lease_s=3.0,
        ring_again_s=1.0,
        database_url=new_database(postgres_schema),
        mlflow_uri=new_database("template0"),
        artifacts=(folder / "artifacts").as_uri(),
        broker_url=broker.url,
    )
    registry = connect(settings)
    for seed, name in enumerate("ab"):
        registry.register(str(write_tiny_adapter(folder / name, seed=seed)), name=name)
    fleet = Fleet(registry, replace(settings, broker_url=broker.worker_url), folder)
    for name in ("one", "two"):
        fleet.start(name)
    wait_for(lambda: all("ready" in (folder / f"{name}.log").read_text() for name in fleet.workers))
    yield fleet
    for worker in fleet.workers.values():
        worker.terminate()
    for worker in fleet.workers.values():
        worker.wait(60)
    for child in fleet.held:  # one whose supervisor was killed stands still for ever
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    registry.ledger.close()


def test_a_submitted_job_is_done_by_a_worker(fleet: Fleet):
    ended = fleet.end(fleet.submit())

    assert (ended.state, ended.attempt, ended.queue) == (JobState.SUCCEEDED, 1, "cpu")
    assert sorted(worker.name for worker in fleet.registry.ledger.workers() if worker.alive) == ["one", "two"]
    assert fleet.registry.job_log(ended.id)


def test_a_queue_that_is_emptied_before_anyone_looks_loses_nothing(fleet: Fleet, broker: Broker):
    for worker in fleet.workers.values():
        worker.send_signal(signal.SIGSTOP)
    job = fleet.submit()
    broker.client().flushall()
    for worker in fleet.workers.values():
        worker.send_signal(signal.SIGCONT)

    assert fleet.end(job).state is JobState.SUCCEEDED


def test_a_broker_that_is_away_neither_loses_nor_delays_a_submit(fleet: Fleet, broker: Broker):
    broker.stop()
    begun = time.monotonic()
    job = fleet.submit()
    took_s = time.monotonic() - begun
    broker.start()

    assert took_s < 5.0
    assert fleet.end(job).state is JobState.SUCCEEDED


def test_a_killed_workers_job_is_taken_over(fleet: Fleet):
    job = fleet.submit()
    for pid in fleet.hold(job):
        os.kill(pid, signal.SIGKILL)

    ended = fleet.end(job)

    assert (ended.state, ended.attempt, ended.max_attempts) == (JobState.SUCCEEDED, 2, 3)
    gone = next(name for name, worker in fleet.workers.items() if worker.poll() is not None)
    fleet.start(gone)


def test_a_worker_that_is_told_to_stop_gives_its_job_back(fleet: Fleet):
    job = fleet.submit()
    _, main = fleet.hold(job)
    os.kill(main, signal.SIGTERM)

    ended = fleet.end(job)

    assert ended.state is JobState.SUCCEEDED
    assert ended.max_attempts == 4  # the attempt that was given back is not spent
    (stopped,) = [worker for worker in fleet.workers.values() if worker.pid == main]
    assert stopped.wait(60) == 0


def test_a_workers_user_reaches_the_queues_keys_alone(broker: Broker):
    broker.client().set("other", "secret")
    client = broker.client(broker.worker_url)

    client.lpush("adapterctl:cpu-probe", "x")
    client.delete("adapterctl:cpu-probe")
    for forbidden in (
        lambda: client.get("other"),
        lambda: client.set("other", "mine"),
        lambda: client.keys("*"),
        lambda: client.flushall(),
        lambda: client.config_get("*"),
        lambda: client.publish("adapterctl:x", "y"),
    ):
        with pytest.raises(redis.exceptions.NoPermissionError):
            forbidden()


def test_secrets_are_in_no_log_no_process_list_and_no_job(fleet: Fleet):
    shown = [path.read_bytes() for path in fleet.folder.rglob("*.log")]
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            shown.append(path.read_bytes())
        except OSError:
            continue  # it has ended
    jobs = fleet.registry.jobs()
    shown += [repr(job).encode() for job in jobs]
    shown += [piece.text.encode() for job in jobs for piece in fleet.registry.job_log(job.id)]

    assert len(shown) > len(jobs) > 0
    assert not [text for text in shown for secret in CANARIES if secret in text]


def wait_for(condition: Callable[[], object], limit_s: float = 60.0):
    deadline = time.monotonic() + limit_s
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def _child_of(job: Job) -> int | None:
    """The process that computes for the job, once it runs its own program: stopped before, it would stop its parent."""
    if job.state is not JobState.RUNNING:
        assert not job.ended
        return None
    pool = str(job.owner).rpartition(":")[2]
    children = Path(f"/proc/{pool}/task/{pool}/children").read_text().split()
    started = (
        child for child in children if b"adapterctl.workers.runner" in Path(f"/proc/{child}/cmdline").read_bytes()
    )
    return next(map(int, started), None)


def _parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])

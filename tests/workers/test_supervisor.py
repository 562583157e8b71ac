"""Jobs as a supervisor carries them: real merges in real children, and what becomes of a job when either fails."""

from __future__ import annotations

import errno
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from adapterctl.bootstrap import job_handlers
from adapterctl.registry.domain.job import Job, JobState
from adapterctl.registry.services.local import LocalRegistry
from adapterctl.registry.services.schedule import Done, JobHandler, Task
from adapterctl.registry.settings import Settings
from adapterctl.registry.stores.spawn_bell import LOG_BYTES, SpawnBell, only_one
from adapterctl.workers import supervisor as module
from adapterctl.workers.supervisor import Supervisor

Submit = Callable[..., Job]
NewSupervisor = Callable[..., Supervisor]


class Between:
    """The real handler of merges, and something that happens between its `begin` and the start of the child."""

    def __init__(self, registry: LocalRegistry, happens: Callable[[Job], None]) -> None:
        self._handler: JobHandler = job_handlers(registry)["merge"]
        self._happens = happens

    @contextmanager
    def begin(self, job: Job) -> Iterator[Task | Done]:
        with self._handler.begin(job) as task:
            self._happens(job)
            yield task

    def finish(self, job: Job, task: Task, result: Mapping[str, Any]) -> Mapping[str, Any]:
        return self._handler.finish(job, task, result)


def versions_of(registry: LocalRegistry, name: str = "merged") -> list[str]:
    return [version.label for version in registry.ledger.versions(name)]


def nothing_is_left(home: Path) -> bool:
    """No stage folder, and of jobs nothing but logs."""
    return not list((home / "staging").iterdir()) and {path.suffix for path in (home / "jobs").iterdir()} <= {".log"}


def test_a_merge_becomes_a_version_with_its_parents(
    registry: LocalRegistry, submit: Submit, new_supervisor: NewSupervisor, home: Path
):
    job = submit()

    assert new_supervisor().run_next()

    ended = registry.job(job.id)
    (version,) = registry.ledger.versions("merged")
    assert (ended.state, ended.attempt, ended.error) == (JobState.SUCCEEDED, 1, None)
    assert ended.result["version_id"] == version.id
    assert [edge.position for edge in registry.ledger.edges_up(version.id)] == [0, 1]
    assert "attempt 1 of 3" in (home / "jobs" / f"{job.id}.log").read_text()
    assert nothing_is_left(home)
    assert not new_supervisor().run_next()


def test_a_killed_child_is_tried_again_and_leaves_one_version(
    registry: LocalRegistry, submit: Submit, new_supervisor: NewSupervisor, monkeypatch: pytest.MonkeyPatch, home: Path
):
    monkeypatch.setenv("ADAPTERCTL_CRASH_AT", "child.module")
    monkeypatch.setenv("ADAPTERCTL_CRASH_ONCE", str(home / "crashed"))
    job = submit()

    new_supervisor().drain()

    assert (home / "crashed").exists()
    ended = registry.job(job.id)
    assert (ended.state, ended.attempt) == (JobState.SUCCEEDED, 2)
    assert versions_of(registry) == ["merged:v1"]
    assert "killed by SIGKILL" in " ".join(event.message for event in registry.job_events(job.id))


def test_a_child_that_always_dies_ends_as_failed_and_can_be_retried(
    registry: LocalRegistry, submit: Submit, new_supervisor: NewSupervisor, monkeypatch: pytest.MonkeyPatch, home: Path
):
    monkeypatch.setenv("ADAPTERCTL_CRASH_AT", "child.started")
    job = submit()

    new_supervisor().drain()

    ended = registry.job(job.id)
    assert (ended.state, ended.attempt, ended.error["code"]) == (JobState.FAILED, 3, "crashed")
    assert f"{job.id}.log" in ended.error["hint"]
    assert versions_of(registry) == []
    assert nothing_is_left(home)

    monkeypatch.delenv("ADAPTERCTL_CRASH_AT")
    registry.retry(job.id)
    new_supervisor().drain()
    assert registry.job(job.id).state is JobState.SUCCEEDED


def test_an_answer_that_would_come_again_fails_the_job_at_once(
    registry: LocalRegistry, submit: Submit, new_supervisor: NewSupervisor
):
    (parent,) = registry.ledger.versions("a")
    with registry.folders(parent) as folder:
        weights = folder / "adapter_model.safetensors"
        weights.chmod(0o644)
        weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    job = submit()

    new_supervisor().drain()

    ended = registry.job(job.id)
    assert (ended.state, ended.attempt, ended.error["code"]) == (JobState.FAILED, 1, "corrupt")
    assert "the manifest says" in ended.error["message"]


def test_a_bug_in_our_own_part_ends_the_job_and_not_the_supervisor(
    registry: LocalRegistry, submit: Submit, new_supervisor: NewSupervisor, home: Path
):
    def stumble(job: Job) -> None:
        raise ZeroDivisionError("a bug")

    job = submit()

    new_supervisor(merge=Between(registry, stumble)).drain()

    ended = registry.job(job.id)
    assert (ended.state, ended.attempt) == (JobState.FAILED, 3)
    assert ended.error["message"] == "ZeroDivisionError: a bug"
    assert "Traceback" in (home / "jobs" / f"{job.id}.log").read_text()


def test_a_child_that_takes_too_much_memory_ends_its_job(
    registry: LocalRegistry, submit: Submit, new_supervisor: NewSupervisor, settings: Settings
):
    job = submit()

    new_supervisor(replace(settings, job_memory_mb=1)).run_next()

    ended = registry.job(job.id)
    assert (ended.state, ended.error["code"]) == (JobState.FAILED, "too_large")
    assert "more than 1 MiB" in "".join(piece.text for piece in registry.job_log(job.id))
    assert versions_of(registry) == []


def test_an_obstacle_that_passes_does_not_use_up_the_attempts_of_the_queue(
    registry: LocalRegistry, submit: Submit, new_supervisor: NewSupervisor, monkeypatch: pytest.MonkeyPatch
):
    full = iter([True] * 3)

    def stumble(job: Job) -> None:
        if next(full, False):
            raise OSError(errno.ENOSPC, "No space left on device")

    pauses: list[float] = []
    real_rest = Supervisor._rest

    def rest(self: Supervisor) -> None:
        pauses.append(self._pause_s)
        real_rest(self)

    monkeypatch.setattr(module, "FIRST_PAUSE_S", 0.1)
    monkeypatch.setattr(Supervisor, "_rest", rest)
    jobs = [submit(weight) for weight in (1.0, 0.5)]

    new_supervisor(merge=Between(registry, stumble)).drain()

    assert pauses == [0.1, 0.2, 0.4, 0.0]
    assert [(registry.job(job.id).state, registry.job(job.id).attempt) for job in jobs] == [
        (JobState.FAILED, 3),
        (JobState.SUCCEEDED, 1),
    ]
    assert "No space left on device" in registry.job(jobs[0].id).error["message"]


def test_cancel_stops_the_child(registry: LocalRegistry, submit: Submit, new_supervisor: NewSupervisor, home: Path):
    def cancel_and_wait_until_heard(job: Job) -> None:
        registry.cancel(job.id)
        before = registry.job(job.id).lease_until
        while registry.job(job.id).lease_until == before:  # the next renewal carries the wish to the supervisor
            os.sched_yield()

    job = submit()

    quick = replace(registry.settings, lease_s=0.6)
    new_supervisor(quick, merge=Between(registry, cancel_and_wait_until_heard)).drain()

    assert registry.job(job.id).state is JobState.CANCELLED
    assert versions_of(registry) == []
    assert nothing_is_left(home)


def test_a_supervisor_whose_job_was_taken_stops_its_child_and_writes_nothing(
    registry: LocalRegistry, submit: Submit, new_supervisor: NewSupervisor
):
    def taken(job: Job) -> None:
        registry.ledger.reap(abandoned=True)
        registry.ledger.claim("another", 60)

    job = submit()

    new_supervisor(merge=Between(registry, taken)).run_next()

    held = registry.job(job.id)
    assert (held.state, held.owner, held.attempt) == (JobState.RUNNING, "another", 2)
    assert versions_of(registry) == []


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits for a locked database gives up soon."""
    monkeypatch.setattr("adapterctl.registry.stores.sql.engine.BUSY_TIMEOUT_S", 0.2)


@pytest.mark.usefixtures("impatient")
def test_a_supervisor_that_cannot_renew_stops_its_child_when_the_lease_is_over(
    registry: LocalRegistry, submit: Submit, new_supervisor: NewSupervisor, home: Path
):
    other = sqlite3.connect(home / "registry.db", isolation_level=None)
    job = submit()
    supervisor = new_supervisor(
        replace(registry.settings, lease_s=0.05),  # over before the child has started
        merge=Between(registry, lambda job: other.execute("BEGIN IMMEDIATE")),  # nobody else can write now
    )

    supervisor.run_next()

    other.rollback()
    other.close()
    assert "attempt 1 lost" in (home / "jobs" / f"{job.id}.log").read_text()
    assert registry.job(job.id).state is JobState.RUNNING
    assert [each.state for each in registry.ledger.reap(abandoned=True)] == [JobState.QUEUED]
    assert versions_of(registry) == []


def test_a_job_that_takes_too_long_fails_with_the_limit(
    registry: LocalRegistry, submit: Submit, new_supervisor: NewSupervisor
):
    job = submit()

    new_supervisor(replace(registry.settings, job_timeout_s=0.05)).drain()

    ended = registry.job(job.id)
    assert (ended.state, ended.attempt, ended.error["code"]) == (JobState.FAILED, 1, "timed_out")


def test_a_supervisor_that_is_told_to_stop_gives_the_job_back(
    registry: LocalRegistry, submit: Submit, new_supervisor: NewSupervisor
):
    job = submit()
    supervisor = new_supervisor(merge=Between(registry, lambda job: supervisor.stop()))

    supervisor.drain()

    returned = registry.job(job.id)
    assert (returned.state, returned.max_attempts - returned.attempt) == (JobState.QUEUED, 3)
    new_supervisor().drain()
    assert registry.job(job.id).state is JobState.SUCCEEDED


def test_a_child_is_given_no_token_and_no_address(monkeypatch: pytest.MonkeyPatch):
    for name in (
        "HF_TOKEN",
        "MLFLOW_TRACKING_TOKEN",
        "MLFLOW_TRACKING_URI",
        "AWS_SECRET_ACCESS_KEY",
        "ADAPTERCTL_HOME",
    ):
        monkeypatch.setenv(name, "canary")

    environment = module._child_environment()

    assert "canary" not in environment.values()
    assert environment["HF_HUB_OFFLINE"] == "1"


def test_the_supervisor_loads_no_tensors():
    code = (
        "import sys; import adapterctl.workers.supervisor, adapterctl.bootstrap; "
        "print(*{'torch', 'numpy', 'safetensors', 'mlflow', 'transformers', 'alembic'} & set(sys.modules))"
    )

    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)

    assert done.stdout.strip() == ""


def test_what_a_background_import_would_tear_is_loaded_before_there_are_threads(home: Path):
    code = (
        "import sys; from adapterctl.bootstrap import connect, job_handlers; job_handlers(connect()); "
        "print(*{'sqlalchemy.orm', 'mlflow'} & set(sys.modules))"
    )

    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)

    assert done.stdout.strip() == "sqlalchemy.orm"


# processes


def start(settings: Settings) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "adapterctl.workers.supervisor"],
        env={**os.environ, **settings.to_env()},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_of_two_supervisors_one_works_and_the_other_leaves(registry: LocalRegistry, submit: Submit, settings: Settings):
    job = submit()
    with only_one(settings.home) as mine:
        assert mine
        loser = start(settings)
        assert loser.communicate() == ("", None)

    winner = start(settings)
    output, _ = winner.communicate()

    assert (loser.returncode, winner.returncode, output) == (0, 0, "")
    assert registry.job(job.id).state is JobState.SUCCEEDED


def test_sigterm_makes_an_idle_supervisor_leave(registry: LocalRegistry, submit: Submit, settings: Settings):
    job = submit()
    process = start(replace(settings, idle_s=600.0))
    for _ in registry.follow(job.id, timeout_s=120):
        pass

    process.send_signal(signal.SIGTERM)

    assert process.communicate(timeout=30) == ("", None)
    assert process.returncode == 0


def test_the_bell_starts_one_supervisor_for_all_jobs(registry: LocalRegistry, submit: Submit, settings: Settings):
    registry.bell = bell = SpawnBell(settings)

    jobs = [submit(weight) for weight in (1.0, 0.5)]

    for job in jobs:
        *_, ended = registry.follow(job.id, timeout_s=120)
        assert (ended.state, ended.attempt) == (JobState.SUCCEEDED, 1)
    assert versions_of(registry) == ["merged:v1", "merged:v2"]
    for pid in bell._started:
        os.waitpid(pid, 0)


def test_threads_that_ring_at_once_forget_a_supervisor_that_ended_once(settings: Settings):
    def forget(bell: SpawnBell, begin: threading.Barrier, errors: list[Exception]) -> None:
        begin.wait()
        try:
            bell._forget_ended()
        except ValueError as error:
            errors.append(error)

    errors: list[Exception] = []
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads change places within a line
    try:
        for _ in range(50):
            bell, begin = SpawnBell(settings), threading.Barrier(6)
            bell._started = [os.posix_spawn("/bin/true", ["true"], {}) for _ in range(3)]
            for pid in bell._started:
                os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
            threads = [threading.Thread(target=forget, args=(bell, begin, errors)) for _ in range(6)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert bell._started == []
    finally:
        sys.setswitchinterval(before)

    assert errors == []


def test_a_log_that_has_grown_is_put_aside_before_the_next_supervisor_writes(
    registry: LocalRegistry, settings: Settings
):
    bell = SpawnBell(settings)
    log = settings.home / "jobs" / "supervisor.log"
    log.parent.mkdir(exist_ok=True)
    aside = log.with_name("supervisor.log.1")
    aside.write_text("older still")
    log.write_bytes(b"x" * LOG_BYTES)

    with log.open("a") as leaving:  # another supervisor, which does not hold the lock any more
        bell.ring("unheard")
        assert aside.read_text() == "older still"
        os.waitpid(bell._started.pop(), 0)
        leaving.write("!")
        leaving.flush()
        bell.ring("unheard")
        leaving.write("gone")

    os.waitpid(bell._started.pop(), 0)
    assert aside.read_bytes() == b"x" * LOG_BYTES + b"!gone"
    assert log.stat().st_size < LOG_BYTES


def test_a_job_queued_between_the_last_look_and_the_exit_is_not_missed(
    registry: LocalRegistry, submit: Submit, settings: Settings, monkeypatch: pytest.MonkeyPatch
):
    jobs: list[Job] = []
    real_drain = Supervisor.drain

    def drain(self: Supervisor) -> None:
        real_drain(self)
        if not jobs:  # the last look is over, the lock is still held
            registry.bell = bell = SpawnBell(settings)
            jobs.append(submit())
            assert bell._started == []  # so nobody was started

    monkeypatch.setattr(Supervisor, "drain", drain)
    monkeypatch.setattr(sys, "argv", ["supervisor"])  # `main` reads it, and pytest's words are not for it
    for name, value in settings.to_env().items():
        monkeypatch.setenv(name, value)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        assert module.main() == 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

    assert registry.job(jobs[0].id).state is JobState.SUCCEEDED

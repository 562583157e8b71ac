"""One process that carries jobs to their end: claims, starts a child, keeps the lease, records the outcome.

The child is a pure function from files to files. It holds no lease, no database and no token, and it may die at any
point; so may this process. What was claimed by the dead is queued again by whoever holds the supervisor's lock next.
Nothing here knows what a job is about: that is `JobHandler`. No tensor is loaded in this process.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any, Literal

from ..registry.crashpoints import reached
from ..registry.domain.errors import AdapterctlError, Conflict, Unavailable
from ..registry.domain.job import Job, JobState, Progress
from ..registry.domain.worker import Queue
from ..registry.ports import Ledger
from ..registry.services.schedule import Done, JobHandler, Task
from ..registry.settings import Settings, load_settings
from ..registry.stores.spawn_bell import only_one

POLL_S = 0.1
#: Between two looks of an idle supervisor at the queue: half of it is what a job waits on average.
LOOK_S = 0.05
BEAT_S = 1.0
GRACE_S = 5.0
#: After an attempt that met an obstacle; doubled while the obstacle stays.
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 15.0
TAIL_LINES = 20
#: What one attempt may leave in the ledger; the file has all of it.
SHIPPED_BYTES = 1 << 20

# What a child may know of our environment: how to run, where it may write, how many threads. No token, no address.
CHILD_ENVIRONMENT = (
    *("PATH", "HOME", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "PYTHONPATH", "VIRTUAL_ENV"),
    *("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES"),
    *("ADAPTERCTL_CRASH_AT", "ADAPTERCTL_CRASH_ONCE"),
)
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "DO_NOT_TRACK": "true"}

# Another writer was first, or a store did not answer: the next attempt may well succeed. Every other error of ours is
# the answer to this job and would come again.
PASSING = (Conflict.code, Unavailable.code)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an attempt ended. `lost`: it is no longer ours, nothing may be written; `returned`: we were told to stop."""

    kind: Literal["succeeded", "failed", "crashed", "cancelled", "lost", "returned"]
    result: Mapping[str, Any] = field(default_factory=dict)
    error: Mapping[str, str] = field(default_factory=dict)


class Supervisor:
    """Works on one job at a time. `prepare` is called in the background while the first child computes."""

    def __init__(
        self,
        ledger: Ledger,
        handlers: Mapping[str, JobHandler],
        settings: Settings,
        *,
        queues: Sequence[Queue] = (),
        dismissed: Callable[[], bool] = lambda: False,
        prepare: Callable[[], None] | None = None,
    ) -> None:
        """`queues`: take jobs of these alone. `dismissed`: asked at each beat whether others told us to stop."""
        self._ledger = ledger
        self._handlers = handlers
        self._settings = settings
        self._queues = queues
        self._dismissed = dismissed
        self._prepare = prepare
        self.stopped = False
        self._pause_s = 0.0
        self._owner = f"{socket.gethostname()}:{os.getpid()}"

    def stop(self) -> None:
        """Give the job back and leave. A plain flag, as this is called from a signal handler."""
        self.stopped = True

    def drain(self) -> None:
        """Work until nothing is queued or running for `idle_s`.

        A job that runs under another owner keeps us here: its lease may expire, and someone must be there to see it.
        """
        quiet_since, reaped_at = time.monotonic(), -BEAT_S
        while not self.stopped:
            if time.monotonic() - reaped_at >= BEAT_S:
                self._ledger.reap()
                reaped_at = time.monotonic()
            if self.run_next():
                self._rest()
                quiet_since = time.monotonic()
                continue
            if time.monotonic() - quiet_since >= self._settings.idle_s:
                if not self._ledger.jobs(states=[JobState.RUNNING], limit=1):
                    return
                quiet_since = time.monotonic()
            time.sleep(LOOK_S)

    def work_off(self) -> None:
        """Work until nothing is queued for us, or we are dismissed."""
        while not self._look_up() and self.run_next():
            self._rest()

    def take_over(self) -> None:
        """Queue again what others claimed. Only for the holder of the supervisor's lock: the others are dead then."""
        self._ledger.reap(abandoned=True)

    def work_is_left(self) -> bool:
        """Whether something is queued that we could do; a kind that a newer program queued is not for us."""
        return any(self._ledger.jobs(states=[JobState.QUEUED], kind=kind, limit=1) for kind in self._handlers)

    def run_next(self) -> bool:
        """Claim one job and bring this attempt to its end; False where nothing is queued."""
        job = self._ledger.claim(self._owner, self._settings.lease_s, kinds=tuple(self._handlers), queues=self._queues)
        if job is None:
            return False
        reached("job.claimed")
        with (
            JobLog(self._settings.home, job, self._ledger) as log,
            Lease(self._ledger, job, self._settings.lease_s, self._look_up) as lease,
        ):
            outcome = self._attempt(job, lease, log)
            log.write(f"attempt {job.attempt} {outcome.kind} {outcome.error.get('message', '')}")
            log.ship()
            self._settle(job, outcome, log)
        hindered = outcome.kind == "crashed" and outcome.error["code"] in PASSING
        self._pause_s = min(max(2 * self._pause_s, FIRST_PAUSE_S), LONGEST_PAUSE_S) if hindered else 0.0
        return True

    def _rest(self) -> None:
        """Give an obstacle time to pass, or every job that is queued would use up its attempts on it within seconds."""
        until = time.monotonic() + self._pause_s
        while not self.stopped and time.monotonic() < until:
            time.sleep(POLL_S)

    def _attempt(self, job: Job, lease: Lease, log: JobLog) -> Outcome:
        handler = self._handlers[job.kind]
        try:
            with handler.begin(job) as task:
                reached("job.begun")
                if isinstance(task, Done):
                    return Outcome("succeeded", result=task.result)
                outcome = self._compute(job, task, lease, log)
                reached("child.ended")
                if outcome.kind != "succeeded":
                    return outcome
                log.ship()  # so that whoever sees the job ended sees what it wrote
                return Outcome("succeeded", result=handler.finish(job, task, outcome.result))
        except AdapterctlError as error:
            return _told({"code": error.code, "message": error.message, "hint": error.hint})
        except OSError as error:
            message = f"files of the home cannot be written or read: {error}"
            return Outcome("crashed", error={"code": Unavailable.code, "message": message, "hint": "check its disk"})
        except Exception as error:  # noqa: BLE001  a bug must end as a failed job, not as a dead supervisor
            log.write(traceback.format_exc())
            return Outcome("crashed", error={"code": "failure", "message": f"{type(error).__name__}: {error}"})

    def _compute(self, job: Job, task: Task, lease: Lease, log: JobLog) -> Outcome:
        """Run the child under the lease, the time limit and our own wish to stop."""
        deadline = time.monotonic() + self._settings.job_timeout_s
        with Child(task, log) as child:
            self._prepare_once()
            while True:
                if lease.verdict == "lost":
                    child.kill()
                    return Outcome("lost")
                if lease.verdict == "cancel" or self.stopped:
                    child.stop()
                    return Outcome("returned" if self.stopped else "cancelled")
                if time.monotonic() >= deadline:
                    child.kill()
                    return Outcome("failed", error=_timed_out(self._settings.job_timeout_s))
                if 0 < self._settings.job_memory_mb < child.memory_mb():
                    child.kill()
                    return Outcome("failed", error=_too_large(self._settings.job_memory_mb))
                log.ship(every_s=BEAT_S)
                message = child.next_message(POLL_S)
                if "progress" in message:
                    lease.progress = Progress(**message["progress"])
                elif "result" in message:
                    return Outcome("succeeded", result=message["result"])
                elif "error" in message:
                    return _told(message["error"])
                elif "ended" in message:
                    return Outcome("crashed", error=_crashed(message["ended"], log))

    def _settle(self, job: Job, outcome: Outcome, log: JobLog) -> None:
        """Write the end of the attempt. Every write is fenced: refused, where the job is someone else's by now."""
        try:
            self._record_end(job, outcome)
        except Unavailable as error:  # then the lease expires, and the job is queued again
            log.write(f"the outcome could not be recorded: {error}")

    def _record_end(self, job: Job, outcome: Outcome) -> None:
        end = self._ledger.finish
        if outcome.kind == "succeeded":  # where the version ended the job in its own transaction, this is refused
            end(job.id, job.attempt, JobState.SUCCEEDED, result=outcome.result)
        elif outcome.kind == "cancelled":
            end(job.id, job.attempt, JobState.CANCELLED)
        elif outcome.kind == "returned":
            self._ledger.give_back(job.id, job.attempt)
        elif outcome.kind == "failed" or (outcome.kind == "crashed" and job.attempt >= job.max_attempts):
            end(job.id, job.attempt, JobState.FAILED, error=outcome.error)
        elif outcome.kind == "crashed" and self._ledger.give_back(job.id, job.attempt, spent=True):
            self._ledger.record(job.id, "crashed", outcome.error["message"])

    def _look_up(self) -> bool:
        """Whether we are to stop, by a signal or by what others wrote."""
        if not self.stopped and self._dismissed():
            self.stop()
        return self.stopped

    def _prepare_once(self) -> None:
        if self._prepare is not None:
            threading.Thread(target=self._prepare, daemon=True).start()
            self._prepare = None


class Lease(threading.Thread):
    """Renews the lease of one attempt, from its claim to its end, and carries `progress` with it.

    `verdict` is `lost` when a renewal was refused, or when the lease ran out because none could be made; `cancel` when
    someone asked for it; else None. Refusal is final, and so is time: both are decided without asking anybody.
    """

    def __init__(self, ledger: Ledger, job: Job, lease_s: float, on_beat: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self.progress: Progress | None = None
        self._ledger = ledger
        self._job = job
        self._lease_s = lease_s
        self._on_beat = on_beat
        self._until = time.monotonic() + lease_s
        self._refused = self._cancel = False
        self._over = threading.Event()

    @property
    def verdict(self) -> Literal["lost", "cancel"] | None:
        if self._refused or time.monotonic() >= self._until:
            return "lost"
        return "cancel" if self._cancel else None

    def run(self) -> None:
        while not self._over.wait(min(self._lease_s / 3, BEAT_S)) and not self._refused:
            self._renew()

    def _renew(self) -> None:
        asked = time.monotonic()  # before the database's clock is read, so that ours never runs longer
        try:
            job = self._ledger.renew(self._job.id, self._job.attempt, self._lease_s, self.progress)
        except AdapterctlError:
            return  # not refused, only unheard: the next beat tries again, as long as there is time
        if job is None:
            self._refused = True
            return
        self._until, self._cancel = asked + self._lease_s, job.cancel_requested
        self._on_beat()

    def __enter__(self) -> Lease:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        # A renewal that waits for the database may end whenever it likes: it is fenced, like every write.
        self.join(BEAT_S)


class Child:
    """A runner at work, and what it says: `progress`, `result` or `error`, or `ended` with an exit code."""

    def __init__(self, task: Task, log: JobLog) -> None:
        self._task = task
        self._log = log
        self._messages: queue.Queue[Mapping[str, Any]] = queue.Queue()

    def next_message(self, wait_s: float) -> Mapping[str, Any]:
        """The next message, or an empty one after `wait_s`."""
        try:
            return self._messages.get(timeout=wait_s)
        except queue.Empty:
            return {}

    def memory_mb(self) -> float:
        """What the child holds in memory, as far as this system tells (Linux)."""
        try:
            pages = int(Path(f"/proc/{self._process.pid}/statm").read_text().split()[1])
        except (OSError, IndexError):  # it has ended, or there is no /proc
            return 0.0
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    def stop(self) -> None:
        """Ask the child to stop between two units of its work; insist after a while."""
        self._signal(signal.SIGTERM)
        try:
            self._process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        self._signal(signal.SIGKILL)
        self._process.wait()

    def __enter__(self) -> Child:
        # A file without a name: whoever is killed, and whenever, nothing of it stays.
        with TemporaryFile(dir=self._log.path.parent) as task_file:
            task_file.write(json.dumps(self._task.body).encode())
            task_file.seek(0)
            # Started by the main thread: the kernel ends the child with the thread that started it (PR_SET_PDEATHSIG).
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "adapterctl.workers.runner", "/dev/stdin"],
                stdin=task_file,
                stdout=subprocess.PIPE,
                stderr=self._log.file,
                env=_child_environment(),
                start_new_session=True,
            )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._reader.join()

    def _read(self) -> None:
        stream = self._process.stdout
        assert stream is not None
        with stream:
            for line in stream:
                self._hear(line)
        self._messages.put({"ended": self._process.wait()})

    def _hear(self, line: bytes) -> None:
        try:
            message = json.loads(line)
        except ValueError:
            message = {"log": line.decode(errors="replace").rstrip()}
        if "log" in message:
            self._log.write(message["log"])
        else:
            self._messages.put(message)

    def _signal(self, number: int) -> None:
        """To the whole session of the child; what has ended already is fine."""
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            return


class JobLog:
    """`home/jobs/ID.log`: what the child wrote to stderr, and our own lines, over all attempts.

    Whole lines of it are copied to the ledger, for those who are on another machine.
    """

    def __init__(self, home: Path, job: Job, ledger: Ledger) -> None:
        self.path = home / "jobs" / f"{job.id}.log"
        self._job_id = job.id
        self._ledger = ledger
        self._shipped_at = time.monotonic()
        self._first_line = f"attempt {job.attempt} of {job.max_attempts}"

    def write(self, text: str) -> None:
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        with suppress(OSError):  # on a full disk a line is missing, and the work goes on
            self.file.write(f"{now} {text.rstrip()}\n".encode())

    def ship(self, *, every_s: float = 0.0) -> None:
        """Copy what is new to the ledger. One that cannot be reached gets it the next time."""
        if time.monotonic() - self._shipped_at < every_s or self._shipped - self._start >= SHIPPED_BYTES:
            return
        self._shipped_at = time.monotonic()
        with self.path.open("rb") as file:
            file.seek(self._shipped)
            lines = file.read(SHIPPED_BYTES).rpartition(b"\n")[0]
        if not lines:
            return
        with suppress(AdapterctlError):
            self._ledger.append_log(self._job_id, lines.decode(errors="replace"))
            self._shipped += len(lines) + 1

    def tail(self) -> str:
        """The last lines of this attempt, for those who cannot see the file."""
        with self.path.open("rb") as file:
            file.seek(self._start)
            return "\n".join(file.read().decode(errors="replace").splitlines()[-TAIL_LINES:])

    def __enter__(self) -> JobLog:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file: IO[bytes] = self.path.open("ab", buffering=0)
        self._start = self._shipped = self.file.tell()
        self.write(self._first_line)
        return self

    def __exit__(self, *_: object) -> None:
        self.ship()
        self.file.close()


def _told(error: Mapping[str, str]) -> Outcome:
    """The outcome of an error that has a code: final, unless it is one that passes."""
    return Outcome("crashed" if error.get("code") in PASSING else "failed", error=error)


def _timed_out(timeout_s: float) -> Mapping[str, str]:
    return {
        "code": "timed_out",
        "message": f"took longer than {timeout_s:g} s",
        "hint": "raise job_timeout_s (ADAPTERCTL_JOB_TIMEOUT_S), then adapterctl jobs retry",
    }


def _too_large(limit_mb: int) -> Mapping[str, str]:
    return {
        "code": "too_large",
        "message": f"the process that computed took more than {limit_mb} MiB of memory",
        "hint": "raise job_memory_mb (ADAPTERCTL_JOB_MEMORY_MB), then adapterctl jobs retry",
    }


def _crashed(exit_code: int, log: JobLog) -> Mapping[str, str]:
    how = f"was killed by {signal.Signals(-exit_code).name}" if exit_code < 0 else f"exited with {exit_code}"
    tail = log.tail()
    return {
        "code": "crashed",
        "message": f"the process that computed {how} without a result" + (f"; its last words:\n{tail}" if tail else ""),
        "hint": f"the whole log is in {log.path}",
    }


def _child_environment() -> dict[str, str]:
    ours = {name: os.environ[name] for name in CHILD_ENVIRONMENT if name in os.environ}
    return {**ours, **OFFLINE}


def main() -> int:
    """Drain the queue of this home, unless another supervisor is at it.

    No job is missed between the last look and the exit. Who queues a job commits it and then tries the lock, or starts
    a process that tries it. If that fails, someone held the lock after the commit; and whoever held it looks once more
    after letting go, which is later still, and sees the job.
    """
    parser = argparse.ArgumentParser(prog="adapterctl.workers.supervisor")
    parser.add_argument("--home", type=Path, help="the embedded registry in this folder")
    settings = load_settings(vars(parser.parse_args()))
    supervisor: Supervisor | None = None
    while True:
        with only_one(settings.home) as mine:
            if not mine:
                return 0
            supervisor = supervisor or _open(settings)
            if settings.database_url is None:  # else others work on the same ledger, under other locks
                supervisor.take_over()
            supervisor.drain()
        if supervisor.stopped or not supervisor.work_is_left():
            return 0


def _open(settings: Settings) -> Supervisor:
    # deferred: whoever finds the lock taken needs no database
    from ..bootstrap import connect, job_handlers, warm_up

    registry = connect(settings)
    supervisor = Supervisor(registry.ledger, job_handlers(registry), settings, prepare=warm_up)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: supervisor.stop())
    return supervisor


if __name__ == "__main__":
    sys.exit(main())

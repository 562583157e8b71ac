"""The registry that chaos is let loose on: real processes on a real database, in folders of their own.

Three forms. `sqlite`: one home, whose supervisor is started by whoever asks for work. `postgres`: ledger and MLflow on
a PostgreSQL server, and two machines, each with a home and a supervisor. `celery`: the same with a Redis, and a Celery
worker (`adapterctl worker`) on each machine. In all of them clients work in the registry directly, and one goes through
`adapterctl serve`. Everything here may be killed at any time; `tend` does what people and process managers do then:
start it again, and ring.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache, cached_property
from mmap import mmap
from pathlib import Path

from broker import Broker, running_broker
from forks import in_child
from model import Model
from postgres import PostgresServer, free_port, postgres_server

from adapterctl.bootstrap import connect
from adapterctl.migrations import migrate
from adapterctl.registry.domain.errors import AdapterctlError
from adapterctl.registry.services.local import LocalRegistry
from adapterctl.registry.settings import Settings
from adapterctl.registry.stores.mlflow_versions import MlflowVersions
from adapterctl.registry.stores.spawn_bell import SpawnBell
from adapterctl.registry.stores.sql.engine import sqlite_url

HERE = Path(__file__).resolve().parent
LEASE_S = 3.0
RING_EVERY_S = 1.0
#: Of a client, between two questions.
PAUSE_S = 0.3
#: The filesystem of the homes, where one of its own can be made: small enough to be filled.
DISK_MB = 192
SUPERVISOR, CHILD = "adapterctl.workers.supervisor", "adapterctl.workers.runner"
WORKER = "adapterctl.workers.celery_worker"


class Clock:
    """The seconds by which the clock of some processes is ahead; None where it cannot be stepped (no C compiler)."""

    def __init__(self, folder: Path, name: str, library: Path | None) -> None:
        self._file = folder / f"{name}.clock"
        self._file.write_bytes(struct.pack("d", 0.0))
        self._library = library
        with self._file.open("r+b") as file:
            self._page = mmap(file.fileno(), 8)

    @property
    def environment(self) -> dict[str, str]:
        return {"LD_PRELOAD": str(self._library), "CHAOS_CLOCK": str(self._file)} if self._library else {}

    def step(self, seconds: float) -> None:
        ahead = struct.unpack("d", self._page[:8])[0]
        self._page[:8] = struct.pack("d", ahead + seconds)


class Bell(SpawnBell):
    """The real one, which also tells how many supervisors it started."""

    started = 0

    def forget_ended(self) -> None:
        self._forget_ended()

    def _spawn(self) -> int:
        self.started += 1
        return super()._spawn()


@dataclass
class Client:
    """A client process, and what it needs to be started again."""

    orders: Path
    accepted: Path
    environment: Mapping[str, str]
    pause_s: float
    process: subprocess.Popen[bytes] | None = None

    @property
    def finished(self) -> bool:
        return self.process is not None and self.process.poll() == 0


@dataclass
class Listener:
    """A process that follows the registry's events, and where it writes them down."""

    heard: Path
    environment: Mapping[str, str]
    process: subprocess.Popen[bytes] | None = None


class Scene:
    """`machines` are the settings of each machine that works; `room` keeps what must survive a full disk."""

    def __init__(
        self,
        room: Path,
        machines: Sequence[Settings],
        *,
        postgres: PostgresServer | None,
        broker: Broker | None,
        disk: Path | None,
        clocks: Mapping[str, Clock],
    ) -> None:
        self.room = room
        self.machines = machines
        self.postgres = postgres
        self.broker = broker
        self.disk = disk
        self.clocks = clocks
        self.clients: list[Client] = []
        self.listeners: list[Listener] = []
        self.server: subprocess.Popen[bytes] | None = None
        self.workers: list[subprocess.Popen[bytes] | None] = [None for _ in machines] if broker else []
        self.armed: dict[str, str] = {}
        self._serves = False
        self._port = free_port()
        self._rung_at = 0.0
        self._bells = [Bell(settings) for settings in machines]

    @cached_property
    def registry(self) -> LocalRegistry:
        """For looking at it from outside; its own doorbell is not rung."""
        return connect(self.machines[0])

    # processes

    @property
    def address(self) -> str:
        """Of the server."""
        return f"http://127.0.0.1:{self._port}"

    def start_clients(
        self, model: Model, lists: Sequence[Sequence[int]], *, served: bool, pause_s: float = PAUSE_S
    ) -> None:
        """A client for each list; with `served`, the last one goes through the server. And listeners, either way."""
        for number, numbers in enumerate(lists):
            orders = []
            for each in (model.wanted[n] for n in numbers):
                parents = [(model.label(name), weight) for name, weight in each.parents]
                orders.append({"number": each.number, "into": each.into, "parents": parents})
            path = self.room / f"orders-{number}.json"
            path.write_text(json.dumps(orders), encoding="utf-8")
            machine = self.machines[number % len(self.machines)]
            environment = self._environment(machine)
            if served and number == len(lists) - 1:
                self._serves = True
                environment["ADAPTERCTL_SERVER"] = self.address
            self.clients.append(Client(path, self.room / f"accepted-{number}.jsonl", environment, pause_s))
        # the first one works in the registry directly, the last one where there is a server goes through it
        ends = [self.clients[0], self.clients[-1]] if self._serves else [self.clients[0]]
        for number, client in enumerate(ends):
            self.listeners.append(Listener(self.room / f"heard-{number}.jsonl", client.environment))

    def tend(self) -> None:
        """Start again what was killed, and ring where nobody may be at work. Called all the time."""
        for client in self.clients:
            if not client.finished and (client.process is None or client.process.poll() is not None):
                program = [str(HERE / "client.py"), str(client.orders), str(client.accepted), str(client.pause_s)]
                client.process = self._start("client", program, client.environment)
        for listener in self.listeners:
            if listener.process is None or listener.process.poll() is not None:
                program = [str(HERE / "listener.py"), str(listener.heard)]
                listener.process = self._start("listener", program, listener.environment)
        if self._serves and (self.server is None or self.server.poll() is not None):
            command = ["-P", "-m", "adapterctl", "serve", "--port", str(self._port)]
            self.server = self._start("server", command, self._environment(self.machines[-1]))
        if self.postgres is not None and self.postgres.process.poll() is not None:
            self.postgres.process = self.postgres.start()
        for number, worker in enumerate(self.workers):
            if worker is None or worker.poll() is not None:
                self.workers[number] = self._start_worker(self.machines[number])
        if self.broker is None and time.monotonic() - self._rung_at >= RING_EVERY_S:
            self.ring()

    def ring(self) -> None:
        """What a waiting command does: start a supervisor on each machine that has none."""
        self._rung_at = time.monotonic()
        for machine, bell in zip(self.machines, self._bells, strict=True):
            with _environment(self._environment(machine) | self.armed), suppress(AdapterctlError, OSError):
                before = bell.started
                bell.ring("")
                if bell.started > before:  # it took the environment with it
                    self.armed = {}

    def supervisors(self) -> list[int]:
        """The live processes that supervise; of a Celery worker that is its pool process."""
        program = WORKER if self.broker is not None else SUPERVISOR
        return [pid for pid in self._running(program) if pid not in self.main_processes()]

    def main_processes(self) -> list[int]:
        """Of the Celery workers that live."""
        return [worker.pid for worker in self.workers if worker is not None and worker.poll() is None]

    def children(self) -> list[int]:
        """Those that compute; a child is ours by its parent."""
        ours = self.supervisors()
        return [pid for pid, words in _all_processes() if CHILD in words and _parent(pid) in ours]

    def end(self) -> None:
        """Let supervisors give back what they hold and leave; end the rest."""
        for each in (*self.clients, *self.listeners):
            _end(each.process)
        _end(self.server)
        for worker in self.workers:
            _end(worker)
        deadline = time.monotonic() + 30
        while (left := self.supervisors()) and time.monotonic() < deadline:
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
                    os.kill(pid, signal.SIGTERM)
            for bell in self._bells:
                bell.forget_ended()
            time.sleep(0.2)

    def kill_all(self) -> None:
        for process in (self.server, *self.workers, *(each.process for each in (*self.clients, *self.listeners))):
            if process is not None:
                process.kill()
                process.wait()
        for pid in (*self.children(), *self.supervisors()):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for bell in self._bells:
            bell.forget_ended()

    def _start_worker(self, machine: Settings) -> subprocess.Popen[bytes]:
        assert self.broker is not None
        environment = self._environment(replace(machine, broker_url=self.broker.worker_url)) | self.armed
        self.armed = {}
        return self._start("worker", ["-P", "-m", "adapterctl", "worker", "--queues", "cpu"], environment)

    def _running(self, program: str) -> list[int]:
        return [pid for pid, words in _all_processes() if program in words and self._is_ours(pid, words)]

    def _start(self, name: str, arguments: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        with (self.room / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, *arguments],
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def _environment(self, machine: Settings) -> dict[str, str]:
        clock = self.clocks.get("host")
        return machine.to_env() | (clock.environment if clock else {})

    def _is_ours(self, pid: int, words: Sequence[str]) -> bool:
        homes = [str(machine.home) for machine in self.machines]
        if any(home in word for word in words for home in homes):
            return True
        with suppress(OSError):
            entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            return any(f"ADAPTERCTL_HOME={home}".encode() in entries for home in homes)
        return False


def end_properly() -> None:
    """Let SIGTERM and Ctrl-C end this program with everything that it started, and not leave it lying about."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit("stopped"))


@contextmanager
def open_scene(database: str, room: Path) -> Iterator[Scene]:
    """A new registry of the given kind, gone at the end with every process that it started."""
    with ExitStack() as stack:
        disk = stack.enter_context(_small_disk(room / "disk"))
        root = disk or room
        library = _build_clock(room)
        clocks = {"host": Clock(room, "host", library)} if library else {}
        common = Settings(
            home=root / "one", threads=1, lease_s=LEASE_S, idle_s=10.0, job_timeout_s=120.0, actor="chaos"
        )
        postgres = broker = None
        machines = [common]
        if database != "sqlite":
            if library:
                clocks["database"] = Clock(room, "database", library)
                _open_to_others(room, library)
            postgres = stack.enter_context(postgres_server(clocks["database"].environment if library else None))
            for name in ("ledger", "mlflow"):
                postgres.run(f"CREATE DATABASE {name}")
                # the server of the tests answers before its log is written, and an immediate restart would then take
                # back what was committed
                postgres.run(f"ALTER DATABASE {name} SET synchronous_commit = on")
            shared = replace(
                common,
                database_url=postgres.url("ledger"),
                mlflow_uri=postgres.url("mlflow"),
                artifacts=(root / "artifacts").as_uri(),
            )
            if database == "celery":
                broker = stack.enter_context(running_broker())
                shared = replace(shared, broker_url=broker.url, ring_again_s=2.0)
            machines = [shared, replace(shared, home=root / "two")]
        for machine in machines:
            machine.home.mkdir()
        if database == "sqlite":
            for name in ("registry.db", "mlflow.db"):
                shutil.copy(_schemas() / name, common.home)
        scene = Scene(room, machines, postgres=postgres, broker=broker, disk=disk, clocks=clocks)
        stack.callback(scene.kill_all)
        yield scene


@cache
def _schemas() -> Path:
    """Empty databases to copy, for making their tables takes seconds; made once a process, and gone with it."""
    folder = Path(tempfile.mkdtemp(prefix="chaos-schemas-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    in_child(lambda: _make_schemas(folder))
    return folder


def _make_schemas(folder: Path) -> None:
    migrate(sqlite_url(folder))
    MlflowVersions(None, folder, "nobody").check_identity()


@contextmanager
def _small_disk(folder: Path) -> Iterator[Path | None]:
    """A filesystem of its own, so that it can be full without harm to others; None where we may not mount one."""
    folder.mkdir()
    options = f"size={DISK_MB}m,mode=0755"
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True)
    try:
        yield folder if mounted.returncode == 0 else None
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", "-l", str(folder)], check=False)


def _build_clock(room: Path) -> Path | None:
    library = room / "clock.so"
    command = ["cc", "-O2", "-shared", "-fPIC", "-o", str(library), str(HERE / "clock.c"), "-ldl", "-lm"]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return library


def _open_to_others(room: Path, library: Path) -> None:
    """PostgreSQL runs as another user, and has to read the library and its clock."""
    room.chmod(0o755)
    library.chmod(0o755)
    for file in room.glob("*.clock"):
        file.chmod(0o644)


def _all_processes() -> Iterator[tuple[int, list[str]]]:
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        with suppress(OSError):
            words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
            if words != [""]:  # a zombie has no words left
                yield int(folder.name), words


def _parent(pid: int) -> int:
    with suppress(OSError):
        # the second word is the name in brackets, which may hold anything
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def _end(process: subprocess.Popen[bytes] | None) -> None:
    if process is not None:
        process.send_signal(signal.SIGCONT)
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(15)
        process.kill()
        process.wait()


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)

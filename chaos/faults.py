"""What is done to a registry: kinds of faults, each with its end, and the one who injects them in a seeded order.

The order and the kinds come from the seed; what a fault meets depends on the moment, so a run is repeated in kind, not
in every step. A fault that finds nothing to strike at (no child runs) is not counted, and another one is drawn.
"""

from __future__ import annotations

import heapq
import itertools
import os
import random
import resource
import signal
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psycopg
from scene import LEASE_S, Scene

from adapterctl.registry.crashpoints import CRASH_POINTS

Undo = Callable[[], None]
Fault = Callable[["Injector"], bool]

#: A child of these tiny merges lives for half a second: who looks once rarely finds one.
TARGET_WITHIN_S = 2.0
POINTS = [point for point in CRASH_POINTS if not point.startswith(("eval.", "stage.", "submit.", "tune."))]


class Injector:
    """Injects faults into one scene, and takes back those that last."""

    def __init__(self, scene: Scene, seed: int, kinds: Sequence[str] = ()) -> None:
        self.scene = scene
        self.dice = random.Random(f"faults of {seed}")
        self.done: Counter[str] = Counter()
        self._undo: list[tuple[float, int, Undo]] = []
        self._number = itertools.count()
        asked = {name: FAULTS[name] for name in kinds or FAULTS}
        usable = {name: weight for name, (weight, fits, _) in asked.items() if fits(scene)}
        self._names, self._weights = list(usable), list(usable.values())
        self._drawn: tuple[str, float] | None = None

    def inject(self) -> bool:
        """One fault more, if what was drawn finds something to strike at; it may wait a little for that."""
        if self._drawn is None or time.monotonic() > self._drawn[1]:
            name = self.dice.choices(self._names, self._weights)[0]
            self._drawn = (name, time.monotonic() + TARGET_WITHIN_S)
        name = self._drawn[0]
        if not FAULTS[name][2](self):
            return False
        self._drawn = None
        self.done[name] += 1
        return True

    def later(self, seconds: float, undo: Undo) -> None:
        heapq.heappush(self._undo, (time.monotonic() + seconds, next(self._number), undo))

    def take_back(self, *, all_of_them: bool = False) -> None:
        while self._undo and (all_of_them or self._undo[0][0] <= time.monotonic()):
            heapq.heappop(self._undo)[2]()

    def strike(self, pids: Sequence[int], number: int) -> bool:
        """Send a signal to one of these processes."""
        if not pids:
            return False
        try:
            os.kill(self.dice.choice(sorted(pids)), number)
        except ProcessLookupError:
            return False
        return True

    def stop_for(self, pids: Sequence[int], seconds: float) -> bool:
        """Stop one of these processes, and let it go on later: it does not know that time has passed."""
        if not pids:
            return False
        pid = self.dice.choice(sorted(pids))
        try:
            os.kill(pid, signal.SIGSTOP)
        except ProcessLookupError:
            return False

        def go_on() -> None:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

        self.later(seconds, go_on)
        return True


def kill_child(by: Injector) -> bool:
    return by.strike(by.scene.children(), signal.SIGKILL)


def kill_supervisor(by: Injector) -> bool:
    return by.strike(by.scene.supervisors(), signal.SIGKILL)


def kill_both(by: Injector) -> bool:
    """A supervisor and every child, as when a machine's memory is gone."""
    children = by.scene.children()
    if not by.strike(by.scene.supervisors(), signal.SIGKILL):
        return False
    for pid in children:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return True


def kill_at_a_point(by: Injector) -> bool:
    """The next supervisor dies at a named point, or its child does."""
    if by.scene.armed:
        return False
    point = by.dice.choice(POINTS)
    by.scene.armed = {
        "ADAPTERCTL_CRASH_AT": point,
        "ADAPTERCTL_CRASH_ONCE": str(by.scene.room / f"died-{time.monotonic_ns()}"),
    }
    for pid in by.scene.main_processes() or by.scene.supervisors():  # it gives its job back, the next one is armed
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    return True


def terminate_supervisor(by: Injector) -> bool:
    return by.strike(by.scene.main_processes() or by.scene.supervisors(), signal.SIGTERM)


def kill_main_process(by: Injector) -> bool:
    """The pool process lives on for a moment, and must not go on working for long."""
    return by.strike(by.scene.main_processes(), signal.SIGKILL)


def kill_broker(by: Injector) -> bool:
    """Every message is gone with it; it comes back empty, after a while."""
    broker = by.scene.broker
    if broker is None or broker.process.poll() is not None:
        return False
    broker.stop()
    by.later(by.dice.uniform(0.5, 4.0), broker.start)
    return True


def empty_broker(by: Injector) -> bool:
    broker = by.scene.broker
    if broker is None or broker.process.poll() is not None:
        return False
    broker.client().flushall()
    return True


def stop_supervisor(by: Injector) -> bool:
    """Past the lease: when it goes on, it is a zombie."""
    return by.stop_for(by.scene.supervisors(), LEASE_S + by.dice.uniform(0.5, 2.0))


def stop_child(by: Injector) -> bool:
    return by.stop_for(by.scene.children(), by.dice.uniform(0.5, 2.0))


def kill_client(by: Injector) -> bool:
    processes = [each.process for each in (*by.scene.clients, *by.scene.listeners)]
    live = [process.pid for process in processes if process is not None and process.poll() is None]
    return by.strike(live, signal.SIGKILL)


def kill_server(by: Injector) -> bool:
    server = by.scene.server
    return server is not None and server.poll() is None and by.strike([server.pid], signal.SIGKILL)


def fill_disk(by: Injector) -> bool:
    """Every byte of the filesystem of the homes."""
    assert by.scene.disk is not None
    ballast = by.scene.disk / "ballast"
    if ballast.exists():
        return False
    with suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 20))
    by.later(by.dice.uniform(0.5, 2.0), lambda: ballast.unlink(missing_ok=True))
    return True


def forbid_long_files(by: Injector) -> bool:
    """Where no small disk can be made: what a supervisor writes beyond 64 KiB of a file is refused."""
    changed = []
    for pid in by.scene.supervisors():
        with suppress(ProcessLookupError):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (1 << 16, resource.RLIM_INFINITY))
            changed.append(pid)

    def allow() -> None:
        for pid in changed:
            with suppress(ProcessLookupError):
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    by.later(by.dice.uniform(0.5, 2.0), allow)
    return bool(changed)


def hold_mlflow(by: Injector) -> bool:
    """MLflow's database answers late."""
    return _hold(by, "mlflow.db", "mlflow", "runs", by.dice.uniform(1.0, 3.0))


def hold_ledger(by: Injector) -> bool:
    """The ledger answers so late that no lease can be renewed in time."""
    return _hold(by, "registry.db", "ledger", "job", LEASE_S + by.dice.uniform(0.0, 1.5))


def _hold(by: Injector, file: str, name: str, table: str, seconds: float) -> bool:
    if by.scene.postgres is not None:
        try:
            server = psycopg.connect(by.scene.postgres.url(name), connect_timeout=2)
            server.execute("SET lock_timeout = '2s'")
            server.execute(f"LOCK TABLE {table} IN EXCLUSIVE MODE")
        except psycopg.Error:
            return False
        by.later(seconds, server.close)
        return True
    holder = sqlite3.connect(by.scene.machines[0].home / file, timeout=2, isolation_level=None)
    try:
        holder.execute("BEGIN IMMEDIATE")
    except sqlite3.OperationalError:
        holder.close()
        return False
    by.later(seconds, holder.close)
    return True


def restart_postgres(by: Injector) -> bool:
    assert by.scene.postgres is not None
    by.scene.postgres.restart()
    return True


def lose_locks(by: Injector) -> bool:
    """The server drops every connection that holds a lock, while a supervisor sleeps past its lease.

    Where that one held the lock, it wakes up inside MLflow, and another one has registered the same meanwhile.
    """
    assert by.scene.postgres is not None
    held = "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND granted"
    try:
        with psycopg.connect(by.scene.postgres.url("ledger"), connect_timeout=2, autocommit=True) as server:
            if server.execute(held).fetchone() is None:
                return False
            by.stop_for(by.scene.supervisors(), LEASE_S + by.dice.uniform(0.5, 2.0))
            dropped = server.execute(f"SELECT pg_terminate_backend(pid) FROM ({held}) AS held").fetchall()
    except psycopg.Error:
        return False
    return bool(dropped)


def step_host_clock(by: Injector) -> bool:
    by.scene.clocks["host"].step(by.dice.choice((-3600.0, -60.0, 60.0, 3600.0)))
    return True


def step_database_clock(by: Injector) -> bool:
    """Forward only, or by less than a lease: back by an hour would make every lease that long, which delays jobs."""
    by.scene.clocks["database"].step(by.dice.choice((-1.0, 20.0, 3600.0)))
    return True


def with_broker(scene: Scene) -> bool:
    return scene.broker is not None


def always(scene: Scene) -> bool:
    return True


#: Name: how often it is drawn, where it can be injected, and what it does.
FAULTS: Mapping[str, tuple[int, Callable[[Scene], bool], Fault]] = {
    "kill supervisor": (18, always, kill_supervisor),
    "kill child": (18, always, kill_child),
    "kill supervisor and child": (4, always, kill_both),
    "kill at a named point": (18, always, kill_at_a_point),
    "terminate supervisor": (4, always, terminate_supervisor),
    "stop supervisor past its lease": (8, always, stop_supervisor),
    "kill worker's main process": (8, with_broker, kill_main_process),
    "Redis killed": (6, with_broker, kill_broker),
    "Redis emptied (FLUSHALL)": (6, with_broker, empty_broker),
    "stop child": (3, always, stop_child),
    "kill client": (8, always, kill_client),
    "kill server": (3, lambda scene: scene.server is not None, kill_server),
    "disk full": (5, lambda scene: scene.disk is not None, fill_disk),
    "file size limit": (5, lambda scene: scene.disk is None, forbid_long_files),
    "MLflow's database held": (4, always, hold_mlflow),
    "ledger held past the lease": (4, always, hold_ledger),
    "lock's connection dropped": (6, lambda scene: scene.postgres is not None, lose_locks),
    "PostgreSQL restarted at once": (10, lambda scene: scene.postgres is not None, restart_postgres),
    "clock of the machines stepped": (5, lambda scene: "host" in scene.clocks, step_host_clock),
    "clock of the database stepped": (3, lambda scene: "database" in scene.clocks, step_database_clock),
}


def died_at_points(room: Path) -> int:
    """How many of those that were armed did die at their point."""
    return len(list(room.glob("died-*")))

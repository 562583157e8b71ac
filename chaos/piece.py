"""One piece of chaos: a seed, a database, so many merges under so many faults; then quiet, and the verdict."""

from __future__ import annotations

import os
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from faults import Injector, died_at_points
from listener import last_heard
from model import Model, make_model, make_parents, share_out
from scene import Scene, open_scene
from verdict import LOST, Verdict, judge, read_accepted

from adapterctl.registry.domain.errors import AdapterctlError, Conflict
from adapterctl.registry.domain.job import ENDED, LIVE, JobState
from adapterctl.registry.ports import Ledger

TICK_S = 0.05
#: Between two faults at most, where no job ended meanwhile; and between two looks at the queue.
PATIENCE_S, LOOK_EVERY_S = 4.0, 0.3
#: Errors that faults cause. A job that met them as often as it may be tried has failed, visibly, and is tried again.
PASSING = ("worker_lost", "crashed", "unavailable", "conflict", "failure")


@dataclass(frozen=True)
class Piece:
    seed: int
    database: str
    jobs: int
    faults: int
    clients: int = 3
    served: bool = True
    limit_s: float = 1200.0
    kinds: Sequence[str] = ()


@dataclass(frozen=True)
class Result:
    """What happened. `used_up` counts jobs that failed as often as they may be tried, and were tried again."""

    faults: Counter[str]
    died_at_points: int
    used_up: int
    seconds: float
    verdict: Verdict


def run_piece(piece: Piece, room: Path | None = None) -> Result:
    """Run it in a folder of its own, which is gone afterwards."""
    folder = tempfile.TemporaryDirectory(prefix="chaos-", dir=room)
    with folder as name, open_scene(piece.database, Path(name)) as scene:
        return _run(piece, scene)


def _run(piece: Piece, scene: Scene) -> Result:
    begun = time.monotonic()
    parents = make_parents(scene.room / "parents")
    model = make_model(piece.seed, piece.jobs, parents, scene.room / "undisturbed")
    for name, parent in parents.items():
        scene.registry.register(str(parent), name=name)
    scene.start_clients(model, share_out(model, piece.clients, piece.seed), served=piece.served)
    scene.tend()
    injector = Injector(scene, piece.seed, piece.kinds)
    used_up = disturb(piece, scene, injector, deadline=begun + piece.limit_s)
    injector.take_back(all_of_them=True)
    used_up += come_to_rest(scene, deadline=begun + piece.limit_s)
    hear_out(scene)
    scene.end()
    return Result(injector.done, died_at_points(scene.room), used_up, time.monotonic() - begun, pronounce(scene, model))


def disturb(piece: Piece, scene: Scene, injector: Injector, *, deadline: float) -> int:
    """Inject faults, evenly over the jobs as they end, until all were injected and every merge was accepted.

    Returns how many jobs had to be told to try again.
    """
    last = looked = time.monotonic()
    ended = told = 0
    while time.monotonic() < deadline:
        scene.tend()
        injector.take_back()
        now = time.monotonic()
        if now - looked >= LOOK_EVERY_S:
            looked, ended = now, _count(scene.registry.ledger, ended)
            told += _retry_failed(scene)
        done = injector.done.total()
        if done >= piece.faults:
            if all(client.finished for client in scene.clients):
                break
        elif now - last >= (PATIENCE_S if ended * piece.faults < done * piece.jobs else 0.3) and injector.inject():
            last = time.monotonic() + injector.dice.uniform(0.0, 0.5)
        time.sleep(TICK_S)
    return told


def come_to_rest(scene: Scene, *, deadline: float) -> int:
    """Without faults, until nothing is queued or running; returns how many jobs had to be told to try again."""
    told = 0
    while time.monotonic() < deadline:
        scene.tend()
        told += _retry_failed(scene)
        with suppress(AdapterctlError):
            if not scene.registry.ledger.jobs(states=sorted(LIVE), limit=1) and all(c.finished for c in scene.clients):
                return told
        time.sleep(LOOK_EVERY_S)
    return told


def hear_out(scene: Scene, patience_s: float = 60.0) -> None:
    """Until every listener has heard of the last event, or should have."""
    _, last = scene.registry.ledger.feed(None, limit=1)
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline and any(last_heard(each.heard) < last for each in scene.listeners):
        scene.tend()
        time.sleep(LOOK_EVERY_S)


def pronounce(scene: Scene, model: Model) -> Verdict:
    told = Verdict()
    accepted = read_accepted([client.accepted for client in scene.clients], told)
    heard = [listener.heard for listener in scene.listeners]
    verdict = judge(scene.registry, scene.machines, model, accepted, heard)
    for message in told.findings.get(LOST, ()):
        verdict.add(LOST, message)
    return verdict


def _retry_failed(scene: Scene) -> int:
    """What people do who find a failed job whose error has passed: `adapterctl jobs retry`."""
    ledger, told = scene.registry.ledger, 0
    with suppress(AdapterctlError):  # the ledger does not answer now
        for job in ledger.jobs(states=[JobState.FAILED], limit=1000):
            if (job.error or {}).get("code") in PASSING:
                with suppress(Conflict):  # the same merge was asked for again meanwhile
                    ledger.retry(job.id)
                    told += 1
    return told


def _count(ledger: Ledger, before: int) -> int:
    """How many jobs have ended; the last known number where the ledger does not answer now."""
    try:
        return len(ledger.jobs(states=sorted(ENDED), limit=100_000))
    except AdapterctlError:
        return before


def load() -> float:
    return os.getloadavg()[0]

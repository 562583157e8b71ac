"""Many at once, over and over: promoters of one stage, executors of one recipe; and a queue that is very long.

Each contest returns its figures, and what it found: nothing, where all is well.
"""

from __future__ import annotations

import multiprocessing
import random
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

from forks import all_of, in_child, open_quietly
from model import make_model, make_parents
from scene import Scene
from tiny import write_tiny_adapter
from verdict import Accepted, judge

from adapterctl.bootstrap import job_handlers
from adapterctl.registry.domain.errors import Conflict, StageMoved
from adapterctl.registry.domain.job import Job, JobState, NewJob
from adapterctl.registry.domain.recipe import MergeRequest
from adapterctl.registry.domain.refs import parse_parent
from adapterctl.registry.domain.stage import verify_chain
from adapterctl.registry.domain.version import AdapterVersion
from adapterctl.registry.services.promote import Stages
from adapterctl.registry.settings import Settings
from adapterctl.workers.runner import Conversation, run
from adapterctl.workers.supervisor import Supervisor

STAGE = "production"


@dataclass
class Outcome:
    """What a contest has to tell."""

    figures: dict[str, Any] = field(default_factory=dict)
    findings: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, message: str) -> None:
        self.findings.setdefault(kind, []).append(message)


# promoters


def promote(scene: Scene, *, promoters: int, rounds: int) -> Outcome:
    """In each round everybody has seen the same holder, and moves the stage to a version of its own."""
    settings = scene.machines[0]
    in_child(lambda: _register_many(settings, scene.room, 2 * promoters))
    gate = multiprocessing.get_context("fork").Barrier(promoters)
    begun = time.monotonic()
    answers = all_of([lambda n=n: _promote(settings, n, rounds, gate) for n in range(promoters)])  # type: ignore[misc]
    outcome = Outcome(
        {
            "promoters": promoters,
            "rounds": rounds,
            "moves": sum(each.count("won") for each in answers),
            "refused": sum(each.count("moved") for each in answers),
            "seconds": round(time.monotonic() - begun),
        }
    )
    for number, round_ in enumerate(zip(*answers, strict=True)):
        if round_.count("won") != 1:
            outcome.add("winners", f"round {number} had {round_.count('won')}")
    for message in in_child(lambda: _disagreements(settings, rounds)):
        outcome.add("disagreement", message)
    return outcome


def _register_many(settings: Settings, room: Path, count: int) -> None:
    registry = open_quietly(settings)
    for seed in range(count):
        registry.register(str(write_tiny_adapter(room / f"version-{seed}", seed=seed)), name="chat")


def _promote(settings: Settings, number: int, rounds: int, gate: Barrier) -> list[str]:
    registry = open_quietly(settings)
    pair = [registry.ledger.version_by_number("chat", 2 * number + k) for k in (1, 2)]
    adapter_id = registry.ledger.adapter_id("chat")
    assert adapter_id is not None

    @contextmanager
    def folders(version: AdapterVersion) -> Iterator[Path]:
        """Files are opened when the holder has been seen: there everybody waits for the others."""
        gate.wait(120)
        with registry.folders(version) as folder:
            yield folder

    stages = Stages(registry.ledger, registry.version_store, folders, (STAGE,), f"promoter {number}")
    answers = []
    for _ in range(rounds):
        gate.wait(120)
        holder = registry.ledger.stage_holder(adapter_id, STAGE)
        mine = next(version for version in pair if version is not None and version.id != holder)
        try:
            stages.promote(mine, stage=STAGE)
            answers.append("won")
        except StageMoved:
            answers.append("moved")
        gate.wait(120)  # nobody looks before the last one is through
    return answers


def _disagreements(settings: Settings, rounds: int) -> list[str]:
    registry = open_quietly(settings)
    adapter_id = registry.ledger.adapter_id("chat")
    assert adapter_id is not None
    events = registry.ledger.stage_history(adapter_id)
    found = [str(each) for each in verify_chain(events)]
    if len(events) != rounds:
        found.append(f"the history has {len(events)} rows after {rounds} rounds")
    holder = registry.ledger.stage_holder(adapter_id, STAGE)
    held = registry.ledger.versions_by_id([holder or ""])
    number = held[holder].number if holder in held else None
    if not events or holder != events[-1].version_id:
        found.append("the last row of the history is not the holder")
    if registry.version_store.alias("chat", STAGE) != number:
        found.append(f"the alias is {registry.version_store.alias('chat', STAGE)}, the ledger says {number}")
    return found


# executors


def race(scene: Scene, *, races: int) -> Outcome:
    """Two executors, each sure that the job is its own, register one merge at the same moment."""
    settings = scene.machines
    parents = make_parents(scene.room / "parents")
    model = make_model(1, races, parents, scene.room / "undisturbed")
    in_child(lambda: _register_all(settings[0], parents))
    gate = multiprocessing.get_context("fork").Barrier(2)
    begun = time.monotonic()
    first, second = all_of(
        [
            lambda: _race(settings[0], gate, model, first=True),
            lambda: _race(settings[-1], gate, model, first=False),
        ]
    )
    accepted = [Accepted(**each) for each in second["accepted"]]
    verdict = in_child(lambda: asdict(judge(open_quietly(settings[0]), settings, model, accepted)))
    return Outcome(
        {
            "races": races,
            "registered by the rightful one": second["won"],
            "by the one that lost its lease": first["won"],
            "versions": verdict["versions"],
            "seconds": round(time.monotonic() - begun),
        },
        verdict["findings"],
    )


def _register_all(settings: Settings, parents: dict[str, Path]) -> None:
    registry = open_quietly(settings)
    for name, folder in parents.items():
        registry.register(str(folder), name=name)


def _race(settings: Settings, gate: Barrier, model: Any, *, first: bool) -> dict[str, Any]:
    """The first one claims each job with a lease that is over at once; the second one takes it over."""
    registry = open_quietly(settings)
    _ = registry.version_store
    handler = job_handlers(registry)["merge"]
    dice = random.Random(first)
    accepted, won = [], 0
    for wanted in model.wanted:
        if first:
            gate.wait(120)
            job = registry.ledger.claim("first", -1)
        else:
            parents = tuple(parse_parent(f"{model.label(name)}={weight!r}") for name, weight in wanted.parents)
            submitted = registry.merge(MergeRequest(parents, into=wanted.into))
            assert submitted.job is not None
            accepted.append(asdict(Accepted(wanted.number, submitted.recipe_digest, submitted.job.id)))
            gate.wait(120)
            job = _take_over(registry.ledger, submitted.job.id)
        assert job is not None
        with handler.begin(job) as task:
            result = run(task.body, Quiet())  # type: ignore[union-attr]
            gate.wait(120)
            time.sleep(dice.choice((0.0, 0.0, 0.01, 0.03)))
            try:
                handler.finish(job, task, result)  # type: ignore[arg-type]
                won += 1
            except Conflict:
                pass  # it has lost, and knows
        gate.wait(120)
    return {"accepted": accepted, "won": won}


class Quiet(Conversation):
    """A child that is no child: nobody listens to its progress."""

    def say(self, line: Mapping[str, Any]) -> None:
        return


def _take_over(ledger: Any, job_id: str) -> Job | None:
    while ledger.job(job_id).state is JobState.QUEUED:  # until the other one has it
        time.sleep(0.002)
    ledger.reap()
    job: Job | None = ledger.claim("second", 120)
    return job


# a long queue


def drain(scene: Scene, *, rows: int, real: int) -> Outcome:
    """Jobs at the head of a queue of `rows`, and jobs of a short queue, in turns: does the length cost anything?"""
    settings = scene.machines[0]
    parents = make_parents(scene.room / "parents")
    in_child(lambda: _register_all(settings, parents))
    return Outcome(**in_child(lambda: _drain(settings, rows, real)))


def _drain(settings: Settings, rows: int, real: int) -> dict[str, Any]:
    registry = open_quietly(settings)
    supervisor = Supervisor(registry.ledger, job_handlers(registry), settings)
    _ = registry.version_store

    def submit(number: int) -> None:
        parents = (parse_parent(f"ada:v1={1 + number / 1e6!r}"), parse_parent("bob:v1"))
        registry.merge(MergeRequest(parents, into=f"drained-{number % 8}"))

    def work(count: int) -> list[float]:
        times = []
        for _ in range(count):
            begun = time.monotonic()
            supervisor.run_next()
            times.append(time.monotonic() - begun)
        return times

    half = real // 2
    for number in range(half):
        submit(number)
    short = work(half)
    for number in range(half, real):
        submit(number)
    for number in range(rows - (real - half)):  # they wait behind the real ones, and are never reached
        registry.ledger.submit(NewJob("merge", f"waiting {number}", "waits", {}, "chaos"))
    long = work(real - half)
    states = [job.state for job in registry.ledger.jobs(limit=rows + real)]
    found: dict[str, list[str]] = {}
    if states.count(JobState.SUCCEEDED) != real:
        found["lost"] = [f"{states.count(JobState.SUCCEEDED)} of {real} jobs succeeded"]
    figures = {
        "queued rows": rows,
        "real jobs": real,
        "median of a job in a short queue": f"{statistics.median(short):.2f} s",
        "in the long one": f"{statistics.median(long):.2f} s",
        "ratio": round(statistics.median(long) / statistics.median(short), 2),
    }
    return {"figures": figures, "findings": found}

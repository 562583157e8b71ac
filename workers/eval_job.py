"""Evaluate subjects on suites: what the evaluation child does between its task and its result.

A pure function of files: base, adapters and suites in, reports out. Each report is a file of its own that appears at
once, and so is each task of one that is not complete: what an interrupted evaluation has finished is computed once.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..examples import BASE_NAME
from ..examples.base import build_base
from ..registry.crashpoints import reached
from ..registry.domain.errors import Corrupt, JobCancelled
from ..registry.domain.eval_plan import EvalPlan, Pair
from ..registry.domain.evals import EvalReport, TaskResult, task_result
from ..registry.domain.suite import Row, SuiteTask
from ..registry.wire import from_builtins, from_json, to_json

if TYPE_CHECKING:
    from .eval_engine import Engine

Emit = Callable[[Mapping[str, Any]], None]

# Nothing may reach for the network, and bars belong to people at a terminal.
QUIET = {
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
    # threads that spin while they wait made an evaluation ten times slower beside other work
    "OMP_WAIT_POLICY": "PASSIVE",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_OFFLINE": "1",
}


def run(task: Mapping[str, Any], emit: Emit, should_stop: Callable[[], bool]) -> dict[str, Any]:
    """Make the reports of `task["plan"]` in the folder `task["out"]`; the result names their files.

    Finished tasks lie beside that folder until their report is taken in, for the next attempt has another.

    Raises `JobCancelled` between two batches once `should_stop` says so.
    """
    be_quiet()
    from .eval_engine import Engine  # deferred: torch, transformers, peft and lm_eval take 5 to 10 s

    plan, out = from_builtins(task["plan"], EvalPlan), Path(task["out"])
    progress = _Progress(plan.samples, emit, should_stop)
    engine = Engine(
        base_of(Path(plan.base_folder)),
        device=plan.engine["device"],
        dtype=plan.engine["dtype"],
        batch_size=int(plan.engine["batch_size"]),
        threads=task.get("threads") or threads_of(),
        tick=progress.tick,
    )
    folders = {subject.digest: Path(subject.folder) if subject.folder else None for subject in plan.subjects}
    labels = {subject.digest: subject.label for subject in plan.subjects}
    files = []
    for digest, pairs in groupby(plan.pairs, attrgetter("subject")):
        with engine.subject(folders[digest]):
            for pair in pairs:
                progress.begin(f"evaluate {labels[digest]} on {plan.suites[pair.suite].name}")
                files.append(_write(out / f"{pair.key}.json", _evaluate(engine, plan, pair, out.parent, progress)))
    engine.check_base()
    return {"reports": files}


def be_quiet() -> None:
    """Tell the libraries so before they are imported, for that is when they read it."""
    os.environ.update(QUIET)
    # once imported it asks for `kernels`, which would fetch what it runs from the network
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def threads_of() -> int:
    """Half of our processors: with one thread on each, whatever else runs makes every step of all of them wait."""
    ours = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, ours // 2)


def base_of(folder: Path) -> Path:
    """The base model; the one of the examples is made where it is not there yet."""
    return build_base(folder) if folder.name == BASE_NAME else folder


@dataclass(frozen=True, slots=True)
class _Finished:
    """What is kept of a task until all of its suite are done."""

    result: TaskResult
    outputs: tuple[Mapping[str, Any], ...]
    seconds: float


def _evaluate(engine: Engine, plan: EvalPlan, pair: Pair, beside: Path, progress: _Progress) -> EvalReport:
    suite = plan.suites[pair.suite]
    done = []
    for position, task in enumerate(suite.tasks):
        path = beside / f"{pair.key}-{position}.task"
        finished = _read(path)
        if finished is None:
            finished = _answer(engine, task, task.samples(plan.limit))
            _write(path, finished)
            reached("eval.task")
        else:
            progress.tick(plan.cost_of_task(task))
        done.append(finished)
    return EvalReport(
        key=pair.key,
        subject=pair.subject,
        base_id=plan.base_id,
        suite=suite.name,
        suite_digest=pair.suite,
        limit=plan.limit,
        engine=plan.engine,
        tasks=tuple(each.result for each in done),
        seconds=round(sum(each.seconds for each in done), 3),
        outputs=tuple(row for each in done for row in each.outputs),
    )


def _answer(engine: Engine, task: SuiteTask, rows: Sequence[Row]) -> _Finished:
    started = time.monotonic()
    answers = engine.answer(task, rows)
    result = task_result(task.name, task.metrics, task.primary, answers.samples)
    outputs = tuple(
        {"task": task.name, "id": row.id, "output": text}
        for row, text in zip(rows, answers.texts, strict=bool(answers.texts))
    )
    return _Finished(result, outputs, time.monotonic() - started)


def _read(path: Path) -> _Finished | None:
    """A task that an earlier attempt finished; None where there is none, or what is there cannot be read."""
    try:
        return from_json(path.read_bytes(), _Finished)
    except (FileNotFoundError, Corrupt):
        return None


def _write(path: Path, done: EvalReport | _Finished) -> str:
    """Let the file appear at once, whole; returns its name."""
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(to_json(done))
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)
    return path.name


class _Progress:
    """Counts samples over the whole plan, and is where an evaluation stops when it is told to."""

    def __init__(self, total: int, emit: Emit, should_stop: Callable[[], bool]) -> None:
        self._done, self._total, self._emit, self._should_stop = 0, total, emit, should_stop
        self.begin("load the base")

    def begin(self, stage: str) -> None:
        self._stage = stage
        self._tell()

    def tick(self, samples: int) -> None:
        if self._should_stop():
            raise JobCancelled("the evaluation was stopped; finished reports are kept")
        self._done += samples
        self._tell()

    def _tell(self) -> None:
        self._emit({"progress": {"stage": self._stage, "done": self._done, "total": self._total}})

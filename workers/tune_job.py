"""Search the weights of a merge: what the tuning child does between its task and its result.

No candidate is merged to disk. The parents' factors and their Gram matrices are read once; a candidate is a few small
products of them, put into one slot of the loaded model, with the same bits as the file that a merge would write.
Everything found is a line of a journal before anything follows from it, and what is tried next depends on the journal
and the seed alone: a search that was killed goes on as if nothing had happened, and tries nothing twice.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..registry.crashpoints import reached
from ..registry.domain.adapter import TORCH_DTYPES
from ..registry.domain.errors import JobCancelled
from ..registry.domain.eval_plan import BASE
from ..registry.domain.evals import Interval, kept, least_difference
from ..registry.domain.plan import ModulePlan
from ..registry.domain.suite import Row
from ..registry.domain.tuning import (
    HIGHEST,
    LOWEST,
    PLAIN,
    RUNGS,
    STEP,
    Finding,
    HeldOut,
    Margin,
    Trial,
    TunePlan,
    choose_finalists,
    front,
    goes_on,
    held_out,
    margin,
    share,
)
from ..registry.merging.make import KnownGrams, arithmetic, factors_of
from ..registry.merging.method import find_method
from ..registry.merging.stack import Stack, coefficients, load_stack
from ..registry.merging.tensors import TensorReader
from ..registry.wire import from_builtins, to_builtins
from .engine import WEIGHTS_FILE, for_each_module
from .eval_job import base_of, be_quiet, threads_of

if TYPE_CHECKING:
    import torch

    from .eval_engine import Engine

Emit = Callable[[Mapping[str, Any]], None]
Samples = list[dict[str, float]]

#: Candidates drawn at random before the surrogate proposes.
STARTUP = 8
#: So often a proposal that was tried already is drawn again before the search ends for want of new ones.
REDRAWS = 50


def run(task: Mapping[str, Any], emit: Emit, should_stop: Callable[[], bool]) -> dict[str, Any]:
    """Carry out `task["plan"]` with its journal in the file `task["journal"]`; the result is a `Finding`.

    Raises `JobCancelled` between two batches once `should_stop` says so.
    """
    be_quiet()
    plan = from_builtins(task["plan"], TunePlan)
    with Journal(Path(task["journal"]), plan.digest) as journal:
        bench = Bench(plan, emit, should_stop, threads=task.get("threads") or threads_of())
        finding = Search(plan, journal, bench).run()
        bench.close()
    return {"finding": to_builtins(finding)}


class Journal:
    """`trials.jsonl`: one JSON object a line, durable when `add` returns. The first line says which search it is of.

    A last line that was cut off is removed; the journal of another search is begun anew.
    """

    def __init__(self, path: Path, search: str) -> None:
        self._path = path
        head = {"search": search}
        lines = _whole_lines(path)
        self.records: list[dict[str, Any]] = lines[1:] if lines and lines[0] == head else []
        partial = path.with_name(f".{path.name}.partial")
        with partial.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in (head, *self.records))
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)

    def add(self, record: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.records.append(dict(record))

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [record[kind] for record in self.records if kind in record]

    def __enter__(self) -> Journal:
        self._file = self._path.open("a", encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
            if not line.endswith("\n"):
                break
            try:
                lines.append(json.loads(line))
            except ValueError:  # what stands behind damage was built on it
                break
    return lines


def propose(trials: Sequence[Trial], plan: TunePlan) -> tuple[int, tuple[float, ...]] | None:
    """The kind and the weights to try next; None where nothing new is left.

    A function of its arguments: the sampler is made anew each time, seeded with the place in the search.
    """
    count, groups = len(plan.parents), max(1, len(plan.groups))
    if len(trials) == PLAIN:
        return 0, (1.0,) * count * groups
    if len(trials) <= count:  # each parent ahead of the others, once
        return 0, tuple(1.0 if i == len(trials) - 1 else 0.5 for i in range(count)) * groups
    import optuna  # deferred: a second, and only a search needs it

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    # groups of layers part where the surrogate proposes: a random point among so many weights is a bad one
    parted = groups if len(trials) >= STARTUP else 1
    space: dict[str, optuna.distributions.BaseDistribution] = {
        f"w{i}": optuna.distributions.FloatDistribution(LOWEST, HIGHEST, step=STEP) for i in range(count * parted)
    }
    if len(plan.kinds) > 1:
        space["kind"] = optuna.distributions.CategoricalDistribution(tuple(range(len(plan.kinds))))
    seed = (plan.seed * 1_000_003 + len(trials)) % 2**32
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=STARTUP)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    study.add_trials([_frozen(trial, space) for trial in trials])
    tried = {(trial.kind, trial.weights) for trial in trials}
    for _ in range(REDRAWS):
        params = study.ask(space).params
        drawn = tuple(round(params[f"w{i}"], 2) for i in range(count * parted))
        kind, weights = params.get("kind", 0), drawn * (groups // parted)
        if (kind, weights) not in tried:
            return kind, weights
    return None


def _frozen(trial: Trial, space: Mapping[str, Any]) -> Any:
    from optuna.trial import TrialState, create_trial  # deferred: see propose

    params: dict[str, Any] = {f"w{i}": weight for i, weight in enumerate(trial.weights) if f"w{i}" in space}
    if "kind" in space:
        params["kind"] = trial.kind
    return create_trial(
        state=TrialState.COMPLETE if trial.complete else TrialState.PRUNED,
        value=trial.worst if trial.complete else None,
        params=params,
        distributions=dict(space),
        intermediate_values=dict(enumerate(trial.rungs)),
    )


class Search:
    """One search over its journal; the bench does the looking."""

    def __init__(self, plan: TunePlan, journal: Journal, bench: Bench) -> None:
        self._plan, self._journal, self._bench = plan, journal, bench
        self._trials = [from_builtins(record, Trial) for record in journal.of("trial")]
        self._seen: dict[int, list[Samples]] = {
            record["trial"]["number"]: record["samples"] for record in journal.records if "samples" in record
        }
        self._used = sum(trial.samples for trial in self._trials)

    def run(self) -> Finding:
        self._bench.used = self._used
        base, *parents = [self._reference(i) for i in range(-1, len(self._plan.parents))]
        owners = [self._owner(task, parents) for task in range(len(self._plan.tasks))]
        while self._affords(self._step(0)) and (found := propose(self._trials, self._plan)) is not None:
            self._try(*found, parents, owners)
        ranks = [kind.recipe.rank for kind in self._plan.kinds]
        numbers, margins = choose_finalists(
            self._trials, ranks, self._plan.finalists, lambda trial: self._margin(trial, base)
        )
        samples = {number: self._hold_out(number) for number in dict.fromkeys([*numbers, PLAIN])}
        self._bench.check()
        return Finding(
            trials=tuple(self._trials),
            front=tuple(front(self._trials)),
            finalists=tuple(numbers),
            owners=tuple(owners),
            heldout=tuple(self._rows(samples, base, parents, owners)),
            against_plain=tuple(self._against_plain(samples, base, numbers[0])),
            used=(self._used + len(samples) * self._plan.heldout_samples) / self._plan.tuning_samples,
            margins=tuple(margins),
            less_plain=self._less_plain(samples, parents, owners, numbers[0]),
        )

    def _reference(self, subject: int) -> list[Samples]:
        """What the base (-1) or a parent scores on every task, tuning samples first and held-out ones behind."""
        known = {
            record["task"]: record["samples"] for record in self._journal.of("reference") if record["of"] == subject
        }
        label = BASE if subject < 0 else self._plan.parents[subject].label
        for place, task in enumerate(self._plan.tasks):
            if place not in known:
                rows = (*task.tuning, *task.heldout)
                known[place] = self._bench.look(self._bench.reference(subject), place, rows, f"look at {label}")
                self._journal.add({"reference": {"of": subject, "task": place, "samples": known[place]}})
        return [known[place] for place in range(len(self._plan.tasks))]

    def _owner(self, place: int, parents: Sequence[list[Samples]]) -> int:
        """Of the parents that a task belongs to, the one that does best on its tuning samples."""
        task = self._plan.tasks[place]
        sign = 1 if task.metric.direction == "higher" else -1
        seen = len(task.tuning)
        return max(task.owners, key=lambda i: sign * task.metric.score(parents[i][place][:seen]))

    def _try(
        self, kind: int, weights: tuple[float, ...], parents: Sequence[list[Samples]], owners: Sequence[int]
    ) -> None:
        """Look at a candidate rung by rung, until it falls behind or the budget ends."""
        number = len(self._trials)
        label = f"trial {number}: {self._plan.kinds[kind].recipe.method} {' '.join(f'{w:g}' for w in weights)}"
        found: list[Samples] = [[] for _ in self._plan.tasks]
        rungs: list[float] = []
        samples = 0
        with self._bench.candidate(kind, weights):
            for rung in range(len(RUNGS)):
                if rungs and not self._stays(number, rungs, samples):
                    break
                rows = [
                    task.tuning[len(seen) : task.seen(rung)] for task, seen in zip(self._plan.tasks, found, strict=True)
                ]
                for seen, answers in zip(found, self._bench.answers(rows, label), strict=True):
                    seen += answers
                samples += sum(map(len, rows))
                shares = tuple(
                    share(task.metric, parents[owners[place]][place][: len(found[place])], found[place])
                    for place, task in enumerate(self._plan.tasks)
                )
                rungs.append(min(shares))
        trial = Trial(number, kind, weights, samples, shares, tuple(rungs))
        if trial.complete:
            self._seen[number] = found
        # one line: the samples decide who wins, so a trial without its own would end another way after a kill
        self._journal.add({"trial": to_builtins(trial)} | ({"samples": found} if trial.complete else {}))
        self._trials.append(trial)
        self._used += samples
        reached("tune.trial")

    def _margin(self, trial: Trial, base: list[Samples]) -> Margin:
        place = self._trials[PLAIN].binding
        task, plain = self._plan.tasks[place], self._seen[PLAIN][place]
        rows = base[place][: len(task.tuning)]
        return margin(trial.number, place, task.metric, rows, plain, self._seen[trial.number][place])

    def _stays(self, number: int, rungs: Sequence[float], samples: int) -> bool:
        if number == PLAIN:  # what all others are held against is looked at in full
            return True
        place = len(rungs) - 1
        others = [trial.rungs[place] for trial in self._trials if len(trial.rungs) > place]
        return goes_on(rungs[place], others) and self._affords(samples + self._step(len(rungs)))

    def _affords(self, samples: int) -> bool:
        limit = self._plan.budget * self._plan.tuning_samples - self._plan.reserved
        return self._used + samples <= limit

    def _step(self, rung: int) -> int:
        """Samples of a rung that the one before it did not have."""
        return sum(task.seen(rung) - (task.seen(rung - 1) if rung else 0) for task in self._plan.tasks)

    def _hold_out(self, number: int) -> list[Samples]:
        known = {record["task"]: record["samples"] for record in self._journal.of("final") if record["of"] == number}
        trial = self._trials[number]
        for place, task in enumerate(self._plan.tasks):
            if place not in known:
                candidate = self._bench.candidate(trial.kind, trial.weights)
                known[place] = self._bench.look(candidate, place, task.heldout, f"hold out trial {number}")
                self._journal.add({"final": {"of": number, "task": place, "samples": known[place]}})
        return [known[place] for place in range(len(self._plan.tasks))]

    def _rows(
        self,
        samples: Mapping[int, list[Samples]],
        base: list[Samples],
        parents: Sequence[list[Samples]],
        owners: Sequence[int],
    ) -> Iterator[HeldOut]:
        for number, found in samples.items():
            for place, task in enumerate(self._plan.tasks):
                seen = len(task.tuning)
                parent = parents[owners[place]][place][seen:]
                yield held_out(number, place, task.metric, base[place][seen:], parent, found[place])

    def _against_plain(
        self, samples: Mapping[int, list[Samples]], base: list[Samples], winner: int
    ) -> Iterator[Interval | None]:
        for place, task in enumerate(self._plan.tasks):
            plain = samples[PLAIN][place]
            yield kept(task.metric, base[place][len(task.tuning) :], plain, samples[winner][place]).retention

    def _less_plain(
        self, samples: Mapping[int, list[Samples]], parents: Sequence[list[Samples]], owners: Sequence[int], winner: int
    ) -> Interval | None:
        return least_difference(
            [
                (
                    task.metric,
                    (parents[owners[place]][place][len(task.tuning) :], samples[winner][place], samples[PLAIN][place]),
                )
                for place, task in enumerate(self._plan.tasks)
            ]
        )


class Bench:
    """The loaded model with the parents' factors beside it; both are loaded when something has to be looked at."""

    def __init__(self, plan: TunePlan, emit: Emit, should_stop: Callable[[], bool], *, threads: int) -> None:
        self._plan, self._emit, self._should_stop, self._threads = plan, emit, should_stop, threads
        self._open = ExitStack()
        self._loaded: dict[type[np.floating], Mapping[str, tuple[Stack, KnownGrams]]] = {}
        self._stage = "load the base"
        self.used = 0
        references = (1 + len(plan.parents)) * (plan.tuning_samples + plan.heldout_samples)
        self._total = plan.budget * plan.tuning_samples + references
        self._tell()

    def reference(self, subject: int) -> AbstractContextManager[None]:
        """The base (-1) or a parent, as it is."""
        folder = self._plan.parents[subject].folder if subject >= 0 else None
        return self.engine.subject(Path(folder) if folder else None)

    def candidate(self, kind: int, weights: Sequence[float]) -> AbstractContextManager[None]:
        """The merge of the parents by this kind and these weights, made in memory."""
        return self.engine.candidate(self._slot, self._tensors(kind, weights))

    def look(self, subject: AbstractContextManager[None], place: int, rows: Sequence[Row], stage: str) -> Samples:
        """Statistics of a subject on rows of one task."""
        with subject:
            return self.answers([rows if i == place else () for i in range(len(self._plan.tasks))], stage)[place]

    def answers(self, rows: Sequence[Sequence[Row]], stage: str) -> list[Samples]:
        """Statistics of the active subject on rows of each task."""
        self._stage = stage
        self._tell()
        asked = [(task.task, these) for task, these in zip(self._plan.tasks, rows, strict=True)]
        answers = self.engine.answers(asked)
        self.used += sum(map(len, rows))
        return [each.samples for each in answers]

    def check(self) -> None:
        """Raise `Corrupt` where all the swapping changed the base."""
        if "engine" in self.__dict__:
            self.engine.check_base()

    def close(self) -> None:
        self._open.close()

    @cached_property
    def engine(self) -> Engine:
        from .eval_engine import Engine  # deferred: torch and the rest, unless the journal is complete

        return Engine(
            base_of(Path(self._plan.base_folder)),
            device=self._plan.engine["device"],
            dtype=self._plan.engine["dtype"],
            batch_size=int(self._plan.engine["batch_size"]),
            threads=self._threads,
            tick=self._tick,
        )

    @property
    def _slot(self) -> Mapping[str, Any]:
        """The adapter config of the kind with the largest rank: the others fit into it."""
        return max(self._plan.kinds, key=lambda kind: kind.recipe.rank).config

    def _stacks(self, dtype: type[np.floating]) -> Mapping[str, tuple[Stack, KnownGrams]]:
        """The parents' factors in this type, module by module, with their Grams; read once."""
        if dtype not in self._loaded:
            files = [Path(parent.folder or "") / WEIGHTS_FILE for parent in self._plan.parents]
            readers = [self._open.enter_context(TensorReader(path)) for path in files]

            def load(module: ModulePlan) -> tuple[Stack, KnownGrams]:
                stack = load_stack(module.parts, readers, dtype)
                return stack, KnownGrams.of(stack)

            self._loaded[dtype] = for_each_module(self._plan.kinds[0], load)
        return self._loaded[dtype]

    def _tensors(self, kind: int, weights: Sequence[float]) -> dict[str, torch.Tensor]:
        import torch  # deferred: see engine

        plan, recipe = self._plan.kinds[kind], self._plan.recipe(kind, weights)
        method, rounded = find_method(recipe.method), getattr(torch, TORCH_DTYPES[recipe.dtype])
        stacks = self._stacks(arithmetic(method, recipe.dtype))

        def make(module: ModulePlan) -> tuple[torch.Tensor, torch.Tensor]:
            stack, known = stacks[module.name]
            here = recipe.weights_in(module.name)
            weighted = replace(module, parts=tuple(replace(p, weight=here[p.parent]) for p in module.parts))
            stack = replace(stack, c=coefficients(weighted.parts))
            made = factors_of(weighted, method, stack, recipe, known=known)
            a, b = (torch.from_numpy(np.ascontiguousarray(factor)).to(rounded).float() for factor in made)
            return a.reshape(-1, *module.a_shape[1:]), b.reshape(b.shape[0], -1, *module.b_shape[2:])

        factors = for_each_module(plan, make)
        return {key: factors[m.name][side] for m in plan.modules for side, key in enumerate((m.a_key, m.b_key))}

    def _tick(self, samples: int) -> None:
        if self._should_stop():
            raise JobCancelled("the search was stopped; its journal is kept", hint="`adapterctl jobs retry` goes on")

    def _tell(self) -> None:
        done = min(self.used, self._total)
        self._emit({"progress": {"stage": self._stage, "done": done, "total": self._total}})

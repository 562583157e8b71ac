"""A search for the weights of a merge, as facts and rules: what is tried, what it gave, who goes on, who won and why.

Every sample of a suite is either a tuning sample or a held-out one. Candidates are compared on the former; the figure
that is reported comes from the latter, which decided nothing. Pure: the model is elsewhere.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from .digest import json_digest
from .errors import InvalidInput
from .eval_plan import Subject
from .evals import CONFIDENCE, MEASURES, Interval, Kept, Metric, kept, spread
from .plan import MergePlan, place_of
from .recipe import LayerWeights, MergeRequest, Recipe
from .refs import ParentRef, Ref
from .suite import Row, SuiteTask

DEFAULT_BUDGET = 24
#: A task with fewer samples has halves that say nothing.
MIN_SAMPLES = 8
#: What share of the tuning samples a candidate has seen when it is compared with those before it.
RUNGS = (0.25, 0.5, 1.0)
#: The weights that are searched, and how fine: finer steps are below what any suite can tell apart.
LOWEST, HIGHEST, STEP = 0.05, 1.5, 0.01
#: The candidate that the others have to beat: every parent at weight 1, by the first of the methods.
PLAIN = 0
#: How a winner is chosen, for the digest of a search: see `choose_finalists`.
DECISION = ("plain unless beaten beyond the interval", CONFIDENCE)


@dataclass(frozen=True, slots=True)
class TuneRequest:
    """A search as the caller asks for it. `ranks` are for methods that have a choice; `keep` is how many become
    versions; in each of `layer_groups` runs of layers the parents have weights of their own. `base_dtype` is what the
    base is loaded in, see `base_dtype.py`.

    `budget` is counted in full evaluations: looks at as many samples as the tuning half has.
    """

    parents: tuple[Ref, ...]
    into: str | None = None
    suites: tuple[str, ...] = ()
    methods: tuple[str, ...] = ("cat", "svd")
    ranks: tuple[int, ...] = ()
    budget: int = DEFAULT_BUDGET
    seed: int = 0
    limit: int | None = None
    keep: int = 0
    layer_groups: int = 1
    base_dtype: str | None = None

    @property
    def target(self) -> str:
        """The adapter that the merges become versions of."""
        return MergeRequest(tuple(map(ParentRef, self.parents)), self.into).target


@dataclass(frozen=True, slots=True)
class TuneTask:
    """One task of one suite, cut in two. `owners` are the parents that it belongs to: the best of them is the measure.

    `task` asks for the primary metric alone, so that nothing is generated where likelihood decides.
    """

    suite: str
    task: SuiteTask
    owners: tuple[int, ...]
    tuning: tuple[Row, ...]
    heldout: tuple[Row, ...]

    @property
    def metric(self) -> Metric:
        return MEASURES[self.task.primary]

    def seen(self, rung: int) -> int:
        """How many tuning samples a candidate has seen at the end of this rung."""
        return math.ceil(len(self.tuning) * RUNGS[rung])


@dataclass(frozen=True, slots=True)
class TunePlan:
    """All that the child is told. `kinds` are the ways to merge, each a plan with every weight 1.

    `groups` are the patterns of `layer_groups`; without any, a parent has one weight in all modules.
    """

    base_folder: str
    parents: tuple[Subject, ...]
    kinds: tuple[MergePlan, ...]
    tasks: tuple[TuneTask, ...]
    budget: int
    seed: int
    finalists: int
    engine: Mapping[str, str]
    groups: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """What makes two searches the same one; where files lie is no part of it."""
        return json_digest(
            {
                "parents": [parent.digest for parent in self.parents],
                "kinds": [kind.recipe.to_json() for kind in self.kinds],
                "rows": [[row.id, row.prompt, row.target] for t in self.tasks for row in (*t.tuning, *t.heldout)],
                "tasks": [[t.suite, t.task.name, t.task.primary, len(t.tuning), list(t.owners)] for t in self.tasks],
                "search": [self.budget, self.seed, self.finalists, *RUNGS, LOWEST, HIGHEST, STEP, *DECISION],
                "engine": dict(self.engine),
                # without groups a search has the digest that it always had
                **({"groups": list(self.groups)} if self.groups else {}),
            }
        )

    def recipe(self, kind: int, weights: Sequence[float]) -> Recipe:
        """That of a candidate."""
        recipe = self.kinds[kind].recipe
        of_parents, layers = by_layer(weights, self.groups)
        parents = zip(recipe.parents, of_parents, strict=True)
        return replace(recipe, parents=tuple(replace(p, weight=weight) for p, weight in parents), layers=layers)

    @property
    def tuning_samples(self) -> int:
        """Samples of a full evaluation: the unit of the budget."""
        return sum(len(task.tuning) for task in self.tasks)

    @property
    def heldout_samples(self) -> int:
        return sum(len(task.heldout) for task in self.tasks)

    @property
    def reserved(self) -> int:
        """Samples kept back for the end: the finalists and the plain candidate on the held-out half."""
        return (self.finalists + 1) * self.heldout_samples


@dataclass(frozen=True, slots=True)
class Trial:
    """One candidate. `shares` is what it kept of each task (retention) after the last rung that it reached.

    `weights` has one a parent; where there are groups of layers, group by group.

    `rungs` is the smallest share at the end of each rung; it was looked at in full where it has all of them.
    """

    number: int
    kind: int
    weights: tuple[float, ...]
    samples: int
    shares: tuple[float, ...]
    rungs: tuple[float, ...]

    @property
    def worst(self) -> float:
        return self.rungs[-1]

    @property
    def binding(self) -> int:
        """The task that it keeps least of."""
        return self.shares.index(min(self.shares))

    @property
    def complete(self) -> bool:
        return len(self.rungs) == len(RUNGS)


@dataclass(frozen=True, slots=True)
class Margin:
    """A candidate against the plain one, sample by sample, on the tuning samples of the task that the plain one keeps
    least of.

    `ratio` reads as a retention: above 1 the candidate does better; None where the plain one scores 0. `beyond` says
    whether it does better by more than the interval.
    """

    trial: int
    task: int
    ratio: Interval | None
    beyond: bool


@dataclass(frozen=True, slots=True)
class HeldOut:
    """What a finalist kept of one task on the samples that decided nothing."""

    trial: int
    task: int
    metric: str
    base: float
    parent: float
    child: float
    retention: Interval | None
    gain_kept: Interval | None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Finding:
    """What a search found. `finalists` begin with the winner; `used` is of the budget, in full evaluations.

    `against_plain` compares the winner with the plain candidate on each task, held out: 1 is as good. `margins` are
    those that decided, on the tuning samples: of every candidate that was asked for one, the best first. `less_plain`
    is the smallest share that the winner keeps less that of the plain candidate, held out; None where no parent scores.
    """

    trials: tuple[Trial, ...]
    front: tuple[int, ...]
    finalists: tuple[int, ...]
    owners: tuple[int, ...]
    heldout: tuple[HeldOut, ...]
    against_plain: tuple[Interval | None, ...]
    used: float
    margins: tuple[Margin, ...] = ()
    less_plain: Interval | None = None

    @property
    def winner(self) -> Trial:
        return self.trials[self.finalists[0]]

    def worst_heldout(self, trial: int) -> HeldOut:
        """The task of which this finalist kept least, held out."""
        rows = [row for row in self.heldout if row.trial == trial]
        return min(rows, key=lambda row: row.retention.value if row.retention else math.inf)


def split(task: SuiteTask, limit: int | None) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    """Tuning and held-out samples of a task, half each.

    By a digest of each row, never by the seed of a search: ten searches with ten seeds would otherwise have tuned to
    every sample that any of them holds out. Raises `InvalidInput` where there are too few to halve.
    """
    rows = sorted(task.samples(limit), key=lambda row: hashlib.sha256(f"{row.id}\0{row.prompt}".encode()).digest())
    if len(rows) < MIN_SAMPLES:
        raise InvalidInput(
            f"task {task.name} has {len(rows)} samples, a search needs {MIN_SAMPLES} or more to halve them",
            hint="raise --limit, or add rows to the suite",
        )
    middle = (len(rows) + 1) // 2
    return tuple(rows[:middle]), tuple(rows[middle:])


def layer_groups(modules: Iterable[str], count: int) -> tuple[str, ...]:
    """Patterns that cut the layers of these modules into `count` runs of about one length: `layers.0-14`; none for 1.

    Raises `InvalidInput` where there are fewer layers, or the names tell no layers apart.
    """
    if count == 1:
        return ()
    names = sorted(set(modules))
    layer_of = {name: place_of(name)[0] for name in names}
    layers = sorted({layer for layer in layer_of.values() if layer is not None})
    if count > len(layers):
        raise InvalidInput(
            f"the parents have {len(layers)} layers, which make no {count} groups",
            hint=f"give --layer-groups {len(layers)} or less" if len(layers) > 1 else "leave --layer-groups out",
        )
    words = {_word_before_number(name) for name in names if layer_of[name] is not None}
    word = words.pop() if len(words) == 1 else "*"
    cuts = [len(layers) * i // count for i in range(count + 1)]
    runs = [layers[start:end] for start, end in pairwise(cuts)]
    patterns = tuple(
        (f"{word}." if word else "") + (f"{run[0]}" if len(run) == 1 else f"{run[0]}-{run[-1]}") for run in runs
    )
    for name in names:
        chosen = [run for run, pattern in zip(runs, patterns, strict=True) if LayerWeights(pattern, ()).selects(name)]
        if chosen != [run for run in runs if layer_of[name] in run]:
            raise InvalidInput(
                f"{name} belongs to no one group of layers by its name", hint="search without --layer-groups"
            )
    return patterns


def _word_before_number(module: str) -> str:
    """`layers` of model.layers.3.mlp.up_proj; empty where the name begins with the number."""
    upto_number = module.removesuffix(place_of(module)[1]).rstrip(".")
    return upto_number.rpartition(".")[0].rpartition(".")[2]


def by_layer(weights: Sequence[float], groups: Sequence[str]) -> tuple[tuple[float, ...], tuple[LayerWeights, ...]]:
    """The weights of a candidate as a recipe has them: of the parents, and of the layers that have others.

    The former are those of the first group, so that modules outside of all layers go with it.
    """
    count = len(weights) // max(1, len(groups))
    first, *others = [tuple(weights[start : start + count]) for start in range(0, len(weights), count)]
    pairs = zip(groups[1:], others, strict=True)
    return first, tuple(LayerWeights(pattern, these) for pattern, these in pairs if these != first)


def searched(parents: Sequence[str], groups: Sequence[str]) -> tuple[str, ...]:
    """What each weight of a candidate is of: a parent, in each group of layers."""
    return tuple(f"{parent}{group}" for group in [f" {each}" for each in groups] or [""] for parent in parents)


def share(metric: Metric, parent: Sequence[Mapping[str, float]], child: Sequence[Mapping[str, float]]) -> float:
    """Retention on these samples as a plain number; 0 where there is nothing to divide by."""
    over, under = metric.score(child), metric.score(parent)
    if metric.direction == "lower":
        over, under = under, over
    return over / under if under else 0.0


def goes_on(worst: float, others: Sequence[float]) -> bool:
    """Whether a candidate belongs to the better half of all that reached this rung so far (successive halving, done
    one by one: Li et al. 2020, https://arxiv.org/abs/1810.05934).
    """
    return 2 * sum(other > worst for other in others) < len(others) + 1


def front(trials: Sequence[Trial]) -> list[int]:
    """Numbers of the complete trials that no other complete one beats on every task at once."""
    complete = [trial for trial in trials if trial.complete]
    return [t.number for t in complete if not any(_beats(other.shares, t.shares) for other in complete)]


def ranking(trials: Sequence[Trial], ranks: Sequence[int]) -> list[Trial]:
    """Complete trials, the largest smallest share first; `ranks` of the kinds: of equals the smaller adapter."""
    complete = [trial for trial in trials if trial.complete]
    return sorted(complete, key=lambda t: (-t.worst, ranks[t.kind], t.number))


def margin(
    trial: int,
    task: int,
    metric: Metric,
    base: Sequence[Mapping[str, float]],
    plain: Sequence[Mapping[str, float]],
    candidate: Sequence[Mapping[str, float]],
) -> Margin:
    ratio = kept(metric, base, plain, candidate).retention
    beyond = ratio.low > 1 if ratio else spread(metric, candidate).low > spread(metric, plain).high
    return Margin(trial, task, ratio, beyond)


def choose_finalists(
    trials: Sequence[Trial], ranks: Sequence[int], count: int, against_plain: Callable[[Trial], Margin]
) -> tuple[list[int], list[Margin]]:
    """The winner, then the others of the front and after them the rest, best first: at most `count`; and the margins
    that decided.

    The largest of many figures is partly luck, as each was taken on the same few samples. So the winner is the best one
    that also beats the plain candidate beyond the interval, and the plain one where none does: the simplest candidate
    that cannot be told from the best, in the spirit of the one-standard-error rule (Breiman et al. 1984, section 3.4).
    """
    order = ranking(trials, ranks)
    winner, margins = trials[PLAIN], list[Margin]()
    for trial in order:
        if trial.worst <= winner.worst:
            break
        margins.append(against_plain(trial))
        if margins[-1].beyond:
            winner = trial
            break
    on_front = set(front(trials))
    rest = sorted((t for t in order if t is not winner), key=lambda t: t.number not in on_front)
    return [trial.number for trial in [winner, *rest][:count]], margins


def held_out(
    trial: int,
    task: int,
    metric: Metric,
    base: Sequence[Mapping[str, float]],
    parent: Sequence[Mapping[str, float]],
    child: Sequence[Mapping[str, float]],
) -> HeldOut:
    result: Kept = kept(metric, base, parent, child)
    return HeldOut(
        trial,
        task,
        metric.name,
        metric.score(base),
        metric.score(parent),
        metric.score(child),
        result.retention,
        result.gain_kept,
        result.note,
    )


def explain(finding: Finding, labels: Sequence[str], kinds: Sequence[str], tasks: Sequence[str]) -> list[str]:
    """Why the winner won, in sentences. `labels` of the parents, `kinds` of the ways to merge, `tasks` by name."""
    winner, plain = finding.winner, finding.trials[PLAIN]
    complete = [trial for trial in finding.trials if trial.complete]
    passed_over = [each for each in finding.margins if not each.beyond]
    lines = [
        f"{len(finding.trials)} candidates were tried for {finding.used:.1f} full evaluations; "
        f"{len(finding.trials) - len(complete)} were dropped early, {len(complete)} saw every tuning sample",
        f"trial {winner.number} ({describe(winner, labels, kinds)}) keeps at least {winner.worst:.1%} of every task"
        f"{'' if passed_over else ', the most of all'}; it is {tasks[winner.binding]} that holds it there",
    ]
    others = [trial for trial in complete if trial.number not in (winner.number, PLAIN)]
    if passed_over:
        lines.append(_passed_over(passed_over, finding, labels, kinds, tasks))
    elif others:
        best = max(others, key=lambda trial: (trial.worst, -trial.number))
        lines.append(f"the next is trial {best.number} ({describe(best, labels, kinds)}) with {best.worst:.1%}")
    if winner.number != PLAIN:
        lines.append(f"the plain sum ({describe(plain, labels, kinds)}) keeps {plain.worst:.1%}")
        lines += [
            f"the winner beats it by more than the tuning samples leave open: {_ratio_words(each, tasks)}"
            for each in finding.margins
            if each.beyond
        ]
    elif passed_over:
        lines.append("no candidate is told apart from the plain sum on the tuning samples: leave the weights at 1")
    else:
        lines.append("no candidate beats the plain sum on the tuning samples: leave the weights at 1")
    told = dict.fromkeys([winner.number, PLAIN])
    lines += [f"held out, {_held_out_words(finding, number, tasks)}" for number in told]
    if winner.number != PLAIN:
        lines.append(_verdict(finding, tasks))
    return [*lines, *advice(finding)]


def advice(finding: Finding) -> list[str]:
    """Whether the weights of the winner are worth having, by samples that decided nothing; nothing to say of the plain
    one.

    The winner was chosen before these samples were seen and stays the winner: it is the reader who may decide.
    """
    if finding.winner.number == PLAIN:
        return []
    if finding.less_plain is None:
        if any(row.retention for row in finding.heldout):  # a finding of an earlier version, which did not look
            return []
        return ["held out, the winner cannot be compared with the plain sum: the parents score 0 on every task"]
    value, low, high = (100 * x for x in (finding.less_plain.value, finding.less_plain.low, finding.less_plain.high))
    points = f"{value:+.1f} points [{low:+.1f}, {high:+.1f}] in the smallest share"
    if low > 0:
        return [f"held out, the winner is better than the plain sum: {points}"]
    if high < 0:
        return [f"held out, the winner is worse than the plain sum: {points}; leave the weights at 1"]
    return [f"held out, the winner is not told apart from equal weights: {points}; the plain sum is the simpler choice"]


def describe(trial: Trial, labels: Sequence[str], kinds: Sequence[str]) -> str:
    weights = " ".join(f"{label}={weight:g}" for label, weight in zip(labels, trial.weights, strict=True))
    return f"{kinds[trial.kind]}, {weights}"


def _passed_over(
    margins: Sequence[Margin], finding: Finding, labels: Sequence[str], kinds: Sequence[str], tasks: Sequence[str]
) -> str:
    """Of those that keep more than the winner but may owe it to luck: the best in words, the others counted."""
    best = finding.trials[margins[0].trial]
    more = f", nor are {len(margins) - 1} more" if len(margins) > 1 else ""
    return (
        f"trial {best.number} ({describe(best, labels, kinds)}) keeps {best.worst:.1%}, the most of all, but is not "
        f"told apart from the plain sum where that keeps least: {_ratio_words(margins[0], tasks)}{more}"
    )


def _ratio_words(each: Margin, tasks: Sequence[str]) -> str:
    name, ratio = tasks[each.task], each.ratio
    if ratio is None:
        return f"{name}, of which the plain sum keeps nothing"
    return f"{name} {ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"


def _held_out_words(finding: Finding, number: int, tasks: Sequence[str]) -> str:
    row = finding.worst_heldout(number)
    name = "the plain sum" if number == PLAIN else f"trial {number}"
    if row.retention is None:
        return f"{name} has no retention on {tasks[row.task]}: its parent scores 0"
    interval = row.retention
    return (
        f"{name} keeps {interval.value:.1%} [{interval.low:.1%}, {interval.high:.1%}] of {tasks[row.task]}, its least"
    )


def _verdict(finding: Finding, tasks: Sequence[str]) -> str:
    """Whether the winner and the plain candidate can be told apart, task by task, on the held-out samples."""
    words = []
    for task, ratio in zip(tasks, finding.against_plain, strict=True):
        if ratio is None:
            continue
        verdict = "better" if ratio.low > 1 else "worse" if ratio.high < 1 else "not told apart"
        words.append(f"{task} {verdict} ({ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}])")
    return "winner against the plain sum, held out: " + ", ".join(words)


def _beats(one: Sequence[float], other: Sequence[float]) -> bool:
    return all(a >= b for a, b in zip(one, other, strict=True)) and tuple(one) != tuple(other)

"""What an evaluation says about one adapter (or the bare base) on one suite, task by task, and what a child kept.

Every metric is a formula over sums of per-sample statistics, so the same few lines give the figure of a whole task and
of each draw of the paired bootstrap. Pure: texts and numbers come in, no model is touched.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Literal

from .base_dtype import FULL, marked
from .errors import InvalidInput

Direction = Literal["higher", "lower"]

DRAWS = 2000
CONFIDENCE = 0.90
#: From fewer samples no gate takes a verdict by an interval. The percentile interval of 90 % of n normal figures holds
#: the truth in P(|t| < 1.645 sqrt((n-1)/n)), t with n-1 degrees of freedom: 78 of 100 times for 5 samples, 85 for 10,
#: 87 for 20 (Hesterberg 2015, https://doi.org/10.1080/00031305.2015.1089789); of one sample it has no width at all.
LEAST_SAMPLES = 10
CHRF_ORDER = 6
#: chrF weighs recall this much more than precision (Popović 2015, https://aclanthology.org/W15-3049).
CHRF_BETA = 2
#: The shortest unit of text that counts as a loop when it fills the tail three times: "..." and "ha ha" are none.
LOOP_UNIT = 4

#: What the source of a metric begins with where this registry measured it; and that of one given at registration.
HERE, REGISTERED = "suite ", "register"

_CHRF_FIELDS = tuple(f"{part}{n}" for n in range(1, CHRF_ORDER + 1) for part in ("hyp", "ref", "hit"))


@dataclass(frozen=True, slots=True)
class TaskResult:
    """Metrics of one task. `primary` names the metric that retention is computed from first.

    `samples` holds, in the task's order, what paired statistics need per item: one mapping of numbers an item.
    """

    task: str
    primary: str
    direction: Direction
    metrics: Mapping[str, float]
    samples: tuple[Mapping[str, float], ...]


@dataclass(frozen=True, slots=True)
class EvalReport:
    """One run of one suite. `subject` is a content digest, or `base` for the base without an adapter.

    `key` is the cache key: a digest over subject, base, tokenizer, suite, data, limits and engine versions. `engine`
    names versions and settings, and under `source` where a report comes from that this registry did not compute.
    """

    key: str
    subject: str
    base_id: str
    suite: str
    suite_digest: str
    limit: int | None
    engine: Mapping[str, str]
    tasks: tuple[TaskResult, ...]
    seconds: float
    outputs: tuple[Mapping[str, Any], ...] = ()

    @property
    def dtype(self) -> str:
        """What the base was computed with, `float32` or for instance `nf4`."""
        return self.engine.get("dtype", FULL)

    @property
    def metrics(self) -> dict[str, float]:
        """Every metric as `task/metric`, or `task/metric.nf4` on a base in 4 bits: none ever stands for the other."""
        return {
            f"{task.task}/{marked(name, self.dtype)}": value
            for task in self.tasks
            for name, value in task.metrics.items()
        }


@dataclass(frozen=True, slots=True)
class Metric:
    """A figure of a task: `formula` gets the sum over samples of each of `fields`, in that order, and the count.

    `direction` is None for behaviour, which is read against the parent and is not better or worse by itself. `top` is
    the most that it can be, for metrics from 0 up to there, else None.
    """

    name: str
    help: str
    direction: Direction | None
    generated: bool
    fields: tuple[str, ...]
    formula: Callable[[Sequence[float], int], float]
    top: float | None = None

    @property
    def is_share(self) -> bool:
        """Whether each sample is 0 or 1, and the metric how many of them are 1."""
        return self.formula is _mean

    def score(self, samples: Sequence[Mapping[str, float]]) -> float:
        return self.formula([sum(column) for column in self.columns(samples)], len(samples))

    def columns(self, samples: Sequence[Mapping[str, float]]) -> list[list[float]]:
        return [[sample[field] for sample in samples] for field in self.fields]


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its bootstrap interval, of 90 % unless another confidence was asked for."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Kept:
    """How much of a parent's metric its child kept.

    `retention` is child / parent (parent / child where lower is better), None where that divides by zero; `gain_kept`
    is (child - base) / (parent - base), None where the parent does not beat the base beyond its interval.
    """

    retention: Interval | None
    gain_kept: Interval | None
    note: str = ""


def kept(
    metric: Metric,
    base: Sequence[Mapping[str, float]],
    parent: Sequence[Mapping[str, float]],
    child: Sequence[Mapping[str, float]],
    *,
    confidence: float = CONFIDENCE,
    draws: int = DRAWS,
    seed: int = 0,
) -> Kept:
    """Compare three subjects on the same samples in the same order; each draw takes the same samples of all three.

    Draws see only what occurred. Where no draw is worse than the estimate, because the child lost nothing that the
    parent had, the low end is what it would be if the child failed and the parent did not in the share of cases that
    can stay `unseen`; and the high end likewise. Metrics without a top, such as nll, need that not: their samples
    differ. A share is never narrower than that, and its draws are taken from two samples more: one that the child alone
    gets right, one that the parent alone does. Without them its low end misses up to 13 times in 100 of 20 samples
    instead of 5, with them up to 8; in the manner of Agresti & Min 2005, https://doi.org/10.1002/sim.1781.

    Raises `InvalidInput` when the numbers of samples differ: unpaired intervals would be many times wider.
    """
    if metric.direction is None or not len(base) == len(parent) == len(child) > 0:
        raise InvalidInput(
            f"{metric.name} of {len(base)}, {len(parent)} and {len(child)} samples cannot be compared",
            hint="evaluate base, parent and child on the same samples of the same suite",
        )
    higher = metric.direction == "higher"
    one_of_each = ((0, 1), (1, 0), (0, 1)) if metric.is_share else ()
    scores = _paired_scores(metric, (base, parent, child), draws=draws, seed=seed, also=one_of_each)
    lift = _interval([(p - b) if higher else (b - p) for b, p, _ in scores], confidence)
    worst = best = scores[0]
    if metric.top is not None:
        b, p, c = ((1 - unseen(len(child), confidence)) * score for score in scores[0])
        more = unseen(len(child), confidence) * metric.top
        worst, best = (b, p + more, c), (b, p, c + more)
    gain, note = None, ""
    if lift.value > 0 and lift.low > 0:
        gains = [_ratio(c - b, p - b) for b, p, c in (worst, best, *scores)]
        gain = _widened(metric, _interval(gains[2:], confidence), *gains[:2])
    else:
        note = "the parent does not beat the base beyond its interval"
    ratios = [_ratio(c, p) if higher else _ratio(p, c) for _, p, c in (worst, best, *scores)]
    if ratios[2] is None:
        return Kept(None, gain, note)
    return Kept(_widened(metric, _interval(ratios[2:], confidence), *ratios[:2]), gain, note)


def spread(
    metric: Metric,
    samples: Sequence[Mapping[str, float]],
    *,
    confidence: float = CONFIDENCE,
    draws: int = DRAWS,
    seed: int = 0,
) -> Interval:
    """The score of one subject with its interval: what other samples of the same task might have given."""
    if metric.is_share:
        (hits,) = (sum(column) for column in metric.columns(samples))
        return share_interval(round(hits), len(samples), confidence)
    scores = [score for (score,) in _paired_scores(metric, (samples,), draws=draws, seed=seed)]
    interval = _interval(scores, confidence)
    if metric.top is None:
        return interval
    other = unseen(len(samples), confidence)
    seen = (1 - other) * interval.value
    return _widened(metric, interval, seen, seen + other * metric.top)


def share_interval(hits: int, count: int, confidence: float = CONFIDENCE) -> Interval:
    """A share with its exact interval, which holds the truth at least as often as it says, at 0 and 1 as well.

    Source: Clopper & Pearson 1934, https://doi.org/10.1093/biomet/26.4.404.
    """
    tail = (1 - confidence) / 2
    low = 0.0 if hits == 0 else 1 - _chance_of_at_most(count - hits, count, tail)
    high = 1.0 if hits == count else _chance_of_at_most(hits, count, tail)
    return Interval(hits / count, low, high)


def unseen(count: int, confidence: float = CONFIDENCE) -> float:
    """How often may occur what never did in `count` samples: the high end of a share of none; 14 % for 20 samples.

    At 95 % it is about 3.7 / count; with one tail, the rule of three (Hanley & Lippman-Hand 1983,
    https://doi.org/10.1001/jama.1983.03330370053031).
    """
    return -math.expm1(math.log((1 - confidence) / 2) / count)


def least_difference(
    tasks: Sequence[tuple[Metric, Sequence[Sequence[Mapping[str, float]]]]],
    *,
    confidence: float = CONFIDENCE,
    draws: int = DRAWS,
) -> Interval | None:
    """The smallest share that one child keeps over all tasks, less the smallest that another one keeps.

    Each task comes with the samples of its parent, of the one child and of the other; each draw takes the same samples
    of all three. A share is a retention. A task where that divides by zero does not count, in the figure as in a draw;
    draws in which none counts are left out, and None is returned where none counts on all samples.
    """
    one: list[list[float | None]] = []
    other: list[list[float | None]] = []
    for seed, (metric, subjects) in enumerate(tasks):
        higher = metric.direction == "higher"
        scores = _paired_scores(metric, subjects, draws=draws, seed=seed)
        for shares, child in ((one, 1), (other, 2)):
            pairs = ((s[child], s[0]) if higher else (s[0], s[child]) for s in scores)
            shares.append([_ratio(over, under) for over, under in pairs])
    least, others = ([_least(draw) for draw in zip(*shares, strict=True)] for shares in (one, other))
    differences = [None if a is None or b is None else a - b for a, b in zip(least, others, strict=True)]
    return None if differences[0] is None else _interval(differences, confidence)


def _least(shares: Sequence[float | None]) -> float | None:
    return min((share for share in shares if share is not None), default=None)


def behaviour_note(parent: Mapping[str, float], child: Mapping[str, float]) -> str:
    """How the child's answers differ in form from its parent's, in words; empty where they do not, or none were made.

    Metrics of likelihood hardly see answers that end early or never end.
    """
    if "ended" not in parent or "ended" not in child:
        return ""
    findings = []
    if child["length_ratio"] < 0.8 * parent["length_ratio"]:
        findings.append(
            f"answers are shorter: length {child['length_ratio']:.2f} (parent {parent['length_ratio']:.2f})"
        )
    if child["ended"] < parent["ended"] - 0.05:
        findings.append(f"answers run on: {child['ended']:.0%} end (parent {parent['ended']:.0%})")
    if child["loops"] > parent["loops"] + 0.05:
        findings.append(f"answers repeat themselves: {child['loops']:.0%} (parent {parent['loops']:.0%})")
    return "; ".join(findings)


def switched(child: Sequence[str], own: Sequence[str], others: Sequence[Sequence[str]]) -> float | None:
    """Share of a child's answers that read more like another parent's than like those of the parent whose task it is:
    a merge that does not switch to the task. By chrF; None where the parents' answers nowhere differ.
    """
    verdicts = []
    for place, answer in enumerate(child):
        rivals = [other[place] for other in others if other[place].strip() != own[place].strip()]
        if rivals:
            verdicts.append(max(_likeness(answer, rival) for rival in rivals) > _likeness(answer, own[place]))
    return sum(verdicts) / len(verdicts) if verdicts else None


def _likeness(answer: str, other: str) -> float:
    return MEASURES["chrf"].score([answer_statistics(answer, other, ended=True)]) if other.strip() else 0.0


def answer_statistics(answer: str, reference: str, *, ended: bool) -> dict[str, float]:
    """What the metrics of generated text need of one sample; `ended` says whether the model stopped by itself."""
    chars, ref_chars = len(answer.strip()), len(reference.strip())
    return {
        **dict(zip(_CHRF_FIELDS, _chrf_counts(answer, reference), strict=True)),
        "exact": float(answer.strip() == reference.strip()),
        "chars": chars,
        "ref_chars": ref_chars,
        "ended": float(ended),
        "loop": float(loops(answer)),
        "short": float(chars < ref_chars / 2),
    }


def loops(text: str) -> bool:
    """Whether the text ends in one unit three times over (the last may be cut off anywhere)."""
    # white space is collapsed first: indented code is no loop
    text = " ".join(text.split())
    return any(text[-3 * size : -size] == text[-2 * size :] for size in range(LOOP_UNIT, len(text) // 3 + 1))


def _chrf_counts(answer: str, reference: str) -> list[float]:
    """N-grams of the answer, of the reference, and common ones, for each order; white space does not count."""
    answer, reference = "".join(answer.split()), "".join(reference.split())
    counts: list[float] = []
    for n in range(1, CHRF_ORDER + 1):
        hyp, ref = (Counter(text[i : i + n] for i in range(len(text) - n + 1)) for text in (answer, reference))
        # an order that the reference is too short for says nothing about the answer
        counts += [hyp.total() if ref else 0, ref.total(), (hyp & ref).total()]
    return counts


def _chrf(sums: Sequence[float], _count: int) -> float:
    """Corpus chrF, 0..100: mean precision and recall over the orders that occur, as sacreBLEU 2 computes it."""
    orders = [(hyp, ref, hit) for hyp, ref, hit in zip(sums[0::3], sums[1::3], sums[2::3], strict=True) if hyp and ref]
    precision = sum(hit / hyp for hyp, _, hit in orders)
    recall = sum(hit / ref for _, ref, hit in orders)
    if not precision + recall:
        return 0.0
    weight = CHRF_BETA**2
    return 100 * (1 + weight) * precision * recall / (weight * precision + recall) / len(orders)


def _per(sums: Sequence[float], _count: int) -> float:
    return sums[0] / sums[1]


def _mean(sums: Sequence[float], count: int) -> float:
    return sums[0] / count


#: What a suite may ask for.
MEASURES: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("nll", "nats per token of the target with its end", "lower", False, ("nll", "tokens"), _per),
        Metric("nll_per_byte", "nats per byte of the target", "lower", False, ("nll", "bytes"), _per),
        Metric("chrf", "character n-gram F-score of the answers, 0..100", "higher", True, _CHRF_FIELDS, _chrf, 100),
        Metric("exact_match", "share of answers equal to the target", "higher", True, ("exact",), _mean, 1),
    )
}

#: What is always told where answers are generated.
BEHAVIOUR: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("length_ratio", "length of the answers over the targets'", None, True, ("chars", "ref_chars"), _per),
        Metric("ended", "share of answers that end by themselves", None, True, ("ended",), _mean, 1),
        Metric("loops", "share of answers that end in a loop", None, True, ("loop",), _mean, 1),
        Metric("short", "share of answers below half their target's length", None, True, ("short",), _mean, 1),
    )
}


def task_result(task: str, metrics: Sequence[str], primary: str, samples: Sequence[Mapping[str, float]]) -> TaskResult:
    """Score `samples` by the metrics of a suite's task; behaviour comes along where answers were generated."""
    wanted = [MEASURES[name] for name in metrics]
    if any(metric.generated for metric in wanted):
        wanted += BEHAVIOUR.values()
    direction = MEASURES[primary].direction
    assert direction is not None
    return TaskResult(task, primary, direction, {m.name: m.score(samples) for m in wanted}, tuple(samples))


def _paired_scores(
    metric: Metric,
    subjects: Sequence[Sequence[Mapping[str, float]]],
    *,
    draws: int,
    seed: int,
    also: Sequence[Sequence[float]] = (),
) -> list[tuple[float, ...]]:
    """The score of each subject: first on all samples, then on each draw with replacement.

    `also` are values of each subject, of a metric with one field, that are drawn beside those of the samples.
    """
    columns = [metric.columns(samples) for samples in subjects]
    for of, values in zip(columns, also, strict=False):
        of[0] += values
    count = len(subjects[0])
    rng = random.Random(seed)
    everything = range(len(columns[0][0]))
    scores = [tuple(metric.score(samples) for samples in subjects)]
    for _ in range(draws):
        pick = _picker(rng.choices(everything, k=count))
        scores.append(tuple(metric.formula([sum(pick(column)) for column in of], count) for of in columns))
    return scores


def _picker(indices: Sequence[int]) -> Callable[[Sequence[float]], Sequence[float]]:
    """Take these items of a column; `itemgetter` does it in C, but gives no tuple for a single index."""
    if len(indices) == 1:
        return lambda column: (column[indices[0]],)
    return itemgetter(*indices)


def _ratio(over: float, under: float) -> float | None:
    return over / under if under else None


def _interval(scores: Sequence[float | None], confidence: float) -> Interval:
    """The first score with the percentile interval of the others; draws without a value are left out."""
    drawn = sorted(score for score in scores[1:] if score is not None)
    value = scores[0]
    assert value is not None
    if not drawn:
        return Interval(value, value, value)
    tail = (1 - confidence) / 2
    last = len(drawn) - 1
    return Interval(value, drawn[round(tail * last)], drawn[round((1 - tail) * last)])


def _widened(metric: Metric, interval: Interval, worst: float | None, best: float | None) -> Interval:
    """Let an end that is the estimate itself, or that of a share, go as far as what was not seen."""
    low, high = interval.low, interval.high
    if worst is not None and (metric.is_share or low == interval.value):
        low = min(low, worst)
    if best is not None and (metric.is_share or high == interval.value):
        high = max(high, best)
    return Interval(interval.value, low, high)


def _chance_of_at_most(hits: int, count: int, tail: float) -> float:
    """The chance p of one trial with which at most `hits` of `count` succeed with probability `tail`; hits < count."""
    ways = [
        math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1) for k in range(hits + 1)
    ]  # logarithms, for they go beyond a float
    low, high = 0.0, 1.0
    for _ in range(60):
        p = (low + high) / 2
        yes, no = math.log(p), math.log1p(-p)
        likely = sum(math.exp(way + k * yes + (count - k) * no) for k, way in enumerate(ways)) > tail
        low, high = (p, high) if likely else (low, p)
    return low

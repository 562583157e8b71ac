"""What an evaluation has to compute: subjects on suites, on one base; and the key under which each report is found.

A report may be used again only where nothing that decides its figures has changed, so the key covers all of that: the
subject's content, the base, the suite with its data, how many samples, settings and versions of the engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from .digest import json_digest
from .suite import Suite, SuiteTask
from .version import Base

#: Of our own part of the engine, as versions stand for the others': how prompts are made, likelihoods summed, answers
#: generated and cut (`workers/eval_engine.py`), and what is kept of each sample (`evals.answer_statistics`). Raise it
#: with a change after which a figure may come out otherwise: all reports are computed anew then, those of examples/ too
ENGINE_REV = 1
#: The subject that has no adapter.
BASE = "base"


@dataclass(frozen=True, slots=True)
class Subject:
    """Who is evaluated: a content digest with the folder of its files, or `base` without one."""

    digest: str
    label: str
    folder: str | None


@dataclass(frozen=True, slots=True)
class Pair:
    """One report to make: a subject on a suite (by digest), under the key that it will be found by."""

    subject: str
    suite: str
    key: str


@dataclass(frozen=True, slots=True)
class EvalPlan:
    """All that the evaluation child is told. `suites` are by digest; `engine` goes into each report as it is."""

    base_id: str
    base_folder: str
    subjects: tuple[Subject, ...]
    suites: Mapping[str, Suite]
    pairs: tuple[Pair, ...]
    limit: int | None
    engine: Mapping[str, str]

    @property
    def samples(self) -> int:
        """How often a model will look at a sample: the total that progress counts up to."""
        return sum(self.cost(pair) for pair in self.pairs)

    def cost(self, pair: Pair) -> int:
        return sum(map(self.cost_of_task, self.suites[pair.suite].tasks))

    def cost_of_task(self, task: SuiteTask) -> int:
        return len(task.samples(self.limit)) * (2 if task.generates else 1)


def report_key(subject: str, base: Base, suite_digest: str, samples: Sequence[int], engine: Mapping[str, str]) -> str:
    """The cache key of one report (64 hex digits); `samples` is how many of each task, however the limit was said."""
    return json_digest(
        {
            "v": ENGINE_REV,
            "subject": subject,
            # the base's name and revision are spellings; its digests say whether it is the same model
            "base": {key: value for key, value in asdict(base).items() if key not in ("name", "revision")},
            "suite": suite_digest,
            "samples": list(samples),
            "engine": dict(engine),
        }
    )

"""The results that ship with the examples are those of the shipped files, computed again here in part."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from adapterctl import examples
from adapterctl.examples import BASE_NAME
from adapterctl.examples.base import build_base
from adapterctl.registry.domain.eval_plan import BASE, EvalPlan, Pair, Subject
from adapterctl.registry.domain.evals import EvalReport
from adapterctl.registry.domain.suite import Suite
from adapterctl.registry.merging.tensors import measure
from adapterctl.registry.services.register import WEIGHTS_FILE, inspect
from adapterctl.registry.services.suites import load_suite
from adapterctl.registry.wire import from_json, to_builtins
from adapterctl.workers import eval_job

ROOT = Path(examples.__file__).parent
VERSIONS = sorted(ROOT.glob("adapters/*/v*"))
SAMPLES = 6  # of the 20 that are committed


def _digest(folder: Path) -> str:
    return measure(folder / WEIGHTS_FILE, inspect(folder)).content_digest


@pytest.fixture(scope="module")
def suites() -> dict[str, Suite]:
    return {path.stem: load_suite(path) for path in ROOT.glob("suites/*.yaml")}


@pytest.fixture(scope="module")
def committed() -> dict[tuple[str, str], EvalReport]:
    files = ROOT.glob("results/*.json")
    reports = [report for file in files for report in from_json(file.read_bytes(), list[EvalReport])]
    return {(report.subject, report.suite): report for report in reports}


def test_every_shipped_version_and_the_base_have_results_on_both_suites(
    committed: dict[tuple[str, str], EvalReport], suites: dict[str, Suite]
):
    subjects = [BASE, *map(_digest, VERSIONS)]

    assert set(committed) == {(subject, name) for subject in subjects for name in suites}
    for report in committed.values():
        assert (report.base_id, report.limit) == (BASE_NAME, None)
        assert report.suite_digest == suites[report.suite].digest  # else the demo would compute everything again


def test_evaluating_again_gives_the_committed_figures(
    committed: dict[tuple[str, str], EvalReport], suites: dict[str, Suite], tmp_path: Path
):
    base = build_base(tmp_path / BASE_NAME)
    folders = {name: ROOT / "adapters" / name for name in ("translate/v3", "chat/v5")}
    subjects = [Subject(BASE, BASE, None), *(Subject(_digest(f), name, str(f)) for name, f in folders.items())]
    wanted = [(subjects[0], "translate"), (subjects[1], "translate"), (subjects[2], "chat")]
    # without answers: texts may part ways on another processor, once two tokens are about as likely
    likelihood = {s.digest: replace(s, tasks=(replace(s.tasks[0], metrics=("nll",)),)) for s in suites.values()}
    plan = EvalPlan(
        base_id=BASE_NAME,
        base_folder=str(base),
        subjects=tuple(subjects),
        suites=likelihood,
        pairs=tuple(Pair(s.digest, suites[name].digest, f"{i}") for i, (s, name) in enumerate(wanted)),
        limit=SAMPLES,
        engine={"device": "cpu", "dtype": "float32", "batch_size": "8"},
    )

    eval_job.run({"plan": to_builtins(plan), "out": str(tmp_path), "threads": 1}, lambda message: None, lambda: False)

    for i, (subject, name) in enumerate(wanted):
        (again,) = from_json((tmp_path / f"{i}.json").read_bytes(), EvalReport).tasks
        (stored,) = committed[subject.digest, name].tasks
        rows = suites[name].tasks[0].samples(SAMPLES)
        by_id = dict(zip((row.id for row in suites[name].tasks[0].samples()), stored.samples, strict=True))
        expected = [by_id[row.id]["nll"] for row in rows]
        # another processor sums in another order; over 20 tokens float32 stays far below this
        assert [sample["nll"] for sample in again.samples] == pytest.approx(expected, rel=1e-3)
        assert [s["tokens"] for s in again.samples] == [by_id[row.id]["tokens"] for row in rows]


def test_each_family_learned_its_task(committed: dict[tuple[str, str], EvalReport]):
    for family, last in (("translate", "v3"), ("chat", "v5")):
        version = committed[_digest(ROOT / "adapters" / family / last), family].tasks[0].metrics
        base = committed[BASE, family].tasks[0].metrics
        assert version["nll"] < 0.8 * base["nll"]
        assert version["ended"] == 1.0

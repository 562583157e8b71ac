"""A search on a tiny model: candidates are what a merge would write, and a search that was killed goes on unchanged."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from registries import WorkHere, nobody_works, supervise
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from adapterctl.bootstrap import connect
from adapterctl.cli.main import app
from adapterctl.registry.domain.adapter import read_facts
from adapterctl.registry.domain.digest import json_digest
from adapterctl.registry.domain.errors import InvalidInput, JobCancelled
from adapterctl.registry.domain.eval_plan import Subject
from adapterctl.registry.domain.header import read_header
from adapterctl.registry.domain.job import JobState
from adapterctl.registry.domain.plan import MergePlan, build_plan
from adapterctl.registry.domain.recipe import LayerWeights, MergeRequest
from adapterctl.registry.domain.refs import ParentRef, Ref, parse_ref
from adapterctl.registry.domain.tuning import (
    PLAIN,
    Finding,
    TunePlan,
    TuneRequest,
    TuneTask,
    by_layer,
    layer_groups,
    split,
)
from adapterctl.registry.merging.method import resolve
from adapterctl.registry.services.suites import load_suite
from adapterctl.registry.settings import load_settings
from adapterctl.registry.stores.spawn_bell import only_one
from adapterctl.registry.wire import from_builtins, to_builtins
from adapterctl.workers import engine, tune_job
from adapterctl.workers.eval_engine import Engine

ENGINE = {"device": "cpu", "dtype": "float32", "batch_size": "4"}
WORDS = ("chat", "chien", "oiseau", "porte", "table", "livre", "arbre", "fleur", "route", "pomme")
ROWS = [{"id": word, "prompt": f"{word} ->", "target": f" {word[::-1]}"} for word in WORDS]
TASK = "tasks:\n  - {name: NAME, data: rows.jsonl, metrics: [nll, chrf], max_new_tokens: 4}\n"


def _plan(
    method: str,
    folders: tuple[Path, Path],
    weights: Sequence[float],
    rank: int | None = None,
    layers: tuple[LayerWeights, ...] = (),
) -> MergePlan:
    facts = [
        read_facts(json.loads((f / "adapter_config.json").read_text()), read_header(f / "adapter_model.safetensors"))
        for f in folders
    ]
    parents = tuple(ParentRef(Ref(name), weight) for name, weight in zip("ab", weights, strict=True))
    recipe = resolve(MergeRequest(parents, method=method, rank=rank, layers=layers), facts, ["a" * 64, "b" * 64])
    return build_plan(recipe, facts)


@pytest.fixture
def search(tiny_base: Path, tiny_adapters: tuple[Path, Path], write_suite: Callable[..., Path]) -> TunePlan:
    tasks = []
    for owner, name in enumerate(("one", "two")):
        task = load_suite(write_suite(TASK.replace("NAME", name), rows=ROWS, name=name)).tasks[0]
        tasks.append(TuneTask(name, replace(task, metrics=("nll",), rows=()), (owner,), *split(task, None)))
    return TunePlan(
        base_folder=str(tiny_base),
        parents=tuple(Subject(n * 64, n, str(f)) for n, f in zip("ab", tiny_adapters, strict=True)),
        kinds=tuple(_plan(method, tiny_adapters, (1.0, 1.0), rank) for method, rank in (("cat", None), ("svd", 2))),
        tasks=tuple(tasks),
        budget=9,
        seed=5,
        finalists=2,
        engine=ENGINE,
    )


def _run(plan: TunePlan, journal: Path, should_stop: Callable[[], bool] = lambda: False) -> Finding:
    task = {"plan": to_builtins(plan), "journal": str(journal), "threads": 1}
    return from_builtins(tune_job.run(task, lambda message: None, should_stop)["finding"], Finding)


def _lines(journal: Path, kind: str) -> list[dict[str, Any]]:
    return [line[kind] for line in map(json.loads, journal.read_text().splitlines()) if kind in line]


@pytest.fixture
def in_16_bits(tiny_adapters: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """Both in bfloat16, with parts that cancel as far as float32 Grams are taken, so that their rounding is seen."""
    folders = (tmp_path / "a-16", tmp_path / "b-16")
    for folder, wide in zip(folders, tiny_adapters, strict=True):
        shutil.copytree(wide, folder)
        file = folder / "adapter_model.safetensors"
        factors = load_file(file)
        for key, factor in factors.items():
            first, second = factor if "lora_A" in key else factor.T
            second.mul_(0.2).add_(first, alpha=1 if "lora_A" in key else -1)
        save_file({key: factor.bfloat16() for key, factor in factors.items()}, file)
    return folders


@pytest.mark.parametrize(
    ("method", "rank", "parents"),
    [
        ("cat", None, "tiny_adapters"),
        ("svd", 2, "tiny_adapters"),
        ("svd", 2, "in_16_bits"),
        ("ties", None, "tiny_adapters"),
        ("ties_svd", 2, "tiny_adapters"),
    ],
)
def test_a_candidate_has_the_figures_of_the_file_that_a_merge_would_write(
    search: TunePlan, request: pytest.FixtureRequest, tmp_path: Path, method: str, rank: int | None, parents: str
):
    tiny_adapters = request.getfixturevalue(parents)
    search = replace(
        search, parents=tuple(replace(p, folder=str(f)) for p, f in zip(search.parents, tiny_adapters, strict=True))
    )
    weights = (0.7, 1.2)
    files = [folder / "adapter_model.safetensors" for folder in tiny_adapters]
    engine.merge(_plan(method, tiny_adapters, weights, rank), files, tmp_path)
    kind = _plan(method, tiny_adapters, (1.0, 1.0), rank)
    bench = tune_job.Bench(replace(search, kinds=(kind,)), lambda m: None, lambda: False, threads=1)
    rows = search.tasks[0].tuning

    bench.look(bench.candidate(0, (0.3, 0.1)), 0, rows, "another one first")
    made = bench.look(bench.candidate(0, weights), 0, rows, "in memory")
    stored = bench.look(bench.engine.subject(tmp_path), 0, rows, "from its file")
    bench.close()

    assert made == stored


@pytest.mark.parametrize("method", ["cat", "svd"])
def test_so_has_a_candidate_with_weights_by_layer(
    search: TunePlan, tiny_adapters: tuple[Path, Path], tmp_path: Path, method: str
):
    modules = [module.name for module in search.kinds[0].modules]
    groups, weights = layer_groups(modules, 2), (0.7, 1.2, 1.1, 0.3)
    first, layers = by_layer(weights, groups)
    files = [folder / "adapter_model.safetensors" for folder in tiny_adapters]
    engine.merge(_plan(method, tiny_adapters, first, layers=layers), files, tmp_path)
    plan = replace(search, kinds=(_plan(method, tiny_adapters, (1.0, 1.0)),), groups=groups)
    bench = tune_job.Bench(plan, lambda m: None, lambda: False, threads=1)
    rows = search.tasks[0].tuning

    made = bench.look(bench.candidate(0, weights), 0, rows, "in memory")
    stored = bench.look(bench.engine.subject(tmp_path), 0, rows, "from its file")
    everywhere = bench.look(bench.candidate(0, first * 2), 0, rows, "one weight a parent")
    bench.close()

    assert made == stored
    assert made != everywhere


def test_a_candidate_of_lower_rank_leaves_nothing_of_the_one_before(search: TunePlan):
    bench = tune_job.Bench(search, lambda m: None, lambda: False, threads=1)
    rows = search.tasks[0].tuning

    alone = bench.look(bench.candidate(1, (1.0, 0.5)), 0, rows, "svd")
    bench.look(bench.candidate(0, (1.5, 1.5)), 0, rows, "cat fills every row")
    again = bench.look(bench.candidate(1, (1.0, 0.5)), 0, rows, "svd")

    assert alone == again


def test_a_search_keeps_to_its_budget_and_reports_what_it_held_out(search: TunePlan, tmp_path: Path):
    finding = _run(search, tmp_path / "j")

    looked = sum(trial.samples for trial in finding.trials) + len({r.trial for r in finding.heldout}) * 10
    assert finding.used == pytest.approx(looked / 10)
    # left over: less than a step, and a look at the plain sum where it is a finalist itself
    assert search.budget - 2 <= finding.used <= search.budget
    assert finding.trials[PLAIN].weights == (1.0, 1.0)
    assert finding.trials[PLAIN].complete
    # five samples a task are few: only a candidate that is told apart from the plain sum may win
    passed_over = {each.trial for each in finding.margins if not each.beyond}
    complete = [trial for trial in finding.trials if trial.complete and trial.number not in passed_over]
    assert finding.winner.worst == max(trial.worst for trial in complete)
    assert finding.winner.number in {PLAIN, *(each.trial for each in finding.margins if each.beyond)}
    assert {row.trial for row in finding.heldout} == {*finding.finalists, PLAIN}
    assert len({(trial.kind, trial.weights) for trial in finding.trials}) == len(finding.trials)
    assert {trial.kind for trial in finding.trials} == {0, 1}


def test_a_search_that_was_stopped_anywhere_goes_on_as_if_it_had_not_been(search: TunePlan, tmp_path: Path):
    whole = _run(search, tmp_path / "whole")
    journal = tmp_path / "parts"

    for looks in (3, 8, 3):  # among the references, in a trial, in another one
        left = iter(range(looks))
        with pytest.raises(JobCancelled):
            _run(search, journal, lambda left=left: next(left, None) is None)
        with journal.open("a") as file:
            file.write('{"trial": {"number": 99')  # a line that was cut off
    resumed = _run(search, journal)

    assert resumed == whole
    assert [line["number"] for line in _lines(journal, "trial")] == [trial.number for trial in whole.trials]
    assert len({(line["of"], line["task"]) for line in _lines(journal, "reference")}) == 6
    assert len(_lines(journal, "reference")) == 6


def test_groups_of_layers_part_once_the_surrogate_proposes_and_the_search_is_the_same_when_it_goes_on(
    search: TunePlan, tmp_path: Path
):
    groups = layer_groups([module.name for module in search.kinds[0].modules], 2)
    grouped = replace(search, groups=groups, budget=12)

    whole = _run(grouped, tmp_path / "whole")
    left = iter(range(14))
    with pytest.raises(JobCancelled):
        _run(grouped, tmp_path / "parts", lambda: next(left, None) is None)
    resumed = _run(grouped, tmp_path / "parts")

    assert resumed == whole
    parted = [trial.number for trial in whole.trials if trial.weights[:2] != trial.weights[2:]]
    assert parted
    assert min(parted) == tune_job.STARTUP
    assert _run(replace(search, budget=12), tmp_path / "parts") != whole  # one without groups is another one


def test_the_journal_of_another_search_is_not_taken_over(search: TunePlan, tmp_path: Path):
    _run(replace(search, budget=5), tmp_path / "j")
    other = replace(search, budget=5, seed=6)

    assert _run(other, tmp_path / "j") == _run(other, tmp_path / "new")


def test_a_finished_search_is_told_again_without_its_model(search: TunePlan, tmp_path: Path):
    finding = _run(search, tmp_path / "j")

    assert _run(replace(search, base_folder=str(tmp_path / "nowhere")), tmp_path / "j") == finding


def test_fifty_swaps_leave_the_base_as_it_was(search: TunePlan, tiny_adapters: tuple[Path, Path]):
    loaded = Engine(Path(search.base_folder), device="cpu", batch_size=4, threads=1, tick=lambda samples: None)
    ids = torch.arange(24).unsqueeze(0)

    def logits(folder: Path | None) -> torch.Tensor:
        with loaded.subject(folder), torch.inference_mode():
            return loaded._model(ids).logits.clone()

    before, first = logits(None), logits(tiny_adapters[0])
    for i in range(50):
        logits(tiny_adapters[i % 2])

    assert torch.equal(before, logits(None))
    assert torch.equal(first, logits(tiny_adapters[0]))
    assert not torch.equal(before, first)


def test_batches_of_1_8_and_16_give_the_same_figures(search: TunePlan, tiny_adapters: tuple[Path, Path]):
    task = replace(search.tasks[0].task, metrics=("nll", "chrf"))
    found = []
    for size in (1, 8, 16):
        loaded = Engine(Path(search.base_folder), device="cpu", batch_size=size, threads=1, tick=lambda samples: None)
        with loaded.subject(tiny_adapters[0]):
            found.append(loaded.answer(task, (*search.tasks[0].tuning, *search.tasks[0].heldout)))

    assert found[0].texts == found[1].texts == found[2].texts
    for answers in found[1:]:
        # padding changes the order of float32 sums; docs/evaluation.md promises 1e-4 of each likelihood
        assert [s["nll"] for s in answers.samples] == pytest.approx([s["nll"] for s in found[0].samples], rel=1e-4)


def test_a_search_without_groups_joins_the_same_one_of_before_there_were_any(
    tiny_base: Path, tiny_adapters: tuple[Path, Path], write_suite: Callable[..., Path], home: Path
):
    registry = connect(load_settings({"home": home, "eval_device": "cpu", "base_paths": f"tiny/base={tiny_base}"}))
    for name, folder in zip(("a", "b"), tiny_adapters, strict=True):
        registry.register(str(folder), name=name, base="tiny/base")
    suite = str(write_suite(TASK.replace("NAME", "one"), rows=ROWS))
    request = TuneRequest((parse_ref("a"), parse_ref("b")), suites=(suite,))

    with only_one(home):  # whoever is rung for finds the place taken, and leaves
        job, grouped = registry.tune(request), registry.tune(replace(request, layer_groups=2))

    fields = ("parents", "kinds", "into", "suites", "budget", "seed", "limit", "keep")
    assert job.key == json_digest({field: job.spec[field] for field in fields})
    assert grouped.key == json_digest({field: grouped.spec[field] for field in (*fields, "layer_groups")})
    assert grouped.spec["layer_groups"]


def test_a_search_on_a_base_in_four_bits_is_another_one_and_so_is_what_its_merge_is_evaluated_on(
    tiny_base: Path,
    tiny_adapters: tuple[Path, Path],
    write_suite: Callable[..., Path],
    home: Path,
    mlflow_schema: Path,
):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: NOTHING WAS SEARCHED IN 4 BITS")
    (home / "mlflow.db").write_bytes(mlflow_schema.read_bytes())
    registry = connect(
        load_settings({"home": home, "idle_s": 0.3, "eval_device": "cpu", "base_paths": f"tiny/base={tiny_base}"})
    )
    registry.bell = WorkHere(registry.settings)
    for name, folder in zip(("a", "b"), tiny_adapters, strict=True):
        registry.register(str(folder), name=name, base="tiny/base")
    suite = str(write_suite(TASK.replace("chrf", "nll_per_byte").replace("NAME", "one"), rows=ROWS, name="one"))
    request = TuneRequest((parse_ref("a"), parse_ref("b")), suites=(suite,), budget=4, keep=1, base_dtype="nf4")

    job = registry.tune(request)
    *_, ended = registry.follow(job.id, timeout_s=120)
    found = registry.tuned(job.id)
    *_, merged = registry.follow(found.jobs[0], timeout_s=120)
    *_, evaluated = registry.follow(merged.result["jobs"][0], timeout_s=120)

    assert (job.title, ended.state) == ("tune a:v1 b:v1, base in nf4", JobState.SUCCEEDED), ended.error
    assert found.base_dtype == "nf4"
    assert evaluated.state is JobState.SUCCEEDED, evaluated.error
    assert set(registry.version(parse_ref("a-b")).metrics) == {"one/nll.nf4", "one/nll_per_byte.nf4"}
    rows = {row.metric: row for row in registry.retention(parse_ref("a-b")).rows}
    assert rows.keys() == {"nll.nf4", "nll_per_byte.nf4"}


def test_a_killed_search_is_finished_by_its_next_attempt_with_no_trial_twice(
    tiny_base: Path,
    tiny_adapters: tuple[Path, Path],
    write_suite: Callable[..., Path],
    home: Path,
    mlflow_schema: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    (home / "mlflow.db").write_bytes(mlflow_schema.read_bytes())
    registry = connect(
        load_settings({"home": home, "idle_s": 0.3, "eval_device": "cpu", "base_paths": f"tiny/base={tiny_base}"})
    )
    for name, folder in zip(("a", "b"), tiny_adapters, strict=True):
        registry.register(str(folder), name=name, base="tiny/base")
    suites = [str(write_suite(TASK.replace("NAME", name), rows=ROWS, name=name)) for name in ("one", "two")]
    monkeypatch.setenv("ADAPTERCTL_CRASH_AT", "tune.trial")
    monkeypatch.setenv("ADAPTERCTL_CRASH_ONCE", str(tmp_path / "died"))
    request = TuneRequest((parse_ref("a"), parse_ref("b")), suites=tuple(suites), budget=6, keep=1, layer_groups=2)

    with pytest.raises(InvalidInput, match="--budget 3"):
        registry.tune(replace(request, budget=3))
    with pytest.raises(InvalidInput, match="make no 99 groups"):
        registry.tune(replace(request, layer_groups=99))
    job = registry.tune(request)
    *_, ended = registry.follow(job.id, timeout_s=240)
    found = registry.tuned(job.id)
    *_, merged = registry.follow(found.jobs[0], timeout_s=240)
    registry.cancel(merged.result["jobs"][0])  # evaluations have tests of their own

    told = CliRunner().invoke(app, ["--home", str(home), "jobs", "show", job.id], prog_name="adapterctl")
    assert told.exit_code == 0, told.output
    assert "succeeded" in told.stdout
    assert f"* {found.explanation[0]}" in told.stdout
    assert (tmp_path / "died").exists()
    assert (ended.state, ended.attempt) == (JobState.SUCCEEDED, 2), ended.error
    numbers = [line["number"] for line in _lines(home / "jobs" / f"{job.id}.trials.jsonl", "trial")]
    assert numbers == [trial.number for trial in found.trials] == list(range(len(numbers)))
    version = registry.version(parse_ref("a-b"))
    assert merged.state is JobState.SUCCEEDED
    assert version.tags == {"tune": job.id, "tune_trial": str(found.winner)}
    assert [parent.weight for parent in version.parents] == [p.weight for p in found.trials[found.winner].weights]
    client = MlflowClient(registry.ledger.mlflow_uri)
    (experiment,) = [e for e in client.search_experiments() if e.name == "adapters"]
    (run,) = client.search_runs([experiment.experiment_id], f"tags.`adapterctl.tune` = '{job.id}'")
    assert len(client.get_metric_history(run.info.run_id, "worst")) == len(numbers)
    files = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert files == {"explanation.md", "pareto.png", "trials.json", "trials.png", "weights.png"}

    # The same search for another name, whose journal is there already: kill the supervisor in what follows its child.
    for name in ("ADAPTERCTL_CRASH_AT", "ADAPTERCTL_CRASH_ONCE"):
        monkeypatch.delenv(name)
    patience = time.monotonic() + 60
    while not nobody_works(home):
        assert time.monotonic() < patience
        time.sleep(0.05)
    with only_one(home):  # whoever is rung for finds the place taken, and leaves
        again = registry.tune(replace(request, into="again"))
    journals = [home / "jobs" / f"{each.id}.trials.jsonl" for each in (job, again)]
    journals[1].write_bytes(journals[0].read_bytes())
    for point in ("tune.run", "tune.queued", "ledger.committed"):  # the last one: its winner is merged
        assert supervise(registry, crash_at=point) == -signal.SIGKILL

    ended = registry.job(again.id)
    assert (ended.state, ended.attempt) == (JobState.SUCCEEDED, 3), ended.error
    assert registry.tuned(again.id).trials == found.trials
    assert [line["number"] for line in _lines(journals[1], "trial")] == numbers
    (one,) = client.search_runs([experiment.experiment_id], f"tags.`adapterctl.tune` = '{again.id}'")
    assert (one.info.status, one.data.params) == ("FINISHED", run.data.params)
    for key in one.data.metrics:
        steps = [[(m.step, m.value) for m in client.get_metric_history(each.info.run_id, key)] for each in (run, one)]
        assert steps[0] == steps[1]
    assert one.data.metrics == run.data.metrics
    (registered,) = registry.versions("again")
    assert (registered.tags["tune"], registered.content_digest) == (again.id, version.content_digest)

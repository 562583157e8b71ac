"""Kill -9 in the middle of an evaluation: what was finished is not computed again, and no figure stands twice.

The supervisors are real processes that the test starts itself, one after the other, each to die at a named point;
only the last one of each job, which ends it, is in this process.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from registries import WorkHere, supervise
from sqlalchemy import select

from adapterctl.bootstrap import connect
from adapterctl.registry.domain.evals import EvalReport
from adapterctl.registry.domain.job import Job, JobState, Progress
from adapterctl.registry.domain.refs import parse_ref
from adapterctl.registry.domain.version import AdapterVersion
from adapterctl.registry.services.local import LocalRegistry
from adapterctl.registry.services.resolve import resolve
from adapterctl.registry.settings import load_settings
from adapterctl.registry.stores.mlflow_access import VERSION_ID
from adapterctl.registry.stores.mlflow_pages import mlflow_key
from adapterctl.registry.stores.spawn_bell import only_one
from adapterctl.registry.stores.sql.tables import metric

TASK = "tasks:\n" + "".join(
    f"  - {{name: {name}, data: rows.jsonl, metrics: [nll, chrf], max_new_tokens: 4}}\n" for name in ("t", "u")
)
KILLED = -signal.SIGKILL


@pytest.fixture
def registry(
    home: Path, ledger_schema: Path, mlflow_schema: Path, tiny_base: Path, tiny_adapters: tuple[Path, Path]
) -> LocalRegistry:
    """One with translate:v1 and the same bytes as copy:v1, so that the reports of one are those of the other."""
    (home / "registry.db").write_bytes(ledger_schema.read_bytes())
    (home / "mlflow.db").write_bytes(mlflow_schema.read_bytes())
    given = {"home": home, "idle_s": 0.1, "threads": 1, "eval_device": "cpu", "base_paths": f"tiny/base={tiny_base}"}
    registry = connect(load_settings(given))
    for name in ("translate", "copy"):
        registry.register(str(tiny_adapters[0]), name=name, base="tiny/base")
    return registry


def test_a_killed_evaluation_is_finished_with_no_report_made_twice_and_no_figure_twice(
    registry: LocalRegistry, write_suite: Callable[..., Path]
):
    suite = str(write_suite(TASK, name="one"))

    first = ask(registry, "translate", suite, limit=3)
    assert supervise(registry, crash_at="eval.task") == 0  # each of three children dies after one more task
    assert registry.job(first.id).state is JobState.FAILED
    home = registry.settings.home / "evaluations"
    assert [path.name[-7:] for path in home.glob("*.task")] == ["-0.task"]  # of translate:v1; that of the base is whole
    again(registry, first)
    for point in ("eval.taken", "eval.logged"):
        assert supervise(registry, crash_at=point) == KILLED
    WorkHere(registry.settings).ring("whoever is left")
    assert check(registry, "translate", first, attempts=6) is None  # the last one needed no child

    second = ask(registry, "copy", suite, limit=3)  # its reports are there
    for point in ("eval.run", "eval.measured"):
        assert supervise(registry, crash_at=point) == KILLED
    WorkHere(registry.settings).ring("whoever is left")
    assert check(registry, "copy", second, attempts=3) is None


def ask(registry: LocalRegistry, name: str, suite: str, *, limit: int) -> Job:
    with only_one(registry.settings.home) as mine:  # whoever is rung for finds the place taken, and leaves
        assert mine
        return registry.evaluate([parse_ref(name)], suites=[suite], limit=limit)


def again(registry: LocalRegistry, job: Job) -> None:
    """Three more attempts."""
    with only_one(registry.settings.home):
        registry.retry(job.id)


def check(registry: LocalRegistry, name: str, job: Job, *, attempts: int) -> Progress | None:
    """The job has ended, and each of its figures stands once, wherever it stands; returns what the last child told."""
    ended = registry.job(job.id)
    assert (ended.state, ended.attempt) == (JobState.SUCCEEDED, attempts), ended.error
    version = resolve(registry.ledger, parse_ref(name))
    reports = registry.ledger.reports(ended.result["reports"]).values()
    (report,) = (each for each in reports if each.subject == version.spec.content_digest)
    client = MlflowClient(registry.ledger.mlflow_uri)
    (found,) = runs(client, version, report)
    run = client.get_run(found.info.run_id)  # whole: a search leaves the models out
    assert run.info.status == "FINISHED"
    assert run.data.params.keys() == {"suite", "limit", *report.engine}
    assert [len(found) for found in (run.inputs.dataset_inputs, run.inputs.model_inputs)] == [1, 1]
    metrics = client.get_logged_model(version.placement.model_id).metrics
    of_run = {each.key: each.value for each in metrics if each.run_id == run.info.run_id}
    assert of_run == {mlflow_key(key): value for key, value in report.metrics.items()}
    assert sum(each.run_id == run.info.run_id for each in metrics) == len(of_run)
    for key, value in of_run.items():
        on_version = client.get_metric_history(version.placement.run_id, key)
        assert [each.value for each in client.get_metric_history(run.info.run_id, key)] == [value]
        assert [each.value for each in on_version if each.timestamp == run.info.start_time] == [value]
    with registry.ledger._db.read() as connection:
        rows = connection.execute(select(metric.c.key, metric.c.value).where(metric.c.version_id == version.id)).all()
    assert [rows.count(each) for each in report.metrics.items()] == [1] * len(report.metrics)
    assert not list((registry.settings.home / "evaluations").iterdir())
    return ended.progress


def runs(client: MlflowClient, version: AdapterVersion, report: EvalReport) -> list[Run]:
    experiment = client.get_run(version.placement.run_id).info.experiment_id
    tags = f"tags.`adapterctl.report` = '{report.key}' and tags.`{VERSION_ID}` = '{version.id}'"
    return list(client.search_runs([experiment], tags))

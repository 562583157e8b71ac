"""Evaluations in MLflow: each a nested run of the version's source run, with its dataset, figures and outputs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from ..crashpoints import reached
from ..domain.base_dtype import told
from ..domain.evals import EvalReport
from ..domain.version import AdapterVersion
from ..ports import Beside
from ..wire import to_builtins, to_json
from .mlflow_access import KIND, PARENT_RUN, VERSION_ID, Mlflow, dataset_input
from .mlflow_pages import mlflow_key, outputs_page

# isort: split
# after mlflow_access, which sets what MLflow reads while it is imported
from mlflow.entities import Metric, Param, Run

REPORT = "adapterctl.report"
SEARCH = "adapterctl.tune"


def log_report(
    mlflow: Mlflow, version: AdapterVersion, report: EvalReport, *, dataset_digest: str, beside: Beside
) -> None:
    """Log a report once; a second call completes what a killed one left out.

    The figures stand on the evaluation's run, tied to the LoggedModel and the dataset, and again on the source run,
    because that is the one whose figures MLflow's Compare page reads.
    """
    run = _run(mlflow, version, report, dataset_digest)
    run_id, model_id, at = run.info.run_id, version.placement.model_id, run.info.start_time
    dataset = dataset_input(report.suite, dataset_digest, context="evaluation")
    name, digest = dataset.dataset.name, dataset.dataset.digest
    figures = {mlflow_key(key): float(value) for key, value in report.metrics.items()}
    _log_params(mlflow, run, {"suite": report.suite, "limit": str(report.limit), **report.engine})
    mlflow.client.log_inputs(run_id, datasets=[dataset])
    mlflow.link_inputs(run, [model_id])
    mlflow.write_files(run_id, _files(version, report, beside))
    mlflow.log(run_id, metrics=[Metric(k, v, at, 0, model_id, name, digest) for k, v in figures.items()])
    reached("eval.measured")
    mlflow.log(version.placement.run_id, metrics=[Metric(k, v, at, 0) for k, v in figures.items()])
    mlflow.finish_run(run)
    reached("eval.logged")


def log_search(
    mlflow: Mlflow,
    key: str,
    name: str,
    parents: Sequence[AdapterVersion],
    *,
    params: Mapping[str, str],
    series: Mapping[str, Sequence[tuple[int, float]]],
    files: Mapping[str, str | bytes],
) -> None:
    """Log a search once, its trials as steps of the run's metrics; a second call completes what a killed one left out.

    One run a search and not one a trial: forty rows of candidates that were never made would bury the versions.
    """
    run = mlflow.find_run(f"tags.`{SEARCH}` = '{key}'")
    if run is None:
        run = mlflow.client.create_run(mlflow.experiment_id, tags={KIND: "tune", SEARCH: key}, run_name=name)
    reached("tune.run")
    run_id, at = run.info.run_id, run.info.start_time
    # the same value at the same time and step is stored once
    values = [Metric(mlflow_key(k), value, at, step) for k, points in series.items() for step, value in points]
    _log_params(mlflow, run, params)
    mlflow.log(run_id, metrics=values)
    mlflow.link_inputs(run, [parent.placement.model_id for parent in parents])
    mlflow.write_files(run_id, files)
    mlflow.finish_run(run)


def _run(mlflow: Mlflow, version: AdapterVersion, report: EvalReport, dataset_digest: str) -> Run:
    found = mlflow.find_run(f"tags.`{REPORT}` = '{report.key}' and tags.`{VERSION_ID}` = '{version.id}'")
    if found is not None:
        return found
    tags = {
        KIND: "eval",
        REPORT: report.key,
        VERSION_ID: version.id,
        PARENT_RUN: version.placement.run_id,
        "adapterctl.suite_digest": report.suite_digest,
        "adapterctl.dataset_digest": dataset_digest,
    }
    name = f"eval {version.label} on {report.suite}{told(report.dtype)}"
    run = mlflow.client.create_run(mlflow.experiment_id, tags=tags, run_name=name)
    reached("eval.run")
    return run


def _log_params(mlflow: Mlflow, run: Run, params: Mapping[str, str]) -> None:
    """What is missing of these: a parameter cannot be changed, not even to what it is."""
    named = {mlflow_key(key): value[:5000] for key, value in params.items()}
    missing = [Param(key, value) for key, value in named.items() if key not in run.data.params]
    mlflow.log(run.info.run_id, params=missing)


def _files(version: AdapterVersion, report: EvalReport, beside: Beside) -> dict[str, str | bytes]:
    title = f"{version.label} on {report.suite}"
    files: dict[str, str | bytes] = {"report.json": to_json(report), **beside.pictures}
    if report.outputs:
        files["outputs.json"] = json.dumps(to_builtins(report.outputs), indent=2, ensure_ascii=False)
        files["outputs.md"] = outputs_page(title, report.outputs)
    if beside.answers:
        files["side_by_side.md"] = outputs_page(f"{title}, beside base and parents", beside.answers)
    return files

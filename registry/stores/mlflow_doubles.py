"""What MLflow has twice: made by two processes at once, because one of them lost the lock that it held.

The ledger decides which of them counts. What carries the same key as the run of a version that the ledger names, and is
not named itself, is a double: a model version, a LoggedModel of that very run, or another run with all that it made.
What the ledger names for any version is none, whatever its tags say: people can change those.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from ..domain.version import AdapterVersion
from ..ports import Double
from .mlflow_access import KEY, Mlflow

# isort: split
# after mlflow_access, which sets what MLflow reads while it is imported
from mlflow.entities import LoggedModel, Run
from mlflow.entities.model_registry import ModelVersion

_MODEL = "models:/"


def find_doubles(mlflow: Mlflow, versions: Sequence[AdapterVersion], key: str | None) -> list[Double]:
    """In the order in which they are to be deleted: one who is killed on the way leaves what leads to the rest."""
    experiment = mlflow.find_experiment()
    if experiment is None:
        return []
    tagged = f"tags.`{KEY}` LIKE '%'" if key is None else f"tags.`{KEY}` = '{key}'"
    runs = list(pages(partial(mlflow.client.search_runs, [experiment], tagged)))
    by_run = {version.placement.run_id: version for version in versions}
    live = {version.placement.run_id for version in versions if version.state == "live"}
    keys = {run.info.run_id: run.data.tags[KEY] for run in runs if run.info.run_id in live}
    owners = {of_key: by_run[run_id] for run_id, of_key in keys.items()}
    if not owners:
        return []
    of_one = [] if key is None else [f"source_run_id = '{owners[key].placement.run_id}'"]
    models = pages(partial(mlflow.client.search_logged_models, [experiment], *of_one))
    stored = pages(partial(mlflow.client.search_model_versions, *([] if key is None else [tagged])))
    named = {(version.name, version.number) for version in versions}
    return [
        *_versions(owners, stored, named),
        *_models(mlflow, by_run, keys, models),
        *_runs(mlflow, owners, by_run, runs),
    ]


def pages(search: Callable[..., Any]) -> Iterator[Any]:
    """All that a search of MLflow's client finds."""
    token = None
    while True:
        found = search(max_results=1000, page_token=token)
        yield from found
        token = found.token
        if not token:
            return


def model_id(version: ModelVersion) -> str:
    return str(version.source).removeprefix(_MODEL)


def bytes_of_run(mlflow: Mlflow, run: Run, models: Sequence[LoggedModel]) -> int:
    """The bytes of its own artifacts and of the models that it made."""
    locations = [run.info.artifact_uri, *(model.artifact_location for model in models)]
    return sum(mlflow.size_of_files(location) for location in locations)


def _versions(
    owners: Mapping[str, AdapterVersion], stored: Iterator[ModelVersion], named: Container[tuple[str, int]]
) -> Iterator[Double]:
    for each in sorted(stored, key=lambda version: int(version.version)):
        key = each.tags.get(KEY, "")
        of = owners.get(key)
        if of is None or (each.name, int(each.version)) in named:
            continue
        # MLflow copies every tag when a person copies a version, and names what it was copied from
        if each.name == of.name and "/" not in model_id(each):
            yield Double(of, key, "version", str(each.version))


def _models(
    mlflow: Mlflow, by_run: Mapping[str, AdapterVersion], keys: Mapping[str, str], models: Iterator[LoggedModel]
) -> Iterator[Double]:
    for model in models:
        key = keys.get(model.source_run_id)
        if key is None or model.model_id == by_run[model.source_run_id].placement.model_id:
            continue
        size = mlflow.size_of_files(model.artifact_location)
        yield Double(by_run[model.source_run_id], key, "model", model.model_id, size)


def _runs(
    mlflow: Mlflow, owners: Mapping[str, AdapterVersion], named: Container[str], runs: Sequence[Run]
) -> Iterator[Double]:
    for run in runs:
        of = owners.get(run.data.tags[KEY])
        if of is not None and run.info.run_id not in named:
            models = models_of(mlflow, run.info.run_id)
            yield Double(of, run.data.tags[KEY], "run", run.info.run_id, bytes_of_run(mlflow, run, models))


def models_of(mlflow: Mlflow, run_id: str) -> list[LoggedModel]:
    """The LoggedModels that a run made."""
    return list(mlflow.client.search_logged_models([mlflow.experiment_id], f"source_run_id = '{run_id}'"))

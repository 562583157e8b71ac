"""MLflow: the browsable record of versions, and the place where their bytes live once.

A version is a model version whose source is a LoggedModel; the LoggedModel holds the files and the metrics, the source
run holds parameters, parents and artifacts. Nothing here is atomic across those, so `place` writes in an order that
never shows a half version: run, LoggedModel, files, links, and the model version last. Everything is found by tag
before it is created, so a killed attempt is continued, not repeated.
"""

from __future__ import annotations

import json
import shutil
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from ..crashpoints import reached
from ..domain.digest import json_digest
from ..domain.errors import NotFound, Refused
from ..domain.evals import EvalReport
from ..domain.version import AdapterVersion, Base, FileRecord, NewVersion, Placement, local_folder
from ..ports import Attempt, Beside, Double, Parent, SeenModel, SeenVersion
from ..wire import from_json, to_builtins, to_json
from .artifacts import files_are_gone, list_files, move_into_place, own_folder, put_back
from .mlflow_access import (
    ADAPTER_ID,
    EXISTS,
    KEY,
    KIND,
    MISSING,
    PARENT_RUN,
    VERSION_ID,
    Mlflow,
    dataset_input,
    in_our_words,
    missing_is_fine,
)
from .mlflow_doubles import bytes_of_run, find_doubles, model_id, models_of, pages
from .mlflow_layers import layers_picture
from .mlflow_pages import (
    LAYERS_FILE,
    describe,
    describe_adapter,
    figures,
    is_described,
    lineage_page,
    lineage_record,
    mlflow_key,
    mlmodel,
    picture,
    pictured_as,
    with_children,
    with_name,
    with_ours,
    with_recall,
)
from .mlflow_reports import log_report, log_search

# isort: split
# after mlflow_access, which sets what MLflow reads while it is imported
from mlflow.entities import LoggedModel, LoggedModelOutput, Metric, Param, Run, RunTag
from mlflow.entities.model_registry import ModelVersion, RegisteredModel
from mlflow.exceptions import MlflowException

PARENT = "adapterctl.parent"
RECALLED = "adapterctl.recalled"
TAKEN_AS = "adapterctl.taken_as"
TASK = "task"
#: What a model version says of its base.
BASE_TAG = "base_model"
MERGE_WEIGHT = "merge_weight"
TRAINED_FROM = "trained_from"
MANIFEST = "manifest.json"
_NOTE = "mlflow.note.content"
_MODEL_VERSIONS = "mlflow.modelVersions"
#: Two writers of one alias: MLflow wraps the integrity error of the loser in this code, as if the request were wrong.
_RACE = "BAD_REQUEST"
_RACE_TRIES = 8
#: MLflow's own order is by the last change, and its pages are offsets: a text written meanwhile would hide a version.
_STABLE = ["name ASC", "version_number ASC"]


class MlflowVersions:
    """The version store on MLflow 3, embedded (a database file and folders under `home`) or remote.

    Args:
        tracking_uri: an MLflow server, or None for the embedded registry.
        home: holds `mlflow.db` and `artifacts/` of an embedded registry.
        registry_id: the ledger's; MLflow's experiment carries it too, and a different one is refused.
        artifacts: where a new registry keeps its files, unless in `home`; a tracking server decides that itself.
    """

    def __init__(self, tracking_uri: str | None, home: Path, registry_id: str, artifacts: str | None = None) -> None:
        self._mlflow = Mlflow(tracking_uri, home, registry_id, artifacts)
        self._client = self._mlflow.client

    @property
    def uri(self) -> str:
        return self._mlflow.uri

    @in_our_words
    def check_identity(self) -> bool:
        return self._mlflow.known_experiment() is not None

    @in_our_words
    def ensure_adapter(self, name: str, adapter_id: str, base: Base, *, exists: bool = False) -> None:
        _ = self._mlflow.experiment_id  # an MLflow of another registry is refused before anything is written
        try:
            model = self._client.get_registered_model(name)
        except MlflowException as error:
            if error.error_code != MISSING:
                raise
            if exists:
                raise Refused(
                    f"MLflow has no registered model {name!r}: it was renamed or deleted there",
                    hint="adapterctl doctor tells which, and what to do",
                ) from error
            model = self._create_adapter(name, adapter_id, base)
        if model.tags.get(ADAPTER_ID) not in (None, adapter_id):
            raise Refused(
                f"MLflow has a registered model {name!r} of another adapter than the one that is called so here",
                hint="adapterctl doctor tells which, and what to do",
            )
        if ADAPTER_ID not in model.tags:
            raise Refused(
                f"MLflow has a registered model {name!r} that adapterctl did not make",
                hint="choose another name, or rename the model in MLflow",
            )

    @in_our_words
    def place(
        self,
        spec: NewVersion,
        *,
        adapter_id: str,
        version_id: str,
        key: str,
        staged: Path,
        parents: Sequence[Parent],
        check: Callable[[], None] = lambda: None,
        used: Mapping[int, str] = MappingProxyType({}),
    ) -> tuple[str, Placement]:
        """Write one version, or what is missing of it after a kill; see the head of this file for the order."""
        found = self._version_by_key(spec.adapter, key)
        if found is not None and not _is_used(found, used):
            files = from_json(self._mlflow.read_file(found.run_id, MANIFEST), tuple[FileRecord, ...])
        else:
            run = self._run_by_key(adapter_id, key)
            if run is None:
                check()
                run = self._create_run(spec, adapter_id, version_id, key)
            reached("register.run")
            check()
            model = self._model_of(run) or self._create_model(spec, run, parents)
            reached("register.model")
            files = self._move_in(spec, run, model, staged, check)
            reached("register.files")
            self._client.finalize_logged_model(model.model_id, "READY")
            reached("register.finalized")
            check()
            self._link(spec, run, model, parents, files)
            reached("register.linked")
            check()
            found = found or self._create_version(spec, run, model, parents)
            while _is_used(found, used):
                self._client.delete_model_version(found.name, found.version)
                found = self._create_version(spec, run, model, parents)
            reached("register.version")
        check()
        model = self._client.get_logged_model(model_id(found))
        self._complete(spec, found, parents)
        placement = Placement(int(found.version), model.model_id, found.run_id, model.artifact_location, files)
        return str(found.tags[VERSION_ID]), placement

    @contextmanager
    def folder(self, version: AdapterVersion) -> Iterator[Path]:
        own = own_folder(version)
        if own is not None:
            yield own
            return
        location = version.placement.location
        if not self._mlflow.has_files(location):
            raise files_are_gone(version, location)
        with self._mlflow.download(location) as folder:
            yield folder

    @contextmanager
    def source_folder(self, kind: Literal["run", "model"], location: str, wanted: Collection[str]) -> Iterator[Path]:
        with self._mlflow.download(self._mlflow.artifact_uri(kind, location), wanted) as folder:
            yield folder

    @in_our_words
    def run_metrics(self, run_id: str) -> dict[str, float]:
        try:
            return dict(self._client.get_run(run_id).data.metrics)
        except MlflowException as error:
            if error.error_code in (MISSING, "INVALID_PARAMETER_VALUE"):  # the latter for what cannot be an id
                raise NotFound(
                    f"MLflow has no run {run_id}", hint="give the id that its page shows: runs:/ID"
                ) from error
            raise

    @in_our_words
    def alias(self, name: str, alias: str) -> int | None:
        try:
            return int(self._client.get_model_version_by_alias(name, alias).version)
        except MlflowException as error:
            if error.error_code in (MISSING, "INVALID_PARAMETER_VALUE"):  # the latter where only the alias is missing
                return None
            raise

    @in_our_words
    def has(self, version: AdapterVersion) -> bool:
        carried: str | None = None
        with missing_is_fine():
            carried = self._client.get_model_version(version.name, str(version.number)).tags.get(VERSION_ID)
        return carried == version.id

    @in_our_words
    def seen(self, adapter_id: str | None = None) -> list[SeenModel]:
        if adapter_id is None:
            versions = list(pages(partial(self._client.search_model_versions, order_by=_STABLE)))
            return _seen(pages(self._client.search_registered_models), versions)
        search = partial(self._client.search_registered_models, f"tags.`{ADAPTER_ID}` = '{adapter_id}'")
        while True:
            models = list(pages(search))
            found = [each for model in models for each in self._versions_of(model.name)]
            if [model.name for model in models] == [model.name for model in pages(search)]:  # not renamed meanwhile
                return _seen(models, found)

    def _versions_of(self, name: str) -> Iterator[ModelVersion]:
        quote = '"' if "'" in name else "'"  # MLflow takes any name, and knows no escape
        return pages(partial(self._client.search_model_versions, f"name = {quote}{name}{quote}", order_by=_STABLE))

    @in_our_words
    def without_run(self, versions: Sequence[AdapterVersion]) -> list[AdapterVersion]:
        return [version for version in versions if not self._knows_run(version.placement.run_id)]

    def _knows_run(self, run_id: str) -> bool:
        known = False
        with missing_is_fine():
            known = self._client.get_run(run_id) is not None
        return known

    @in_our_words
    def project_stage(self, name: str, stage: str, *, number: int | None, legacy: Mapping[int, str]) -> None:
        for each, legacy_stage in sorted(legacy.items()):
            self._set_legacy_stage(name, each, legacy_stage)
        reached("stage.legacy")
        # the alias comes last: where it is right, all is done
        if number is None:
            with missing_is_fine():  # somebody deleted the model; where only the alias is missing, MLflow is silent
                self._client.delete_registered_model_alias(name, stage)
            return
        self._set_alias(name, stage, number)

    def other_tags(
        self, version: AdapterVersion, found: SeenVersion, recalled: tuple[str, str] | None
    ) -> tuple[str, ...]:
        said = {**_said_tags(version), RECALLED: _said_of_recall(recalled)}
        return tuple(name for name, value in said.items() if found.tags.get(name) != value)

    @in_our_words
    def project_tags(self, version: AdapterVersion, keys: Sequence[str] | None) -> bool:
        said, number, there = _said_tags(version), str(version.number), dict[str, str]()
        with missing_is_fine():
            there = self._client.get_model_version(version.name, number).tags
        if there.get(VERSION_ID) != version.id:
            return False
        for name in said if keys is None else dict.fromkeys(map(mlflow_key, keys)):
            if name == BASE_TAG:  # ours, though it has no prefix
                continue
            if name in said:
                self._client.set_model_version_tag(version.name, number, name, said[name])
            elif name in there:
                with missing_is_fine():
                    self._client.delete_model_version_tag(version.name, number, name)
        return True

    @in_our_words
    def mark_recall(self, version: AdapterVersion, recalled: tuple[str, str] | None) -> None:
        with missing_is_fine():
            found = self._client.get_model_version(version.name, str(version.number))
            said = _said_of_recall(recalled)
            if found.tags.get(VERSION_ID) != version.id or found.tags.get(RECALLED) == said:
                return
            description = with_recall(found.description or "", recalled)
            self._client.update_model_version(version.name, found.version, description=description)
            # the tag comes last: where it is right, all is done
            if said is not None:
                self._client.set_model_version_tag(version.name, found.version, RECALLED, said)
            else:
                self._client.delete_model_version_tag(version.name, found.version, RECALLED)

    @in_our_words
    def mark_children(self, version: AdapterVersion, children: Sequence[AdapterVersion], count: int) -> None:
        with missing_is_fine():
            found = self._client.get_model_version(version.name, str(version.number))
            before = found.description or ""
            after = with_children(before, version, children, count)
            if found.tags.get(VERSION_ID) == version.id and after != before:
                self._client.update_model_version(version.name, found.version, description=after)

    @in_our_words
    def put_back(self, version: AdapterVersion, spec: NewVersion, staged: Path) -> None:
        target = local_folder(version.placement.location)
        assert target is not None
        run = self._client.get_run(version.placement.run_id)
        text = mlmodel(
            spec,
            version_id=version.id,
            run_id=run.info.run_id,
            model_id=version.placement.model_id,
            created_at=run.info.start_time / 1000,
        )
        (staged / "MLmodel").write_text(text, encoding="utf-8")
        put_back(staged, target, version.placement.files)

    @in_our_words
    def begun_as(self, name: str, number: int) -> tuple[str, str] | None:
        tags: Mapping[str, str] = {}
        with missing_is_fine():
            tags = self._client.get_model_version(name, str(number)).tags
        return (tags[KEY], tags[VERSION_ID]) if KEY in tags and VERSION_ID in tags else None

    @in_our_words
    def mark_taken(self, name: str, number: int, version: AdapterVersion) -> None:
        self._client.set_model_version_tag(name, str(number), TAKEN_AS, version.id)

    @in_our_words
    def describe(
        self,
        version: AdapterVersion,
        spec: NewVersion,
        parents: Sequence[Parent],
        recalled: tuple[str, str] | None,
    ) -> bool:
        name, number = version.name, str(version.number)
        found = self._client.get_model_version(name, number)
        if found.tags.get(VERSION_ID) != version.id:
            return True
        text = found.description or ""
        tags = {f"{PARENT}.{position}": parent.version for position, parent in enumerate(parents)}
        for key, parent in tags.items():
            text = with_name(text, found.tags.get(key, "").rpartition(":v")[0], parent.name)
        text = with_name(text, pictured_as(text), name)
        both = with_ours(text, describe(spec, parents, version.number), picture(name, version.number))
        if both is not None:
            self._client.update_model_version(name, number, description=with_recall(both, recalled))
        # tags come last: by them the next look finds what was cut short
        for key, parent in tags.items():
            if found.tags.get(key) != parent.label:
                self._client.set_model_version_tag(name, number, key, parent.label)
        for key in found.tags:
            if key.startswith(f"{PARENT}.") and key not in tags:
                self._client.delete_model_version_tag(name, number, key)
        return both is not None

    @in_our_words
    def describe_adapter(self, name: str, base: Base) -> bool:
        theirs = self._client.get_registered_model(name).description or ""
        theirs = with_name(theirs, pictured_as(theirs), name)
        both = with_ours(theirs, describe_adapter(name, base), picture(name))
        if both is not None:
            self._client.update_registered_model(name, description=both)
        return both is not None

    @in_our_words
    def log_report(
        self, version: AdapterVersion, report: EvalReport, *, dataset_digest: str, beside: Beside | None = None
    ) -> None:
        log_report(self._mlflow, version, report, dataset_digest=dataset_digest, beside=beside or Beside())

    @in_our_words
    def log_search(
        self,
        key: str,
        name: str,
        parents: Sequence[AdapterVersion],
        *,
        params: Mapping[str, str],
        series: Mapping[str, Sequence[tuple[int, float]]],
        files: Mapping[str, str | bytes],
    ) -> None:
        log_search(self._mlflow, key, name, parents, params=params, series=series, files=files)

    @in_our_words
    def remove(self, version: AdapterVersion) -> None:
        placement = version.placement
        with missing_is_fine():
            model_version = self._client.get_model_version(version.name, str(placement.number))
            if model_version.tags.get(VERSION_ID) != version.id:
                raise Refused(
                    f"MLflow's {version.label} is another version: the registered model was deleted and made again",
                    hint="run `adapterctl doctor`",
                )
            self._client.delete_model_version(version.name, str(placement.number))
        with missing_is_fine():
            self._client.delete_logged_model(placement.model_id)
        self._delete_files(placement.location, placement.model_id)
        for run in self._mlflow.runs(f"tags.`{PARENT_RUN}` = '{placement.run_id}'"):
            self._client.delete_run(run.info.run_id)
        with missing_is_fine():
            self._client.delete_run(placement.run_id)

    def _delete_files(self, location: str, owner: str) -> None:
        """Delete the files of a LoggedModel or a run, `owner`."""
        local = local_folder(location)
        if local is None:
            self._mlflow.delete_files(location)
        elif local.parent.name == owner:
            shutil.rmtree(local.parent, ignore_errors=not local.parent.exists())

    # what nobody refers to

    def stored_bytes(self, version: AdapterVersion) -> int:
        return self._mlflow.size_of_files(version.placement.location)

    @in_our_words
    def attempts(self) -> list[Attempt]:
        experiment = self._mlflow.find_experiment()
        if experiment is None:
            return []

        def search(**page: Any) -> Any:
            # a run is finished once its version is in MLflow; those of evaluations carry no id of an adapter
            condition = f"attributes.status != 'FINISHED' and tags.`{ADAPTER_ID}` LIKE '%'"
            return self._client.search_runs([experiment], condition, order_by=["start_time ASC"], **page)

        return [
            Attempt(run.info.run_id, run.data.tags[VERSION_ID], run.data.tags[KEY], run.info.start_time / 1000)
            for run in pages(search)
            if {VERSION_ID, KEY} <= run.data.tags.keys()
        ]

    @in_our_words
    def attempt_bytes(self, attempt: Attempt) -> int | None:
        models = models_of(self._mlflow, attempt.run_id)
        sources = [f"source_path LIKE '%{model.model_id}%'" for model in models]
        for condition in (f"run_id = '{attempt.run_id}'", *sources):
            if self._client.search_model_versions(condition, max_results=1):
                return None
        return bytes_of_run(self._mlflow, self._client.get_run(attempt.run_id), models)

    @in_our_words
    def drop_attempt(self, attempt: Attempt) -> None:
        self._drop_run(attempt.run_id)

    @in_our_words
    def doubles(self, versions: Sequence[AdapterVersion], key: str | None = None) -> list[Double]:
        return find_doubles(self._mlflow, versions, key)

    @in_our_words
    def drop_double(self, double: Double) -> None:
        with missing_is_fine():
            if double.kind == "version":
                self._client.delete_model_version(double.of.name, double.id)
            elif double.kind == "model":
                self._drop_model(self._client.get_logged_model(double.id))
            else:
                self._drop_run(double.id)

    def _drop_run(self, run_id: str) -> None:
        # the run last: by it the rest is found again after a kill
        for model in models_of(self._mlflow, run_id):
            self._drop_model(model)
        self._delete_files(self._client.get_run(run_id).info.artifact_uri, run_id)
        self._client.delete_run(run_id)

    def _drop_model(self, model: LoggedModel) -> None:
        self._delete_files(model.artifact_location, model.model_id)
        self._client.delete_logged_model(model.model_id)

    def _create_adapter(self, name: str, adapter_id: str, base: Base) -> Any:
        try:
            return self._client.create_registered_model(
                name,
                tags={ADAPTER_ID: adapter_id, "base_model": base.name},
                description=describe_adapter(name, base),
            )
        except MlflowException as error:
            if error.error_code != EXISTS:  # another process was first
                raise
            return self._client.get_registered_model(name)

    # one version, found or created step by step

    def _version_by_key(self, name: str, key: str) -> ModelVersion | None:
        # the first one: MLflow copies every tag when a version is copied
        found = self._client.search_model_versions(
            f"name = '{name}' and tags.`{KEY}` = '{key}'", max_results=1, order_by=["version_number ASC"]
        )
        return found[0] if found else None

    def _run_by_key(self, adapter_id: str, key: str) -> Run | None:
        return self._mlflow.find_run(f"tags.`{KEY}` = '{key}' and tags.`{ADAPTER_ID}` = '{adapter_id}'")

    def _create_run(self, spec: NewVersion, adapter_id: str, version_id: str, key: str) -> Run:
        tags = {KIND: spec.kind, KEY: key, ADAPTER_ID: adapter_id, VERSION_ID: version_id}
        return self._client.create_run(self._mlflow.experiment_id, tags=tags, run_name=f"{spec.kind} {spec.adapter}")

    def _model_of(self, run: Run) -> LoggedModel | None:
        linked = {output.model_id for output in _outputs(run)}  # one that is, where a lost lock made two
        found = sorted(models_of(self._mlflow, run.info.run_id), key=lambda model: model.model_id not in linked)
        return found[0] if found else None

    def _create_model(self, spec: NewVersion, run: Run, parents: Sequence[Parent]) -> LoggedModel:
        return self._client.create_logged_model(
            self._mlflow.experiment_id,
            name=spec.adapter.replace(".", "_"),  # MLflow takes no dot here
            source_run_id=run.info.run_id,
            tags={
                VERSION_ID: run.data.tags[VERSION_ID],
                "content_digest": spec.content_digest,
                _NOTE: describe(spec, parents),
            },
            params=_params(spec),
            model_type="peft-lora",
        )

    def _move_in(
        self, spec: NewVersion, run: Run, model: LoggedModel, staged: Path, check: Callable[[], None]
    ) -> tuple[FileRecord, ...]:
        """Complete the staged folder by its MLmodel and make it the model's artifacts; returns the manifest."""
        text = mlmodel(
            spec,
            version_id=run.data.tags[VERSION_ID],
            run_id=run.info.run_id,
            model_id=model.model_id,
            created_at=run.info.start_time / 1000,
        )
        (staged / "MLmodel").write_text(text, encoding="utf-8")
        files = list_files(staged)
        target = local_folder(model.artifact_location)
        check()  # to read the files takes a while
        if target is None:
            self._client.log_model_artifacts(model.model_id, str(staged))
        else:
            move_into_place(staged, target)
        return files

    def _link(
        self,
        spec: NewVersion,
        run: Run,
        model: LoggedModel,
        parents: Sequence[Parent],
        files: tuple[FileRecord, ...],
    ) -> None:
        """Everything of the source run that shows where the version comes from."""
        run_id = run.info.run_id
        params = {**_params(spec), **_parent_params(parents)}
        self._mlflow.log(
            run_id,
            # a parameter cannot be changed, not even to what it is; an earlier attempt may have logged it
            params=[Param(key, value) for key, value in params.items() if key not in run.data.params],
            tags=[
                RunTag(_NOTE, describe(spec, parents)),
                *(RunTag(f"tag.{mlflow_key(k)}", v[:5000]) for k, v in spec.tags.items()),
            ],
        )
        self._mlflow.write_files(run_id, self._source_files(spec, run, model, parents, files))
        if spec.dataset:
            digest = json_digest(spec.dataset)  # of its name: that is all we were told
            self._client.log_inputs(run_id, datasets=[dataset_input(spec.dataset, digest, context="training")])
        self._mlflow.link_inputs(run, [p.version.placement.model_id for p in parents])
        if model.model_id not in {output.model_id for output in _outputs(run)}:
            self._client.log_outputs(run_id, [LoggedModelOutput(model.model_id, 0)])

    def _source_files(
        self,
        spec: NewVersion,
        run: Run,
        model: LoggedModel,
        parents: Sequence[Parent],
        files: tuple[FileRecord, ...],
    ) -> dict[str, str]:
        version_id = run.data.tags[VERSION_ID]
        layers = layers_picture(spec.receipt)
        page = lineage_page(
            spec,
            parents,
            experiment_id=self._mlflow.experiment_id,
            model_id=model.model_id,
            run_id=run.info.run_id,
            layers=layers is not None,
        )
        texts = {
            MANIFEST: to_json(files),
            "lineage/lineage.md": page,
            "lineage/lineage.json": json.dumps(lineage_record(spec, parents, version_id=version_id), indent=2),
        }
        if spec.receipt is not None:
            texts["receipt.json"] = json.dumps(to_builtins(spec.receipt), indent=2)
        if layers is not None:
            texts[LAYERS_FILE] = layers
        return texts

    def _create_version(
        self, spec: NewVersion, run: Run, model: LoggedModel, parents: Sequence[Parent]
    ) -> ModelVersion:
        tags = {
            **_their_tags(spec.tags),
            KIND: spec.kind,
            BASE_TAG: spec.base.name,
            VERSION_ID: run.data.tags[VERSION_ID],
            KEY: run.data.tags[KEY],
            **{f"{PARENT}.{position}": p.version.label for position, p in enumerate(parents)},
        }
        with self._mlflow.as_global_uri():
            return self._client.create_model_version(
                spec.adapter,
                source=f"models:/{model.model_id}",
                run_id=run.info.run_id,
                model_id=model.model_id,
                tags=tags,
                description=describe(spec, parents),
                await_creation_for=0,  # the files are there: nothing is left to wait for
            )

    def _complete(self, spec: NewVersion, version: ModelVersion, parents: Sequence[Parent]) -> None:
        """What can only follow the version: its figures, its number on the pages of its model and run, and on each
        parent the one thing that leads from its page to this run.

        Metrics carry the time at which the run began: the same metric at the same time is stored once by MLflow.
        """
        # MLflow's server does this for whoever asks it; the SQL store in this process does not
        shown = json.dumps([{"name": spec.adapter, "version": int(version.version)}])
        text = describe(spec, parents, int(version.version))
        self._client.set_logged_model_tags(model_id(version), {_MODEL_VERSIONS: shown, _NOTE: text})
        self._mlflow.log(version.run_id, tags=[RunTag(_NOTE, text)])
        if version.description == describe(spec, parents):  # as it was made, before it had a number
            self._client.update_model_version(spec.adapter, version.version, description=text)
        self._set_task(spec, parents)
        run = self._client.get_run(version.run_id)
        at = run.info.start_time
        values = [Metric(key, value, at, 0, model_id=model_id(version)) for key, value in figures(spec).items()]
        for position, parent in enumerate(parents):
            name, weight = (TRAINED_FROM, 1.0) if parent.weight is None else (MERGE_WEIGHT, parent.weight)
            values.append(Metric(name, weight, at, position, model_id=parent.version.placement.model_id))
        if values:
            self._mlflow.log(run.info.run_id, metrics=values)
        self._client.update_run(run.info.run_id, name=f"{spec.kind} {spec.adapter}:v{version.version}")
        self._mlflow.finish_run(run)

    def _set_task(self, spec: NewVersion, parents: Sequence[Parent]) -> None:
        """Let MLflow's list be filtered by what a model is for: what the caller said, or what the parents are for."""
        task = spec.tags.get(TASK)
        if task is None:
            of_parents = [self._task_of(parent.version.name) for parent in parents]
            task = ", ".join(dict.fromkeys(each for tasks in of_parents for each in tasks.split(", ") if each))
        if task and task != self._task_of(spec.adapter):
            self._client.set_registered_model_tag(spec.adapter, TASK, task[:5000])

    def _task_of(self, name: str) -> str:
        try:
            return str(self._client.get_registered_model(name).tags.get(TASK, ""))
        except MlflowException as error:
            if error.error_code != MISSING:  # somebody deleted the model: then it does nothing
                raise
            return ""

    # stages

    def _set_legacy_stage(self, name: str, number: int, stage: str) -> None:
        exclusive = stage in ("Production", "Staging")
        with warnings.catch_warnings(), missing_is_fine():
            warnings.simplefilter("ignore", FutureWarning)  # stages are deprecated; some code still reads them
            self._client.transition_model_version_stage(name, str(number), stage, archive_existing_versions=exclusive)

    def _set_alias(self, name: str, alias: str, number: int) -> None:
        for attempt in range(1, _RACE_TRIES + 1):
            try:
                self._client.set_registered_model_alias(name, alias, str(number))
                return
            except MlflowException as error:
                if error.error_code == MISSING:
                    raise NotFound(f"MLflow has no {name}:v{number}", hint="run `adapterctl doctor`") from error
                if error.error_code != _RACE or attempt == _RACE_TRIES:
                    raise
                time.sleep(0.02 * attempt)


def _seen(models: Iterable[RegisteredModel], found: Iterable[ModelVersion]) -> list[SeenModel]:
    versions: dict[str, dict[int, SeenVersion]] = {}
    for version in found:
        number = int(version.version)
        versions.setdefault(version.name, {})[number] = SeenVersion(
            version.tags.get(VERSION_ID),
            version.tags.get(TAKEN_AS),
            is_described(version.description or "", version.name, number),
            _named_parents(version.tags),
            version.tags,
        )
    seen = (
        SeenModel(
            model.name,
            model.tags.get(ADAPTER_ID),
            is_described(model.description or "", model.name),
            versions.get(model.name, {}),
        )
        for model in models
    )
    return sorted(seen, key=lambda model: model.name)


def _named_parents(tags: Mapping[str, str]) -> tuple[str, ...]:
    keys = [key for key in tags if key.startswith(f"{PARENT}.")]
    return tuple(tags[key] for key in sorted(keys, key=lambda key: (len(key), key)))


def _is_used(version: ModelVersion, used: Mapping[int, str]) -> bool:
    """Whether the ledger gave the number of a model version to another version."""
    own = str(version.tags[VERSION_ID])
    return used.get(int(version.version), own) != own


def _their_tags(tags: Mapping[str, str]) -> dict[str, str]:
    """The caller's tags as a model version has them; of several keys that are one to MLflow, the last one counts."""
    return {mlflow_key(key): value[:5000] for key, value in tags.items()}


def _said_tags(version: AdapterVersion) -> dict[str, str]:
    """The tags of a model version that change with its ledger row or never: the caller's, but for one of our name."""
    theirs = _their_tags(version.spec.tags)
    theirs.pop(BASE_TAG, None)
    return {KIND: version.spec.kind, **theirs}


def _said_of_recall(recalled: tuple[str, str] | None) -> str | None:
    return ": ".join(recalled)[:5000] if recalled else None


def _params(spec: NewVersion) -> dict[str, str]:
    """What a version was made with; the caller's own parameters do not overwrite ours."""
    recipe = spec.recipe or {}
    ours = {
        "base_model": spec.base.name,
        "rank": spec.facts.max_rank,
        "dtype": "/".join(spec.facts.dtypes),
        "source": spec.source,
        "license": spec.license,
        "method": recipe.get("method"),
        "seed": recipe.get("seed"),
        "recipe_digest": spec.recipe_digest,
        **recipe.get("options", {}),
    }
    theirs = {mlflow_key(key): value for key, value in spec.params.items()}
    return {**theirs, **{key: str(value)[:5000] for key, value in ours.items() if value is not None}}


def _parent_params(parents: Sequence[Parent]) -> dict[str, str]:
    if not parents:
        return {}
    weights = [parent.weight for parent in parents if parent.weight is not None]
    names = {"parents": ", ".join(parent.version.label for parent in parents)[:5000]}
    return names | ({"weights": ", ".join(f"{weight:g}" for weight in weights)[:5000]} if weights else {})


def _outputs(run: Run) -> Sequence[LoggedModelOutput]:
    return (run.outputs.model_outputs if run.outputs else None) or ()

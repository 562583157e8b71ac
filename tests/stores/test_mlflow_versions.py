"""Versions in a real MLflow on SQLite, looked at with MLflow's own client."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import mlflow
import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import BAD_REQUEST

from adapterctl.bootstrap import connect, job_handlers
from adapterctl.registry.domain.errors import Corrupt, Misconfigured, NotFound, Refused, Unavailable
from adapterctl.registry.domain.evals import EvalReport, TaskResult
from adapterctl.registry.domain.version import AdapterVersion, Base, local_folder
from adapterctl.registry.ports import Parent
from adapterctl.registry.services.pull import damage
from adapterctl.registry.settings import Settings
from adapterctl.registry.stores.mlflow_server import embedded_uri
from adapterctl.registry.stores.mlflow_versions import MlflowVersions

REGISTRY_ID = "0192aaaa-registry"
BASE = Base("base-1", "tiny/base")
Put = Callable[..., AdapterVersion]


# what MLflow's own client sees


def test_a_version_is_a_model_version_whose_source_is_a_ready_logged_model(shared):
    shelf, family = shared
    placement = family["translate"].placement

    version = shelf.client.get_model_version("translate", "1")
    model = shelf.client.get_logged_model(placement.model_id)

    assert version.source == f"models:/{placement.model_id}"
    assert version.run_id == placement.run_id
    assert model.status == "READY"
    assert model.source_run_id == placement.run_id
    assert json.loads(model.tags["mlflow.modelVersions"]) == [{"name": "translate", "version": 1}]


def test_tags_are_tags_of_the_model_version(shelf):
    version = shelf.put("translate", "w", tags={"team": "mt", "base_model": "mine"})
    tagged = replace(version, spec=replace(version.spec, tags={"owner": "ada", "base_model": "mine"}))

    born = shelf.client.get_model_version("translate", "1").tags
    shelf.store.project_tags(tagged, ["owner", "team", "never", "base_model"])
    after = shelf.client.get_model_version("translate", "1").tags

    assert (born["team"], born["base_model"]) == ("mt", version.spec.base.name)
    assert {**born, "owner": "ada"} == {**after, "team": "mt"}
    assert not shelf.store.project_tags(replace(tagged, id="another"), ["owner"])
    assert not shelf.store.project_tags(replace(tagged, spec=replace(tagged.spec, adapter="renamed")), ["owner"])
    assert shelf.client.get_model_version("translate", "1").tags == after


def test_a_tag_of_mlflow_stays_while_a_key_that_becomes_it_stays(shelf):
    version = shelf.put("translate", "w", tags={"a/b": "1", "a//b": "2"})

    def left(tags: dict[str, str], changed: str) -> str | None:
        assert shelf.store.project_tags(replace(version, spec=replace(version.spec, tags=tags)), [changed])
        return shelf.client.get_model_version("translate", "1").tags.get("a/b")

    assert left({"a/b": "1", "a//b": "2"}, "a/b") == "2"
    assert left({"a/b": "1"}, "a//b") == "1"
    assert left({}, "a/b") is None


def test_a_merge_run_has_its_parents_as_inputs_and_the_child_as_output(shared):
    shelf, family = shared
    placement = family["translate-chat"].placement

    run = shelf.client.get_run(placement.run_id)

    parents = [family["translate"].placement.model_id, family["chat"].placement.model_id]
    assert sorted(each.model_id for each in run.inputs.model_inputs) == sorted(parents)
    assert [each.model_id for each in run.outputs.model_outputs] == [placement.model_id]
    assert run.data.params["parents"] == "translate:v1, chat:v1"
    assert run.data.params["weights"] == "0.6, 0.4"
    assert run.data.params["method"] == "cat"
    assert (run.info.status, run.info.run_name) == ("FINISHED", "merge translate-chat:v1")


def test_the_page_of_a_parent_leads_to_the_merge_run_by_a_metric(shared):
    shelf, family = shared
    metrics = shelf.client.get_logged_model(family["chat"].placement.model_id).metrics

    assert [(m.key, m.value, m.run_id) for m in metrics] == [
        ("merge_weight", 0.4, family["translate-chat"].placement.run_id)
    ]


def test_metrics_of_the_caller_stand_on_the_run_and_on_the_model_without_commas(shared):
    shelf, family = shared
    placement = family["translate"].placement

    on_run = shelf.client.get_run(placement.run_id).data.metrics
    on_model = {m.key: m.value for m in shelf.client.get_logged_model(placement.model_id).metrics}

    assert on_run["chrf_none"] == on_model["chrf_none"] == 41.5


def test_numbers_of_the_receipt_become_metrics_and_the_receipt_an_artifact(shared):
    shelf, family = shared
    run = shelf.client.get_run(family["translate-chat"].placement.run_id)

    folder = Path(shelf.client.download_artifacts(run.info.run_id, ""))

    assert run.data.metrics["receipt/loss"] == 0.25
    assert "receipt/identity" not in run.data.metrics
    assert json.loads((folder / "receipt.json").read_text()) == {"loss": 0.25, "identity": True}


def test_the_dataset_of_a_version_is_an_input_of_its_run(shared):
    shelf, family = shared
    inputs = shelf.client.get_run(family["translate"].placement.run_id).inputs.dataset_inputs

    assert [each.dataset.name for each in inputs] == ["gettext catalogues"]
    assert {tag.key: tag.value for tag in inputs[0].tags} == {"mlflow.data.context": "training"}


def test_children_are_found_by_the_parent_tag_of_their_version(shared):
    shelf, _ = shared
    found = shelf.client.search_model_versions("tags.`adapterctl.parent.1` = 'chat:v1'")

    assert [(each.name, each.version) for each in found] == [("translate-chat", 1)]


def test_a_version_has_six_tags_at_most_with_two_parents(shared):
    shelf, _ = shared
    tags = shelf.client.get_model_version("translate-chat", "1").tags

    assert len(tags) == 6


def test_registered_models_can_be_filtered_by_base(shared):
    shelf, _ = shared
    found = shelf.client.search_registered_models("tags.base_model = 'tiny/base'")

    assert [each.name for each in found] == ["chat", "translate", "translate-chat"]


def test_the_lineage_record_of_a_run_names_parents_weights_and_digests(shared, tmp_path: Path):
    shelf, family = shared
    run_id = family["translate-chat"].placement.run_id

    record = json.loads(Path(shelf.client.download_artifacts(run_id, "lineage/lineage.json", tmp_path)).read_text())

    assert record["version_id"] == family["translate-chat"].id
    assert [(p["ref"], p["weight"], p["content_digest"]) for p in record["parents"]] == [
        (f"{name}:v1", weight, family[name].spec.content_digest) for name, weight in (("translate", 0.6), ("chat", 0.4))
    ]


def test_training_on_a_parent_links_it_without_a_weight(client, put: Put):
    first = put("translate", "one")
    second = put("translate", "two", [Parent(first)], kind="train")

    run = client.get_run(second.placement.run_id)
    metrics = client.get_logged_model(first.placement.model_id).metrics

    assert [each.model_id for each in run.inputs.model_inputs] == [first.placement.model_id]
    assert [(m.key, m.value) for m in metrics] == [("trained_from", 1.0)]
    assert client.get_model_version("translate", "2").description.startswith("Trained from translate:v1.")


def test_one_version_may_be_a_parent_twice(client, put: Put):
    parent = put("translate", "t")
    child = put("double", "d", [Parent(parent, 0.5), Parent(parent, 0.5)], kind="merge", recipe={"method": "cat"})

    metrics = client.get_logged_model(parent.placement.model_id).metrics

    assert child.number == 1
    assert sorted((m.key, m.value, m.step) for m in metrics) == [("merge_weight", 0.5, 0), ("merge_weight", 0.5, 1)]


def test_a_name_with_a_dot_is_stored(client, put: Put):
    version = put("llama-3.1-translate", "t")

    assert client.get_model_version("llama-3.1-translate", "1").run_id == version.placement.run_id


def test_the_tracking_uri_of_the_program_is_left_alone(put: Put, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking.example:5000")
    mlflow.set_tracking_uri("http://tracking.example:5000")

    put("translate", "t")

    assert mlflow.get_tracking_uri() == os.environ["MLFLOW_TRACKING_URI"] == "http://tracking.example:5000"
    mlflow.set_tracking_uri(None)


# bytes


def test_the_files_of_a_version_are_those_of_its_manifest_and_read_only(store, family, mlflow_home):
    version = family["translate-chat"]

    with store.folder(version) as folder:
        findings = damage(folder, version.placement.files)
        modes = {path.stat().st_mode & 0o777 for path in folder.iterdir()}

    assert findings == []
    assert sorted(record.path for record in version.placement.files) == [
        "MLmodel",
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert modes == {0o444}
    assert folder.is_relative_to(mlflow_home / "artifacts")
    assert not list(mlflow_home.glob("stage-*"))


def test_a_missing_folder_is_corrupt(store, family):
    version = family["translate"]
    shutil.rmtree(local_folder(version.placement.location))

    with pytest.raises(Corrupt), store.folder(version):
        pass


def test_mlflow_downloads_the_files_by_stage(store, family, mlflow_home, tmp_path):
    store.project_stage("translate-chat", "production", number=1, legacy={1: "Production"})
    uri = embedded_uri(mlflow_home)
    mlflow.set_registry_uri(uri)
    mlflow.set_tracking_uri(uri)

    for address in ("models:/translate-chat@production", "models:/translate-chat/Production"):
        folder = mlflow.artifacts.download_artifacts(address, dst_path=str(tmp_path / address[-10:]))

        assert Path(folder, "adapter_model.safetensors").read_text() == "m"

    mlflow.set_registry_uri(None)
    mlflow.set_tracking_uri(None)


def test_a_source_is_read_from_a_run_and_from_a_model(store, family):
    run_id = family["translate"].placement.run_id
    store.project_stage("translate", "staging", number=1, legacy={})

    with store.source_folder("run", f"{run_id}/lineage", {"lineage.md"}) as folder:
        assert (folder / "lineage.md").read_text()
        assert {path.stat().st_size for path in folder.iterdir() if path.name != "lineage.md"} <= {0}
    for location in ("translate/1", "translate@staging", family["translate"].placement.model_id):
        with store.source_folder("model", location, {"adapter_model.safetensors"}) as folder:
            assert (folder / "adapter_model.safetensors").read_text() == "t"
    with pytest.raises(NotFound), store.source_folder("model", "translate/7", ()):
        pass


# found, not made twice


def test_the_same_key_gives_the_version_that_exists_and_leaves_the_stage_folder(store, put, spec_of, stage):
    first = put("translate", "t")
    staged = stage("t")

    version_id, placement = store.place(
        spec_of("translate", "t"),
        adapter_id="id-of-translate",
        version_id="another-id",
        key="translate-t",
        staged=staged,
        parents=(),
    )

    assert (version_id, placement) == (first.id, first.placement)
    assert staged.is_dir()


def test_a_copy_that_mlflow_made_of_a_version_is_not_taken_for_it(client, family, put, mlflow_home):
    uri = embedded_uri(mlflow_home)
    mlflow.set_tracking_uri(uri)
    client.copy_model_version("models:/translate/1", "translate")
    mlflow.set_tracking_uri(None)

    again = put("translate", "t", metrics={"chrf,none": 41.5}, dataset="gettext catalogues", params={"lr": "1e-3"})

    assert again.placement == family["translate"].placement


# the registry that MLflow belongs to


def test_mlflow_of_another_registry_is_refused_before_anything_is_written(client, family, mlflow_home):
    other = MlflowVersions(None, mlflow_home, "another-registry")

    with pytest.raises(Misconfigured, match="another-registry"):
        other.check_identity()
    with pytest.raises(Misconfigured):
        other.ensure_adapter("new", "id-of-new", BASE)

    assert [each.name for each in client.search_registered_models()] == ["chat", "translate", "translate-chat"]


def test_checking_an_empty_mlflow_writes_nothing(client, store):
    store.check_identity()

    assert client.get_experiment_by_name("adapters") is None


@pytest.mark.parametrize("damage_it", [lambda path: path.write_bytes(b"text" * 9), lambda path: path.mkdir()])
def test_a_file_that_is_no_database_is_refused_at_once(damage_it, home):
    damage_it(home / "mlflow.db")

    with pytest.raises(Corrupt, match="is no SQLite database"):
        MlflowVersions(None, home, REGISTRY_ID)


def test_a_database_of_a_newer_mlflow_is_refused_with_what_mlflow_says(mlflow_home):
    with closing(sqlite3.connect(mlflow_home / "mlflow.db")) as database, database:
        database.execute("update alembic_version set version_num = 'ffffffffffff'")

    with pytest.raises(Unavailable, match="found version ffffffffffff"):
        MlflowVersions(None, mlflow_home, REGISTRY_ID)


def test_an_experiment_of_someone_else_is_refused(client, store):
    client.create_experiment("adapters")

    with pytest.raises(Misconfigured, match="someone else"):
        store.check_identity()


def test_a_registered_model_of_someone_else_is_refused(client, store):
    client.create_registered_model("translate")

    with pytest.raises(Refused, match="did not make"):
        store.ensure_adapter("translate", "id-of-translate", BASE)


def test_an_adapter_is_ensured_twice_and_by_its_own_id_only(store):
    store.ensure_adapter("translate", "id-of-translate", BASE)
    store.ensure_adapter("translate", "id-of-translate", BASE)

    with pytest.raises(Refused):
        store.ensure_adapter("translate", "another-id", BASE)


# stages


def test_a_stage_is_an_alias_and_a_legacy_stage_and_both_move(client, store, put):
    put("chat", "one")
    put("chat", "two")

    store.project_stage("chat", "production", number=1, legacy={1: "Production"})
    store.project_stage("chat", "production", number=2, legacy={2: "Production", 1: "Archived"})
    store.project_stage("chat", "production", number=2, legacy={2: "Production", 1: "Archived"})

    assert store.alias("chat", "production") == 2
    assert client.get_model_version_by_alias("chat", "production").version == 2
    assert [client.get_model_version("chat", str(n)).current_stage for n in (1, 2)] == ["Archived", "Production"]


def test_an_emptied_stage_has_no_alias(client, store, put):
    put("chat", "one")
    store.project_stage("chat", "production", number=1, legacy={1: "Production"})

    store.project_stage("chat", "production", number=None, legacy={1: "None"})
    store.project_stage("chat", "production", number=None, legacy={1: "None"})

    assert store.alias("chat", "production") is None
    assert client.get_model_version("chat", "1").current_stage == "None"


def test_a_version_left_in_the_legacy_stage_by_hand_is_archived(client, store, put):
    put("chat", "one")
    put("chat", "two")
    with pytest.warns(FutureWarning):
        client.transition_model_version_stage("chat", "1", "Production")

    store.project_stage("chat", "production", number=2, legacy={2: "Production"})

    assert client.get_model_version("chat", "1").current_stage == "Archived"


def test_the_loser_of_a_race_for_an_alias_tries_again(store, put, monkeypatch):
    put("chat", "one")
    client = store._mlflow.client
    set_alias = client.set_registered_model_alias
    refusals = [MlflowException("(sqlite3.IntegrityError) UNIQUE constraint failed", BAD_REQUEST)] * 2

    def sometimes(*arguments: str) -> None:
        if refusals:
            raise refusals.pop()
        set_alias(*arguments)

    monkeypatch.setattr(client, "set_registered_model_alias", sometimes)

    store.project_stage("chat", "production", number=1, legacy={})

    assert store.alias("chat", "production") == 1


def test_an_alias_of_an_unknown_adapter_is_none(store):
    assert store.alias("nobody", "production") is None


def test_a_stage_of_a_version_that_mlflow_lost_is_not_found(store, put):
    put("chat", "one")

    with pytest.raises(NotFound):
        store.project_stage("chat", "production", number=9, legacy={})


def test_what_mlflow_does_not_take_is_told_though_it_is_set_to_log_in_the_background(
    shelf, home: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("MLFLOW_ENABLE_ASYNC_LOGGING", "true")
    with closing(sqlite3.connect(home / "mlflow.db")) as database, database:
        database.execute("CREATE TRIGGER full BEFORE INSERT ON params BEGIN SELECT RAISE(ABORT, 'full'); END")

    with pytest.raises(Unavailable, match="full"):
        shelf.put("translate", "w", params={"lr": "1"})


# evaluations


@pytest.fixture
def report(family) -> EvalReport:
    return EvalReport(
        key="k" * 64,
        subject=family["translate-chat"].spec.content_digest,
        base_id=BASE.id,
        suite="translate",
        suite_digest="d" * 64,
        limit=20,
        engine={"torch": "2.13.0"},
        tasks=(TaskResult("fr-en", "nll", "lower", {"nll": 2.25, "chrf,none": 40.0}, ()),),
        seconds=1.0,
        outputs=({"prompt": "bon|jour", "output": "<script>alert(1)</script>"},),
    )


def test_a_model_that_is_active_for_whoever_started_the_work_gets_no_figures(
    client, store, family, report, tmp_path, monkeypatch
):
    version = family["translate-chat"]
    monkeypatch.setenv("MLFLOW_ACTIVE_MODEL_ID", "m-of-somebody-else")
    registry = connect(Settings(home=tmp_path / "home"))
    registry.ledger.close()

    job_handlers(registry)
    with ThreadPoolExecutor(1) as fresh:  # MLflow reads the variable once for each thread
        fresh.submit(store.log_report, version, report, dataset_digest="e" * 64).result()

    assert client.get_run(version.placement.run_id).data.metrics["fr-en/nll"] == 2.25


def test_a_report_is_a_nested_run_with_dataset_and_metrics_on_the_model(shelf, client, store, family, report):
    version = family["translate-chat"]

    store.log_report(version, report, dataset_digest="e" * 64)
    store.log_report(version, report, dataset_digest="e" * 64)

    (run,) = shelf.runs("tags.`adapterctl.kind` = 'eval'")
    assert run.data.tags["mlflow.parentRunId"] == version.placement.run_id
    assert run.data.tags["adapterctl.dataset_digest"] == "e" * 64
    assert [(d.dataset.name, d.dataset.digest) for d in run.inputs.dataset_inputs] == [("translate", "e" * 32)]
    model = client.get_logged_model(version.placement.model_id)
    measured = [m for m in model.metrics if m.run_id == run.info.run_id]
    assert sorted((m.key, m.value, m.dataset_name) for m in measured) == [
        ("fr-en/chrf_none", 40.0, "translate"),
        ("fr-en/nll", 2.25, "translate"),
    ]


def test_figures_of_a_report_stand_on_the_source_run_where_compare_reads_them(client, store, family, report):
    store.log_report(family["translate-chat"], report, dataset_digest="e" * 64)

    metrics = client.get_run(family["translate-chat"].placement.run_id).data.metrics

    assert metrics["fr-en/nll"] == 2.25


def test_models_can_be_searched_by_a_metric_of_a_report(client, store, family, report):
    store.log_report(family["translate-chat"], report, dataset_digest="e" * 64)
    experiment = client.get_experiment_by_name("adapters").experiment_id

    found = client.search_logged_models([experiment], "metrics.`fr-en/nll` < 3")

    assert [model.model_id for model in found] == [family["translate-chat"].placement.model_id]


def test_outputs_of_a_report_are_text_on_their_page(shelf, client, store, family, report, tmp_path: Path):
    store.log_report(family["translate-chat"], report, dataset_digest="e" * 64)
    (run,) = shelf.runs("tags.`adapterctl.kind` = 'eval'")

    page = Path(client.download_artifacts(run.info.run_id, "outputs.md", tmp_path)).read_text()

    assert "| bon\\|jour | &lt;script&gt;alert\\(1\\)&lt;/script&gt; |" in page


# removal


def test_a_removed_version_is_gone_with_its_files_and_runs_and_its_number_is_not_used_again(
    shelf, client, store, family, put, report
):
    version = family["translate-chat"]
    store.log_report(version, report, dataset_digest="e" * 64)

    store.remove(version)
    store.remove(version)
    again = put("translate-chat", "m")

    assert not local_folder(version.placement.location).parent.exists()
    assert [run.data.tags["adapterctl.version_id"] for run in shelf.runs()].count(version.id) == 1
    assert again.number == 2
    assert again.placement.run_id != version.placement.run_id


def test_a_version_that_mlflow_made_anew_under_our_number_is_not_deleted(client, store, put):
    ours = put("chat", "one")
    client.delete_registered_model("chat")
    put("chat", "other")

    with pytest.raises(Refused, match="another version"):
        store.remove(ours)

    assert client.get_model_version("chat", "1").tags["adapterctl.version_id"] != ours.id


def test_an_error_of_the_database_is_told_in_its_own_words_and_elsewhere_without_them(store, home: Path):
    assert store.alias("a", "production") is None
    with closing(sqlite3.connect(home / "mlflow.db")) as database, database:
        database.execute("ALTER TABLE registered_models RENAME TO away")

    with pytest.raises(Unavailable) as met:
        store.alias("a", "production")

    assert met.value.message == "MLflow refused: no such table: registered_models"
    assert met.value.abroad == "the database of MLflow cannot be used now"

"""Evaluation as a use case: from request to figures on versions, on a real ledger, a real MLflow and a tiny model."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from mlflow import MlflowClient

from adapterctl.registry.domain.errors import InvalidInput, JobCancelled, JobFailed, Refused, Unavailable
from adapterctl.registry.domain.eval_plan import BASE
from adapterctl.registry.domain.job import Job, NewJob
from adapterctl.registry.domain.refs import parse_ref
from adapterctl.registry.domain.version import AdapterVersion, NewVersion, local_folder
from adapterctl.registry.ports import Parent
from adapterctl.registry.services import bases, evaluate
from adapterctl.registry.services.beside import beside
from adapterctl.registry.services.register import Registration, inspect, publish, register
from adapterctl.registry.services.retain import retention_view
from adapterctl.registry.services.schedule import Done, Task
from adapterctl.registry.services.suites import add_suite, load_suite, suites_of
from adapterctl.registry.settings import Settings
from adapterctl.registry.stores.mlflow_access import VERSION_ID
from adapterctl.registry.stores.mlflow_versions import MlflowVersions
from adapterctl.registry.stores.sql.engine import Database, sqlite_url
from adapterctl.registry.stores.sql.ledger import SqlLedger
from adapterctl.registry.wire import to_json
from adapterctl.workers import eval_job
from adapterctl.workers.supervisor import PASSING

TASK = "tasks:\n  - {name: t, data: rows.jsonl, metrics: [nll, chrf], max_new_tokens: 8}\n"


class Silence:
    def ring(self, job_id: str) -> None: ...


@dataclass
class World:
    """One registry with two adapters and their merge, and a supervisor reduced to what it does with a handler."""

    settings: Settings
    ledger: SqlLedger
    versions: MlflowVersions
    computed: list[str] = field(default_factory=list)

    @contextmanager
    def folder(self, version: AdapterVersion) -> Iterator[Path]:
        folder = local_folder(version.placement.location)
        assert folder is not None
        yield folder

    def request(
        self, *refs: str, suites: tuple[str, ...] = (), limit: int | None = None, base_dtype: str | None = None
    ) -> Job:
        parsed = [parse_ref(ref) for ref in refs]
        return evaluate.request_evaluation(
            self.ledger, Silence(), parsed, suites=suites, limit=limit, base_dtype=base_dtype, settings=self.settings
        )

    def handler(self) -> evaluate.EvalHandler:
        return evaluate.EvalHandler(
            self.ledger,
            self.settings,
            open_versions=lambda: self.versions,
            folders=self.folder,
            beside=lambda version, suite, dtype: beside(self.ledger, version, suite, dtype),
        )

    def work(self, should_stop: Callable[[Path], bool] = lambda out: False) -> None:
        job = self.ledger.claim("test", 60.0, kinds=("eval",))
        assert job is not None
        handler = self.handler()
        with handler.begin(job) as task:
            if isinstance(task, Task):
                body = task.body
                labels = {subject["digest"]: subject["label"] for subject in body["plan"]["subjects"]}
                self.computed += [labels[pair["subject"]] for pair in body["plan"]["pairs"]]
                result = eval_job.run(body, lambda message: None, lambda: should_stop(task.out))
                handler.finish(job, task, result)


@pytest.fixture
def world(home: Path, ledger_schema: Path, mlflow_schema: Path, tiny_base: Path) -> World:
    shutil.copy(mlflow_schema, home / "mlflow.db")
    shutil.copy(ledger_schema, home / "registry.db")
    ledger = SqlLedger(Database(sqlite_url(home)))
    ledger.establish(f"sqlite:///{home / 'mlflow.db'}")
    settings = Settings(home, threads=1, eval_device="cpu", actor="me", base_paths=(f"tiny/base={tiny_base}",))
    return World(settings, ledger, MlflowVersions(None, home, ledger.registry_id))


@pytest.fixture
def family(world: World, tiny_adapters: tuple[Path, Path], write_suite: Callable[..., Path], tmp_path: Path) -> World:
    """translate:v1 and chat:v1, each with a suite of its own, and translate-chat:v1, whose weights are chat's."""
    first, second = tiny_adapters
    translate, chat = (_register(world, name, folder) for name, folder in (("translate", first), ("chat", second)))
    add_suite(world.ledger, translate.adapter_id, load_suite(write_suite(TASK, name="one")))
    add_suite(world.ledger, chat.adapter_id, load_suite(write_suite(TASK.replace("name: t", "name: u"), name="two")))
    staged = shutil.copytree(second, tmp_path / "staged")
    spec = NewVersion(
        adapter="translate-chat",
        kind="merge",
        content_digest=chat.spec.content_digest,
        base=chat.spec.base,
        facts=inspect(staged),
        recipe_digest="ab" * 32,
        recipe={"method": "cat", "seed": None, "options": {}},
        receipt={"loss": 0.1},
    )
    parents = [Parent(translate, 0.0), Parent(chat, 1.0)]
    publish(world.ledger, world.versions, spec, staged, parents=parents, key="merge:1", created_by="me")
    return world


def _register(world: World, name: str, folder: Path) -> AdapterVersion:
    registered = register(
        world.ledger,
        Registration(source=str(folder), name=name, base="tiny/base"),
        open_versions=lambda: world.versions,
        open_hub=lambda source, wanted: pytest.fail("no hub in this test"),
        home=world.settings.home,
        created_by="me",
    )
    version = world.ledger.version(registered.version.id)
    assert version is not None
    return version


def _version(world: World, name: str) -> AdapterVersion:
    version = world.ledger.version_by_number(name, 1)
    assert version is not None
    return version


def test_a_merge_is_judged_on_its_parents_suites_beside_base_and_parents(family: World):
    family.request("translate-chat")
    family.work()

    # the merge has chat's weights here, so both are one subject: three subjects on two suites
    assert sorted(family.computed) == sorted(["base", "translate:v1", "translate-chat:v1"] * 2)
    view = retention_view(family.ledger, _version(family, "translate-chat"))
    assert [(row.suite, row.task, row.metric, row.owner) for row in view.rows] == [
        ("one", "t", "nll", "translate:v1"),
        ("one", "t", "chrf", "translate:v1"),
        ("two", "u", "nll", "chat:v1"),
        ("two", "u", "chrf", "chat:v1"),
    ]
    identity = next(row for row in view.rows if row.owner == "chat:v1" and row.metric == "nll")
    assert identity.retention is not None
    assert (identity.retention.value, identity.retention.low, identity.retention.high) == (1.0, 1.0, 1.0)
    assert identity.child == identity.parents["chat:v1"]
    assert identity.parents["translate:v1"] != identity.child
    assert (view.missing, view.notes) == ((), ())


def test_figures_stand_on_the_version_and_in_mlflow_with_the_dataset(family: World):
    family.request("translate")
    family.work()

    version = _version(family, "translate")
    (suite,) = suites_of(family.ledger, version)
    (report,) = family.ledger.reports_for(version.spec.content_digest, version.spec.base.id)
    assert family.ledger.metrics([version.id])[version.id] == pytest.approx(report.metrics)
    model = MlflowClient(f"sqlite:///{family.settings.home / 'mlflow.db'}").get_logged_model(version.placement.model_id)
    logged = {metric.key: metric for metric in model.metrics}
    assert logged["t/nll"].value == pytest.approx(report.metrics["t/nll"])
    assert logged["t/nll"].dataset_digest == suite.data_digest[: len(logged["t/nll"].dataset_digest)]


def test_nothing_is_computed_twice(family: World):
    family.request("translate-chat")
    family.work()
    family.computed.clear()

    family.request("chat", suites=tuple(s.digest for s in suites_of(family.ledger, _version(family, "translate"))))
    job = family.ledger.claim("test", 60.0)
    assert job is not None
    with family.handler().begin(job) as task:
        assert isinstance(task, Done)
        assert len(task.result["reports"]) == 2

    assert "t/nll" in family.ledger.metrics([_version(family, "chat").id])[_version(family, "chat").id]


def test_a_limit_that_changes_nothing_is_no_other_report(family: World):
    family.request("translate")
    family.work()
    family.computed.clear()

    family.request("translate", limit=1000)  # of five samples
    family.work()

    assert family.computed == []


def test_another_limit_is_another_report(family: World):
    for limit in (2, 3):
        family.request("translate", limit=limit)
        family.work()

    version = _version(family, "translate")
    reports = family.ledger.reports_for(version.spec.content_digest, version.spec.base.id)

    assert [(report.limit, len(report.tasks[0].samples)) for report in reports] == [(2, 2), (3, 3)]


def test_a_stopped_evaluation_goes_on_where_it_stopped(family: World):
    job = family.request("translate-chat")
    with pytest.raises(JobCancelled):
        family.work(should_stop=lambda out: len(list(out.glob("*.json"))) == 3)
    assert family.ledger.give_back(job.id, 1)
    family.computed.clear()

    family.work()

    assert len(family.computed) == 3  # of six
    assert not list((family.settings.home / "evaluations").iterdir())
    assert len(retention_view(family.ledger, _version(family, "translate-chat")).rows) == 4


def test_reports_of_a_supervisor_that_was_killed_are_taken_in(family: World):
    job = family.request("translate")
    claimed = family.ledger.claim("killed", 60.0)
    assert claimed is not None
    attempt = family.handler().begin(claimed)  # never left: its process is killed, and its folder stays
    task = attempt.__enter__()
    assert isinstance(task, Task)
    with pytest.raises(JobCancelled):
        eval_job.run(task.body, lambda message: None, lambda: any(task.out.glob("*.json")))
    assert family.ledger.give_back(job.id, 1)

    family.work()

    assert family.computed == ["translate:v1"]  # the base was finished before the kill


def test_a_merge_job_is_followed_by_its_evaluation(family: World):
    merge = _merge_job(family, "translate", "chat")
    child = _version(family, "translate-chat")

    (new,) = evaluate.evaluation_of_merge(family.ledger, merge, child.id, settings=family.settings)
    family.ledger.submit(new)
    family.work()

    assert new.title == "evaluate translate-chat on one, two"
    assert len(retention_view(family.ledger, child).rows) == 4


def _merge_job(world: World, *parents: str) -> Job:
    spec = {"parents": [_version(world, name).id for name in parents], "suites": [], "into": "translate-chat"}
    return world.ledger.submit(NewJob("merge", "key", "a merge", spec, "me"))[0]


def test_a_merge_whose_base_is_elsewhere_is_merged_without_evaluation(family: World):
    merge = _merge_job(family, "chat")
    nowhere = replace(family.settings, base_paths=())

    assert evaluate.evaluation_of_merge(family.ledger, merge, "id", settings=nowhere) == []


def test_retention_names_what_is_not_evaluated_yet(family: World):
    view = retention_view(family.ledger, _version(family, "translate-chat"))

    assert (view.rows, view.missing) == ((), ("one", "two"))


def test_committed_results_spare_the_computation_and_say_so(
    family: World, tmp_path: Path, ledger_schema: Path, mlflow_schema: Path
):
    family.request("translate")
    family.work()
    version = _version(family, "translate")
    base_id = version.spec.base.id
    reports = [r for s in (BASE, version.spec.content_digest) for r in family.ledger.reports_for(s, base_id)]
    foreign = [replace(r, key=f"foreign-{i}", engine={**r.engine, "torch": "1.0"}) for i, r in enumerate(reports)]
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "tiny.json").write_text(to_json(foreign))
    fresh = _another_registry(family, tmp_path, ledger_schema, mlflow_schema)

    taken = evaluate.import_reports(fresh.ledger, evaluate.read_reports(tmp_path / "results"))
    fresh.request("translate")
    fresh.work()

    assert (taken, fresh.computed) == (2, [])
    (report,) = fresh.ledger.reports_for(version.spec.content_digest, base_id)
    assert (report.engine["source"], report.engine["torch"]) == ("committed result", "1.0")


def test_a_report_says_nothing_of_the_same_bytes_on_another_base_nor_of_all_that_begin_alike(
    family: World, tmp_path: Path, ledger_schema: Path, mlflow_schema: Path
):
    family.request("translate")
    family.work()
    version = _version(family, "translate")
    (report,) = family.ledger.reports_for(version.spec.content_digest, version.spec.base.id)
    fresh = _another_registry(family, tmp_path, ledger_schema, mlflow_schema)
    other = bases.add_base(fresh.ledger, "other/base")

    with pytest.raises(InvalidInput, match="no subject of a report"):
        evaluate.import_reports(fresh.ledger, [replace(report, subject=report.subject[:4])])
    assert evaluate.import_reports(fresh.ledger, [replace(report, base_id=other.id)]) == 1

    assert not any(fresh.ledger.metrics([_version(fresh, "translate").id]).values())


def _another_registry(family: World, tmp_path: Path, ledger_schema: Path, mlflow_schema: Path) -> World:
    """A new home with the same adapter and suite, and nothing evaluated."""
    home = tmp_path / "fresh"
    home.mkdir()
    shutil.copy(mlflow_schema, home / "mlflow.db")
    shutil.copy(ledger_schema, home / "registry.db")
    ledger = SqlLedger(Database(sqlite_url(home)))
    ledger.establish(f"sqlite:///{home / 'mlflow.db'}")
    fresh = World(replace(family.settings, home=home), ledger, MlflowVersions(None, home, ledger.registry_id))
    old = _version(family, "translate")
    with family.folder(old) as folder:
        version = _register(fresh, "translate", folder)
    for suite in suites_of(family.ledger, old):
        add_suite(ledger, version.adapter_id, suite)
    return fresh


def test_a_version_without_a_suite_asks_for_one(world: World, tiny_adapters: tuple[Path, Path]):
    _register(world, "plain", tiny_adapters[0])

    with pytest.raises(InvalidInput) as refusal:
        world.request("plain")

    assert "--suite" in refusal.value.hint


def test_a_base_that_is_nowhere_is_unavailable_before_anything_is_queued(family: World):
    family.settings = replace(family.settings, base_paths=())

    with pytest.raises(Unavailable) as refusal:
        family.request("translate")

    assert "ADAPTERCTL_BASE_PATHS" in refusal.value.hint
    assert family.ledger.jobs() == []


def test_a_folder_with_another_model_than_the_pins_say_is_refused(family: World, tmp_path: Path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    base = replace(_version(family, "chat").spec.base, config_digest="00" * 32)

    with pytest.raises(Refused):
        evaluate.locate(
            family.ledger, base, replace(family.settings, base_paths=(f"tiny/base={tmp_path / 'other'}",)), None
        )


def test_a_missing_extra_is_told_with_the_command_that_installs_it(family: World, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(evaluate, "ENGINE_PACKAGES", ("torch", "not_installed_anywhere"))

    with pytest.raises(Unavailable) as refusal:
        family.request("translate")

    assert "not_installed_anywhere" in refusal.value.message
    assert refusal.value.hint == "pip install 'adapterctl[eval]'"


def test_what_no_base_can_be_loaded_in_is_refused_with_what_there_is(family: World):
    with pytest.raises(InvalidInput, match="'int3' is not one of float32, nf4, nf4-dq"):
        family.request("translate", base_dtype="int3")


def test_four_bits_without_bitsandbytes_are_refused_with_the_command_that_installs_it(
    family: World, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)

    with pytest.raises(Unavailable, match="a base in nf4 needs bitsandbytes") as refusal:
        family.request("translate", base_dtype="nf4")

    assert refusal.value.hint == "pip install 'adapterctl[4bit]'"
    assert family.ledger.claim("test", 60.0) is None  # nothing was queued
    assert family.request("translate").spec.get("base_dtype") is None


def test_a_worker_without_bitsandbytes_ends_the_job_for_good(family: World, monkeypatch: pytest.MonkeyPatch):
    version = _version(family, "translate")
    (suite,) = suites_of(family.ledger, version)
    spec = {"refs": [version.id], "suites": [suite.digest], "limit": None, "base_dtype": "nf4"}
    job = family.ledger.submit(NewJob("eval", "key", "from a machine that has it", spec, "me"))[0]
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)

    with pytest.raises(JobFailed) as failure, family.handler().begin(job):
        pass

    assert failure.value.code not in PASSING
    assert failure.value.hint == "pip install 'adapterctl[4bit]' there, then adapterctl jobs retry"


def test_a_base_that_is_stored_quantised_is_evaluated_as_it_is_and_in_nothing_else(
    family: World, tiny_base: Path, tmp_path: Path
):
    folder = Path(shutil.copytree(tiny_base, tmp_path / "stored"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    base = _version(family, "translate").spec.base
    four_bits = replace(family.settings, eval_dtype="nf4")

    assert evaluate.dtype_of(folder, base, None, four_bits) == "gptq"
    with pytest.raises(InvalidInput, match="is stored in gptq and cannot be evaluated in nf4"):
        evaluate.dtype_of(folder, base, "nf4", family.settings)
    elsewhere = replace(family.settings, base_paths=(f"tiny/base={folder}",))
    with pytest.raises(InvalidInput, match="is stored in gptq and cannot be evaluated in float32"):
        evaluate.folder_of(family.ledger, base, {"dtype": "float32"}, elsewhere, None)


def test_a_base_in_four_bits_has_reports_metrics_and_comparisons_of_its_own(family: World):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: NO BASE WAS EVALUATED IN 4 BITS")
    family.request("translate-chat")
    family.work()
    child = _version(family, "translate-chat")
    before = family.ledger.metrics([child.id])[child.id]
    family.computed.clear()

    job = family.request("translate-chat", base_dtype="nf4")
    family.work()

    assert job.title == "evaluate translate-chat:v1 on one, two, base in nf4"
    assert sorted(family.computed) == sorted(["base", "translate:v1", "translate-chat:v1"] * 2)  # none was used again
    after = family.ledger.metrics([child.id])[child.id]
    assert before.items() < after.items()  # what was measured on the full base stays
    assert {f"{name}.nf4" for name in before} == after.keys() - before.keys()
    assert after["t/nll.nf4"] != after["t/nll"]
    reports = family.ledger.reports_for(child.spec.content_digest, child.spec.base.id)
    assert {report.dtype for report in reports} == {"float32", "nf4"}
    assert all(("bitsandbytes" in report.engine) == (report.dtype == "nf4") for report in reports)
    rows = retention_view(family.ledger, child).rows
    assert [(row.task, row.metric, row.dtype, row.primary) for row in rows if row.task == "t"] == [
        ("t", "nll", "float32", True),
        ("t", "chrf", "float32", False),
        ("t", "nll.nf4", "nf4", False),
        ("t", "chrf.nf4", "nf4", False),
    ]
    identity = next(row for row in rows if row.owner == "chat:v1" and row.metric == "nll.nf4")
    assert identity.retention is not None
    assert (identity.retention.value, identity.child) == (1.0, identity.parents["chat:v1"])
    runs = MlflowClient(family.versions.uri).search_runs(["1"], f"tags.`{VERSION_ID}` = '{child.id}'")
    in_nf4 = [run for run in runs if run.data.params.get("dtype") == "nf4"]
    assert {run.info.run_name for run in in_nf4} == {
        "eval translate-chat:v1 on one, base in nf4",
        "eval translate-chat:v1 on two, base in nf4",
    }
    assert all("bitsandbytes" in run.data.params for run in in_nf4)


def test_a_registry_that_is_set_to_four_bits_evaluates_its_merges_in_them(family: World):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: NO MERGE IN 4 BITS WAS PLANNED")
    merge = _merge_job(family, "translate", "chat")
    settings = replace(family.settings, eval_dtype="nf4-dq")

    (new,) = evaluate.evaluation_of_merge(
        family.ledger, merge, _version(family, "translate-chat").id, settings=settings
    )
    (full,) = evaluate.evaluation_of_merge(
        family.ledger,
        replace(merge, spec={**merge.spec, "base_dtype": "float32"}),
        _version(family, "translate-chat").id,
        settings=settings,
    )

    assert new.spec["base_dtype"] == "nf4-dq"
    assert "base_dtype" not in full.spec
    assert new.key != full.key


def test_a_merge_shows_its_answers_beside_its_parents_and_what_it_kept_in_mlflow(family: World, tmp_path: Path):
    family.request("translate-chat")
    family.work()

    version = _version(family, "translate-chat")
    client = MlflowClient(family.versions.uri)
    experiment = client.get_run(version.placement.run_id).info.experiment_id
    runs = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{version.placement.run_id}'")
    assert len(runs) == 2  # one a suite
    for run in runs:
        files = {file.path for file in client.list_artifacts(run.info.run_id)}
        assert {"retention.png", "side_by_side.md", "outputs.md", "report.json"} <= files
        page = Path(client.download_artifacts(run.info.run_id, "side_by_side.md", tmp_path)).read_text()
        assert "| prompt | expected | base | translate:v1 | chat:v1 | translate\\-chat:v1 |" in page
        assert "un chat" in page
        picture = Path(client.download_artifacts(run.info.run_id, "retention.png", tmp_path)).read_bytes()
        assert picture.startswith(b"\x89PNG")
    rows = {(row.task, row.metric): row for row in retention_view(family.ledger, version).rows}
    assert rows["t", "chrf"].switched == 1.0  # its weights are chat's, so it answers translate's task like chat
    assert rows["u", "chrf"].switched == 0.0
    assert "read more like another parent's" in rows["t", "chrf"].note

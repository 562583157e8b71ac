"""Registering: one version for one content, found again after a kill, with its base and parent, nothing left over."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from tiny import write_tiny_adapter

from adapterctl.bootstrap import connect
from adapterctl.registry.api import Registered
from adapterctl.registry.domain.errors import Corrupt, InvalidInput, Refused
from adapterctl.registry.domain.refs import Ref
from adapterctl.registry.ports import VersionStore
from adapterctl.registry.services import bases
from adapterctl.registry.services.pull import damage
from adapterctl.registry.services.register import Registration, register
from adapterctl.registry.settings import Settings
from adapterctl.registry.stores.hub import hub_folder
from adapterctl.registry.stores.sql.ledger import SqlLedger

REGISTER = """
import sys
from adapterctl.bootstrap import connect

connect().register(sys.argv[1], name="many")
"""

Take = Callable[..., Registered]


@pytest.fixture
def take(sql_ledger: SqlLedger, version_store: VersionStore, home: Path) -> Take:
    def call(folder: Path | str, name: str = "translate", **words: Any) -> Registered:
        return register(
            sql_ledger,
            Registration(source=str(folder), name=name, **words),
            open_versions=lambda: version_store,
            open_hub=hub_folder,
            home=home,
            created_by="ada",
        )

    return call


def test_a_folder_becomes_a_version_with_its_files_its_words_and_its_base(take, tmp_path, sql_ledger, home):
    folder = write_tiny_adapter(tmp_path / "a", dtype="BF16")
    (folder / "README.md").write_text("an adapter\n")
    (folder / "optimizer.pt").write_bytes(b"not wanted")

    done = take(folder, metrics={"bleu": 0.3}, params={"epochs": "3"}, tags={"team": "mt"}, license="apache-2.0")

    view = done.version
    assert done.created
    assert (view.ref, view.base, view.rank, view.dtype, view.created_by) == (
        "translate:v1", "tiny/base", 4, "BF16", "ada",
    )  # fmt: skip
    assert (view.metrics, view.params, view.tags, view.license) == (
        {"bleu": 0.3}, {"epochs": "3"}, {"team": "mt"}, "apache-2.0",
    )  # fmt: skip
    assert [file.path for file in view.files] == [
        "MLmodel", "README.md", "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    stored = Path(view.location.removeprefix("file://"))
    assert (stored / "adapter_model.safetensors").read_bytes() == (folder / "adapter_model.safetensors").read_bytes()
    assert sql_ledger.detail(view.id).norms.keys() == {m.name for m in sql_ledger.detail(view.id).facts.modules}
    assert list((home / "staging").iterdir()) == []


def test_the_same_content_on_the_same_base_is_the_version_that_exists(take, tmp_path):
    first = take(write_tiny_adapter(tmp_path / "a"))

    again = take(write_tiny_adapter(tmp_path / "b", adapter_name="default"), metrics={"bleu": 1.0})
    elsewhere = take(tmp_path / "a", name="other")
    other_base = take(tmp_path / "a", base="tiny/other")

    assert (again.created, again.version.id) == (False, first.version.id)
    assert any("registered before" in warning for warning in again.warnings)
    assert (elsewhere.created, elsewhere.version.ref) == (True, "other:v1")
    assert (other_base.created, other_base.version.ref, other_base.version.base) == (True, "translate:v2", "tiny/other")


@pytest.mark.parametrize("harm", ["cut short", "changed", "a file lost", "all lost"])
def test_who_registers_the_same_again_mends_files_that_were_damaged(take, tmp_path, harm):
    folder = write_tiny_adapter(tmp_path / "a")
    version = take(folder).version
    stored = Path(version.location.removeprefix("file://"))
    weights = stored / "adapter_model.safetensors"
    weights.chmod(0o644)
    if harm == "cut short":
        os.truncate(weights, 100)
    elif harm == "changed":
        weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    else:
        shutil.rmtree(stored) if harm == "all lost" else weights.unlink()

    again = take(folder)
    quiet = take(folder)

    assert (again.created, again.version.id) == (False, version.id)
    assert [each for each in again.warnings if "were damaged" in each and each.endswith("are mended")]
    assert damage(stored, version.files) == []
    assert quiet.warnings == ()
    assert {path.name for path in stored.iterdir()} == {record.path for record in version.files}


def test_files_that_the_same_adapter_does_not_mend_are_named(take, tmp_path):
    folder = write_tiny_adapter(tmp_path / "a")
    (folder / "README.md").write_text("an adapter\n")
    version = take(folder).version
    stored = Path(version.location.removeprefix("file://"))
    (stored / "README.md").unlink()
    (folder / "README.md").write_text("other words\n")

    with pytest.raises(Corrupt, match=r"does not bring back all: README\.md is missing"):
        take(folder)


def test_another_content_is_the_next_version_and_keeps_where_it_was_trained_from(take, tmp_path, sql_ledger):
    first = take(write_tiny_adapter(tmp_path / "a", seed=1))
    parent = sql_ledger.version(first.version.id)

    second = take(write_tiny_adapter(tmp_path / "b", seed=2), kind="train", trained_from=parent)

    assert second.version.ref == "translate:v2"
    assert [(p.ref, p.kind, p.weight) for p in second.version.parents] == [("translate:v1", "trained_from", None)]


def test_a_removed_version_is_not_found_again(take, tmp_path, sql_ledger, version_store):
    folder = write_tiny_adapter(tmp_path / "a")
    first = take(folder)
    version = sql_ledger.version(first.version.id)
    sql_ledger.remove_version(version.id, actor="ada", reason="wrong data")
    version_store.remove(version)

    second = take(folder)

    assert second.created
    assert second.version.id != first.version.id
    assert second.version.state == "live"


def test_a_version_of_mlflow_can_be_registered_as_another_adapter(take, tmp_path):
    first = take(write_tiny_adapter(tmp_path / "a"))

    second = take("models:/translate/1", name="copy")

    assert second.version.content_digest == first.version.content_digest
    assert second.version.source == "models:/translate/1"


def test_an_unknown_base_is_made_without_pins_and_said(take, tmp_path, sql_ledger):
    first = take(write_tiny_adapter(tmp_path / "a", seed=1))
    second = take(write_tiny_adapter(tmp_path / "b", seed=2))

    assert any("tiny/base is new here and not pinned" in warning for warning in first.warnings)
    assert second.warnings == ()
    assert [(base.id, base.config_digest) for base in sql_ledger.bases()] == [("tiny/base", None)]


def test_a_revision_in_the_config_is_part_of_the_base(take, tmp_path):
    plain = take(write_tiny_adapter(tmp_path / "a", config={"revision": "main"}))
    pinned = take(write_tiny_adapter(tmp_path / "b", config={"revision": "abc"}))

    assert (plain.version.base, pinned.version.base) == ("tiny/base", "tiny/base@abc")


def test_an_adapter_without_a_base_needs_one_from_the_caller(take, tmp_path, sql_ledger):
    folder = write_tiny_adapter(tmp_path / "a", config={"base_model_name_or_path": None})

    with pytest.raises(InvalidInput, match="names no base"):
        take(folder)
    done = take(folder, base="tiny/base")

    assert done.version.base == "tiny/base"


def test_a_base_that_differs_from_the_config_and_a_name_in_the_keys_are_said(take, tmp_path):
    done = take(write_tiny_adapter(tmp_path / "a", adapter_name="default"), base="tiny/other")

    assert any("the config says tiny/base" in warning for warning in done.warnings)
    assert any("carry the adapter name 'default'" in warning for warning in done.warnings)
    assert any("--rank 4` makes a version with PEFT's names" in warning for warning in done.warnings)


@pytest.mark.parametrize(
    "words",
    [
        {"name": "Trans late"},
        {"name": "a\nb"},
        {"metrics": {"bleu": float("nan")}},
        {"metrics": {"": 1.0}},
        {"tags": {"mlflow.user": "x"}},
        {"tags": {"adapterctl.key": "x"}},
        {"params": {"a\u202eb": "x"}},
        {"params": {"a": "x" * 6000}},
        {"params": {"a": "two\nlines"}},
        {"params": {"a//b": "x"}},
        {"tags": {"a": "\udcff"}},
        {"tags": {"a": "nul\0"}},
        {"tags": {"a/..": "x"}},
        {"dataset": "\udcff"},
        {"license": "mit\x7f"},
        {"base": "a\nb"},
        {"base": ""},
    ],
)
def test_words_that_a_store_would_refuse_half_way_are_refused_first(take, tmp_path, sql_ledger, words):
    folder = write_tiny_adapter(tmp_path / "a")

    with pytest.raises(InvalidInput):
        take(folder, **words)

    assert sql_ledger.adapter_names() == []
    assert sql_ledger.bases() == []


CHILD = textwrap.dedent(
    """
    import sys
    from pathlib import Path
    from adapterctl.registry.services.register import Registration, register
    from adapterctl.registry.stores.hub import hub_folder
    from adapterctl.registry.stores.sql.engine import Database, sqlite_url
    from adapterctl.registry.stores.sql.ledger import SqlLedger

    def open_versions():
        from adapterctl.registry.stores.mlflow_versions import MlflowVersions
        return MlflowVersions(None, home, ledger.registry_id)

    home = Path(sys.argv[1])
    ledger = SqlLedger(Database(sqlite_url(home)))
    done = register(ledger, Registration(source=sys.argv[2], name="translate", metrics={"bleu": 0.5}),
                    open_versions=open_versions, open_hub=hub_folder, home=home, created_by="ada")
    print(done.version.id)
    """
)


def start(home: Path, folder: Path, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(home), str(folder)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    "point",
    [
        "register.locked",
        "register.run",
        "register.model",
        "register.files",
        "register.finalized",
        "register.linked",
        "register.version",
        "ledger.writing",
        "ledger.committed",
    ],
)
def test_a_kill_at_any_point_and_another_try_give_one_version(point, take, tmp_path, home, sql_ledger):
    folder = write_tiny_adapter(tmp_path / "a")
    killed = start(home, folder, ADAPTERCTL_CRASH_AT=point)
    _, errors = killed.communicate(timeout=120)
    assert killed.returncode == -signal.SIGKILL, errors

    done = take(folder)

    assert done.version.ref == "translate:v1"
    assert len(sql_ledger.versions(include_removed=True)) == 1
    assert done.created == (point != "ledger.committed")
    assert runs_of(home) == 1
    assert (Path(done.version.location.removeprefix("file://")) / "adapter_model.safetensors").is_file()
    assert list((home / "staging").iterdir()) == []


def test_two_processes_that_register_the_same_folder_make_one_version(take, tmp_path, home, sql_ledger):
    folder = write_tiny_adapter(tmp_path / "a")
    both = [start(home, folder) for _ in range(2)]

    outputs = [process.communicate(timeout=120) for process in both]

    assert [process.returncode for process in both] == [0, 0], outputs
    assert len({out for out, _ in outputs}) == 1
    assert len(sql_ledger.versions()) == 1
    assert runs_of(home) == 1


def runs_of(home: Path) -> int:
    """How many runs MLflow holds, asked through its own client."""
    import mlflow

    from adapterctl.registry.stores.mlflow_server import embedded_uri

    client = mlflow.MlflowClient(tracking_uri=embedded_uri(home), registry_uri=embedded_uri(home))
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return len(client.search_runs(experiments))


# bases


def model_folder(folder: Path, *, width: int = 16, weights: bytes = b"w", tokenizer: str = "{}") -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"hidden_size": width, "transformers_version": folder.name}))
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "tokenizer.json").write_text(tokenizer)
    return folder


def test_the_same_model_in_two_folders_has_the_same_pins(tmp_path):
    one = bases.fingerprints(model_folder(tmp_path / "one"))

    assert bases.fingerprints(model_folder(tmp_path / "two")) == one
    assert bases.fingerprints(model_folder(tmp_path / "c", width=8))["config_digest"] != one["config_digest"]
    assert bases.fingerprints(model_folder(tmp_path / "w", weights=b"v"))["weights_digest"] != one["weights_digest"]
    assert (
        bases.fingerprints(model_folder(tmp_path / "t", tokenizer="[]"))["tokenizer_digest"] != one["tokenizer_digest"]
    )


def test_pins_are_filled_in_once_and_never_changed(tmp_path, sql_ledger):
    bases.add_base(sql_ledger, "tiny/base")

    pinned = bases.add_base(
        sql_ledger, "tiny/base", pins=bases.fingerprints(model_folder(tmp_path / "one")), revision="abc"
    )
    with pytest.raises(Refused, match="weights digest differ"):
        bases.add_base(sql_ledger, "tiny/base", pins=bases.fingerprints(model_folder(tmp_path / "two", weights=b"v")))

    assert pinned.config_digest
    assert pinned.revision == "abc"
    assert sql_ledger.bases() == [pinned]


def test_a_spelling_leads_to_one_base_and_is_not_taken_from_another(sql_ledger):
    bases.add_base(sql_ledger, "tiny/base")
    bases.add_base(sql_ledger, "tiny/other")

    bases.alias_base(sql_ledger, "/models/tiny", "tiny/base")
    with pytest.raises(Refused, match="means the base tiny/other already"):
        bases.alias_base(sql_ledger, "tiny/other", "tiny/base")

    assert bases.known_base(sql_ledger, "/models/tiny").id == "tiny/base"


def test_merged_bases_are_one_for_versions_and_spellings(take, tmp_path, sql_ledger):
    first = take(write_tiny_adapter(tmp_path / "a", config={"base_model_name_or_path": "/models/tiny"}))
    bases.add_base(sql_ledger, "tiny/base")

    bases.merge_bases(sql_ledger, "tiny/base", "/models/tiny")

    assert sql_ledger.version(first.version.id).spec.base.id == "tiny/base"
    assert bases.known_base(sql_ledger, "/models/tiny").id == "tiny/base"
    assert take(tmp_path / "a").version.id == first.version.id


def test_bases_whose_pins_contradict_each_other_are_not_merged(tmp_path, sql_ledger):
    bases.add_base(sql_ledger, "one", pins=bases.fingerprints(model_folder(tmp_path / "one")))
    bases.add_base(sql_ledger, "two", pins=bases.fingerprints(model_folder(tmp_path / "two", width=8)))

    with pytest.raises(Refused, match="config digest differ"):
        bases.merge_bases(sql_ledger, "one", "two")


def test_the_pages_of_parents_lead_to_their_children_and_to_none_that_was_removed(two_parents, tmp_path):
    import mlflow  # deferred: seconds

    two_parents.register(
        str(write_tiny_adapter(tmp_path / "a", seed=70)),
        name="task-a",
        tags={"task": "translation"},
        trained_from=Ref("translate"),
    )
    two_parents.register(str(write_tiny_adapter(tmp_path / "b", seed=71)), name="task-b", trained_from=Ref("task-a"))
    client = mlflow.MlflowClient(two_parents.version_store.uri, two_parents.version_store.uri)
    page = lambda name: client.get_model_version(name, "1").description  # noqa: E731

    assert page("translate").endswith("**Children** [task-a:v1](#/models/task-a/versions/1)")
    assert page("task-a").endswith("**Children** [task-b:v1](#/models/task-b/versions/1)")
    assert "](adapters/task-b/v1/lineage.svg)](adapters/task-b/v1)" in page("task-b")
    found = client.search_registered_models("tags.task = 'translation'")
    assert {model.name for model in found} == {"task-a", "task-b"}  # of a child, until somebody says otherwise
    two_parents.remove(Ref("task-b"), reason="a test")
    assert "task-b" not in page("task-a")


@pytest.mark.parametrize("what", ["dataset", "license"])
def test_words_that_mlflow_has_no_room_for_are_refused_first(take, tmp_path: Path, sql_ledger: SqlLedger, what: str):
    with pytest.raises(InvalidInput, match=f"the {what} has 100,000 characters"):
        take(write_tiny_adapter(tmp_path / "a"), **{what: "x" * 100_000})

    assert sql_ledger.adapter_names() == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"tags": {"a": "b", "k": "so\udcff"}}, "tag 'k' is not UTF-8 at its character 3"),
        ({"params": {"lr": "1\t2"}}, r"parameter 'lr' has the control character '\\t' at its character 2"),
        ({"dataset": "\0"}, r"the dataset has the control character '\\x00' at its character 1"),
        ({"tags": {"a//b/": "1"}}, "tag 'a//b/' has an empty part beside a slash"),
        ({"metrics": {"a/b": 1.0, "a//b": 2.0}}, "metric 'a//b' has an empty part beside a slash"),
    ],
)
def test_a_refused_word_is_named_with_its_place(take, tmp_path: Path, words: dict[str, Any], message: str):
    with pytest.raises(InvalidInput, match=message):
        take(write_tiny_adapter(tmp_path / "a"), **words)


@pytest.mark.parametrize(
    ("license_", "told"),
    [("apache-2.0", 0), ("llama3.1", 0), ("MIT OR Apache-2.0", 0), ("LicenseRef-ours", 0), ("nope nope", 1), ("", 0)],
)
def test_a_licence_that_is_no_identifier_is_told(take, tmp_path: Path, license_: str, told: int):
    done = take(write_tiny_adapter(tmp_path / "a"), license=license_)

    assert len([each for each in done.warnings if "licence" in each]) == told


def test_first_commands_of_a_home_at_once_all_get_through(home: Path, tmp_path: Path):
    """MLflow makes its tables when it is opened first, and two that do so at once break each other's."""
    commands = [
        [sys.executable, "-c", REGISTER, str(write_tiny_adapter(tmp_path / f"a{seed}", seed=seed))] for seed in range(4)
    ]

    processes = [
        subprocess.Popen(command, env={**os.environ, "ADAPTERCTL_HOME": str(home)}, stderr=subprocess.PIPE, text=True)
        for command in commands
    ]
    said = [process.communicate(timeout=300)[1] for process in processes]

    assert [(process.returncode, text) for process, text in zip(processes, said, strict=True)] == [(0, "")] * 4
    with closing(connect(Settings(home=home, actor="ada")).ledger) as ledger:
        assert [version.number for version in ledger.versions("many")] == [1, 2, 3, 4]


def test_who_is_killed_while_mlflow_makes_its_tables_leaves_a_home_that_works(home: Path, tmp_path: Path):
    command = [sys.executable, "-c", REGISTER, str(write_tiny_adapter(tmp_path / "a"))]
    first = subprocess.Popen(command)
    unfinished = home / "mlflow.db.unfinished"
    while not (unfinished.exists() and unfinished.stat().st_size > 100_000):
        assert first.poll() is None
        time.sleep(0.005)

    first.kill()
    first.wait()
    made = (home / "mlflow.db").exists()
    again = subprocess.run(command, capture_output=True, text=True, timeout=300)

    assert not made
    assert (again.returncode, again.stderr) == (0, "")
    assert sorted(path.name for path in home.glob("mlflow.db*")) == ["mlflow.db"]

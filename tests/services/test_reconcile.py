"""`doctor --adopt` on the real MLflow: what was done there is accepted where the rules allow it, and told where not."""

from __future__ import annotations

import itertools
import os
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from tiny import write_tiny_adapter

from adapterctl.bootstrap import connect
from adapterctl.registry.api import Check
from adapterctl.registry.domain.errors import Misconfigured, NotFound, Refused, Unavailable
from adapterctl.registry.domain.job import NewJob
from adapterctl.registry.domain.refs import parse_ref
from adapterctl.registry.domain.stage import Head
from adapterctl.registry.services.local import LocalRegistry
from adapterctl.registry.settings import load_settings
from adapterctl.registry.stores.mlflow_versions import MlflowVersions
from adapterctl.registry.wire import to_json

DRIFT = {
    *(
        "adopted",
        "deleted",
        "renamed",
        "replaced",
        "removed",
        "unknown",
        "unfinished",
        "doubled",
        "stage",
        "description",
    )
}
_seeds = itertools.count(100)


@pytest.fixture
def client(two_parents: LocalRegistry) -> Any:
    return two_parents.version_store._client


@pytest.fixture
def name() -> str:
    """An adapter of this test alone; the registry is that of the whole file."""
    return f"adapter-{next(_seeds)}"


def add(registry: LocalRegistry, tmp_path: Path, name: str, **asked: Any) -> str:
    seed = next(_seeds)
    return registry.register(str(write_tiny_adapter(tmp_path / str(seed), seed=seed)), name=name, **asked).version.ref


def make_by_hand(client: Any, tmp_path: Path, name: str, *, good: bool = True) -> str:
    """A version as somebody makes it with MLflow's client; returns its number."""
    folder = write_tiny_adapter(tmp_path / "by-hand", seed=next(_seeds))
    if not good:
        (folder / "adapter_model.safetensors").write_bytes(b"no tensors")
    return str(client.create_model_version(name, source=str(folder)).version)


def adopt(registry: LocalRegistry) -> list[tuple[str, str]]:
    return [(check.name, check.detail) for check in registry.doctor(adopt=True) if check.name in DRIFT]


def freed(registry: LocalRegistry) -> set[str]:
    return {each.name for each in registry.gc(older_than_s=0.0).found}


def left(registry: LocalRegistry) -> list[Check]:
    return [check for check in registry.doctor() if check.name in DRIFT]


def test_a_renamed_model_renames_the_adapter_and_nothing_else(two_parents, client, tmp_path, name):
    parent = add(two_parents, tmp_path, name)
    child = add(two_parents, tmp_path, f"{name}-child", kind="train", trained_from=parse_ref(parent))
    two_parents.promote(parse_ref(parent), to="production", reason="good")
    before = two_parents.version(parse_ref(parent))
    head = two_parents.history(name)
    client.rename_registered_model(name, f"{name}-new")

    assert adopt(two_parents) == [("adopted", f"{name} is called {name}-new here, too")]

    now = two_parents.version(parse_ref(f"{name}-new@production"))
    assert (now.id, now.content_digest, now.ref) == (before.id, before.content_digest, f"{name}-new:v1")
    assert [each.ref for each in two_parents.version(parse_ref(child)).parents] == [f"{name}-new:v1"]
    history = two_parents.history(f"{name}-new", verify=True)
    assert [(each.action, each.stage, each.reason) for each in history.events] == [
        ("promote", "production", "good"),
        ("rename", "", f"was {name}"),
    ]
    assert history.findings == ()
    kept = Head(registry=head.registry_id, name=name, seq=1, hash=head.head, time="2026-01-01T00:00:00Z")
    assert two_parents.history(f"{name}-new", verify=True, head=to_json(kept)).findings == ()
    with pytest.raises(NotFound) as gone:
        two_parents.version(parse_ref(parent))
    assert gone.value.hint == f"it is called {name}-new now"
    assert left(two_parents) == []
    page = client.get_model_version(f"{name}-child", "1")
    assert f"[{name}-new:v1](#/models/{name}-new/versions/1)" in page.description
    assert page.tags["adapterctl.parent.0"] == f"{name}-new:v1"
    assert f"adapters/{name}-new/lineage.svg" in client.get_registered_model(f"{name}-new").description
    # the old name is free
    assert add(two_parents, tmp_path, name) == f"{name}:v1"
    assert two_parents.version(parse_ref(f"{name}:v1")).id != before.id


@pytest.mark.parametrize("case", ["invalid", "taken", "busy"])
def test_a_name_that_cannot_be_ours_is_told_and_nothing_is_renamed(two_parents, client, tmp_path, name, case):
    add(two_parents, tmp_path, name)
    new, said = f"{name}-new", f"{name} cannot be called {name}-new: another adapter is"
    if case == "invalid":
        new, said = f"{name} New", "is not allowed"
    elif case == "taken":
        add(two_parents, tmp_path, new)
        client.delete_registered_model(new)
    else:
        job, _ = two_parents.ledger.submit(NewJob("merge", name, "a merge", {"into": name}, "ada"))
        said = f"job {job.id} makes a version of {name}"
    client.rename_registered_model(name, new)

    refused = {check.name: check for check in two_parents.doctor(adopt=True) if check.status == "error"}

    assert said in refused["renamed"].detail
    assert refused["renamed"].hint
    assert two_parents.version(parse_ref(f"{name}:v1")).state == "live"
    client.rename_registered_model(new, name)
    if case == "busy":
        two_parents.ledger.request_cancel(job.id)
    assert left(two_parents) == []


def test_what_mlflow_has_lost_becomes_a_tombstone_that_keeps_the_lineage(two_parents, client, tmp_path, name):
    root = add(two_parents, tmp_path, name)
    middle = add(two_parents, tmp_path, name, kind="train", trained_from=parse_ref(root))
    leaf = add(two_parents, tmp_path, f"{name}-leaf", kind="train", trained_from=parse_ref(middle))
    client.delete_model_version(name, "2")

    assert adopt(two_parents) == [
        ("adopted", f"{middle} is removed here, too; it stays in the lineage of {leaf}"),
    ]

    seen = two_parents.lineage(parse_ref(leaf), direction="up")
    assert [(each.ref, each.state) for each in seen.versions] == [(leaf, "live"), (middle, "removed"), (root, "live")]
    with pytest.raises(Refused, match=f"{leaf} is made of {root}"):
        two_parents.remove(parse_ref(root), reason="")
    assert middle not in freed(two_parents)
    assert two_parents.verify(parse_ref(leaf)).files == "intact"
    two_parents.remove(parse_ref(leaf), reason="")
    assert middle in freed(two_parents)
    two_parents.remove(parse_ref(root), reason="")
    assert left(two_parents) == []


def test_a_version_that_holds_a_stage_is_removed_only_once_it_was_demoted(two_parents, client, tmp_path, name):
    version = add(two_parents, tmp_path, name)
    two_parents.promote(parse_ref(version), to="production")
    client.delete_model_version(name, "1")

    (refused,) = [check for check in two_parents.doctor(adopt=True) if check.name in DRIFT]

    assert (refused.name, refused.status) == ("deleted", "error")
    assert f"{version} holds production" in refused.detail
    assert f"adapterctl demote {name} --stage production, then adapterctl doctor --adopt" in refused.hint
    two_parents.demote(name, stage="production")
    assert adopt(two_parents) == [("adopted", f"{version} is removed here, too")]
    assert left(two_parents) == []


def test_a_model_that_is_gone_goes_here_too_and_its_name_may_come_back(two_parents, client, tmp_path, name):
    first, second = add(two_parents, tmp_path, name), add(two_parents, tmp_path, name)
    client.delete_registered_model(name)
    with pytest.raises(Refused, match="was renamed or deleted there"):
        add(two_parents, tmp_path, name)

    assert adopt(two_parents) == [("adopted", f"{each} is removed here, too") for each in (first, second)]

    assert add(two_parents, tmp_path, name) == f"{name}:v3"  # MLflow counts from 1 again, and we never twice
    assert {str(each.version) for each in client.search_model_versions(f"name = '{name}'")} == {"3"}
    assert left(two_parents) == []


def test_a_version_made_by_hand_is_registered_beside_it(two_parents, client, tmp_path, name):
    add(two_parents, tmp_path, name)
    number = make_by_hand(client, tmp_path, name)
    client.create_model_version(name, source=f"models:/{name}/1")

    assert adopt(two_parents) == [
        ("adopted", f"MLflow's {name} version {number} is {name}:v4 here"),
        ("adopted", f"MLflow's {name} version 3 is {name}:v1 here, which has the same content"),
    ]

    taken = two_parents.version(parse_ref(f"{name}:v4"))
    assert (taken.source, taken.kind) == (f"models:/{name}/{number}", "import")
    assert left(two_parents) == []
    client.set_registered_model_alias(name, "production", number)
    (refused,) = [check for check in two_parents.doctor(adopt=True) if check.name in DRIFT]
    assert refused.hint == f"MLflow's version 2 is {name}:v4 here: adapterctl promote {name}:v4 --to production"
    client.delete_registered_model_alias(name, "production")
    two_parents.remove(parse_ref(f"{name}:v4"), reason="")
    assert left(two_parents) == []  # what was removed does not come back by itself


def test_what_is_no_adapter_is_told_and_nothing_is_half_written(two_parents, client, tmp_path, name):
    add(two_parents, tmp_path, name)
    make_by_hand(client, tmp_path, name, good=False)
    before = two_parents.versions()

    (refused,) = [check for check in two_parents.doctor(adopt=True) if check.name in DRIFT]

    assert (refused.name, refused.status) == ("unknown", "warning")
    assert "not adopted: " in refused.detail
    assert two_parents.versions() == before
    assert {str(each.version) for each in client.search_model_versions(f"name = '{name}'")} == {"1", "2"}
    client.delete_model_version(name, "2")


def test_an_alias_moved_by_hand_is_in_the_history_as_such(two_parents, client, tmp_path, name):
    add(two_parents, tmp_path, name)
    recalled = add(two_parents, tmp_path, name)
    two_parents.recall(parse_ref(recalled), reason="leaked")
    client.set_registered_model_alias(name, "production", "1")
    client.set_registered_model_alias(name, "staging", "2")

    found = [check for check in two_parents.doctor(adopt=True) if check.name in DRIFT]

    assert [(check.name, check.status) for check in found] == [("adopted", "ok"), ("stage", "error")]
    assert found[0].detail == f"{name}@production is {name}:v1, as MLflow's alias says"
    assert "not adopted: " in found[1].detail
    assert "leaked" in found[1].detail
    (event,) = two_parents.history(name).events
    assert (event.action, event.stage, event.ref) == ("adopt", "production", f"{name}:v1")
    assert "done in MLflow" in event.reason
    client.delete_registered_model_alias(name, "staging")


def test_what_a_server_saw_is_a_note_that_moves_nothing(two_parents, tmp_path, name):
    version = add(two_parents, tmp_path, name)
    add(two_parents, tmp_path, name)
    two_parents.promote(parse_ref(version), to="production")
    seen = two_parents.acting("grace")
    alias = {"name": name, "alias": "production"}

    seen.witness("POST registered-models/alias", alias | {"version": "1"})  # as the ledger says
    seen.witness("POST registered-models/alias", alias | {"version": "2"})
    seen.witness("DELETE registered-models/alias", alias)
    seen.witness("POST registered-models/alias", {"name": name, "alias": "candidate", "version": "2"})  # no stage
    seen.witness("DELETE model-versions/delete", {"name": name, "version": "2"})
    seen.witness("DELETE model-versions/delete", {"name": name, "version": "7"})  # not ours
    seen.witness("DELETE registered-models/delete", {"name": name})
    seen.witness("DELETE registered-models/delete", {"name": "nobody"})

    history = two_parents.history(name, verify=True)
    assert [(each.action, each.stage, each.ref, each.actor, each.reason) for each in history.events[1:]] == [
        ("mlflow", "production", f"{name}:v2", "grace", "alias pointed to v2"),
        ("mlflow", "production", None, "grace", "alias deleted"),
        ("mlflow", "", f"{name}:v2", "grace", "v2 deleted"),
        ("mlflow", "", None, "grace", "deleted, with 2 versions"),
    ]
    assert history.findings == ()
    assert two_parents.version(parse_ref(f"{name}@production")).ref == version
    assert two_parents.promote(parse_ref(f"{name}:v2"), to="production").previous == version
    assert two_parents.rollback(name, stage="production").ref == version


def test_our_description_comes_back_below_what_was_written(two_parents, client, tmp_path, name):
    parent = add(two_parents, tmp_path, name, metrics={"bleu": 0.5}, dataset="books")
    add(two_parents, tmp_path, f"{name}-child", kind="train", trained_from=parse_ref(parent))
    was = client.get_model_version(name, "1").description
    client.update_model_version(name, "1", description="Use this one.")
    client.update_registered_model(name, description="")
    (told,) = left(two_parents)
    assert told.detail == f"in MLflow, the descriptions of {name}, {parent} do not lead to their lineage any more"

    assert adopt(two_parents) == [("adopted", f"descriptions of {name} lead to their lineage again")]

    assert client.get_model_version(name, "1").description == f"Use this one.\n\n{was}"
    assert f"adapters/{name}/lineage.svg" in client.get_registered_model(name).description
    assert left(two_parents) == []
    client.update_model_version(name, "1", description="x" * 4990)
    assert "no room is left" in dict(adopt(two_parents))["description"]
    client.update_model_version(name, "1", description=was)


def test_what_a_cut_short_removal_left_is_no_new_version(two_parents, client, tmp_path, name):
    add(two_parents, tmp_path, name)
    version = add(two_parents, tmp_path, name)
    found = two_parents.version(parse_ref(version))
    two_parents.ledger.remove_version(found.id, actor="ada", reason="")

    assert adopt(two_parents) == [("removed", f"MLflow still has {version}, which was removed here")]

    two_parents.gc(older_than_s=0.0)
    assert left(two_parents) == []


def test_an_emptied_mlflow_is_no_reason_to_remove_anything(two_parents, tmp_path, ledger_schema, mlflow_schema):
    home = tmp_path / "home"
    home.mkdir()
    shutil.copy(ledger_schema, home / "registry.db")
    shutil.copy(mlflow_schema, home / "mlflow.db")
    registry = connect(load_settings({"home": home, "idle_s": 0.3}))
    version = add(registry, tmp_path, "chat")
    # emptied under a registry that has it open
    with closing(sqlite3.connect(home / "mlflow.db")) as database, database:
        database.execute("pragma foreign_keys = off")
        tables = database.execute("select name from sqlite_master where type = 'table'").fetchall()
        for (table,) in tables:
            if table != "alembic_version" and not table.startswith("sqlite"):
                database.execute(f"delete from {table}")

    for opened in (registry, connect(load_settings({"home": home, "idle_s": 0.3}))):
        (told,) = [check for check in opened.doctor(adopt=True) if check.name == "mlflow"]
        assert told.status == "error"
        assert "has no experiment 'adapters', the ledger has 1 versions" in told.detail
        assert "restore MLflow's database" in told.hint
        with pytest.raises((Misconfigured, Unavailable)):
            add(opened, tmp_path, "another")
        assert opened.version(parse_ref(version)).state == "live"
        assert "adopted" not in {check.name for check in opened.doctor(adopt=True)}


def test_what_was_seen_missing_and_is_there_is_not_removed(two_parents, client, tmp_path, name, monkeypatch):
    version = add(two_parents, tmp_path, name)
    seen = MlflowVersions.seen
    monkeypatch.setattr(MlflowVersions, "seen", lambda store: [each for each in seen(store) if each.name != name])

    adopted = adopt(two_parents)

    assert [kind for kind, _ in adopted] == ["deleted"]
    assert two_parents.version(parse_ref(version)).state == "live"


def test_a_version_that_is_registered_meanwhile_is_not_gone(two_parents, tmp_path, name, monkeypatch):
    seen = MlflowVersions.seen
    made = []

    def then_register(store: MlflowVersions) -> Any:
        found = seen(store)
        if not made:
            made.append("")
            made[0] = add(two_parents, tmp_path, name)
        return found

    monkeypatch.setattr(MlflowVersions, "seen", then_register)

    assert left(two_parents) == []
    assert made == [f"{name}:v1"]


def test_a_text_written_between_two_pages_hides_no_version(two_parents, client, tmp_path, name, monkeypatch):
    versions = [add(two_parents, tmp_path, name) for _ in range(3)]
    search = client.search_model_versions

    def by_ones(*asked: Any, **more: Any) -> Any:
        page = search(*asked, **{**more, "max_results": 1})
        if more.get("page_token") is None:
            client.update_model_version(name, "1", description=client.get_model_version(name, "1").description)
        return page

    monkeypatch.setattr(client, "search_model_versions", by_ones)

    (model,) = [each for each in two_parents.version_store.seen() if each.name == name]

    assert [f"{name}:v{number}" for number in sorted(model.versions)] == versions


def test_a_registration_that_was_cut_short_is_not_adopted_beside_itself(two_parents, client, tmp_path, name):
    add(two_parents, tmp_path, name)
    source = write_tiny_adapter(tmp_path / "cut-short", seed=next(_seeds))
    program = "import sys; from adapterctl.bootstrap import connect; connect().register(sys.argv[1], name=sys.argv[2])"
    environment = os.environ | two_parents.settings.to_env() | {"ADAPTERCTL_CRASH_AT": "register.version"}
    subprocess.run([sys.executable, "-c", program, str(source), name], env=environment, check=False, timeout=120)

    assert adopt(two_parents) == [
        ("unfinished", f"MLflow has {name} version 2, whose registration is not finished"),
    ]

    assert two_parents.register(str(source), name=name).version.ref == f"{name}:v2"
    assert left(two_parents) == []


def test_versions_of_an_adapter_that_has_tombstones_only_are_named(two_parents, client, tmp_path, name):
    version = add(two_parents, tmp_path, name)
    two_parents.ledger.remove_version(two_parents.version(parse_ref(version)).id, actor="ada", reason="")
    number = make_by_hand(client, tmp_path, name)

    assert [check.name for check in left(two_parents)] == ["removed", "unknown"]

    client.delete_model_version(name, number)
    two_parents.gc(older_than_s=0.0)
    assert left(two_parents) == []


def test_the_name_of_an_adapter_that_has_a_history_alone_is_taken(two_parents, client, tmp_path, name):
    add(two_parents, tmp_path, name)
    other = two_parents.ledger.ensure_adapter(f"{name}-new")
    two_parents.acting("grace").witness("DELETE registered-models/delete", {"name": f"{name}-new"})
    moved = {"name": f"{name}-new", "alias": "production", "version": "1"}
    two_parents.acting("grace").witness("POST registered-models/alias", moved)
    assert list(two_parents.ledger.stage_history(other)) == []
    noted = {"version_id": None, "action": "mlflow", "actor": "ada", "reason": "a note"}
    two_parents.ledger.record_note(other, "", **noted)
    client.rename_registered_model(name, f"{name}-new")

    (refused,) = [check for check in two_parents.doctor(adopt=True) if check.name in DRIFT]

    assert f"{name} cannot be called {name}-new: another adapter is" in refused.detail
    client.rename_registered_model(f"{name}-new", name)


def test_a_rename_that_another_process_recorded_is_no_second_event(two_parents, tmp_path, name):
    version = two_parents.version(parse_ref(add(two_parents, tmp_path, name)))
    adapter_id = two_parents.ledger.adapter_id(name)

    first = two_parents.ledger.rename_adapter(adapter_id, f"{name}-new", actor="ada")
    second = two_parents.ledger.rename_adapter(adapter_id, f"{name}-new", actor="ada")

    assert first is not None
    assert second is None
    assert [event.action for event in two_parents.history(f"{name}-new").events] == ["rename"]
    two_parents.ledger.rename_adapter(adapter_id, name, actor="ada")
    assert two_parents.version(parse_ref(f"{name}:v1")).id == version.id

"""`doctor --adopt` on the real MLflow: what was done there is accepted where the rules allow it, and told where not."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from tiny import write_tiny_adapter

from adapterctl.bootstrap import connect
from adapterctl.registry.api import Check
from adapterctl.registry.domain.access import Scope
from adapterctl.registry.domain.errors import (
    InvalidInput,
    Misconfigured,
    NotFound,
    Refused,
    Unavailable,
)
from adapterctl.registry.domain.job import JobState, NewJob
from adapterctl.registry.domain.recipe import MergeRequest
from adapterctl.registry.domain.refs import parse_parent, parse_ref
from adapterctl.registry.domain.stage import Head
from adapterctl.registry.services.local import LocalRegistry
from adapterctl.registry.settings import load_settings
from adapterctl.registry.stores.mlflow_versions import MlflowVersions
from adapterctl.registry.wire import to_json

DRIFT = {
    *(
        "adopted",
        "lost",
        "older",
        "deleted",
        "renamed",
        "replaced",
        "removed",
        "unknown",
        "unfinished",
        "doubled",
        "stage",
        "description",
        "tags",
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

    assert adopt(two_parents) == [
        ("adopted", f"{name} is called {name}-new here, too"),
        ("adopted", f"descriptions of {name}-child lead to their lineage again"),
        ("adopted", f"descriptions of {name}-new lead to their lineage again"),
    ]

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


def test_tags_that_were_changed_or_removed_are_told_and_written_again(two_parents, client, tmp_path, name):
    version = add(two_parents, tmp_path, name, tags={"team": "mt", "draft": "yes", "base_model": "mine"})
    other = add(two_parents, tmp_path, name)
    two_parents.recall(parse_ref(version), reason="leaks")
    for job in two_parents.jobs(kind="recall"):
        list(two_parents.follow(job.id, timeout_s=120))
    was = {number: client.get_model_version(name, number).tags for number in "12"}
    assert left(two_parents) == []

    client.set_model_version_tag(name, "1", "team", "theirs")
    client.set_model_version_tag(name, "1", "of a person", "stays")
    for tag in ("draft", "adapterctl.recalled"):
        client.delete_model_version_tag(name, "1", tag)
    client.set_model_version_tag(name, "2", "adapterctl.kind", "merge")
    client.set_model_version_tag(name, "2", "adapterctl.recalled", "x:v1: not so")
    (told,) = left(two_parents)

    assert (told.name, told.status) == ("tags", "warning")
    assert (
        f"{version} (team, draft, adapterctl.recalled), {other} (adapterctl.kind, adapterctl.recalled)" in told.detail
    )
    assert adopt(two_parents) == [("adopted", f"the tags of {version}, {other} are ours again")]
    assert client.get_model_version(name, "1").tags == {**was["1"], "of a person": "stays"}
    assert client.get_model_version(name, "2").tags == was["2"]
    assert left(two_parents) == []


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
        assert str(home) in told.detail
        assert str(home) not in str(opened.doctor(abroad=True))
        with pytest.raises((Misconfigured, Unavailable)):
            add(opened, tmp_path, "another")
        assert opened.version(parse_ref(version)).state == "live"
        assert "adopted" not in {check.name for check in opened.doctor(adopt=True)}


def test_what_was_seen_missing_and_is_there_is_not_removed(two_parents, client, tmp_path, name, monkeypatch):
    version = add(two_parents, tmp_path, name)
    seen, missed = MlflowVersions.seen, []

    def looks(store: MlflowVersions, adapter_id: str | None = None) -> Any:
        """Does not see it, also when asked for it, until it is about to be removed."""
        found = seen(store, adapter_id)
        if len(missed) == 2:
            return found
        missed.append(adapter_id)
        return [each for each in found if each.name != name]

    monkeypatch.setattr(MlflowVersions, "seen", looks)

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


def crash(registry: LocalRegistry, at: str, *arguments: str) -> None:
    environment = os.environ | registry.settings.to_env() | {"ADAPTERCTL_CRASH_AT": at}
    command = [sys.executable, "-m", "adapterctl", *arguments]
    done = subprocess.run(command, env=environment, check=False, timeout=120, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.mark.parametrize("back", [False, True], ids=["on", "back"])
def test_a_rename_that_was_cut_short_is_seen_and_completed(two_parents, client, tmp_path, name, back):
    root = add(two_parents, tmp_path, f"{name}-root")
    parent = add(two_parents, tmp_path, name, kind="train", trained_from=parse_ref(root))
    add(two_parents, tmp_path, f"{name}-child", kind="train", trained_from=parse_ref(parent))
    client.rename_registered_model(name, f"{name}-new")
    crash(two_parents, "stage.renamed", "doctor", "--adopt")
    now = f"{name}-new"
    assert [(check.name, check.status) for check in left(two_parents)] == [("description", "warning")] * 2
    if back:
        client.rename_registered_model(now, name)
        now = name

    adopted = adopt(two_parents)

    assert {kind for kind, _ in adopted} == {"adopted"}
    assert left(two_parents) == []
    assert adopt(two_parents) == []
    child, own = client.get_model_version(f"{name}-child", "1"), client.get_model_version(now, "1")
    assert f"[{now}:v1](#/models/{now}/versions/1)" in child.description
    assert child.tags["adapterctl.parent.0"] == f"{now}:v1"
    assert f"adapters/{now}/v1/lineage.svg" in own.description
    assert f"adapters/{now}/lineage.svg" in client.get_registered_model(now).description
    assert f"[{now}:v1]" in client.get_model_version(f"{name}-root", "1").description
    former = name if now != name else f"{name}-new"
    texts = [child.description, own.description, client.get_model_version(f"{name}-root", "1").description]
    assert not any(f"{former}:v1]" in text or f"/{former}/" in text for text in texts)


def test_a_former_name_that_is_another_adapter_now_is_not_taken_for_the_renamed_one(
    two_parents, client, tmp_path, name
):
    parent = add(two_parents, tmp_path, name)
    add(two_parents, tmp_path, f"{name}-old", kind="train", trained_from=parse_ref(parent))
    client.rename_registered_model(name, f"{name}-new")
    crash(two_parents, "stage.renamed", "doctor", "--adopt")
    other = add(two_parents, tmp_path, name)
    add(two_parents, tmp_path, f"{name}-young", kind="train", trained_from=parse_ref(other))

    adopt(two_parents)

    old, young = (client.get_model_version(f"{name}-{each}", "1") for each in ("old", "young"))
    assert (old.tags["adapterctl.parent.0"], young.tags["adapterctl.parent.0"]) == (f"{name}-new:v1", f"{name}:v1")
    assert f"[{name}-new:v1]" in old.description
    assert f"[{name}:v1](#/models/{name}/versions/1)" in young.description
    assert left(two_parents) == []


def paged(client: Any, monkeypatch: pytest.MonkeyPatch, deed: Callable[[], Any]) -> None:
    """Let every page of registered models hold one, and the deed be done once between the first two."""
    search, done = client.search_registered_models, []

    def by_ones(*asked: Any, **more: Any) -> Any:
        if more.get("page_token") is not None and not done:
            done.append(deed())
        return search(*asked, **{**more, "max_results": 1})

    monkeypatch.setattr(client, "search_registered_models", by_ones)


@pytest.mark.parametrize("late", [True, False], ids=["itself", "another"])
def test_a_rename_between_two_pages_is_no_deletion(two_parents, client, tmp_path, name, monkeypatch, late):
    """From the last page to the first it hides itself, from the first to the last the one after it."""
    first, last = f"aa-{name}", f"zz-{name}"
    moved, to = (last, f"aa-{name}-moved") if late else (first, f"zz-{name}-moved")
    for each in (first, last):
        add(two_parents, tmp_path, each)
    paged(client, monkeypatch, lambda: client.rename_registered_model(moved, to))

    told = left(two_parents)

    assert [check.name for check in told] == ["renamed"]
    assert f"{moved} is called {to}" in told[0].detail
    assert adopt(two_parents)[0] == ("adopted", f"{moved} is called {to} here, too")
    states = {each.ref: each.state for each in two_parents.versions(removed=True)}
    assert states[f"{to}:v1"] == states[f"{first if late else last}:v1"] == "live"
    assert left(two_parents) == []


def test_a_rename_after_the_look_is_no_deletion(two_parents, client, tmp_path, name, monkeypatch):
    version = two_parents.version(parse_ref(add(two_parents, tmp_path, name)))
    seen, looks = MlflowVersions.seen, []

    def then_rename(store: MlflowVersions, adapter_id: str | None = None) -> Any:
        looks.append(adapter_id)
        found = [each for each in seen(store, adapter_id) if each.name != name]  # as if it were gone
        if adapter_id is not None and len(looks) == 2:
            client.rename_registered_model(name, f"{name}-new")
        return found

    monkeypatch.setattr(MlflowVersions, "seen", then_rename)

    adopt(two_parents)

    monkeypatch.undo()
    assert two_parents.ledger.version(version.id).state == "live"
    adopt(two_parents)
    assert two_parents.version(parse_ref(f"{name}-new:v1")).id == version.id


@pytest.fixture
def restorable(tmp_path, ledger_schema, mlflow_schema) -> Iterator[tuple[LocalRegistry, Callable[[], None]]]:
    """A registry with `chat:v1` in production, and the means to restore the MLflow that it has now."""
    home = tmp_path / "home"
    home.mkdir()
    shutil.copy(ledger_schema, home / "registry.db")
    shutil.copy(mlflow_schema, home / "mlflow.db")
    registry = connect(load_settings({"home": home, "idle_s": 0.3}))
    registry.promote(parse_ref(add(registry, tmp_path, "chat")), to="production")
    _copy_database(home / "mlflow.db", tmp_path / "kept.db")

    yield registry, lambda: _copy_database(tmp_path / "kept.db", home / "mlflow.db")
    registry.ledger.close()


def _copy_database(source: Path, target: Path) -> None:
    with closing(sqlite3.connect(source)) as here, closing(sqlite3.connect(target)) as there:
        here.backup(there)


def test_an_older_backup_of_mlflow_is_no_mass_deletion(restorable, tmp_path):
    registry, restore = restorable
    second = add(registry, tmp_path, "chat", kind="train", trained_from=parse_ref("chat:v1"))
    third = add(registry, tmp_path, "chat")
    other = add(registry, tmp_path, "translate")
    registry.promote(parse_ref(second), to="production")
    registry.promote(parse_ref(third), to="production")
    registry.demote("chat", stage="production")
    before = registry.versions(removed=True)
    restore()

    told = {check.name: check for check in registry.doctor()}
    adopted = registry.doctor(adopt=True)
    partly = registry.doctor(adopt=True, force=["chat"])

    assert "deleted" not in told
    assert told["lost"].status == "error"
    assert f"({second}, {third}, {other}) nor their runs: an older backup of it was restored" in told["lost"].detail
    assert told["lost"].hint.endswith("--adopt --force chat --force translate removes them here, too")
    for checks in (adopted, partly):
        (lost,) = [check for check in checks if check.name == "lost"]
        assert "not adopted: nothing is adopted before it is decided what became of" in lost.detail
        assert "adopted" not in {check.name for check in checks}
        assert "stage" in {check.name for check in checks}  # the alias of the backup is not adopted either
    assert registry.versions(removed=True) == before
    assert registry.history("chat").events[-1].action == "demote"

    named = registry.doctor(adopt=True, force=["chat", "translate"])

    assert {f"{each} is removed here, too" for each in (second, third, other)} <= {check.detail for check in named}
    assert {each.ref for each in registry.versions()} == {"chat:v1"}
    assert add(registry, tmp_path, "chat") == "chat:v4"
    with pytest.raises(NotFound):
        registry.doctor(adopt=True, force=["nobody"])
    with pytest.raises(InvalidInput, match="force without adopt"):
        registry.doctor(force=["chat"])


def test_what_an_older_ledger_does_not_know_is_taken_in_again_under_its_number(tmp_path, ledger_schema, mlflow_schema):
    home = tmp_path / "home"
    home.mkdir()
    shutil.copy(ledger_schema, home / "registry.db")
    shutil.copy(mlflow_schema, home / "mlflow.db")
    settings = load_settings({"home": home, "idle_s": 0.3})
    with closing((registry := connect(settings)).ledger):
        add(registry, tmp_path, "chat")
        _copy_database(home / "registry.db", tmp_path / "backup.db")
        second, other = add(registry, tmp_path, "chat"), add(registry, tmp_path, "translate")
        parents = tuple(parse_parent(each) for each in (second, other))
        job = registry.merge(MergeRequest(parents, into="both", method="cat")).job
        assert [*registry.follow(job.id, timeout_s=60)][-1].state is JobState.SUCCEEDED
        whole = {each.ref: each.id for each in registry.versions()}
    _copy_database(tmp_path / "backup.db", home / "registry.db")

    with closing((registry := connect(settings)).ledger):
        told = {(check.name, check.status) for check in left(registry)}
        hints = [check.hint for check in left(registry) if check.name == "older"]
        write_tiny_adapter(tmp_path / "translate-again", seed=next(_seeds))
        with pytest.raises(Refused, match="'translate' of another adapter"):
            registry.register(str(tmp_path / "translate-again"), name="translate")
        adopted = {detail for kind, detail in adopt(registry) if kind == "adopted"}
        after = {each.ref: each.id for each in registry.versions()}
        lineage = registry.lineage(parse_ref("both:v1"), direction="up")

        assert told == {("older", "error"), ("unfinished", "warning")}
        assert all("restore the ledger's newest backup" in hint for hint in hints)
        lost = (second, other, "both:v1")
        assert adopted >= {f"MLflow's {ref.replace(':v', ' version ')} is {ref} here" for ref in lost}
        assert after == whole
        assert {edge.parent for edge in lineage.edges} == {second, other}
        assert [check.name for check in left(registry)] == []


def test_a_backup_that_is_restored_while_doctor_adopts_ends_it(restorable, tmp_path, monkeypatch):
    registry, restore = restorable
    registry.promote(parse_ref(add(registry, tmp_path, "chat")), to="production")
    registry.demote("chat", stage="production")
    add(registry, tmp_path, "talk")
    registry.version_store._client.rename_registered_model("talk", "speak")
    rename = registry.ledger.rename_adapter
    monkeypatch.setattr(
        type(registry.ledger), "rename_adapter", lambda ledger, *asked, **more: (restore(), rename(*asked, **more))[1]
    )

    checks = [check for check in registry.doctor(adopt=True) if check.name in DRIFT]

    assert [check.detail for check in checks if check.name == "adopted"] == ["talk is called speak here, too"]
    assert {"lost", "stage"} <= {check.name for check in checks}
    assert registry.history("chat").events[-1].action == "demote"


def test_a_run_that_was_erased_for_good_is_asked_about_too(restorable, tmp_path):
    registry, _ = restorable
    version = registry.version(parse_ref(add(registry, tmp_path, "chat")))
    newest = add(registry, tmp_path, "translate")
    client = registry.version_store._client
    client.delete_model_version("chat", "2")
    assert [check.name for check in registry.doctor() if check.name in DRIFT] == ["deleted"]
    client.delete_run(version.run_id)
    assert [check.name for check in registry.doctor() if check.name in DRIFT] == ["deleted"]
    client._tracking_client.store._hard_delete_run(version.run_id)

    (lost,) = [check for check in registry.doctor(adopt=True) if check.name in DRIFT]

    assert (lost.name, lost.status) == ("lost", "error")
    assert "runs were erased, or an older backup was restored" in lost.detail
    assert f"{version.ref} is removed here, too" in [
        each.detail for each in registry.doctor(adopt=True, force=["chat"])
    ]
    assert registry.version(parse_ref(newest)).state == "live"
    assert left(registry) == []


def test_an_adapter_of_tombstones_alone_is_renamed_and_takes_in_what_was_made(two_parents, client, tmp_path, name):
    two_parents.remove(parse_ref(add(two_parents, tmp_path, name)), reason="")
    number = make_by_hand(client, tmp_path, name)
    client.rename_registered_model(name, f"{name}-new")
    assert [check.name for check in left(two_parents)] == ["renamed"]

    assert adopt(two_parents) == [
        ("adopted", f"{name} is called {name}-new here, too"),
        ("adopted", f"MLflow's {name}-new version {number} is {name}-new:v3 here"),
        ("adopted", f"descriptions of {name}-new lead to their lineage again"),
    ]

    assert left(two_parents) == []
    assert [(each.ref, each.state) for each in two_parents.versions(f"{name}-new", removed=True)] == [
        (f"{name}-new:v1", "removed"),
        (f"{name}-new:v3", "live"),
    ]


def test_a_model_that_was_left_under_another_name_does_not_rename_its_adapter(two_parents, client, tmp_path, name):
    """All was removed, the empty model renamed in MLflow, the adapter registered anew: both models carry our id."""
    two_parents.remove(parse_ref(add(two_parents, tmp_path, name)), reason="")
    client.rename_registered_model(name, f"{name}-left")
    version = add(two_parents, tmp_path, name)

    assert left(two_parents) == []
    assert adopt(two_parents) == []
    assert two_parents.version(parse_ref(version)).state == "live"
    client.delete_registered_model(f"{name}-left")


def test_a_rename_out_of_a_gate_is_asked_for_by_name(two_parents, client, tmp_path, name):
    version = add(two_parents, tmp_path, f"{name}-prod", metrics={"bleu": 0.1})
    two_parents.set_gates({"gates": [{"stage": "production", "adapters": ["*-prod"], "require": ["bleu >= 0.3"]}]})
    token = two_parents.create_token(f"team {name}", scope=Scope.PROMOTE, names=[f"{name}-p*"]).token
    reader = two_parents.create_token(f"reader {name}", scope=Scope.READ, names=[f"{name}-p*"]).token
    client.rename_registered_model(f"{name}-prod", f"{name}-dev")
    changed = f"production no longer asks for 'bleu >= 0.3'; the token team {name} may no longer change it"

    (told,) = left(two_parents)
    (refused,) = [check for check in two_parents.doctor(adopt=True) if check.name in DRIFT]

    assert told.detail.endswith(f"where other rules hold: {changed}")
    assert f"adapterctl doctor --adopt --force {name}-prod renames it here, too" in told.hint
    assert refused.detail == f"{told.detail}; not adopted: a rename that changes rules is asked for by name"
    assert two_parents.gate_check(parse_ref(version), to="production").verdict == "failed"
    two_parents.doctor(adopt=True, force=[f"{name}-prod"])
    assert left(two_parents) == []
    (event,) = two_parents.history(f"{name}-dev", verify=True).events
    assert (event.action, event.reason) == ("rename", f"was {name}-prod; {changed}")
    with pytest.raises(NotFound) as gone:
        two_parents.version(parse_ref(version))
    assert gone.value.hint == f"it is called {name}-dev now"
    two_parents.revoke_token(token.id)
    two_parents.revoke_token(reader.id)
    client.rename_registered_model(f"{name}-dev", f"{name}-stage")  # out of no gate, into none
    assert adopt(two_parents)[0] == ("adopted", f"{name}-dev is called {name}-stage here, too")
    client.rename_registered_model(f"{name}-stage", f"{name}-prod")
    (told,) = left(two_parents)
    assert told.detail.endswith("where other rules hold: production also asks for 'bleu >= 0.3'")
    two_parents.doctor(adopt=True, force=[f"{name}-stage"])
    two_parents.set_gates({"gates": []})
    assert left(two_parents) == []

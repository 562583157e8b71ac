"""Stages over the real ledger and the real MLflow: who serves, who served, and what happens when the two disagree."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, text, update

from adapterctl.registry.domain.errors import (
    Corrupt,
    DecisionOutdated,
    GateRefused,
    InvalidInput,
    NotFound,
    Refused,
    StageMoved,
    Unavailable,
)
from adapterctl.registry.domain.refs import Ref
from adapterctl.registry.domain.stage import GENESIS, Head, StageEvent
from adapterctl.registry.domain.version import AdapterVersion, local_folder
from adapterctl.registry.services.gates import kept_decision, set_gates
from adapterctl.registry.services.promote import DECISIONS, Stages, check_stage, history
from adapterctl.registry.services.register import Registration, register
from adapterctl.registry.services.resolve import resolve
from adapterctl.registry.stores.sql.tables import stage_history

STAGES = ("staging", "production", "canary")


@contextmanager
def folders(version: AdapterVersion) -> Iterator[Path]:
    yield local_folder(version.placement.location)


@pytest.fixture
def chat(sql_ledger, version_store, tiny_adapter, home, tmp_path) -> Callable[[], AdapterVersion]:
    """Register the next version of `chat`."""
    seeds = iter(range(100))

    def another() -> AdapterVersion:
        seed = next(seeds)
        source = tiny_adapter(tmp_path / f"adapter-{seed}", seed=seed)
        registered = register(
            sql_ledger,
            Registration(source=str(source), name="chat"),
            open_versions=lambda: version_store,
            open_hub=no_hub,
            home=home,
            created_by="ada",
        )
        return resolve(sql_ledger, Ref("chat", number=registered.version.number))

    return another


def no_hub(source: Any, wanted: Any) -> Any:
    raise AssertionError("nothing here comes from a hub")


@pytest.fixture
def stages(sql_ledger, version_store) -> Stages:
    return Stages(sql_ledger, version_store, folders, STAGES, "ada")


def legacy_of(version_store, version: AdapterVersion) -> str:
    return version_store._client.get_model_version(version.name, str(version.number)).current_stage


# promote


def test_a_promotion_is_recorded_and_mlflow_follows(stages, chat, sql_ledger, version_store):
    version = chat()

    event = stages.promote(version, stage="production", reason="best on both tasks")

    assert (event.seq, event.action, event.ref, event.previous) == (1, "promote", "chat:v1", None)
    assert (event.actor, event.reason) == ("ada", "best on both tasks")
    assert sql_ledger.stage_holder(version.adapter_id, "production") == version.id
    assert version_store.alias("chat", "production") == 1
    assert legacy_of(version_store, version) == "Production"


def test_the_version_that_served_is_archived_unless_it_holds_another_stage(stages, chat, version_store):
    first, second, third = chat(), chat(), chat()
    stages.promote(first, stage="production")
    stages.promote(second, stage="staging")

    stages.promote(second, stage="production")

    assert [legacy_of(version_store, v) for v in (first, second)] == ["Archived", "Production"]
    stages.promote(third, stage="production")
    assert [legacy_of(version_store, v) for v in (second, third)] == ["Staging", "Production"]


def test_a_stage_that_mlflow_does_not_know_is_an_alias_alone(stages, chat, version_store):
    version = chat()

    stages.promote(version, stage="canary")

    assert version_store.alias("chat", "canary") == 1
    assert legacy_of(version_store, version) == "None"


def test_promoting_the_holder_again_adds_no_row(stages, chat, sql_ledger):
    version = chat()
    first = stages.promote(version, stage="production")

    again = stages.promote(version, stage="production")

    assert again == first
    assert len(sql_ledger.stage_history(version.adapter_id)) == 1


def test_an_unknown_stage_is_refused_with_those_that_exist(stages, chat):
    with pytest.raises(InvalidInput) as refused:
        stages.promote(chat(), stage="prod")

    assert refused.value.hint.startswith("did you mean production? stages are staging, production, canary; ")


def test_a_stage_that_is_like_none_is_refused_with_those_that_exist(sql_ledger, chat):
    chat()

    with pytest.raises(InvalidInput, match="'nope' is no stage") as refused:
        history(sql_ledger, "chat", names=("staging", "production"), stage="nope")

    assert refused.value.hint == "stages are staging, production; settings: ADAPTERCTL_STAGES"


def test_changed_bytes_are_not_promoted(stages, chat, sql_ledger):
    version = chat()
    weights = local_folder(version.placement.location) / "adapter_model.safetensors"
    weights.chmod(0o644)
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x00")

    with pytest.raises(Corrupt, match=r"adapter_model\.safetensors"):
        stages.promote(version, stage="production")

    assert sql_ledger.stage_history(version.adapter_id) == []


def test_a_removed_version_is_not_promoted(stages, chat, sql_ledger):
    version = chat()
    sql_ledger.remove_version(version.id, actor="ada", reason="a mistake")

    with pytest.raises(Refused, match="was removed"):
        stages.promote(sql_ledger.version(version.id), stage="production")


def test_a_promotion_that_began_before_another_one_ended_is_refused(stages, chat, sql_ledger):
    first, second = chat(), chat()

    def overtaken(version: AdapterVersion) -> Any:
        # between what this promotion saw and what it does, another one takes the stage
        stages.promote(first, stage="production")
        return folders(version)

    with pytest.raises(StageMoved, match="chat:v1"):
        replace(stages, folders=overtaken).promote(second, stage="production")

    assert [event.version_id for event in sql_ledger.stage_history(first.adapter_id)] == [first.id]


# when MLflow says something else


def test_an_alias_that_was_moved_in_mlflow_is_named_with_both_ways_out(stages, chat, sql_ledger, version_store):
    first, second, third = chat(), chat(), chat()
    stages.promote(first, stage="production")
    version_store.project_stage("chat", "production", number=2, legacy={})

    with pytest.raises(StageMoved) as moved:
        stages.promote(third, stage="production")
    with pytest.raises(StageMoved):
        stages.demote("chat", stage="production")
    with pytest.raises(StageMoved):
        check_stage(sql_ledger, version_store, "chat", "production")

    assert moved.value.message == "production of chat is chat:v1 in the ledger, but MLflow's alias is v2"
    assert "promote chat:v1 --to production" in moved.value.hint
    assert "adopt chat --stage production" in moved.value.hint
    assert version_store.alias("chat", "production") == second.number


def test_a_move_that_mlflow_does_not_follow_is_told_as_done_with_what_completes_it(
    stages, chat, sql_ledger, version_store, home
):
    version = chat()
    with closing(sqlite3.connect(home / "mlflow.db")) as mlflow:
        mlflow.execute(
            "CREATE TRIGGER full BEFORE INSERT ON registered_model_aliases BEGIN SELECT RAISE(ABORT, 'full'); END"
        )

        with pytest.raises(Unavailable) as told:
            stages.promote(version, stage="production")
        mlflow.execute("DROP TRIGGER full")

    assert "production of chat is chat:v1 in the ledger since now" in told.value.message
    assert "chat:v1" in told.value.abroad
    assert "adapterctl promote chat:v1 --to production" in told.value.hint
    assert sql_ledger.stage_holder(version.adapter_id, "production") == version.id
    assert stages.promote(version, stage="production").seq == 1
    assert version_store.alias("chat", "production") == 1


def test_promoting_the_holder_again_sets_mlflow_right(stages, chat, sql_ledger, version_store):
    first, _ = chat(), chat()
    stages.promote(first, stage="production")
    version_store.project_stage("chat", "production", number=2, legacy={2: "Production"})

    stages.promote(first, stage="production")

    check_stage(sql_ledger, version_store, "chat", "production")
    assert legacy_of(version_store, first) == "Production"


def test_adopting_records_where_the_alias_points(stages, chat, sql_ledger, version_store):
    first, second = chat(), chat()
    stages.promote(first, stage="production")
    version_store.project_stage("chat", "production", number=2, legacy={})

    event = stages.adopt("chat", stage="production", reason="moved in the UI")

    assert (event.action, event.ref, event.previous) == ("adopt", "chat:v2", "chat:v1")
    assert [legacy_of(version_store, v) for v in (first, second)] == ["Archived", "Production"]
    check_stage(sql_ledger, version_store, "chat", "production")


def test_adopting_a_deleted_alias_empties_the_stage(stages, chat, sql_ledger, version_store):
    version = chat()
    stages.promote(version, stage="production")
    version_store.project_stage("chat", "production", number=None, legacy={})

    event = stages.adopt("chat", stage="production")

    assert (event.ref, event.previous) == (None, "chat:v1")
    assert sql_ledger.stage_holder(version.adapter_id, "production") is None


def test_there_is_nothing_to_adopt_where_both_sides_agree(stages, chat):
    stages.promote(chat(), stage="production")

    with pytest.raises(Refused, match="on both sides"):
        stages.adopt("chat", stage="production")


@pytest.mark.parametrize("whole_model", [True, False])
def test_a_version_that_mlflow_lost_moves_no_stage_and_demote_is_the_way_out(
    whole_model, stages, chat, sql_ledger, version_store
):
    version = chat()
    stages.promote(version, stage="production")
    if whole_model:
        version_store._client.delete_registered_model("chat")
    else:
        version_store._client.delete_model_version("chat", "1")

    with pytest.raises(NotFound, match="MLflow has lost chat:v1"):
        stages.promote(version, stage="staging")
    with pytest.raises(StageMoved, match="MLflow has lost that version") as adopting:
        stages.adopt("chat", stage="production")
    assert "adapterctl demote chat --stage production" in adopting.value.hint
    assert sql_ledger.stages() == {version.adapter_id: {"production": version.id}}

    assert stages.demote("chat", stage="production").action == "demote"
    assert sql_ledger.stage_holder(version.adapter_id, "production") is None


def test_an_alias_that_only_mlflow_knows_is_removed_by_demote(stages, chat, version_store):
    chat()
    version_store.project_stage("chat", "production", number=1, legacy={})

    event = stages.demote("chat", stage="production", reason="nobody promoted it")

    assert (event.action, event.ref, event.previous) == ("demote", None, None)
    assert version_store.alias("chat", "production") is None


# back


def test_rollback_returns_to_the_version_before_and_twice_ends_where_it_began(stages, chat, version_store):
    first, second = chat(), chat()
    stages.promote(first, stage="production")
    stages.promote(second, stage="production")

    back = stages.rollback("chat", stage="production", reason="worse in chat")
    forth = stages.rollback("chat", stage="production")

    assert (back.action, back.ref, back.previous) == ("rollback", "chat:v1", "chat:v2")
    assert (forth.ref, forth.previous) == ("chat:v2", "chat:v1")
    assert version_store.alias("chat", "production") == 2


def test_rollback_of_an_emptied_stage_returns_to_what_it_held(stages, chat):
    stages.promote(chat(), stage="production")
    stages.demote("chat", stage="production")

    assert stages.rollback("chat", stage="production").ref == "chat:v1"


def test_rollback_without_a_version_before_is_refused(stages, chat):
    stages.promote(chat(), stage="production")

    with pytest.raises(Refused, match="nothing held production of chat before chat:v1"):
        stages.rollback("chat", stage="production")


def test_rollback_passes_over_a_removed_version_and_says_so(stages, chat, sql_ledger):
    first, second, third = chat(), chat(), chat()
    for version in (first, second, third):
        stages.promote(version, stage="production")
    sql_ledger.remove_version(second.id, actor="ada", reason="leaked data")

    event = stages.rollback("chat", stage="production")

    assert (event.action, event.ref, event.previous) == ("rollback", "chat:v1", "chat:v3")
    assert event.warnings == ("chat:v2 held production later, but was removed",)


def test_rollback_is_refused_where_all_that_held_the_stage_before_was_removed(stages, chat, sql_ledger):
    first, second = chat(), chat()
    stages.promote(first, stage="production")
    stages.promote(second, stage="production")
    sql_ledger.remove_version(first.id, actor="ada", reason="leaked data")

    with pytest.raises(Refused, match="before chat:v2, only chat:v1, which was removed"):
        stages.rollback("chat", stage="production")


def test_demote_empties_a_stage_once(stages, chat, version_store):
    version = chat()
    stages.promote(version, stage="staging")

    event = stages.demote("chat", stage="staging")

    assert (event.ref, event.previous) == (None, "chat:v1")
    assert version_store.alias("chat", "staging") is None
    assert legacy_of(version_store, version) == "Archived"
    with pytest.raises(NotFound):
        stages.demote("chat", stage="staging")


# history


def test_history_shows_every_change_and_the_head_of_the_chain(stages, chat, sql_ledger):
    stages.promote(chat(), stage="staging")
    stages.promote(chat(), stage="production")

    found = history(sql_ledger, "chat", verify=True)
    of_production = history(sql_ledger, "chat", stage="production")

    assert [(e.seq, e.stage, e.ref) for e in found.events] == [(1, "staging", "chat:v1"), (2, "production", "chat:v2")]
    assert (found.head, found.findings) == (found.events[-1].hash, ())
    assert [e.seq for e in of_production.events] == [2]
    assert of_production.findings is None


def test_history_of_an_adapter_without_stages_is_empty(chat, sql_ledger):
    chat()

    found = history(sql_ledger, "chat", verify=True)

    assert (found.events, found.head, found.findings) == ((), GENESIS, ())


def rewrite(connection: Any) -> None:
    """Make a history of the same length, whole in itself, in which another one acted."""
    previous = GENESIS
    for row in connection.execute(select(stage_history).order_by(stage_history.c.seq)).mappings().all():
        forged = replace(StageEvent(**row), actor="eve", prev_hash=previous).sealed()
        values = {"actor": "eve", "prev_hash": previous, "hash": forged.hash}
        connection.execute(update(stage_history).where(stage_history.c.seq == forged.seq).values(values))
        previous = forged.hash


@pytest.mark.parametrize(
    ("attack", "alone", "finding"),
    [
        (["update stage_history set reason = 'x' where seq = 2"], True, "row 2 was edited: its hash does not match"),
        (["delete from stage_history where seq = 2"], True, "row 2 was removed"),
        (
            [
                "update stage_history set seq = -seq",
                "update stage_history set seq = case seq when -1 then 2 when -2 then 1 else -seq end",
            ],
            True,
            "rows 1 and 2 were swapped",
        ),
        (["delete from stage_history where seq = 3"], False, "the history ends at row 2, row 3 was kept: it was cut"),
        (rewrite, False, "row 3 is not the one that was kept: the history was written anew"),
    ],
    ids=["edit", "delete", "swap", "truncate", "rewrite"],
)
def test_each_attack_on_the_history_is_named(stages, chat, sql_ledger, attack, alone, finding):
    version = chat()
    stages.promote(version, stage="production", reason="honest")
    stages.demote("chat", stage="production")
    stages.promote(version, stage="production")
    found = history(sql_ledger, "chat")
    last = Head(registry=found.registry_id, name="chat", seq=found.rows, hash=found.head, time="2026-01-01T00:00:00Z")
    head = json.dumps(last.to_json())
    assert history(sql_ledger, "chat", verify=True, head=head).findings == ()
    with sql_ledger._db.write() as connection:
        for name in connection.execute(text("select name from sqlite_master where type = 'trigger'")).scalars().all():
            connection.execute(text(f"drop trigger {name}"))
        if callable(attack):
            attack(connection)
        else:
            for statement in attack:
                connection.execute(text(statement))

    told = history(sql_ledger, "chat", verify=True).findings
    with_head = history(sql_ledger, "chat", verify=True, head=head).findings

    # what leaves a chain without a flaw shows only against a head that was kept elsewhere
    assert any(each.startswith(finding) for each in told) == alone
    assert alone or told == ()
    assert any(each.startswith(finding) for each in with_head)


# gates


@pytest.fixture
def licensed(sql_ledger) -> None:
    """Production asks for a license, which no version here has."""
    asked = {"gates": [{"stage": "production", "license": ["mit"], "require": ["approvals >= 1"]}]}
    set_gates(sql_ledger, asked, stages=STAGES, actor="root")


def test_a_refused_promotion_tells_every_condition_and_moves_nothing(stages, chat, sql_ledger, licensed):
    version = chat()

    with pytest.raises(GateRefused) as refused:
        stages.promote(version, stage="production")

    assert [problem.code for problem in refused.value.problems] == ["failed", "failed"]
    assert "the number of approvals is 0, the gate asks for at least 1 (distance -1)" in refused.value.message
    assert "its license is none, expected mit" in refused.value.message
    assert sql_ledger.stage_history(version.adapter_id) == []
    assert stages.promote(version, stage="staging").action == "promote"


def test_a_forced_promotion_needs_a_reason_and_is_recorded_as_forced_by_whom_and_why(
    stages, chat, sql_ledger, version_store, licensed
):
    version = chat()
    with pytest.raises(InvalidInput, match="needs a reason"):
        stages.promote(version, stage="production", force=True, reason=" ")

    event = stages.promote(version, stage="production", force=True, reason="the fair is tomorrow")

    assert (event.action, event.actor, event.reason) == ("force", "ada", "the fair is tomorrow")
    assert len(event.warnings) == 2
    assert version_store.alias("chat", "production") == 1
    kept = kept_decision(sql_ledger, event.evidence)
    assert (kept.verdict.outcome, kept.evidence.ref) == ("failed", "chat:v1")
    assert history(sql_ledger, "chat", verify=True).findings == ()


class Between:
    """The version store, where each look at an alias, between a decision and its move, is preceded by `act`."""

    def __init__(self, store: Any, act: Callable[[], Any]) -> None:
        self._store, self._act = store, act

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def alias(self, name: str, alias: str) -> int | None:
        self._act()
        return self._store.alias(name, alias)


def test_an_approval_that_is_withdrawn_while_a_stage_is_moved_counts_no_more(stages, chat, sql_ledger, version_store):
    version = chat()
    asked = {"gates": [{"stage": "production", "require": ["approvals >= 1"]}]}
    set_gates(sql_ledger, asked, stages=STAGES, actor="root")
    stages.approve(version, stage="production")
    doubts = Between(version_store, lambda: stages.approve(version, stage="production", withdraw=True))

    with pytest.raises(GateRefused, match="the number of approvals is 0"):
        replace(stages, versions=doubts).promote(version, stage="production")

    assert sql_ledger.stage_holder(version.adapter_id, "production") is None


def test_gates_and_tags_that_are_set_while_a_stage_is_moved_count(stages, chat, sql_ledger, version_store):
    version = chat()
    asked = {"gates": [{"stage": "production", "tags": ["reviewed"]}]}
    gates_come = Between(version_store, lambda: set_gates(sql_ledger, asked, stages=STAGES, actor="root"))

    with pytest.raises(GateRefused, match="it has no tag reviewed"):
        replace(stages, versions=gates_come).promote(version, stage="production")

    reviewed = sql_ledger.set_tags(version.id, {"reviewed": "yes"}, [], actor="bob", reason="")
    tag_goes = Between(version_store, lambda: sql_ledger.set_tags(version.id, {}, ["reviewed"], actor="bob", reason=""))
    with pytest.raises(GateRefused, match="it has no tag reviewed"):
        replace(stages, versions=tag_goes).promote(reviewed, stage="production")


def test_a_tag_that_goes_while_the_files_are_verified_is_gone(stages, chat, sql_ledger):
    asked = {"gates": [{"stage": "production", "tags": ["reviewed"]}]}
    set_gates(sql_ledger, asked, stages=STAGES, actor="root")
    version = sql_ledger.set_tags(chat().id, {"reviewed": "yes"}, [], actor="bob", reason="")

    def untagged(version):
        sql_ledger.set_tags(version.id, {}, ["reviewed"], actor="bob", reason="")
        return folders(version)

    with pytest.raises(GateRefused, match="it has no tag reviewed"):
        replace(stages, folders=untagged).promote(version, stage="production")


def test_a_stage_whose_ground_never_rests_is_not_moved(stages, chat, sql_ledger, version_store):
    version, turns = chat(), iter(range(100))
    restless = Between(
        version_store, lambda: sql_ledger.set_tags(version.id, {"n": str(next(turns))}, [], actor="bob", reason="")
    )

    with pytest.raises(DecisionOutdated, match="was changed meanwhile"):
        replace(stages, versions=restless).promote(version, stage="production")

    assert next(turns) == DECISIONS


def test_forcing_what_passes_is_an_ordinary_promotion(stages, chat):
    event = stages.promote(chat(), stage="production", force=True, reason="to be sure")

    assert (event.action, event.warnings) == ("promote", ())


def test_a_rollback_asks_the_gate_again_tells_it_and_goes_back_all_the_same(stages, chat, sql_ledger):
    stages.promote(chat(), stage="production")
    stages.promote(chat(), stage="production")
    asked = {"gates": [{"stage": "production", "license": ["mit"]}]}
    set_gates(sql_ledger, asked, stages=STAGES, actor="root")

    event = stages.rollback("chat", stage="production")

    assert (event.action, event.ref) == ("rollback", "chat:v1")
    assert event.warnings == ("the gate of production: its license is none, expected mit",)
    assert not kept_decision(sql_ledger, event.evidence).verdict.passed


def test_what_was_moved_in_mlflow_is_adopted_through_the_gate_only(stages, chat, version_store, licensed):
    chat()
    version_store.project_stage("chat", "production", number=1, legacy={})

    with pytest.raises(GateRefused):
        stages.adopt("chat", stage="production")
    event = stages.adopt("chat", stage="production", force=True, reason="it serves already")

    assert (event.action, event.ref) == ("force", "chat:v1")


def test_approvals_of_distinct_people_open_the_gate_until_they_are_withdrawn(stages, chat, sql_ledger):
    asked = {"gates": [{"stage": "production", "require": ["approvals >= 2"]}]}
    set_gates(sql_ledger, asked, stages=STAGES, actor="root")
    version, bob = chat(), replace(stages, actor="bob")

    first = stages.approve(version, stage="production", reason="read it")
    again = stages.approve(version, stage="production")
    with pytest.raises(GateRefused, match="approvals is 1"):
        stages.promote(version, stage="production")
    bob.approve(version, stage="production")
    bob.approve(version, stage="production", withdraw=True)
    with pytest.raises(GateRefused, match="approvals is 1"):
        stages.promote(version, stage="production")
    with pytest.raises(Refused, match="bob does not approve"):
        bob.approve(version, stage="production", withdraw=True)
    bob.approve(version, stage="production")

    event = stages.promote(version, stage="production")
    again_promoted = stages.promote(version, stage="production")

    assert again == first
    assert (event.seq, event.previous, again_promoted.seq) == (5, None, 5)
    with pytest.raises(InvalidInput, match="no stage"):
        stages.approve(version, stage="prod")


def test_edited_evidence_is_found(stages, chat, sql_ledger):
    event = stages.promote(chat(), stage="production")
    stages.promote(chat(), stage="production")
    with sql_ledger._db.write() as connection:
        for name in connection.execute(text("select name from sqlite_master where type = 'trigger'")).scalars().all():
            connection.execute(text(f"drop trigger {name}"))
        connection.execute(text("update decision set body = '{}' where digest = :it"), {"it": event.evidence})
        connection.execute(text("delete from decision where digest <> :it"), {"it": event.evidence})

    findings = history(sql_ledger, "chat", verify=True).findings

    assert findings == ("the evidence of row 1 was edited", "the evidence of row 2 is gone")


# several processes

PROMOTE = """
import sys, time
from pathlib import Path
from adapterctl.registry.domain.errors import StageMoved
from adapterctl.registry.domain.refs import Ref
from adapterctl.registry.services.gates import kept_decision, set_gates
from adapterctl.registry.services.promote import Stages
from adapterctl.registry.services.resolve import resolve
from adapterctl.registry.domain.version import local_folder
from adapterctl.registry.stores.sql.tables import stage_history
from adapterctl.registry.stores.mlflow_versions import MlflowVersions
from adapterctl.registry.stores.sql.engine import Database, sqlite_url
from adapterctl.registry.stores.sql.ledger import SqlLedger
from contextlib import nullcontext

home, number, go = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
ledger = SqlLedger(Database(sqlite_url(home)))
versions = MlflowVersions(None, home, ledger.registry_id)
versions.check_identity()
folder = lambda version: nullcontext(local_folder(version.placement.location))
stages = Stages(ledger, versions, folder, ("production",), f"process {number}")
version = resolve(ledger, Ref("chat", number=number))
print("ready", flush=True)
while not go.exists():
    time.sleep(0.005)
for _ in range(3):
    try:
        print(stages.promote(version, stage="production").seq)
    except StageMoved:
        print("moved")
"""


@pytest.fixture
def killed(home, tmp_path) -> Callable[[str], None]:
    """Promote chat:v2 in another process and kill it -9 at a named point."""
    (tmp_path / "go").touch()

    def kill(point: str) -> None:
        done = subprocess.run(
            [sys.executable, "-c", PROMOTE, str(home), "2", str(tmp_path / "go")],
            env={**os.environ, "ADAPTERCTL_CRASH_AT": point},
            stdout=subprocess.DEVNULL,
            check=False,
        )
        assert done.returncode == -signal.SIGKILL

    return kill


@pytest.mark.parametrize(
    ("point", "moved", "seen"),
    [
        ("stage.writing", False, False),
        ("stage.recorded", True, True),
        ("stage.legacy", True, True),
        ("stage.projected", True, False),
    ],
)
def test_a_promotion_that_was_killed_never_was_or_is_seen_and_completed(
    stages, chat, sql_ledger, version_store, killed, point, moved, seen
):
    first, second, third = chat(), chat(), chat()
    stages.promote(first, stage="production")

    killed(point)

    assert len(sql_ledger.stage_history(first.adapter_id)) == 1 + moved
    assert sql_ledger.stage_holder(first.adapter_id, "production") == (second if moved else first).id
    with sql_ledger._db.read() as connection:
        assert connection.execute(text("select count(*) from decision")).scalar_one() == 1 + moved
    if seen:  # half of it is told by every verb that goes by the stage, and none of them goes on
        for ask in (
            lambda: check_stage(sql_ledger, version_store, "chat", "production"),
            lambda: stages.promote(third, stage="production"),
            lambda: stages.rollback("chat", stage="production"),
        ):
            with pytest.raises(StageMoved, match="is chat:v2 in the ledger, but MLflow's alias is v1"):
                ask()
    else:
        check_stage(sql_ledger, version_store, "chat", "production")
    assert stages.promote(second, stage="production").seq == 2
    assert version_store.alias("chat", "production") == 2
    assert [legacy_of(version_store, each) for each in (first, second, third)] == ["Archived", "Production", "None"]
    assert [event.action for event in sql_ledger.stage_history(first.adapter_id)] == ["promote"] * 2
    assert history(sql_ledger, "chat", verify=True).findings == ()


def test_four_processes_promote_at_once_and_history_ledger_and_alias_agree(
    chat, sql_ledger, version_store, home, tmp_path
):
    versions = [chat() for _ in range(4)]
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", PROMOTE, str(home), str(version.number), str(tmp_path / "go")],
            stdout=subprocess.PIPE,
            text=True,
        )
        for version in versions
    ]
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "ready\n"

    (tmp_path / "go").touch()
    answers = [line for racer in racers for line in racer.communicate()[0].split()]

    events = sql_ledger.stage_history(versions[0].adapter_id)
    assert [racer.returncode for racer in racers] == [0] * 4
    assert len(answers) == 12
    assert {int(line) for line in answers if line != "moved"} == set(range(1, len(events) + 1))
    assert history(sql_ledger, "chat", verify=True).findings == ()
    holder = sql_ledger.stage_holder(versions[0].adapter_id, "production")
    assert holder == events[-1].version_id
    assert version_store.alias("chat", "production") == sql_ledger.version(holder).number
    assert [legacy_of(version_store, v) for v in versions].count("Production") == 1

"""Recalls over the real ledger and the real MLflow: who is told, who is refused, and what MLflow's pages say."""

from __future__ import annotations

import pytest
from tiny import write_tiny_adapter

from adapterctl.registry.api import StageHit
from adapterctl.registry.domain.errors import GateRefused, IncompatibleParents, InvalidInput, Recalled, Refused
from adapterctl.registry.domain.recipe import MergeRequest
from adapterctl.registry.domain.refs import parse_parent, parse_ref
from adapterctl.registry.services.gates import decide_on, require
from adapterctl.registry.services.local import LocalRegistry
from adapterctl.registry.services.recall import RecallHandler
from adapterctl.registry.services.resolve import resolve
from adapterctl.registry.stores.mlflow_pages import MLFLOW_LIMIT, with_recall


@pytest.fixture(scope="module")
def registry(two_parents: LocalRegistry) -> LocalRegistry:
    merge(two_parents, "omni")
    return two_parents


def merge(registry: LocalRegistry, into: str, **asked: object):
    request = MergeRequest((parse_parent("translate:v1"), parse_parent("chat:v1")), into=into, **asked)
    submitted = registry.merge(request)
    if submitted.job is not None:
        list(registry.follow(submitted.job.id, timeout_s=120))
    return submitted


def settled(registry: LocalRegistry) -> None:
    """Every mark is in MLflow."""
    for job in registry.jobs(kind="recall", state="live"):
        list(registry.follow(job.id, timeout_s=120))


def page(registry: LocalRegistry, name: str):
    return registry.version_store._client.get_model_version(name, "1")


def test_a_recall_is_refused_without_a_reason_and_undone_only_where_it_is(registry):
    for reason in ("", "  ", "x" * 5001):
        with pytest.raises(InvalidInput, match="needs a reason"):
            registry.recall(parse_ref("translate:v1"), reason=reason)
    with pytest.raises(Refused, match="is not recalled"):
        registry.undo_recall(parse_ref("translate:v1"), reason="why not")


def test_from_recall_to_undo(registry, tmp_path):
    registry.promote(parse_ref("omni:v1"), to="production")
    registry.promote(parse_ref("chat:v1"), to="staging")
    before = page(registry, "omni").description

    impact = registry.recall(parse_ref("translate:v1"), reason="leaked | <b>data</b>")

    assert (impact.ref, impact.action, impact.descendants) == ("translate:v1", "recall", ("omni:v1",))
    assert impact.stages == (StageHit("omni", "production", "omni:v1"),)
    (told,) = [check for check in registry.doctor() if check.name == "recalled"]
    assert (told.status, told.hint) == ("error", "adapterctl rollback omni --stage production, or demote")
    assert told.detail.startswith("omni@production is omni:v1, which is recalled (translate:v1: leaked")
    hit = registry.version(parse_ref("omni:v1")).recall
    assert (hit.ref, hit.reason, hit.by) == ("translate:v1", "leaked | <b>data</b>", impact.by)
    assert registry.version(parse_ref("chat:v1")).recall is None
    refusals = {
        "translate:v1 was recalled": lambda: registry.promote(parse_ref("translate:v1"), to="staging"),
        "omni:v1 is made of translate:v1": lambda: registry.promote(parse_ref("omni:v1"), to="production"),
        "translate:v1 was recalled: leaked": lambda: registry.merge(
            MergeRequest((parse_parent("translate:v1"), parse_parent("chat:v1")), into="other")
        ),
    }
    for words, ask in refusals.items():
        with pytest.raises((Recalled, IncompatibleParents), match=words):
            ask()
    settled(registry)
    assert page(registry, "omni").tags["adapterctl.recalled"] == "translate:v1: leaked | <b>data</b>"
    assert page(registry, "translate").description.startswith(
        "\u26d4 **Recalled.** Do not use it. translate:v1: leaked"
    )
    assert "<b>" not in page(registry, "translate").description
    assert "adapterctl.recalled" not in page(registry, "chat").tags

    with pytest.raises(Refused, match=r"omni:v1 itself is not recalled, it is made of translate:v1"):
        registry.undo_recall(parse_ref("omni:v1"), reason="it is fine")
    freed = registry.undo_recall(parse_ref("translate:v1"), reason="another set was meant")

    assert (freed.action, freed.descendants, freed.stages) == ("undo", ("omni:v1",), impact.stages)
    settled(registry)
    assert page(registry, "omni").description == before
    assert "adapterctl.recalled" not in page(registry, "omni").tags


def test_a_rollback_and_an_adoption_do_not_bring_a_recalled_version_back(registry, tmp_path):
    folder = write_tiny_adapter(tmp_path / "second", seed=77)
    registry.register(str(folder), name="chat")
    registry.promote(parse_ref("chat:v1"), to="production")
    registry.promote(parse_ref("chat:v2"), to="production")
    registry.recall(parse_ref("chat:v1"), reason="worse than it looked")
    try:
        with pytest.raises(Recalled, match="chat:v1 was recalled"):
            registry.rollback("chat", stage="production")
        registry.version_store._set_alias("chat", "production", 1)
        for force in (False, True):
            with pytest.raises(Recalled, match="chat:v1 was recalled"):
                registry.adopt("chat", stage="production", reason="it serves already", force=force)
        with pytest.raises(Recalled, match="chat:v1 was recalled"):  # the same bytes again
            registry.register(str(write_tiny_adapter(tmp_path / "same", seed=1)), name="chat")
        with pytest.raises(Recalled, match="chat:v1 was recalled"):  # and under another name
            registry.register(str(tmp_path / "same"), name="copy")
        registry.pull(parse_ref("omni:v1"), tmp_path / "made-of-it")
        with pytest.raises(Recalled, match="omni:v1 is made of chat:v1"):
            registry.register(str(tmp_path / "made-of-it"), name="omni", kind="train")
    finally:
        registry.undo_recall(parse_ref("chat:v1"), reason="the test is over")


def test_a_merge_of_a_recalled_parent_goes_to_no_stage_by_force_either(registry):
    registry.recall(parse_ref("chat:v1"), reason="worse than it looked")
    try:
        for force in (False, True):
            with pytest.raises(Recalled, match="omni:v1 is made of chat:v1"):
                registry.promote(parse_ref("omni:v1"), to="staging", reason="urgent", force=force)

        checked = registry.gate_check(parse_ref("omni:v1"), to="staging")

        assert [(judged.condition, judged.reason) for judged in checked.conditions] == [
            ("not recalled", "it is made of chat:v1, which was recalled")
        ]
        # past the check of the verb, as when the recall comes in between: the ledger itself refuses
        decision = decide_on(registry.ledger, resolve(registry.ledger, parse_ref("omni:v1")), "staging")
        with pytest.raises(GateRefused, match="made of chat:v1"):
            require(decision, force=True, reason="urgent")
        with pytest.raises(Recalled):
            registry.ledger.move_stage(
                registry.ledger.adapter_id("omni"),
                "staging",
                version_id=decision.evidence.version_id,
                expected=None,
                action="force",
                actor="eve",
                reason="urgent",
            )
        assert registry.history("omni", stage="staging").events == ()
    finally:
        registry.undo_recall(parse_ref("chat:v1"), reason="the test is over")


def test_the_same_recipe_of_a_recalled_version_is_refused(registry):
    registry.recall(parse_ref("omni:v1"), reason="babbles")
    try:
        with pytest.raises(Recalled, match="omni:v1 was recalled: babbles"):
            merge(registry, "omni")
    finally:
        registry.undo_recall(parse_ref("omni:v1"), reason="the test is over")


def test_what_is_trained_from_a_recalled_version_is_recalled_from_its_start(registry, tmp_path):
    registry.recall(parse_ref("translate:v1"), reason="leaked")
    try:
        folder = write_tiny_adapter(tmp_path / "more", seed=78)
        registered = registry.register(str(folder), name="more", kind="train", trained_from=parse_ref("translate:v1"))

        assert registered.version.recall.ref == "translate:v1"
        assert any("is recalled" in warning for warning in registered.warnings)
        assert page(registry, "more").tags["adapterctl.recalled"] == "translate:v1: leaked"
    finally:
        registry.undo_recall(parse_ref("translate:v1"), reason="the test is over")
        settled(registry)


def test_a_marking_that_runs_late_says_what_is_true_then(registry):
    registry.recall(parse_ref("omni:v1"), reason="a")
    settled(registry)
    job = registry.jobs(kind="recall", state="ended", limit=1)[0]
    registry.undo_recall(parse_ref("omni:v1"), reason="b")
    settled(registry)

    with RecallHandler(registry.ledger, open_versions=lambda: registry.version_store).begin(job):
        pass

    assert "adapterctl.recalled" not in page(registry, "omni").tags


@pytest.mark.parametrize("length", [10, 4800, 4990])
def test_a_description_stays_below_mlflows_limit_and_comes_back_as_it_was(length):
    description = "sum merge of a and b."[:length] + "x" * (length - 21)

    marked = with_recall(description, ("translate:v3", "*[click](javascript:alert(1))*" * 50))

    assert len(marked) <= MLFLOW_LIMIT
    assert "](" not in marked.partition("\n\n")[0]
    assert with_recall(marked, None) == description
    assert with_recall(with_recall(marked, ("a:v1", "b")), None) == description

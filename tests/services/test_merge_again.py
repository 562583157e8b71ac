"""A request that meets what exists already: the same recipe, the same bytes, a job at work, a parent that went away."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from adapterctl.registry.domain.errors import Conflict, InvalidInput, LossTooHigh, NotFound, Refused, StageMoved
from adapterctl.registry.domain.job import JobState
from adapterctl.registry.domain.recipe import MergeRequest
from adapterctl.registry.domain.refs import ParentRef, Ref
from adapterctl.registry.domain.version import Edge
from adapterctl.registry.ports import Beside
from adapterctl.registry.services import evaluate
from adapterctl.registry.services.local import LocalRegistry
from adapterctl.registry.services.merge import _terms, request_merges
from adapterctl.registry.services.schedule import raise_for

LOSSY = MergeRequest((ParentRef(Ref("translate")), ParentRef(Ref("chat"))), into="lossy", method="svd", rank=1)


def merged(registry: LocalRegistry, request: MergeRequest) -> str:
    """The label of the version that the request gives, after its job has ended."""
    asked = registry.merge(request)
    if asked.job is not None:
        *_, ended = registry.follow(asked.job.id, timeout_s=120)
        raise_for(ended)
        assert ended.state is JobState.SUCCEEDED
        return registry.ledger.versions_by_id([ended.result["version_id"]])[ended.result["version_id"]].label
    assert asked.version is not None
    return asked.version.ref


def test_a_version_that_exists_is_held_to_the_loss_of_the_new_request(two_parents: LocalRegistry):
    assert merged(two_parents, LOSSY) == "lossy:v1"

    with pytest.raises(LossTooHigh, match="lossy:v1 has this recipe and lost"):
        two_parents.merge(replace(LOSSY, max_loss=0.01))

    assert merged(two_parents, replace(LOSSY, max_loss=1.0)) == "lossy:v1"


def test_a_job_is_joined_by_a_request_with_the_same_terms_only(two_parents: LocalRegistry):
    strict = replace(LOSSY, into="terms", max_loss=0.01)
    lax = replace(LOSSY, into="terms")

    refused, made = two_parents.merge(strict), two_parents.merge(lax)

    assert refused.job is not None
    assert made.job is not None
    assert refused.job.id != made.job.id
    *_, ended = two_parents.follow(refused.job.id, timeout_s=120)
    with pytest.raises(LossTooHigh):
        raise_for(ended)
    assert merged(two_parents, lax) == "terms:v1"


def test_a_merge_that_is_being_cancelled_is_not_joined(two_parents: LocalRegistry):
    asked = [("ada", replace(LOSSY, into="leaving"))]
    (first,) = request_merges(two_parents.ledger, asked)  # nobody is rung for
    two_parents.ledger.claim("nobody", 60)
    two_parents.ledger.request_cancel(first.job.id)

    (second,) = request_merges(two_parents.ledger, asked)

    two_parents.ledger.finish(first.job.id, 1, JobState.CANCELLED)
    assert isinstance(second, Conflict)
    assert first.job.id in second.message


def test_terms_are_part_of_the_key_only_where_there_are_some():
    assert _terms(None, [], None, None) == []
    assert _terms(0.1, [], None, None) != _terms(0.2, [], None, None)
    assert _terms(None, [], ("recipe", "content"), None) != _terms(None, [], ("recipe", "other"), None)
    assert _terms(None, [], None, "fp32") != _terms(None, [], None, "bf16")


def test_a_suite_that_is_missing_is_noticed_though_the_recipe_exists(two_parents: LocalRegistry):
    merged(two_parents, LOSSY)

    with pytest.raises(NotFound):
        two_parents.merge(replace(LOSSY, suites=("no-such-suite.yaml",)))


def test_tags_that_a_live_job_will_give_are_not_told_as_lost(two_parents: LocalRegistry):
    tagged = replace(LOSSY, into="tagged", tags={"owner": "ada", "note": "two words"})
    (first,) = request_merges(two_parents.ledger, [("ada", tagged)])  # nobody is rung for

    (same,) = request_merges(two_parents.ledger, [("ada", tagged)])
    (other,) = request_merges(two_parents.ledger, [("bob", replace(tagged, tags={"owner": "ada", "note": "it's"}))])

    two_parents.ledger.request_cancel(first.job.id)
    lost = [[each for each in answer.warnings if "tags" in each] for answer in (first, same, other)]
    command = "adapterctl tag REF 'note=it'\"'\"'s'"
    told = f"tagged was merged, or asked for, before: tags are not added, `{command}` does"
    assert lost == [[], [], [told]]


def test_lost_tags_are_told_once_though_suites_are_asked_for(two_parents: LocalRegistry, tmp_path: Path):
    merged(two_parents, LOSSY)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "target": " b"}\n')
    suite = tmp_path / "suite.yaml"
    suite.write_text("name: s\ntasks: [{name: t, data: rows.jsonl, metrics: [nll]}]\n")
    asked = [("ada", replace(LOSSY, tags={"owner": "ada"}, suites=(str(suite),)))]

    answers = [*request_merges(two_parents.ledger, asked), *request_merges(two_parents.ledger, asked)]

    two_parents.ledger.request_cancel(answers[0].job.id)
    assert [answer.deduplicated for answer in answers] == [False, True]
    assert [len([each for each in answer.warnings if "tags" in each]) for answer in answers] == [1, 1]


def test_a_merge_of_one_adapter_with_itself_needs_a_name(two_parents: LocalRegistry):
    parents = (ParentRef(Ref("translate")), ParentRef(Ref("translate"), -1.0))

    with pytest.raises(InvalidInput, match="needs a name"):
        two_parents.merge(MergeRequest(parents))


def test_a_name_that_never_got_a_version_is_unknown(two_parents: LocalRegistry):
    ghost = replace(LOSSY, into="ghost", max_loss=0.0001)

    with pytest.raises(LossTooHigh):
        merged(two_parents, ghost)

    with pytest.raises(NotFound, match="there is no adapter 'ghost'"):
        two_parents.versions("ghost")


def test_no_child_comes_to_life_under_a_parent_that_was_removed(two_parents: LocalRegistry):
    child = merged(two_parents, replace(LOSSY, into="orphan"))
    version = two_parents.ledger.version_by_number("orphan", int(child.rpartition("v")[2]))
    assert version is not None
    two_parents.remove(Ref("orphan"), reason="to be a removed parent")
    detail = two_parents.ledger.detail(version.id)
    other = two_parents.ledger.versions("translate")[0]

    with pytest.raises(Refused, match="orphan:v1 was removed"):
        two_parents.ledger.add_version(
            "0199-child",
            other.adapter_id,
            _new_version(other, detail.facts),
            replace(other.placement, number=99),
            [Edge("0199-child", 0, version.id, "trained_from")],
            created_by="test",
        )

    assert two_parents.ledger.version("0199-child") is None


def test_promoting_the_holder_again_notices_that_it_was_overtaken(two_parents: LocalRegistry):
    first, second = (merged(two_parents, replace(LOSSY, into="line", rank=rank)) for rank in (1, 2))
    two_parents.promote(_ref(first), to="production")
    stages = two_parents._stages

    holder = two_parents.ledger.version_by_number("line", 1)
    assert holder is not None
    stages.promote(two_parents.ledger.versions("line")[1], stage="production")

    with pytest.raises(StageMoved, match="moved from line:v1 meanwhile"):
        stages._project_again(holder, "production")
    assert two_parents.version(_ref(second)).stages == ("production",)


def test_two_versions_with_the_same_bytes_are_both_shown_what_was_measured(two_parents: LocalRegistry):
    twins = [merged(two_parents, replace(LOSSY, into=name)) for name in ("twin-a", "twin-b")]
    versions = [two_parents.ledger.versions(label.partition(":")[0])[0] for label in twins]
    handler = evaluate.EvalHandler(
        two_parents.ledger,
        two_parents.settings,
        open_versions=lambda: two_parents.version_store,
        folders=two_parents.folders,
        beside=lambda version, suite: Beside(),
    )
    job = evaluate_job(two_parents, [version.id for version in versions])

    subjects = handler._wanted(job).subjects

    assert [version.label for version in subjects[versions[0].spec.content_digest]] == twins


def evaluate_job(registry: LocalRegistry, ids: Sequence[str]):
    """A job row as `eval` would queue it, without a worker."""
    asked = registry.jobs(kind="merge", limit=1)[0]
    return replace(asked, kind="eval", spec={"refs": list(ids), "suites": [], "limit": None})


def _new_version(like, facts):
    from adapterctl.registry.domain.version import NewVersion

    return NewVersion(adapter=like.name, kind="import", content_digest="0" * 64, base=like.spec.base, facts=facts)


def _ref(label: str) -> Ref:
    name, _, number = label.partition(":v")
    return Ref(name, number=int(number))

"""Every verb of `RegistryAPI`, written once: here, through a client over a socket, and as a service it is the same."""

from __future__ import annotations

import ast
import base64
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest
from keys import public, seal, write_key
from tiny import LINEAR, safetensors_bytes, write_tiny_adapter

from adapterctl.cli.signing import sign_version, signature_of
from adapterctl.registry.api import RegistryAPI, VersionView
from adapterctl.registry.domain.access import Scope
from adapterctl.registry.domain.errors import (
    AdapterctlError,
    Conflict,
    GateRefused,
    HasDescendants,
    IncompatibleParents,
    InvalidAdapter,
    InvalidInput,
    NotFound,
    Recalled,
    Refused,
    StageMoved,
    Unavailable,
    WaitTimedOut,
)
from adapterctl.registry.domain.job import JobState
from adapterctl.registry.domain.recipe import LayerWeights, MergeRequest, ResizeRequest
from adapterctl.registry.domain.refs import parse_parent, parse_ref
from adapterctl.registry.domain.stage import Head
from adapterctl.registry.domain.tuning import TuneRequest
from adapterctl.registry.rest import events as events_over_rest
from adapterctl.registry.services.bake import bake
from adapterctl.registry.services.carry import LISTING, export, read_family, take_in
from adapterctl.registry.services.layouts import lay_out
from adapterctl.registry.services.pull import damage
from adapterctl.registry.services.signatures import statement_of_view
from adapterctl.registry.services.verify import verify_all
from adapterctl.registry.settings import load_settings
from adapterctl.registry.wire import to_json

_seeds = itertools.count(1)
_names = (f"a{number}" for number in itertools.count(1))

Add = Callable[..., VersionView]


@pytest.fixture
def add(registry: RegistryAPI, tmp_path: Path) -> Add:
    """Register a tiny adapter that no test has used, under a name that no test has used."""

    def register(name: str = "", **about: object) -> VersionView:
        seed = next(_seeds)
        folder = write_tiny_adapter(tmp_path / f"source-{seed}", seed=seed)
        return registry.register(str(folder), name=name or next(_names), **about).version

    return register


@pytest.fixture
def merged(registry: RegistryAPI, add: Add) -> VersionView:
    """A cat of two new adapters, finished."""
    return merge(registry, add(), add())


def merge(registry: RegistryAPI, *parents: VersionView, **asked: object) -> VersionView:
    values = {"into": next(_names), "method": "cat", **asked}
    submitted = registry.merge(MergeRequest(tuple(parse_parent(f"{each.ref}=0.5") for each in parents), **values))
    *_, job = registry.follow(submitted.job.id, timeout_s=120)
    assert job.state is JobState.SUCCEEDED, job.error
    return registry.version(parse_ref(f"{values['into']}:v1"))


def ref(version: VersionView):
    return parse_ref(version.ref)


# register and read


def test_an_adapter_that_was_registered_comes_back_as_it_was(registry: RegistryAPI, tmp_path: Path):
    folder = write_tiny_adapter(tmp_path / "source", seed=next(_seeds))
    (folder / "README.md").write_text("# mine\n")
    name = next(_names)
    about = {"metrics": {"bleu": 0.25}, "params": {"lr": "1e-3"}, "tags": {"team": "mt"}, "license": "mit"}

    first = registry.register(str(folder), name=name, dataset="wmt", **about)
    again = registry.register(str(folder), name=name)
    pulled = registry.pull(parse_ref(name), tmp_path / "pulled")

    assert (first.created, again.created) == (True, False)
    assert again.version.id == first.version.id
    shown = registry.version(parse_ref(f"{name}:v1"))
    assert (shown.metrics, shown.params, shown.tags, shown.license) == tuple(about.values())
    assert (shown.dataset, shown.source, shown.created_by) == ("wmt", str(folder), shown.created_by)
    assert damage(tmp_path / "pulled", pulled.files) == []
    assert (tmp_path / "pulled" / "adapter_model.safetensors").read_bytes() == (
        folder / "adapter_model.safetensors"
    ).read_bytes()


def test_a_family_that_was_exported_is_found_and_made_again_under_other_names(
    registry: RegistryAPI, merged: VersionView, tmp_path: Path
):
    written = export(registry, [ref(merged)], tmp_path / "family")
    assert {each.action for each in take_in(registry, read_family(tmp_path / "family"))} == {"found"}
    (tmp_path / "family" / LISTING).unlink()
    for version in written:
        (tmp_path / "family" / version.name).rename(tmp_path / "family" / f"new-{version.name}")

    done = {each.ref: each for each in take_in(registry, read_family(tmp_path / "family"))}

    made = registry.version(parse_ref(f"new-{merged.name}:v1"))
    assert (done[made.ref].action, made.recipe_digest) == ("merge", merged.recipe_digest)
    assert [(p.ref, p.weight) for p in made.parents] == [(f"new-{p.ref}", p.weight) for p in merged.parents]


def test_a_version_is_baked_on_this_machine_wherever_the_registry_is(registry: RegistryAPI, add: Add, tmp_path: Path):
    weights = {f"{name}.weight": ("F32", np.ones(shape, np.float32)) for name, shape in LINEAR.items()}
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    (tmp_path / "base" / "model.safetensors").write_bytes(safetensors_bytes(weights))

    view = bake(registry, ref(add()), tmp_path / "out", base=tmp_path / "base", settings=load_settings())

    assert (view.base, view.changed, view.copied) == ("tiny/base", 4, 0)
    assert (tmp_path / "out" / "model.safetensors").stat().st_size >= sum(array.nbytes for _, array in weights.values())


def test_an_adapter_trained_from_another_says_so(registry: RegistryAPI, add: Add):
    first = add()

    second = add(first.name, kind="train", trained_from=ref(first))

    assert [(parent.ref, parent.kind) for parent in second.parents] == [(first.ref, "trained_from")]


def test_a_bad_adapter_is_refused_with_every_finding(registry: RegistryAPI, tmp_path: Path):
    folder = write_tiny_adapter(tmp_path / "bad", config={"r": 3, "modules_to_save": ["lm_head"]})

    with pytest.raises(InvalidAdapter) as caught:
        registry.register(str(folder), name=next(_names))

    assert len(caught.value.problems) >= 2
    assert all(problem.message in str(caught.value) for problem in caught.value.problems)


@pytest.mark.parametrize("what", ["missing", "empty", "pickle"])
def test_a_folder_that_is_no_adapter_is_refused_before_anything_is_sent(
    registry: RegistryAPI, tmp_path: Path, what: str
):
    folder = tmp_path / what
    if what != "missing":
        folder.mkdir()
    if what == "pickle":
        (folder / "adapter_model.bin").write_bytes(b"x")

    with pytest.raises((NotFound, InvalidAdapter), match=what) as caught:
        registry.register(str(folder), name=next(_names))

    assert caught.value.hint


def test_adapters_and_versions_are_listed_and_filtered(registry: RegistryAPI, add: Add):
    name = next(_names)
    versions = [add(name, metrics={"bleu": bleu}, tags={"team": team}) for bleu, team in ((0.2, "a"), (0.4, "b"))]

    (adapter,) = [each for each in registry.adapters() if each.name == name]

    assert (adapter.versions, adapter.latest) == (2, "v2")
    assert [each.ref for each in registry.versions(name)] == [each.ref for each in versions]
    assert [each.number for each in registry.versions(name, metric=["bleu>0.3"])] == [2]
    assert [each.number for each in registry.versions(name, tag={"team": "a"}, base="tiny/base")] == [1]
    assert registry.versions(name, stage="production") == []
    with pytest.raises(InvalidInput, match="not a condition"):
        registry.versions(name, metric=["bleu"])


def test_what_is_not_there_is_not_found_with_what_there_is(registry: RegistryAPI, add: Add):
    known = add()

    with pytest.raises(NotFound, match=f"no {known.name}:v7") as caught:
        registry.version(parse_ref(f"{known.name}:v7"))

    assert "v1" in caught.value.hint
    for ask in (
        lambda: registry.versions("nobody"),
        lambda: registry.version(parse_ref("nobody@production")),
        lambda: registry.lineage(parse_ref("nobody@sha256:0123456789abcdef")),
        lambda: registry.history("nobody"),
        lambda: registry.retention(parse_ref("nobody")),
        lambda: registry.job("nobody"),
        lambda: registry.job_events("nobody"),
        lambda: registry.cancel("nobody"),
        lambda: next(iter(registry.follow("nobody"))),
        lambda: registry.revoke_token("nobody"),
        lambda: registry.tuned("nobody"),
        lambda: registry.tune(TuneRequest((parse_ref("nobody"), parse_ref("nobody:v2")))),
    ):
        with pytest.raises(NotFound, match="nobody"):
            ask()


def test_two_versions_are_compared(registry: RegistryAPI, add: Add):
    one, two = add(), add()

    found = registry.diff(ref(one), ref(two))

    assert (found.first, found.second, found.same_content) == (one.ref, two.ref, False)
    assert found.distance > 0
    assert found.layers is None


def test_two_merges_of_the_same_parents_are_compared_layer_by_layer(registry: RegistryAPI, add: Add):
    parents = add(), add()
    one, two = merge(registry, *parents), merge(registry, *parents, method="svd", rank=3)

    found = registry.diff(ref(one), ref(two), layers=True)

    assert len(found.layers) == one.modules
    lost = dict(zip(two.receipt["layers"]["module"], two.receipt["layers"]["loss"], strict=True))
    for row in found.layers:
        assert row.loss == (pytest.approx(0, abs=1e-6), lost[row.module])
        assert row.predicted_loss[1] == pytest.approx(row.loss[1], rel=1e-2)
        assert row.distance == pytest.approx(lost[row.module], rel=1e-2), "cat is the exact sum"
        assert set(row.retention) == {parent.ref for parent in parents}
        assert all(kept[1] < kept[0] == 1 for kept in row.retention.values())


def test_layers_of_different_bases_are_refused(registry: RegistryAPI, add: Add):
    one, two = add(), add(base="tiny/other")

    assert registry.diff(ref(one), ref(two)).cosine is None
    with pytest.raises(IncompatibleParents, match=r"applies to tiny/base, .* to tiny/other"):
        registry.diff(ref(one), ref(two), layers=True)


def test_files_are_not_pulled_over_others(registry: RegistryAPI, add: Add, tmp_path: Path):
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "mine").write_text("x")

    with pytest.raises(Conflict, match="not an empty folder"):
        registry.pull(ref(add()), tmp_path / "target")


def test_a_version_is_laid_out_for_vllm(registry: RegistryAPI, add: Add, tmp_path: Path):
    asked = add()

    [written] = lay_out(registry, [ref(asked)], tmp_path, "vllm")

    assert written.ref == asked.ref
    assert {path.name for path in Path(written.path).iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


def test_bases_are_pinned_aliased_and_merged(registry: RegistryAPI, tmp_path: Path):
    one, two, spelling = (f"base/{next(_names)}" for _ in range(3))
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": next(_seeds)}))

    pinned = registry.add_base(one, folder=tmp_path, revision="abc")
    registry.add_base(two)
    registry.alias_base(spelling, one)
    kept = registry.merge_bases(one, two)

    assert (pinned.revision, pinned.config_digest) == ("abc", kept.config_digest)
    (spellings,) = [spellings for base, spellings in registry.bases() if base.id == kept.id]
    assert set(spellings) >= {one, two, spelling}
    with pytest.raises(NotFound, match="no base"):
        registry.alias_base("x", "nothing-like-it-at-all")


# merges


def test_methods_are_listed_and_explained(registry: RegistryAPI):
    methods = {method.name: method for method in registry.methods()}

    assert {"cat", "svd", "sum"} <= set(methods)
    assert methods["cat"].exact
    assert all(method.summary and method.when for method in methods.values())


def test_a_plan_says_what_a_merge_would_give(registry: RegistryAPI, add: Add):
    one, two = add(), add()

    plan = registry.plan(MergeRequest((parse_parent(one.ref), parse_parent(two.ref)), into=next(_names)))

    assert [parent.ref for parent in plan.parents] == [one.ref, two.ref]
    assert (plan.method, plan.rank, plan.exists) == ("cat", 8, None)
    assert plan.forecasts


def test_weights_by_layer_make_another_recipe(registry: RegistryAPI, add: Add):
    request = MergeRequest(tuple(parse_parent(each.ref) for each in (add(), add())))
    layers = (LayerWeights("layers.0", (0.1, 1e-5)), LayerWeights("q_proj", (1.0, 0.0)))

    digests = {registry.plan(replace(request, layers=chosen)).recipe_digest for chosen in ((), layers, layers[::-1])}

    assert len(digests) == 3
    with pytest.raises(InvalidInput, match=r"layers\.77 selects no module"):
        registry.plan(replace(request, layers=(LayerWeights("layers.77", (1.0, 1.0)),)))


def test_a_plan_warns_of_prompts_that_the_merge_cannot_tell_apart(registry: RegistryAPI, add: Add):
    one, two = (add(tags={"prompt_template": "Q: {text} A:"}) for _ in range(2))

    plan = registry.plan(MergeRequest((parse_parent(one.ref), parse_parent(two.ref)), into=next(_names)))

    assert [warning for warning in plan.warnings if "take prompts of the same form (Q:…A:)" in warning]


def test_parents_that_do_not_fit_are_refused_with_every_reason(registry: RegistryAPI, add: Add):
    one, two, three = add(), add(base=f"base/{next(_names)}"), add(base=f"base/{next(_names)}")
    request = MergeRequest(tuple(parse_parent(each.ref) for each in (one, two, three)))

    for ask in (registry.plan, registry.merge):
        with pytest.raises(IncompatibleParents) as caught:
            ask(request)

        assert [problem.code for problem in caught.value.problems] == ["base", "base"]


def test_a_merge_is_made_once_proved_and_linked_to_its_parents(registry: RegistryAPI, add: Add):
    one, two = add(), add()

    made = merge(registry, one, two)
    request = MergeRequest(tuple(parse_parent(f"{each.ref}=0.5") for each in (one, two)), into=made.name, method="cat")
    again = registry.merge(request)

    assert (again.deduplicated, again.job, again.version.ref) == (True, None, made.ref)
    assert made.receipt["loss"] == made.loss == 0
    assert [(parent.ref, parent.weight) for parent in made.parents] == [(one.ref, 0.5), (two.ref, 0.5)]
    graph = registry.lineage(ref(made), direction="up", depth=1)
    assert {version.ref for version in graph.versions} == {made.ref, one.ref, two.ref}
    assert {(edge.child, edge.parent, edge.weight) for edge in graph.edges} == {
        (made.ref, one.ref, 0.5),
        (made.ref, two.ref, 0.5),
    }


def test_a_version_is_made_smaller(registry: RegistryAPI, add: Add):
    whole = add()
    request = ResizeRequest(ref(whole), rank=2, into=next(_names))

    planned = registry.plan_resize(request)
    *_, job = registry.follow(registry.resize(request).job.id, timeout_s=120)
    again = registry.resize(request)

    assert job.state is JobState.SUCCEEDED, job.error
    assert (planned.method, planned.rank, planned.exists) == ("resize", 2, None)
    made = registry.version(parse_ref(request.into))
    assert (made.rank, made.receipt["passed"], [parent.ref for parent in made.parents]) == (2, True, [whole.ref])
    assert (again.deduplicated, again.version.ref) == (True, made.ref)
    assert registry.plan_resize(replace(request, rank=None, energy=1.0)).rank == whole.rank
    assert registry.plan_resize(replace(request, rank=None, size_bytes=10**9)).rank == whole.rank
    with pytest.raises(InvalidInput, match="has rank 4, 9 is more"):
        registry.resize(replace(request, rank=9))


def test_a_merge_is_verified_by_running_it_again(registry: RegistryAPI, merged: VersionView):
    again = registry.verify(ref(merged))
    bytes_only = registry.verify(ref(merged), rerun=False)

    assert (again.files, again.recipe, again.distance) == ("intact", "identical", 0)
    assert (bytes_only.files, bytes_only.recipe) == ("intact", "skipped")


def test_all_versions_are_verified_one_by_one(registry: RegistryAPI, merged: VersionView):
    found = verify_all(registry)

    assert found.checked == len(registry.versions()) > 1
    assert (found.rerun, found.bad) == (0, ())


def test_a_version_is_removed_unless_something_descends_from_it(registry: RegistryAPI, merged: VersionView):
    parent = parse_ref(merged.parents[0].ref)

    with pytest.raises(HasDescendants, match=merged.ref):
        registry.remove(parent, reason="too early")
    removed = registry.remove(ref(merged), reason="a test")

    assert removed.state == "removed"
    assert registry.remove(parent, reason="now it may").state == "removed"
    assert [each.state for each in registry.versions(merged.name, removed=True)] == ["removed"]
    with pytest.raises(NotFound, match="was removed"):
        registry.pull(ref(merged), Path("nowhere"))


def test_questions_about_descent_are_answered(registry: RegistryAPI, add: Add):
    corpus = next(_names)
    root = add(dataset=corpus)
    other, third = add(), add()
    left, right = merge(registry, root, other), merge(registry, root, third)
    top = merge(registry, left, right)
    registry.promote(ref(top), to="production")

    assert {each.ref for each in registry.versions(trained_on=corpus)} == {root.ref, left.ref, right.ref, top.ref}
    assert [each.ref for each in registry.versions(trained_on=corpus, stage="production")] == [top.ref]
    assert [each.ref for each in registry.versions(dataset=corpus)] == [root.ref]
    assert {each.ref for each in registry.versions(descends_from=ref(left))} == {top.ref}
    assert registry.versions(left.name, descends_from=ref(left)) == []
    common = registry.common_ancestors(ref(left), ref(right))
    assert (common.root, common.found) == (left.ref, (root.ref,))
    assert {(edge.child, edge.parent) for edge in common.edges} == {(left.ref, root.ref), (right.ref, root.ref)}
    assert registry.common_ancestors(ref(left), ref(top)).found == (left.ref, root.ref, other.ref)
    up, down = registry.path(ref(top), ref(root)), registry.path(ref(root), ref(top))
    assert up.found == (top.ref, left.ref, root.ref)
    assert down.found == up.found[::-1]
    assert {version.ref for version in up.versions} == {top.ref, left.ref, right.ref, root.ref}
    assert registry.path(ref(other), ref(third)).found == registry.path(ref(left), ref(right)).found == ()


def test_a_recall_hits_what_was_made_of_the_version_until_it_is_undone(registry: RegistryAPI, merged: VersionView):
    parent = merged.parents[0]

    impact = registry.recall(parse_ref(parent.ref), reason="leaked")

    assert (impact.ref, impact.descendants, impact.stages) == (parent.ref, (merged.ref,), ())
    assert registry.version(ref(merged)).recall.ref == parent.ref
    with pytest.raises(Recalled, match="leaked"):
        registry.promote(ref(merged), to="production")
    freed = registry.undo_recall(parse_ref(parent.ref), reason="a mistake")
    assert (freed.action, freed.descendants) == ("undo", (merged.ref,))
    assert registry.version(ref(merged)).recall is None


def test_a_merge_that_was_brought_as_files_is_held_to_its_parents(
    registry: RegistryAPI, merged: VersionView, tmp_path: Path
):
    registry.pull(ref(merged), tmp_path / "pulled")

    brought = registry.register(str(tmp_path / "pulled"), name=next(_names)).version

    assert [(each.ref, each.weight, each.kind) for each in brought.parents] == [
        (each.ref, 0.5, "imported") for each in merged.parents
    ]
    impact = registry.recall(parse_ref(merged.parents[1].ref), reason="leaked")
    assert set(impact.descendants) == {merged.ref, brought.ref}
    for force in (False, True):
        with pytest.raises(Recalled, match="leaked"):
            registry.promote(ref(brought), to="production", reason="urgent", force=force)
    with pytest.raises(Recalled, match="leaked"):
        registry.register(str(tmp_path / "pulled"), name=next(_names))
    registry.undo_recall(parse_ref(merged.parents[1].ref), reason="a mistake")


def test_a_family_is_rebuilt_over_another_version(registry: RegistryAPI, add: Add):
    old, other = add(), add()
    new = add(old.name)
    middle = merge(registry, old, other)
    top = merge(registry, middle, other)

    planned = registry.rebuild(ref(old), ref(new), dry_run=True)
    job = registry.rebuild(ref(old), ref(new)).job
    *_, first = registry.follow(job.id, timeout_s=120)
    *_, second = registry.follow(first.result["jobs"][0], timeout_s=120)

    assert planned.job is None
    assert [(step.ref, step.action) for step in planned.steps] == [(middle.ref, "merge"), (top.ref, "merge")]
    assert second.result["jobs"] == []
    rebuilt = registry.version(parse_ref(top.name))
    assert rebuilt.id == second.result["version_id"]
    assert [parent.ref for parent in rebuilt.parents] == [f"{middle.name}:v2", other.ref]
    edges = registry.lineage(ref(rebuilt), direction="up").edges
    assert {(edge.child, edge.parent) for edge in edges if edge.kind == "supersedes"} == {
        (f"{middle.name}:v2", middle.ref),
        (rebuilt.ref, top.ref),
    }
    assert registry.version(ref(middle)).parents[0].ref == old.ref


# jobs


def test_a_job_tells_its_history_and_its_end(registry: RegistryAPI, add: Add):
    request = MergeRequest((parse_parent(add().ref), parse_parent(add().ref)), into=next(_names))

    submitted = registry.merge(request)
    seen = list(registry.follow(submitted.job.id, timeout_s=120))

    assert seen[-1] == registry.job(submitted.job.id)
    assert seen[-1].state is JobState.SUCCEEDED
    assert submitted.job.id in [job.id for job in registry.jobs(state="ended", kind="merge")]
    assert len(registry.jobs(limit=1)) == 1
    assert "attempt 1 of 3" in "".join(piece.text for piece in registry.job_log(submitted.job.id))
    events = registry.job_events(submitted.job.id)
    assert [event.kind for event in events] == ["queued", "running", "succeeded"]
    assert registry.job_events(submitted.job.id, after=2) == events[2:]
    for ask in (registry.cancel, registry.retry):
        with pytest.raises(Conflict, match="succeeded"):
            ask(submitted.job.id)


@pytest.mark.usefixtures("in_background")
def test_a_job_is_cancelled_and_retried(registry: RegistryAPI, add: Add):
    request = MergeRequest((parse_parent(add().ref), parse_parent(add().ref)), into=next(_names))
    job = registry.merge(request).job

    registry.cancel(job.id)
    *_, ended = registry.follow(job.id, timeout_s=60)
    assert ended.state in (JobState.CANCELLED, JobState.SUCCEEDED)  # it may have been quicker than we were
    if ended.state is JobState.CANCELLED:
        assert registry.retry(job.id).state is JobState.QUEUED
        *_, ended = registry.follow(job.id, timeout_s=120)
    assert ended.state is JobState.SUCCEEDED


@pytest.mark.usefixtures("in_background")
def test_waiting_ends_where_the_job_does_not(registry: RegistryAPI, add: Add):
    request = MergeRequest((parse_parent(add().ref), parse_parent(add().ref)), into=next(_names))
    job = registry.merge(request).job

    with pytest.raises(WaitTimedOut, match="after 0 s"):
        list(registry.follow(job.id, timeout_s=0.0))

    assert registry.job(job.id).id == job.id
    list(registry.follow(job.id, timeout_s=120))


# evaluation

SUITE = "name: {name}\ntasks:\n  - {{name: t, data: rows.jsonl, metrics: [nll]}}\n"


def suite_file(folder: Path, name: str) -> Path:
    (folder / "rows.jsonl").write_text(json.dumps({"prompt": "un chat ->", "target": " a cat"}) + "\n")
    path = folder / f"{name}.yaml"
    path.write_text(SUITE.format(name=name))
    return path


def test_a_suite_is_set_by_its_file(registry: RegistryAPI, add: Add, tmp_path: Path):
    version = add()

    registry.set_suite(version.name, str(suite_file(tmp_path, f"of-{version.name}")))
    view = registry.retention(ref(version))

    assert (view.ref, view.rows) == (version.ref, ())
    (kept,) = [suite for suite in registry.suites() if version.name in suite.adapters]
    for text in (kept.name, kept.digest, kept.digest[:12]):
        assert registry.suite(text).digest == kept.digest
    with pytest.raises(NotFound, match="no suite"):
        registry.suite("nowhere")


@pytest.mark.parametrize("text", ["nowhere.yaml", "0" * 64])
def test_a_suite_that_is_not_there_is_not_found(registry: RegistryAPI, add: Add, text: str):
    version = add()

    with pytest.raises(NotFound, match=text):
        registry.set_suite(version.name, text)


def test_a_suite_with_code_is_refused(registry: RegistryAPI, add: Add, tmp_path: Path):
    path = suite_file(tmp_path, "bad")
    path.write_text(path.read_text().replace("metrics: [nll]", "metrics: [nll], prompt: '{% for x in y %}'"))

    with pytest.raises(InvalidInput, match="templates know") as caught:
        registry.set_suite(add().name, str(path))

    assert caught.value.problems


def test_an_evaluation_without_its_base_is_refused(registry: RegistryAPI, add: Add, tmp_path: Path):
    version = add()
    path = suite_file(tmp_path, "mine")

    with pytest.raises(AdapterctlError, match="tiny/base"):
        registry.evaluate([ref(version)], suites=[str(path)], limit=1, base_dtype="nf4")
    with pytest.raises(InvalidInput, match="nf4-dq"):
        registry.evaluate([ref(version)], suites=[str(path)], base_dtype="int3")
    with pytest.raises(InvalidInput, match="no evaluation suite"):
        registry.evaluate([ref(version)], suites=[])


def test_a_search_without_its_base_is_refused_and_a_merge_is_no_search(
    registry: RegistryAPI, merged: VersionView, tmp_path: Path
):
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"prompt": "p{i}", "target": " t"}}\n' for i in range(8)))
    (tmp_path / "mine.yaml").write_text(SUITE.format(name="mine"))
    parents = tuple(parse_ref(parent.ref) for parent in merged.parents)
    (job,) = registry.jobs(kind="merge", limit=1)

    with pytest.raises(Unavailable, match="tiny/base"):
        registry.tune(TuneRequest(parents, suites=(str(tmp_path / "mine.yaml"),)))
    with pytest.raises(InvalidInput, match="no evaluation suite"):
        registry.tune(TuneRequest(parents))
    with pytest.raises(InvalidInput, match="make no 99 groups"):
        registry.tune(TuneRequest(parents, suites=(str(tmp_path / "mine.yaml"),), layer_groups=99))
    with pytest.raises(InvalidInput, match="nf4-dq"):
        registry.tune(TuneRequest(parents, suites=(str(tmp_path / "mine.yaml"),), base_dtype="int3"))
    with pytest.raises(NotFound, match="is no search"):
        registry.tuned(job.id)


def test_reports_of_bases_that_are_unknown_are_not_taken(registry: RegistryAPI):
    results = Path(__file__).parents[2] / "examples" / "results"

    assert registry.import_reports(results) == 0


def test_results_from_elsewhere_are_marked_by_their_source(registry: RegistryAPI, add: Add):
    version = add(metrics={"bleu": 0.2})

    shown = registry.import_results(ref(version), source="lm-eval r.json", metrics={"wmt/chrf": 44.0})

    assert shown.metrics == {"bleu": 0.2, "wmt/chrf": 44.0}
    assert shown.imported == {"wmt/chrf": "imported from lm-eval r.json"}
    assert registry.version(ref(version)).imported == shown.imported
    with pytest.raises(Refused, match=r"bleu 0.2 \(register\), now 0.9"):
        registry.import_results(ref(version), source="r", metrics={"bleu": 0.9})
    assert registry.import_results(ref(version), source="r", metrics={"bleu": 0.9}, replace=True).metrics["bleu"] == 0.9
    with pytest.raises(InvalidInput, match="cannot be taken"):
        registry.import_results(ref(version), source="x", metrics={})
    with pytest.raises(InvalidInput, match="neither a file nor runs:/ID"):
        registry.import_results(ref(version), source="/etc/passwd")
    with pytest.raises(NotFound, match="no run"):
        registry.import_results(ref(version), source="runs:/" + "0" * 32)


def test_metrics_of_a_run_are_taken_from_mlflow(registry: RegistryAPI, add: Add):
    measured, other = add(metrics={"bleu": 0.25}), add()

    shown = registry.import_results(ref(other), source=f"runs:/{measured.run_id}")

    assert shown.metrics == {"bleu": 0.25}
    assert shown.imported == {"bleu": f"imported from runs:/{measured.run_id}"}


# tags and gates


def test_tags_are_set_and_removed_with_a_row_of_the_history(registry: RegistryAPI, add: Add):
    version = add(tags={"team": "mt", "draft": "yes"})

    first = registry.tag(ref(version), put={"owner": "ada", "draft": "no"}, remove=["team"], reason="read it")
    again = registry.tag(ref(version), put={"owner": "ada"}, remove=["team"])

    assert (first.warnings, again.warnings) == ((), ())
    assert first.version.tags == again.version.tags == {"draft": "no", "owner": "ada"}
    assert registry.version(ref(version)).tags == first.version.tags
    history = registry.history(version.name, verify=True)
    assert [(row.action, row.ref, row.reason) for row in history.events] == [
        ("tag", version.ref, 'owner="ada" draft="no" team-: read it')
    ]
    assert history.events[0].actor
    assert history.findings == ()
    with pytest.raises(InvalidInput, match="is not allowed"):
        registry.tag(ref(version), put={"adapterctl.key": "x"})
    with pytest.raises(InvalidInput, match=r"tag 'a' has the control character '\\n' at its character 2"):
        registry.tag(ref(version), put={"a": "b\n"})
    with pytest.raises(InvalidInput, match="is not allowed"):
        registry.tag(ref(version), put={}, remove=["mlflow.note.content"])
    with pytest.raises(InvalidInput, match="to be set and removed at once"):
        registry.tag(ref(version), put={"a": "b"}, remove=["a"])
    with pytest.raises(InvalidInput, match="no tag to set"):
        registry.tag(ref(version))


def test_a_merge_is_tagged_when_it_is_made_and_not_when_it_is_there(registry: RegistryAPI, add: Add):
    one, two = add(), add()
    made = merge(registry, one, two, into="tagged", tags={"owner": "ada"})

    parents = tuple(parse_parent(f"{each.ref}=0.5") for each in (one, two))
    again = registry.merge(MergeRequest(parents, into="tagged", method="cat", tags={"owner": "bob"}))

    assert made.tags == {"owner": "ada"}
    assert again.version.id == made.id
    assert again.version.tags == {"owner": "ada"}
    (warning,) = [each for each in again.warnings if "tags" in each]
    assert "tags are not added, `adapterctl tag REF owner=bob` does" in warning
    same = registry.merge(MergeRequest(parents, into="tagged", method="cat", tags={"owner": "ada"}))
    assert [each for each in same.warnings if "tags" in each] == []
    with pytest.raises(InvalidInput, match="is not allowed"):
        registry.merge(MergeRequest(parents, into="tagged", tags={"mlflow.user": "x"}))


def test_a_gate_that_asks_for_a_tag_is_met_by_tagging_a_merge(registry: RegistryAPI, merged: VersionView):
    gate = {"stage": "production", "adapters": [merged.name], "tags": {"reviewed": "yes"}}
    registry.set_gates({"gates": [gate]})
    try:
        with pytest.raises(GateRefused, match="it has no tag reviewed"):
            registry.promote(ref(merged), to="production")
        registry.tag(ref(merged), put={"reviewed": "yes"})
        event = registry.promote(ref(merged), to="production")
    finally:
        registry.set_gates({"gates": []})

    assert event.action == "promote"
    assert [row.action for row in registry.history(merged.name).events] == ["tag", "promote"]


@pytest.fixture
def gated(registry: RegistryAPI, add: Add) -> Iterator[VersionView]:
    """A version whose adapter has to have one approval for production, as long as the test runs."""
    version = add()
    gate = {"stage": "production", "adapters": [version.name], "require": ["approvals >= 1"]}
    registry.set_gates({"gates": [gate]})
    yield version
    registry.set_gates({"gates": []})


def test_a_gate_is_checked_refused_approved_and_passed(registry: RegistryAPI, gated: VersionView):
    before = registry.gate_check(ref(gated), to="production")
    with pytest.raises(GateRefused, match="the number of approvals is 0") as refused:
        registry.promote(ref(gated), to="production")
    approval = registry.approve(ref(gated), to="production", reason="read it")
    after = registry.gate_check(ref(gated), to="production")
    event = registry.promote(ref(gated), to="production")

    assert (before.verdict, after.verdict) == ("failed", "passed")
    assert before.gate == registry.gates().digest
    assert [judged.condition for judged in before.conditions] == ["not recalled", "approvals >= 1"]
    assert [problem.code for problem in refused.value.problems] == ["failed"]
    assert (approval.action, approval.ref) == ("approve", gated.ref)
    decision = registry.decision(event.evidence)
    assert decision.evidence.approvals == (approval.actor,)
    assert registry.history(gated.name, verify=True).findings == ()
    with pytest.raises(NotFound, match="no decision"):
        registry.decision("0" * 64)


def test_a_gate_is_forced_with_a_reason(registry: RegistryAPI, gated: VersionView):
    with pytest.raises(InvalidInput, match="needs a reason"):
        registry.promote(ref(gated), to="production", force=True)

    event = registry.promote(ref(gated), to="production", reason="urgent", force=True)

    assert (event.action, event.reason) == ("force", "urgent")
    assert event.warnings == ("the gate of production: the number of approvals is 0, the gate asks for at least 1",)


def test_a_version_is_signed_shown_verified_and_promoted_by_its_signature(
    registry: RegistryAPI, merged: VersionView, tmp_path: Path
):
    ada, eve = write_key(tmp_path, "ada"), write_key(tmp_path, "eve")
    keys = {"ada": str(public(ada)), "eve": (tmp_path / "eve.pub").read_text()}
    asked = {"stage": "production", "adapters": [merged.name], "signatures": {"at_least": 2, "keys": keys}}
    registry.set_gates({"gates": [asked]})
    try:
        envelope, key = sign_version(ref(merged), merged, tmp_path / "ada.key")
        kept = registry.sign(ref(merged), envelope=envelope, key=str(key))
        with pytest.raises(Refused, match="not by that key"):
            registry.sign(ref(merged), envelope=envelope, key=keys["eve"])
        with pytest.raises(GateRefused, match="at least 2: eve did not sign"):
            registry.promote(ref(merged), to="production")
        other = registry.sign(ref(merged), envelope=seal(statement_of_view(merged), eve), key=keys["eve"])
        event = registry.promote(ref(merged), to="production")
    finally:
        registry.set_gates({"gates": []})

    assert (kept.keyid, kept.fault, kept.by) == (public(ada).id, "", event.actor)
    assert registry.version(ref(merged)).signatures == (kept, other)
    assert registry.verify(ref(merged)).signatures == (kept, other)
    assert signature_of(ref(merged), registry.version(ref(merged)), tmp_path / "ada.pub") == envelope
    signers = registry.decision(event.evidence).evidence.signatures
    assert {each.key for each in signers} == {kept.keyid, other.keyid}
    assert registry.history(merged.name, verify=True).findings == ()
    assert json.loads(base64.b64decode(envelope.payload))["predicate"]["recipe"] == merged.recipe_digest


def test_a_bad_gate_file_is_refused_with_every_problem(registry: RegistryAPI):
    with pytest.raises(InvalidInput) as refused:
        registry.set_gates({"gates": [{"stage": "nirvana", "require": ["bleu => 1"]}], "more": 1})

    assert [problem.code for problem in refused.value.problems] == ["more", "gates[0].stage", "gates[0].require[0]"]


# stages


def test_stages_move_back_and_forth_and_are_recorded(registry: RegistryAPI, add: Add):
    name = next(_names)
    one, two = add(name), add(name)

    first = registry.promote(ref(one), to="production", reason="good")
    registry.promote(ref(two), to="production")
    back = registry.rollback(name, stage="production", reason="worse")
    held = registry.version(parse_ref(f"{name}@production"))
    emptied = registry.demote(name, stage="production")

    assert (first.ref, first.previous, first.reason) == (one.ref, None, "good")
    assert (back.ref, back.previous) == (one.ref, two.ref)
    assert (held.ref, held.stages) == (one.ref, ("production",))
    assert emptied.ref is None
    history = registry.history(name, verify=True)
    assert [event.action for event in history.events] == ["promote", "promote", "rollback", "demote"]
    assert history.findings == ()
    assert registry.history(name, stage="staging").events == ()
    assert registry.history(name, verify=True, head="f" * 64).findings != ()
    head = Head(registry=history.registry_id, name=name, seq=9, hash=history.head, time="2026-01-01T00:00:00Z")
    assert registry.history(name, verify=True, head=to_json(head)).findings == (
        "the history ends at row 4, row 9 was kept: it was cut",
    )


def test_a_stage_that_does_not_exist_or_is_not_held_is_refused(registry: RegistryAPI, add: Add):
    version = add()

    asked: list[Callable[[], object]] = [
        lambda: registry.promote(ref(version), to="nirvana"),
        lambda: registry.rollback(version.name, stage="nirvana"),
        lambda: registry.demote(version.name, stage="nirvana"),
        lambda: registry.adopt(version.name, stage="nirvana"),
        lambda: registry.approve(ref(version), to="nirvana"),
        lambda: registry.gate_check(ref(version), to="nirvana"),
        lambda: registry.history(version.name, stage="nirvana"),
        lambda: registry.versions(stage="nirvana"),
    ]
    for verb in asked:
        with pytest.raises(InvalidInput, match="'nirvana' is no stage") as caught:
            verb()
        assert "stages are staging, production" in caught.value.hint
    with pytest.raises(AdapterctlError):
        registry.rollback(version.name, stage="production")
    with pytest.raises((Refused, NotFound, StageMoved)):
        registry.adopt(version.name, stage="production")


# tokens


def test_tokens_are_made_listed_and_revoked(registry: RegistryAPI):
    made = registry.create_token("ci", scope=Scope.MERGE, names=["chat-*"], valid_s=3600)

    (listed,) = [token for token in registry.tokens() if token.id == made.token.id]
    revoked = registry.revoke_token(made.token.id)

    assert made.secret.startswith("actl_")
    assert (listed.name, listed.scope, listed.names) == ("ci", Scope.MERGE, ("chat-*",))
    assert listed.expires_at > listed.created_at
    assert revoked.revoked_at is not None
    with pytest.raises(InvalidInput, match="token name"):
        registry.create_token("a\nb", scope=Scope.READ)
    with pytest.raises(InvalidInput, match="globs"):
        registry.create_token("x", scope=Scope.READ, names=["../*"])


# the registry itself


def test_doctor_finds_nothing_broken(registry: RegistryAPI):
    checks = registry.doctor()

    assert {"ledger", "mlflow", "jobs"} <= {check.name for check in checks}
    assert [check for check in checks if check.status == "error" and not fnmatch(check.name, "filesystem")] == []


def test_doctor_adopts_nothing_where_nothing_was_done_in_mlflow(registry: RegistryAPI, add: Add):
    version = add()

    checks = registry.doctor(adopt=True)

    assert {"ledger", "mlflow", "jobs"} <= {check.name for check in checks}
    assert "adopted" not in {check.name for check in checks}
    assert registry.version(ref(version)).state == "live"
    assert "adopted" not in {check.name for check in registry.doctor(adopt=True, force=[version.name])}
    with pytest.raises(NotFound, match="no adapter 'nobody'"):
        registry.doctor(adopt=True, force=["nobody"])
    with pytest.raises(InvalidInput, match="force without adopt"):
        registry.doctor(force=[version.name])


def test_what_nobody_refers_to_is_told_and_then_freed(registry: RegistryAPI, merged: VersionView):
    told = registry.gc(older_than_s=0.0, dry_run=True)
    freed = registry.gc(older_than_s=0.0)

    assert (told.dry_run, freed.dry_run) == (True, False)
    # workers of a service have homes of their own, and their logs there
    names = {each.name for each in told.found if each.kind == "log"}
    assert names <= {each.name for each in freed.found}
    assert not any(Path(name).exists() for name in names)
    assert told.size_bytes == sum(each.size_bytes for each in told.found)
    assert registry.verify(ref(merged)).files == "intact"
    with pytest.raises(InvalidInput, match="older_than_s"):
        registry.gc(older_than_s=-1.0)


def test_what_happened_is_told_in_pages_and_as_it_goes_on(
    registry: RegistryAPI, add: Add, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(events_over_rest, "LIFE_S", 0.1)  # a client in this process gets a stream when it has ended
    before = registry.events(after=None)
    version, other = add(tags={"team": "mt"}), add()
    registry.promote(ref(version), to="production", reason="fits")
    registry.recall(ref(other), reason="leaked")
    registry.demote(version.name, stage="production")

    found = registry.events(after=before.cursor)
    first = registry.events(after=before.cursor, limit=2)
    rest = registry.events(after=first.cursor)

    assert (before.events, before.more, found.more, first.more) == ((), False, False, True)
    assert [(each.kind, each.name, each.ref, each.stage, each.previous, each.reason) for each in found.events] == [
        ("register", version.name, version.ref, "", None, ""),
        ("register", other.name, other.ref, "", None, ""),
        ("promote", version.name, version.ref, "production", None, "fits"),
        ("recall", other.name, other.ref, "", None, "leaked"),
        ("demote", version.name, None, "production", version.ref, ""),
    ]
    assert {each.actor for each in found.events} == {version.created_by}
    assert found.events[0].link == f"/adapters/{version.name}/v1"
    assert found.events[0].at == version.created_at
    assert first.events + rest.events == found.events
    assert found.cursor == rest.cursor == found.events[-1].id
    moves = registry.events(after=before.cursor, name=f"{version.name}*", kind=["move"], stage="production").events
    assert [each.kind for each in moves] == ["promote", "demote"]
    following = registry.follow_events(after=before.cursor, kind=["move", "recall"])
    assert [next(following).kind for _ in range(3)] == ["promote", "recall", "demote"]
    registry.approve(ref(version), to="production")
    assert next(registry.follow_events(after=found.cursor, name=version.name)).kind == "approve"


def test_events_that_cannot_be_told_are_refused(registry: RegistryAPI, add: Add):
    add()

    for wrong in (
        *({"kind": ["promoted"]}, {"name": "Not a name"}, {"stage": "prodction"}),
        *({"after": 10**8}, {"after": -1}, {"limit": 0}),
    ):
        with pytest.raises(InvalidInput):
            registry.events(**wrong)
    with pytest.raises(NotFound, match="nobody"):
        registry.events(name="nobody")
    with pytest.raises(NotFound, match="nobody"):
        next(registry.follow_events(after=0, name="nobody"))
    for wrong in ({"kind": ["promoted"]}, {"stage": "prodction"}, {"after": 10**8}, {"after": -1}):
        with pytest.raises(InvalidInput):
            next(registry.follow_events(**wrong))


def test_every_verb_is_in_these_tests():
    verbs = {name for name, value in vars(RegistryAPI).items() if callable(value) and not name.startswith("_")}

    used = {node.attr for node in ast.walk(ast.parse(Path(__file__).read_text())) if isinstance(node, ast.Attribute)}

    assert verbs - used == set()

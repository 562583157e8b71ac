"""Rebuilding a family over the real ledger, the real MLflow and real supervisors: the plan, the chain, and a kill."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from registries import nobody_works
from tiny import write_tiny_adapter

from adapterctl.registry.domain.errors import InvalidInput, NotFound, Recalled, Refused
from adapterctl.registry.domain.recipe import MergeRequest, parse_layer_weights
from adapterctl.registry.domain.refs import parse_parent, parse_ref
from adapterctl.registry.services.local import LocalRegistry
from adapterctl.registry.services.merge import preflight
from adapterctl.registry.services.rebuild import _request
from adapterctl.registry.services.resolve import resolve


def merge(registry: LocalRegistry, into: str, *parents: str) -> None:
    submitted = registry.merge(MergeRequest(tuple(map(parse_parent, parents)), into=into))
    list(registry.follow(submitted.job.id, timeout_s=120))


@pytest.fixture(scope="module")
def registry(two_parents: LocalRegistry, tmp_path_factory) -> LocalRegistry:
    """omni:v1 of translate:v1, top:v1 of omni:v1, tuned:v1 trained from omni:v1, late:v1 of tuned:v1; all with chat."""
    folder = tmp_path_factory.mktemp("adapters")
    two_parents.register(str(write_tiny_adapter(folder / "t2", seed=50, rank=2)), name="translate")
    merge(two_parents, "omni", "translate:v1", "chat:v1=0.5")
    merge(two_parents, "top", "omni:v1=2", "chat:v1")
    two_parents.register(
        str(write_tiny_adapter(folder / "tuned", seed=51)),
        name="tuned",
        kind="train",
        trained_from=parse_ref("omni:v1"),
    )
    merge(two_parents, "late", "tuned:v1", "chat:v1")
    return two_parents


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not true():
        assert time.monotonic() < deadline, "nothing happened in 120 s"
        time.sleep(0.05)


def follow_chain(registry: LocalRegistry, job_id: str) -> list[str]:
    made, waiting = [], [job_id]
    while waiting:
        *_, job = registry.follow(waiting.pop(), timeout_s=120)
        assert job.error is None
        made.append(job.result["version_id"])
        waiting += job.result["jobs"]
    versions = registry.ledger.versions_by_id(made)
    return [versions[each].label for each in made]


def test_what_cannot_be_rebuilt_is_refused_in_words(registry):
    asks = {
        "cannot replace itself": (InvalidInput, "chat:v1", "chat:v1", None),
        "is itself made of translate:v1": (Refused, "translate:v1", "top:v1", None),
        "nothing is made of late:v1": (NotFound, "late:v1", "chat:v1", None),
        "chat:v1 is not made of translate:v1": (InvalidInput, "translate:v1", "translate:v2", "chat:v1"),
        "nothing that is made of tuned:v1|nothing": (NotFound, "top:v1", "translate:v2", None),
    }
    for words, (kind, old, new, until) in asks.items():
        with pytest.raises(kind, match=words):
            registry.rebuild(parse_ref(old), parse_ref(new), until=parse_ref(until) if until else None)
    registry.recall(parse_ref("translate:v2"), reason="worse")
    with pytest.raises(Recalled, match="worse"):
        registry.rebuild(parse_ref("translate:v1"), parse_ref("translate:v2"))
    registry.undo_recall(parse_ref("translate:v2"), reason="not worse")


def test_the_recipe_of_a_rebuilt_version_is_the_old_one_but_for_its_parents(registry):
    layers = (parse_layer_weights("layers.0=0.2,1"),)
    parents = tuple(map(parse_parent, ("chat:v1=0.5", "translate:v2")))
    asked = MergeRequest(parents, into="layered", method="svd", rank=3, layers=layers)
    list(registry.follow(registry.merge(asked).job.id, timeout_s=120))
    made = resolve(registry.ledger, parse_ref("layered:v1"))

    again = preflight(registry.ledger, _request(registry.ledger, made, {})).recipe

    assert again.layers == layers
    assert again.digest == made.spec.recipe_digest


@pytest.mark.usefixtures("in_background")
def test_a_killed_rebuild_goes_on_and_leaves_what_was_trained_alone(registry, tmp_path, monkeypatch):
    once = tmp_path / "once"
    old, new = parse_ref("translate:v1"), parse_ref("translate:v2")
    registry.recall(old, reason="leaked")
    # the marks of the recall are made and their supervisor has left: the next one is ours to kill
    wait_until(lambda: not registry.jobs(state="live") and nobody_works(registry.settings.home))
    monkeypatch.setenv("ADAPTERCTL_CRASH_AT", "ledger.committed")
    monkeypatch.setenv("ADAPTERCTL_CRASH_ONCE", str(once))

    planned = registry.rebuild(old, new)
    wait_until(once.exists)
    monkeypatch.delenv("ADAPTERCTL_CRASH_AT")
    registry.wake(planned.job.id)
    made = follow_chain(registry, planned.job.id)

    assert [(step.ref, step.action, step.parents) for step in planned.steps] == [
        ("omni:v1", "merge", ("translate:v2",)),
        ("top:v1", "merge", ("the new omni:v1",)),
        ("tuned:v1", "skip", ()),
        ("late:v1", "skip", ()),
    ]
    assert planned.steps[2].note == "tuned:v1 was trained, and has to be trained again"
    assert planned.steps[3].note == "late:v1 waits for tuned:v1 to be made again"
    assert made == ["omni:v2", "top:v2"]
    top = registry.version(parse_ref("top:v2"))
    assert [(parent.ref, parent.weight) for parent in top.parents] == [("omni:v2", 2.0), ("chat:v1", 1.0)]
    # ranks follow the parents: 2 + 4, then that + 4
    assert [registry.version(parse_ref(each)).rank for each in made] == [6, 10]
    assert top.recall is None
    assert registry.version(parse_ref("top:v1")).recall.ref == "translate:v1"
    assert registry.verify(parse_ref("top:v2")).recipe == "identical"

    again = follow_chain(registry, registry.rebuild(old, new, until=parse_ref("top:v1")).job.id)

    assert again == ["omni:v2", "top:v2"]
    registry.remove(parse_ref("top:v1"), reason="superseded")
    assert registry.version(parse_ref("top:v1")).state == "removed"


def test_what_a_version_superseded_is_not_rebuilt_with_it(registry, tmp_path):
    for seed, name in ((60, "chat"), (61, "translate")):
        registry.register(str(write_tiny_adapter(tmp_path / name, seed=seed)), name=name)
    merge(registry, "pair", "translate:v2", "chat:v1")
    once = registry.rebuild(parse_ref("chat:v1"), parse_ref("chat:v2"), until=parse_ref("pair:v1"))
    follow_chain(registry, once.job.id)

    planned = registry.rebuild(
        parse_ref("translate:v2"), parse_ref("translate:v3"), until=parse_ref("pair:v2"), dry_run=True
    )

    assert [step.ref for step in planned.steps] == ["pair:v2"]

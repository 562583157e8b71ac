"""What any ledger promises about bases, versions, lineage, evaluations and stages."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict

import pytest
import uuid6
from sqlalchemy import insert

from adapterctl.registry.domain.adapter import AdapterFacts
from adapterctl.registry.domain.errors import Conflict, HasDescendants, InvalidInput, NotFound, Refused, StageMoved
from adapterctl.registry.domain.evals import EvalReport, TaskResult
from adapterctl.registry.domain.job import JobState, NewJob
from adapterctl.registry.domain.stage import verify_chain
from adapterctl.registry.domain.version import AdapterVersion, Base, Edge, NewVersion, Placement
from adapterctl.registry.ports import Ledger
from adapterctl.registry.stores.sql import ledger as sql_ledger_module
from adapterctl.registry.stores.sql import tables

AddVersion = Callable[..., AdapterVersion]

MERGE = NewJob("merge", "translate:recipe", "merge", {}, "ada")


def report(key: str, *, base_id: str = "base-1", subject: str = "aa") -> EvalReport:
    task = TaskResult("fr-en", "nll", "lower", {"nll": 1.5}, ({"nll": 1.0}, {"nll": 2.0}))
    return EvalReport(key, subject, base_id, "suite", "dd", 2, {"lm_eval": "0.4.13"}, (task,), 1.25)


# the registry itself


def test_a_registry_keeps_the_identity_and_the_mlflow_that_it_was_made_with(ledger: Ledger):
    before = ledger.registry_id, ledger.mlflow_uri

    ledger.establish("http://elsewhere")

    assert (ledger.registry_id, ledger.mlflow_uri) == before


# bases


def test_a_known_spelling_leads_to_its_base_and_fills_in_pins_once(ledger: Ledger):
    first = ledger.add_base(Base("b1", "tiny"), ["org/tiny", "/models/tiny"])
    second = ledger.add_base(Base("b2", "tiny", revision="abc", config_digest="c1"), ["/models/tiny", "tiny-2"])
    third = ledger.add_base(Base("b3", "tiny", revision="other"), ["tiny-2"])

    assert first.id == second.id == third.id
    assert (third.revision, third.config_digest) == ("abc", "c1")
    assert ledger.find_base("tiny-2") == ledger.find_base("b1") == third
    assert ledger.find_base("unknown") is None


def test_merged_bases_are_one_for_spellings_versions_and_reports(ledger: Ledger, add_version: AddVersion):
    keep, drop = ledger.add_base(Base("b1", "tiny"), ["tiny"]), ledger.add_base(Base("b2", "t"), ["t"])
    version = add_version(base=drop)
    ledger.put_report(report("k", base_id=drop.id))

    ledger.merge_bases(keep.id, drop.id)

    assert ledger.bases() == [keep]
    assert ledger.base_aliases() == {"t": keep.id, "tiny": keep.id}
    assert ledger.find_base(drop.id) == keep
    assert ledger.version(version.id).spec.base == keep
    assert [each.key for each in ledger.reports_for("aa", keep.id)] == ["k"]


def test_a_merged_base_has_the_pins_of_both(ledger: Ledger):
    keep = ledger.add_base(Base("b1", "tiny", config_digest="c"), ["tiny"])
    drop = ledger.add_base(Base("b2", "t", config_digest="c", weights_digest="w"), ["t"])

    ledger.merge_bases(keep.id, drop.id)

    assert ledger.find_base("t") == Base("b1", "tiny", config_digest="c", weights_digest="w")


def test_bases_are_not_merged_over_two_live_versions_of_the_same_content(ledger: Ledger, add_version: AddVersion):
    keep, drop = ledger.add_base(Base("b1", "tiny"), ["tiny"]), ledger.add_base(Base("b2", "t"), ["t"])
    add_version(base=keep, content_digest="ab" * 32)
    other = add_version(base=drop, content_digest="ab" * 32)

    with pytest.raises(Refused, match="same content"):
        ledger.merge_bases(keep.id, drop.id)

    assert ledger.version(other.id).spec.base == drop


def test_an_alias_can_be_moved_to_another_base(ledger: Ledger):
    ledger.add_base(Base("b1", "tiny"), ["tiny"])
    other = ledger.add_base(Base("b2", "t"), ["t"])

    ledger.alias_base("tiny", other.id)

    assert ledger.find_base("tiny") == other
    with pytest.raises(NotFound):
        ledger.alias_base("tiny", "nobody")


# versions


def test_a_version_comes_back_as_it_was_added(ledger: Ledger, add_version: AddVersion, facts: AdapterFacts):
    parents = [add_version(), add_version()]
    recipe, receipt = {"method": "svd"}, {"loss": 0.125, "modules": {"q": [1, 2.5]}}
    words = {"params": {"lr": "1e-4"}, "tags": {"team": "mt"}, "license": "mit", "dataset": "opus", "source": "x"}

    added = add_version(
        parents=parents,
        recipe_digest="r" * 64,
        recipe=recipe,
        receipt=receipt,
        norms={"q": 0.5},
        metrics={"m": 1},
        **words,
    )

    assert ledger.version(added.id) == ledger.version_by_number("translate", 3) == added
    assert (added.label, added.state, added.created_by, added.spec.params) == (
        "translate:v3",
        "live",
        "ada",
        {"lr": "1e-4"},
    )
    assert (added.summary.rank, added.summary.method, added.summary.loss) == (4, "svd", 0.125)
    detail = ledger.detail(added.id)
    assert (detail.facts, detail.norms, detail.recipe, detail.receipt) == (facts, {"q": 0.5}, recipe, receipt)
    assert ledger.metrics([added.id]) == {added.id: {"m": 1.0}}
    assert [edge.parent_id for edge in ledger.parent_edges([added.id])[added.id]] == [each.id for each in parents]


def test_details_are_those_of_their_version_however_few_are_kept_at_hand(
    ledger: Ledger, add_version: AddVersion, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sql_ledger_module, "DETAILS_KEPT", 1)
    versions = [add_version(recipe={"method": f"m{number}"}) for number in range(3)]

    recipes = [ledger.detail(version.id).recipe for version in (*versions, *versions)]

    assert recipes == [{"method": f"m{number}"} for number in (0, 1, 2, 0, 1, 2)]


def test_adding_a_version_again_changes_nothing(ledger: Ledger, add_version: AddVersion):
    first = add_version(version_id="v-1", number=1)

    assert add_version(version_id="v-1", number=7) == first
    assert ledger.versions() == [first]


@pytest.mark.parametrize("same", [{"content_digest": "ab" * 32}, {"number": 1}])
def test_the_same_live_content_or_number_is_refused(ledger: Ledger, add_version: AddVersion, same: dict[str, object]):
    add_version(content_digest="ab" * 32, number=1)

    with pytest.raises(Conflict, match="translate"):
        add_version(**{"number": 2, **same})

    assert len(ledger.versions()) == 1


def test_the_same_content_may_live_under_another_name_on_another_base_or_as_a_merge(
    ledger: Ledger, add_version: AddVersion
):
    first = add_version(content_digest="ab" * 32)
    other_base = ledger.add_base(Base("b2", "t"), ["t"])

    add_version("chat", content_digest="ab" * 32)
    add_version(content_digest="ab" * 32, base=other_base)
    merged = add_version(content_digest="ab" * 32, parents=[first], recipe_digest="r" * 64)

    assert len(ledger.versions_by_digest("abab")) == 4
    assert [each.name for each in ledger.versions_by_digest("ab" * 32, "chat")] == ["chat"]
    assert ledger.live_version(first.adapter_id, content=("ab" * 32, first.spec.base.id)) == first
    assert ledger.live_version(first.adapter_id, recipe="r" * 64) == merged
    assert ledger.live_version(first.adapter_id, recipe="f" * 64) is None


def test_one_recipe_has_one_live_version_in_an_adapter(add_version: AddVersion):
    parent = add_version()
    add_version(parents=[parent], recipe_digest="r" * 64)

    with pytest.raises(Conflict, match="same recipe"):
        add_version(parents=[parent], recipe_digest="r" * 64)


def test_a_removed_version_is_a_tombstone_that_no_longer_stands_in_the_way(ledger: Ledger, add_version: AddVersion):
    old = add_version(content_digest="ab" * 32)

    ledger.remove_version(old.id, actor="ada", reason="wrong data")
    ledger.remove_version(old.id, actor="ada", reason="again")
    new = add_version(content_digest="ab" * 32)

    assert ledger.versions() == [new]
    assert [each.state for each in ledger.versions(include_removed=True)] == ["removed", "live"]
    assert ledger.versions_by_digest("abab") == [new]
    assert ledger.version_by_number("translate", 1).state == "removed"


def test_a_version_with_live_descendants_is_not_removed(ledger: Ledger, add_version: AddVersion):
    parent = add_version()
    child = add_version("merged", parents=[parent], recipe_digest="r")

    with pytest.raises(HasDescendants, match="merged:v1 is made of translate:v1"):
        ledger.remove_version(parent.id, actor="ada", reason="")

    ledger.remove_version(child.id, actor="ada", reason="")
    ledger.remove_version(parent.id, actor="ada", reason="")
    assert ledger.versions() == []


def test_a_version_that_holds_a_stage_is_not_removed(ledger: Ledger, add_version: AddVersion):
    version = add_version()
    move(ledger, version, to=version)

    with pytest.raises(Refused, match="translate:v1 holds production"):
        ledger.remove_version(version.id, actor="ada", reason="")


def test_the_newest_value_of_a_metric_counts(ledger: Ledger, add_version: AddVersion):
    version = add_version(metrics={"bleu": 0.1, "nll": 2.0})

    ledger.set_metrics(version.id, {"bleu": 0.3}, source="eval")
    ledger.set_metrics(version.id, {"bleu": 0.2}, source="eval")

    assert ledger.metrics([version.id, "nobody"]) == {version.id: {"bleu": 0.2, "nll": 2.0}}
    with pytest.raises(InvalidInput, match="not finite"):
        ledger.set_metrics(version.id, {"bleu": float("nan")}, source="eval")


def test_a_version_ends_its_job_and_queues_what_follows(ledger: Ledger, add_version: AddVersion):
    job, _ = ledger.submit(MERGE)
    claimed = ledger.claim("w", 10)

    version = add_version(job=(job.id, claimed.attempt), then=[NewJob("eval", "k", "evaluate", {}, "ada")])

    ended = ledger.job(job.id)
    (follow_up,) = ledger.jobs(states=[JobState.QUEUED])
    assert (ended.state, ended.result) == (JobState.SUCCEEDED, {"version_id": version.id, "jobs": [follow_up.id]})


def test_a_version_of_a_lost_attempt_is_refused_whole(ledger: Ledger, add_version: AddVersion):
    job, _ = ledger.submit(MERGE)
    ledger.claim("slow", -1)
    ledger.reap()
    ledger.claim("fast", 10)

    with pytest.raises(Conflict, match="no longer running as attempt 1"):
        add_version(job=(job.id, 1), then=[NewJob("eval", "k", "evaluate", {}, "ada")])

    assert ledger.versions() == []
    assert [each.id for each in ledger.jobs()] == [job.id]


# lineage


def test_lineage_is_the_same_as_a_plain_walk(ledger: Ledger, add_version: AddVersion):
    rng = random.Random(7)
    versions = [add_version() for _ in range(3)]
    for _ in range(40):
        parents = rng.sample(versions, rng.choice([2, 2, 3]))
        versions.append(add_version(parents=parents, recipe_digest=f"{rng.random()}"))
    edges = [e for of_child in ledger.parent_edges([v.id for v in versions]).values() for e in of_child]

    for version in versions[::7]:
        for depth in (None, 1, 2, 5):
            assert ledger.edges_up(version.id, depth) == plain_walk(edges, "child_id", "parent_id", version.id, depth)
            assert ledger.edges_down(version.id, depth) == plain_walk(edges, "parent_id", "child_id", version.id, depth)


@pytest.mark.parametrize(
    ("versions", "steps"),
    [
        pytest.param(40, [1], id="longer than one answer of a server"),
        pytest.param(50, [1, 2], id="ways that differ by one step"),
        pytest.param(340, range(1, 17, 2), id="so many ways that a server stops before the end"),
    ],
)
def test_a_walk_may_be_long_and_lead_to_a_version_by_ways_of_many_lengths(
    ledger: Ledger, add_version: AddVersion, versions: int, steps: Sequence[int]
):
    chain, edges = add_chain(ledger, add_version(), versions, steps)
    first, last = chain[0], chain[-1]

    for depth in (None, 4, 20, 34):
        assert ledger.edges_up(last, depth) == plain_walk(edges, "child_id", "parent_id", last, depth)
        assert ledger.edges_down(first, depth) == plain_walk(edges, "parent_id", "child_id", first, depth)


def add_chain(
    ledger: Ledger, root: AdapterVersion, versions: int, steps: Sequence[int]
) -> tuple[list[str], list[Edge]]:
    """Versions made of those so many steps back, in one transaction: their ids, the root first, and all edges."""
    facts = ledger.detail(root.id).facts
    chain, edges = [root.id], []
    with ledger._db.write() as connection:
        for number in range(2, versions + 1):
            version_id, digest = str(uuid6.uuid7()), f"{number:064x}"
            spec = NewVersion(
                adapter=root.name, kind="merge", content_digest=digest, recipe_digest=digest,
                base=root.spec.base, facts=facts,
            )  # fmt: skip
            placement = Placement(number, "m", "run", "file:///artifacts", ())
            sql_ledger_module._insert_version(connection, version_id, root.adapter_id, spec, placement, "ada")
            of = [chain[-step] for step in steps if step <= len(chain)]
            edges += [Edge(version_id, i, parent, "merge", 1.0, digest) for i, parent in enumerate(of)]
            chain.append(version_id)
        connection.execute(insert(tables.edge), [asdict(each) for each in edges])
    return chain, edges


def plain_walk(edges: list[Edge], start: str, end: str, first: str, depth: int | None) -> list[Edge]:
    """Every edge that leaves a node less than `depth` steps away, generation by generation, in each by that node."""
    found, level, seen, distance = [], {first}, {first}, 0
    ordered = sorted(edges, key=lambda each: (getattr(each, start), each.child_id, each.position))
    while level and distance != depth:
        here = [each for each in ordered if getattr(each, start) in level]
        found += here
        level = {getattr(each, end) for each in here} - seen
        seen |= level
        distance += 1
    return found


def test_edges_come_nearest_generation_first_and_in_the_order_of_the_recipe(ledger: Ledger, add_version: AddVersion):
    a, b, c = add_version(), add_version(), add_version()
    child = add_version(parents=[c, a], recipe_digest="1")
    grandchild = add_version(parents=[child, b], recipe_digest="2")

    edges = [(edge.child_id, edge.parent_id) for edge in ledger.edges_up(grandchild.id)]

    assert edges == [(grandchild.id, child.id), (grandchild.id, b.id), (child.id, c.id), (child.id, a.id)]


# evaluations and suites


def test_a_report_is_stored_once_and_comes_back_whole(ledger: Ledger):
    ledger.put_report(report("k"))
    ledger.put_report(report("k", subject="other"))

    assert ledger.reports(["k", "unknown"]) == {"k": report("k")}
    assert ledger.reports_for("aa", "base-1") == [report("k")]
    assert ledger.reports_for("aa", "base-2") == []


def test_reads_in_a_snapshot_see_one_state_whatever_is_written_meanwhile(ledger: Ledger):
    with ledger.snapshot():
        before = ledger.adapter_id("late")
        ledger.ensure_adapter("late")
        meanwhile = ledger.adapter_id("late")

    assert (before, meanwhile) == (None, None)
    assert ledger.adapter_id("late") is not None


def test_suites_of_an_adapter_are_replaced_in_order(ledger: Ledger):
    adapter_id = ledger.ensure_adapter("translate")
    ledger.set_suites(adapter_id, [("a", "1", "{}")])

    ledger.set_suites(adapter_id, [("c", "3", "{}"), ("b", "2", '{"x":1}')])

    assert ledger.suites(adapter_id) == [("c", "3", "{}"), ("b", "2", '{"x":1}')]


# stages


def move(
    ledger: Ledger, of: AdapterVersion, *, to: AdapterVersion | None, expected: AdapterVersion | None = None
) -> object:
    return ledger.move_stage(
        of.adapter_id,
        "production",
        version_id=to.id if to else None,
        expected=expected.id if expected else None,
        action="promote" if to else "demote",
        actor="ada",
        reason="because",
    )


def test_a_stage_moves_only_from_where_the_mover_saw_it(ledger: Ledger, add_version: AddVersion):
    first, second = add_version(), add_version()
    move(ledger, first, to=first)

    with pytest.raises(StageMoved, match="production holds translate:v1, expected nothing"):
        move(ledger, first, to=second)

    move(ledger, first, to=second, expected=first)
    assert ledger.stage_holder(first.adapter_id, "production") == second.id
    assert ledger.stages() == {first.adapter_id: {"production": second.id}}


def test_every_move_is_one_link_of_the_adapters_chain(ledger: Ledger, add_version: AddVersion):
    first, second = add_version(), add_version()
    other = add_version("chat")

    move(ledger, first, to=first)
    move(ledger, other, to=other)
    move(ledger, first, to=second, expected=first)
    move(ledger, first, to=None, expected=second)

    history = ledger.stage_history(first.adapter_id)
    assert [(each.seq, each.version_id, each.previous_id) for each in history] == [
        (1, first.id, None),
        (2, second.id, first.id),
        (3, None, second.id),
    ]
    assert verify_chain(history) == []
    assert ledger.stage_history(first.adapter_id, "staging") == []
    assert ledger.stages() == {other.adapter_id: {"production": other.id}}


def test_a_row_of_tags_is_short_and_can_be_read_in_one_way(ledger: Ledger, add_version: AddVersion):
    version, long = add_version(), "x" * 81

    ledger.set_tags(version.id, {"a": "yes: approved", "b c": 'q"', "d": long}, [], actor="ada", reason="why")
    ledger.set_tags(version.id, {"e": "x" * 80}, ["b c", "d", "d", "never"], actor="ada", reason="")
    ledger.set_tags(version.id, {"a": "yes: approved"}, ["d"], actor="ada", reason="nothing new")

    digest = hashlib.sha256(long.encode()).hexdigest()[:12]
    history = ledger.stage_history(version.adapter_id)
    assert [each.reason for each in history] == [
        f'a="yes: approved" "b c"="q\\"" d="{"x" * 60}"…sha256:{digest}: why',
        f'e="{"x" * 80}" "b c"- d-',
    ]
    assert verify_chain(history) == []


def test_a_stage_takes_no_removed_version_and_none_of_another_adapter(ledger: Ledger, add_version: AddVersion):
    mine, removed, other = add_version(), add_version(), add_version("chat")
    ledger.remove_version(removed.id, actor="ada", reason="")

    for wrong in (removed, other):
        with pytest.raises(Refused):
            move(ledger, mine, to=wrong)

    assert ledger.stage_history(mine.adapter_id) == []


# what several machines share


def test_a_suite_is_kept_under_its_digest_once(ledger: Ledger):
    ledger.keep_suite("d1", "translate", "body")
    ledger.keep_suite("d1", "translate", "another body")
    ledger.keep_suite("d2", "chat", "other")

    assert ledger.kept_suite("d1") == "body"
    assert ledger.kept_suite("d3") is None
    assert ledger.kept_suites() == [("chat", "d2"), ("translate", "d1")]


def test_the_log_of_a_job_is_numbered_and_can_be_read_on(ledger: Ledger):
    job, _ = ledger.submit(NewJob("merge", "k", "t", {}, "ada"))
    for text in ("attempt 1\n", "nul \0 and % :these\n", "done\n"):
        ledger.append_log(job.id, text)

    pieces = ledger.log(job.id)

    assert [piece.seq for piece in pieces] == [1, 2, 3]
    assert [piece.text for piece in ledger.log(job.id, after=1)] == [
        "nul \N{REPLACEMENT CHARACTER} and % :these\n",
        "done\n",
    ]

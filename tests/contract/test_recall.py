"""What every ledger says of recalls: whom they hit follows from edges and bytes, and what is recalled gets no stage."""

from __future__ import annotations

import threading

import pytest
import uuid6

from adapterctl.registry.domain.errors import Recalled
from adapterctl.registry.domain.job import NewJob
from adapterctl.registry.domain.version import Edge, NewVersion, Placement
from adapterctl.registry.services.recall import recall
from adapterctl.registry.stores.sql.ledger import _insert_edges, _insert_version


def said(ledger, version, action="recall", reason="leaked data", **more):
    return ledger.recall(version.id, action, actor="ada", reason=reason, **more)


def test_a_recall_hits_what_is_made_of_the_version_and_nothing_else(ledger, add_version):
    root, other = add_version(), add_version()
    child = add_version("merged", parents=[root, other])
    grandchild = add_version("merged", parents=[child, other])

    recall, _ = said(ledger, root)

    assert (recall.version_id, recall.action, recall.actor, recall.reason) == (root.id, "recall", "ada", "leaked data")
    assert ledger.recalls() == dict.fromkeys([root.id, child.id, grandchild.id], recall)
    later = add_version("merged", parents=[grandchild])
    assert ledger.recalls()[later.id] == recall
    assert list(ledger.descendants([root.id])) == [root.id, child.id, grandchild.id, later.id]


def test_a_recall_hits_copies_of_the_bytes_and_what_is_made_of_them(ledger, add_version):
    digest = "ab" * 32
    original = add_version(content_digest=digest)
    copy, other = add_version("copy", content_digest=digest), add_version("other")
    child = add_version("merged", parents=[copy, other])
    twin = add_version("twin", content_digest=child.spec.content_digest)

    recall, _ = said(ledger, original)

    hit = [original.id, copy.id, child.id, twin.id]
    assert ledger.recalls() == dict.fromkeys(hit, recall)
    assert list(ledger.descendants([original.id], copies=True)) == hit
    assert list(ledger.descendants([copy.id])) == [copy.id, child.id]
    late = add_version("late", content_digest=digest)
    assert ledger.recalls()[late.id] == recall
    said(ledger, copy, reason="again")
    said(ledger, original, "undo")
    assert ledger.recalls()[original.id].reason == "again"  # the same bytes: one word too many has to be taken back
    said(ledger, copy, "undo")
    assert ledger.recalls() == {}


def test_what_supersedes_a_recalled_version_is_its_cure(ledger, add_version):
    old = add_version()
    said(ledger, old)

    new = add_version("cured")
    with ledger._db.write() as connection:
        _insert_edges(connection, [Edge(new.id, 0, old.id, "supersedes")])

    assert list(ledger.recalls()) == [old.id]


def test_the_nearest_recall_counts_and_undoing_one_leaves_the_other(ledger, add_version):
    root = add_version()
    middle = add_version("merged", parents=[root])
    leaf = add_version("merged", parents=[middle])
    of_root, _ = said(ledger, root, reason="first")
    said(ledger, middle, reason="second")

    assert [ledger.recalls()[each.id].reason for each in (root, middle, leaf)] == ["first", "second", "second"]
    said(ledger, middle, "undo", "was fine")
    assert ledger.recalls() == dict.fromkeys([root.id, middle.id, leaf.id], of_root)
    said(ledger, root, "undo", "was fine")
    assert ledger.recalls() == {}


def test_saying_it_again_adds_no_row_but_queues_its_jobs(ledger, add_version):
    version = add_version()
    jobs = [NewJob("recall", str(n), "mark", {}, "ada") for n in range(2)]

    first, queued = said(ledger, version, then=jobs[:1])
    again, queued_again = said(ledger, version, reason="other words", then=jobs[1:])

    assert again == first
    assert [job.key for job in (*queued, *queued_again)] == ["0", "1"]
    assert ledger.job(queued[0].id).kind == "recall"


@pytest.mark.parametrize("action", ["promote", "rollback", "adopt"])
def test_no_move_gives_a_stage_to_a_recalled_version_or_its_child(ledger, add_version, action):
    root = add_version()
    child = add_version("merged", parents=[root])
    said(ledger, root)

    for version, words in ((root, "translate:v1 was recalled"), (child, "merged:v1 is made of translate:v1")):
        with pytest.raises(Recalled, match=words):
            ledger.move_stage(
                version.adapter_id,
                "production",
                version_id=version.id,
                expected=None,
                action=action,
                actor="ada",
                reason="",
            )

    assert ledger.stages() == {}
    said(ledger, root, "undo")
    ledger.move_stage(
        child.adapter_id, "production", version_id=child.id, expected=None, action=action, actor="ada", reason=""
    )


def test_a_promotion_and_a_recall_at_once_never_miss_each_other(ledger, add_version):
    """Either the promotion is refused, or the recall's look at the stages afterwards finds it."""
    for number in range(8):
        version = add_version(f"a{number}")
        refused = []
        start = threading.Barrier(2)

        def promote(version=version, refused=refused, start=start):
            start.wait()
            try:
                ledger.move_stage(
                    version.adapter_id,
                    "production",
                    version_id=version.id,
                    expected=None,
                    action="promote",
                    actor="ada",
                    reason="",
                )
            except Recalled:
                refused.append(version)

        thread = threading.Thread(target=promote)
        thread.start()
        start.wait()
        said(ledger, version)
        seen = ledger.stages()
        thread.join()

        assert bool(refused) != (version.adapter_id in ledger.stages())
        assert (version.adapter_id in seen) == (version.adapter_id in ledger.stages())


class Silent:
    def ring(self, job_id: str) -> None:
        """Nobody is there."""


def test_a_recall_of_a_root_with_500_descendants_names_exactly_the_stages_that_serve_them(ledger, add_version):
    root = add_version("g0")
    served = _add_family(ledger, root, generations=20, width=25)[::50]
    for label, version_id, adapter_id in served:
        ledger.move_stage(
            adapter_id, "production", version_id=version_id, expected=None, action="promote", actor="ada", reason=label
        )

    impact = recall(ledger, Silent(), root, "recall", actor="ada", reason="leaked")

    assert len(set(impact.descendants)) == 500
    assert {hit.ref for hit in impact.stages} == {label for label, _, _ in served}


def _add_family(ledger, root, *, generations: int, width: int) -> list[tuple[str, str, str]]:
    """Descendants of `root` in one transaction, each of one or two of the generation before: label, id, adapter id."""
    made, parents = [], [root.id]
    detail = ledger.detail(root.id)
    adapters = [ledger.ensure_adapter(f"g{depth}") for depth in range(1, generations + 1)]
    with ledger._db.write() as connection:
        for depth, adapter_id in enumerate(adapters, start=1):
            ids = [str(uuid6.uuid7()) for _ in range(width)]
            for number, version_id in enumerate(ids, start=1):
                digest = f"{depth * width + number:064x}"
                spec = NewVersion(
                    adapter=f"g{depth}", kind="merge", content_digest=digest, recipe_digest=digest,
                    base=root.spec.base, facts=detail.facts,
                )  # fmt: skip
                _insert_version(connection, version_id, adapter_id, spec, Placement(number, "m", "r", "l", ()), "ada")
                of = dict.fromkeys([parents[number % len(parents)], parents[-1]])
                _insert_edges(connection, [Edge(version_id, i, each, "merge", 1.0) for i, each in enumerate(of)])
                made.append((f"g{depth}:v{number}", version_id, adapter_id))
            parents = ids
    return made

"""Attacks on a history, each named; and approvals, which are rows of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace

import pytest

from adapterctl.registry.domain.errors import InvalidInput
from adapterctl.registry.domain.stage import (
    GENESIS,
    Head,
    StageAction,
    StageEvent,
    approvals,
    read_head,
    verify_chain,
    verify_head,
)


def chained(*events: StageEvent) -> list[StageEvent]:
    """The events as they are written: numbered, each sealed onto the one before."""
    chain: list[StageEvent] = []
    for seq, event in enumerate(events, start=1):
        before = chain[-1].hash if chain else GENESIS
        chain.append(replace(event, seq=seq, prev_hash=before).sealed())
    return chain


def event(version: str, *, action: StageAction = "promote", actor: str = "ada", **more: str) -> StageEvent:
    return StageEvent(0, "a", "production", action, version, None, actor, "why", 1.0, "", **more)


@pytest.fixture
def history() -> list[StageEvent]:
    return chained(*(event(f"v{number}") for number in range(1, 6)))


def head_of(events: Sequence[StageEvent]) -> Head:
    return Head(registry="r", name="chat", seq=events[-1].seq, hash=events[-1].hash, time="2026-01-01T00:00:00Z")


def test_an_untouched_history_holds_with_and_without_evidence():
    mixed = chained(event("v1"), event("v2", evidence="e" * 64), event("v3"))

    assert verify_chain(mixed) == []
    assert verify_head(mixed, head_of(mixed[:2])) == []
    assert verify_head(mixed, mixed[1].hash) == []


def test_the_hash_of_a_row_without_evidence_is_what_it_was_before_there_was_any():
    (row,) = chained(event("v1"))

    # computed by the release that knew no evidence
    assert row.hash == "27a5ef98d4745721a11eeb198bfea1d1ea92ba950d1e8e27b00da5e246913041"
    assert replace(row, evidence="e" * 64).sealed().hash != row.hash


def test_an_edited_row_is_named(history):
    history[2] = replace(history[2], reason="another")

    assert verify_chain(history) == ["row 3 was edited: its hash does not match its content"]


def test_changed_evidence_is_an_edit():
    history = chained(event("v1", evidence="e" * 64), event("v2"))
    history[0] = replace(history[0], evidence=None)

    assert verify_chain(history) == ["row 1 was edited: its hash does not match its content"]


def test_an_edited_row_that_was_sealed_anew_is_named_by_the_row_after_it(history):
    history[2] = replace(history[2], reason="another").sealed()

    assert verify_chain(history) == ["row 4 does not follow what is before it: row 3 was edited and sealed anew"]


def test_a_deleted_row_is_named(history):
    assert verify_chain([history[0], *history[2:]]) == ["row 2 was removed"]
    assert verify_chain([history[0], history[4]]) == ["row 2 to 4 were removed"]
    assert verify_chain(history[1:]) == ["row 1 was removed"]


def test_a_deleted_row_is_named_when_the_others_were_renumbered(history):
    renumbered = [history[0], *(replace(row, seq=row.seq - 1) for row in history[2:])]

    findings = verify_chain(renumbered)

    assert findings[0] == "row 2 was row 3 when it was written: rows were removed or renumbered"


def test_swapped_rows_are_named(history):
    history[1], history[3] = replace(history[3], seq=2), replace(history[1], seq=4)

    assert verify_chain(history) == ["rows 2 and 4 were swapped"]


def test_a_cut_history_is_named_by_a_head_that_was_kept(history):
    head = head_of(history)

    assert verify_chain(history[:3]) == []
    assert verify_head(history[:3], head) == ["the history ends at row 3, row 5 was kept: it was cut"]
    assert verify_head([], head) == ["the history ends at row 0, row 5 was kept: it was cut"]


def test_a_history_that_was_written_anew_is_named_by_a_head_that_was_kept(history):
    anew = chained(*(event(f"v{number}", actor="eve") for number in range(1, 7)))

    assert verify_chain(anew) == []
    assert verify_head(anew, head_of(history)) == ["row 5 is not the one that was kept: the history was written anew"]
    assert "cut or written anew" in verify_head(anew, history[-1].hash)[0]


def test_a_head_is_read_as_it_was_exported_or_as_a_bare_hash(history):
    head = head_of(history)

    signed = replace(head, signature="c2ln")
    assert read_head(json.dumps(head.to_json())) == read_head(json.dumps(asdict(head))) == head
    assert read_head(json.dumps(signed.to_json())) == signed
    assert signed.signed_bytes == head.signed_bytes
    assert read_head(f"{head.hash}\n") == head.hash
    for bad in ("", "f" * 63, "[]", '{"seq": 1}', json.dumps(asdict(head) | {"hash": "x"}), "[" * 10_000):
        with pytest.raises(InvalidInput, match="no head"):
            read_head(bad)


def test_approvals_count_once_a_person_and_can_be_withdrawn():
    events = chained(
        event("v1", action="approve"),
        event("v1", action="approve"),
        event("v1", action="approve", actor="bob"),
        event("v2", action="approve", actor="eve"),
        event("v1", action="withdraw"),
        event("v1", action="withdraw", actor="eve"),
    )

    assert approvals(events[:4], "v1", "production") == ("ada", "bob")
    assert approvals(events, "v1", "production") == ("bob",)
    assert approvals(events, "v1", "staging") == ()

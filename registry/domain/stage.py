"""Which version serves a stage, and the history of how it came to: append-only, each row chained to the one before.

The chain makes an edit, a deletion or a swap inside the history visible. Truncation and a rewrite from the start are
visible only against a head that was kept elsewhere. Approvals are rows of the same chain, and so are notes: that the
adapter was renamed, that a version was tagged or signed, and what people did to it in MLflow. A note about no stage has
an empty one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from .digest import canonical_json, json_digest
from .errors import InvalidInput

#: `force` is a promotion or adoption that its gate had refused.
MoveAction = Literal["promote", "force", "rollback", "demote", "adopt"]
ApprovalAction = Literal["approve", "withdraw"]
#: `rename`: the adapter has another name since. `mlflow`: done in MLflow past us, where a server saw it. `tag`: tags of
#: a version were set or removed. `sign`: someone handed in a signature of a version, by the key that the reason names.
NoteAction = Literal["rename", "mlflow", "tag", "sign"]
StageAction = MoveAction | ApprovalAction | NoteAction
GENESIS = "0" * 64
#: MLflow knows these two stages only, in this order of rank; other stages of ours are aliases alone.
LEGACY_STAGES = {"production": "Production", "staging": "Staging"}
_HASH = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class StageEvent:
    """One row of the history. `version_id` is None when the stage was emptied.

    `evidence` is the digest of the decision that the move stood on. Rows from before there were gates have none, and
    their hashes do not cover that it is missing.
    """

    seq: int
    adapter_id: str
    stage: str
    action: StageAction
    version_id: str | None
    previous_id: str | None
    actor: str
    reason: str
    at: float
    prev_hash: str
    hash: str = ""
    evidence: str | None = None

    @property
    def moves(self) -> bool:
        return self.action in get_args(MoveAction)

    def sealed(self) -> StageEvent:
        """The same event with its hash: SHA-256 of the canonical JSON of every other field."""
        body = asdict(self)
        del body["hash"]
        if self.evidence is None:
            del body["evidence"]
        return replace(self, hash=json_digest(body))


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """The end of a history as it was at some time, to be kept where the history is not, or signed."""

    registry: str
    name: str
    seq: int
    hash: str
    time: str
    signature: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Every field but a signature that is not there."""
        body = asdict(self)
        if self.signature is None:
            del body["signature"]
        return body

    @property
    def signed_bytes(self) -> bytes:
        """What a signature is of: the canonical JSON of the other fields."""
        return canonical_json(replace(self, signature=None).to_json())


def read_head(text: str) -> Head | str:
    """An exported head, or the bare hash of a last row. Raises `InvalidInput` for anything else."""
    text = text.strip()
    if _HASH.fullmatch(text):
        return text
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    kinds = {name: int if name == "seq" else str for name in Head.__dataclass_fields__}
    fields = {key: item for key, item in value.items() if item is not None} if isinstance(value, dict) else {}
    if {"signature": str} | {key: type(item) for key, item in fields.items()} == kinds:
        head = Head(**fields)
        if _HASH.fullmatch(head.hash):
            return head
    raise InvalidInput(f"{text[:80]!r} is no head of a history", hint="adapterctl history NAME --export-head FILE")


def approvals(events: Sequence[StageEvent], version_id: str, stage: str) -> tuple[str, ...]:
    """Who approves of this version for this stage now, in the order in which they came to."""
    found: dict[str, None] = {}
    for event in events:
        if (event.version_id, event.stage) != (version_id, stage):
            continue
        if event.action == "approve":
            found[event.actor] = None
        elif event.action == "withdraw":
            found.pop(event.actor, None)
    return tuple(found)


def verify_chain(events: Sequence[StageEvent]) -> list[str]:
    """What is wrong with a history that is ordered by `seq`; empty when every link holds."""
    findings = []
    moved = {event.seq: original for event in events if (original := _number_when_sealed(event, events)) != event.seq}
    for here, there in moved.items():
        if there is None:
            findings.append(f"row {here} was edited: its hash does not match its content")
        elif moved.get(there) != here:
            findings.append(f"row {here} was row {there} when it was written: rows were removed or renumbered")
        elif here < there:
            findings.append(f"rows {here} and {there} were swapped")
    previous, expected = GENESIS, 1
    for event in events:
        if event.seq > expected:
            findings.append(f"row {_span(expected, event.seq - 1)} removed")
        elif event.prev_hash != previous and event.seq not in moved and event.seq - 1 not in moved:
            before = (
                f"row {event.seq - 1} was edited and sealed anew" if event.seq > 1 else "rows before it were removed"
            )
            findings.append(f"row {event.seq} does not follow what is before it: {before}")
        previous, expected = event.hash, event.seq + 1
    return findings


def verify_head(events: Sequence[StageEvent], head: Head | str) -> list[str]:
    """Compare a history with its head of an earlier time: was it cut at its end, or written anew?"""
    if isinstance(head, str):
        if head in (GENESIS, *(event.hash for event in events)):
            return []
        return [f"no row has the hash {head} that was kept: the history was cut or written anew"]
    if head.seq == 0:
        return []
    there = next((event for event in events if event.seq == head.seq), None)
    if there is None:
        last = events[-1].seq if events else 0
        return [f"the history ends at row {last}, row {head.seq} was kept: it was cut"]
    if there.hash != head.hash:
        return [f"row {head.seq} is not the one that was kept: the history was written anew"]
    return []


def _number_when_sealed(event: StageEvent, events: Sequence[StageEvent]) -> int | None:
    """The number that the row's hash was made with; None where its content was edited as well."""
    if event.sealed().hash == event.hash:
        return event.seq
    for number in range(1, events[-1].seq + len(events) + 1):
        if replace(event, seq=number).sealed().hash == event.hash:
            return number
    return None


def _span(first: int, last: int) -> str:
    return f"{first} was" if first == last else f"{first} to {last} were"


def legacy_stage(stages_held: Sequence[str]) -> str:
    """MLflow's deprecated stage for a version that holds these stages: the highest of the two, else 'None'."""
    return next((LEGACY_STAGES[name] for name in LEGACY_STAGES if name in stages_held), "None")

"""Which version serves a stage, and the history of how it came to: append-only, each row chained to the one before.

The chain makes an edit, a deletion or a swap inside the history visible. Truncation and a rewrite from the start are
visible only against a head that was kept elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from .digest import json_digest

StageAction = Literal["promote", "rollback", "demote", "adopt"]
GENESIS = "0" * 64
#: MLflow knows these two stages only, in this order of rank; other stages of ours are aliases alone.
LEGACY_STAGES = {"production": "Production", "staging": "Staging"}


@dataclass(frozen=True, slots=True)
class StageEvent:
    """One change of a stage. `version_id` is None when the stage was emptied."""

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

    def sealed(self) -> StageEvent:
        """The same event with its hash: SHA-256 of the canonical JSON of every other field."""
        body = asdict(self)
        del body["hash"]
        return StageEvent(**body, hash=json_digest(body))


def verify_chain(events: Sequence[StageEvent]) -> list[str]:
    """What is wrong with a history that is ordered by `seq`; empty when every link holds."""
    findings = []
    previous = GENESIS
    for position, event in enumerate(events, start=1):
        if event.seq != position:
            findings.append(f"row {position} has number {event.seq}: a row was removed or inserted")
        if event.sealed().hash != event.hash:
            findings.append(f"row {event.seq} was edited: its hash does not match its content")
        if event.prev_hash != previous:
            findings.append(f"row {event.seq} does not follow the row before it")
        previous = event.hash
    return findings


def legacy_stage(stages_held: Sequence[str]) -> str:
    """MLflow's deprecated stage for a version that holds these stages: the highest of the two, else 'None'."""
    return next((LEGACY_STAGES[name] for name in LEGACY_STAGES if name in stages_held), "None")

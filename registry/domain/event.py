"""What happened in a registry, one thing after another: the kinds of events, and what each of them says.

An event is a pointer to a fact that is recorded elsewhere: a version, a row of a history, a recall, a gate file.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from .errors import InvalidInput
from .recall import RecallAction
from .stage import MoveAction, StageAction

#: `register` and `merge`: a new version. `gates`: other gates count. The others are the actions of a history.
EventKind = Literal["register", "merge", "remove", "recall", "undo_recall", "gates"] | StageAction
RECALLS: dict[RecallAction, EventKind] = {"recall": "recall", "undo": "undo_recall"}
KINDS: tuple[EventKind, ...] = (
    *("register", "merge", "remove", "recall", "undo_recall", "gates"),
    *(action for actions in get_args(StageAction) for action in get_args(actions)),
)
#: One word for every way in which a stage gets another version, or none.
MOVE = "move"


@dataclass(frozen=True, slots=True)
class Event:
    """`id` orders the events of a registry as they became visible. `at` is in seconds, by the database's clock.

    `ref` is the version that it is about; `previous` held the stage before, where a stage moved. `name` is what the
    adapter is called now, None where the whole registry is meant. `evidence` is the digest of a move's decision.
    """

    id: int
    at: float
    kind: EventKind
    name: str | None
    ref: str | None
    stage: str
    previous: str | None
    actor: str
    reason: str
    evidence: str | None


def read_kinds(words: Iterable[str]) -> tuple[EventKind, ...]:
    """The kinds that are meant, `move` for all moves of a stage. Raises `InvalidInput` for a word that is none."""
    groups: dict[str, tuple[EventKind, ...]] = {kind: (kind,) for kind in KINDS} | {MOVE: get_args(MoveAction)}
    words = list(words)
    unknown = [word for word in words if word not in groups]
    if unknown:
        raise InvalidInput(f"{unknown[0][:80]!r} is no kind of event", hint=f"known: {', '.join((*KINDS, MOVE))}")
    return tuple(dict.fromkeys(kind for word in words for kind in groups[word]))

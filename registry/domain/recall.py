"""A recall: people should stop using this version and all that was made of it. Said and taken back, never edited.

Whether a version is recalled follows from these rows, the edges and the content digests each time it is asked: the
same bytes have the same fault, under whatever name. Nothing is copied to descendants, so one that is registered later
is recalled from its first moment.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from .errors import InvalidInput
from .version import EdgeKind

RecallAction = Literal["recall", "undo"]
#: A version is made of its parents along these edges. One that supersedes another is its cure, and not made of it.
DESCENT: tuple[EdgeKind, ...] = ("merge", "trained_from", "imported")
MAX_REASON = 5000


@dataclass(frozen=True, slots=True)
class Recall:
    """One row: `version_id` was recalled, or its recall was taken back."""

    version_id: str
    action: RecallAction
    reason: str
    actor: str
    at: float


#: The recall that hits a version, by the version's id: its own, or that of its nearest recalled ancestor.
Recalls = Mapping[str, Recall]


def check_reason(reason: str) -> str:
    """Return `reason` or raise `InvalidInput`: whoever meets a recalled version has to know why."""
    if not reason.strip() or len(reason) > MAX_REASON:
        raise InvalidInput(
            f"a recall needs a reason, {len(reason):,} characters were given",
            hint=f"--reason 'trained on leaked data', at most {MAX_REASON:,} characters",
        )
    return reason

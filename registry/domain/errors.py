"""Every error that adapterctl raises on purpose: one tree, each with a stable code and a next step.

    AdapterctlError
    ├── InvalidInput            the request itself is wrong
    │   └── Misconfigured       settings or stores that do not belong together
    ├── NotFound                a name, version, job or file that is not there
    ├── NotAllowed              the caller lacks the right, or the place is read-only
    ├── Refused                 a rule says no; nothing was changed
    │   ├── InvalidAdapter      intake: the files are not an adapter that we can prove
    │   ├── IncompatibleParents preflight: these parents cannot be merged exactly
    │   ├── LossTooHigh         the merge would lose more than --max-loss
    │   ├── ReceiptFailed       what a merge wrote is not what it should have written
    │   ├── Recalled            the version, or one that it is made of, was recalled
    │   ├── GateRefused         a version does not meet the conditions of the stage
    │   ├── StageMoved          the stage is not where the caller (or the ledger) says
    │   └── HasDescendants      deletion of a version that others descend from
    ├── Conflict                another writer was first; try again
    ├── Corrupt                 stored bytes are not what the manifest says
    ├── Unavailable             a store, folder or extra that is needed cannot be used
    │   └── TooManyRequests     asked too often, or for too much at once; ask again after a while
    ├── JobFailed / JobCancelled / WaitTimedOut

A message says what happened with the value and what was expected; `hint` says what to do next. No error knows
an exit code or an HTTP status: each surface keeps its own table, and a test checks that no class is missing there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, slots=True)
class Problem:
    """One finding of a check that reports all of its findings at once."""

    code: str
    message: str
    hint: str = ""


class AdapterctlError(Exception):
    """Base of all errors; `problems` carries every finding where a check has several.

    `abroad` is what callers on other machines are told in place of a message that names addresses or folders of ours.
    """

    code: ClassVar[str] = "failure"

    def __init__(
        self, message: str, *, hint: str = "", problems: Sequence[Problem] = (), abroad: str | None = None
    ) -> None:
        super().__init__(message)
        self.abroad = abroad or message
        self.message = message
        self.hint = hint
        self.problems = tuple(problems)


class InvalidInput(AdapterctlError):
    code = "invalid_input"


class Misconfigured(InvalidInput):
    code = "misconfigured"


class NotFound(AdapterctlError):
    code = "not_found"


class NotAllowed(AdapterctlError):
    code = "not_allowed"


class Refused(AdapterctlError):
    code = "refused"


class InvalidAdapter(Refused):
    code = "invalid_adapter"


class IncompatibleParents(Refused):
    code = "incompatible_parents"


class LossTooHigh(Refused):
    code = "loss_too_high"


class ReceiptFailed(Refused):
    code = "receipt_failed"


class Recalled(Refused):
    code = "recalled"

    @classmethod
    def of(cls, label: str, recalled: str, reason: str, what: str) -> Recalled:
        """`label` was recalled, itself or by way of the version `recalled`; `what` is to be done instead."""
        words = cls.words(label, recalled, reason)
        return cls(words, hint=f"{what}; or, once it is good: adapterctl recall --undo {recalled}")

    @staticmethod
    def words(label: str, recalled: str, reason: str) -> str:
        through = f"{label} was recalled" if label == recalled else f"{label} is made of {recalled}, which was recalled"
        return f"{through}: {reason}"


class GateRefused(Refused):
    code = "gate_refused"


class StageMoved(Refused):
    code = "stage_moved"


class DecisionOutdated(StageMoved):
    """What a decision stood on was changed before the stage could move: gates, approvals, tags."""

    code = "decision_outdated"


class HasDescendants(Refused):
    code = "has_descendants"


class Conflict(AdapterctlError):
    code = "conflict"


class Corrupt(AdapterctlError):
    code = "corrupt"


class Unavailable(AdapterctlError):
    code = "unavailable"

    def though(self, done: str, *, hint: str) -> Unavailable:
        """The same where something was `done` before it, so that nobody takes it for undone."""
        return Unavailable(f"{self.message}; {done}", hint=hint, abroad=f"{self.abroad}; {done}")


class TooManyRequests(Unavailable):
    """`wait_s` is how long to wait before asking again."""

    code = "too_many_requests"

    def __init__(self, message: str, *, hint: str = "", problems: Sequence[Problem] = (), wait_s: float = 1.0) -> None:
        super().__init__(message, hint=hint, problems=problems)
        self.wait_s = wait_s


class JobFailed(AdapterctlError):
    code = "job_failed"


class JobCancelled(AdapterctlError):
    code = "job_cancelled"


class WaitTimedOut(AdapterctlError):
    code = "wait_timed_out"


def raise_all(error: type[AdapterctlError], summary: str, problems: Sequence[Problem], *, hint: str = "") -> None:
    """Raise `error` with every problem in its message; do nothing when there is none."""
    if not problems:
        return
    lines = "".join(f"\n  {p.code}: {p.message}" + (f" ({p.hint})" if p.hint else "") for p in problems)
    raise error(f"{summary}{lines}", hint=hint, problems=problems)

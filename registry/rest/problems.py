"""Errors on the wire: every class of `domain/errors.py` as an RFC 9457 problem, and back.

A problem carries `code`, `hint` and `errors`, all findings of the check that refused. Clients go by the code, people
and proxies by the status.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from ..domain import errors
from ..domain.errors import AdapterctlError, Problem, TooManyRequests, Unavailable

MEDIA_TYPE = "application/problem+json"
RETRY_AFTER_S = 1

#: Every class of `domain/errors.py` has its row; a test sees to it.
STATUS: Mapping[type[AdapterctlError], int] = MappingProxyType(
    {
        errors.AdapterctlError: 500,
        errors.InvalidInput: 400,
        errors.Misconfigured: 500,
        errors.NotFound: 404,
        errors.NotAllowed: 403,
        errors.Refused: 422,
        errors.InvalidAdapter: 422,
        errors.IncompatibleParents: 422,
        errors.LossTooHigh: 422,
        errors.ReceiptFailed: 422,
        errors.Recalled: 409,
        errors.GateRefused: 422,
        errors.StageMoved: 409,
        errors.DecisionOutdated: 409,
        errors.HasDescendants: 409,
        errors.Conflict: 409,
        errors.Corrupt: 500,
        errors.Unavailable: 503,
        errors.TooManyRequests: 429,
        errors.JobFailed: 424,
        errors.JobCancelled: 410,
        errors.WaitTimedOut: 408,
    }
)


@dataclass(frozen=True, slots=True)
class ProblemView:
    """RFC 9457; `errors` are all findings of the check that refused."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    hint: str
    errors: Sequence[Problem]
    request_id: str


#: For the description of every route.
RESPONSES: dict[int | str, dict[str, Any]] = {"4XX": {"model": ProblemView, "content": {MEDIA_TYPE: {}}}}


def status_of(error: AdapterctlError) -> int:
    return next(STATUS[kind] for kind in type(error).__mro__ if kind in STATUS)


def retry_after(error: Unavailable) -> str:
    """The header that goes with it."""
    return str(max(1, round(error.wait_s)) if isinstance(error, TooManyRequests) else RETRY_AFTER_S)


def to_problem(error: AdapterctlError, *, status: int | None = None, request_id: str = "") -> dict[str, Any]:
    """The body of the answer to a request that met `error`."""
    return {
        "type": f"urn:adapterctl:problem:{error.code}",
        "title": error.code.replace("_", " "),
        "status": status or status_of(error),
        "detail": error.abroad,
        "code": error.code,
        "hint": error.hint,
        "errors": [{"code": p.code, "message": p.message, "hint": p.hint} for p in error.problems],
        "request_id": request_id,
    }


def from_problem(status: int, body: bytes) -> AdapterctlError:
    """The error that a server met; one that does not speak our language becomes `Unavailable`."""
    try:
        said = json.loads(body)
        kind = _BY_CODE.get(said["code"], AdapterctlError)
        problems = [Problem(p["code"], p["message"], p.get("hint", "")) for p in said.get("errors", ())]
        return kind(said["detail"], hint=said.get("hint", ""), problems=problems)
    except (ValueError, KeyError, TypeError, AttributeError):
        return errors.Unavailable(
            f"the server answered with status {status} and no reason",
            hint="is that the address of an adapterctl server?",
        )


def _classes(kind: type[AdapterctlError]) -> Iterator[type[AdapterctlError]]:
    yield kind
    for below in kind.__subclasses__():
        yield from _classes(below)


_BY_CODE: Mapping[str, type[AdapterctlError]] = {kind.code: kind for kind in _classes(AdapterctlError)}

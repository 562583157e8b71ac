"""The door of a served registry: every request passes it, MLflow's too, before any of it is read.

In this order: the host that was asked for, the page that a browser asks from, the size, who asks, how often, and for
MLflow's part what that caller may do there. Our own routes check scopes themselves. Each answer carries a request id
and leaves one line in the log, which holds no header, no query and no body.
"""

from __future__ import annotations

import base64
import binascii
import json
import logging
import math
import re
import time
import uuid
from asyncio import Lock
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Container, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from prometheus_client import CollectorRegistry, Counter, Histogram
from starlette.concurrency import run_in_threadpool

from ..domain.access import Caller, Scope, secret_digest
from ..domain.errors import AdapterctlError, InvalidInput, NotAllowed, TooManyRequests
from . import mlflow_rules
from .problems import MEDIA_TYPE, retry_after, status_of, to_problem

ASGI = Callable[..., Awaitable[Any]]
Message = MutableMapping[str, Any]

JSON_BYTES = 1 << 20
#: A suite comes with its rows, a report with its samples.
LARGE_JSON_BYTES = 32 << 20
OPEN_PATHS = ("/healthz", "/readyz")
#: Where one of them is, a proxy passed the request on: who asks may be anywhere, though the connection is from here.
FORWARDED = (b"forwarded", b"via", b"x-forwarded-for", b"x-forwarded-host", b"x-forwarded-proto", b"x-real-ip")
#: How long a caller that was looked up is believed; a token that another server revoked works that much longer.
REMEMBERED_S = 2.0
_UNSAFE = ("POST", "PUT", "PATCH", "DELETE")
_METHODS = frozenset({"GET", "HEAD", "OPTIONS", *_UNSAFE})
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_ARTIFACTS = re.compile(r"/(ajax-api|api)/\d\.\d/(mlflow-artifacts/|mlflow/upload-artifact)")
_LARGE = ("/v1/suites", "/v1/reports")
_UPLOAD = re.compile(r"/v1/adapters/[^/]+/versions")

_log = logging.getLogger("adapterctl.http")
_errors = logging.getLogger("adapterctl.rest")


@dataclass(frozen=True, slots=True)
class Rules:
    """`hosts` are names without a port, `*.` means all below a name. `streams` of events are open at once, at most.

    `anyone` is every caller who brings no token, as long as none was made and no proxy passes the request on.
    """

    hosts: tuple[str, ...]
    upload_bytes: int
    requests_per_minute: int = 6000
    failures_per_minute: int = 30
    streams: int = 200
    streams_per_token: int = 50
    anyone: Caller | None = None


def everyone(name: str) -> Caller:
    """Who every caller is on a server without tokens, which answers on this machine only."""
    return Caller(name, Scope.ADMIN)


@dataclass(slots=True)
class Metrics:
    """Figures of this process for Prometheus."""

    registry: CollectorRegistry = field(default_factory=CollectorRegistry)
    requests: Counter = field(init=False)
    seconds: Histogram = field(init=False)

    def __post_init__(self) -> None:
        labels = ["method", "area", "status"]
        self.requests = Counter("adapterctl_requests", "Requests answered.", labels, registry=self.registry)
        self.seconds = Histogram(
            "adapterctl_request_seconds", "Time to the end of the answer.", ["area"], registry=self.registry
        )


class Door:
    """ASGI middleware. `lookup` finds the caller of a secret in the ledger; of the empty one, who brings none.

    `digests` are those of all secrets that are valid.
    """

    def __init__(
        self,
        app: ASGI,
        rules: Rules,
        lookup: Callable[[str], Caller | None],
        digests: Callable[[], Container[str]],
        metrics: Metrics,
        areas: Container[str],
        witness: Callable[[Caller, str, Mapping[str, Any]], None] = lambda caller, deed, said: None,
    ) -> None:
        """`areas` are the beginnings of our paths; no label of a metric is something a stranger made up.

        `witness` is told who changed what in MLflow, once it is done: the caller, the deed, the body of the request.
        """
        self._app = app
        self._witness = witness
        self._areas = areas
        self._rules = rules
        self._metrics = metrics
        self._callers = _Callers(lookup, digests)
        self._uses = _Buckets(rules.requests_per_minute)
        self._failures = _Buckets(rules.failures_per_minute)

    async def __call__(self, scope: Message, receive: ASGI, send: ASGI) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        visit = _Visit(scope)
        state = scope.setdefault("state", {})
        state["request_id"] = visit.request_id
        answer = _Answer(send, visit)
        try:
            limit = self._check(visit)
            caller = await self._identify(visit)
            visit.caller = caller.name if caller else ""
            state["caller"] = caller
            state["still_valid"] = partial(self._is_valid, visit, caller)
            none = _none_of_mlflow(visit, caller)
            if none is not None:
                await answer.send_json(none)
                return
            limited = _limited(receive, limit, visit)
            if _check_mlflow(visit, caller) is Scope.MERGE:
                limited = await _within_merge(limited, caller)
            heard = _Heard(limited, visit)
            await self._app(scope, heard, answer)
            if caller is not None and answer.status == 200 and (deed := heard.deed()) is not None:
                await run_in_threadpool(self._witness, caller, *deed)
        except AdapterctlError as error:
            await answer.problem(error)
        finally:
            self._note(visit, answer)

    def forget_callers(self) -> None:
        """A token was made or revoked here: look everyone up again."""
        self._callers.forget()

    def _check(self, visit: _Visit) -> int:
        """Host, origin and announced size; returns the bytes that the body may have."""
        hosts = self._rules.hosts
        if not _is_among(visit.header(b"host"), hosts):
            raise _Closed(421, f"this server does not answer for {visit.header(b'host')[:80]!r}", "set allowed_hosts")
        if visit.method in _UNSAFE:
            origin, site = visit.header(b"origin"), visit.header(b"sec-fetch-site")
            # a browser that says where a page is from means its port, too, which a proxy may have taken from the host
            if (origin and not _is_among(urlsplit(origin).netloc, hosts)) or site not in ("", "same-origin", "none"):
                raise NotAllowed("a page of another site asked for this", hint="only pages of this server may")
        if not visit.path.isprintable():
            # a rule and a route may take the end of a line for something else
            raise InvalidInput(
                f"the path {visit.path[:80]!r} has letters that cannot be printed", hint="leave them out"
            )
        limit = self._body_limit(visit)
        announced = visit.header(b"content-length")
        if announced and (not announced.isdigit() or int(announced) > limit):
            raise _Closed(413, f"the body is larger than {limit:,} bytes", "")
        return limit

    def _body_limit(self, visit: _Visit) -> int:
        if visit.path in _LARGE:
            return LARGE_JSON_BYTES
        uploads = visit.header(b"content-type").startswith("multipart/") and _UPLOAD.fullmatch(visit.path)
        if uploads or _ARTIFACTS.match(visit.path):
            return self._rules.upload_bytes
        return JSON_BYTES if visit.is_ours else LARGE_JSON_BYTES

    async def _identify(self, visit: _Visit) -> Caller | None:
        """Who asks. Raises where nobody valid does, or too often."""
        if visit.path in OPEN_PATHS:
            return None
        secret = _secret(visit.header(b"authorization"))
        said = "no token was given" if secret is None else "this token is not valid"
        if secret is None and self._rules.anyone is not None:
            if not any(map(visit.header, FORWARDED)):
                if anyone := await self._callers.find(""):
                    return anyone
            else:
                said += ", and a proxy passed this on: only this machine itself needs none"
        wait_s = self._failures.wait(visit.address, 0)
        if wait_s and not (secret and await self._callers.is_known(secret)):
            raise _too_many(wait_s)
        caller = await self._callers.find(secret) if secret else None
        if caller is None:
            self._failures.take(visit.address)
            raise _Unknown(said)
        if wait_s := self._uses.take(caller.token_id):
            raise _too_many(wait_s)
        return caller

    async def _is_valid(self, visit: _Visit, caller: Caller | None) -> bool:
        """Whether the token that opened an answer counts still; for answers that go on for long."""
        try:
            return await self._callers.find(_secret(visit.header(b"authorization")) or "") == caller
        except AdapterctlError:
            return False

    def _note(self, visit: _Visit, answer: _Answer) -> None:
        seconds = time.perf_counter() - visit.began
        status = answer.status or 499  # the client left before it was answered
        area = area_of(visit.path)
        area = area if area in self._areas else "mlflow"
        method = visit.method if visit.method in _METHODS else "other"
        self._metrics.requests.labels(method, area, str(status)).inc()
        self._metrics.seconds.labels(area).observe(seconds)
        line = {
            "request_id": visit.request_id,
            "method": visit.method,
            "path": visit.path[:300],
            "status": status,
            "ms": round(seconds * 1000, 1),
            "caller": visit.caller,
            "address": visit.address,
        }
        _log.info("%s", json.dumps(line))


class _Closed(InvalidInput):
    """Refused before it was read, with a status of its own."""

    def __init__(self, status: int, message: str, hint: str) -> None:
        super().__init__(message, hint=hint)
        self.status = status


class _Unknown(NotAllowed):
    """Nobody valid asks."""

    def __init__(self, message: str) -> None:
        super().__init__(message, hint="adapterctl login SERVER, or set ADAPTERCTL_TOKEN")


def _too_many(wait_s: float) -> TooManyRequests:
    return TooManyRequests("too many requests", hint=f"try again in {wait_s:.0f} s", wait_s=wait_s)


class _Visit:
    """One request as the door sees it."""

    def __init__(self, scope: Message) -> None:
        self.began = time.perf_counter()
        self.caller = ""
        self.too_large: AdapterctlError | None = None
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.address: str = (scope.get("client") or ("unknown",))[0]
        self._headers = scope["headers"]
        given = self.header(b"x-request-id")
        self.request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex

    def header(self, name: bytes) -> str:
        """The one value of a header; several are joined, so that none is overlooked."""
        return b",".join(value for key, value in self._headers if key == name).decode("latin-1")

    @property
    def is_ours(self) -> bool:
        return is_ours(self.path)


def is_ours(path: str) -> bool:
    """Whether we answer for a path, be it with 404. What is not ours is MLflow's, and judged by its rules."""
    return path.startswith(("/v1/", "/adapters/")) or path in (*OPEN_PATHS, "/metrics", "/v1", "/adapters")


def area_of(path: str) -> str:
    """What the figures count a path under: `/v1/jobs`, `/adapters`."""
    return "/".join(path.split("/")[: 3 if path.startswith("/v1/") else 2])


class _Answer:
    """`send`, which adds our headers and remembers the status."""

    def __init__(self, send: ASGI, visit: _Visit) -> None:
        self._send = send
        self._visit = visit
        self.status = 0

    async def __call__(self, message: Message) -> None:
        if self._visit.too_large is not None:
            # whoever read the body takes our refusal for an error of its own, and answers in its own words
            if not self.status:
                too_large, self._visit.too_large = self._visit.too_large, None
                await self.problem(too_large)
                self._visit.too_large = too_large
            return
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = list(message.get("headers", ()))
            named = {name.lower() for name, _ in headers}
            ours = [(b"x-request-id", self._visit.request_id.encode()), (b"x-content-type-options", b"nosniff")]
            ours += [(b"cache-control", b"no-store")] if self._visit.is_ours and b"cache-control" not in named else []
            message = {**message, "headers": [*headers, *(each for each in ours if each[0] not in named)]}
        await self._send(message)

    async def problem(self, error: AdapterctlError) -> None:
        """Answer with a problem; nothing can be said where the answer has begun."""
        if self.status:
            raise error
        status, extra = _status_and_headers(error)
        if status >= 500:
            _errors.warning("%s: %s", self._visit.request_id, error.message)
        body = json.dumps(to_problem(error, status=status, request_id=self._visit.request_id)).encode()
        await self.send_json(body, status, MEDIA_TYPE, extra)

    async def send_json(
        self,
        body: bytes,
        status: int = 200,
        media_type: str = "application/json",
        extra: Sequence[tuple[bytes, bytes]] = (),
    ) -> None:
        """Answer with this text."""
        headers = [(b"content-type", media_type.encode()), (b"content-length", str(len(body)).encode()), *extra]
        await self({"type": "http.response.start", "status": status, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})


def _status_and_headers(error: AdapterctlError) -> tuple[int, list[tuple[bytes, bytes]]]:
    if isinstance(error, _Closed):
        return error.status, [(b"connection", b"close")]
    if isinstance(error, _Unknown):
        # both, so that programs see what is wanted and browsers ask for the token as a password
        return 401, [
            (b"www-authenticate", b'Bearer realm="adapterctl"'),
            (b"www-authenticate", b'Basic realm="adapterctl"'),
        ]
    if isinstance(error, TooManyRequests):
        return status_of(error), [(b"retry-after", retry_after(error).encode())]
    return status_of(error), []


class _Callers:
    """Callers by secret, remembered for a moment: most requests come in a row from the same one."""

    def __init__(self, lookup: Callable[[str], Caller | None], digests: Callable[[], Container[str]]) -> None:
        self._lookup = lookup
        self._list = digests
        self._known: OrderedDict[str, tuple[float, Caller]] = OrderedDict()
        self._digests: Container[str] = ()
        self._listed_at = -math.inf
        self._listing = Lock()

    async def find(self, secret: str) -> Caller | None:
        found = self._known.get(secret)
        if found is not None and time.monotonic() - found[0] < REMEMBERED_S:
            return found[1]
        caller = await run_in_threadpool(self._lookup, secret)
        self._known.pop(secret, None)
        if caller is not None:
            self._known[secret] = (time.monotonic(), caller)
            if len(self._known) > 1000:
                self._known.popitem(last=False)
        return caller

    async def is_known(self, secret: str) -> bool:
        """Whether a valid token has this secret, by a list that is read every `REMEMBERED_S` at most.

        So who shares an address with somebody that tries tokens is let in, and however many are tried, the ledger is
        asked once.
        """
        async with self._listing:
            now = time.monotonic()
            if now - self._listed_at >= REMEMBERED_S:
                self._digests = await run_in_threadpool(self._list)
                self._listed_at = now
        return secret_digest(secret) in self._digests

    def forget(self) -> None:
        self._known.clear()
        self._listed_at = -math.inf


class _Buckets:
    """A bucket for each key, filled evenly; `per_minute` fit into it."""

    def __init__(self, per_minute: int) -> None:
        self._size = float(per_minute)
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, key: str) -> float:
        """Take one; seconds until there is one, where there is none."""
        return self.wait(key, 1)

    def wait(self, key: str, take: int) -> float:
        now = time.monotonic()
        left, at = self._left.pop(key, (self._size, now))
        left = min(self._size, left + (now - at) * self._size / 60)
        short = left < 1
        self._left[key] = (left if short else left - take, now)
        if len(self._left) > 10_000:
            self._left.popitem(last=False)
        return max(0.1, (1 - left) * 60 / self._size) if short else 0.0


def _limited(receive: ASGI, limit: int, visit: _Visit) -> Callable[[], Awaitable[Message]]:
    """`receive`, which refuses what is longer than announced."""
    left = limit

    async def limited() -> Message:
        nonlocal left
        message: Message = await receive()
        left -= len(message.get("body", b""))
        if left < 0:
            visit.too_large = _Closed(413, f"the body is larger than {limit:,} bytes", "")
            raise visit.too_large
        return message

    return limited


class _Heard:
    """`receive`, which remembers the body of a request to MLflow that is worth a note; others pass as they are."""

    def __init__(self, receive: ASGI, visit: _Visit) -> None:
        self._receive = receive
        self._what = None if visit.is_ours else mlflow_rules.deed_of(visit.method, visit.path)
        self._body = b""

    async def __call__(self) -> Message:
        message: Message = await self._receive()
        if self._what is not None and len(self._body) <= JSON_BYTES:
            self._body += message.get("body", b"")
        return message

    def deed(self) -> tuple[str, Mapping[str, Any]] | None:
        """What was asked for, and the body as MLflow read it; None where it is not worth a note."""
        if self._what is None:
            return None
        try:
            said = json.loads(self._body)
        except (ValueError, RecursionError):
            return None
        return (self._what, said) if isinstance(said, dict) else None


def _none_of_mlflow(visit: _Visit, caller: Caller | None) -> bytes | None:
    if visit.is_ours or caller is None:
        return None
    none = mlflow_rules.answer_of_none(visit.method, visit.path)
    if none is not None:
        caller.check(Scope.READ)
    return none


async def _within_merge(receive: ASGI, caller: Caller | None) -> ASGI:
    """`receive`, once the body was looked through: with a key of ours, a run would pass for that of another version."""
    if caller is None or caller.scope.covers(Scope.ADMIN):
        return receive
    heard: list[Message] = []
    more = True
    while more:
        message: Message = await receive()
        heard.append(message)
        more = message.get("more_body", False)
    body = b"".join(message.get("body", b"") for message in heard)
    # in a thread: to read the largest body takes a second
    beyond = await run_in_threadpool(mlflow_rules.beyond_merge, body)
    if beyond is not None:
        raise NotAllowed(beyond, hint="leave it out, or use a token of scope admin")

    async def again() -> Any:
        return heard.pop(0) if heard else await receive()

    return again


def _check_mlflow(visit: _Visit, caller: Caller | None) -> Scope | None:
    """The scope that MLflow's rules ask for, which the caller has; None for what is ours, or open to all."""
    if visit.is_ours or caller is None:
        return None
    needed = mlflow_rules.needed_scope(visit.method, visit.path)
    if needed is None:
        raise NotAllowed("this part of MLflow is switched off here", hint="run a tracking server of its own for it")
    caller.check(needed)
    if needed is not Scope.READ:
        caller.check_change()  # MLflow knows nothing of names, so a token that is limited to some changes nothing there
    return needed


def _secret(authorization: str) -> str | None:
    kind, _, value = authorization.partition(" ")
    if kind.lower() == "bearer":
        return value.strip() or None
    if kind.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode().partition(":")[2] or None
        except (binascii.Error, ValueError):
            return None
    return None


def _is_among(netloc: str, hosts: Sequence[str]) -> bool:
    name = re.sub(r":\d+$", "", netloc.lower()).strip("[]")
    return any(name == host or (host.startswith("*.") and name.endswith(host[1:])) for host in hosts)

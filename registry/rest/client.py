"""`RegistryAPI` over HTTP: every verb as a request to a served registry, its problems as our errors.

Uses the standard library alone, so that a command that goes to a server starts at once. A POST carries an
Idempotency-Key and is sent again when the connection broke; a stream of events is taken up where it broke.
"""

from __future__ import annotations

import http.client
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar
from urllib.parse import quote, urlencode

from .. import wire
from ..api import (
    DAY_S,
    AdapterView,
    Check,
    DiffView,
    Direction,
    EventsView,
    EventView,
    GarbageView,
    GateCheck,
    GatesView,
    HistoryView,
    LineageView,
    MethodView,
    NewToken,
    PlanView,
    RebuildView,
    RecallImpact,
    Registered,
    RetentionView,
    SignatureView,
    StageEventView,
    Submitted,
    SuiteView,
    Tagged,
    TuneView,
    Verification,
    VersionView,
)
from ..domain.access import EVERY_NAME, Caller, Scope, Token, check_secret
from ..domain.digest import is_digest
from ..domain.errors import InvalidInput, TooManyRequests, Unavailable
from ..domain.evals import EvalReport
from ..domain.job import Job, JobEvent, LogPiece
from ..domain.recipe import MergeRequest, ResizeRequest
from ..domain.refs import Ref, parse_source
from ..domain.signature import Envelope
from ..domain.suite import Suite
from ..domain.tuning import TuneRequest
from ..domain.verdict import Decision
from ..domain.version import Base, FileRecord
from ..patience import listen_patiently, patiently, timed_out
from .problems import from_problem
from .transport import Answer, Http, NoAnswer, Transport

T = TypeVar("T")
Fetch = Callable[[FileRecord, Path], None]

PAGE = 1000
TIMEOUT_S = 60.0
#: What changes something may wait for a hub, or for a storage that takes gigabytes.
WORK_TIMEOUT_S = 900.0
#: An event stream says something every ten seconds.
SILENT_S = 30.0
TRIES = 4
_BLOCK = 1 << 20
_OPTIONAL_FILE = "README.md"
_FILES = ("adapter_config.json", "adapter_model.safetensors", _OPTIONAL_FILE)


class OwnFiles(Protocol):
    """What verbs do with files of this machine before or after the server is asked; given by the composition root."""

    def check_folder(self, folder: Path) -> None: ...
    def load_suite(self, path: Path) -> Suite: ...
    def fingerprints(self, folder: Path) -> Mapping[str, str]: ...
    def read_reports(self, folder: Path) -> list[EvalReport]: ...
    def pull(self, label: str, files: Sequence[FileRecord], target: Path, fetch: Fetch) -> None: ...


class RemoteRegistry:
    """The registry behind an address. The server knows who we are by the token."""

    def __init__(self, server: str, token: str | None, own: OwnFiles, *, transport: Transport | None = None) -> None:
        self._server = server
        self._token = check_secret(token) if token else None
        self._own = own
        self._transport: Transport = transport or Http(server)
        self._answered = False

    def whoami(self) -> Caller:
        """Who the token belongs to, and what it may do."""
        return self._get("/v1/whoami", Caller)

    # register and read

    def register(
        self,
        source: str,
        *,
        name: str,
        base: str | None = None,
        kind: Literal["import", "train"] = "import",
        trained_from: Ref | None = None,
        metrics: Mapping[str, float] | None = None,
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
        dataset: str | None = None,
        license: str | None = None,
        suite: str | None = None,
        assume_converted: bool = False,
    ) -> Registered:
        parsed = parse_source(source)
        about = wire.to_json(
            {
                "source": source,
                "base": base,
                "kind": kind,
                "trained_from": str(trained_from) if trained_from else None,
                "metrics": metrics or {},
                "params": params or {},
                "tags": tags or {},
                "dataset": dataset,
                "license": license,
                "suite": self._keep_suite(suite) if suite else None,
                "assume_converted": assume_converted,
            }
        ).encode()
        path = f"/v1/adapters/{_quoted(name)}/versions"
        if parsed.kind != "folder":
            return self._post(path, about, Registered)
        folder = Path(parsed.location).expanduser()
        self._own.check_folder(folder)
        return wire.from_json(self._upload(path, about, folder), Registered)

    def adapters(self, *, limit: int | None = None) -> list[AdapterView]:
        return self._pages("/v1/adapters", {}, "adapters", AdapterView, limit=limit)

    def versions(
        self,
        name: str | None = None,
        *,
        base: str | None = None,
        tag: Mapping[str, str] | None = None,
        stage: str | None = None,
        metric: Sequence[str] = (),
        removed: bool = False,
        dataset: str | None = None,
        trained_on: str | None = None,
        descends_from: Ref | None = None,
        limit: int | None = None,
    ) -> list[VersionView]:
        query = {
            "name": name,
            "base": base,
            "tag": [f"{key}={value}" for key, value in (tag or {}).items()],
            "stage": stage,
            "metric": list(metric),
            "removed": "true" if removed else None,
            "dataset": dataset,
            "trained_on": trained_on,
            "descends_from": str(descends_from) if descends_from else None,
        }
        return self._pages("/v1/versions", query, "versions", VersionView, limit=limit)

    def version(self, ref: Ref, *, agreed: bool = False) -> VersionView:
        return self._get(_path(ref), VersionView, {"agreed": "true"} if agreed and ref.alias is not None else None)

    def diff(self, first: Ref, second: Ref, *, layers: bool = False) -> DiffView:
        query = {"first": str(first), "second": str(second), "layers": "true" if layers else None}
        return self._get("/v1/diff", DiffView, query)

    def pull(self, ref: Ref, folder: Path) -> VersionView:
        version = self.version(ref, agreed=True)
        # by its number: what a stage means may change while the files are on their way
        path = _path(Ref(version.name, number=version.number))
        self._own.pull(version.ref, version.files, folder, lambda record, to: self._download(path, record, to))
        return version

    def bases(self) -> list[tuple[Base, tuple[str, ...]]]:
        found = self._get("/v1/bases", list[dict[str, Any]])
        return [(wire.from_builtins(row["base"], Base), tuple(row["spellings"])) for row in found]

    def add_base(self, name: str, *, folder: Path | None = None, revision: str | None = None) -> Base:
        pins = self._own.fingerprints(folder) if folder is not None else {}
        return self._post("/v1/bases", {"name": name, "revision": revision, **pins}, Base)

    def alias_base(self, spelling: str, base: str) -> Base:
        return self._post("/v1/base-aliases", {"spelling": spelling, "base": base}, Base)

    def merge_bases(self, keep: str, drop: str) -> Base:
        return self._post("/v1/base-merges", {"keep": keep, "drop": drop}, Base)

    # merge

    def methods(self) -> list[MethodView]:
        return self._get("/v1/methods", list[MethodView])

    def plan(self, request: MergeRequest) -> PlanView:
        return self._post("/v1/plans", self._merge_body(request), PlanView)

    def merge(self, request: MergeRequest) -> Submitted:
        return self._post("/v1/merges", self._merge_body(request), Submitted)

    def plan_resize(self, request: ResizeRequest) -> PlanView:
        return self._post("/v1/resize-plans", self._resize_body(request), PlanView)

    def resize(self, request: ResizeRequest) -> Submitted:
        return self._post("/v1/resizes", self._resize_body(request), Submitted)

    def verify(self, ref: Ref, *, rerun: bool = True) -> Verification:
        status, body = self._call("POST", "/v1/verifications", {"ref": str(ref), "rerun": rerun})
        if status != 202:
            return wire.from_json(body, Verification)
        job = wire.from_json(body, Job)
        for _ in self.follow(job.id):
            pass
        return self._get(f"/v1/verifications/{_quoted(job.id)}", Verification)

    def remove(self, ref: Ref, *, reason: str) -> VersionView:
        _, body = self._call("DELETE", _path(ref), query={"reason": reason})
        return wire.from_json(body, VersionView)

    # lineage

    def lineage(self, ref: Ref, *, direction: Direction = "both", depth: int | None = None) -> LineageView:
        return self._get(f"{_path(ref)}/lineage", LineageView, {"direction": direction, "depth": depth})

    def common_ancestors(self, first: Ref, second: Ref) -> LineageView:
        return self._get(f"{_path(first)}/common-ancestors", LineageView, {"other": str(second)})

    def path(self, first: Ref, second: Ref) -> LineageView:
        return self._get(f"{_path(first)}/path", LineageView, {"other": str(second)})

    def recall(self, ref: Ref, *, reason: str) -> RecallImpact:
        body = {"version": _selector(ref), "reason": reason}
        return self._post(f"/v1/adapters/{_quoted(ref.name)}/recalls", body, RecallImpact)

    def undo_recall(self, ref: Ref, *, reason: str) -> RecallImpact:
        path = f"/v1/adapters/{_quoted(ref.name)}/recalls/{quote(_selector(ref), safe='@:')}"
        _, body = self._call("DELETE", path, query={"reason": reason})
        return wire.from_json(body, RecallImpact)

    def rebuild(self, old: Ref, new: Ref, *, until: Ref | None = None, dry_run: bool = False) -> RebuildView:
        body = {"old": str(old), "new": str(new), "until": str(until) if until else None, "dry_run": dry_run}
        return self._post("/v1/rebuilds", body, RebuildView)

    # jobs

    def jobs(self, *, state: str | None = None, kind: str | None = None, limit: int = 100) -> list[Job]:
        return self._pages("/v1/jobs", {"state": state, "kind": kind}, "jobs", Job, limit=limit)

    def job(self, job_id: str) -> Job:
        return self._get(f"/v1/jobs/{_quoted(job_id)}", Job)

    def job_events(self, job_id: str, after: int = 0) -> list[JobEvent]:
        return self._get(f"/v1/jobs/{_quoted(job_id)}/events", list[JobEvent], {"after": after})

    def job_log(self, job_id: str, after: int = 0) -> list[LogPiece]:
        """What the job's attempts wrote, after that piece."""
        return self._get(f"/v1/jobs/{_quoted(job_id)}/log", list[LogPiece], {"after": after})

    def follow(
        self, job_id: str, *, timeout_s: float | None = None, tell: Callable[[str], None] | None = None
    ) -> Iterator[Job]:
        return patiently(lambda left: self._follow(job_id, left), timeout_s=timeout_s, known=self._answered, tell=tell)

    def _follow(self, job_id: str, timeout_s: float | None) -> Iterator[Job]:
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        job = self.job(job_id)
        yield job
        seen, broken = 0, 0
        while not job.ended:
            if timeout_s is not None and deadline is not None and time.monotonic() >= deadline:
                raise timed_out(job, timeout_s)
            try:
                for kind, event_id, data in self._messages(f"/v1/jobs/{_quoted(job_id)}/events", seen, deadline):
                    broken = 0
                    if kind == "event":
                        seen = event_id
                    elif kind == "job" and (changed := wire.from_json(data, Job)) != job:
                        job = changed
                        yield job
                    if job.ended:
                        return
            except (OSError, http.client.HTTPException) as error:
                broken += 1
                if broken >= TRIES and not (deadline and time.monotonic() >= deadline):
                    raise self._unreachable(error) from error
            except TooManyRequests as error:  # of streams: then we look now and then
                left = error.wait_s if deadline is None else deadline - time.monotonic()
                time.sleep(max(0.0, min(error.wait_s, left)))
                if (changed := self.job(job_id)) != job:
                    job = changed
                    yield job
            if deadline is None or time.monotonic() < deadline:
                time.sleep(0.1 * 2**broken)

    def cancel(self, job_id: str) -> Job:
        return self._post(f"/v1/jobs/{_quoted(job_id)}/cancel", None, Job)

    def retry(self, job_id: str) -> Job:
        return self._post(f"/v1/jobs/{_quoted(job_id)}/retry", None, Job)

    # evaluation

    def evaluate(
        self, refs: Sequence[Ref], *, suites: Sequence[str], limit: int | None = None, base_dtype: str | None = None
    ) -> Job:
        digests = [self._keep_suite(suite) for suite in suites]
        body = {"refs": [str(ref) for ref in refs], "suites": digests, "limit": limit, "base_dtype": base_dtype}
        return self._post("/v1/evaluations", body, Job)

    def tune(self, request: TuneRequest) -> Job:
        body = {
            "parents": [str(ref) for ref in request.parents],
            "into": request.into,
            "suites": [self._keep_suite(suite) for suite in request.suites],
            "methods": request.methods,
            "ranks": request.ranks,
            "budget": request.budget,
            "seed": request.seed,
            "limit": request.limit,
            "keep": request.keep,
            "layer_groups": request.layer_groups,
            "base_dtype": request.base_dtype,
        }
        return self._post("/v1/tunes", body, Job)

    def tuned(self, job_id: str) -> TuneView:
        return self._get(f"/v1/tunes/{_quoted(job_id)}", TuneView)

    def set_suite(self, name: str, suite: str) -> None:
        digest = self._keep_suite(suite)
        self._call("PUT", f"/v1/adapters/{_quoted(name)}/suite", {"suite": digest})

    def suites(self) -> list[SuiteView]:
        return self._get("/v1/suites", list[SuiteView])

    def suite(self, suite: str) -> Suite:
        return self._get(f"/v1/suites/{_quoted(suite)}", Suite)

    def retention(self, ref: Ref) -> RetentionView:
        return self._get(f"{_path(ref)}/retention", RetentionView)

    def import_reports(self, folder: Path) -> int:
        return int(self._post("/v1/reports", self._own.read_reports(folder), dict[str, int])["taken"])

    def import_results(
        self, ref: Ref, *, source: str, metrics: Mapping[str, float] | None = None, replace: bool = False
    ) -> VersionView:
        return self._post(
            f"{_path(ref)}/results", {"source": source, "metrics": metrics, "replace": replace}, VersionView
        )

    # stages

    def promote(self, ref: Ref, *, to: str, reason: str = "", force: bool = False) -> StageEventView:
        body = {"version": _selector(ref), "to": to, "reason": reason, "force": force}
        return self._post(f"/v1/adapters/{_quoted(ref.name)}/promotions", body, StageEventView)

    def rollback(self, name: str, *, stage: str, reason: str = "") -> StageEventView:
        return self._move("rollbacks", name, stage, reason)

    def demote(self, name: str, *, stage: str, reason: str = "") -> StageEventView:
        return self._move("demotions", name, stage, reason)

    def adopt(self, name: str, *, stage: str, reason: str = "", force: bool = False) -> StageEventView:
        return self._move("adoptions", name, stage, reason, force=force)

    def tag(
        self, ref: Ref, *, put: Mapping[str, str] | None = None, remove: Sequence[str] = (), reason: str = ""
    ) -> Tagged:
        body = {"put": dict(put or {}), "remove": list(remove), "reason": reason}
        return self._post(f"{_path(ref)}/tags", body, Tagged)

    def approve(self, ref: Ref, *, to: str, reason: str = "", withdraw: bool = False) -> StageEventView:
        body = {"version": _selector(ref), "to": to, "reason": reason, "withdraw": withdraw}
        return self._post(f"/v1/adapters/{_quoted(ref.name)}/approvals", body, StageEventView)

    def sign(self, ref: Ref, *, envelope: Envelope, key: str) -> SignatureView:
        return self._post(f"{_path(ref)}/signatures", {"envelope": envelope, "key": key}, SignatureView)

    def history(
        self, name: str, *, stage: str | None = None, verify: bool = False, head: str | None = None
    ) -> HistoryView:
        query = {"stage": stage, "verify": "true" if verify else None, "head": head}
        return self._get(f"/v1/adapters/{_quoted(name)}/history", HistoryView, query)

    def events(
        self,
        *,
        after: int | None = 0,
        name: str | None = None,
        kind: Sequence[str] = (),
        stage: str | None = None,
        limit: int = 100,
    ) -> EventsView:
        query = {"after": "now" if after is None else after, "name": name, "kind": list(kind), "stage": stage}
        found: tuple[EventView, ...] = ()
        while True:
            page = self._get("/v1/events", dict[str, Any], {**query, "max_results": min(PAGE, limit - len(found))})
            found += wire.from_builtins(page["events"], tuple[EventView, ...])
            more = page["next_page_token"] is not None
            if not more or len(found) >= limit:
                return EventsView(found, page["cursor"], more)
            query["after"] = page["cursor"]

    def follow_events(
        self,
        *,
        after: int | None = None,
        name: str | None = None,
        kind: Sequence[str] = (),
        stage: str | None = None,
        tell: Callable[[str], None] | None = None,
    ) -> Iterator[EventView]:
        # `after` is for the first visit; later, the id that was seen last counts
        start = "now" if after is None else after
        target = _target("/v1/events", {"after": start, "name": name, "kind": list(kind), "stage": stage})

        def look(place: int | None) -> EventsView:
            return self.events(after=place, name=name, kind=kind, stage=stage)

        return listen_patiently(lambda place: self._listen(target, look, place), after, known=self._answered, tell=tell)

    def _listen(
        self, target: str, look: Callable[[int | None], EventsView], after: int | None
    ) -> Iterator[tuple[int, EventView | None]]:
        broken = 0
        while True:
            try:
                for kind, event_id, data in self._messages(target, after):
                    broken, after = 0, event_id
                    yield event_id, wire.from_json(data, EventView) if kind == "event" else None
            except (OSError, http.client.HTTPException) as error:
                broken += 1
                if broken >= TRIES:
                    raise self._unreachable(error) from error
            except TooManyRequests as error:  # of streams: then we look now and then
                page = look(after)
                after = page.cursor
                yield from ((event.id, event) for event in page.events)
                yield after, None
                time.sleep(error.wait_s)
            time.sleep(0.1 * 2**broken)

    # gates

    def gates(self) -> GatesView:
        return self._get("/v1/gates", GatesView)

    def set_gates(self, gates_file: Any) -> GatesView:
        _, body = self._call("PUT", "/v1/gates", gates_file)
        return wire.from_json(body, GatesView)

    def gate_check(self, ref: Ref, *, to: str) -> GateCheck:
        return self._get(f"{_path(ref)}/gate", GateCheck, {"to": to})

    def decision(self, digest: str) -> Decision:
        return self._get(f"/v1/decisions/{_quoted(digest)}", Decision)

    # tokens

    def tokens(self) -> list[Token]:
        return self._get("/v1/tokens", list[Token])

    def create_token(
        self, name: str, *, scope: Scope, names: Sequence[str] = EVERY_NAME, valid_s: float | None = None
    ) -> NewToken:
        body = {"name": name, "scope": scope, "names": list(names), "valid_s": valid_s}
        return self._post("/v1/tokens", body, NewToken)

    def revoke_token(self, token_id: str) -> Token:
        _, body = self._call("DELETE", f"/v1/tokens/{_quoted(token_id)}")
        return wire.from_json(body, Token)

    # the registry itself

    def doctor(self, *, adopt: bool = False, force: Sequence[str] = ()) -> list[Check]:
        if force and not adopt:
            raise InvalidInput("force without adopt", hint="adapterctl doctor --adopt --force NAME")
        caller = self.whoami()
        server = Check("server", "ok", f"{self._server}, as {caller.name} with the scope {caller.scope}")
        body = {"force": list(force)}
        found = self._post("/v1/doctor", body, list[Check]) if adopt else self._get("/v1/doctor", list[Check])
        return [server, *found]

    def gc(self, *, older_than_s: float = DAY_S, dry_run: bool = False) -> GarbageView:
        return self._post("/v1/gc", {"older_than_s": older_than_s, "dry_run": dry_run}, GarbageView)

    # what the verbs share

    def _move(self, what: str, name: str, stage: str, reason: str, **more: bool) -> StageEventView:
        body = {"stage": stage, "reason": reason, **more}
        return self._post(f"/v1/adapters/{_quoted(name)}/{what}", body, StageEventView)

    def _merge_body(self, request: MergeRequest) -> dict[str, Any]:
        return {
            "parents": [f"{parent.ref}={parent.weight!r}" for parent in request.parents],
            "into": request.into,
            "method": request.method,
            "rank": request.rank,
            "dtype": request.dtype,
            "seed": request.seed,
            "options": request.options,
            "suites": [self._keep_suite(suite) for suite in request.suites],
            "max_loss": request.max_loss,
            "layers": [str(layer) for layer in request.layers],
            "expect": request.expect,
            "tags": dict(request.tags),
        }

    def _resize_body(self, request: ResizeRequest) -> dict[str, Any]:
        return {
            "ref": str(request.ref),
            "rank": request.rank,
            "energy": request.energy,
            "size_bytes": request.size_bytes,
            "into": request.into,
            "dtype": request.dtype,
            "suites": [self._keep_suite(suite) for suite in request.suites],
        }

    def _keep_suite(self, suite: str) -> str:
        """The digest of a suite that the server keeps; a file of ours is sent there first."""
        if is_digest(suite) and not Path(suite).exists():
            return suite
        return self._post("/v1/suites", self._own.load_suite(Path(suite)), SuiteView).digest

    def _pages(
        self, path: str, query: Mapping[str, Any], key: str, kind: type[T], *, limit: int | None = None
    ) -> list[T]:
        found: list[T] = []
        token: str | None = None
        while limit is None or len(found) < limit:
            size = PAGE if limit is None else min(PAGE, limit - len(found))
            page = self._get(path, dict[str, Any], {**query, "max_results": size, "page_token": token})
            found += [wire.from_builtins(item, kind) for item in page[key]]
            token = page["next_page_token"]
            if token is None:
                break
        return found

    def _get(self, path: str, kind: type[T], query: Mapping[str, Any] | None = None) -> T:
        _, body = self._call("GET", path, query=query)
        return wire.from_json(body, kind)

    def _post(self, path: str, body: Any, kind: type[T]) -> T:
        _, answer = self._call("POST", path, body)
        return wire.from_json(answer, kind)

    def _call(
        self, method: str, path: str, body: Any = None, *, query: Mapping[str, Any] | None = None
    ) -> tuple[int, bytes]:
        """Send a request, again where the connection broke and it is safe; raise the error that comes back."""
        content = body if isinstance(body, bytes) else b"" if body is None else wire.to_json(body).encode()
        headers = self._headers()
        if method == "POST":
            headers |= {"Idempotency-Key": str(uuid.uuid4())}
        if body is not None:
            headers |= {"Content-Type": "application/json"}
        timeout_s = TIMEOUT_S if method == "GET" else WORK_TIMEOUT_S
        for attempt in range(1, TRIES + 1):
            try:
                answer = self._transport.send(method, _target(path, query), headers, content, timeout_s)
                checked = _checked(answer)
                self._answered = True
                return checked
            except TooManyRequests as error:
                if attempt == TRIES:
                    raise
                time.sleep(error.wait_s)
            except (OSError, http.client.HTTPException) as error:
                if attempt == TRIES or isinstance(error, TimeoutError):
                    raise self._unreachable(error) from error
                time.sleep(0.1 * 3 ** (attempt - 1))
        raise AssertionError("unreachable")

    def _messages(
        self, target: str, seen: int | None, deadline: float | None = None
    ) -> Iterator[tuple[str, int, bytes]]:
        """(kind, id, data) of a stream of events; the kind is empty where an id comes alone. Ends at the deadline."""
        silence = SILENT_S if deadline is None else max(0.05, min(SILENT_S, deadline - time.monotonic()))
        headers = self._headers() | {"Accept": "text/event-stream"}
        if seen is not None:
            headers["Last-Event-ID"] = str(seen)
        answer = self._transport.send("GET", target, headers, None, silence)
        with closing(answer):
            if answer.status >= 300:
                _checked(answer)
            fields: dict[bytes, bytes] = {}
            while line := answer.readline():
                if deadline is not None and time.monotonic() >= deadline:
                    return
                name, _, value = line.rstrip(b"\r\n").partition(b": ")
                if name:
                    fields[name] = value
                elif fields:
                    yield fields.get(b"event", b"").decode(), int(fields.get(b"id", b"0")), fields.get(b"data", b"")
                    fields = {}

    def _download(self, path: str, record: FileRecord, target: Path) -> None:
        location = f"{path}/files/{quote(record.path)}"
        try:
            answer = self._transport.send("GET", location, self._headers(), None, TIMEOUT_S)
            with closing(answer):
                if answer.status >= 300:
                    _checked(answer)
                with target.open("xb") as file:
                    while block := answer.read(_BLOCK):
                        file.write(block)
        except http.client.HTTPException as error:
            raise self._unreachable(error) from error

    def _upload(self, path: str, about: bytes, folder: Path) -> bytes:
        boundary = uuid.uuid4().hex
        files = [folder / name for name in _FILES if name != _OPTIONAL_FILE or (folder / name).is_file()]
        heads = [
            _part_head(boundary, "about").lstrip(),
            *(_part_head(boundary, file.name, file=True) for file in files),
        ]
        end = f"\r\n--{boundary}--\r\n".encode()
        length = sum(map(len, heads)) + len(about) + sum(file.stat().st_size for file in files) + len(end)
        headers = self._headers() | {
            "Content-Type": f"multipart/form-data; boundary={boundary}",
            "Content-Length": str(length),
        }

        def body() -> Iterator[bytes]:
            yield heads[0] + about
            for head, file in zip(heads[1:], files, strict=True):
                yield head
                with file.open("rb") as content:
                    while block := content.read(_BLOCK):
                        yield block
            yield end

        try:
            return _checked(self._transport.send("POST", path, headers, body(), WORK_TIMEOUT_S))[1]
        except (OSError, http.client.HTTPException) as error:
            raise self._unreachable(error) from error

    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self._token}"} if self._token else {}

    def _unreachable(self, error: Exception) -> Unavailable:
        if isinstance(error, NoAnswer):
            hint = "it may be at work still: see what it has done before you ask again"
            return Unavailable(f"{self._server} took the request, but {error}", hint=hint)
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        return Unavailable(
            f"{self._server} cannot be reached: {reason}", hint="check the address; --home DIR works on this machine"
        )


def _checked(answer: Answer) -> tuple[int, bytes]:
    with closing(answer):
        body = answer.read()
        if answer.status >= 300:
            error = from_problem(answer.status, body)
            if isinstance(error, TooManyRequests) and (wait_s := answer.getheader("Retry-After") or "").isdecimal():
                error.wait_s = float(wait_s)
            raise error
    return answer.status, body


def _target(path: str, query: Mapping[str, Any] | None) -> str:
    given = {key: value for key, value in (query or {}).items() if value is not None}
    return f"{path}?{urlencode(given, doseq=True)}" if given else path


def _path(ref: Ref) -> str:
    return f"/v1/adapters/{_quoted(ref.name)}/versions/{quote(_selector(ref), safe='@:')}"


def _selector(ref: Ref) -> str:
    return str(ref).removeprefix(ref.name).removeprefix(":v") or "latest"


def _quoted(text: str) -> str:
    return quote(text, safe="")


def _part_head(boundary: str, name: str, *, file: bool = False) -> bytes:
    shown = f'; filename="{name}"\r\nContent-Type: application/octet-stream' if file else ""
    return f'\r\n--{boundary}\r\nContent-Disposition: form-data; name="{name}"{shown}\r\n\r\n'.encode()

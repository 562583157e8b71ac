"""`/v1`: one route a verb. Each says its scope, reads what it was given, calls the registry and renders the answer.

Answers are the views of `registry/api.py` as `registry/wire.py` renders them, the same JSON as `-o json`. Work that
takes longer than a request is a job: 202, its address in `Location`.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import msgspec
from fastapi import APIRouter, Depends, Query, Request
from fastapi.dependencies.models import Dependant
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool
from starlette.responses import FileResponse, Response

from .. import wire
from ..api import (
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
    ServedRegistry,
    SignatureView,
    StageEventView,
    Submitted,
    SuiteView,
    Tagged,
    TuneView,
    Verification,
    VersionView,
)
from ..domain.access import Caller, Scope, Token
from ..domain.errors import InvalidInput, NotFound
from ..domain.evals import EvalReport
from ..domain.gate import check_gates
from ..domain.job import Job, JobEvent, LogPiece
from ..domain.refs import Ref, check_alias, check_name, parse_ref, parse_source
from ..domain.suite import Suite, check_known_suite
from ..domain.verdict import Decision
from ..domain.version import Base
from . import bodies
from .events import Stream, job_events, registry_events
from .problems import RESPONSES, RETRY_AFTER_S
from .replays import Repeatable
from .upload import RECEIVED_PARTS, receive

T = TypeVar("T")
MAX_PAGE = 1000
#: What a plan may take, in multiplications: half a minute of one core. Clients wait for a minute.
MOST_WORK = 5e11

router = APIRouter(prefix="/v1", route_class=Repeatable, responses=RESPONSES)


@dataclass(frozen=True, slots=True)
class Call:
    """One request: who asks, and the registry as it acts for them."""

    caller: Caller
    registry: ServedRegistry


def needs(scope: Scope) -> Any:
    """A dependency that lets callers of this scope through. The test of the scopes reads it from the routes."""

    async def call(request: Request) -> Call:
        caller: Caller = request.state.caller
        caller.check(scope)
        _check_query(request)
        return Call(caller, request.app.state.acting(caller.name))

    call.needed_scope = scope  # type: ignore[attr-defined]
    return Depends(call)


def _check_query(request: Request) -> None:
    """Raise `InvalidInput` for what the route does not read: `?stages=production` would list every version."""
    if not request.query_params:
        return
    known = _query_names(request.scope["route"].dependant)
    unknown = [name for name in dict.fromkeys(request.query_params) if name not in known]
    if unknown:
        said = ", ".join(repr(name[:80]) for name in unknown[:8])
        raise InvalidInput(f"the query has {said}", hint=f"known here: {', '.join(sorted(known)) or 'nothing'}")


def _query_names(route: Dependant) -> set[str]:
    return {field.alias for field in route.query_params}.union(*map(_query_names, route.dependencies))


Read = Annotated[Call, needs(Scope.READ)]
Merge = Annotated[Call, needs(Scope.MERGE)]
Promote = Annotated[Call, needs(Scope.PROMOTE)]
Admin = Annotated[Call, needs(Scope.ADMIN)]
MaxResults = Annotated[int, Query(ge=1, le=MAX_PAGE)]
PageToken = Annotated[str | None, Query(max_length=500)]
Text = Annotated[str | None, Query(max_length=512)]
Dataset = Annotated[str | None, Query(max_length=5000)]
Other = Annotated[str, Query(max_length=300, description="NAME:vN")]


@dataclass(frozen=True, slots=True)
class AdapterPage:
    adapters: tuple[AdapterView, ...]
    next_page_token: str | None = None


@dataclass(frozen=True, slots=True)
class VersionPage:
    versions: tuple[VersionView, ...]
    next_page_token: str | None = None


@dataclass(frozen=True, slots=True)
class JobPage:
    jobs: tuple[Job, ...]
    next_page_token: str | None = None


@dataclass(frozen=True, slots=True)
class EventPage:
    """`cursor` is where to go on later, as `after` or as `Last-Event-ID`, also where nothing was found."""

    events: tuple[EventView, ...]
    cursor: int
    next_page_token: str | None = None


@dataclass(frozen=True, slots=True)
class BaseView:
    base: Base
    spellings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Taken:
    taken: int


def _json_body(schema: Mapping[str, Any]) -> dict[str, Any]:
    """What the description says of a body that is read by `wire`, not by pydantic."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": dict(schema)}}}}


_STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}}


# adapters and versions


@router.get("/adapters", response_model=AdapterPage)
def adapters(call: Read, max_results: MaxResults = 100, page_token: PageToken = None) -> Response:
    """List the adapters, by name."""
    after = _read_token(page_token, str)[0] if page_token else None
    found = call.registry.adapters(after=after, limit=max_results + 1)
    return _reply(AdapterPage(*_page(found, lambda each: [each.name], max_results)))


@router.get("/adapters/{name}", response_model=AdapterView)
def adapter(name: str, call: Read) -> Response:
    """One adapter, with its newest version and what serves its stages."""
    return _reply(call.registry.adapter(name))


@router.get("/adapters/{name}/versions", response_model=VersionPage)
def versions_of(
    name: str, call: Read, removed: bool = False, max_results: MaxResults = 100, page_token: PageToken = None
) -> Response:
    """The versions of one adapter, by number; `/v1/versions` filters, and lists those of all."""
    after = _after(page_token)
    found = call.registry.versions(check_name(name), removed=removed, after=after, limit=max_results + 1)
    return _reply(_version_page(found, max_results))


@router.get("/versions", response_model=VersionPage)
def versions(
    call: Read,
    name: Text = None,
    base: Text = None,
    tag: Annotated[list[str] | None, Query(max_length=32, description="KEY=VALUE")] = None,
    stage: Text = None,
    metric: Annotated[list[str] | None, Query(max_length=32, description="for example bleu>0.3")] = None,
    removed: bool = False,
    dataset: Dataset = None,
    trained_on: Dataset = None,
    descends_from: Annotated[str | None, Query(max_length=300, description="NAME:vN")] = None,
    max_results: MaxResults = 100,
    page_token: PageToken = None,
) -> Response:
    """List versions, by name and number.

    `dataset` is what a version itself was trained on, `trained_on` what it or any of its ancestors was trained on.
    """
    found = call.registry.versions(
        name,
        base=base,
        tag=_pairs(tag or ()),
        stage=stage,
        metric=metric or (),
        removed=removed,
        dataset=dataset,
        trained_on=trained_on,
        descends_from=parse_ref(descends_from) if descends_from else None,
        after=_after(page_token),
        limit=max_results + 1,
    )
    return _reply(_version_page(found, max_results))


@router.post(
    "/adapters/{name}/versions",
    status_code=201,
    response_model=Registered,
    responses={200: {"model": Registered, "description": "These bytes were registered before."}},
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {"schema": bodies.RegisterBody.model_json_schema()},
                "multipart/form-data": {
                    "schema": {
                        "type": "object",
                        "required": ["about", "adapter_config.json", "adapter_model.safetensors"],
                        "properties": {
                            "about": {"type": "string", "description": "The JSON object, as without files."},
                            **{name: {"type": "string", "format": "binary"} for name in RECEIVED_PARTS},
                        },
                    }
                },
            },
        }
    },
)
async def register(request: Request, name: str, call: Merge) -> Response:
    """Register an adapter: from a source on the web or in MLflow, or from files that come along (multipart)."""
    call.caller.check_change(check_name(name))
    with ExitStack() as stack:
        if request.headers.get("content-type", "").startswith("multipart/"):
            folder = await run_in_threadpool(stack.enter_context, call.registry.stage())
            limit = request.app.state.upload_bytes
            body = _read_about(await receive(request, folder, limit=limit))
        else:
            folder, body = None, _read_about(await request.body())
            if parse_source(body.source).kind == "folder":
                raise InvalidInput(
                    "a folder of your machine cannot be read from here", hint="send its files: multipart/form-data"
                )
        if body.suite is not None:
            await run_in_threadpool(_check_may_judge, call, name, body.suite)
        registered = await run_in_threadpool(
            call.registry.register,
            body.source,
            name=name,
            base=body.base,
            kind=body.kind,
            trained_from=parse_ref(body.trained_from) if body.trained_from else None,
            metrics=body.metrics,
            params=body.params,
            tags=body.tags,
            dataset=body.dataset,
            license=body.license,
            suite=body.suite,
            assume_converted=body.assume_converted,
            files=folder,
        )
    where = f"/v1/adapters/{registered.version.name}/versions/{registered.version.number}"
    return _reply(registered, status=201 if registered.created else 200, headers={"location": where})


@router.get("/adapters/{name}/versions/{version}", response_model=VersionView)
def version(name: str, version: str, call: Read, agreed: bool = False) -> Response:
    """Show one version: 3, v3, latest, @STAGE or @sha256:HEX; `agreed` is refused where MLflow's alias differs."""
    return _reply(call.registry.version(version_ref(name, version), agreed=agreed))


@router.delete("/adapters/{name}/versions/{version}", response_model=VersionView)
def remove(name: str, version: str, call: Admin, reason: Annotated[str, Query(max_length=5000)] = "") -> Response:
    """Remove a version that nothing descends from; its files are deleted, its row stays as a tombstone."""
    call.caller.check_change(name)
    return _reply(call.registry.remove(version_ref(name, version), reason=reason))


@router.get("/adapters/{name}/versions/{version}/receipt", response_model=dict[str, Any])
def receipt(name: str, version: str, call: Read) -> Response:
    """The proof that travels with a merge."""
    found = call.registry.version(version_ref(name, version))
    if found.receipt is None:
        raise NotFound(f"{found.ref} has no receipt", hint="only merges have one")
    return _reply(found.receipt)


@router.get("/adapters/{name}/versions/{version}/files/{path:path}", response_class=FileResponse)
def file(name: str, version: str, path: str, call: Read) -> Response:
    """One file of a version, with its digest; what is not in the manifest is not there."""
    with ExitStack() as stack:
        view, folder = stack.enter_context(call.registry.files(version_ref(name, version)))
        record = next((each for each in view.files if each.path == path), None)
        if record is None:
            raise NotFound(f"{view.ref} has no file {path[:200]!r}", hint=", ".join(each.path for each in view.files))
        if not (folder / record.path).is_file():
            raise NotFound(f"{view.ref} lost its {record.path}", hint=f"adapterctl verify {view.ref}")
        digest = base64.b64encode(bytes.fromhex(record.sha256)).decode()
        headers = {"repr-digest": f"sha-256=:{digest}:", "etag": f'"{record.sha256}"'}
        # a folder that was downloaded for this answer is given back when it has been sent
        return FileResponse(
            folder / record.path,
            media_type="application/octet-stream",
            headers=headers,
            background=BackgroundTask(stack.pop_all().close),
        )


@router.get("/adapters/{name}/versions/{version}/lineage", response_model=LineageView)
def lineage(
    name: str,
    version: str,
    call: Read,
    direction: Direction = "both",
    depth: Annotated[int | None, Query(ge=0, le=100_000)] = None,
) -> Response:
    """Ancestors and descendants, and the edges between them."""
    return _reply(call.registry.lineage(version_ref(name, version), direction=direction, depth=depth))


@router.get("/adapters/{name}/versions/{version}/common-ancestors", response_model=LineageView)
def common_ancestors(name: str, version: str, call: Read, other: Other) -> Response:
    """What two versions are both made of, and the ways there."""
    return _reply(call.registry.common_ancestors(version_ref(name, version), parse_ref(other)))


@router.get("/adapters/{name}/versions/{version}/path", response_model=LineageView)
def path(name: str, version: str, call: Read, other: Other) -> Response:
    """Every way from a version to another, up or down."""
    return _reply(call.registry.path(version_ref(name, version), parse_ref(other)))


@router.post("/adapters/{name}/versions/{version}/tags", response_model=Tagged)
def tag(name: str, version: str, body: bodies.TagsBody, call: Promote) -> Response:
    """Set and remove tags of a version. A gate may ask for them, so this takes the scope of who decides."""
    call.caller.check_change(name)
    done = call.registry.tag(version_ref(name, version), put=body.put, remove=body.remove, reason=body.reason)
    return _reply(done)


@router.post("/adapters/{name}/versions/{version}/signatures", response_model=SignatureView)
def sign(name: str, version: str, body: bodies.SignatureBody, call: Merge) -> Response:
    """Keep a signature of a version. Its weight is that of the key, so whoever may make versions may hand one in."""
    call.caller.check_change(name)
    return _reply(call.registry.sign(version_ref(name, version), envelope=body.envelope.seen(), key=body.key))


@router.post("/adapters/{name}/recalls", response_model=RecallImpact)
def recall(name: str, body: bodies.RecallBody, call: Promote) -> Response:
    """Say that a version, and all that is made of it, should be used no more; names whom that hits."""
    call.caller.check_change(name)
    return _reply(call.registry.recall(version_ref(name, body.version), reason=body.reason))


@router.delete("/adapters/{name}/recalls/{version}", response_model=RecallImpact)
def undo_recall(name: str, version: str, call: Admin, reason: Annotated[str, Query(max_length=5000)] = "") -> Response:
    """Take a recall back; names whom that sets free."""
    call.caller.check_change(name)
    return _reply(call.registry.undo_recall(version_ref(name, version), reason=reason))


@router.get("/adapters/{name}/versions/{version}/retention", response_model=RetentionView)
def retention(name: str, version: str, call: Read) -> Response:
    """What a merge kept of its parents."""
    return _reply(call.registry.retention(version_ref(name, version)))


@router.get("/diff", response_model=DiffView)
async def diff(
    request: Request,
    call: Read,
    first: Annotated[str, Query(max_length=300)],
    second: Annotated[str, Query(max_length=300)],
    layers: bool = False,
) -> Response:
    """Two versions side by side; with `layers` module by module too, those that are farthest apart first."""
    refs = parse_ref(first), parse_ref(second)
    if layers:
        return _reply(await request.app.state.turns.take(lambda: call.registry.diff(*refs, layers=True)))
    return _reply(await run_in_threadpool(call.registry.diff, *refs))


# stages


@router.post("/adapters/{name}/promotions", response_model=StageEventView)
def promote(name: str, body: bodies.PromoteBody, call: Promote) -> Response:
    """Let a version serve a stage."""
    call.caller.check_change(name)
    if body.force:
        call.caller.check(Scope.FORCE)
    event = call.registry.promote(
        version_ref(name, body.version), to=check_alias(body.to), reason=body.reason, force=body.force
    )
    return _reply(event)


@router.post("/adapters/{name}/approvals", response_model=StageEventView)
def approve(name: str, body: bodies.ApprovalBody, call: Promote) -> Response:
    """Approve of a version for a stage, or withdraw that."""
    call.caller.check_change(name)
    event = call.registry.approve(
        version_ref(name, body.version), to=check_alias(body.to), reason=body.reason, withdraw=body.withdraw
    )
    return _reply(event)


@router.post("/adapters/{name}/rollbacks", response_model=StageEventView)
def rollback(name: str, body: bodies.StageBody, call: Promote) -> Response:
    """Give a stage back to the version that held it before."""
    call.caller.check_change(name)
    return _reply(call.registry.rollback(check_name(name), stage=check_alias(body.stage), reason=body.reason))


@router.post("/adapters/{name}/demotions", response_model=StageEventView)
def demote(name: str, body: bodies.StageBody, call: Promote) -> Response:
    """Empty a stage."""
    call.caller.check_change(name)
    return _reply(call.registry.demote(check_name(name), stage=check_alias(body.stage), reason=body.reason))


@router.post("/adapters/{name}/adoptions", response_model=StageEventView)
def adopt(name: str, body: bodies.AdoptBody, call: Promote) -> Response:
    """Accept a stage that was moved in MLflow."""
    call.caller.check_change(name)
    if body.force:
        call.caller.check(Scope.FORCE)
    event = call.registry.adopt(check_name(name), stage=check_alias(body.stage), reason=body.reason, force=body.force)
    return _reply(event)


@router.get("/adapters/{name}/history", response_model=HistoryView)
def history(name: str, call: Read, stage: Text = None, verify: bool = False, head: Text = None) -> Response:
    """Every change of an adapter's stages, and its notes; with `verify` the chain of hashes is checked."""
    return _reply(call.registry.history(check_name(name), stage=stage, verify=verify, head=head))


@router.get("/events", response_model=EventPage, responses=_STREAM)
def events(
    request: Request,
    call: Read,
    after: Annotated[str, Query(pattern=r"^(now|\d{1,18})$", description="The id of an event, or now.")] = "0",
    name: Annotated[str | None, Query(max_length=512, description="An adapter, or a glob of adapters.")] = None,
    kind: Annotated[list[str] | None, Query(max_length=32, description="move means every move of a stage.")] = None,
    stage: Text = None,
    max_results: MaxResults = 100,
    page_token: PageToken = None,
) -> Response:
    """What happened in the registry, the earliest first: as JSON, or as server-sent events (Accept: text/event-stream).

    The stream goes on with what happens, from `Last-Event-ID` where a client comes back. No event ever appears before
    one that was seen. It sends messages `event`, each with its id, and in between the id up to which there was nothing.
    """

    def look(after: int | None) -> EventsView:
        return call.registry.events(after=after, name=name, kind=kind or (), stage=stage, limit=max_results)

    start = None if after == "now" else int(after)
    if not _wants_stream(request):
        page = look(_read_token(page_token, int)[0] if page_token else start)
        return _reply(EventPage(page.events, page.cursor, _token([page.cursor]) if page.more else None))
    seen = _last_event_id(request)
    start = start if seen is None else seen
    # what is wrong with the question is told before the stream begins
    cursor = look(start).cursor
    messages = registry_events(look, cursor if start is None else start, request.app.state.leaving)
    return Stream(messages, request.app.state.streams, call.caller.token_id, request.state.still_valid)


# gates


@router.get("/gates", response_model=GatesView)
def gates(call: Read) -> Response:
    """The gates that count."""
    return _reply(call.registry.gates())


@router.put("/gates", response_model=GatesView, openapi_extra=_json_body({"type": "object"}))
async def set_gates(request: Request, call: Admin) -> Response:
    """Let other gates count from now on: the JSON of a gate file."""
    call.caller.check_change()
    value = _read_fact(await request.body(), dict[str, Any])
    return _reply(await run_in_threadpool(call.registry.set_gates, value))


@router.get("/adapters/{name}/versions/{version}/gate", response_model=GateCheck)
def gate_check(name: str, version: str, call: Read, to: Annotated[str, Query(max_length=512)]) -> Response:
    """Whether a version might hold a stage, condition by condition; moves nothing."""
    return _reply(call.registry.gate_check(version_ref(name, version), to=check_alias(to)))


@router.get("/decisions/{digest}", response_model=Decision)
def decision(digest: str, call: Read) -> Response:
    """What a move of a stage stood on."""
    return _reply(call.registry.decision(digest))


# merges


@router.get("/methods", response_model=list[MethodView])
def methods(call: Read) -> Response:
    """The merge methods and their options."""
    return _reply(call.registry.methods())


_MADE_BEFORE: dict[int | str, dict[str, Any]] = {
    200: {"model": Submitted, "description": "The same recipe made a version before."}
}


@router.post("/plans", response_model=PlanView)
async def plan(request: Request, body: bodies.MergeBody, call: Read) -> Response:
    """What a merge would give; changes nothing. A loss that takes long to find is left out, and its `note` says so."""
    asked = body.request()
    return _reply(await request.app.state.turns.take(lambda: call.registry.plan(asked, most_work=MOST_WORK)))


@router.post(
    "/merges",
    status_code=202,
    response_model=Submitted,
    responses=_MADE_BEFORE,
)
async def merge(request: Request, body: bodies.MergeBody, call: Merge) -> Response:
    """Queue a merge, or join the one that is under way."""
    asked = body.request()
    call.caller.check_change(asked.target)
    if any(parent.ref.alias for parent in asked.parents):  # MLflow is asked, too, which may take its time
        return _submitted(await run_in_threadpool(call.registry.merge, asked))
    return _submitted(await request.app.state.desk.merge(call.caller.name, asked))


@router.post("/resize-plans", response_model=PlanView)
async def plan_resize(request: Request, body: bodies.ResizeBody, call: Read) -> Response:
    """What a smaller rank of a version would give; changes nothing."""
    asked = body.request()
    return _reply(await request.app.state.turns.take(lambda: call.registry.plan_resize(asked, most_work=MOST_WORK)))


@router.post(
    "/resizes",
    status_code=202,
    response_model=Submitted,
    responses=_MADE_BEFORE,
)
def resize(body: bodies.ResizeBody, call: Merge) -> Response:
    """Queue a version at a smaller rank, or join the job that is under way."""
    request = body.request()
    call.caller.check_change(request.target)
    return _submitted(call.registry.resize(request))


@router.post(
    "/verifications",
    status_code=202,
    response_model=Job,
    responses={200: {"model": Verification, "description": "Nothing had to be run again."}},
)
def verify(body: bodies.VerifyBody, call: Merge) -> Response:
    """Compare stored bytes with their digests, and run the recipe of a merge again."""
    started = call.registry.start_verification(parse_ref(body.ref), rerun=body.rerun)
    return _accepted(started, started) if isinstance(started, Job) else _reply(started)


@router.get("/verifications/{job_id}", response_model=Verification)
def verification(job_id: str, call: Read) -> Response:
    """What a verification found; 409 while it runs."""
    return _reply(call.registry.verification(job_id))


@router.post(
    "/rebuilds",
    status_code=202,
    response_model=RebuildView,
    responses={200: {"model": RebuildView, "description": "A dry run."}},
)
def rebuild(body: bodies.RebuildBody, call: Merge) -> Response:
    """Make all that is made of a version anew from another one."""
    old, new = parse_ref(body.old), parse_ref(body.new)
    until = parse_ref(body.until) if body.until else None
    planned = call.registry.rebuild(old, new, until=until, dry_run=True)
    for step in planned.steps:
        call.caller.check_change(parse_ref(step.ref).name)
    if body.dry_run:
        return _reply(planned)
    queued = call.registry.rebuild(old, new, until=until)
    assert queued.job is not None
    return _accepted(queued, queued.job)


# jobs


@router.get("/jobs", response_model=JobPage)
def jobs(
    call: Read, state: Text = None, kind: Text = None, max_results: MaxResults = 100, page_token: PageToken = None
) -> Response:
    """List jobs, the newest first."""
    before = _read_token(page_token, str)[0] if page_token else None
    if before is not None:
        try:
            call.registry.job(before)
        except NotFound as error:  # with it the list would end here, without a word
            raise _bad_token() from error
    found = call.registry.jobs(state=state, kind=kind, limit=max_results + 1, before=before)
    return _reply(JobPage(*_page(found, lambda each: [each.id], max_results)))


@router.get("/jobs/{job_id}", response_model=Job)
def job(job_id: str, call: Read) -> Response:
    """Show a job."""
    found = call.registry.job(job_id)
    return _reply(found, headers={} if found.ended else {"retry-after": str(RETRY_AFTER_S)})


@router.get(
    "/jobs/{job_id}/events",
    response_model=list[JobEvent],
    responses=_STREAM,
)
def events_of_job(
    request: Request, job_id: str, call: Read, after: Annotated[int, Query(ge=0, le=2**31 - 1)] = 0
) -> Response:
    """What happened to a job: as JSON, or as server-sent events until it ended (Accept: text/event-stream).

    Events of the stream: `event`, one line of the history, with its number as id; `job`, the job whenever it changed;
    `end`. A client that comes back sends `Last-Event-ID`.
    """
    call.registry.job(job_id)
    if not _wants_stream(request):
        return _reply(call.registry.job_events(job_id, after))
    seen = _last_event_id(request)
    start = after if seen is None else seen
    messages = job_events(call.registry, job_id, start, request.app.state.leaving)
    return Stream(messages, request.app.state.streams, call.caller.token_id, request.state.still_valid)


@router.get("/jobs/{job_id}/log", response_model=list[LogPiece])
def log(job_id: str, call: Read, after: Annotated[int, Query(ge=0, le=2**31 - 1)] = 0) -> Response:
    """What the attempts of a job wrote."""
    return _reply(call.registry.job_log(job_id, after))


@router.post("/jobs/{job_id}/cancel", response_model=Job)
def cancel(job_id: str, call: Merge) -> Response:
    """Cancel a job."""
    _check_own(call, job_id)
    return _reply(call.registry.cancel(job_id))


@router.post("/jobs/{job_id}/retry", status_code=202, response_model=Job)
def retry(job_id: str, call: Merge) -> Response:
    """Queue a failed or cancelled job again."""
    _check_own(call, job_id)
    queued = call.registry.retry(job_id)
    return _accepted(queued, queued)


# evaluation


@router.post("/evaluations", status_code=202, response_model=Job)
def evaluate(body: bodies.EvaluateBody, call: Merge) -> Response:
    """Queue an evaluation of versions, and of their base and parents."""
    refs = [parse_ref(ref) for ref in body.refs]
    call.caller.check_change(*(ref.name for ref in refs))
    queued = call.registry.evaluate(refs, suites=body.suites, limit=body.limit, base_dtype=body.base_dtype)
    return _accepted(queued, queued)


@router.post("/tunes", status_code=202, response_model=Job)
def tune(body: bodies.TuneBody, call: Merge) -> Response:
    """Queue a search for the weights of a merge."""
    request = body.request()
    call.caller.check_change(request.target)
    queued = call.registry.tune(request)
    return _accepted(queued, queued)


@router.get("/tunes/{job_id}", response_model=TuneView)
def tuned(job_id: str, call: Read) -> Response:
    """What an ended search found; 409 while it runs."""
    return _reply(call.registry.tuned(job_id))


@router.post("/adapters/{name}/versions/{version}/results", response_model=VersionView)
def import_results(name: str, version: str, body: bodies.ResultsBody, call: Merge) -> Response:
    """Take in metrics that were measured elsewhere, marked by their source."""
    call.caller.check_change(name)
    ref = version_ref(name, version)
    shown = call.registry.import_results(ref, source=body.source, metrics=body.metrics, replace=body.replace)
    return _reply(shown)


@router.get("/suites", response_model=list[SuiteView])
def suites(call: Read) -> Response:
    """The suites that this registry keeps."""
    return _reply(call.registry.suites())


@router.get("/suites/{suite}", response_model=Suite)
def suite(suite: str, call: Read) -> Response:
    """A kept suite with its rows, by its name or digest."""
    return _reply(call.registry.suite(suite))


@router.post("/suites", status_code=201, response_model=SuiteView, openapi_extra=_json_body({"type": "object"}))
async def keep_suite(request: Request, call: Merge) -> Response:
    """Keep a suite, with its rows; its digest then stands for it."""
    suite = _read_fact(await request.body(), Suite)
    check_known_suite(suite)
    return _reply(await run_in_threadpool(call.registry.keep_suite, suite), status=201)


@router.put("/adapters/{name}/suite", response_model=SuiteView)
def set_suite(name: str, body: bodies.SuiteChoice, call: Merge) -> Response:
    """Let a kept suite judge an adapter. Takes the scope promote where one does already, or a gate concerns it."""
    call.caller.check_change(check_name(name))
    _check_may_judge(call, name, body.suite)
    kept = next((suite for suite in call.registry.suites() if suite.digest == body.suite), None)
    if kept is None:
        raise NotFound(f"no suite {body.suite} is kept here", hint="send it to /v1/suites first")
    call.registry.set_suite(name, kept.digest)
    return _reply(kept)


@router.post("/reports", response_model=Taken, openapi_extra=_json_body({"type": "array", "items": {"type": "object"}}))
async def take_reports(request: Request, call: Admin) -> Response:
    """Take in evaluation reports that were made elsewhere."""
    call.caller.check_change()
    reports = _read_fact(await request.body(), list[EvalReport])
    return _reply(Taken(await run_in_threadpool(call.registry.take_reports, reports)))


# bases


@router.get("/bases", response_model=list[BaseView])
def bases(call: Read) -> Response:
    """The base models and their spellings."""
    return _reply([BaseView(base, spellings) for base, spellings in call.registry.bases()])


@router.post("/bases", response_model=Base)
def add_base(body: bodies.BaseBody, call: Merge) -> Response:
    """Add a base model, or fill in its pins."""
    call.caller.check_change()
    return _reply(call.registry.pin_base(body.name, revision=body.revision, pins=body.pins()))


@router.post("/base-aliases", response_model=Base)
def alias_base(body: bodies.AliasBody, call: Admin) -> Response:
    """Let one more spelling mean a base model."""
    call.caller.check_change()
    return _reply(call.registry.alias_base(body.spelling, body.base))


@router.post("/base-merges", response_model=Base)
def merge_bases(body: bodies.BaseMergeBody, call: Admin) -> Response:
    """Say that two base models are one."""
    call.caller.check_change()
    return _reply(call.registry.merge_bases(body.keep, body.drop))


# the registry itself


@router.get("/doctor", response_model=list[Check])
def doctor(call: Read) -> Response:
    """What is configured, reachable and out of step; where, with the scope `admin`."""
    return _reply(call.registry.doctor(abroad=not call.caller.scope.covers(Scope.ADMIN)))


@router.post("/doctor", response_model=list[Check])
def adopt_all(call: Admin, body: bodies.DoctorBody = bodies.NO_FORCE) -> Response:
    """Accept what was done in MLflow past us, as far as the rules allow it, and tell what is out of step then."""
    call.caller.check_change()
    return _reply(call.registry.doctor(adopt=True, force=[check_name(name) for name in body.force]))


@router.post("/gc", response_model=GarbageView)
def gc(body: bodies.GcBody, call: Admin) -> Response:
    """Free what nobody refers to; with `dry_run` only tell what that is."""
    call.caller.check_change()
    return _reply(call.registry.gc(older_than_s=body.older_than_s, dry_run=body.dry_run))


@router.get("/whoami", response_model=Caller)
async def whoami(call: Read) -> Response:
    """Who the token belongs to, and what it may do."""
    return _reply(call.caller)


@router.get("/tokens", response_model=list[Token])
def tokens(call: Admin) -> Response:
    """The tokens, without their secrets."""
    return _reply(call.registry.tokens())


@router.post("/tokens", status_code=201, response_model=NewToken)
def create_token(request: Request, body: bodies.TokenBody, call: Admin) -> Response:
    """Make a token; its secret is shown here and never again."""
    call.caller.check_change()
    made = call.registry.create_token(body.name, scope=body.scope, names=body.names, valid_s=body.valid_s)
    request.app.state.door.forget_callers()
    return _reply(made, status=201)


@router.delete("/tokens/{token_id}", response_model=Token)
def revoke_token(request: Request, token_id: str, call: Admin) -> Response:
    """Make a token invalid for good."""
    call.caller.check_change()
    revoked = call.registry.revoke_token(token_id)
    request.app.state.door.forget_callers()
    return _reply(revoked)


def _check_may_judge(call: Call, name: str, suite: str) -> None:
    """A suite decides what a gate sees of an adapter: who may only merge gives it its first one, before gates ask.

    Raises `NotAllowed`.
    """
    judging = [view.digest for view in call.registry.suites() if name in view.adapters]
    if suite in judging:
        return
    gates = check_gates({"gates": list(call.registry.gates().gates)})
    if judging or any(gate.concerns(name, gate.stage) for gate in gates):
        call.caller.check(Scope.PROMOTE)


def _reply(value: Any, *, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(wire.to_json(value), status, headers, media_type="application/json")


def _accepted(value: Any, job: Job) -> Response:
    headers = {"location": f"/v1/jobs/{job.id}", "retry-after": str(RETRY_AFTER_S)}
    return _reply(value, status=202, headers=headers)


def _wants_stream(request: Request) -> bool:
    return "text/event-stream" in request.headers.get("accept", "")


def _last_event_id(request: Request) -> int | None:
    """What a client that comes back has seen."""
    seen = request.headers.get("last-event-id", "")
    return int(seen) if seen.isascii() and seen.isdigit() and len(seen) < 10 else None


def _submitted(submitted: Submitted) -> Response:
    if submitted.job is not None:
        return _accepted(submitted, submitted.job)
    assert submitted.version is not None
    made = f"/v1/adapters/{submitted.version.name}/versions/{submitted.version.number}"
    return _reply(submitted, headers={"location": made})


def version_ref(name: str, version: str) -> Ref:
    """The reference in a path: `3`, `v3`, `latest`, `@STAGE` or `@sha256:HEX` behind a name."""
    check_name(name)
    if version == "latest":
        return Ref(name)
    return parse_ref(f"{name}{version}" if version.startswith("@") else f"{name}:{version}")


def _check_own(call: Call, job_id: str) -> None:
    """A token that is limited to some names may stop and restart its own jobs only."""
    if call.registry.job(job_id).created_by != call.caller.name:
        call.caller.check_change()


def _read_about(body: bytes) -> bodies.RegisterBody:
    try:
        return bodies.RegisterBody.model_validate_json(body)
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from error


def _read_fact(body: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise InvalidInput(f"the body cannot be read: {error}", hint="send what adapterctl itself sends") from error


def _pairs(items: Sequence[str]) -> dict[str, str]:
    wrong = [item for item in items if "=" not in item]
    if wrong:
        raise InvalidInput(f"tag {wrong[0][:80]!r} is not KEY=VALUE")
    return dict(item.split("=", 1) for item in items)


def _page(found: Sequence[T], key: Callable[[T], list[Any]], max_results: int) -> tuple[tuple[T, ...], str | None]:
    """A page of a sorted list, and the token of the next: it names the last item, so that new ones do not shift it.

    `found` has one more than the page where there is a next one.
    """
    page = tuple(found[:max_results])
    return page, _token(key(page[-1])) if len(found) > max_results else None


def _version_page(found: Sequence[VersionView], max_results: int) -> VersionPage:
    return VersionPage(*_page(found, lambda each: [each.name, each.number], max_results))


def _after(page_token: str | None) -> tuple[str, int] | None:
    """The name and number of the version that the page before ended with."""
    if page_token is None:
        return None
    name, number = _read_token(page_token, str, int)
    return name, number


def _token(key: list[Any]) -> str:
    return base64.urlsafe_b64encode(json.dumps(key).encode()).decode()


def _read_token(token: str, *kinds: type) -> list[Any]:
    """What names an item of a list: as many values of these types."""
    try:
        key = json.loads(base64.b64decode(token.encode(), altchars=b"-_", validate=True))
        json.dumps(key, ensure_ascii=False).encode()  # fails for half a character, which no database takes
    except (ValueError, RecursionError) as error:
        raise _bad_token() from error
    if not isinstance(key, list) or [type(part) for part in key] != [*kinds]:
        raise _bad_token()
    if any(isinstance(part, int) and not 0 <= part < 2**63 for part in key):
        raise _bad_token()
    return key


def _bad_token() -> InvalidInput:
    return InvalidInput("page_token is not one of this list", hint="take next_page_token of the page before")

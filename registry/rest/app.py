"""The served registry: our door in front, then `/v1`, then MLflow's own application for everything else.

Made by the composition root, run by `adapterctl serve` under uvicorn, or by anything else that speaks ASGI.
"""

from __future__ import annotations

import logging
import signal
import socket
from asyncio import create_task, sleep
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from functools import lru_cache
from threading import Event, Lock, Thread, current_thread, main_thread
from types import FrameType
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST, Gauge, disable_created_metrics, generate_latest
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Match, Mount, Route
from starlette.types import Scope as Asked

from ..api import ServedRegistry
from ..domain.access import Caller, Scope
from ..domain.errors import AdapterctlError, InvalidInput, NotAllowed, NotFound, Problem, Unavailable
from ..domain.job import JobState
from ..domain.worker import QUEUES
from ..ports import Access
from .desk import Desk
from .door import OPEN_PATHS, Door, Metrics, Rules, area_of, is_ours
from .events import Streams
from .pages import problem_page, wants_a_page
from .pages import router as pages
from .problems import MEDIA_TYPE, retry_after, status_of, to_problem
from .routes import router
from .turns import Turns

#: Connections that may wait to be taken; the kernel's own limit is often lower.
BACKLOG = 2048
#: Asked for again and again, so they are tried before all other routes.
OFTEN = ("/v1/jobs/{job_id}", "/v1/merges")
#: How long the ledger may take to be called ready.
READY_S = 2.0
#: Between two looks for jobs that nobody works on.
WAKE_S = 10.0
#: Names by which a server that only this machine can reach is asked for.
LOOPBACK = ("localhost", "127.0.0.1", "::1")

_log = logging.getLogger("adapterctl.rest")


def create_app(registry: ServedRegistry, access: Access, rules: Rules, mlflow_app: Any = None, *, version: str) -> Door:
    """Everything that one address serves."""
    leaving = Event()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            waking = create_task(_wake_again(registry))
            stack.callback(waking.cancel)
            stack.enter_context(_set_by_signals(leaving))
            if mlflow_app is not None:  # a mounted application is not told of start and end by itself
                await stack.enter_async_context(mlflow_app.router.lifespan_context(mlflow_app))
            yield

    app = FastAPI(
        title="adapterctl",
        description="A registry for LoRA adapters. Bodies are the JSON of `adapterctl … -o json`.",
        version=version,
        lifespan=lifespan,
        openapi_url="/v1/openapi.json",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    # else each series has a second one, of the time at which it was made, which tells nobody anything
    disable_created_metrics()  # type: ignore[no-untyped-call]
    metrics = Metrics()
    areas = {area_of(route.path) for each in (router, pages) for route in each.routes if isinstance(route, Route)}

    acting = lru_cache(maxsize=128)(registry.acting)

    def witness(caller: Caller, deed: str, said: Mapping[str, Any]) -> None:
        try:
            acting(caller.name).witness(deed, said)
        except AdapterctlError as error:  # it is done and answered: only the note is missing
            _log.warning("%s by %s is not noted: %s", deed, caller.name, error.message)

    def lookup(secret: str) -> Caller | None:
        if secret:
            return access.caller(secret)
        return None if access.tokens() else rules.anyone  # whoever made a token wants to be asked for it

    areas |= {"/v1/openapi.json", "/metrics", *OPEN_PATHS}
    door = Door(app, rules, lookup, access.digests, metrics, areas, witness)
    app.state.acting, app.state.access, app.state.door = acting, access, door
    app.state.streams = Streams(in_all=rules.streams, per_token=rules.streams_per_token)
    app.state.desk, app.state.turns, app.state.leaving = Desk(registry), Turns(), leaving
    app.state.upload_bytes = rules.upload_bytes
    # not `include_router`: FastAPI tries every route of an included router twice, a third of what a request costs
    app.routes.extend(sorted((*router.routes, *pages.routes), key=_is_seldom))
    _add_health(app, registry, metrics)
    _add_problems(app)
    if mlflow_app is not None:
        app.routes.append(_Beside("/", mlflow_app))
    return door


async def _wake_again(registry: ServedRegistry) -> None:
    """Who asks over REST may look at a job only now and then, or never again: it is the server that stays."""
    while True:
        await sleep(WAKE_S)
        try:
            await run_in_threadpool(registry.wake_for_unattended)
        except (AdapterctlError, OSError) as error:  # next time, perhaps
            _log.warning("it is not known whether jobs wait for nobody: %s", error)


@contextmanager
def _set_by_signals(leaving: Event) -> Iterator[None]:
    """Set the event where the process is told to end.

    A server tells its application of that only when every answer was given, and a stream of events has no end.
    """
    if current_thread() is not main_thread():
        yield
        return

    def listen_to(number: int, then: Callable[[int, FrameType | None], object]) -> None:
        def heard(number: int, frame: FrameType | None) -> None:
            leaving.set()
            then(number, frame)

        signal.signal(number, heard)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number, handler in before.items():
        if callable(handler):
            listen_to(number, handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            if callable(handler):
                signal.signal(number, handler)


class _Beside(Mount):
    """An application for all paths but ours: MLflow has a route below /v1 too, whose callers our rules do not know."""

    def matches(self, scope: Asked) -> tuple[Match, Asked]:
        return (Match.NONE, {}) if is_ours(scope["path"]) else super().matches(scope)


def _is_seldom(route: BaseRoute) -> bool:
    return not (isinstance(route, Route) and route.path in OFTEN)


def listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections from now on, so that who reads our address may connect at once.

    Raises `Unavailable` where the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol by its name: asyncio switches Nagle's algorithm off for such sockets only. With it, every second
    # answer on a kept connection waits 40 ms for an acknowledgement.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(BACKLOG)
    except OSError as error:
        listening.close()
        raise Unavailable(
            f"cannot listen on {host} port {port}: {error.strerror}", hint="give another --host or --port"
        ) from error
    return listening


def own_names() -> tuple[str, ...]:
    """Names under which others may know this machine."""
    return tuple(dict.fromkeys((socket.gethostname().lower(), socket.getfqdn().lower())))


def _add_health(app: FastAPI, registry: ServedRegistry, metrics: Metrics) -> None:
    jobs = Gauge("adapterctl_jobs", "Jobs that are not ended, by state.", ["state"], registry=metrics.registry)
    queued = Gauge(
        "adapterctl_queue_jobs", "Jobs that are not ended, by queue.", ["queue", "state"], registry=metrics.registry
    )
    age = Gauge(
        "adapterctl_queue_age_seconds", "How long the oldest queued job waits.", ["queue"], registry=metrics.registry
    )
    workers = Gauge("adapterctl_workers", "Workers alive, by queue.", ["queue"], registry=metrics.registry)

    @app.api_route("/healthz", methods=["GET", "HEAD"], include_in_schema=False)
    async def healthz() -> Response:
        """The process answers."""
        return PlainTextResponse("ok\n")

    ready = _Asked(registry.check)

    @app.api_route("/readyz", methods=["GET", "HEAD"], include_in_schema=False)
    def readyz() -> Response:
        """The ledger answers, and soon."""
        ready.wait(READY_S)
        return PlainTextResponse("ok\n")

    @app.get("/metrics", include_in_schema=False)
    def figures(request: Request) -> Response:
        """For Prometheus, with a token of the scope `read`."""
        request.state.caller.check(Scope.READ)
        depths = registry.queue_depths()
        for state in (JobState.QUEUED, JobState.RUNNING):
            jobs.labels(state.value).set(sum(each.jobs for each in depths if each.state is state))
        at_work = [worker for worker in registry.workers() if worker.alive]
        for queue in QUEUES:
            own = {each.state: each for each in depths if each.queue == queue}
            for state in (JobState.QUEUED, JobState.RUNNING):
                queued.labels(queue, state.value).set(own[state].jobs if state in own else 0)
            age.labels(queue).set(own[JobState.QUEUED].oldest_s if JobState.QUEUED in own else 0)
            workers.labels(queue).set(sum(queue in worker.queues for worker in at_work))
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)


class _Asked:
    """A question that is asked once at a time, however many wait for its answer, and may never be answered."""

    def __init__(self, ask: Callable[[], object]) -> None:
        self._ask = ask
        self._lock = Lock()
        self._answer: Future[None] | None = None

    def wait(self, seconds: float) -> None:
        """Raises what asking raised, or `Unavailable` where it takes longer."""
        with self._lock:
            answer = self._answer or Future()
            if self._answer is None:
                # a daemon: a server whose database is frozen can still be stopped
                Thread(target=self._run, args=[answer], daemon=True).start()
                self._answer = answer
        try:
            answer.result(seconds)
        except TimeoutError as error:
            raise Unavailable(f"the ledger has not answered for {seconds:g} s", hint="is its database up?") from error

    def _run(self, answer: Future[None]) -> None:
        try:
            self._ask()
        except BaseException as error:  # noqa: BLE001 - who waits gets it
            answer.set_exception(error)
        else:
            answer.set_result(None)
        with self._lock:
            self._answer = None


def _add_problems(app: FastAPI) -> None:
    """Every error leaves as a problem; what nobody expected tells nothing but its request id."""

    def answer(request: Request, error: AdapterctlError, status: int | None = None) -> Response:
        status = status or status_of(error)
        if wants_a_page(request):
            return problem_page(error, status)
        body = to_problem(error, status=status, request_id=request.state.request_id)
        return JSONResponse(body, status, media_type=MEDIA_TYPE)

    async def ours(request: Request, error: Exception) -> Response:
        assert isinstance(error, AdapterctlError)
        if status_of(error) >= 500:
            _log.warning("%s: %s", request.state.request_id, error.message)
        response = answer(request, error)
        if isinstance(error, Unavailable):
            response.headers["retry-after"] = retry_after(error)
        return response

    async def misread(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        found = [
            Problem("invalid_input", f"{'.'.join(map(str, each['loc']))}: {each['msg']}"[:500])
            for each in error.errors()
        ]
        return answer(request, InvalidInput("the request cannot be read", hint="see /v1/openapi.json", problems=found))

    async def other(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        kind = {404: NotFound, 405: InvalidInput, 403: NotAllowed}.get(error.status_code, InvalidInput)
        said = kind(str(error.detail), hint="see /v1/openapi.json")
        response = answer(request, said, error.status_code)
        response.headers.update(error.headers or {})
        return response

    async def unexpected(request: Request, error: Exception) -> Response:
        _log.exception("%s: unexpected %s", request.state.request_id, type(error).__name__, exc_info=error)
        return answer(request, AdapterctlError("the server met an error that it did not expect", hint="see its log"))

    app.add_exception_handler(AdapterctlError, ours)
    app.add_exception_handler(RequestValidationError, misread)
    app.add_exception_handler(HTTPException, other)
    app.add_exception_handler(Exception, unexpected)

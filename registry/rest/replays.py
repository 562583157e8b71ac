"""Idempotency-Key: a POST that is sent again is answered again, not done again.

https://datatracker.ietf.org/doc/draft-ietf-httpapi-idempotency-key-header/
Kept for a day in the ledger, so that any server answers. Only success is kept: a request that failed changed nothing
and may be tried again under its key. Left out are uploads, which are known by their content; new tokens, whose answer
holds a secret; and what only reads, which is done again as it was: nobody who may only read writes to the ledger.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.concurrency import run_in_threadpool

from ..domain.access import Scope
from ..domain.errors import InvalidInput
from ..ports import Access, Replay

_KEY = re.compile(r"[\x21-\x7e]{1,255}")
_KEPT_HEADERS = ("location", "retry-after", "content-type")


class Repeatable(APIRoute):
    """A route that honours the header."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        scopes = [getattr(each.call, "needed_scope", Scope.READ) for each in self.dependant.dependencies]
        changes = any(scope is not Scope.READ for scope in scopes)

        async def answer(request: Request) -> Response:
            key = request.headers.get("idempotency-key")
            if key is None or not changes or not _is_repeatable(request):
                return await handle(request)
            if not _KEY.fullmatch(key):
                raise InvalidInput("Idempotency-Key is not 1 to 255 printable characters", hint="use a UUID")
            access: Access = request.app.state.access
            who = request.state.caller.token_id or request.state.caller.name
            stored = await run_in_threadpool(access.begin_replay, who, key, await _digest(request))
            if stored is not None:
                return Response(stored.body, stored.status, {**stored.headers, "idempotent-replayed": "true"})
            return await _answer_once(request, handle, access, who, key)

        return answer


async def _answer_once(
    request: Request, handle: Callable[[Request], Coroutine[Any, Any, Response]], access: Access, who: str, key: str
) -> Response:
    done = False
    try:
        response = await handle(request)
        if response.status_code < 300:
            headers = {name: response.headers[name] for name in _KEPT_HEADERS if name in response.headers}
            kept = Replay(response.status_code, headers, bytes(response.body).decode())
            await run_in_threadpool(access.keep_replay, who, key, kept)
            done = True
        return response
    finally:
        if not done:
            await run_in_threadpool(access.drop_replay, who, key)


def _is_repeatable(request: Request) -> bool:
    upload = request.headers.get("content-type", "").startswith("multipart/")
    return request.method == "POST" and not upload and request.url.path != "/v1/tokens"


async def _digest(request: Request) -> str:
    digest = hashlib.sha256(f"{request.method} {request.url.path}?{request.url.query}\n".encode())
    digest.update(await request.body())
    return digest.hexdigest()

"""How a request gets to a server and its answer back, by the standard library alone.

Apart from the client, so that completion in a shell asks a server without loading what the client describes.
"""

from __future__ import annotations

import http.client
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol
from urllib.parse import urlsplit

from ..domain.errors import InvalidInput


class Answer(Protocol):
    """What came back; `http.client.HTTPResponse` is one."""

    status: int

    def read(self, amount: int = -1, /) -> bytes: ...
    def readline(self) -> bytes: ...
    def close(self) -> None: ...


class Transport(Protocol):
    """Sends one request. Raises `OSError` or `http.client.HTTPException` where that fails."""

    def send(
        self,
        method: str,
        target: str,
        headers: Mapping[str, str],
        body: bytes | Iterable[bytes] | None,
        timeout_s: float,
    ) -> Answer: ...


class Http:
    """A connection of its own for each request, which ends with its answer."""

    def __init__(self, server: str) -> None:
        parts = urlsplit(server)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
            raise InvalidInput(f"{server[:200]!r} is no address of a server", hint="http://HOST:PORT or https://HOST")
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._connect: Callable[[float], http.client.HTTPConnection] = lambda timeout_s: kind(
            parts.netloc, timeout=timeout_s
        )
        self._prefix = parts.path.rstrip("/")

    def send(
        self,
        method: str,
        target: str,
        headers: Mapping[str, str],
        body: bytes | Iterable[bytes] | None,
        timeout_s: float,
    ) -> Answer:
        connection = self._connect(timeout_s)
        try:
            connection.request(method, self._prefix + target, body, {**headers, "Connection": "close"})
        except (BrokenPipeError, ConnectionResetError):
            if not isinstance(body, bytes | None):
                # a server that refuses a large upload answers before it has read all of it
                return connection.getresponse()
            raise
        return connection.getresponse()

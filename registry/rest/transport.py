"""How a request gets to a server and its answer back, by the standard library alone.

Apart from the client, so that completion in a shell asks a server without loading what the client describes.
"""

from __future__ import annotations

import http.client
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Protocol
from urllib.parse import urlsplit

from ..domain.errors import InvalidInput

#: A server that is there takes a connection within this time.
CONNECT_S = 20.0


class NoAnswer(TimeoutError):
    """The server has the request, and did not answer in time: it may be at work still."""


class Answer(Protocol):
    """What came back; `http.client.HTTPResponse` is one."""

    status: int

    def read(self, amount: int = -1, /) -> bytes: ...
    def readline(self) -> bytes: ...
    def getheader(self, name: str, /) -> str | None: ...
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
        connection = self._connect(min(timeout_s, CONNECT_S))
        with ExitStack() as failed:
            failed.callback(connection.close)
            connection.connect()
            connection.sock.settimeout(timeout_s)
            try:
                answer = self._answer(connection, method, target, headers, body)
            except TimeoutError as error:
                raise NoAnswer(f"it has not answered for {timeout_s:g} s") from error
            failed.pop_all()  # the connection ends with its answer
            return answer

    def _answer(
        self,
        connection: http.client.HTTPConnection,
        method: str,
        target: str,
        headers: Mapping[str, str],
        body: bytes | Iterable[bytes] | None,
    ) -> Answer:
        try:
            connection.request(method, self._prefix + target, body, {**headers, "Connection": "close"})
        except (BrokenPipeError, ConnectionResetError):
            if isinstance(body, bytes | None):
                raise
            # a server that refuses a large upload answers before it has read all of it
        return connection.getresponse()

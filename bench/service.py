"""What serving a registry costs: submitting a job against a bare FastAPI with one INSERT, and the start of the server.

Both sides of a submit run as processes of their own on this machine, with the same database product and the same
client: eight connections that are kept open, one request at a time on each.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import itertools
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from measure import Figure, bench

from adapterctl.bootstrap import connect
from adapterctl.registry.domain.access import Scope
from adapterctl.registry.services.local import LocalRegistry
from adapterctl.registry.settings import Settings

CONNECTIONS, REQUESTS, ROUNDS = 8, 400, 5
ADAPTERS = Path(__file__).resolve().parent.parent / "examples" / "adapters"

#: What a job queue costs at the least: one validated body, one row, one commit.
BARE = """
import sqlite3, sys, threading, uuid
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel

class Body(BaseModel):
    parents: list[str]
    into: str
    method: str = "sum"

app, local = FastAPI(), threading.local()

def database():
    if not hasattr(local, "connection"):
        local.connection = sqlite3.connect(sys.argv[1], timeout=30, isolation_level=None)
        local.connection.execute("PRAGMA synchronous = FULL")
    return local.connection

@app.post("/submit", status_code=202)
def submit(body: Body):
    job_id = str(uuid.uuid4())
    connection = database()
    connection.execute("BEGIN IMMEDIATE")
    connection.execute("INSERT INTO job VALUES (?, ?, 'queued')", (job_id, body.model_dump_json()))
    connection.execute("COMMIT")
    return {"id": job_id}

setup = sqlite3.connect(sys.argv[1])
setup.execute("PRAGMA journal_mode = WAL")
setup.execute("CREATE TABLE job (id TEXT PRIMARY KEY, spec TEXT, state TEXT)")
setup.commit()
uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[2]), log_level="error", access_log=False)
"""


@dataclass(frozen=True)
class Round:
    """How one server took `REQUESTS` requests."""

    rate: float
    p99_s: float


@bench("submit_vs_bare", "submitted merges a second, against a bare FastAPI + INSERT", unit="x", at_least=0.6)
def submit_vs_bare(room: Path) -> Figure:
    ours, bare = _submits()
    rate, bare_rate = (statistics.median(each.rate for each in rounds) for rounds in (ours, bare))
    return Figure(rate / bare_rate, f"{rate:.0f} against {bare_rate:.0f} a second, {CONNECTIONS} connections")


@bench("submit_p99_vs_bare", "99th percentile of a submit, against a bare FastAPI + INSERT", unit="x", at_most=2)
def submit_p99_vs_bare(room: Path) -> Figure:
    ours, bare = _submits()
    p99, bare_p99 = (statistics.median(each.p99_s for each in rounds) for rounds in (ours, bare))
    return Figure(p99 / bare_p99, f"{p99 * 1000:.0f} against {bare_p99 * 1000:.0f} ms")


@bench(
    "serve_s", "`adapterctl serve` with MLflow's pages on an existing registry, to the first 200", unit=" s", at_most=3
)
def serve_s(room: Path) -> Figure:
    two_adapters(room)
    times = []
    for _ in range(5):
        begun = time.perf_counter()
        with _serving(room):
            times.append(time.perf_counter() - begun)
    return Figure(statistics.median(times), f"{len(times)} starts, {min(times):.1f} to {max(times):.1f} s")


@bench("serve_mb", "memory of that server after its pages were read", unit=" MB", at_most=300)
def serve_mb(room: Path) -> Figure:
    two_adapters(room)
    with _serving(room) as (process, port):
        for path in ("/", "/ajax-api/2.0/mlflow/registered-models/search", "/v1/versions"):
            urlopen(f"http://127.0.0.1:{port}{path}", timeout=60).close()
        resident = _resident_mb(process.pid)
    return Figure(resident, "resident, one process")


@cache
def _submits() -> tuple[list[Round], list[Round]]:
    """Both servers at once, asked in turns; measured once for both figures."""
    with tempfile.TemporaryDirectory() as folder:
        room = Path(folder)
        (room / "registry").mkdir()
        secret = two_adapters(room / "registry").create_token("bench", scope=Scope.MERGE).secret
        with _serving(room / "registry") as (_, port), _bare(room / "bare.db") as bare_port:
            counter = itertools.count(1)
            head = f"Authorization: Bearer {secret}\r\n"

            def ours() -> Round:
                return asyncio.run(_load(port, "/v1/merges", head, [_body(next(counter)) for _ in range(REQUESTS)]))

            def bare() -> Round:
                return asyncio.run(_load(bare_port, "/submit", "", [_body(next(counter)) for _ in range(REQUESTS)]))

            ours(), bare()  # not measured
            rounds = [(ours(), bare()) for _ in range(ROUNDS)]
    return [each for each, _ in rounds], [each for _, each in rounds]


def _body(number: int) -> bytes:
    parents = [f"translate:v1={1 + number / 1e6}", "chat:v1"]  # another recipe each time
    return json.dumps({"parents": parents, "into": "load", "method": "cat"}).encode()


async def _load(port: int, path: str, head: str, bodies: Sequence[bytes]) -> Round:
    """Send every body over one of a few kept connections, as fast as answers come."""
    waiting = iter(bodies)
    times: list[float] = []

    async def one_connection() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for body in waiting:
            begun = time.perf_counter()
            writer.write(
                f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n{head}"
                f"Content-Length: {len(body)}\r\n\r\n".encode()
                + body
            )
            answer = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            if not answer.startswith("http/1.1 202"):
                raise RuntimeError(f"submit was answered with {answer.splitlines()[0]}")
            await reader.readexactly(int(answer.split("content-length: ")[1].split("\r\n")[0]))
            times.append(time.perf_counter() - begun)
        writer.close()

    begun = time.perf_counter()
    await asyncio.gather(*(one_connection() for _ in range(CONNECTIONS)))
    seconds = time.perf_counter() - begun
    return Round(len(bodies) / seconds, sorted(times)[int(len(times) * 0.99)])


def two_adapters(home: Path) -> LocalRegistry:
    """A registry of two adapters."""
    registry = connect(Settings(home=home, actor="bench"))
    for name in ("translate", "chat"):
        registry.register(str(next((ADAPTERS / name).iterdir())), name=name)
    return registry


@contextlib.contextmanager
def _serving(home: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    port = _free_port()
    (home / "locks").mkdir(exist_ok=True)
    # the lock of the supervisor is held, so that submitted jobs stay queued and cost nothing
    with (home / "locks" / "supervisor.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        command = [sys.executable, "-m", "adapterctl", "--home", str(home), "serve", "--port", str(port)]
        with _process(command, f"http://127.0.0.1:{port}/healthz") as process:
            yield process, port


@contextlib.contextmanager
def _bare(database: Path) -> Iterator[int]:
    port = _free_port()
    with _process([sys.executable, "-c", BARE, str(database), str(port)], f"http://127.0.0.1:{port}/openapi.json"):
        yield port


@contextlib.contextmanager
def _process(command: Sequence[str], ready: str) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while True:
            if process.poll() is not None:
                raise RuntimeError(f"{command[:4]} ended with {process.returncode}")
            try:
                urlopen(ready, timeout=5).close()
                break
            except (URLError, OSError):
                time.sleep(0.01)
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def _resident_mb(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])

"""A registry, and the same one behind HTTP: in this process, served by a process of its own, and as a whole service."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import uvicorn
from broker import Broker, start_worker
from registries import WorkHere
from starlette.testclient import TestClient

from adapterctl.bootstrap import OwnFiles, application, connect, remote
from adapterctl.registry.api import RegistryAPI
from adapterctl.registry.domain.access import Scope
from adapterctl.registry.rest.app import LOOPBACK, create_app, listen
from adapterctl.registry.rest.client import RemoteRegistry
from adapterctl.registry.rest.door import Door, Rules
from adapterctl.registry.services.local import LocalRegistry
from adapterctl.registry.settings import Settings

UPLOAD_BYTES = 1 << 20


@dataclass
class Buffered:
    """An answer that has arrived whole."""

    status: int
    body: io.BytesIO
    headers: Mapping[str, str]

    def read(self, amount: int = -1, /) -> bytes:
        return self.body.read(amount)

    def readline(self) -> bytes:
        return self.body.readline()

    def getheader(self, name: str, /) -> str | None:
        return self.headers.get(name)

    def close(self) -> None:
        self.body.close()


class InProcess:
    """A transport that calls the application itself; no socket is opened."""

    def __init__(self, client: TestClient) -> None:
        self._client = client

    def send(
        self,
        method: str,
        target: str,
        headers: Mapping[str, str],
        body: bytes | Iterable[bytes] | None,
        timeout_s: float,
    ) -> Buffered:
        answer = self._client.request(method, target, headers=dict(headers), content=body)
        return Buffered(answer.status_code, io.BytesIO(answer.content), answer.headers)


@dataclass
class Served:
    """One registry behind its door, and a secret of each scope."""

    registry: LocalRegistry
    door: Door
    client: TestClient
    secrets: Mapping[str, str]

    def auth(self, scope: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.secrets[scope]}"}

    def remote(self, scope: str = "admin") -> RemoteRegistry:
        return RemoteRegistry("http://localhost", self.secrets[scope], OwnFiles(), transport=InProcess(self.client))


@pytest.fixture(scope="module")
def new_home(
    tmp_path_factory: pytest.TempPathFactory, ledger_schema: Path, mlflow_schema: Path
) -> Callable[[str], Path]:
    """Make a home whose tables are there already."""

    def make(name: str) -> Path:
        home = tmp_path_factory.mktemp(name)
        shutil.copy(ledger_schema, home / "registry.db")
        shutil.copy(mlflow_schema, home / "mlflow.db")
        return home

    return make


@contextmanager
def serving(home: Path, rules: Rules | None = None) -> Iterator[Served]:
    registry = connect(Settings(home=home, actor="ada"))
    registry.bell = WorkHere(registry.settings)
    secrets = {scope.value: registry.create_token(scope.value, scope=scope).secret for scope in Scope}
    rules = rules or Rules(hosts=("localhost", "testserver"), upload_bytes=UPLOAD_BYTES, requests_per_minute=10**6)
    door = create_app(registry, registry.access, rules, version="1.2.3")
    with TestClient(door, base_url="http://localhost", raise_server_exceptions=False) as client:
        yield Served(registry, door, client, secrets)
    registry.ledger.close()


@pytest.fixture(scope="module")
def served(new_home: Callable[[str], Path]) -> Iterator[Served]:
    with serving(new_home("served")) as served:
        yield served


@contextmanager
def _server_process(home: Path | None, log: Path, *options: str, environment: Mapping[str, str] = {}) -> Iterator[str]:
    """`adapterctl serve` in a process of its own; gives its address. Its log goes to a file.

    Without a home it serves what the environment says.
    """
    named = ["--home", str(home)] if home else []
    command = [sys.executable, "-m", "adapterctl", *named, "-o", "json", "serve", "--port", "0", *options]
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=out, text=True, env=os.environ | {**environment}
        )
    try:
        line = process.stdout.readline()
        assert line, log.read_text()
        yield json.loads(line)["url"]
    finally:
        process.terminate()
        process.wait(30)
        process.stdout.close()


@contextmanager
def _service(request: pytest.FixtureRequest, folder: Path) -> Iterator[RegistryAPI]:
    """A server on PostgreSQL, with Redis and two workers, all of them processes of their own; seen by a client."""
    new_database: Callable[[str], str] = request.getfixturevalue("new_database")
    broker: Broker = request.getfixturevalue("broker")
    settings = Settings(
        home=folder / "server",
        actor="ada",
        ring_again_s=1.0,
        database_url=new_database(request.getfixturevalue("postgres_schema")),
        mlflow_uri=new_database(request.getfixturevalue("postgres_mlflow_schema")),
        artifacts=(folder / "artifacts").as_uri(),
        broker_url=broker.url,
    )
    local = connect(settings)
    with closing(local.ledger):
        secret = local.create_token("ada", scope=Scope.ADMIN).secret
    workers = [
        start_worker(replace(settings, home=folder / name, broker_url=broker.worker_url), name, folder / f"{name}.log")
        for name in ("one", "two")
    ]
    try:
        with _server_process(None, folder / "log", environment=settings.to_env()) as url:
            yield remote(url, secret)
    finally:
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.wait(60)


@contextmanager
def _listening(door: Door) -> Iterator[str]:
    """A thread of this process serves it on a port of its own; gives its address."""
    listening = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(door, log_config=None, access_log=False, timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run, args=[[listening]], daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)


@pytest.fixture(scope="module", params=["local", "over a socket", "service"])
def registry(
    request: pytest.FixtureRequest, new_home: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RegistryAPI]:
    """One registry for a module: the thing itself, or what a client sees of it. Tests take names of their own."""
    if request.param == "service":
        with _service(request, tmp_path_factory.mktemp("service")) as service:
            yield service
        return
    local = connect(Settings(home=new_home("registry"), actor="ada"))
    local.bell = WorkHere(local.settings)
    with closing(local.ledger):
        if request.param == "local":
            yield local
            return
        secret = local.create_token("ada", scope=Scope.ADMIN).secret
        with _listening(application(local, hosts=LOOPBACK, loopback=True)) as url:
            yield remote(url, secret)


@pytest.fixture
def serving_with(new_home: Callable[[str], Path]) -> Callable[[Rules], object]:
    """Serve a new registry by other rules."""
    return lambda rules: serving(new_home("other"), rules)


@pytest.fixture(scope="session")
def server_process() -> Callable[..., object]:
    """Start `adapterctl serve` on a home, with its log in a file; gives its address."""
    return _server_process

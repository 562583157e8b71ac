"""What holds for every test: a home of its own, a clean environment, no network, no wait for the disk; and how golden
files are read.

Nothing here knows the subject of a test. Helpers for one folder of tests live in that folder's conftest.
"""

from __future__ import annotations

import os
import signal
import socket
import sqlite3
from collections.abc import Callable, Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from sqlalchemy import Engine, event

pytest_plugins = ["broker", "drawings", "postgres", "registries", "tiny"]  # tests/plugins/

# A slow machine is no counterexample, and a failure must come again in the next run.
hypothesis.settings.register_profile("adapterctl", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("adapterctl")

# Who runs the tests in the background has Ctrl-C ignored, and so would have every process that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

FIXED_ENVIRONMENT = {
    "DO_NOT_TRACK": "true",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_OFFLINE": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "NO_COLOR": "1",
    "TRANSFORMERS_OFFLINE": "1",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden", action="store_true", help="write golden files anew instead of comparing with them")


@pytest.fixture(scope="session", autouse=True)
def clean_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing of the person who runs the tests comes in: no settings, no home, no tracking server."""
    with pytest.MonkeyPatch.context() as patch:
        _set_environment(patch)
        for name in ("XDG_CONFIG_HOME", "XDG_DATA_HOME"):
            patch.setenv(name, str(tmp_path_factory.mktemp(name.lower())))
        patch.setenv("ADAPTERCTL_HOME", str(tmp_path_factory.mktemp("session-home")))
        yield


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home of this test: an empty folder that `ADAPTERCTL_HOME` names."""
    folder = tmp_path_factory.mktemp("home")
    _set_environment(monkeypatch)  # again: MLflow itself writes MLFLOW_TRACKING_URI where a test sets one
    monkeypatch.setenv("ADAPTERCTL_HOME", str(folder))
    return folder


@pytest.fixture(scope="session", autouse=True)
def nothing_outlives_the_power(clean_environment: None) -> Iterator[None]:
    """Whoever ends or is killed, what it wrote stays; only the disk is not waited for, some ten times a version."""

    def do_not_wait(connection: Any, record: object) -> None:
        if isinstance(connection, sqlite3.Connection):
            connection.execute("PRAGMA synchronous = OFF")

    event.listen(Engine, "connect", do_not_wait)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield
    event.remove(Engine, "connect", do_not_wait)


@pytest.fixture(scope="session")
def mlflow_schema(tmp_path_factory: pytest.TempPathFactory, clean_environment: None) -> Path:
    """An empty `mlflow.db` to copy into a home: MLflow takes seconds to create its tables."""
    from adapterctl.registry.stores.mlflow_versions import MlflowVersions  # deferred: MLflow takes 2 s

    folder = tmp_path_factory.mktemp("mlflow-schema")
    MlflowVersions(None, folder, "nobody").check_identity()
    return folder / "mlflow.db"


@pytest.fixture(scope="session", autouse=True)
def no_network(clean_environment: None) -> Iterator[None]:
    """Sockets reach this machine only. Child processes are kept quiet by the offline switches above."""
    real_connect, real_connect_ex = socket.socket.connect, socket.socket.connect_ex
    real_getaddrinfo = socket.getaddrinfo

    def connect(self: socket.socket, address: Any) -> None:
        _refuse_foreign(self.family, address)
        real_connect(self, address)

    def connect_ex(self: socket.socket, address: Any) -> int:
        _refuse_foreign(self.family, address)
        return real_connect_ex(self, address)

    def getaddrinfo(host: Any, *args: Any, **kwargs: Any) -> Any:
        _refuse_foreign(socket.AF_INET, (host,))
        return real_getaddrinfo(host, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", connect)
        patch.setattr(socket.socket, "connect_ex", connect_ex)
        patch.setattr(socket, "getaddrinfo", getaddrinfo)
        yield


def _set_environment(patch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("ADAPTERCTL_", "MLFLOW_", "HF_")):
            patch.delenv(name)
    for name, value in FIXED_ENVIRONMENT.items():
        patch.setenv(name, value)


def _refuse_foreign(family: int, address: Any) -> None:
    if family not in (socket.AF_INET, socket.AF_INET6):
        return
    host = address[0].decode() if isinstance(address[0], bytes) else address[0]
    if host not in (None, "", "localhost") and not _is_this_machine(host):
        raise RuntimeError(f"a test tried to reach {host}: tests use no network")


def _is_this_machine(host: str) -> bool:
    try:
        address = ip_address(host)
    except ValueError:
        return host == socket.gethostname()
    return address.is_loopback or address.is_unspecified


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compare a text with `tests/golden/NAME`, or write that file when pytest runs with --golden."""
    folder = Path(__file__).parent / "golden"

    def check(name: str, text: str) -> None:
        path = folder / name
        if request.config.getoption("--golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        assert path.exists(), f"tests/golden/{name} is missing: run `make golden`"
        assert text == path.read_text(encoding="utf-8"), f"differs from tests/golden/{name}: run `make golden` if meant"

    return check

"""A database that is gone for a while: who follows a job goes on, and nobody outside learns where it was."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psycopg
import pytest
import uvicorn
from postgres import postgres_server

from adapterctl.bootstrap import connect, remote
from adapterctl.registry.domain.access import Scope
from adapterctl.registry.domain.errors import Unavailable
from adapterctl.registry.domain.job import JobState, NewJob
from adapterctl.registry.rest import client
from adapterctl.registry.rest.app import create_app, listen
from adapterctl.registry.rest.door import Rules
from adapterctl.registry.settings import Settings
from adapterctl.registry.stores.spawn_bell import only_one


def test_following_outlasts_a_database_that_is_gone_and_its_address_stays_inside(
    home: Path, caplog: pytest.LogCaptureFixture
):
    with postgres_server() as database:
        settings = Settings(
            home=home, actor="ada", database_url=database.url("postgres"), mlflow_uri=database.url("unused")
        )
        registry = connect(settings)
        secret = registry.create_token("ada", scope=Scope.ADMIN).secret
        job, _ = registry.ledger.submit(NewJob(kind="merge", key="k", title="merge a b", spec={}, created_by="ada"))
        door = create_app(registry, registry.access, Rules(hosts=("127.0.0.1",), upload_bytes=1), version="1.2.3")
        socket = listen("127.0.0.1", 0)
        server = uvicorn.Server(uvicorn.Config(door, log_config=None, lifespan="off"))
        serving = threading.Thread(target=server.run, args=[[socket]], daemon=True)
        serving.start()
        url = f"http://127.0.0.1:{socket.getsockname()[1]}"
        registry.set_gates({"gates": []})

        def follow(*words: str) -> subprocess.Popen[str]:
            return subprocess.Popen(
                [sys.executable, "-m", "adapterctl", *words],
                env=os.environ | {"ADAPTERCTL_SERVER": url, "ADAPTERCTL_TOKEN": secret},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )

        following, watching = follow("jobs", "logs", "-f", job.id), follow("history", "--follow", "-o", "name")
        with closing(registry.ledger), following, watching:
            first = following.stdout.readline()
            assert watching.stdout.readline() == "1\n"
            database.stop()
            warned = following.stderr.readline()
            assert "nothing will be missed, asking again for 120 s" in watching.stderr.readline()
            with pytest.raises(Unavailable) as met:
                remote(url, secret).job(job.id)
            database.process = database.start()
            until_it_answers(lambda: registry.cancel(job.id))
            rest, said = following.communicate(timeout=120)
            registry.set_gates({"gates": [{"stage": "production", "tags": ["owner"]}]})
            assert watching.stdout.readline() == "2\n"
            watching.send_signal(signal.SIGINT)
            assert (watching.wait(30), watching.stderr.read()) == (130, "")
        server.should_exit = True
        serving.join(30)

    assert "queued" in first
    assert "the job goes on" in warned
    assert (following.returncode, "cancelled" in rest) == (0, True), said
    assert str(met.value) == "the ledger cannot be used now"
    assert str(database.port) not in warned + said + met.value.hint
    assert f"127.0.0.1:{database.port}" in caplog.text


def test_following_from_python_outlasts_a_server_that_is_started_again(
    home: Path, tmp_path: Path, server_process: Callable[..., Any]
):
    registry = connect(Settings(home=home, actor="ada"))
    secret = registry.create_token("ada", scope=Scope.ADMIN).secret
    job, _ = registry.ledger.submit(NewJob(kind="merge", key="k", title="merge a b", spec={}, created_by="ada"))
    started, gone, told = threading.Event(), threading.Event(), []
    seen: list[JobState] = []

    def tell(text: str) -> None:
        told.append(text)
        gone.set()

    def follow(url: str) -> None:
        for each in remote(url, secret).follow(job.id, tell=tell):
            seen.append(each.state)
            started.set()

    with closing(registry.ledger), only_one(home):  # nobody works on it
        with server_process(home, tmp_path / "first.log") as url:
            following = threading.Thread(target=follow, args=[url])
            following.start()
            assert started.wait(60)
        assert gone.wait(60)
        with server_process(home, tmp_path / "second.log", "--port", url.rpartition(":")[2]):
            registry.cancel(job.id)
            following.join(60)
        with pytest.raises(Unavailable):
            next(iter(remote(url, secret).follow(job.id)))

    assert seen == [JobState.QUEUED, JobState.CANCELLED]
    assert ["the job goes on" in text for text in told] == [True]


@pytest.mark.parametrize("patience_s", [0.05, 60.0], ids=["too slow", "in time"])
def test_work_that_takes_a_server_long_is_waited_for_and_then_not_called_out_of_reach(
    patience_s: float, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(client, "TIMEOUT_S", 0.05)
    monkeypatch.setattr(client, "WORK_TIMEOUT_S", patience_s)
    gave_up = threading.Event()

    class Slow(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            gave_up.wait(0.5)
            with suppress(OSError):
                self.send_error(404)

        def log_message(self, *_: object) -> None:
            """Nobody reads it."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Slow) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(Unavailable) as met:
            remote(f"http://127.0.0.1:{server.server_port}", None).gc()
        gave_up.set()
        server.shutdown()

    if patience_s < 1:
        assert "took the request, but it has not answered for 0.05 s" in met.value.message
        assert "before you ask again" in met.value.hint
    else:
        assert "status 404" in met.value.message


def until_it_answers(ask: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            ask()
            return
        except (Unavailable, psycopg.OperationalError):
            assert time.monotonic() < deadline
            time.sleep(0.1)

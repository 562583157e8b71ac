"""The feed of a served registry as a stream: over a real socket, across broken connections, to a server's end."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import uvicorn
from tiny import write_tiny_adapter

from adapterctl.bootstrap import connect, remote
from adapterctl.registry.domain.access import Scope
from adapterctl.registry.domain.errors import WaitTimedOut
from adapterctl.registry.domain.job import Job, JobState, NewJob
from adapterctl.registry.domain.refs import parse_ref
from adapterctl.registry.rest import events
from adapterctl.registry.rest.app import create_app, listen
from adapterctl.registry.rest.door import Rules
from adapterctl.registry.services.local import LocalRegistry
from adapterctl.registry.settings import Settings


@pytest.fixture
def home(new_home: Callable[[str], Path]) -> Path:
    return new_home("home")


@pytest.fixture
def registry(home: Path, tmp_path: Path) -> Iterator[LocalRegistry]:
    """The registry that is served, with translate:v1: event 1."""
    local = connect(Settings(home=home, actor="ada"))
    with closing(local.ledger):
        local.register(str(write_tiny_adapter(tmp_path / "source")), name="translate")
        yield local


@pytest.fixture(scope="module")
def listened(
    new_home: Callable[[str], Path], server_process: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[LocalRegistry, str, str]]:
    """A registry with translate:v1, the address at which it is served, and the secret of a listener."""
    home, folder = new_home("listened"), tmp_path_factory.mktemp("listened")
    local = connect(Settings(home=home, actor="ada"))
    with closing(local.ledger):
        local.register(str(write_tiny_adapter(folder / "source")), name="translate")
        secret = local.create_token("fleet", scope=Scope.READ).secret
        with server_process(home, folder / "log") as url:
            yield local, url, secret


class Listener:
    """A plain client of the stream, as a browser would be: messages with their ids, and the last id."""

    def __init__(
        self, url: str, secret: str, query: str = "", last_id: str | None = None, path: str = "/v1/events"
    ) -> None:
        self.last_id = last_id
        self._connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)
        headers = {"Accept": "text/event-stream", "Authorization": f"Bearer {secret}"}
        self._connection.request("GET", path + query, headers=headers | ({"Last-Event-ID": last_id} if last_id else {}))
        self.answer = self._connection.getresponse()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Events, to the end of the stream."""
        data = ""
        while line := self.answer.readline():
            name, _, value = line.decode().rstrip("\n").partition(": ")
            if name == "id":
                self.last_id = value
            elif name == "data":
                data = value
            elif not line.strip() and data:
                yield json.loads(data)
                data = ""

    def close(self) -> None:
        self.answer.close()
        self._connection.close()


def change_tags(registry: LocalRegistry, count: int) -> None:
    version_id = registry.ledger.versions("translate")[0].id
    for number in range(count):
        registry.ledger.set_tags(version_id, {"n": str(time.monotonic_ns() + number)}, [], actor="ada", reason="")


def test_a_listener_whose_connection_breaks_again_and_again_gets_each_event_once(
    listened: tuple[LocalRegistry, str, str],
):
    registry, url, secret = listened
    last = registry.events(after=None).cursor
    writer = threading.Thread(target=change_tags, args=[registry, 60])
    writer.start()
    seen: list[int] = []
    last_id = str(last)
    while len(seen) < 60:
        listener = Listener(url, secret, last_id=last_id)
        assert listener.answer.status == 200
        with closing(listener):
            for event in listener:
                seen.append(event["id"])
                if len(seen) % 7 == 0 or len(seen) == 60:
                    break
        last_id = listener.last_id
    writer.join()

    assert seen == list(range(last + 1, last + 61))


def test_a_listener_from_now_on_loses_nothing_where_it_breaks_before_the_first_event(
    listened: tuple[LocalRegistry, str, str],
):
    registry, url, secret = listened
    last = registry.events(after=None).cursor
    with closing(Listener(url, secret, "?after=now")) as listener:
        assert listener.answer.readline() == b": still here\n"
        assert listener.answer.readline() == f"id: {last}\n".encode()
    registry.promote(parse_ref("translate:v1"), to="staging")
    with closing(Listener(url, secret, "?after=now&kind=move", last_id=str(last))) as listener:
        event = next(iter(listener))

    assert (event["kind"], event["ref"], event["id"]) == ("promote", "translate:v1", last + 1)
    assert listener.answer.headers["cache-control"] == "no-store"
    assert listener.answer.headers["content-type"].startswith("text/event-stream")


def test_a_server_that_stops_ends_its_streams_and_who_follows_comes_back(
    home: Path, registry: LocalRegistry, server_process: Callable[..., Any], tmp_path: Path
):
    secret = registry.create_token("fleet", scope=Scope.READ).secret
    with server_process(home, tmp_path / "log") as url:
        port = str(urlsplit(url).port)
        listener = Listener(url, secret, "?after=now")
        listener.answer.readline()
        following = remote(url, secret).follow_events(after=0)
        assert next(following).kind == "register"
        began = time.monotonic()
    took_s = time.monotonic() - began
    with closing(listener):
        assert list(listener) == []  # an answer that is cut short raises IncompleteRead
    registry.promote(parse_ref("translate:v1"), to="staging")
    with server_process(home, tmp_path / "again", "--port", port):
        event = next(following)

    assert (event.kind, event.id) == ("promote", 2)
    assert took_s < 4  # uvicorn gives what runs five seconds, and cancels it then
    assert "Cancel" not in (tmp_path / "log").read_text()


def test_an_idle_stream_shows_life_and_how_far_it_has_looked_and_ends_in_time(
    served: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(events, "PING_S", 0.0)
    monkeypatch.setattr(events, "LIFE_S", 0.2)
    served.registry.set_gates({"gates": []})
    cursor = served.registry.events(after=None).cursor

    answer = served.client.get("/v1/events?kind=remove", headers={**served.auth("read"), "Accept": "text/event-stream"})

    assert answer.text.startswith(": still here\nid: 0\n\n")
    assert answer.text.endswith(f": still here\nid: {cursor}\n\n")
    assert "data" not in answer.text


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ("after=99", 400),
        ("after=then", 400),
        ("kind=promoted", 400),
        ("name=nobody", 404),
        ("name=No%20Name", 400),
        ("stage=prodction", 400),
        ("max_results=0", 400),
    ],
)
@pytest.mark.parametrize("accept", ["application/json", "text/event-stream"])
def test_what_is_wrong_with_the_question_is_told_as_a_problem_in_either_form(
    served: Any, query: str, status: int, accept: str
):
    answer = served.client.get(f"/v1/events?{query}", headers={**served.auth("read"), "Accept": accept})

    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json")


@pytest.mark.parametrize("token", ["bm90", "WyJhIl0=", "W3RydWVd", "Wy0xXQ=="])
def test_a_page_token_of_another_list_is_refused(served: Any, token: str):
    answer = served.client.get(f"/v1/events?page_token={token}", headers=served.auth("read"))

    assert (answer.status_code, answer.json()["code"]) == (400, "invalid_input")


def test_pages_are_followed_by_token_and_by_cursor(served: Any):
    for number in range(5):
        served.registry.set_gates({"gates": [{"stage": "production", "tags": [f"t{number}"]}]})
    served.registry.set_gates({"gates": []})
    asked = "/v1/events?kind=gates&max_results=2"
    first = served.client.get(asked, headers=served.auth("read")).json()
    second = served.client.get(f"{asked}&page_token={first['next_page_token']}", headers=served.auth("read")).json()
    by_cursor = served.client.get(f"{asked}&after={first['cursor']}", headers=served.auth("read")).json()

    assert len(first["events"]) == 2
    assert second == by_cursor
    assert second["events"][0]["id"] > first["events"][1]["id"] == first["cursor"]


def test_the_reload_script_of_the_documentation_reloads_when_production_moves(
    listened: tuple[LocalRegistry, str, str], tmp_path: Path
):
    registry, url, secret = listened
    script = (Path(__file__).parents[2] / "docs" / "rest.md").read_text().split("```python\n")[1].split("```")[0]
    environment = os.environ | {"ADAPTERCTL_SERVER": url, "ADAPTERCTL_TOKEN": secret}
    fleet = subprocess.Popen(
        [sys.executable, "-u", "-c", script], env=environment, stdout=subprocess.PIPE, text=True, cwd=tmp_path
    )
    try:
        assert fleet.stdout.readline() == "serve nothing\n"
        registry.promote(parse_ref("translate:v1"), to="production")
        assert fleet.stdout.readline() == "serve translate:v1\n"
    finally:
        fleet.kill()
        fleet.wait()
        fleet.stdout.close()


@dataclass
class Crowded:
    """A server that has few streams: two for a token, three in all."""

    registry: LocalRegistry
    url: str
    secrets: tuple[str, str]
    stack: ExitStack

    def listen(self, who: int, path: str = "/v1/events") -> Listener:
        """Its first line is read, so that it is open."""
        listener = self.stack.enter_context(closing(Listener(self.url, self.secrets[who], path=path)))
        listener.first = listener.answer.readline()
        return listener


@pytest.fixture
def crowded(registry: LocalRegistry) -> Iterator[Crowded]:
    secrets = tuple(registry.create_token(name, scope=Scope.READ).secret for name in ("ada", "bob"))
    rules = Rules(hosts=("127.0.0.1",), upload_bytes=1, streams=3, streams_per_token=2)
    door = create_app(registry, registry.access, rules, version="1.2.3")
    listening = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(door, log_config=None, lifespan="off", timeout_graceful_shutdown=1))
    serving = threading.Thread(target=server.run, args=[[listening]], daemon=True)
    serving.start()
    with ExitStack() as stack:
        yield Crowded(registry, f"http://127.0.0.1:{listening.getsockname()[1]}", secrets, stack)
    server.should_exit = True
    serving.join(30)


def submitted(registry: LocalRegistry, key: str = "k") -> Job:
    """A job for which nobody was woken."""
    return registry.ledger.submit(NewJob("merge", key, "merge a b", {}, "ada"))[0]


@pytest.mark.parametrize("of", ["the registry", "a job"])
def test_a_stream_sends_nothing_more_to_a_token_that_was_revoked(listened: tuple[LocalRegistry, str, str], of: str):
    registry, url, _ = listened
    job = submitted(registry, key=of)
    made = registry.create_token("leaving", scope=Scope.READ)
    path = "/v1/events" if of == "the registry" else f"/v1/jobs/{job.id}/events"
    listener = Listener(url, made.secret, "?after=now" if of == "the registry" else "", path=path)
    listener.answer.readline()

    remote(url, registry.create_token("root", scope=Scope.ADMIN).secret).revoke_token(made.token.id)
    change_tags(registry, 3)
    registry.ledger.request_cancel(job.id)

    with closing(listener):
        seen = (each for each in listener if each.get("kind") == "tag" or each.get("state") == "cancelled")
        assert next(seen, None) is None


def test_streams_of_a_token_and_in_all_are_counted_as_long_as_they_are_open(crowded: Crowded):
    job = submitted(crowded.registry)
    first, _ = crowded.listen(0), crowded.listen(0, f"/v1/jobs/{job.id}/events")

    of_token = crowded.listen(0)
    of_other = crowded.listen(1)
    in_all = crowded.listen(1)
    first.close()
    began = time.monotonic()
    while (again := crowded.listen(1)).answer.status != 200:
        assert time.monotonic() - began < 20, "what was closed is counted for good"
        time.sleep(0.1)

    assert [each.answer.status for each in (of_token, of_other, in_all, again)] == [429, 200, 429, 200]
    assert [each.answer.headers["retry-after"] for each in (of_token, in_all)] == ["5", "5"]
    told = [json.loads(each.first) for each in (of_token, in_all)]
    assert {each["code"] for each in told} == {"too_many_requests"}
    assert [each["detail"] for each in told] == [
        "too many streams of events are open of this token: 2",
        "too many streams of events are open in all: 3",
    ]


def test_a_client_for_which_there_is_no_stream_looks_now_and_then(crowded: Crowded, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(events, "WAIT_S", 1.0)
    job = submitted(crowded.registry)
    first, _ = crowded.listen(0), crowded.listen(0)
    mine = remote(crowded.url, crowded.secrets[0])

    followed = mine.follow(job.id)
    heard = mine.follow_events(after=0)
    states = [next(followed).state]
    kinds = [next(heard).kind]
    crowded.registry.cancel(job.id)
    crowded.registry.promote(parse_ref("translate:v1"), to="staging")
    states += [each.state for each in followed]
    kinds.append(next(heard).kind)
    other = submitted(crowded.registry, "other")
    with pytest.raises(WaitTimedOut, match=r"is queued after 0\.5 s"):
        list(mine.follow(other.id, timeout_s=0.5))
    first.close()
    crowded.registry.demote("translate", stage="staging")

    assert states == [JobState.QUEUED, JobState.CANCELLED]
    assert [*kinds, next(heard).kind] == ["register", "promote", "demote"]

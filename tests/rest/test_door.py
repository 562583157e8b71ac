"""What the door keeps out, and what it leaves on record."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
import pytest
from starlette.testclient import TestClient
from tiny import write_tiny_adapter

from adapterctl.bootstrap import connect
from adapterctl.registry.domain import errors
from adapterctl.registry.domain.access import Scope
from adapterctl.registry.domain.job import JobState, NewJob
from adapterctl.registry.domain.refs import parse_ref
from adapterctl.registry.rest.app import create_app
from adapterctl.registry.rest.door import JSON_BYTES, Rules, everyone
from adapterctl.registry.rest.problems import STATUS, from_problem, to_problem
from adapterctl.registry.services.bake import bake
from adapterctl.registry.services.carry import export
from adapterctl.registry.services.layouts import lay_out
from adapterctl.registry.services.local import LocalRegistry
from adapterctl.registry.settings import Settings

UPLOAD_BYTES = 1 << 20


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("localhost:5000", 200),
        ("LOCALHOST", 200),
        ("evil.example", 421),
        ("localhost.evil.example", 421),
        ("evil.example:80@localhost", 421),
        ("", 421),
        ("127.0.0.1", 421),
    ],
)
def test_only_the_servers_own_names_are_answered(served: Any, host: str, status: int):
    answer = served.client.get("/v1/whoami", headers={"Host": host, **served.auth("read")})

    assert answer.status_code == status


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 404),
        ({"Origin": "http://localhost:8080"}, 404),
        ({"Sec-Fetch-Site": "same-origin"}, 404),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://localhost.evil.example"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Origin": "http://localhost:9999", "Sec-Fetch-Site": "same-site"}, 403),
        ({"Sec-Fetch-Site": "none"}, 404),
    ],
    ids=str,
)
def test_pages_of_other_sites_change_nothing(served: Any, headers: dict[str, str], status: int):
    body = {"version": "1", "to": "production"}

    answer = served.client.post("/v1/adapters/x/promotions", json=body, headers={**headers, **served.auth("admin")})

    assert answer.status_code == status


@pytest.mark.parametrize(
    "header",
    ["", "Bearer", "Bearer ", "Basic", "Basic !!!", "Basic bm9jb2xvbg==", "Digest x", "Bearer actl_", "bearer x y"],
)
def test_what_is_no_token_opens_nothing(served: Any, header: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(served.door._failures, "_size", 1e9)

    assert served.client.get("/v1/adapters", headers={"Authorization": header}).status_code == 401


@pytest.fixture
def tokenless(new_home: Callable[[str], Path]) -> Iterator[tuple[TestClient, LocalRegistry]]:
    """A server on a loopback address, for which no token was made yet, and its registry."""
    registry = connect(Settings(home=new_home("tokenless"), actor="ada"))
    rules = Rules(hosts=("localhost",), upload_bytes=1, anyone=everyone("ada"))
    door = create_app(registry, registry.access, rules, version="1.2.3")
    with closing(registry.ledger), TestClient(door, base_url="http://localhost") as client:
        yield client, registry


@pytest.mark.parametrize("where", ["over REST", "on the machine, and is no longer valid"])
def test_a_server_asks_for_tokens_from_the_first_one_on(tokenless: Any, where: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("adapterctl.registry.rest.door.REMEMBERED_S", 0.0 if where != "over REST" else 60.0)
    client, registry = tokenless
    before = client.get("/v1/adapters").status_code

    if where == "over REST":
        client.post("/v1/tokens", json={"name": "root", "scope": "admin"})
    else:
        made = registry.create_token("root", scope=Scope.ADMIN)
        registry.revoke_token(made.token.id)

    assert (before, client.get("/v1/adapters").status_code) == (200, 401)


@pytest.mark.parametrize("header", ["Forwarded", "Via", "X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto"])
def test_what_a_proxy_passes_on_needs_a_token_though_none_was_made(tokenless: Any, header: str):
    answer = tokenless[0].get("/v1/adapters", headers={header: "192.0.2.7"})

    assert answer.status_code == 401
    assert "a proxy passed this on" in answer.json()["detail"]


def test_who_fails_too_often_waits(serving_with: Any):
    with serving_with(Rules(hosts=("localhost",), upload_bytes=1, failures_per_minute=3)) as served:
        answers = [served.client.get("/v1/adapters") for _ in range(5)]

    assert [answer.status_code for answer in answers] == [401, 401, 401, 429, 429]
    assert int(answers[-1].headers["retry-after"]) >= 1


def test_a_valid_token_is_let_in_where_others_try_wrong_ones_from_its_address(serving_with: Any):
    with serving_with(Rules(hosts=("localhost",), upload_bytes=1, failures_per_minute=3)) as served:
        for _ in range(5):
            served.client.get("/v1/adapters", headers={"Authorization": "Bearer actl_wrong"})
        valid = served.client.get("/v1/whoami", headers=served.auth("read"))
        new = served.client.post(
            "/v1/tokens", json={"name": "new", "scope": "read"}, headers=served.auth("admin")
        ).json()
        as_new = {"Authorization": f"Bearer {new['secret']}"}
        made = served.client.get("/v1/whoami", headers=as_new)
        served.client.delete(f"/v1/tokens/{new['token']['id']}", headers=served.auth("admin"))
        revoked = served.client.get("/v1/whoami", headers=as_new)

    assert (valid.status_code, made.status_code, revoked.status_code) == (200, 200, 429)


def test_a_flood_of_wrong_tokens_asks_the_ledger_for_none_of_them(serving_with: Any, monkeypatch: pytest.MonkeyPatch):
    asked: list[str] = []
    with serving_with(Rules(hosts=("localhost",), upload_bytes=1, failures_per_minute=3)) as served:
        monkeypatch.setattr("adapterctl.registry.rest.door.REMEMBERED_S", 60.0)
        callers = served.door._callers
        lookup, listed = callers._lookup, callers._list
        monkeypatch.setattr(callers, "_lookup", lambda secret: (asked.append("one"), lookup(secret))[1])
        monkeypatch.setattr(callers, "_list", lambda: (asked.append("all"), listed())[1])

        answers = [
            served.client.get("/v1/adapters", headers={"Authorization": f"Bearer actl_{number}"})
            for number in range(50)
        ]

    assert [answer.status_code for answer in answers] == [401] * 3 + [429] * 47
    assert asked == ["one"] * 3 + ["all"]


def test_who_asks_too_often_waits(serving_with: Any):
    with serving_with(Rules(hosts=("localhost",), upload_bytes=1, requests_per_minute=2)) as served:
        statuses = [served.client.get("/v1/whoami", headers=served.auth("read")).status_code for _ in range(3)]
        other = served.client.get("/v1/whoami", headers=served.auth("merge")).status_code

    assert statuses == [200, 200, 429]
    assert other == 200


def test_where_things_are_on_the_server_is_told_to_admins_alone(served: Any):
    home = str(served.registry.settings.home)

    told = {scope: served.client.get("/v1/doctor", headers=served.auth(scope)).json() for scope in Scope}

    assert {scope for scope, checks in told.items() if home in json.dumps(checks)} == {Scope.ADMIN}
    assert [check["detail"] for check in told[Scope.READ] if check["name"] == "home"] == ["the home"]
    assert {tuple(check["name"] for check in checks) for checks in told.values()} == {
        tuple(check["name"] for check in told[Scope.ADMIN])
    }


@pytest.mark.parametrize("announced", [True, False])
def test_bodies_are_limited_whether_announced_or_not(served: Any, announced: bool):
    def body() -> Iterator[bytes]:
        for _ in range(JSON_BYTES // 1000 + 2):
            yield b" " * 1000

    content = b"".join(body()) if announced else body()
    answer = served.client.post("/v1/merges", content=content, headers=served.auth("merge"))

    assert answer.status_code == 413


def test_a_request_leaves_one_line_that_holds_no_secret(served: Any, caplog: pytest.LogCaptureFixture):
    secret = served.secrets["read"]
    with caplog.at_level(logging.INFO, logger="adapterctl"):
        headers = {"X-Request-Id": "mine", **served.auth("read")}
        answer = served.client.get(f"/v1/whoami?token={secret}", headers=headers)

    (record,) = [record for record in caplog.records if record.name == "adapterctl.http"]
    line = json.loads(record.getMessage())
    assert (line["request_id"], line["path"], line["status"], line["caller"]) == ("mine", "/v1/whoami", 400, "read")
    assert answer.headers["x-request-id"] == "mine"
    assert secret not in caplog.text


def test_a_method_that_a_stranger_made_up_becomes_no_figure_of_its_own(served: Any):
    served.client.request("BREW", "/v1/jobs")

    lines = served.client.get("/metrics", headers=served.auth("read")).text.splitlines()
    counted = [line for line in lines if line.startswith('adapterctl_requests_total{area="/v1/jobs"')]
    assert 'adapterctl_requests_total{area="/v1/jobs",method="other",status="401"} 1.0' in counted
    assert "BREW" not in "".join(lines)


def test_figures_come_without_the_time_at_which_each_was_made(served: Any):
    served.client.get("/v1/jobs", headers=served.auth("read"))

    figures = served.client.get("/metrics", headers=served.auth("read")).text

    assert "adapterctl_requests_total{" in figures
    assert "_created" not in figures


def test_a_bad_request_id_is_replaced(served: Any):
    answer = served.client.get("/healthz", headers={"X-Request-Id": "a b\tc"})

    assert len(answer.headers["x-request-id"]) == 32


def test_an_error_that_nobody_expected_tells_nothing(served: Any, monkeypatch: pytest.MonkeyPatch):
    def broken(self: object) -> None:
        raise RuntimeError("canary: the inside of the server")

    monkeypatch.setattr(type(served.registry), "adapters", broken)

    answer = served.client.get("/v1/adapters", headers=served.auth("read"))

    assert answer.status_code == 500
    assert answer.json()["code"] == "failure"
    assert "canary" not in answer.text


def test_what_is_not_there_is_a_problem_too(served: Any):
    for method, path, status in (("GET", "/v1/nothing", 404), ("DELETE", "/v1/adapters", 405)):
        answer = served.client.request(method, path, headers=served.auth("admin"))

        assert answer.status_code == status
        assert answer.headers["content-type"] == "application/problem+json"


# problems


def every_error(kind: type[errors.AdapterctlError] = errors.AdapterctlError) -> Iterator[type[errors.AdapterctlError]]:
    yield kind
    for below in kind.__subclasses__():
        if below.__module__ == errors.__name__:
            yield from every_error(below)


def test_every_error_has_its_status():
    assert set(STATUS) == set(every_error())


@pytest.mark.parametrize("kind", list(every_error()), ids=lambda kind: kind.code)
def test_every_error_survives_the_wire(kind: type[errors.AdapterctlError]):
    error = kind("what happened", hint="what to do", problems=[errors.Problem("code", "message", "hint")])

    back = from_problem(400, json.dumps(to_problem(error)).encode())

    assert type(back) is kind
    assert (back.message, back.hint, back.problems) == (error.message, error.hint, error.problems)


@pytest.mark.parametrize(
    "body", [b"", b"<html>", b"[]", b'{"code": 1}', b'{"code": "x", "detail": "y", "errors": [1]}']
)
def test_an_answer_of_somebody_else_is_said_to_be_one(body: bytes):
    assert isinstance(from_problem(502, body), errors.Unavailable)


# requests that are sent again


def base_request(served: Any, key: str, name: str = "b/1", scope: str = "merge") -> Any:
    headers = {"Idempotency-Key": key, **served.auth(scope)}
    return served.client.post("/v1/bases", json={"name": name}, headers=headers)


def test_a_request_with_the_same_key_is_answered_again_and_not_done_again(served: Any):
    first, again = base_request(served, "k1"), base_request(served, "k1")
    other = base_request(served, "k1", "b/2")
    someone_else = base_request(served, "k1", "b/2", scope="admin")

    assert (first.status_code, again.status_code) == (200, 200)
    assert first.json() == again.json()
    assert "idempotent-replayed" not in first.headers
    assert again.headers["idempotent-replayed"] == "true"
    assert other.status_code == 422
    assert someone_else.status_code == 200


def test_a_request_that_is_being_answered_is_a_conflict(served: Any):
    token = next(token for token in served.registry.tokens() if token.name == "merge")
    digest = hashlib.sha256(b'POST /v1/bases?\n{"name":"b/3"}').hexdigest()
    served.registry.access.begin_replay(token.id, "k2", digest)

    assert base_request(served, "k2", "b/3").status_code == 409


def test_a_request_that_failed_may_be_sent_again_under_its_key(served: Any):
    body = {"spelling": "x/1", "base": "x/2"}
    headers = {"Idempotency-Key": "k3", **served.auth("admin")}

    failed = served.client.post("/v1/base-aliases", json=body, headers=headers)
    base_request(served, "k4", "x/2")
    done = served.client.post("/v1/base-aliases", json=body, headers=headers)

    assert (failed.status_code, done.status_code) == (404, 200)


def test_what_only_reads_is_not_kept_for_a_second_answer(served: Any, tmp_path: Path):
    for seed, name in enumerate(("left", "right")):
        served.registry.register(str(write_tiny_adapter(tmp_path / name, seed=seed)), name=name)
    headers = {"Idempotency-Key": "k6", **served.auth("read")}

    first, again = (
        served.client.post("/v1/plans", json={"parents": ["left", "right"]}, headers=headers) for _ in range(2)
    )

    assert first.status_code == again.status_code == 200
    assert "idempotent-replayed" not in again.headers
    assert first.json() == again.json()


def test_the_secret_of_a_new_token_is_not_kept_for_a_second_answer(served: Any):
    headers = {"Idempotency-Key": "k5", **served.auth("admin")}

    first, again = (
        served.client.post("/v1/tokens", json={"name": "n", "scope": "read"}, headers=headers) for _ in range(2)
    )

    assert first.json()["secret"] != again.json()["secret"]


# what is asked


@pytest.mark.parametrize(
    ("path", "name"),
    [("/v1/versions?name=x&stages=production", "stages"), ("/v1/jobs?State=live", "State"), ("/v1/whoami?x", "x")],
)
def test_a_query_that_is_not_read_is_refused(served: Any, path: str, name: str):
    answer = served.client.get(path, headers=served.auth("read"))

    assert answer.status_code == 400
    assert answer.json()["detail"] == f"the query has {name!r}"
    assert answer.json()["hint"].startswith("known here: ")


def test_a_balancer_may_ask_with_head_and_is_counted_apart_from_mlflow(served: Any):
    answers = [served.client.head(path) for path in ("/healthz", "/readyz")]
    figures = served.client.get("/metrics", headers=served.auth("read")).text

    assert [answer.status_code for answer in answers] == [200, 200]
    for path in ("/healthz", "/readyz"):
        assert f'adapterctl_requests_total{{area="{path}",method="HEAD",status="200"}} 1.0' in figures


# pages


def test_pages_follow_each_other_and_end(served: Any):
    for number in range(5):
        served.registry.ledger.submit(NewJob("verify", f"page-{number}", "t", {}, "ada"))
    seen: list[str] = []
    token: str | None = None
    while True:
        query = {"max_results": 2, "state": "queued"} | ({"page_token": token} if token else {})
        page = served.client.get("/v1/jobs", params=query, headers=served.auth("read")).json()
        assert len(page["jobs"]) <= 2
        seen += [job["id"] for job in page["jobs"]]
        token = page["next_page_token"]
        if token is None:
            break

    assert seen == [job.id for job in served.registry.jobs(state="queued")]
    for job in seen:
        served.registry.cancel(job)


def test_the_page_token_of_another_list_ends_no_list_of_jobs(served: Any):
    token = "WyJ0cmFuc2xhdGUiXQ=="  # ["translate"], as of a page of adapters

    answer = served.client.get("/v1/jobs", params={"page_token": token}, headers=served.auth("read"))

    assert answer.status_code == 400
    assert answer.json()["detail"] == "page_token is not one of this list"


@pytest.mark.parametrize("token", ["x", "e30=", "W10=", "WzFd", "WyJhIiwgInYiXQ==", "////"])
def test_a_page_token_that_is_none_is_refused(served: Any, token: str):
    answer = served.client.get("/v1/versions", params={"page_token": token}, headers=served.auth("read"))

    assert answer.status_code in (200, 400)
    assert answer.status_code == 400 or answer.json()["versions"] == []


# events


def events_of(text: str) -> list[tuple[str, str, Any]]:
    found = []
    for block in text.strip().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines())
        found.append((fields["event"], fields.get("id", ""), json.loads(fields["data"])))
    return found


def test_a_stream_tells_a_job_to_its_end_and_goes_on_where_it_broke(served: Any):
    ledger = served.registry.ledger
    job, _ = ledger.submit(NewJob("verify", "stream", "t", {}, "ada"))
    ledger.claim("w", 60, kinds=["verify"])
    ledger.finish(job.id, 1, JobState.SUCCEEDED)
    headers = {"Accept": "text/event-stream", **served.auth("read")}

    whole = served.client.get(f"/v1/jobs/{job.id}/events", headers=headers)
    rest = served.client.get(f"/v1/jobs/{job.id}/events", headers={**headers, "Last-Event-ID": "2"})

    assert whole.headers["content-type"].startswith("text/event-stream")
    assert [(kind, number) for kind, number, _ in events_of(whole.text)] == [
        ("event", "1"),
        ("event", "2"),
        ("event", "3"),
        ("job", ""),
        ("end", ""),
    ]
    assert [number for kind, number, _ in events_of(rest.text) if kind == "event"] == ["3"]
    assert events_of(rest.text)[-2][2]["state"] == "succeeded"


def test_the_log_of_a_job_is_read_from_the_ledger(served: Any):
    job, _ = served.registry.ledger.submit(NewJob("verify", "log", "t", {}, "ada"))
    served.registry.ledger.append_log(job.id, "module 3 of 96\n")
    served.registry.cancel(job.id)

    answer = served.client.get(f"/v1/jobs/{job.id}/log", headers=served.auth("read"))

    assert answer.json() == [{"seq": 1, "text": "module 3 of 96\n"}]


# uploads and downloads


def upload(served: Any, parts: list[tuple[str, bytes]], name: str = "up", **changes: Any) -> Any:
    files = [(part, (part, content)) for part, content in parts]
    return served.client.post(f"/v1/adapters/{name}/versions", files=files, headers=served.auth("merge"), **changes)


@pytest.fixture
def parts(tmp_path: Path) -> list[tuple[str, bytes]]:
    folder = write_tiny_adapter(tmp_path / "adapter", seed=77)
    files = [(name, (folder / name).read_bytes()) for name in ("adapter_config.json", "adapter_model.safetensors")]
    return [("about", b'{"source": "./mine"}'), *files]


def test_files_go_up_and_come_down_with_their_digests(served: Any, parts: list[tuple[str, bytes]]):
    made = upload(served, parts)
    again = upload(served, parts)

    assert (made.status_code, again.status_code) == (201, 200)
    assert made.headers["location"] == "/v1/adapters/up/versions/1"
    assert made.json()["version"]["created_by"] == "merge"
    for record in made.json()["version"]["files"]:
        answer = served.client.get(f"/v1/adapters/up/versions/1/files/{record['path']}", headers=served.auth("read"))
        assert hashlib.sha256(answer.content).hexdigest() == record["sha256"]
        assert answer.headers["etag"] == f'"{record["sha256"]}"'
        assert answer.headers["content-length"] == str(record["size_bytes"])
        assert answer.headers["repr-digest"].startswith("sha-256=:")
    assert list((served.registry.settings.home / "staging").iterdir()) == []


@pytest.mark.parametrize(
    "path", ["../../registry.db", "%2e%2e/%2e%2e/registry.db", "/etc/passwd", "MLmodel/..", "nothing"]
)
def test_only_files_of_the_manifest_come_down(served: Any, parts: list[tuple[str, bytes]], path: str):
    upload(served, parts)

    answer = served.client.get(f"/v1/adapters/up/versions/1/files/{path}", headers=served.auth("read"))

    assert answer.status_code in (400, 404, 405)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda parts: parts[1:], "no part about"),
        (lambda parts: parts[:2], "no part adapter_model.safetensors"),
        (lambda parts: [*parts, ("adapter_model.bin", b"x")], "has a part 'adapter_model.bin'"),
        (lambda parts: [*parts, ("../../x", b"x")], "has a part '../../x'"),
        (lambda parts: [*parts, parts[1]], "adapter_config.json twice"),
        (lambda parts: [parts[0], ("adapter_config.json", b" " * ((1 << 20) - 50_000)), parts[2]], "JSON"),
        (lambda parts: [("about", b'{"source": "./x", "more": 1}'), *parts[1:]], "more"),
        (lambda parts: [("about", b"{"), *parts[1:]], "JSON"),
    ],
    ids=["no about", "no weights", "pickle", "path", "twice", "not JSON", "unknown word", "broken about"],
)
def test_an_upload_that_is_no_adapter_is_refused_and_leaves_nothing(
    served: Any, parts: list[tuple[str, bytes]], change: Any, said: str
):
    answer = upload(served, change(parts), "refused")

    assert answer.status_code in (400, 422)
    assert said in answer.text
    assert served.registry.versions() == [] or "refused" not in {v.name for v in served.registry.versions()}
    assert list((served.registry.settings.home / "staging").iterdir()) == []


@pytest.mark.parametrize("where", ["here", "behind an address"])
def test_no_files_go_out_under_a_stage_that_was_moved_in_mlflow(served: Any, tmp_path: Path, where: str):
    registry = served.registry if where == "here" else served.remote()
    name = where.replace(" ", "-")
    for seed in (0, 1):
        adapter = write_tiny_adapter(tmp_path / str(seed), seed=seed)
        registry.register(str(adapter), name=name)
    stage = parse_ref(f"{name}@production")
    registry.promote(parse_ref(f"{name}:v1"), to="production", reason="first")
    served.registry.version_store._client.set_registered_model_alias(name, "production", "2")

    for verb in (
        lambda: registry.pull(stage, tmp_path / "pulled"),
        lambda: lay_out(registry, [stage], tmp_path / "served", "vllm"),
        lambda: export(registry, [stage], tmp_path / "family"),
        lambda: bake(registry, stage, tmp_path / "baked", settings=Settings(home=tmp_path)),
    ):
        with pytest.raises(errors.StageMoved, match=f"production of {name} is {name}:v1 in the ledger"):
            verb()

    assert {path.name for path in tmp_path.iterdir()} == {"0", "1"}
    assert registry.version(stage).ref == f"{name}:v1"
    lay_out(registry, [parse_ref(f"{name}:v1")], tmp_path / "served", "vllm")


def test_an_upload_that_is_cut_or_too_large_is_refused(served: Any, parts: list[tuple[str, bytes]]):
    boundary = b"b"
    body = b"".join(
        b'--b\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n' % (name.encode(), content)
        for name, content in parts
    )
    headers = {"Content-Type": f"multipart/form-data; boundary={boundary.decode()}", **served.auth("merge")}

    cut = served.client.post("/v1/adapters/cut/versions", content=body, headers=headers)
    large = upload(served, [parts[0], parts[1], ("adapter_model.safetensors", b"x" * UPLOAD_BYTES)], "large")

    assert cut.status_code == 400
    assert "ended before its last boundary" in cut.text
    assert large.status_code == 413


@pytest.mark.parametrize("source", ["/etc", "./adapter", "~", "file:///etc"])
def test_a_path_of_the_server_is_no_source(served: Any, source: str):
    answer = served.client.post("/v1/adapters/path/versions", json={"source": source}, headers=served.auth("admin"))

    assert answer.status_code == 400


def test_the_description_names_every_route_and_every_view(served: Any):
    described = served.client.get("/v1/openapi.json", headers=served.auth("read")).json()

    assert described["openapi"].startswith("3.1")
    assert described["info"]["version"] == "1.2.3"
    schemas = described["components"]["schemas"]
    assert {"VersionView", "Submitted", "LineageView", "Job", "ProblemView", "MergeBody"} <= set(schemas)
    assert schemas["VersionView"]["properties"]["rank"] == {"type": "integer", "title": "Rank"}
    assert schemas["MergeBody"]["additionalProperties"] is False


def test_changes_are_recorded_under_the_name_of_the_token(served: Any, parts: list[tuple[str, bytes]]):
    secret = served.registry.create_token("grace", scope=Scope.PROMOTE).secret
    upload(served, parts, "named")

    answer = served.client.post(
        "/v1/adapters/named/promotions",
        json={"version": "1", "to": "staging", "reason": "r"},
        headers={"Authorization": f"Bearer {secret}"},
    )

    assert answer.json()["actor"] == "grace"


def test_an_adapter_is_shown_and_its_versions_listed_where_they_are_registered(served: Any, tmp_path: Path):
    for number in (1, 2, 3):
        folder = write_tiny_adapter(tmp_path / str(number), seed=900 + number)
        served.registry.register(str(folder), name="listed")
    served.registry.remove(parse_ref("listed:v2"), reason="a test")

    def get(path: str) -> Any:
        return served.client.get(f"/v1/adapters/{path}", headers=served.auth("read"))

    shown = get("listed").json()
    first = get("listed/versions?max_results=1").json()
    rest = get(f"listed/versions?page_token={first['next_page_token']}").json()

    assert (shown["name"], shown["versions"], shown["latest"]) == ("listed", 2, "v3")
    assert [each["ref"] for each in first["versions"] + rest["versions"]] == ["listed:v1", "listed:v3"]
    assert rest["next_page_token"] is None
    assert [each["number"] for each in get("listed/versions?removed=true").json()["versions"]] == [1, 2, 3]
    for missing in ("liste", "liste/versions"):
        assert (get(missing).status_code, get(missing).json()["hint"]) == (404, "did you mean listed?")
    for number in (1, 3):
        served.registry.remove(parse_ref(f"listed:v{number}"), reason="a test")
    assert "every version of listed was removed" in get("listed").json()["detail"]


def test_a_server_is_ready_only_while_its_ledger_answers(
    home: Path, postgres_url: str, new_database: Callable[[str], str], postgres_mlflow_schema: str
):
    address = new_database(postgres_mlflow_schema)
    registry = connect(Settings(home=home, actor="ada", database_url=postgres_url, mlflow_uri=address))
    door = create_app(registry, registry.access, Rules(hosts=("localhost",), upload_bytes=1), version="1.2.3")
    with closing(registry.ledger), TestClient(door, base_url="http://localhost") as client:
        before = client.get("/readyz").status_code
        with psycopg.connect(postgres_url) as other:
            other.execute("LOCK TABLE version IN ACCESS EXCLUSIVE MODE")  # as good as a database that stands still
            frozen = [client.get("/readyz") for _ in range(2)]
        after = [client.get("/readyz").status_code for _ in range(2)]

    assert before == 200
    assert [(answer.status_code, "has not answered" in answer.text) for answer in frozen] == [(503, True)] * 2
    assert after[-1] == 200

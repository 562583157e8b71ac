"""`adapterctl serve` as a process: commands against it, MLflow's pages behind its door, and where secrets go."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import time
import tomllib
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from keys import public, write_key
from tiny import write_tiny_adapter
from typer.testing import CliRunner

from adapterctl.bootstrap import application, connect, mlflow_app
from adapterctl.cli.main import app
from adapterctl.registry.domain.access import Scope
from adapterctl.registry.domain.errors import Misconfigured, Unavailable
from adapterctl.registry.domain.recipe import MergeRequest
from adapterctl.registry.domain.refs import parse_parent, parse_ref
from adapterctl.registry.rest.app import LOOPBACK, listen
from adapterctl.registry.settings import Settings
from adapterctl.registry.stores.mlflow_server import SWITCHED_OFF

HEAVY = {"alembic", "fastapi", "httpx", "httpx2", "mlflow", "numpy", "requests", "sqlalchemy", "starlette"}


@dataclass(frozen=True)
class Server:
    home: Path
    url: str
    log: Path
    secrets: dict[str, str]


@pytest.fixture(scope="module")
def server(
    new_home: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory, server_process: Callable
) -> Iterator[Server]:
    """A registry with translate:v1 and chat:v1, served with tokens."""
    home, folder = new_home("home"), tmp_path_factory.mktemp("adapters")
    registry = connect(Settings(home=home, actor="ada"))
    with closing(registry.ledger):
        for seed, name in enumerate(("translate", "chat"), start=1):
            registry.register(str(write_tiny_adapter(folder / name, seed=seed)), name=name)
        secrets = {scope.value: registry.create_token(scope.value, scope=scope).secret for scope in Scope}
    log = tmp_path_factory.mktemp("server") / "log"
    with server_process(home, log, environment={"ADAPTERCTL_IDLE_S": "1"}) as url:
        yield Server(home, url, log, secrets)


@pytest.fixture
def ask(server: Server) -> Callable[..., tuple[int, str]]:
    """Status and text of a request to the server."""

    def send(
        path: str,
        scope: str = "",
        *,
        method: str = "GET",
        body: object = None,
        headers: Mapping[str, str] = MappingProxyType({}),
    ) -> tuple[int, str]:
        given = {"Authorization": f"Bearer {server.secrets[scope]}"} if scope else {}
        data = None if body is None else json.dumps(body).encode()
        sent = {"Content-Type": "application/json", **given, **headers}
        request = Request(server.url + path, data, sent, method=method)
        try:
            with urlopen(request, timeout=60) as answer:
                return answer.status, answer.read().decode()
        except HTTPError as error:
            with closing(error):
                return error.code, error.read().decode()

    return send


@pytest.fixture
def run(server: Server, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """Exit code, stdout and stderr of a command that goes to the server, or with `local` to its home."""

    def invoke(*words: str, local: bool = False, scope: str = "admin", stdin: str = "") -> tuple[int, str, str]:
        with pytest.MonkeyPatch.context() as patch:
            if local:
                patch.setenv("ADAPTERCTL_HOME", str(server.home))
            else:
                patch.setenv("ADAPTERCTL_SERVER", server.url)
                patch.setenv("ADAPTERCTL_TOKEN", server.secrets[scope])
            result = CliRunner().invoke(app, list(words), prog_name="adapterctl", input=stdin, catch_exceptions=False)
        return result.exit_code, result.stdout, result.stderr

    return invoke


def test_commands_say_the_same_wherever_the_registry_is(run: Callable):
    made, _, said = run("merge", "translate:v1", "chat:v1", "--into", "both", "--method", "cat")
    run("promote", "both:v1", "--to", "staging", "--reason", "fits")
    assert made == 0, said

    for words in (
        ["ls"],
        ["ls", "both", "-o", "json"],
        ["show", "both@staging", "-o", "yaml"],
        ["diff", "translate:v1", "chat:v1"],
        ["diff", "translate:v1", "both:v1", "--layers"],
        ["lineage", "both:v1", "-o", "json"],
        ["history", "both", "--verify"],
        ["jobs", "ls"],
        ["plan", "translate:v1", "chat:v1", "--into", "both"],
        ["methods", "-q"],
        ["base", "ls", "-o", "json"],
        ["show", "nobody"],
        ["show", "both:v9", "-o", "json"],
        ["rm", "translate:v1", "--yes"],
        ["jobs", "show", "none"],
        ["promote", "both:v1", "--to", "nirvana"],
        ["tokens", "ls", "-q"],
    ):
        assert run(*words) == run(*words, local=True), words


def test_a_head_is_signed_where_the_key_is_and_checked_wherever_the_registry_is(run: Callable, tmp_path: Path):
    write_key(tmp_path, "head")
    head, private, public = str(tmp_path / "head"), tmp_path / "head.key", tmp_path / "head.pub"

    assert run("history", "chat", "--export-head", head, "--sign", str(private), scope="read")[0] == 0

    for local in (True, False):
        ended = run("history", "chat", "--verify", "--head", head, "--key", str(public), local=local, scope="read")
        assert ended[0] == 0, ended
    write_key(tmp_path, "head")
    code, _, said = run("history", "chat", "--verify", "--head", head, "--key", str(public), scope="read")
    assert (code, "is not by head.pub" in said) == (1, True)


def test_a_version_is_signed_where_the_key_is_and_pulled_by_who_trusts_that_key_alone(run: Callable, tmp_path: Path):
    for name in ("ada", "eve"):
        write_key(tmp_path, name)
    ada, eve = str(tmp_path / "ada.pub"), str(tmp_path / "eve.pub")

    assert run("sign", "chat:v1", "--key", str(tmp_path / "ada.key"), scope="read")[0] == 4
    signed = run("sign", "chat:v1", "--key", str(tmp_path / "ada.key"), scope="merge")

    assert signed[0] == 0, signed
    assert run("show", "chat:v1") == run("show", "chat:v1", local=True)
    assert run("verify", "chat:v1", "--key", ada, scope="merge")[0] == 0
    refused = run("pull", "chat", str(tmp_path / "out"), "--key", eve, scope="read")
    assert (refused[0], (tmp_path / "out").exists()) == (5, False)
    assert run("pull", "chat", str(tmp_path / "out"), "--key", ada, scope="read")[0] == 0
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_the_script_of_the_documentation_signs(server: Server, run: Callable, tmp_path: Path):
    key = public(write_key(tmp_path, "my"))
    page = (Path(__file__).parents[2] / "docs" / "rest.md").read_text()
    script = page.split("# Signatures\n")[1].split("```python\n")[1].split("```")[0]
    environment = os.environ | {"ADAPTERCTL_SERVER": server.url, "ADAPTERCTL_TOKEN": server.secrets["merge"]}

    said = subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    )

    assert said.stdout == f"{key.id}\n"
    assert run("verify", "translate:v1", "--key", str(tmp_path / "my.pub"))[0] == 0


def test_what_a_token_may_not_do_ends_with_code_4(run: Callable):
    code, _, said = run("rm", "translate:v1", "--yes", scope="promote")

    assert code == 4
    assert "needs admin" in said


def test_a_server_that_is_not_there_is_said_to_be_away(run: Callable, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ADAPTERCTL_SERVER", "http://127.0.0.1:1")

    result = CliRunner().invoke(app, ["ls"], prog_name="adapterctl", catch_exceptions=False)

    assert result.exit_code == 1
    assert "http://127.0.0.1:1 cannot be reached" in result.stderr


@pytest.mark.parametrize("address", ["registry", "ftp://registry", "http://ada:secret@registry", "http://"])
def test_an_address_that_is_none_is_refused(address: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ADAPTERCTL_SERVER", address)

    assert CliRunner().invoke(app, ["ls"], prog_name="adapterctl", catch_exceptions=False).exit_code == 2


def test_a_token_may_end_its_line_and_what_is_no_token_is_refused_unsaid(
    server: Server, monkeypatch: pytest.MonkeyPatch
):
    def listed(token: str) -> tuple[int, str]:
        monkeypatch.setenv("ADAPTERCTL_TOKEN", token)
        result = CliRunner().invoke(app, ["ls"], prog_name="adapterctl", catch_exceptions=False)
        return result.exit_code, result.output

    monkeypatch.setenv("ADAPTERCTL_SERVER", server.url)

    assert listed(f"{server.secrets['read']}\n")[0] == 0
    for wrong in ("can\nary", "canary€", "canary\x7f"):
        code, said = listed(wrong)
        assert code == 2
        assert "characters that none has" in said
        assert "anary" not in said


def test_a_command_that_goes_to_a_server_loads_nothing_heavy(server: Server):
    code = (
        "import sys, atexit\natexit.register(lambda: print(*sorted({n.partition('.')[0] for n in sys.modules}),"
        " file=sys.stderr))\nsys.argv = ['adapterctl', 'ls']\nfrom adapterctl.cli.main import main\nmain()"
    )
    environment = os.environ | {"ADAPTERCTL_SERVER": server.url, "ADAPTERCTL_TOKEN": server.secrets["read"]}

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)

    assert "translate" in done.stdout
    assert HEAVY.intersection(done.stderr.split()) == set()


def complete(server: str, token: str, *pieces: str) -> list[str]:
    """What bash is offered for the last of these pieces, where commands go to a server."""
    asked = {"_ADAPTERCTL_COMPLETE": "complete_bash", "COMP_CWORD": str(len(pieces))}
    words = {"COMP_WORDS": "\n".join(["adapterctl", *pieces])}
    registry = {"ADAPTERCTL_SERVER": server, "ADAPTERCTL_TOKEN": token}
    code = "from adapterctl.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | asked | words | registry
    )
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize(
    ("pieces", "answers"), [(["show", "trans"], ["translate"]), (["show", "translate", ":"], ["v1"])]
)
def test_completion_offers_what_the_server_has(server: Server, pieces: list[str], answers: list[str]):
    assert complete(server.url, server.secrets["read"], *pieces) == answers


def test_completion_is_silent_where_the_server_refuses_or_does_not_answer(server: Server):
    assert complete(server.url, "actl_wrong", "show", "trans") == []
    with socket.create_server(("127.0.0.1", 0)) as mute:  # takes the connection, says nothing
        assert complete("http://{}:{}".format(*mute.getsockname()), "", "show", "trans") == []


def test_login_keeps_the_token_for_its_owner_alone(
    server: Server, run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    file = tmp_path / "adapterctl" / "config.toml"
    file.parent.mkdir()
    file.write_text('# mine\nthreads = 3\nserver = "http://old"\n')
    invoke = lambda *words, stdin="": CliRunner().invoke(app, list(words), input=stdin, catch_exceptions=False)  # noqa: E731

    refused = invoke("login", server.url, stdin="actl_wrong\n")
    before = file.read_text()
    done = invoke("login", server.url, stdin=f"{server.secrets['merge']}\n")
    seen = invoke("ls", "-q")
    local = invoke("--home", str(tmp_path / "home"), "tokens", "create", "x", "-q")
    out = invoke("logout")

    assert (refused.exit_code, before) == (4, '# mine\nthreads = 3\nserver = "http://old"\n')
    assert (done.exit_code, done.stdout) == (0, "merge (merge)\n")
    assert seen.stdout.split() == sorted(seen.stdout.split())
    assert "translate" in seen.stdout
    assert local.exit_code == 0
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert out.exit_code == 0
    assert file.read_text() == "# mine\nthreads = 3\n"


def test_an_address_for_others_needs_a_token_first(home: Path):
    command = [sys.executable, "-m", "adapterctl", "serve", "--host", "0.0.0.0", "--port", "0"]

    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"ADAPTERCTL_HOME": str(home)})

    assert done.returncode == 2
    assert "tokens create" in done.stderr


@pytest.mark.parametrize("why", ["revoked", "expired", "a name for others"])
def test_a_loopback_address_is_open_only_where_no_token_was_ever_made_and_nobody_is_led_there(
    new_home: Callable[[str], Path], why: str
):
    hosts = ("registry.example.org",) if why == "a name for others" else ()
    registry = connect(Settings(home=new_home("once-closed"), allowed_hosts=hosts))

    with closing(registry.ledger):
        if why == "revoked":
            registry.revoke_token(registry.create_token("root", scope=Scope.ADMIN).token.id)
        elif why == "expired":
            registry.create_token("root", scope=Scope.ADMIN, valid_s=1e-6)

        with pytest.raises(Misconfigured, match="needs a valid token first"):
            application(registry, hosts=LOOPBACK, loopback=True)


# the socket


def test_answers_on_a_kept_connection_are_sent_at_once():
    nodelay: list[int] = []

    async def answer_twice(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nodelay.append(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        for _ in range(2):
            writer.write(await reader.readexactly(4))
        writer.close()
        await writer.wait_closed()

    async def ask_twice() -> list[bytes]:
        listening = listen("127.0.0.1", 0)
        async with await asyncio.start_server(answer_twice, sock=listening):
            reader, writer = await asyncio.open_connection(*listening.getsockname())
            answers = []
            for question in (b"one.", b"two."):
                writer.write(question)
                answers.append(await reader.readexactly(4))
            writer.close()
            await writer.wait_closed()
            return answers

    assert asyncio.run(ask_twice()) == [b"one.", b"two."]
    assert nodelay == [1]  # else Nagle's algorithm holds the second answer back until the first is acknowledged


def test_a_port_that_is_taken_is_said_in_our_words():
    with listen("127.0.0.1", 0) as first, pytest.raises(Unavailable, match="cannot listen on 127"):
        listen(*first.getsockname())


# MLflow behind the door


def test_mlflows_pages_ask_a_browser_for_the_token(server: Server, ask: Callable):
    nobody, _ = ask("/")
    basic = b64encode(f"any:{server.secrets['read']}".encode()).decode()
    status, page = ask("/", headers={"Authorization": f"Basic {basic}"})

    assert nobody == 401
    assert status == 200
    assert "MLflow" in page


def test_mlflows_client_works_with_a_token(server: Server, monkeypatch: pytest.MonkeyPatch):
    import mlflow  # deferred: seconds

    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", server.secrets["read"])
    client = mlflow.MlflowClient(tracking_uri=server.url, registry_uri=server.url)

    names = {model.name for model in client.search_registered_models()}

    assert {"chat", "translate"} <= names
    with pytest.raises(mlflow.exceptions.MlflowException, match="needs admin"):
        client.set_registered_model_alias("chat", "production", "1")


@pytest.mark.parametrize(("scope", "status"), [("read", 403), ("merge", 403), ("promote", 403), ("admin", 200)])
def test_only_admins_move_an_alias_in_mlflow(ask: Callable, scope: str, status: int):
    body = {"name": "translate", "alias": "candidate", "version": "1"}

    assert ask("/api/2.0/mlflow/registered-models/alias", scope, method="POST", body=body)[0] == status


def test_mlflows_own_paths_below_ours_are_not_reached(ask: Callable):
    """MLflow takes traces at /v1/traces, by no rule of ours: what we do not know there is nothing."""
    for method, path, status in (("POST", "/v1/traces", 404), ("GET", "/v1", 404), ("PUT", "/v1/adapters", 405)):
        headers = {"x-mlflow-experiment-id": "1", "Content-Type": "application/x-protobuf"}
        assert ask(path, "admin", method=method, body={}, headers=headers)[0] == status


def test_an_end_of_line_opens_nothing_that_is_closed(ask: Callable):
    """Routes end before it, so that MLflow's assistant would answer."""
    for path in ("/ajax-api/3.0/mlflow/assistant/providers%0A", "/ajax-api/3.0/jobs/search%0A", "/v1/jobs%0D"):
        status, answer = ask(path, "admin", method="POST", body={})
        assert (status, "cannot be printed" in answer) == (400, True)


@pytest.mark.parametrize(("scope", "status"), [("merge", 403), ("promote", 403), ("admin", 200)])
def test_who_logs_runs_cannot_write_the_tags_of_the_registry(ask: Callable, scope: str, status: int):
    api = "/api/2.0/mlflow"
    said = json.loads(ask(f"{api}/experiments/get-by-name?experiment_name=adapters", "read")[1])
    experiment = said["experiment"]["experiment_id"]

    def send(what: str, body: object) -> tuple[int, str]:
        return ask(f"{api}/{what}", scope, method="POST", body=body)

    created, answer = send("runs/create", {"experiment_id": experiment, "tags": [{"key": "mine", "value": "x"}]})
    run_id = json.loads(answer)["run"]["info"]["run_id"]
    tag = {"key": "adapterctl.made_up", "value": "x"}

    answers = [
        send("experiments/set-experiment-tag", tag | {"experiment_id": experiment}),
        send("runs/set-tag", tag | {"run_id": run_id}),
        send("runs/set-tag", json.dumps(tag | {"run_id": run_id})),  # as MLflow's oldest clients send it
        send("runs/log-batch", {"run_id": run_id, "tags": [{"key": "fine", "value": "x"}, tag]}),
        send("runs/create", {"experiment_id": experiment, "tags": [tag]}),
    ]

    assert created == 200
    assert [code for code, _ in answers] == [status] * 5
    assert ask(f"{api}/runs/delete", "admin", method="POST", body={"run_id": run_id})[0] == 200


@pytest.mark.parametrize(("scope", "status"), [("merge", 403), ("admin", 200)])
def test_who_logs_runs_makes_experiments_but_does_not_say_where_their_files_go(ask: Callable, scope: str, status: int):
    create = "/api/2.0/mlflow/experiments/create"

    plain, _ = ask(create, scope, method="POST", body={"name": f"plain-{scope}"})
    placed, answer = ask(
        create, scope, method="POST", body={"name": f"placed-{scope}", "artifactLocation": "file:///srv/elsewhere"}
    )

    assert (plain, placed) == (200, status), answer


def test_a_run_leads_to_no_folder_of_the_server_beside_its_own(server: Server, ask: Callable, tmp_path: Path):
    write_tiny_adapter(tmp_path / "private", seed=9)
    found = json.loads(ask("/api/2.0/mlflow/runs/search", "read", method="POST", body={"experiment_ids": ["1"]})[1])
    run_id = found["runs"][0]["info"]["run_id"]
    upwards = "/".join(["%2e%2e"] * len(server.home.parts) * 2)

    for path in (f"{upwards}{tmp_path}/private", f"x/{upwards}{tmp_path}/private", "../../x", "a//b", "a?b", "a%00b"):
        status, answer = ask(
            "/v1/adapters/taken/versions", "merge", method="POST", body={"source": f"runs:/{run_id}/{path}"}
        )
        assert (status, "is not an artifact of a run" in answer) == (400, True)


def test_a_family_of_this_machine_is_pushed_to_the_server(
    server: Server, run: Callable, new_home: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    home = new_home("mine")
    registry = connect(Settings(home=home, actor="bob", idle_s=1.0))
    with closing(registry.ledger):
        for seed, name in enumerate(("mine", "other", "alone"), start=31):
            registry.register(str(write_tiny_adapter(tmp_path / name, seed=seed)), name=name)
        asked = MergeRequest((parse_parent("mine:v1"), parse_parent("other:v1=0.5")), into="mine-other", method="cat")
        list(registry.follow(registry.merge(asked).job.id, timeout_s=120))
        made = registry.version(parse_ref("mine-other"))
    monkeypatch.setenv("ADAPTERCTL_HOME", str(home))

    planned = run("push", "mine-other", "--to", server.url, "--dry-run", "-o", "json")
    pushed = run("push", "mine-other", "--to", server.url, "-o", "json")
    again = run("push", "mine-other:v1", "--to", server.url, "-o", "json")
    refused = run("push", "alone", "--to", server.url, scope="read")
    elsewhere = run("push", "mine-other", "--to", "https://registry.example.org")

    actions = [[(each["ref"], each["action"]) for each in json.loads(out)] for _, out, _ in (planned, pushed, again)]
    assert actions[0] == [("mine", "register"), ("other", "register"), ("mine-other", "merge")]
    assert actions[1] == [("mine:v1", "register"), ("other:v1", "register"), ("mine-other:v1", "merge")]
    assert {action for _, action in actions[2]} == {"found"}
    there = json.loads(run("show", "mine-other:v1", "-o", "json")[1])
    assert (there["recipe_digest"], there["content_digest"]) == (made.recipe_digest, made.content_digest)
    assert [(each["ref"], each["weight"]) for each in there["parents"]] == [("mine:v1", 1.0), ("other:v1", 0.5)]
    assert (refused[0], elsewhere[0]) == (4, 2)
    assert "token is not for https://registry.example.org" in elsewhere[2]


def test_what_is_done_in_mlflow_past_us_is_in_the_history_with_who_did_it(server: Server, ask: Callable):
    mlflow = "/api/2.0/mlflow"
    moved = {"name": "translate", "alias": "production"}
    ours = [{"key": "adapterctl.version_id", "value": "of a worker"}]
    made = {"name": "translate", "source": "models:/translate/1"}

    for method, what, body in (
        ("POST", "registered-models/alias", moved | {"version": "1"}),
        ("POST", "registered-models/alias", moved | {"alias": "candidate", "version": "1"}),  # no stage
        ("DELETE", "registered-models/alias", moved),  # as the ledger says
        ("POST", "model-versions/create", made | {"tags": ours}),
        ("POST", "model-versions/create", made),
        ("DELETE", "model-versions/delete", {"name": "translate", "version": "3"}),  # none of ours
        ("POST", "registered-models/rename", {"name": "translate", "new_name": "translator"}),
    ):
        assert ask(f"{mlflow}/{what}", "admin", method=method, body=body)[0] == 200
    back = {"name": "translator", "new_name": "translate"}
    assert ask(f"{mlflow}/registered-models/rename", "admin", method="POST", body=back)[0] == 200
    deleted = {"name": "translate", "version": "2"}
    assert ask(f"{mlflow}/model-versions/delete", "admin", method="DELETE", body=deleted)[0] == 200
    assert ask(f"{mlflow}/model-versions/delete", "admin", method="DELETE", body=deleted)[0] == 404

    expected = [
        ("mlflow", "production", "translate:v1", "admin", "alias pointed to v1"),
        ("mlflow", "", None, "admin", "a version made of models:/translate/1"),
        ("mlflow", "", None, "admin", "renamed to translator"),
    ]
    deadline = time.monotonic() + 60
    events = []
    while len(events) < len(expected) and time.monotonic() < deadline:  # noted once the answer was sent
        events = json.loads(ask("/v1/adapters/translate/history?verify=true", "read")[1])
        assert events["findings"] == []
        noted = [e for e in events["events"] if e["action"] == "mlflow"]  # other tests sign versions of this server
        events = [(e["action"], e["stage"], e["ref"], e["actor"], e["reason"]) for e in noted]
    assert events == expected
    assert json.loads(ask("/v1/adapters/translate/versions/1", "read")[1])["stages"] == []


def test_parts_of_mlflow_that_act_for_others_are_closed_to_admins_too(ask: Callable):
    for method, what in (
        ("POST", "assistant/message"),
        ("GET", "assistant/sessions/1/stream"),
        ("PUT", "assistant/config"),
    ):
        status, said = ask(f"/ajax-api/3.0/mlflow/{what}", "admin", method=method, body={} if method != "GET" else None)

        assert status == 403
        assert "switched off" in said


def test_a_page_that_looks_for_them_is_told_that_there_are_none(ask: Callable):
    status, said = ask("/ajax-api/3.0/mlflow/assistant/config", "read")

    assert (status, json.loads(said)["providers"]) == (200, {})
    assert ask("/ajax-api/3.0/mlflow/gateway/endpoints/list", "read") == (200, "{}")
    assert ask("/ajax-api/3.0/mlflow/assistant/config")[0] == 401


@pytest.mark.parametrize("headers", [{"Host": "evil.example"}, {"Origin": "http://evil.example"}])
def test_hostile_pages_reach_neither_of_us(ask: Callable, headers: dict[str, str]):
    for path in ("/v1/merges", "/api/2.0/mlflow/registered-models/create"):
        assert ask(path, "admin", method="POST", body={}, headers=headers)[0] in (403, 421)


# secrets


def test_secrets_are_in_no_log_no_file_and_no_process_list(server: Server, run: Callable, ask: Callable):
    for scope in Scope:
        ask(f"/v1/adapters?page_token={server.secrets[scope]}", scope)
        ask("/v1/merges", scope, method="POST", body={"parents": [server.secrets[scope]]})
    run("merge", "translate:v1=0.3", "chat:v1", "--into", "quiet")
    secrets = [secret.encode() for secret in server.secrets.values()]
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            shown = path.read_bytes()
        except OSError:
            continue  # it has ended
        assert not any(secret in shown for secret in secrets)

    assert server.log.read_text().count("\n") > 10
    for path in [server.log, *(path for path in server.home.rglob("*") if path.is_file())]:
        content = path.read_bytes()
        assert not any(secret in content for secret in secrets), path


def test_every_line_of_the_servers_log_is_json(server: Server, ask: Callable):
    ask("/v1/whoami", "read")

    deadline = time.monotonic() + 10  # the line follows the answer
    while not any(line.get("path") == "/v1/whoami" and line["caller"] == "read" for line in lines(server.log)):
        assert time.monotonic() < deadline

    assert all({"at", "level", "log"} <= set(line) for line in lines(server.log))
    # RFC 3339, which collectors of logs read; a second holds many lines
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", str(line["at"])) for line in lines(server.log))


def lines(log: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


# the same, started otherwise


def test_mlflows_own_command_serves_us_where_a_token_was_made(
    new_home: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    home, folder = new_home("by-mlflow"), tmp_path / "packages" / "adapterctl-0.dist-info"
    with closing(connect(Settings(home=home, actor="ada")).ledger):
        pass
    # what pip would install, for the tests run without an installation
    declared = tomllib.loads(Path("pyproject.toml").read_text())["project"]["entry-points"]["mlflow.app"]
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: adapterctl\nVersion: 0\n")
    (folder / "entry_points.txt").write_text(f"[mlflow.app]\nadapterctl = {declared['adapterctl']}\n")
    paths = [str(folder.parent), str(Path(".dev").absolute()), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {**SWITCHED_OFF, "ADAPTERCTL_HOME": str(home), "PYTHONPATH": os.pathsep.join(paths)}
    with listen("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--app-name", "adapterctl", "--port", str(port)]
    command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{home}/mlflow.db"]
    url = f"http://127.0.0.1:{port}"

    monkeypatch.setenv("ADAPTERCTL_HOME", str(home))
    with pytest.raises(Misconfigured, match="needs a valid token first"):  # nobody tells us on which address it listens
        mlflow_app()
    secret = connect(Settings(home=home, actor="ada")).create_token("ada", scope=Scope.READ).secret
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, start_new_session=True
    ) as run:
        try:
            while not answers(f"{url}/healthz"):
                assert run.poll() is None, run.stderr.read()
                time.sleep(0.1)
            with pytest.raises(HTTPError, match="401"):
                urlopen(f"{url}/", timeout=60)
            pages = {
                path: urlopen(Request(url + path, headers={"Authorization": f"Bearer {secret}"}), timeout=60).read()
                for path in ("/", "/v1/adapters", "/api/2.0/mlflow/registered-models/search")
            }
        finally:
            os.killpg(run.pid, signal.SIGTERM)
            run.wait(30)

    assert b"<title>MLflow</title>" in pages["/"]
    assert json.loads(pages["/v1/adapters"])["adapters"] == []


def answers(url: str) -> bool:
    try:
        urlopen(url, timeout=5).close()
    except OSError:
        return False
    return True

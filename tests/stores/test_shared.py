"""A registry whose ledger and MLflow are on a database server, as several machines share it."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from postgres import PASSWORD, PostgresServer, installed_binaries
from sqlalchemy import text
from tiny import write_tiny_adapter

from adapterctl.bootstrap import connect
from adapterctl.registry.domain.errors import Misconfigured, NotFound
from adapterctl.registry.domain.job import JobState
from adapterctl.registry.domain.recipe import MergeRequest
from adapterctl.registry.domain.refs import parse_parent, parse_ref
from adapterctl.registry.services.local import LocalRegistry
from adapterctl.registry.settings import Settings, check_address
from adapterctl.registry.stores.mlflow_server import without_password
from adapterctl.registry.stores.sql.engine import Database, psycopg_url


@pytest.fixture
def shared(
    home: Path, postgres_url: str, new_database: Callable[[str], str], postgres_mlflow_schema: str, tmp_path: Path
) -> Settings:
    return Settings(
        home=home,
        database_url=postgres_url,
        mlflow_uri=new_database(postgres_mlflow_schema),
        artifacts=(tmp_path / "artifacts").as_uri(),
        idle_s=0.2,
        actor="ada",
    )


@pytest.fixture
def registry(shared: Settings) -> Iterator[LocalRegistry]:
    registry = connect(shared)
    yield registry
    registry.ledger.close()


def test_two_machines_share_one_registry(registry: LocalRegistry, shared: Settings, tmp_path: Path):
    for seed, name in enumerate(("translate", "chat"), start=1):
        registry.register(str(write_tiny_adapter(tmp_path / name, seed=seed)), name=name)
    request = MergeRequest((parse_parent("translate:v1"), parse_parent("chat:v1")), into="both", method="cat")

    submitted = registry.merge(request)
    *_, job = registry.follow(submitted.job.id, timeout_s=120)
    other = connect(replace(shared, home=tmp_path / "another machine", actor="bob"))
    event = other.promote(parse_ref("both:v1"), to="staging")

    assert (job.state, job.error) == (JobState.SUCCEEDED, None)
    assert (event.ref, event.actor) == ("both:v1", "bob")
    assert other.pull(parse_ref("both@staging"), tmp_path / "pulled").ref == "both:v1"
    assert other.verify(parse_ref("both:v1"), rerun=False).files == "intact"
    assert "attempt 1 of 3" in other.job_log(job.id)[0].text
    assert not list(shared.home.glob("*.db"))
    other.ledger.close()
    with_secret = [
        path for path in shared.home.rglob("*") if path.is_file() and PASSWORD in path.read_text(errors="replace")
    ]
    assert with_secret == []
    database = Database(shared.database_url)
    with database.read() as connection:
        assert PASSWORD not in str(connection.execute(text("SELECT * FROM meta")).all())
    database.close()


def test_a_dump_and_a_copy_of_the_files_bring_a_registry_back(
    registry: LocalRegistry, shared: Settings, postgres: PostgresServer, tmp_path: Path
):
    for seed, name in enumerate(("translate", "chat"), start=1):
        registry.register(str(write_tiny_adapter(tmp_path / name, seed=seed)), name=name)
    registry.promote(parse_ref("chat:v1"), to="production")
    artifacts, addresses = tmp_path / "artifacts", (str(shared.database_url), str(shared.mlflow_uri))
    pg = lambda program, *words: subprocess.run([str(installed_binaries() / program), *words], check=True)  # noqa: E731

    for number, url in enumerate(addresses):
        pg("pg_dump", "--format=custom", f"--file={tmp_path / str(number)}", url)
    shutil.move(artifacts, tmp_path / "backup")
    registry.ledger.close()
    for number, url in enumerate(addresses):
        name = url.rpartition("/")[2]
        postgres.run(f"DROP DATABASE {name} WITH (FORCE)")
        postgres.run(f"CREATE DATABASE {name}")
        pg("pg_restore", "--no-owner", f"--dbname={url}", str(tmp_path / str(number)))
    shutil.copytree(tmp_path / "backup", artifacts)
    restored = connect(replace(shared, home=tmp_path / "new machine"))

    assert {check.status for check in restored.doctor() if check.name in ("ledger", "mlflow")} == {"ok"}
    assert [view.ref for view in restored.versions()] == ["chat:v1", "translate:v1"]
    assert restored.verify(parse_ref("chat@production")).files == "intact"
    assert restored.history("chat", verify=True).findings == ()
    restored.ledger.close()


def test_settings_that_hold_a_password_do_not_show_it(shared: Settings):
    shown = repr(replace(shared, token="canary-token", broker_url="redis://:canary@127.0.0.1"))

    assert PASSWORD not in shown
    assert "canary" not in shown


def test_errors_about_mlflow_do_not_tell_its_password(
    shared: Settings, registry: LocalRegistry, new_database: Callable[[str], str], postgres_schema: str, tmp_path: Path
):
    source = str(write_tiny_adapter(tmp_path / "a"))
    registry.register(source, name="translate")
    other = connect(replace(shared, database_url=new_database(postgres_schema)))

    with closing(other.ledger), pytest.raises(Misconfigured, match="belongs to registry") as foreign:
        other.register(source, name="translate")
    with pytest.raises(NotFound) as missing:
        registry.register("models:/nothing/1", name="chat")

    for error in (foreign.value, missing.value):
        assert PASSWORD not in f"{error.message} {error.hint} {error.abroad}"


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        ({"mlflow_uri": None}, "ADAPTERCTL_MLFLOW_URI"),
        ({"mlflow_uri": "sqlite:///mlflow.db"}, "ADAPTERCTL_MLFLOW_URI"),
        ({"mlflow_uri": "./mlruns"}, "ADAPTERCTL_MLFLOW_URI"),
        ({"mlflow_uri": "file:///srv/mlruns"}, "ADAPTERCTL_MLFLOW_URI"),
        ({"database_url": "mysql://ada:canary@host/name"}, "set home"),
        ({"database_url": None}, "unset MLFLOW_TRACKING_URI"),
    ],
    ids=["no MLflow", "MLflow in files", "folder", "folder by address", "another product", "ledger in files"],
)
def test_a_ledger_and_an_mlflow_that_do_not_belong_together_are_refused(
    shared: Settings, changes: dict[str, str | None], hint: str
):
    with pytest.raises(Misconfigured) as caught:
        connect(replace(shared, **changes))

    assert hint in caught.value.hint
    assert "canary" not in str(caught.value)


@pytest.mark.parametrize("setting", ["database_url", "mlflow_uri", "broker_url"])
@pytest.mark.parametrize(
    "address",
    [
        "{scheme}://ada:S3cret@Tail@127.0.0.1:1/name",
        "{scheme}://ada:S3cret@Tail/more@127.0.0.1:1/name",
        "{scheme}://ada:S3cret/Tail@127.0.0.1:1/name",
        "{scheme}://ada:S3cret?Tail@127.0.0.1:1/name",
        "{scheme}://ada:S3cret#Tail@127.0.0.1:1/name",
        "{scheme}://ada:S3cret[Tail@127.0.0.1:1/name",
        "{scheme}://ada:S3cret@Tail:more@127.0.0.1:1/name",
        "{scheme}://127.0.0.1:1/name?user=ada&password=S3cret@Tail",
    ],
)
@pytest.mark.parametrize("readonly", [False, True], ids=["to write", "to read"])
def test_an_address_from_which_it_is_not_certain_where_its_password_ends_is_refused_and_not_shown(
    home: Path, setting: str, address: str, readonly: bool
):
    good = {"database_url": "postgresql://127.0.0.1:1/name", "mlflow_uri": "postgresql://127.0.0.1:1/mlflow"}
    bad = address.format(scheme="redis" if setting == "broker_url" else "postgresql")

    with pytest.raises(Misconfigured, match=setting) as caught:
        connect(Settings(home=home, actor="ada", **{**good, setting: bad}), readonly=readonly)

    assert "percent-encode" in str(caught.value.hint)
    for part in ("S3cret", "Tail", "more"):
        assert part not in f"{caught.value} {caught.value.hint} {caught.value.abroad}"


@pytest.mark.parametrize(
    "address",
    [
        "postgresql://ada:S3cret%40Tail@127.0.0.1:1/name",
        "postgresql://ada:a:b@[::1]:1/name?sslmode=require",
        "postgresql:///name?host=/var/run/postgresql&password=a%40b",
    ],
)
def test_an_address_with_encoded_characters_is_taken(address: str):
    check_address("database_url", address)

    assert "%40" not in str(psycopg_url(address).password)


def test_another_mlflow_is_refused(shared: Settings, registry: LocalRegistry):
    with pytest.raises(Misconfigured, match="belongs to the MLflow at") as caught:
        connect(replace(shared, mlflow_uri=f"postgresql://ada:{PASSWORD}@127.0.0.1:1/other"))

    assert PASSWORD not in str(caught.value)


@pytest.mark.parametrize(
    ("address", "kept"),
    [
        ("postgresql://ada:canary@host:5432/name", "postgresql://ada@host:5432/name"),
        ("postgresql://host/name?user=ada&password=canary", "postgresql://host/name?user=ada"),
        ("postgresql://ada@host/name?sslmode=require&sslPassword=canary", "postgresql://ada@host/name?sslmode=require"),
        ("postgresql://host/name?%70assword=canary", "postgresql://host/name"),
        ("sqlite:////home/ada/a@b/mlflow.db", "sqlite:////home/ada/a@b/mlflow.db"),
        ("https://mlflow.example.org/base?x=1", "https://mlflow.example.org/base?x=1"),
    ],
)
def test_no_password_is_kept_of_an_address(address: str, kept: str):
    assert without_password(address) == kept


def test_a_registry_in_a_home_goes_on_whatever_address_mlflows_programs_are_given_later(
    home: Path, ledger_schema: Path, caplog: pytest.LogCaptureFixture
):
    shutil.copy(ledger_schema, home / "registry.db")
    elsewhere = Settings(home=home, mlflow_uri="http://mlflow.example.org")
    with pytest.raises(Misconfigured, match="http MLflow"):
        connect(elsewhere)
    connect(Settings(home=home)).ledger.close()

    registry = connect(elsewhere)

    assert registry.ledger.mlflow_uri == f"sqlite:///{home}/mlflow.db"
    assert f"this registry belongs to sqlite:///{home}/mlflow.db" in caplog.text
    registry.ledger.close()


@pytest.mark.parametrize("name", ["what?", "100%25"])
def test_a_home_that_mlflow_cannot_name_is_refused_before_anything_is_made(tmp_path: Path, name: str):
    with pytest.raises(Misconfigured, match="in its path"):
        connect(Settings(home=tmp_path / name))

    assert list(tmp_path.iterdir()) == []

"""Merges that are asked for at once share a transaction, and nothing else: each gets an answer of its own."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path

import pytest
from postgres import PostgresServer, postgres_server
from sqlalchemy import Connection, event
from sqlalchemy.engine import Engine
from starlette.testclient import TestClient
from tiny import write_tiny_adapter

from adapterctl.bootstrap import connect
from adapterctl.migrations import migrate
from adapterctl.registry.api import Submitted
from adapterctl.registry.domain.errors import AdapterctlError, InvalidInput, NotFound, Unavailable
from adapterctl.registry.domain.job import JobState, NewJob
from adapterctl.registry.domain.recipe import MergeRequest
from adapterctl.registry.domain.refs import parse_parent
from adapterctl.registry.rest import app
from adapterctl.registry.rest.app import create_app
from adapterctl.registry.rest.desk import Desk
from adapterctl.registry.rest.door import Rules
from adapterctl.registry.services.local import LocalRegistry
from adapterctl.registry.settings import Settings
from adapterctl.registry.stores.spawn_bell import only_one
from adapterctl.registry.stores.sql.jobs import queue_jobs

Answer = Submitted | BaseException


def request(weight: float, *, into: str = "both", parents: Sequence[str] = ("translate:v1", "chat:v1")) -> MergeRequest:
    first, *others = parents
    return MergeRequest((parse_parent(f"{first}={weight}"), *map(parse_parent, others)), into=into)


def ask(registry: LocalRegistry, asked: Sequence[tuple[str, MergeRequest]]) -> list[Answer]:
    """All of them at once: they are at the desk before it begins, so they go together."""

    async def at_once() -> list[Answer]:
        desk = Desk(registry)
        return await asyncio.gather(*(desk.merge(*each) for each in asked), return_exceptions=True)

    return asyncio.run(at_once())


def live_keys(registry: LocalRegistry) -> list[str]:
    return sorted(job.key for job in registry.ledger.jobs(states=[JobState.QUEUED], limit=1000))


def fill(registry: LocalRegistry, folder: Path) -> None:
    for seed, name in enumerate(("translate", "chat")):
        registry.register(str(write_tiny_adapter(folder / name, seed=seed)), name=name)


@pytest.fixture(scope="module", params=["sqlite", "postgres"])
def registry(
    request: pytest.FixtureRequest, new_home: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LocalRegistry]:
    """Two parents, and nobody who works."""
    folder = tmp_path_factory.mktemp("desk")
    settings = Settings(home=new_home("desk"), actor="ada")
    if request.param == "postgres":
        new_database: Callable[[str], str] = request.getfixturevalue("new_database")
        settings = replace(
            settings,
            database_url=new_database(request.getfixturevalue("postgres_schema")),
            mlflow_uri=new_database(request.getfixturevalue("postgres_mlflow_schema")),
            artifacts=(folder / "artifacts").as_uri(),
        )
    local = connect(settings)
    fill(local, folder)
    with closing(local.ledger), only_one(settings.home):  # whoever is rung for finds the place taken, and leaves
        yield local


def test_who_asks_at_once_gets_an_answer_of_his_own(registry: LocalRegistry):
    before = set(live_keys(registry))

    answers = ask(
        registry,
        [
            ("ada", request(0.1)),
            ("bob", request(0.2)),
            ("eve", request(0.3, parents=("nobody:v1", "chat:v1"))),
            ("bob", request(0.1)),
            ("ada", request(0.4, into="another")),
            ("eve", request(0.0)),
            ("ada", request(0.5, parents=("translate:v9", "chat:v1"))),
            ("bob", request(0.4, into="another")),
        ],
    )

    first, second, unknown, joined, other, weightless, no_version, other_joined = answers
    assert [type(each) for each in (unknown, weightless, no_version)] == [NotFound, InvalidInput, NotFound]
    assert "nobody" in str(unknown)
    assert "translate:v9" in str(no_version)
    jobs = [each.job for each in (first, second, other)]
    assert [job.created_by for job in jobs] == ["ada", "bob", "ada"]
    assert [each.deduplicated for each in (first, second, other)] == [False] * 3
    assert (joined.job, joined.deduplicated) == (first.job, True)
    assert (other_joined.job, other_joined.deduplicated) == (other.job, True)
    assert set(live_keys(registry)) - before == {job.key for job in jobs}
    assert [registry.job(job.id) for job in jobs] == jobs
    for job in jobs:
        assert [(each.seq, each.kind, each.message) for each in registry.ledger.events(job.id)] == [
            (1, "queued", f"by {job.created_by}")
        ]


def test_what_the_database_cannot_keep_fails_alone(registry: LocalRegistry):
    """A lone surrogate is no text: the driver refuses it in the middle of the transaction that all share."""
    answers = ask(registry, [("ada", request(1.1)), ("\ud800", request(1.2)), ("bob", request(1.3))])

    good, bad, also_good = answers
    assert isinstance(bad, Exception)
    assert {registry.job(each.job.id).state for each in (good, also_good)} == {JobState.QUEUED}
    assert not any(job.created_by == "\ud800" for job in registry.ledger.jobs(limit=1000))


def test_threads_over_http_each_get_their_own(served: object, tmp_path: Path):
    fill(served.registry, tmp_path)
    remote = served.remote()

    def one(number: int) -> Submitted | AdapterctlError:
        wrong = number % 4 == 3
        parents = ("missing:v1", "chat:v1") if wrong else ("translate:v1", "chat:v1")
        try:
            return remote.merge(request(2 + number // 2 / 100, into="by-http", parents=parents))
        except AdapterctlError as error:
            return error

    with only_one(served.registry.settings.home), ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(one, range(64)))

    good = [each for number, each in enumerate(answers) if number % 4 != 3]
    assert all(isinstance(each, NotFound) for number, each in enumerate(answers) if number % 4 == 3)
    by_digest = {each.recipe_digest: each.job.id for each in good}
    assert all(by_digest[each.recipe_digest] == each.job.id for each in good)
    assert len(set(by_digest.values())) == len(by_digest) == 32
    assert sum(not each.deduplicated for each in good) == 32


def test_who_needs_a_lock_that_is_held_keeps_no_other_waiting(
    postgres_registry: LocalRegistry,
):
    """Another server queues the same recipe, and has not committed yet."""
    registry = postgres_registry
    (probe,) = ask(registry, [("ada", request(3.1))])
    registry.ledger.request_cancel(probe.job.id)
    same = registry.ledger.job(probe.job.id)
    new = {"kind": same.kind, "key": same.key, "title": same.title, "spec": same.spec, "created_by": "other"}

    async def race() -> tuple[Submitted, Submitted]:
        desk = Desk(registry)
        with registry.ledger._db.write() as connection:
            queue_jobs(connection, [NewJob(**new)])
            held_up = asyncio.create_task(desk.merge("ada", request(3.1)))
            while not held_up.done() and (not desk._at_work or desk._waiting):  # until it has gone alone
                await asyncio.sleep(0)
            free = await desk.merge("ada", request(3.2))
            assert not held_up.done()
        return await held_up, free

    joined, free = asyncio.run(race())

    assert (joined.deduplicated, joined.job.created_by) == (True, "other")
    assert free.deduplicated is False


@pytest.fixture(scope="module")
def own_server() -> Iterator[PostgresServer]:
    with postgres_server() as server:
        yield server


@pytest.fixture(scope="module")
def postgres_registry(own_server: PostgresServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalRegistry]:
    """On a server of its own, which may be stopped."""
    folder = tmp_path_factory.mktemp("own-server")
    for name in ("ledger", "mlflow"):
        own_server.run(f"CREATE DATABASE {name}")
    settings = Settings(
        home=folder / "home",
        actor="ada",
        database_url=own_server.url("ledger"),
        mlflow_uri=own_server.url("mlflow"),
        artifacts=(folder / "artifacts").as_uri(),
    )
    migrate(settings.database_url)
    local = connect(settings)
    fill(local, folder)
    with closing(local.ledger), only_one(settings.home):
        yield local


@pytest.mark.parametrize("when", ["before the commit", "after the commit"])
def test_a_connection_that_drops_at_the_commit_leaves_answers_that_are_true(
    postgres_registry: LocalRegistry, own_server: PostgresServer, when: str
):
    registry, dropped = postgres_registry, []
    engine: Engine = registry.ledger._db._open()[1]

    def drop(connection: Connection) -> None:
        driver = connection.connection.driver_connection
        if dropped or connection.get_execution_options().get("postgresql_readonly"):
            return
        dropped.append(driver.info.backend_pid)
        if when == "after the commit":
            driver.commit()
        with suppress(Exception):
            own_server.run(f"SELECT pg_terminate_backend({driver.info.backend_pid})")

    weights = [4.1, 4.2, 4.3] if when == "before the commit" else [5.1, 5.2, 5.3]
    event.listen(engine, "commit", drop)
    try:
        answers = ask(registry, [("ada", request(weight)) for weight in weights])
    finally:
        event.remove(engine, "commit", drop)

    assert len(dropped) == 1
    assert all(registry.job(each.job.id) == each.job for each in answers)
    assert len({each.job.id for each in answers}) == 3
    assert {each.job.key for each in answers} <= set(live_keys(registry))
    assert len(live_keys(registry)) == len(set(live_keys(registry)))


def test_a_server_that_is_away_refuses_all_and_queues_nothing(
    postgres_registry: LocalRegistry, own_server: PostgresServer
):
    before = live_keys(postgres_registry)
    own_server.stop()
    try:
        answers = ask(postgres_registry, [("ada", request(6.1)), ("bob", request(6.2)), ("eve", request(6.3))])
    finally:
        own_server.process = own_server.start()

    assert [type(each) for each in answers] == [Unavailable] * 3
    while True:
        with suppress(Unavailable):
            after = live_keys(postgres_registry)
            break
    assert set(after) <= set(before)  # the server does not sync, so its end took some


def test_a_ring_that_fails_takes_no_answer_back(registry: LocalRegistry, tmp_path: Path):
    other = registry.acting("ada")
    (tmp_path / "locks" / "supervisor.lock").mkdir(parents=True)  # no file that could be locked
    other.bell = type(registry.bell)(replace(registry.settings, home=tmp_path))

    (answer,) = ask(other, [("ada", request(7.1))])

    assert registry.job(answer.job.id).state is JobState.QUEUED


def test_a_server_wakes_a_worker_for_a_job_that_nobody_follows(
    new_home: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(app, "WAKE_S", 0.1)
    served = connect(Settings(home=new_home("unattended"), ring_again_s=0.5, idle_s=0.3))
    fill(served, tmp_path)
    (lost,) = served.merge_all([("ada", request(8.1))])  # and nobody is told of it
    time.sleep(0.6)
    told = [check for check in served.doctor() if check.name == "unattended"]

    door = create_app(served, served.access, Rules(hosts=("localhost",), upload_bytes=1), version="1.2.3")
    with closing(served.ledger), TestClient(door):
        deadline = time.monotonic() + 60
        while (job := served.job(lost.job.id)).state is not JobState.SUCCEEDED and time.monotonic() < deadline:
            time.sleep(0.1)

    assert [check.hint for check in told] == [f"adapterctl jobs wait {lost.job.id} wakes one"]
    assert job.state is JobState.SUCCEEDED

"""What only a database server can do: refuse, vanish, and hold a lock for a process on another machine."""

from __future__ import annotations

import subprocess
import sys
import threading
from contextlib import closing
from itertools import count
from pathlib import Path

import pytest
from postgres import PASSWORD, PostgresServer

from adapterctl.migrations import migrate
from adapterctl.registry.domain.errors import InvalidInput, Misconfigured, Unavailable
from adapterctl.registry.domain.job import NewJob
from adapterctl.registry.domain.version import Base
from adapterctl.registry.stores.mlflow_versions import MlflowVersions
from adapterctl.registry.stores.sql.engine import Database
from adapterctl.registry.stores.sql.ledger import SqlLedger

HOLD = """
import sys
from adapterctl.registry.stores.sql.engine import Database
with Database(sys.argv[1]).exclusive("key"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_lock_excludes_other_processes_and_dies_with_its_own(postgres_url: str):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, postgres_url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with holder:
        assert holder.stdout.readline() == "held\n"
        got = threading.Event()
        waiting = threading.Thread(target=lambda: _take(postgres_url, got))
        waiting.start()

        assert not got.wait(0.5)

        holder.kill()
        assert got.wait(20)
        waiting.join()


def _take(url: str, got: threading.Event) -> None:
    with Database(url).exclusive("key"):
        got.set()


@pytest.mark.parametrize("wrong", ["port", "password"])
def test_a_server_that_cannot_be_used_is_named_without_its_password(
    postgres: PostgresServer, postgres_url: str, wrong: str
):
    url = {
        "port": postgres_url.replace(f":{postgres.port}/", ":1/"),
        "password": postgres_url.replace(PASSWORD, "canary-of-another"),
    }[wrong]

    with closing(SqlLedger(Database(url))) as ledger, pytest.raises(Unavailable, match=r"127\.0\.0\.1") as caught:
        ledger.versions()

    assert "canary" not in f"{caught.value} {caught.value.hint}"


def test_an_address_that_cannot_be_read_is_not_repeated():
    with pytest.raises(Misconfigured) as caught:
        Database("postgresql://ada:canary@host:port/name")

    assert "canary" not in f"{caught.value} {caught.value.hint}"


@pytest.mark.parametrize("encoding", ["SQL_ASCII", "LATIN1"])
def test_a_database_that_cannot_keep_every_text_is_refused_with_the_way_out(postgres: PostgresServer, encoding: str):
    name = f"in_{encoding.lower()}"
    postgres.run(f"CREATE DATABASE {name} ENCODING '{encoding}' TEMPLATE template0 LC_COLLATE 'C' LC_CTYPE 'C'")

    with pytest.raises(Misconfigured, match=f"/{name} has the encoding {encoding}, expected is UTF8") as caught:
        migrate(postgres.url(name))
    with closing(SqlLedger(Database(postgres.url(name)))) as ledger, pytest.raises(Misconfigured):
        ledger.versions()
    with pytest.raises(Misconfigured), Database(postgres.url(name)).exclusive("key"):
        pass

    assert f"createdb -E UTF8 -T template0 {name}_utf8, and set database_url" in caught.value.hint
    assert PASSWORD not in f"{caught.value} {caught.value.hint}"


def test_so_is_one_of_mlflow(postgres: PostgresServer, tmp_path: Path):
    postgres.run("CREATE DATABASE mlflow_ascii ENCODING 'SQL_ASCII' TEMPLATE template0 LC_COLLATE 'C' LC_CTYPE 'C'")

    with pytest.raises(Misconfigured, match="/mlflow_ascii has the encoding SQL_ASCII, expected is UTF8") as caught:
        MlflowVersions(postgres.url("mlflow_ascii"), tmp_path, "me")

    assert "createdb -E UTF8 -T template0 mlflow_ascii_utf8, and set mlflow_uri" in caught.value.hint
    assert PASSWORD not in f"{caught.value} {caught.value.hint}"


def test_what_the_server_takes_for_no_text_is_the_callers_fault(postgres_ledger: SqlLedger):
    with pytest.raises(InvalidInput, match="cannot keep"):
        postgres_ledger.submit(NewJob("merge", "a\0b", "t", {}, "ada"))


def test_racing_writers_of_one_base_both_get_it(postgres_ledger: SqlLedger):
    found: list[Base] = []
    for number in count(1):
        start = threading.Barrier(2)

        def add(name: str, start: threading.Barrier = start) -> None:
            start.wait()
            found.append(postgres_ledger.add_base(Base(name, name), [name]))

        threads = [threading.Thread(target=add, args=[f"base-{number}"]) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if number == 20:
            break

    assert len(found) == 40
    assert len(postgres_ledger.bases()) == 20

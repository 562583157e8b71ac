"""Each safety of the ledger, taken away: the harm that it prevents does come. Else its tests would prove nothing."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import ColumnElement, text

from adapterctl.registry.domain.job import JobState, NewJob
from adapterctl.registry.domain.version import AdapterVersion
from adapterctl.registry.stores.sql import jobs
from adapterctl.registry.stores.sql.engine import Database, sqlite_url
from adapterctl.registry.stores.sql.ledger import SqlLedger
from adapterctl.registry.stores.sql.tables import job

MERGE = NewJob("merge", "k", "t", {}, "ada")
DEFERRED = """
import runpy, sys
from adapterctl.registry.stores.sql import engine
engine._Sqlite.begin = lambda self, connection, writes: engine._run(connection, "BEGIN", ())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_without_the_fence_a_zombie_ends_the_job_of_another(sql_ledger: SqlLedger, monkeypatch: pytest.MonkeyPatch):
    def unfenced(job_id: str, attempt: int) -> ColumnElement[bool]:
        return (job.c.id == job_id) & (job.c.state == JobState.RUNNING)

    monkeypatch.setattr(jobs, "held", unfenced)
    submitted, _ = sql_ledger.submit(MERGE)
    zombie = sql_ledger.claim("slow", -1)
    sql_ledger.reap()
    sql_ledger.claim("fast", 60)

    assert sql_ledger.finish(submitted.id, zombie.attempt, JobState.SUCCEEDED, result={"version_id": "stale"})


def test_without_the_unique_index_a_job_is_live_twice(sql_ledger: SqlLedger, home: Path):
    with Database(sqlite_url(home)).write() as connection:
        connection.execute(text("DROP INDEX uq_job_live_key"))

    for _ in range(2):
        sql_ledger.submit(MERGE)

    assert [(each.key, each.state) for each in sql_ledger.jobs()] == [("k", JobState.QUEUED)] * 2


@pytest.mark.parametrize("ledger", ["sql_ledger"], indirect=True)
def test_with_deferred_transactions_commands_fail_under_load(
    sql_ledger: SqlLedger, add_version: Callable[..., AdapterVersion], home: Path
):
    add_version()
    add_version()
    sql_ledger.close()
    script = Path(__file__).with_name("busy_process.py")

    processes = [
        subprocess.Popen(
            [sys.executable, "-c", DEFERRED, str(script), str(home), str(number), "100"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(4)
    ]
    complaints = [process.communicate()[1] for process in processes]

    assert any("database is locked" in complaint for complaint in complaints)

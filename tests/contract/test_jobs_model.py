"""The job table against a model of it in plain Python: whatever order of calls, both say the same."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from sqlalchemy import text

from adapterctl.registry.domain.errors import Conflict
from adapterctl.registry.domain.job import ENDED, LIVE, MOVES, JobState, NewJob
from adapterctl.registry.stores.sql.engine import Database, sqlite_url
from adapterctl.registry.stores.sql.ledger import SqlLedger


@dataclass
class Row:
    """What the model knows of a job. `expired` stands for a lease that ran out."""

    key: str
    state: JobState = JobState.QUEUED
    attempt: int = 0
    limit: int = 3
    expired: bool = False
    cancel: bool = False


class JobTable(RuleBasedStateMachine):
    """Rules are the calls of the ledger; `attempt` of a fenced call may be any number that was ever handed out."""

    new_ledger: Callable[[], AbstractContextManager[SqlLedger]]  # set by the test
    job_ids = Bundle("job_ids")

    def __init__(self) -> None:
        super().__init__()
        self.opened = type(self).new_ledger()
        self.ledger = self.opened.__enter__()
        self.model: dict[str, Row] = {}

    def teardown(self) -> None:
        """Every history is a path of allowed moves; at the end, as nothing is ever taken from one."""
        for job_id in self.model:
            states = [JobState(event.kind) for event in self.ledger.events(job_id) if event.kind in set(JobState)]
            assert all(after in MOVES[before] for before, after in pairwise(states))
        self.opened.__exit__(None, None, None)

    @rule(target=job_ids, key=st.sampled_from("abc"))
    def submit(self, key: str) -> str:
        live = [job_id for job_id, row in self.model.items() if row.key == key and row.state in LIVE]
        job, created = self.ledger.submit(NewJob("merge", key, key, {}, "ada"))
        assert created == (not live)
        if created:
            self.model[job.id] = Row(key)
        else:
            assert live == [job.id]
        return job.id

    @rule(alive=st.booleans())
    def claim(self, alive: bool) -> None:
        waiting = [job_id for job_id, row in self.model.items() if row.state is JobState.QUEUED]
        job = self.ledger.claim("w", 60.0 if alive else -1.0)
        assert (job is None) == (not waiting)
        if job is not None:
            assert job.id == waiting[0]  # submitted first: ids and rows of the model are in that order
            row = self.model[job.id]
            row.state, row.attempt, row.expired = JobState.RUNNING, row.attempt + 1, not alive

    @rule(job_id=job_ids, attempt=st.integers(1, 4), alive=st.booleans())
    def renew(self, job_id: str, attempt: int, alive: bool) -> None:
        renewed = self.ledger.renew(job_id, attempt, 60.0 if alive else -1.0)
        assert (renewed is not None) == self.is_held(job_id, attempt)
        if renewed is not None:
            assert renewed.cancel_requested == self.model[job_id].cancel
            self.model[job_id].expired = not alive

    @rule(job_id=job_ids, attempt=st.integers(1, 4), state=st.sampled_from(sorted(ENDED)))
    def finish(self, job_id: str, attempt: int, state: JobState) -> None:
        done = self.ledger.finish(job_id, attempt, state)
        assert done == self.is_held(job_id, attempt)
        if done:
            self.model[job_id].state = state

    @rule(job_id=job_ids, attempt=st.integers(1, 4), spent=st.booleans())
    def give_back(self, job_id: str, attempt: int, spent: bool) -> None:
        done = self.ledger.give_back(job_id, attempt, spent=spent)
        assert done == self.is_held(job_id, attempt)
        if done:
            row = self.model[job_id]
            row.state, row.limit = JobState.QUEUED, row.limit + (not spent)

    @rule(job_id=job_ids)
    def cancel(self, job_id: str) -> None:
        row = self.model[job_id]
        if row.state in ENDED:
            with pytest.raises(Conflict):
                self.ledger.request_cancel(job_id)
            return
        self.ledger.request_cancel(job_id)
        if row.state is JobState.QUEUED:
            row.state = JobState.CANCELLED
        else:
            row.cancel = True

    @rule(job_id=job_ids)
    def retry(self, job_id: str) -> None:
        row = self.model[job_id]
        twin = any(other.key == row.key and other.state in LIVE for other in self.model.values())
        if twin or row.state is JobState.SUCCEEDED:
            with pytest.raises(Conflict):
                self.ledger.retry(job_id)
            return
        self.ledger.retry(job_id)
        row.state, row.limit, row.cancel = JobState.QUEUED, row.attempt + 3, False

    @rule(abandoned=st.booleans())
    def reap(self, abandoned: bool) -> None:
        lost = {
            job_id: row
            for job_id, row in self.model.items()
            if row.state is JobState.RUNNING and (row.expired or abandoned)
        }
        reaped = self.ledger.reap(abandoned=abandoned)
        assert {job.id for job in reaped} == set(lost)
        for row in lost.values():
            if row.cancel:
                row.state = JobState.CANCELLED
            elif row.attempt >= row.limit:
                row.state = JobState.FAILED
            else:
                row.state = JobState.QUEUED

    @invariant()
    def both_say_the_same(self) -> None:
        found = {job.id: job for job in self.ledger.jobs(limit=10_000)}
        assert set(found) == set(self.model)
        for job_id, row in self.model.items():
            job = found[job_id]
            assert (job.state, job.attempt, job.max_attempts, job.cancel_requested) == (
                row.state,
                row.attempt,
                row.limit,
                row.cancel,
            )
            assert (job.lease_until is not None) == (job.state is JobState.RUNNING)

    def is_held(self, job_id: str, attempt: int) -> bool:
        row = self.model[job_id]
        return row.state is JobState.RUNNING and row.attempt == attempt


@pytest.fixture(params=["sqlite", "postgresql"])
def new_ledger(request: pytest.FixtureRequest) -> Callable[[], AbstractContextManager[SqlLedger]]:
    """Opens a ledger without jobs, of each kind."""
    if request.param == "sqlite":
        return partial(_on_sqlite, request.getfixturevalue("ledger_schema"))
    return partial(_on_postgresql, request.getfixturevalue("postgres_url"))


@contextmanager
def _on_sqlite(schema: Path) -> Iterator[SqlLedger]:
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(schema, Path(folder) / "registry.db")
        ledger = SqlLedger(Database(sqlite_url(Path(folder))))
        yield ledger
        ledger.close()


@contextmanager
def _on_postgresql(url: str) -> Iterator[SqlLedger]:
    """One database for all of them, emptied: a new one takes longer than what is tested."""
    database = Database(url)
    with database.write() as connection:
        connection.execute(text("TRUNCATE job CASCADE"))
    yield SqlLedger(database)
    database.close()


#: Examples of a hundred steps each; a step on a server costs several times as much.
EXAMPLES = {"sqlite": 100, "postgresql": 10}


def test_the_job_table_obeys_its_model(
    new_ledger: Callable[[], AbstractContextManager[SqlLedger]], request: pytest.FixtureRequest
):
    machine = type("JobTable", (JobTable,), {"new_ledger": staticmethod(new_ledger)})

    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=EXAMPLES[request.node.callspec.params["new_ledger"]],
            stateful_step_count=100,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )

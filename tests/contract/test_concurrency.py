"""Several processes on one registry: no command fails, no update is lost, no job is done twice."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from sqlalchemy import update

from adapterctl.registry.domain.errors import AdapterctlError, Conflict, Refused, Unavailable
from adapterctl.registry.domain.job import JobState, NewJob
from adapterctl.registry.domain.stage import verify_chain
from adapterctl.registry.domain.version import AdapterVersion, Base
from adapterctl.registry.ports import Ledger
from adapterctl.registry.stores.sql import engine
from adapterctl.registry.stores.sql.engine import Now
from adapterctl.registry.stores.sql.ledger import SqlLedger
from adapterctl.registry.stores.sql.tables import base, job, version

PROCESSES, COMMANDS = 6, 200


def test_a_lock_that_is_held_is_told_at_once_and_one_that_is_free_is_taken(ledger: Ledger):
    with ledger.exclusive("key"), ledger.try_exclusive("key") as held, ledger.try_exclusive("other") as other:
        assert (held, other) == (False, True)
    with ledger.try_exclusive("key") as first, ledger.try_exclusive("key") as second:
        assert (first, second) == (True, False)


def test_a_child_waits_for_a_removal_of_its_parent_and_is_refused(
    ledger: SqlLedger, add_version: Callable[..., AdapterVersion]
):
    parent, other, answers = add_version(), add_version(), []

    def add_child() -> None:
        try:
            answers.append(add_version("child", parents=(other, parent)))
        except Refused as error:
            answers.append(error)

    child = threading.Thread(target=add_child)
    with ledger._db.write() as connection:
        gone = {"state": "removed", "removed_at": Now(), "removed_by": "ada", "removed_reason": "a test"}
        connection.execute(update(version).where(version.c.id == parent.id).values(gone))
        child.start()
        child.join(1.0)
        waits = child.is_alive()
    child.join()

    assert waits
    assert isinstance(answers[0], Refused)
    assert "removed meanwhile" in answers[0].message
    assert ledger.versions("child") == []


def test_of_two_who_pin_a_base_at_once_the_second_fills_in_nothing(ledger: SqlLedger):
    known, answers = ledger.add_base(Base("b1", "tiny"), ["tiny"]), []
    other = Base("b1", "tiny", revision="two", weights_digest="w2")

    second = threading.Thread(target=lambda: answers.append(ledger.add_base(other, ["tiny"])))
    with ledger._db.write() as connection:
        connection.execute(update(base).where(base.c.id == known.id).values(revision="one"))
        second.start()
        second.join(0.5)
        waits = second.is_alive()
    second.join()

    assert waits
    assert answers == [Base("b1", "tiny", revision="one")] == ledger.bases()


def test_a_version_whose_base_is_being_merged_waits_and_belongs_to_the_base_that_is_left(
    ledger: SqlLedger, add_version: Callable[..., AdapterVersion]
):
    keep, drop = ledger.add_base(Base("b1", "tiny"), ["tiny"]), ledger.add_base(Base("b2", "t"), ["t"])
    answers = []

    late = threading.Thread(target=lambda: answers.append(add_version(base=drop)))
    with ledger._db.write() as connection:
        connection.execute(update(base).where(base.c.id == drop.id).values(merged_into=keep.id))
        late.start()
        late.join(0.5)
        waits = late.is_alive()
    late.join()

    assert waits
    assert answers[0].spec.base == keep


def test_who_finds_every_connection_in_use_is_told_to_try_again(ledger: SqlLedger, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(engine, "BUSY_TIMEOUT_S", 0.05)
    ledger.close()  # the pool of before waits for longer
    refused, ended = threading.Event(), threading.Event()
    errors: list[Exception] = []

    def read() -> None:
        try:
            with ledger.snapshot():
                ended.wait(30)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is looked at below
            errors.append(error)
            refused.set()

    readers = [threading.Thread(target=read) for _ in range(50)]
    for reader in readers:
        reader.start()
    refused.wait(30)
    ended.set()
    for reader in readers:
        reader.join()

    assert errors
    assert {type(error) for error in errors} == {Unavailable}
    assert "in use" in str(errors[0])
    ledger.bases()


def test_a_job_that_is_given_back_at_that_moment_is_cancelled(ledger: SqlLedger):
    ledger.submit(NewJob("merge", "key", "title", {}, "ada"))
    claimed, answers = ledger.claim("me", 60.0), []
    assert claimed is not None
    cancel = threading.Thread(target=lambda: answers.append(ledger.request_cancel(claimed.id)))

    with ledger._db.write() as connection:
        queued = {"state": JobState.QUEUED, "owner": None, "lease_until": None}
        connection.execute(update(job).where(job.c.id == claimed.id).values(queued))
        cancel.start()
        cancel.join(1.0)
    cancel.join()

    assert [each.state for each in answers] == [JobState.CANCELLED]


def test_six_processes_at_once_lose_nothing(ledger: Ledger, add_version: Callable[..., AdapterVersion], address: str):
    adapter_id = add_version().adapter_id
    add_version()
    script = Path(__file__).with_name("busy_process.py")
    command = [sys.executable, str(script), address]

    processes = [
        subprocess.Popen(
            [*command, str(number), str(COMMANDS)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for number in range(PROCESSES)
    ]
    outputs = [process.communicate() for process in processes]

    assert [(process.returncode, out[1]) for process, out in zip(processes, outputs, strict=True)] == [
        (0, "")
    ] * PROCESSES
    jobs = ledger.jobs(limit=10_000)
    own = [job for job in jobs if job.kind == "merge"]
    assert len({job.key for job in own}) == len(own) == PROCESSES * COMMANDS // 4
    live = Counter(job.key for job in jobs if job.state is JobState.QUEUED)
    assert set(live.values()) == {1}
    done = [job for job in jobs if job.state is JobState.SUCCEEDED]
    assert len(done) == PROCESSES * COMMANDS // 4
    assert {job.attempt for job in done} == {1}
    history = ledger.stage_history(adapter_id)
    assert verify_chain(history) == []
    assert len(history) == sum(int(out) for out, _ in outputs)
    assert ledger.stage_holder(adapter_id, "production") == history[-1].version_id


def test_a_thread_waits_for_its_turn_to_write_but_not_for_ever(sql_ledger: SqlLedger, monkeypatch: pytest.MonkeyPatch):
    new = NewJob("merge", "translate:recipe", "merge", {}, "ada")
    monkeypatch.setattr(engine, "BUSY_TIMEOUT_S", 0.01)

    with sql_ledger._db.write(), pytest.raises(Unavailable, match="is busy"):
        sql_ledger.submit(new)

    assert sql_ledger.submit(new)[1]


def test_many_who_queue_the_same_jobs_while_others_end_them_all_get_them(ledger: Ledger):
    """Whose job ended while it was joined is inserted late, out of the order that keeps two from waiting in a ring."""
    new = [NewJob("merge", f"key-{number}", "title", {}, "ada") for number in range(3)]
    failed: list[AdapterctlError] = []

    def work(number: int) -> None:
        for turn in range(30):
            wanted = new[(number + turn) % 3 :] + new[: (number + turn) % 3]
            try:
                for job, _ in ledger.submit_all(wanted):
                    with suppress(Conflict):  # another thread was first
                        ledger.request_cancel(job.id)
            except AdapterctlError as error:
                failed.append(error)
                return

    threads = [threading.Thread(target=work, args=[number]) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert failed == []

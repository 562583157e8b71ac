"""What every ledger tells of what happened: every fact once, in an order in which nothing appears late."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

import pytest
from keys import new_key, public, seal
from sqlalchemy import text

from adapterctl.migrations import VERSION_TABLE, migrate
from adapterctl.registry.api import EventsView
from adapterctl.registry.domain.errors import InvalidInput, NotFound
from adapterctl.registry.domain.event import read_kinds
from adapterctl.registry.domain.version import AdapterVersion
from adapterctl.registry.services.feed import check_filter, events, listen, read_filter
from adapterctl.registry.services.signatures import statement_of
from adapterctl.registry.stores.sql.engine import Database, is_shared, sqlite_url
from adapterctl.registry.stores.sql.feed import tell
from adapterctl.registry.stores.sql.ledger import SqlLedger

AddVersion = Callable[..., AdapterVersion]
KEY = new_key()
ALL = read_filter(None, (), None)


@pytest.fixture
def busy(ledger: SqlLedger, add_version: AddVersion) -> list[tuple[str, str | None, str, str | None, str]]:
    """Something of each kind; what it should be told as."""
    first, other = add_version(), add_version("chat")
    child = add_version("both", parents=[first, other])
    move = {"expected": None, "actor": "eve", "reason": "fits"}
    ledger.set_gate_file("ab" * 32, "gates: []", set_by="ada")
    ledger.record_approval(
        child.adapter_id, "production", version_id=child.id, action="approve", actor="bob", reason="read"
    )
    ledger.move_stage(child.adapter_id, "production", version_id=child.id, action="promote", **move)
    ledger.move_stage(
        child.adapter_id, "production", version_id=None, action="demote", **(move | {"expected": child.id})
    )
    ledger.set_tags(first.id, {"lang": "fr"}, [], actor="ada", reason="")
    ledger.add_signature(other.id, public(KEY), seal(statement_of(other), KEY), actor="ci")
    for action in ("recall", "recall", "undo"):
        ledger.recall(other.id, action, actor="ada", reason=f"why {action}")
    ledger.rename_adapter(first.adapter_id, "translator", actor="ada")
    for _ in range(2):
        ledger.remove_version(child.id, actor="ada", reason="worse")
    return [
        ("register", "translator:v1", "ada", None, ""),
        ("register", "chat:v1", "ada", None, ""),
        ("merge", "both:v1", "ada", None, ""),
        ("gates", None, "ada", None, ""),
        ("approve", "both:v1", "bob", None, "read"),
        ("promote", "both:v1", "eve", None, "fits"),
        ("demote", None, "eve", "both:v1", "fits"),
        ("tag", "translator:v1", "ada", None, 'lang="fr"'),
        ("sign", "chat:v1", "ci", None, f"by the key {public(KEY).id}"),
        ("recall", "chat:v1", "ada", None, "why recall"),
        ("undo_recall", "chat:v1", "ada", None, "why undo"),
        ("rename", None, "ada", None, "was translate"),
        ("remove", "both:v1", "ada", None, "worse"),
    ]


@pytest.fixture
def url(address: str) -> str:
    return address if is_shared(address) else sqlite_url(Path(address))


def told(ledger: SqlLedger) -> list[tuple[str, str | None, str, str | None, str]]:
    found, _ = ledger.feed(0, limit=100)
    return [(each.kind, each.ref, each.actor, each.previous, each.reason) for each in found]


def test_every_fact_is_told_once_with_who_and_why(ledger: SqlLedger, busy: list):
    found, last = ledger.feed(0, limit=100)

    assert told(ledger) == busy
    assert [each.id for each in found] == list(range(1, last + 1))
    assert all(abs(each.at - ledger.now()) < 60 for each in found)
    assert {each.kind: (each.name, each.stage) for each in found}["demote"] == ("both", "production")
    links = {each.kind: each.link for each in events(ledger, 0, ALL, limit=100).events}
    assert links["merge"] == "/adapters/both/v1"
    assert (links["rename"], links["gates"]) == ("/adapters/translator", "/v1/gates")


def test_a_registration_that_is_found_again_is_told_once(ledger: SqlLedger, add_version: AddVersion):
    version = add_version()
    add_version(version_id=version.id)

    assert [each[0] for each in told(ledger)] == ["register"]


@pytest.mark.parametrize(
    ("asked", "ids"),
    [
        ({"kind": ["move"]}, [6, 7]),
        ({"kind": ["merge", "remove"]}, [3, 13]),
        ({"stage": "production"}, [5, 6, 7]),
        ({"name": "both"}, [3, 5, 6, 7, 13]),
        ({"name": "*a*"}, [1, 2, 8, 9, 10, 11, 12]),
        ({"name": "both", "kind": ["promote"], "stage": "production"}, [6]),
        ({"name": "no*"}, []),
    ],
)
def test_events_are_chosen_by_kind_name_and_stage_and_read_in_pages(
    ledger: SqlLedger, busy: list, asked: dict, ids: list[int]
):
    chosen = read_filter(asked.get("name"), asked.get("kind", ()), asked.get("stage"))

    pages, after = [], 0
    while not pages or pages[-1].more:
        pages.append(events(ledger, after, chosen, limit=2))
        after = pages[-1].cursor

    assert [event.id for page in pages for event in page.events] == ids
    assert all(len(page.events) == 2 for page in pages[:-1])
    assert after == len(busy)
    nothing_new = EventsView((), len(busy), more=False)
    assert events(ledger, None, chosen, limit=2) == events(ledger, len(busy), chosen, limit=2) == nothing_new


def test_what_cannot_be_asked_is_refused(ledger: SqlLedger, add_version: AddVersion):
    add_version()

    with pytest.raises(InvalidInput, match="'promoted' is no kind of event") as caught:
        read_kinds(["merge", "promoted"])
    assert "undo_recall" in caught.value.hint
    with pytest.raises(InvalidInput, match="event 7 is not there, the last one is 1"):
        events(ledger, 7, ALL, limit=1)
    with pytest.raises(NotFound, match="translat") as missed:
        events(ledger, 0, read_filter("translat", (), None), limit=1)
    assert "translate" in missed.value.hint
    for after, limit in ((-1, 1), (0, 0)):
        with pytest.raises(InvalidInput, match="cannot be told"):
            events(ledger, after, ALL, limit=limit)


def test_a_stage_that_the_settings_no_longer_name_is_asked_for_where_something_is_told_of_it(
    ledger: SqlLedger, busy: list
):
    former = read_filter(None, (), "production")

    assert check_filter(ledger, former, ["live"]) == former
    with pytest.raises(InvalidInput, match="'prodction' is no stage"):
        check_filter(ledger, read_filter(None, (), "prodction"), ["live"])


def test_an_event_that_is_not_committed_holds_back_those_after_it(ledger: SqlLedger):
    """With ids from a sequence, the second would be read while the first is still to come, and the first never."""
    second = threading.Thread(target=lambda: ledger.set_gate_file("cd" * 32, "gates: []", set_by="second"))

    with ledger._db.write() as connection:
        tell(connection, "gates")
        second.start()
        second.join(1.0)
        assert second.is_alive()
        assert ledger.feed(0, limit=10) == ([], 0)
    second.join(30)

    found, last = ledger.feed(0, limit=10)
    assert ([each.id for each in found], last) == ([1, 2], 2)
    assert found[1].actor == "second"


def test_an_event_whose_transaction_fails_leaves_no_hole(ledger: SqlLedger):
    with suppress(RuntimeError), ledger._db.write() as connection:
        tell(connection, "gates")
        raise RuntimeError
    ledger.set_gate_file("cd" * 32, "gates: []", set_by="ada")

    assert [each.id for each in ledger.feed(0, limit=10)[0]] == [1]


def test_who_reads_while_many_write_misses_nothing_and_sees_nothing_twice(
    ledger: SqlLedger, add_version: AddVersion, url: str
):
    writers, each_writes = 4, 25
    adapters = [add_version(f"a{number}").adapter_id for number in range(writers)]
    seen, after, over = [], 0, False

    def write(adapter_id: str) -> None:
        with closing(SqlLedger(Database(url))) as own:
            for number in range(each_writes):
                own.record_note(adapter_id, "", version_id=None, action="mlflow", actor="ada", reason=str(number))

    threads = [threading.Thread(target=write, args=[adapter_id]) for adapter_id in adapters]
    for thread in threads:
        thread.start()
    while not over:
        over = not any(thread.is_alive() for thread in threads)  # then look once more
        page = events(ledger, after, ALL, limit=1000)
        seen, after = [*seen, *page.events], page.cursor

    assert [event.id for event in seen] == list(range(1, writers * (each_writes + 1) + 1))
    for number in range(writers):
        notes = [event.reason for event in seen if (event.name, event.kind) == (f"a{number}", "mlflow")]
        assert notes == [str(number) for number in range(each_writes)]


def test_who_follows_is_told_each_event_as_it_comes(ledger: SqlLedger, busy: list):
    heard = listen(ledger, 11, ALL)
    following = (event for _, event in heard if event is not None)

    assert [next(following).id, next(following).id] == [12, 13]
    later = threading.Timer(0.2, lambda: ledger.set_gate_file("cd" * 32, "gates: []", set_by="later"))
    later.start()
    assert next(following).actor == "later"
    later.join()


def test_a_registry_from_before_there_were_events_tells_what_it_has_kept(
    ledger: SqlLedger, busy: list, url: str, add_version: AddVersion
):
    with ledger._db.write() as connection:
        for table in ("event", "event_counter", "signature"):
            connection.execute(text(f"DROP TABLE {table}"))
        connection.execute(text("DROP INDEX ix_version_adapter_id_state_number"))
        if is_shared(url):
            for table in ("event", "signature"):
                connection.execute(text(f"DROP FUNCTION {table}_is_append_only()"))
        connection.execute(text(f"UPDATE {VERSION_TABLE} SET version_num = '0007'"))
    ledger.close()

    migrate(url)

    assert sorted(told(ledger), key=str) == sorted(busy, key=str)
    found, last = ledger.feed(0, limit=100)
    assert [each.id for each in found] == list(range(1, last + 1))
    assert [each.at for each in found] == sorted(each.at for each in found)
    add_version("new")
    assert [each.ref for each in ledger.feed(last, limit=10)[0]] == ["new:v1"]

"""Lists, a page at a time: in one order whatever the database, and at the price of the page."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from many import LARGE, counted, fill

from adapterctl.registry.domain.refs import Ref
from adapterctl.registry.domain.selection import Selection, parse_condition
from adapterctl.registry.domain.version import AdapterVersion, Base
from adapterctl.registry.ports import Ledger
from adapterctl.registry.services.resolve import resolve
from adapterctl.registry.services.trace import family
from adapterctl.registry.services.views import adapter_views, version_views
from adapterctl.registry.stores.sql.engine import Database, is_shared, sqlite_url
from adapterctl.registry.stores.sql.ledger import SqlLedger

AddVersion = Callable[..., AdapterVersion]

#: In the order of code points; languages know others.
NAMES = ["a", "a-b", "a.c", "a0", "a_d", "aa", "ab", "b-", "b.", "ba"]
SMALL, MANY, EACH, PAGE = 20, 200, 10, 10
#: Questions whose answers are of one size in a small and in a large registry.
#: On the way through all adapters, PostgreSQL reads a whole one; and how many versions one has is counted.
PAST_IT = ("larger", 1)
QUESTIONS: dict[str, Callable[[Ledger], object]] = {
    "adapters": lambda ledger: adapter_views(ledger, after=LARGE, limit=PAGE),
    "adapters further on": lambda ledger: adapter_views(ledger, after="many-008", limit=PAGE),
    "one adapter": lambda ledger: adapter_views(ledger, "many-003"),
    "versions": lambda ledger: version_views(ledger, ledger.versions(after=PAST_IT, limit=PAGE)),
    "versions further on": lambda ledger: ledger.versions(after=("many-008", 3), limit=PAGE),
    "versions of one adapter": lambda ledger: ledger.versions(LARGE, limit=PAGE),
    "its versions further on": lambda ledger: ledger.versions(LARGE, after=(LARGE, 80), limit=PAGE),
    "versions on a base": lambda ledger: ledger.versions(only=Selection(base="org/often"), after=PAST_IT, limit=PAGE),
    "versions with a tag": lambda ledger: ledger.versions(
        only=Selection(tags={"team": "many"}), after=PAST_IT, limit=PAGE
    ),
    "versions with a metric": lambda ledger: ledger.versions(
        only=Selection(metrics=(parse_condition("bleu<0.5"),)), after=PAST_IT, limit=PAGE
    ),
    "the newest version": lambda ledger: resolve(ledger, Ref(LARGE)),
    "one version": lambda ledger: version_views(ledger, [resolve(ledger, Ref("many-003", alias="production"))]),
    "a family": lambda ledger: family(ledger, "many-003", most=PAGE),
}


@pytest.fixture
def database(address: str, ledger: Ledger) -> Iterator[Database]:
    with closing(Database(address if is_shared(address) else sqlite_url(Path(address)))) as database:
        yield database


def work_of(question: Callable[[Ledger], object], database: Database) -> int:
    ledger = SqlLedger(database)
    question(ledger)  # what is read once for good is not counted
    with counted() as work, ledger.snapshot():
        question(ledger)
    return work.amount


def test_what_is_read_for_a_page_or_a_version_does_not_grow_with_the_registry(ledger: Ledger, database: Database):
    fill(database, adapters=SMALL, each=EACH)
    before = {asked: work_of(question, database) for asked, question in QUESTIONS.items()}

    fill(database, adapters=MANY, each=EACH, start=SMALL)
    after = {asked: work_of(question, database) for asked, question in QUESTIONS.items()}

    assert all(work > 0 for work in after.values())
    # a tree of ten times as many rows may be a step deeper
    grown = {asked: (before[asked], work) for asked, work in after.items() if work > 1.3 * before[asked] + PAGE}
    assert grown == {}


def test_what_is_counted_is_what_is_read(ledger: Ledger, database: Database):
    fill(database, adapters=SMALL, each=EACH)

    few, all_of_them = (
        work_of(lambda ledger, n=n: ledger.versions(after=PAST_IT, limit=n), database) for n in (PAGE, None)
    )

    assert all_of_them > 5 * few > PAGE


def test_pages_are_the_whole_list_in_the_order_of_code_points(ledger: Ledger, add_version: AddVersion):
    names = NAMES * 3
    random.Random(5).shuffle(names)
    for name in names:
        add_version(name)
    whole = [(version.name, version.number) for version in ledger.versions()]

    for size in (1, 4, 30):
        walked: list[tuple[str, int]] = []
        while page := ledger.versions(after=walked[-1] if walked else None, limit=size):
            walked += [(version.name, version.number) for version in page]
        assert walked == whole == [(name, number) for name in NAMES for number in (1, 2, 3)]

    assert [newest.name for newest, _ in ledger.newest_of_each()] == NAMES
    assert [newest.name for newest, _ in ledger.newest_of_each(after="a.c", limit=3)] == ["a0", "a_d", "aa"]


def test_a_page_goes_on_where_it_ended_whatever_comes_and_goes_meanwhile(ledger: Ledger, add_version: AddVersion):
    added = [add_version("b") for _ in range(4)]
    first = ledger.versions(limit=2)

    ledger.remove_version(added[1].id, actor="ada", reason="r")
    ledger.remove_version(added[2].id, actor="ada", reason="r")
    add_version("a")
    add_version("b")
    rest = ledger.versions(after=("b", first[-1].number), limit=10)

    assert [version.label for version in first] == ["b:v1", "b:v2"]
    assert [version.label for version in rest] == ["b:v4", "b:v5"]
    assert [v.label for v in ledger.versions("b", include_removed=True, after=("b", 1), limit=2)] == ["b:v2", "b:v3"]


def test_a_selection_holds_whole_and_page_by_page(ledger: Ledger, add_version: AddVersion):
    other = ledger.add_base(Base("base-2", "other"), ["other"])
    one = add_version("a", metrics={"bleu": 0.3}, tags={"team": "mt", 'a "key"': "x=y"}, dataset="wmt14")
    two = add_version("a", metrics={"bleu": 0.2, "nll": 2.0}, tags={"team": "qa"}, base=other)
    three = add_version("b", tags={"team": "mt"})
    ledger.set_metrics(two.id, {"bleu": 0.5}, source="runs:/1")  # the newest counts
    ledger.move_stage(
        one.adapter_id, "staging", version_id=one.id, expected=None, action="promote", actor="ada", reason=""
    )

    def found(**given: object) -> list[str]:
        only = Selection(**given)  # type: ignore[arg-type]
        whole = [version.label for version in ledger.versions(only=only)]
        pages = [version.label for version in ledger.versions(only=only, limit=1)]
        while pages and (more := ledger.versions(only=only, limit=1, after=_place(pages[-1]))):
            pages += [version.label for version in more]
        assert pages == whole
        return whole

    def measured(text: str) -> list[str]:
        return found(metrics=tuple(map(parse_condition, text.split())))

    assert found() == ["a:v1", "a:v2", "b:v1"]
    assert found(base="other") == found(base=other.id) == found(base="base-2") == ["a:v2"]
    assert found(base="nothing") == []
    assert found(tags={"team": "mt"}) == ["a:v1", "b:v1"]
    assert found(tags={'a "key"': "x=y", "team": "mt"}) == ["a:v1"]
    assert found(tags={"team": "m"}) == found(tags={"Team": "mt"}) == []
    assert found(stage="staging") == ["a:v1"]
    assert found(stage="production") == []
    assert found(dataset="wmt14") == ["a:v1"]
    assert found(ids=[three.id, one.id, "nothing"]) == ["a:v1", "b:v1"]
    assert found(ids=[]) == []
    assert found(ids=[three.id, one.id], tags={"team": "mt"}, stage="staging") == ["a:v1"]
    assert measured("bleu>0.3") == measured("bleu>=0.5") == measured("bleu=0.5") == measured("nll<3") == ["a:v2"]
    assert measured("bleu<=0.3") == measured("bleu!=0.5") == measured("bleu<0.4 bleu>0.1") == ["a:v1"]
    assert measured("bleu>0.1 nll<3") == ["a:v2"]
    assert measured("other>0") == measured("bleu>0.5") == []


def test_adapters_are_told_by_their_newest_live_version(ledger: Ledger, add_version: AddVersion):
    versions = [add_version("a") for _ in range(3)]
    gone = add_version("gone")
    for version in (versions[2], gone):
        ledger.remove_version(version.id, actor="ada", reason="r")
    ledger.ensure_adapter("empty")

    assert [(newest.label, count) for newest, count in ledger.newest_of_each()] == [("a:v2", 2)]
    assert ledger.newest_of_each("gone") == ledger.newest_of_each("nobody") == []
    assert (ledger.numbers("a"), ledger.count_versions()) == ({1: versions[0].id, 2: versions[1].id}, 2)
    assert list(ledger.numbers("a", include_removed=True)) == [1, 2, 3]
    assert [ledger.has_versions(name) for name in ("a", "gone", "empty", "nobody")] == [True, True, False, False]


def test_stages_are_read_for_some_adapters_and_some_versions(ledger: Ledger, add_version: AddVersion):
    a, b = add_version("a"), add_version("b")
    for version, stage in ((a, "staging"), (a, "production"), (b, "staging")):
        ledger.move_stage(
            version.adapter_id, stage, version_id=version.id, expected=None, action="promote", actor="ada", reason=""
        )

    assert ledger.stages([b.adapter_id]) == {b.adapter_id: {"staging": b.id}}
    assert ledger.stages([]) == {}
    assert ledger.stages_of([a.id, b.id]) == {a.id: ("production", "staging"), b.id: ("staging",)}
    assert [ledger.is_held(stage) for stage in ("production", "canary")] == [True, False]
    assert ledger.labels([a.id, "nothing"]) == {a.id: "a:v1"}


def test_what_a_recall_hits_is_told_anew_after_each_version_and_each_recall(ledger: Ledger, add_version: AddVersion):
    other = SqlLedger(ledger._db)  # another process  # type: ignore[attr-defined]
    root = add_version("a")

    assert ledger.recalls() == {}
    other.recall(root.id, "recall", actor="ada", reason="leaked")
    assert set(ledger.recalls()) == {root.id}
    child = add_version("b", parents=[root])
    assert set(other.recalls()) == set(ledger.recalls()) == {root.id, child.id}
    ledger.recall(root.id, "undo", actor="ada", reason="not so")
    assert other.recalls() == ledger.recalls() == {}


def _place(label: str) -> tuple[str, int]:
    name, _, number = label.rpartition(":v")
    return name, int(number)

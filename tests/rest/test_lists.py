"""Lists over HTTP cost what is on the page, in a registry of any size; and their pages make the whole list."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from many import LARGE, counted, fill

from adapterctl.registry.rest import pages
from adapterctl.registry.rest.routes import MAX_PAGE

SMALL, MANY, EACH, PAGE = 20, 200, 10, 10
#: Whose answers are of one size in the small and in the large registry; `{after}` leads to the last page but one.
ASKED = [
    "/v1/adapters/many-003",
    f"/v1/adapters/{LARGE}/versions?max_results={PAGE}",
    f"/v1/adapters/{LARGE}/versions?max_results={PAGE}&page_token={{after}}",
    f"/v1/adapters/{LARGE}/versions/latest",
    f"/v1/adapters/{LARGE}/versions/3",
    f"/v1/adapters/{LARGE}/versions/3/lineage",
    "/v1/adapters/many-003/versions/@production",
    f"/v1/versions?max_results={PAGE}",
    f"/v1/versions?max_results={PAGE}&page_token={{after}}",
    f"/v1/versions?max_results={PAGE}&base=org/often",
    f"/v1/versions?max_results={PAGE}&tag=team%3Dmany",
    f"/v1/versions?max_results={PAGE}&metric=bleu%3C0.5",
    "/v1/versions?name=many-003&stage=production",
    f"/v1/jobs?max_results={PAGE}",
    f"/v1/events?max_results={PAGE}",
    "/v1/bases",
    "/v1/suites",
    "/v1/gates",
    "/metrics",
    "/adapters/many-003/v3/lineage.svg",
]


@pytest.fixture
def get(served: Any) -> Callable[[str], Any]:
    return lambda path: served.client.get(path, headers=served.auth("read"))


@pytest.fixture(scope="module")
def work(served: Any) -> dict[str, list[int]]:
    """What each of these questions reads, in a small and in a large registry; the large one is left."""

    def get(path: str) -> Any:
        answer = served.client.get(path, headers=served.auth("read"))
        assert answer.status_code == 200, answer.text
        return answer

    def work_of(path: str, size: int) -> int:
        after = near_the_end(get, path.partition("?")[0], size) if "{after}" in path else ""
        get(path.format(after=after))  # what is read once for good is not counted
        with counted() as work:
            get(path.format(after=after))
        return work.amount

    found: dict[str, list[int]] = {path: [] for path in ASKED}
    for start, adapters in ((0, SMALL), (SMALL, MANY)):
        fill(served.registry.ledger._db, adapters=adapters, each=EACH, start=start)
        for path in ASKED:
            found[path].append(work_of(path, adapters * EACH * (1 if LARGE in path else 2)))
    return found


def near_the_end(get: Callable[[str], Any], path: str, left: int) -> str:
    """The token of the last page but one of a list that has so many items."""
    token = ""
    while left > 2 * PAGE:
        page = get(f"{path}?max_results={min(left - 2 * PAGE, MAX_PAGE)}&{token}").json()
        left, token = left - len(page["versions"]), f"page_token={page['next_page_token']}"
    return token.partition("=")[2]


@pytest.mark.parametrize("path", ASKED)
def test_an_answer_of_one_size_costs_the_same_in_ten_times_as_large_a_registry(work: dict[str, list[int]], path: str):
    small, large = work[path]

    # a tree of ten times as many rows may be a step deeper
    assert 0 < large < 1.3 * small + 100


@pytest.mark.parametrize(
    ("path", "key", "last"),
    [("/v1/adapters", "adapters", ["name"]), ("/v1/versions", "versions", ["name", "number"])],
)
def test_pages_make_the_whole_list(work: Any, get: Callable[[str], Any], path: str, key: str, last: list[str]):
    whole = get(f"{path}?max_results=1000").json()[key]

    walked: list[Any] = []
    token = ""
    while token is not None and len(walked) < len(whole):
        page = get(f"{path}?max_results=97{token and f'&page_token={token}'}").json()
        walked, token = walked + page[key], page["next_page_token"]

    assert walked[: len(whole)] == whole
    assert whole == sorted(whole, key=lambda each: [each[field] for field in last])
    assert len(whole) == {"adapters": MANY + 1, "versions": 1000}[key]


def test_the_page_of_adapters_leads_to_the_next_one(
    work: Any, get: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(pages, "LISTED", 90)
    seen: list[str] = []
    address = "/adapters"
    for _ in range(3):
        page = get(address).text
        seen += re.findall(r'<li><a href="adapters/([^"]+)">', page)
        address = "/adapters" + (re.findall(r'<a href="(\?after=[^"]+)">More</a>', page) or [""])[0]

    assert address == "/adapters"
    assert seen == [LARGE, *(f"many-{number:03}" for number in range(MANY))]
    assert "There are no more." in get("/adapters?after=z").text

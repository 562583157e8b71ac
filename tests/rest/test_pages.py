"""The pages and pictures of lineage as a server sends them: fresh, small, closed to strangers, without a way out."""

from __future__ import annotations

import re
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import pytest
from tiny import write_tiny_adapter

from adapterctl.registry.domain.refs import Ref


@pytest.fixture(scope="module")
def get(served: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Ask the server that has one:v1 -> two:v1 -> three:v1 with a reader's token."""
    parent = None
    for seed, name in enumerate(("one", "two", "three"), start=40):
        folder = write_tiny_adapter(tmp_path_factory.mktemp(name), seed=seed)
        parent = Ref(
            served.registry.register(str(folder), name=name, trained_from=parent, metrics={"bleu": seed}).version.name
        )
    return lambda path, **headers: served.client.get(path, headers={**served.auth("read"), **headers})


def drawn(text: str) -> list[str]:
    return re.findall(r'data-ref="([^"]+)"', text)


def test_a_picture_shows_a_version_with_its_relatives(get: Callable):
    answer = get("/adapters/two/v1/lineage.svg")

    assert answer.headers["content-type"] == "image/svg+xml"
    assert ET.fromstring(answer.text).tag.endswith("svg")
    assert sorted(drawn(answer.text)) == ["one:v1", "three:v1", "two:v1"]


@pytest.mark.parametrize("version", ["1", "v1", "latest"])
def test_a_version_has_a_page_under_each_of_its_names(get: Callable, version: str):
    answer = get(f"/adapters/three/{version}")

    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert "<h1>Lineage of three:v1</h1>" in answer.text
    assert sorted(drawn(answer.text)) == ["one:v1", "three:v1", "two:v1"]


def test_an_adapter_has_a_page_and_a_picture_of_all_its_versions_and_their_neighbours(get: Callable):
    for path in ("/adapters/one", "/adapters/one/lineage.svg"):
        assert sorted(drawn(get(path).text)) == ["one:v1", "two:v1"]


@pytest.mark.parametrize(
    ("query", "shown"),
    [
        ("direction=up", ["one:v1", "two:v1"]),
        ("direction=down&depth=&metric=", ["three:v1", "two:v1"]),
        ("direction=both&depth=1&metric=bleu", ["one:v1", "three:v1", "two:v1"]),
    ],
)
def test_direction_and_depth_are_chosen_in_the_address(get: Callable, query: str, shown: list[str]):
    page = get(f"/adapters/two/v1?{query}").text

    assert sorted(drawn(page)) == shown
    assert page.count(" selected>") == 3


def test_a_metric_colours_the_versions_from_lowest_to_highest(get: Callable):
    page = get("/adapters/two/v1?metric=bleu").text

    heats = re.findall(r'class="node[^"]*?(heat\d)[^>]*data-ref="([^"]+)"', page)
    assert sorted(heats) == [("heat0", "one:v1"), ("heat3", "two:v1"), ("heat6", "three:v1")]
    assert "bleu: 40" in page


@pytest.mark.parametrize(("path", "below"), [("/adapters", "adapters/"), ("/adapters/", "")])
def test_the_adapters_are_listed_and_lead_to_their_pages(served: Any, get: Callable, path: str, below: str):
    served.registry.promote(Ref("two"), to="production")

    answer = get(path)

    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert f'<a href="{below}one">one</a>' in answer.text
    assert f'<a href="{below}two">two</a>: v1, production v1</li>' in answer.text
    assert get(urljoin(path, f"{below}two")).status_code == 200
    assert served.client.get(path).status_code == 401


@pytest.mark.parametrize("query", ["direction=sideways", "depth=-1", "depth=x", f"metric={'m' * 400}"])
def test_what_cannot_be_shown_is_refused(get: Callable, query: str):
    assert get(f"/adapters/two/v1?{query}").status_code == 400


@pytest.mark.parametrize("path", ["/adapters/nobody", "/adapters/one/v9", "/adapters/nobody/v1/lineage.svg"])
def test_what_is_not_there_is_not_found(get: Callable, path: str):
    answer = get(path)

    assert answer.status_code == 404
    assert answer.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize(
    ("path", "status", "said"),
    [
        ("/adapters/nobody/v1", 404, "there is no adapter &#x27;nobody&#x27;"),
        ("/adapters/%3Cscript%3E", 400, "&lt;script&gt;"),
        ("/adapters/two/v1?depth=x", 400, "depth"),
    ],
)
def test_a_browser_is_told_in_a_page_what_is_wrong_with_an_address(get: Callable, path: str, status: int, said: str):
    answer = get(path, accept="text/html,application/xhtml+xml,*/*;q=0.8")

    assert answer.status_code == status
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert said in answer.text
    assert "<script" not in answer.text
    assert answer.headers["content-security-policy"].startswith("default-src 'none'; style-src 'sha256-")


def test_a_picture_is_asked_for_again_and_sent_again_only_when_it_changed(served: Any, get: Callable, tmp_path: Path):
    first = get("/adapters/three/v1/lineage.svg")
    same = get("/adapters/three/v1/lineage.svg", **{"If-None-Match": first.headers["etag"]})
    served.registry.register(str(write_tiny_adapter(tmp_path, seed=50)), name="four", trained_from=Ref("three"))
    changed = get("/adapters/three/v1/lineage.svg", **{"If-None-Match": first.headers["etag"]})

    assert first.headers["cache-control"] == "private, no-cache"
    assert (same.status_code, same.content) == (304, b"")
    assert changed.status_code == 200
    assert "four:v1" in drawn(changed.text)


def test_a_page_may_load_nothing_and_be_framed_by_nobody(get: Callable):
    for path in ("/adapters/two", "/adapters/two/v1", "/adapters/two/lineage.svg"):
        answer = get(path)
        rules = dict(rule.strip().split(" ", 1) for rule in answer.headers["content-security-policy"].split(";"))
        assert rules["default-src"] == rules["base-uri"] == rules["frame-ancestors"] == "'none'"
        assert all(source.startswith("'sha256-") for source in rules["style-src"].split())
        assert "unsafe" not in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"


def test_a_page_leads_to_mlflow_and_to_other_pages_wherever_the_server_is_mounted(get: Callable):
    page = get("/adapters/two/v1").text

    assert '"../../adapters/one/v1"' in page
    assert '"../../#/models/two/versions/1"' in page
    assert not re.search(r'(href|action|src)="(https?:|/)', page)


def test_the_picture_of_a_version_takes_milliseconds(get: Callable):
    begun = time.perf_counter()
    for _ in range(5):
        get("/adapters/two/v1/lineage.svg")

    assert (time.perf_counter() - begun) / 5 < 0.5  # 0.02 s on an idle machine; `make bench` has the figure


def test_who_made_use_of_an_adapter_that_moved_on_is_marked(served: Any, get: Callable, tmp_path: Path):
    served.registry.register(str(write_tiny_adapter(tmp_path, seed=51)), name="one")

    page = get("/adapters/two/v1").text

    assert "one:v2 is newer than its parent" in page
    assert page.count('<circle class="behind"') == 2  # two:v1, and the sign in the legend: three:v1 made no use of it

"""Lineage in a served registry, by clicks alone: on MLflow's stock pages and on ours; and hostile text in both."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from tiny import write_tiny_adapter

from adapterctl.bootstrap import connect
from adapterctl.registry.domain.refs import Ref
from adapterctl.registry.settings import Settings
from adapterctl.registry.stores.mlflow_pages import escape


@pytest.fixture(scope="module")
def served(
    tmp_path_factory: pytest.TempPathFactory, ledger_schema: Path, mlflow_schema: Path, payloads: Sequence[str]
) -> Iterator[Mapping[str, str]]:
    """A served registry with root:v1 -> middle:v1 -> leaf:v1; `hostile` is described by every payload."""
    import mlflow  # deferred: seconds

    home = tmp_path_factory.mktemp("served")
    (home / "registry.db").write_bytes(ledger_schema.read_bytes())
    (home / "mlflow.db").write_bytes(mlflow_schema.read_bytes())
    registry = connect(Settings(home=home, actor="ada"))
    with closing(registry.ledger):
        parent = None
        for seed, name in enumerate(("root", "middle", "leaf")):
            folder = write_tiny_adapter(home / name, seed=seed)
            registry.register(str(folder), name=name, trained_from=parent, metrics={"bleu": 0.1 * seed})
            parent = Ref(name)
        root, middle = (registry.version(Ref(name)) for name in ("root", "middle"))
        kept = {"RUN": middle.run_id, "OTHER": root.run_id, "MODEL": middle.model_id}
        uri = registry.version_store.uri
        client = mlflow.MlflowClient(uri, uri)
        client.create_registered_model("hostile", description="\n\n".join(escape(each) for each in payloads))
    command = [sys.executable, "-m", "adapterctl", "--home", str(home), "-o", "json", "serve", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        try:
            yield {"url": json.loads(server.stdout.readline())["url"], **kept}
        finally:
            server.terminate()


@pytest.fixture
def visit(chromium: Any, served: Mapping[str, str]) -> Iterator[Callable[[str], Any]]:
    """Open a page of the server. After the test: no error of a page or on its console, no dialog."""
    told: list[str] = []
    context = chromium.new_context(viewport={"width": 1280, "height": 900})

    def go(path: str) -> Any:
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("pageerror", lambda error: told.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (told.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("console", lambda message: told.append(_said(message)) if _counts(message) else None)
        page.goto(served["url"] + path)
        return page

    yield go
    context.close()
    assert told == []


def _said(message: Any) -> str:
    return f"{message.type}: {message.text} {message.location['url']} on {message.page.url}"


def _counts(message: Any) -> bool:
    """On our pages every word on the console; on MLflow's an error, but a browser's note on a table that grew twice."""
    if "/adapters/" in message.page.url:
        return True
    return message.type == "error" and "ResizeObserver loop" not in message.text


def follow(page: Any, name: str) -> Any:
    """Click on a link of MLflow's page; those in a description open a tab of their own."""
    with page.expect_popup() as opened:
        page.get_by_role("link", name=name, exact=True).first.click()
    opened.value.wait_for_url("**/versions/1*")
    return opened.value


def test_stock_pages_lead_from_child_to_grandparent_and_from_root_to_grandchild(visit: Callable):
    leaf = visit("/#/models/leaf/versions/1")
    grandparent = follow(follow(leaf, "middle:v1"), "root:v1")
    grandchild = follow(follow(grandparent, "middle:v1"), "leaf:v1")

    assert grandparent.url.endswith("#/models/root/versions/1")
    assert grandchild.url.endswith("#/models/leaf/versions/1")


def test_mlflows_own_links_lead_from_child_to_grandparent_and_from_root_to_grandchild(visit: Callable):
    """By source runs and logged models alone. The links of our descriptions open a tab, so they are left out."""
    page = visit("/#/models/leaf/versions/1")
    version = "a[href$='#/models/{}/versions/1']:not([target])"
    for child, parent in (("leaf", "middle"), ("middle", "root")):
        page.locator("a[href*='/runs/']", has_text=f" {child}:v1").first.click()
        page.locator(version.format(parent)).first.click()
        page.wait_for_url(f"**/models/{parent}/versions/1*")
    grandparent = page.url
    for child in ("middle", "leaf"):
        page.locator("a[href*='/experiments/1/models/m-']:not([target])").first.click()
        page.locator("a[href*='/runs/']", has_text=f" {child}:v1").first.click()
        page.locator(version.format(child)).first.click()
        page.wait_for_url(f"**/models/{child}/versions/1*")

    assert grandparent.endswith("#/models/root/versions/1")
    assert page.url.endswith("#/models/leaf/versions/1")


def test_a_stock_page_shows_the_picture_which_leads_to_our_page_and_back(visit: Callable):
    stock = visit("/#/models/middle/versions/1")
    picture = stock.locator("img[src*='lineage.svg']")
    picture.wait_for()
    stock.wait_for_function("document.querySelector(\"img[src*='lineage.svg']\").naturalWidth > 0")

    with stock.expect_popup() as opened:
        picture.click()
    ours = opened.value
    ours.wait_for_selector("h1")
    ours.click("[data-ref='root:v1']")
    ours.click("#card >> text=In MLflow")
    ours.wait_for_url("**/#/models/root/versions/1")

    assert ours.get_by_role("heading", name="Version 1").inner_text() == "Version 1"


def test_our_pages_lead_both_ways_by_clicks(visit: Callable):
    page = visit("/adapters/leaf/v1")
    page.click("[data-ref='root:v1']")
    page.click("#card >> text=Its own page")
    page.wait_for_url("**/adapters/root/v1")
    up = page.inner_text("h1")
    page.get_by_role("navigation").get_by_role("link", name="leaf:v1").click()
    page.wait_for_url("**/adapters/leaf/v1")

    assert up == "Lineage of root:v1"
    assert page.inner_text("h1") == "Lineage of leaf:v1"


def test_a_parent_that_the_picture_leaves_out_is_a_link_to_its_page(visit: Callable):
    page = visit("/adapters/middle/v1?direction=down")
    page.click("[data-ref='middle:v1']")
    page.click("#card >> text=root:v1")
    page.wait_for_url("**/adapters/root/v1")

    assert page.inner_text("h1") == "Lineage of root:v1"


def test_what_a_search_says_moves_nothing_on_the_page(visit: Callable):
    page = visit("/adapters/middle/v1")
    before = page.locator("#fit").bounding_box()
    page.fill("#search", "root")

    assert page.inner_text("#found") == "1 of 3"
    assert page.locator("#fit").bounding_box()["y"] == before["y"]


def test_what_is_chosen_is_in_the_address_and_keys_open_pages(visit: Callable):
    page = visit("/adapters/middle/v1")

    page.select_option("[name=direction]", "up")
    page.wait_for_url("**direction=up**")
    page.select_option("[name=metric]", "bleu")
    page.wait_for_url("**metric=bleu**")
    shown = page.eval_on_selector_all(".node[data-ref]", "nodes => nodes.map(node => node.dataset.ref)")
    page.focus("[data-ref='root:v1']")
    page.keyboard.press("o")
    page.wait_for_url("**/adapters/root/v1")

    assert sorted(shown) == ["middle:v1", "root:v1"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_our_pages_can_be_read_heard_and_used_without_a_mouse(visit: Callable, barriers: Callable, scheme: str):
    page = visit("/adapters/middle/v1")
    page.emulate_media(color_scheme=scheme)
    found = {"a version": barriers(page)}
    page.focus("[data-ref='middle:v1']")
    found["a card"] = barriers(page)
    page.fill("#search", "root")
    found["a search"] = barriers(page)
    page.goto(page.url.partition("#")[0] + "?metric=bleu")
    found["a metric"] = barriers(page)
    page.goto(page.url.replace("/v1", ""))
    found["an adapter"] = barriers(page)

    assert found == {state: [] for state in found}


def test_stock_pages_say_nothing_wrong_on_the_console(visit: Callable, served: Mapping[str, str]):
    page = visit("/")
    for path in (
        "/models",
        "/models/middle",
        "/models/middle/versions/1",
        "/compare-model-versions?name=%22middle%22&runs={%221%22:%22RUN%22}",
        "/experiments",
        "/experiments/1/runs",
        "/experiments/1/models",
        "/experiments/1/models/MODEL",
        "/experiments/1/runs/RUN",
        "/experiments/1/runs/RUN/artifacts/lineage/lineage.md",
        "/compare-runs?runs=[%22RUN%22,%22OTHER%22]&experiments=[%221%22]",
        "/settings/webhooks",
        "/settings/llm-connections",
        "/gateway",
    ):
        page.goto(f"{served['url']}/#{re.sub('[A-Z]{3,}', lambda match: served[match[0]], path)}")
        page.locator("main").first.wait_for()
        page.wait_for_timeout(700)  # its pages poll, so the network is never idle

    assert page.url.endswith("/gateway")  # what was said on the way is looked at by the fixture


def test_two_hundred_hostile_texts_are_text_where_mlflow_renders_them(visit: Callable, payloads: Sequence[str]):
    page = visit("/#/models/hostile")
    page.get_by_text("window.hit=1", exact=False).first.wait_for()
    page.wait_for_timeout(500)

    assert len(payloads) >= 200
    assert page.evaluate("window.hit ?? null") is None
    assert page.title() != "hit"
    # nothing of it became an element: neither one that runs or loads, nor a link
    assert (
        page.evaluate("document.querySelectorAll('iframe, foreignObject, [onerror], [onload], [onfocus]').length") == 0
    )
    assert (
        page.evaluate("[...document.querySelectorAll('a')].filter(a => /^(javascript|data):/i.test(a.href)).length")
        == 0
    )
    assert page.evaluate("[...document.images].filter(image => /evil/.test(image.src)).length") == 0

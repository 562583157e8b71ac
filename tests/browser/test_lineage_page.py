"""The page of a lineage in a browser: search, keyboard, addresses, dark mode; and hostile text that does nothing."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from adapterctl.registry.api import LineageView, ParentView, RecallView
from adapterctl.registry.services.draw import Shades, Site, lineage_html, lineage_svg


@pytest.fixture
def family(views) -> LineageView:
    """a:v1 -> a:v2 -> m:v1 <- b:v1, and m:v1 -> z:v1."""
    plain = views(["m:v1", "a:v1", "a:v2", "b:v1", "z:v1"],
                  [("a:v1", "a:v2"), ("a:v2", "m:v1"), ("b:v1", "m:v1"), ("m:v1", "z:v1")])  # fmt: skip
    merged = dataclasses.replace(
        plain.versions[0], kind="merge", method="svd", loss=0.0321, stages=("production",), metrics={"bleu": 0.31}
    )
    merged = dataclasses.replace(merged, parents=(ParentView("far:v9", 0.25, "merge"),))
    tagged = dataclasses.replace(plain.versions[3], tags={"team": "speech"})
    return dataclasses.replace(plain, versions=(merged, *plain.versions[1:3], tagged, plain.versions[4]))


def focused(page: Any) -> str | None:
    return page.evaluate("document.activeElement.dataset.ref ?? null")


def test_search_marks_what_it_finds_and_enter_goes_there(open_page, family):
    page = open_page(lineage_html(family))

    page.keyboard.press("/")
    page.keyboard.type("SPEECH")
    marked = page.eval_on_selector_all(".node.hit", "nodes => nodes.map(node => node.dataset.ref)")
    page.keyboard.press("Enter")

    assert marked == ["b:v1"]
    assert page.inner_text("#found") == "1 of 5"
    assert focused(page) == "b:v1"


def test_search_that_finds_nothing_says_so_and_escape_ends_it(open_page, family):
    page = open_page(lineage_html(family))

    page.fill("#search", "nothing of that kind")
    said = page.inner_text("#found")
    page.keyboard.press("Escape")

    assert said == "0 of 5"
    assert page.locator(".node.miss").count() == 0
    assert page.inner_text("#found") == ""


def test_keys_walk_through_the_family(open_page, family):
    page = open_page(lineage_html(family), fragment="#m%3Av1")
    walked = [focused(page)]

    for key in ("ArrowUp", "ArrowUp", "ArrowDown", "ArrowDown", "ArrowDown"):
        page.keyboard.press(key)
        walked.append(focused(page))

    assert walked == ["m:v1", "a:v2", "a:v1", "a:v2", "m:v1", "z:v1"]


def test_left_and_right_walk_along_a_generation(open_page, family):
    page = open_page(lineage_html(family))

    reached = []
    for key in ("ArrowLeft", "ArrowRight"):
        page.focus("[data-ref='a:v2']")
        page.keyboard.press(key)
        reached.append(focused(page))

    assert sorted(map(str, reached)) == ["a:v2", "b:v1"]  # one neighbour, and the end of the row on the other side


def test_tab_reaches_every_version_and_each_has_a_name(open_page, family):
    page = open_page(lineage_html(family))
    page.focus("#fit")

    reached = []
    for _ in range(5):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.getAttribute('aria-label')").partition(",")[0])

    assert reached == ["a:v1", "a:v2", "b:v1", "m:v1", "z:v1"]


def test_plus_minus_and_zero_zoom(open_page, family):
    page = open_page(lineage_html(family))
    width = "document.querySelector('main > svg').viewBox.baseVal.width"
    whole = page.evaluate(width)

    page.keyboard.press("+")
    nearer = page.evaluate(width)
    page.keyboard.press("-")
    page.keyboard.press("-")
    farther = page.evaluate(width)
    page.keyboard.press("0")

    assert nearer < whole < farther
    assert page.evaluate(width) == whole


def test_wheel_zooms_where_the_pointer_is_and_dragging_moves(open_page, family):
    page = open_page(lineage_html(family))
    box = "(() => { const b = document.querySelector('main > svg').viewBox.baseVal; return [b.x, b.y, b.width]; })()"
    before = page.evaluate(box)

    page.mouse.move(20, 700)  # where no version is
    page.mouse.wheel(0, -100)
    page.wait_for_function(f"{box}[2] < {before[2]}")
    zoomed = page.evaluate(box)
    page.mouse.down()
    page.mouse.move(80, 730)
    page.mouse.up()
    moved = page.evaluate(box)

    assert moved[0] < zoomed[0]
    assert moved[1] < zoomed[1]
    assert moved[2] == zoomed[2]


def test_card_tells_what_is_known_and_leads_to_parents(open_page, family):
    page = open_page(lineage_html(family), fragment="#m%3Av1")
    card = page.inner_text("#card")

    page.click("#card button >> text=b:v1")

    for told in (
        "m:v1",
        "production",
        "svd",
        "3.21%",
        "bleu",
        "0.31",
        "2026-01-02 03:04:05 UTC",
        "a:v2",
        "z:v1",
        "far:v9 × 0.25",
    ):
        assert told in card
    assert focused(page) == "b:v1"
    assert page.url.endswith("#b%3Av1")


def test_the_lines_of_the_chosen_version_stand_out(open_page, family):
    page = open_page(lineage_html(family), fragment="#b%3Av1")

    near = page.eval_on_selector_all(".near", "edges => edges.map(edge => edge.dataset.child)")

    assert near == ["m:v1"]


def test_hovering_shows_a_card_and_leaving_hides_it(open_page, family):
    page = open_page(lineage_html(family))

    page.hover("[data-ref='b:v1']")
    hovered = page.inner_text("#card h2")
    page.mouse.move(5, 400)

    assert hovered == "b:v1"
    assert page.locator("#card").is_hidden()


@pytest.mark.parametrize("fragment", ["#nobody%3Av1", "#%E0%A4%A", "#<script>window.hit=1</script>"])
def test_an_address_of_nothing_shows_the_whole_graph(open_page, family, fragment: str):
    page = open_page(lineage_html(family), fragment=fragment)

    assert page.locator("#card").is_hidden()
    assert page.evaluate("window.hit ?? null") is None


@pytest.mark.parametrize("suffix", ["svg", "html"])
def test_dark_mode_is_dark_and_light_mode_is_light(open_page, family, suffix: str):
    text = {"svg": lineage_svg, "html": lineage_html}[suffix](family)
    brightness = "getComputedStyle(document.querySelector('rect.paper')).fill.match(/\\d+/g).map(Number)[0]"

    assert open_page(text, suffix, scheme="dark").evaluate(brightness) < 60
    assert open_page(text, suffix, scheme="light").evaluate(brightness) > 200


@pytest.fixture
def troubled(family) -> LineageView:
    """The family with all that can be wrong: m:v1 serves and is recalled, a:v1 was removed."""
    merged, first, *others = family.versions
    recalled = dataclasses.replace(merged, recall=RecallView("m:v1", "leaked data", "ada", "2026-01-03T00:00:00Z"))
    return dataclasses.replace(family, versions=(recalled, dataclasses.replace(first, state="removed"), *others))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_an_exported_page_can_be_read_heard_and_used_without_a_mouse(open_page, barriers, troubled, scheme: str):
    shades = Shades(metric="bleu", behind={"z:v1": "m:v2"})
    found = {}
    for name, text in {
        "whole": lineage_html(troubled),
        "coloured": lineage_html(troubled, shades=shades),
        "folded": lineage_html(troubled, most=2),
    }.items():
        page = open_page(text, scheme=scheme)
        found[name] = barriers(page)
        page.focus("[data-ref='m:v1']")
        page.fill("#search", "speech")
        found[f"{name}, a card and a search"] = barriers(page)

    assert found == {state: [] for state in found}


def test_a_recalled_version_that_serves_says_both_in_words(open_page, troubled):
    page = open_page(lineage_html(troubled))
    box = page.locator("[data-ref='m:v1']")
    seen = {name: box.locator(f".{name} >> text={word}").bounding_box() for name, word in
            (("badge", "production"), ("recall", "recalled"))}  # fmt: skip

    assert seen["recall"]["y"] + seen["recall"]["height"] <= seen["badge"]["y"] + 3  # neither hides the other
    assert "recalled (m:v1: leaked data), production" in box.get_attribute("aria-label")
    assert page.locator("[data-ref='z:v1'] .recall").count() == 0


def test_print_is_light_and_shows_the_graph_alone(open_page, family):
    page = open_page(lineage_html(family), scheme="dark")

    page.emulate_media(media="print")

    assert page.locator("#search").is_hidden()
    assert page.evaluate("getComputedStyle(document.querySelector('rect.paper')).fill") == "rgb(251, 251, 250)"


def test_a_long_family_is_printed_on_one_sheet(open_page, views):
    refs = [f"n:v{i}" for i in range(1, 31)]
    page = open_page(lineage_html(views(refs, [(refs[i - 1], refs[i]) for i in range(1, 30)])))

    sheets = page.pdf(format="A4")

    assert sheets.count(b"/Type /Page\n") == 1


def test_long_text_is_cut_to_fit_its_box(open_page, family):
    long = "translate-and-summarise-" * 4
    wide = dataclasses.replace(
        family.versions[0], ref=f"{long}:v1", stages=("production",), method=long, metrics={long: 1.0}
    )
    page = open_page(lineage_svg(dataclasses.replace(family, versions=(wide, *family.versions[1:]))), "svg")

    beyond = page.evaluate(
        """[...document.querySelectorAll('.node')].flatMap(node => {
            const box = node.querySelector('.box').getBoundingClientRect();
            return [...node.querySelectorAll('text')].filter(text => {
                const it = text.getBoundingClientRect();
                return it.left < box.left || it.right > box.right || it.bottom > box.bottom;
            }).map(text => text.textContent);
        })"""
    )

    assert beyond == []


@pytest.mark.parametrize("suffix", ["svg", "html"])
def test_hostile_text_does_nothing(open_page, hostile: LineageView, suffix: str):
    text = {"svg": lineage_svg, "html": lineage_html}[suffix](hostile)

    page = open_page(text, suffix)
    nodes = page.locator(".node[data-ref]")
    page.evaluate("document.querySelectorAll('.node[data-ref]').forEach(node => node.focus())")

    assert nodes.count() == len(hostile.versions)
    assert page.evaluate("window.hit ?? null") is None
    assert page.evaluate("document.querySelectorAll('img, iframe, a, foreignObject, animate, use').length") == 0
    assert page.evaluate("document.querySelectorAll('script').length") == (2 if suffix == "html" else 0)
    assert page.evaluate("document.title").startswith("Lineage of ") if suffix == "html" else True


def test_hostile_text_stands_in_the_card_as_it_is(open_page, hostile: LineageView):
    page = open_page(lineage_html(hostile))

    page.evaluate("document.querySelector('.node.root').focus()")

    assert "<script>window.hit=1</script>" in page.inner_text("#card")
    assert page.locator("#card script").count() == 0
    assert page.evaluate("window.hit ?? null") is None


def test_what_was_folded_away_unfolds_by_a_click_and_the_way_leads_back(chromium, views):
    """Each page as a server would draw it, with room for ten versions."""
    refs = [f"n:v{i}" for i in range(1, 101)]
    chain = [(refs[i - 1], refs[i]) for i in range(1, 100)]

    def answer(route: Any) -> None:
        number = int(route.request.url.rpartition("/v")[2])
        near = dataclasses.replace(views(refs, chain), root=f"n:v{number}")
        route.fulfill(
            body=lineage_html(near, most=10, site=Site(root="../../", mlflow="../../")), content_type="text/html"
        )

    page = chromium.new_page()
    page.route("**/adapters/**", answer)
    page.goto("http://lineage.example/adapters/n/v1")
    drawn = "[...document.querySelectorAll('.node[data-ref]')].map(node => node.dataset.ref)"
    first = page.evaluate(drawn)
    page.get_by_role("link", name="+1 more children of n:v10").click()
    page.wait_for_url("**/n/v10")
    second = page.evaluate(drawn)
    page.get_by_role("link", name="+1 more parents of n:v5").focus()  # it lies outside of what is shown at first
    page.get_by_role("link", name="+1 more parents of n:v5").click()
    page.wait_for_url("**/n/v5")

    assert first == refs[:10]
    assert {"n:v10", "n:v11", "n:v12", "n:v13"} <= set(second)
    assert "n:v1" in page.evaluate(drawn)
    page.close()


def test_a_page_of_hundreds_of_versions_is_ready_in_two_seconds(open_page, views):
    refs = [f"n:v{i}" for i in range(1, 2001)]
    page = open_page(lineage_html(views(refs, [(refs[i // 3], refs[i]) for i in range(1, 2000)])))

    ready_ms = page.evaluate("performance.getEntriesByType('navigation')[0].domContentLoadedEventEnd")

    assert ready_ms < 2000
    assert page.locator(".node[data-ref]").count() == 300
    assert "300 of 2000 versions" in page.inner_text("header")
    assert page.evaluate("document.querySelector('main > svg').getScreenCTM().a") > 0.8  # what it opens on is readable

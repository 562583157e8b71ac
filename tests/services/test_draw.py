"""Drawings of a lineage: laws of the layout, the same bytes for the same graph, and text that stays text."""

from __future__ import annotations

import dataclasses
import random
import time
import xml.etree.ElementTree as ET
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterctl.registry.api import LineageEdgeView, LineageView
from adapterctl.registry.services.draw import NODE_HEIGHT, NODE_WIDTH, lineage_html, lineage_svg, place

SVG = "{http://www.w3.org/2000/svg}"


@st.composite
def graphs(draw: st.DrawFn) -> tuple[list[str], list[tuple[str, str]]]:
    """Nodes, and edges from a lower number to a higher one; some nodes have none, some parts hang together alone."""
    count = draw(st.integers(1, 30))
    ends = st.tuples(st.integers(0, count - 1), st.integers(0, count - 1)).filter(lambda pair: pair[0] < pair[1])
    pairs = draw(st.lists(ends, max_size=60, unique=True)) if count > 1 else []
    return [f"n:v{i}" for i in range(count)], [(f"n:v{a}", f"n:v{b}") for a, b in pairs]


@given(graphs())
@settings(max_examples=200, deadline=None)
def test_no_two_nodes_overlap(graph):
    nodes, pairs = graph

    layout = place(nodes, pairs)

    placed = list(layout.nodes.values())
    assert len(placed) == len(nodes)
    for i, (x, y) in enumerate(placed):
        for other_x, other_y in placed[:i]:
            assert abs(x - other_x) >= NODE_WIDTH + 1 or abs(y - other_y) >= NODE_HEIGHT + 1


@given(graphs())
@settings(max_examples=200, deadline=None)
def test_parents_stand_above_children_and_every_line_joins_the_two(graph):
    nodes, pairs = graph

    layout = place(nodes, pairs)

    assert list(layout.lines) == pairs
    for (parent, child), line in layout.lines.items():
        heights = [y for _, y in line]
        assert (line[0], line[-1]) == (layout.nodes[parent], layout.nodes[child])
        assert heights == sorted(set(heights))


@given(graphs())
@settings(max_examples=100, deadline=None)
def test_everything_lies_inside_the_picture(graph):
    layout = place(*graph)

    for x, y in layout.nodes.values():
        assert NODE_WIDTH / 2 <= x <= layout.width - NODE_WIDTH / 2
        assert NODE_HEIGHT / 2 <= y <= layout.height - NODE_HEIGHT / 2


@given(graphs())
@settings(max_examples=100, deadline=None)
def test_no_line_runs_through_a_node_that_it_does_not_join(graph):
    layout = place(*graph)

    for (parent, child), line in layout.lines.items():
        for x, y in line[1:-1]:
            others = [at for ref, at in layout.nodes.items() if ref not in (parent, child)]
            assert all(abs(x - ox) > NODE_WIDTH / 2 or abs(y - oy) > NODE_HEIGHT / 2 for ox, oy in others)


@given(graphs(), st.randoms())
@settings(max_examples=50, deadline=None)
def test_the_same_graph_in_another_order_is_the_same_text(views, graph, chance: random.Random):
    nodes, pairs = graph
    view = views(nodes, pairs)
    versions, edges = list(view.versions), list(view.edges)
    chance.shuffle(versions)
    chance.shuffle(edges)

    again = dataclasses.replace(view, versions=tuple(versions), edges=tuple(edges))

    assert lineage_html(again) == lineage_html(view)


@given(graphs())
@settings(max_examples=50, deadline=None)
def test_every_version_and_every_edge_is_drawn_once(views, graph):
    nodes, pairs = graph

    root = ET.fromstring(lineage_svg(views(nodes, pairs)))

    assert sorted(drawn_refs(root)) == sorted(nodes)
    assert sorted(drawn_edges(root)) == sorted(f"{parent} to {child}: × 0.5" for parent, child in pairs)


def test_a_parent_that_counts_twice_has_one_line_with_both_weights(views):
    view = views(["a:v1", "b:v1"], [])
    edges = tuple(LineageEdgeView("b:v1", "a:v1", "merge", weight, i) for i, weight in enumerate((0.25, 0.75)))

    root = ET.fromstring(lineage_svg(dataclasses.replace(view, edges=edges)))

    assert drawn_edges(root) == ["a:v1 to b:v1: × 0.25 + × 0.75"]


def test_stages_removal_and_kinds_show(views):
    view = views(["a:v1", "b:v1", "c:v1"], [("a:v1", "b:v1")])
    a, b, c = view.versions
    versions = (
        dataclasses.replace(a, state="removed"),
        dataclasses.replace(
            b, stages=("staging", "production"), method="svd", loss=0.0321, kind="merge", metrics={"bleu": 0.31}
        ),
        dataclasses.replace(c, stages=("staging",)),
    )
    edges = (*view.edges, LineageEdgeView("c:v1", "a:v1", "trained_from", None, 0))

    text = lineage_svg(dataclasses.replace(view, versions=versions, edges=edges))
    root = ET.fromstring(text)

    assert {node.get("data-ref"): node.get("class") for node in root.iter(f"{SVG}g") if node.get("data-ref")} == {
        "a:v1": "node root removed", "b:v1": "node production", "c:v1": "node staging",
    }  # fmt: skip
    assert ">production +1<" in text
    assert "a:v1 to c:v1: trained from" in drawn_edges(root)
    assert 'aria-label="b:v1, staging, production, merged, svd, rank 4, loss 3.21%, bleu 0.31"' in text


def test_a_picture_for_a_narrow_page_is_no_wider_than_that_and_counts_what_it_leaves_out(views):
    children = [f"c:v{i}" for i in range(1, 31)]
    star = views(["a:v1", *children], [("a:v1", child) for child in children])

    root = ET.fromstring(lineage_svg(star, abreast=4))

    assert float(root.get("width")) <= 4 * 280 + 64
    assert len(drawn_refs(root)) == 1 + 4
    assert "+26 more" in "".join(root.itertext())
    whole = ET.fromstring(lineage_svg(views(["a:v1", *children[:4]], [("a:v1", c) for c in children[:4]]), abreast=4))
    assert len(drawn_refs(whole)) == 5


def test_versions_without_relatives_stand_in_a_block(views):
    alone = [f"a:v{i}" for i in range(1, 41)]

    layout = place(alone, [])

    assert len(set(layout.nodes.values())) == 40
    assert layout.width < 7 * 280
    drawn = ET.fromstring(lineage_svg(dataclasses.replace(views(alone, []), root="a"), abreast=4, most=18))
    assert len(drawn_refs(drawn)) == 18
    assert 'data-ref="a:v40"' in ET.tostring(drawn, encoding="unicode")


@pytest.mark.parametrize("most", [1, 10, 30])
def test_a_graph_too_large_shows_the_nearest_versions_and_counts_the_others(views, most: int):
    nodes = [f"n:v{i}" for i in range(100)]
    star = views(nodes, [("n:v0", ref) for ref in nodes[1:]])

    root = ET.fromstring(lineage_svg(star, most=most))
    labels = [text.text for text in root.iter(f"{SVG}text")]

    assert len(drawn_refs(root)) == most
    assert f"+{100 - most} more" in labels
    assert any(f"the {most} of 100 versions nearest to it" in str(label) for label in labels)


@pytest.mark.parametrize("parents", [1, 2])
def test_two_thousand_versions_are_drawn_in_seconds(views, parents: int):
    chance = random.Random(5)
    nodes = [f"n:v{i}" for i in range(2000)]
    pairs = {(chance.randrange(max(0, i - 60), i), i) for i in range(1, 2000) for _ in range(parents)}
    view = views(nodes, [(f"n:v{a}", f"n:v{b}") for a, b in sorted(pairs)])

    begun = time.monotonic()
    page = lineage_html(view)

    assert time.monotonic() - begun < 5  # 0.4 s on an idle machine
    assert "the 300 of 2000 versions" in page


def test_hostile_text_stays_text(hostile: LineageView, payloads: Sequence[str]):
    text = lineage_svg(hostile)
    root = ET.fromstring(text)

    assert len(payloads) >= 100
    assert text.isascii()
    assert {element.tag.removeprefix(SVG) for element in root.iter()} <= {
        "svg", "title", "desc", "style", "rect", "g", "path", "text", "clipPath",
    }  # fmt: skip
    for element in root.iter():
        names = {name.lower() for name in element.attrib}
        assert not [name for name in names if name.startswith("on") or "href" in name or name in ("style", "src")]
    assert len(drawn_refs(root)) == len(hostile.versions)


def test_hostile_text_cannot_end_the_data_of_the_page(hostile: LineageView):
    page = lineage_html(hostile)

    assert page.isascii()
    assert page.lower().count("<script") == page.lower().count("</script") == 2
    assert "<!--" not in page
    assert page.count("<style>") == 2


def drawn_refs(root: ET.Element) -> list[str]:
    return [str(group.get("data-ref")) for group in root.iter(f"{SVG}g") if group.get("data-ref")]


def drawn_edges(root: ET.Element) -> list[str]:
    groups = [group for group in root.iter(f"{SVG}g") if group.get("class") == "edge-group"]
    assert all(len(group.findall(f"{SVG}path")) == 1 for group in groups)
    return [str(group.findtext(f"{SVG}title")) for group in groups]

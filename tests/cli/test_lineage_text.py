"""The three drawings of a lineage, and what hostile or huge ones do to them."""

from __future__ import annotations

import dataclasses
import re

from adapterctl.cli.lineage_text import between, dot, mermaid, tree
from adapterctl.cli.output import Output
from adapterctl.registry.api import LineageEdgeView, LineageView, VersionView

EVIL = 'a"]; b --> c["<script>\n\x1b[31m\\'


def version(ref: str, **changes: object) -> VersionView:
    name, _, number = ref.partition(":v")
    plain = VersionView(
        ref=ref, name=name, number=int(number), id=ref, kind="train", state="live", base="base", base_id="b", rank=4,
        dtype="BF16", modules=1, parameters=1, size_bytes=1, content_digest="0", created_at="", created_by="",
    )  # fmt: skip
    return dataclasses.replace(plain, **changes)


def merge(child: str, parent: str, position: int, weight: float = 1.0) -> LineageEdgeView:
    return LineageEdgeView(child, parent, "merge", weight, position)


def trained(child: str, parent: str) -> LineageEdgeView:
    return LineageEdgeView(child, parent, "trained_from", None, 0)


FAMILY = LineageView(
    root="both:v1",
    direction="both",
    versions=(
        version("both:v1", kind="merge", method="svd", loss=0.0321, stages=("production",), metrics={"bleu": 0.31}),
        version("translate:v1"),
        version("translate:v2"),
        version("chat:v1"),
        version("more:v1", kind="merge", method="cat", rank=8, loss=0.0),
    ),
    edges=(
        merge("both:v1", "translate:v2", 0, 0.6),
        merge("both:v1", "chat:v1", 1),
        trained("translate:v2", "translate:v1"),
        merge("more:v1", "both:v1", 0),
    ),
)


def test_tree_shows_ancestors_then_descendants():
    assert tree(FAMILY, Output()).splitlines() == [
        "made from",
        "both:v1  production  svd, rank 4, loss 3.21%  bleu 0.31",
        "├── translate:v2  × 0.6",
        "│   └── translate:v1  trained from",
        "└── chat:v1  × 1",
        "",
        "went into",
        "both:v1  production  svd, rank 4, loss 3.21%  bleu 0.31",
        "└── more:v1  × 1  cat, rank 8, loss 0",
    ]


def test_tree_has_one_part_when_there_is_one_side():
    childless = dataclasses.replace(FAMILY, edges=FAMILY.edges[:3])
    first = dataclasses.replace(FAMILY, root="translate:v1", edges=FAMILY.edges[2:3])

    assert tree(childless, Output()).startswith("both:v1")
    assert tree(first, Output()).splitlines() == ["translate:v1", "└── translate:v2  trained from"]


def test_what_two_versions_have_in_common_is_drawn_from_every_oldest_one():
    view = dataclasses.replace(FAMILY, found=("translate:v2", "chat:v1", "translate:v1"))

    title, *trees = between(view, "both are made of", Output()).split("\n\n")

    assert title == "both are made of: translate:v2, chat:v1, translate:v1"
    assert [drawn.splitlines()[0] for drawn in trees] == ["chat:v1", "translate:v1"]
    assert all("both:v1" in drawn for drawn in trees)


def test_tree_shows_the_first_metric_of_each_suite_and_the_own_suite_first():
    evaluated = {"loss": 1.0, "chat/nll": 2.0, "chat/chrf": 3.0, "translate/nll": 4.0, "translate/chrf": 5.0}
    view = LineageView("translate:v1", "up", (version("translate:v1", metrics=evaluated),), ())

    assert tree(view, Output()) == "translate:v1  translate/nll 4, loss 1"


def test_tree_does_not_unfold_a_shared_ancestor_twice():
    family = dataclasses.replace(
        FAMILY,
        direction="up",
        edges=(
            merge("both:v1", "translate:v2", 0),
            merge("both:v1", "chat:v1", 1),
            merge("chat:v1", "translate:v2", 0),
            trained("translate:v2", "translate:v1"),
        ),
    )

    lines = tree(family, Output()).splitlines()

    assert sum("translate:v1" in line for line in lines) == 1
    assert lines[-1] == "    └── translate:v2  × 1  (see above)"


def test_a_parent_that_counts_twice_is_shown_twice_above_and_once_below():
    twice = (merge("both:v1", "chat:v1", 0, 0.3), merge("both:v1", "chat:v1", 1, 0.7))
    up = dataclasses.replace(FAMILY, direction="up", edges=twice)
    down = dataclasses.replace(FAMILY, root="chat:v1", direction="down", edges=twice)

    assert [line.split("  ")[-1] for line in tree(up, Output()).splitlines()[1:]] == ["× 0.3", "× 0.7"]
    assert len(tree(down, Output()).splitlines()) == 2


def test_a_line_of_five_thousand_versions_is_drawn():
    versions = tuple(version(f"a:v{n}") for n in range(1, 5001))
    edges = tuple(trained(f"a:v{n + 1}", f"a:v{n}") for n in range(1, 5000))

    lines = tree(LineageView("a:v5000", "up", versions, edges), Output()).splitlines()

    assert len(lines) == 5000
    assert lines[-1].endswith("a:v1  trained from")


def test_mermaid_draws_from_parents_to_children():
    assert mermaid(FAMILY).splitlines() == [
        "flowchart TB",
        '  v0["both:v1<br/>production<br/>svd, rank 4, loss 3.21%"]',
        '  v1["translate:v1"]',
        '  v2["translate:v2"]',
        '  v3["chat:v1"]',
        '  v4["more:v1<br/>cat, rank 8, loss 0"]',
        '  v2 -->|"× 0.6"| v0',
        '  v3 -->|"× 1"| v0',
        '  v1 -.->|"trained from"| v2',
        '  v0 -->|"× 1"| v4',
        "  style v0 stroke-width:3px",
    ]


def test_dot_draws_from_parents_to_children():
    lines = dot(FAMILY).splitlines()

    assert lines[0] == "digraph lineage {"
    assert '  "both:v1" [label="both:v1\\nproduction\\nsvd, rank 4, loss 3.21%", penwidth=2];' in lines
    assert '  "translate:v1" -> "translate:v2" [label="trained from", style=dashed];' in lines
    assert lines[-1] == "}"


def test_hostile_text_stays_text_in_every_drawing():
    evil = dataclasses.replace(version("x:v1"), ref=EVIL, stages=(EVIL,), method=EVIL, metrics={EVIL: 1.0})
    view = LineageView(EVIL, "both", (evil, version("y:v1")), (LineageEdgeView("y:v1", EVIL, EVIL, None, 0),))

    in_tree, in_mermaid, in_dot = tree(view, Output()), mermaid(view), dot(view)

    for drawing in (in_tree, in_mermaid, in_dot):
        assert "\x1b" not in drawing
    assert len(in_tree.splitlines()) == 2
    assert len(in_mermaid.splitlines()) == 5
    assert len(in_dot.splitlines()) == 7
    assert "<script>" not in in_mermaid
    assert re.findall(r'\["(.*?)"\]', in_mermaid)[1] == "y:v1"
    for line in in_dot.splitlines()[3:-1]:
        assert re.fullmatch(r'  "(\\.|[^"\\])*"( -> "(\\.|[^"\\])*")? \[label="(\\.|[^"\\])*"[\w ,=]*\];', line), line


def test_each_of_two_hundred_hostile_texts_is_a_label_in_mermaid_and_dot(hostile: LineageView):
    """By a grammar that is narrower than theirs; Mermaid 11 and Graphviz drew every one of them, and nothing else."""
    label = r"(?:[^\W_]|[ .,:\-_×%@+]|#\d+;|<br/>)+"
    in_mermaid = re.compile(rf'  v\d+\["{label}"\]|  v\d+ -\.->\|"{label}"\| v\d+|  style v\d+ [a-z0-9:,#-]+')
    text = r'"(?:[^"\\&]|\\["\\n]|&amp;)*"'
    attributes = r", (?:penwidth=2|color=\"#c62828\", fontcolor=\"#c62828\"|style=dashed)"
    in_dot = re.compile(rf"  {text}(?: -> {text})? \[label={text}(?:{attributes})*\];")

    assert len(hostile.versions) == 200
    assert [line for line in mermaid(hostile).splitlines()[1:] if not in_mermaid.fullmatch(line)] == []
    assert [line for line in dot(hostile).splitlines()[3:-1] if not in_dot.fullmatch(line)] == []
    assert (dot(hostile) + mermaid(hostile)).encode()  # no half of a pair of UTF-16 is left

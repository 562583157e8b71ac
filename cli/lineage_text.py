"""A lineage as a tree for the terminal, as Mermaid for Markdown, and as DOT for Graphviz. Pure functions over the view.

Names and labels may hold anything an older registry let in: each format escapes them in its own way. The graph is
walked without recursion, for a line of training can be thousands of versions long.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..registry.api import LineageEdgeView, LineageView, MetricPoint, VersionView
from ..registry.services.words import edge_label, headline, made, number
from .output import Output, printable
from .views import metrics

#: What is recalled, in every drawing.
RED = "#c62828"

_Edges = Mapping[str, Sequence[LineageEdgeView]]


def tree(view: LineageView, out: Output) -> str:
    """The root with its parents below, then with its children below; what was shown already is not unfolded again."""
    versions = {version.ref: version for version in view.versions}
    up, down = _by_child(view.edges), _by_parent(view.edges)
    above = _branch(view.root, up, versions, out, upward=True)
    below = _branch(view.root, down, versions, out, upward=False)
    if view.direction == "up" or (view.direction == "both" and len(below) == 1):
        return "\n".join(above)
    if view.direction == "down" or len(above) == 1:
        return "\n".join(below)
    return "\n".join([out.paint("made from", "dim"), *above, "", out.paint("went into", "dim"), *below])


def between(view: LineageView, title: str, out: Output) -> str:
    """What was found between two versions, then the way there as a tree from each oldest one."""
    if not view.found:
        return f"{title}: nothing"
    children = {edge.child for edge in view.edges}
    tops = [ref for ref in view.found if ref not in children] or [view.found[-1]]
    named = out.paint(printable(", ".join(view.found)), "bold")
    trees = [tree(replace(view, root=top, direction="down"), out) for top in tops]
    return "\n\n".join([f"{title}: {named}", *trees])


def metric_table(points: Sequence[MetricPoint], out: Output) -> str:
    """A version a line, and what each of its parents has of the metric."""
    rows = [
        [
            point.ref,
            "-" if point.value is None else number(point.value),
            ", ".join(f"{ref} {number(value)}" for ref, value in point.parents.items()) or "-",
        ]
        for point in points
    ]
    return out.table(["VERSION", points[0].metric.upper(), "PARENTS"], rows, right={1})


def mermaid(view: LineageView) -> str:
    """A `flowchart` from ancestors to descendants; GitHub renders it in a ```mermaid block."""
    ids = {version.ref: f"v{i}" for i, version in enumerate(view.versions)}
    lines = ["flowchart TB"]
    for version in view.versions:
        label = "<br/>".join(map(_mermaid_text, _label(version)))
        lines.append(f'  {ids[version.ref]}["{label}"]')
    for edge in view.edges:
        if edge.parent in ids and edge.child in ids:
            arrow = "-->" if edge.kind == "merge" else "-.->"
            lines.append(f'  {ids[edge.parent]} {arrow}|"{_mermaid_text(edge_label(edge))}"| {ids[edge.child]}')
    for version in view.versions:
        style = [
            *(["stroke-width:3px"] if version.ref == view.root else []),
            *([f"stroke:{RED},color:{RED}"] if version.recall else []),
        ]
        if style:
            lines.append(f"  style {ids[version.ref]} {','.join(style)}")
    return "\n".join(lines)


def dot(view: LineageView) -> str:
    """A digraph from ancestors to descendants, for `dot -Tsvg`."""
    lines = ["digraph lineage {", '  node [shape=box, fontname="sans-serif"];', '  edge [fontname="sans-serif"];']
    for version in view.versions:
        bold = ", penwidth=2" if version.ref == view.root else ""
        red = f', color="{RED}", fontcolor="{RED}"' if version.recall else ""
        label = "\\n".join(map(_dot_text, _label(version)))
        lines.append(f'  "{_dot_text(version.ref)}" [label="{label}"{bold}{red}];')
    for edge in view.edges:
        style = "" if edge.kind == "merge" else ", style=dashed"
        label = _dot_text(edge_label(edge))
        lines.append(f'  "{_dot_text(edge.parent)}" -> "{_dot_text(edge.child)}" [label="{label}"{style}];')
    return "\n".join([*lines, "}"])


def _branch(root: str, edges: _Edges, versions: Mapping[str, VersionView], out: Output, *, upward: bool) -> list[str]:
    lines = []
    shown: set[str] = set()
    stack: list[tuple[str, LineageEdgeView | None, str, str]] = [(root, None, "", "")]
    while stack:
        ref, edge, stem, indent = stack.pop()
        again = ref in shown and bool(edges.get(ref))
        lines.append(
            stem + _line(ref, edge, versions.get(ref), out) + (out.paint("  (see above)", "dim") if again else "")
        )
        if ref in shown:
            continue
        shown.add(ref)
        below = edges.get(ref, ())
        for position in range(len(below) - 1, -1, -1):
            last = position == len(below) - 1
            next_ref = below[position].parent if upward else below[position].child
            stack.append(
                (
                    next_ref,
                    below[position],
                    indent + ("└── " if last else "├── "),
                    indent + ("    " if last else "│   "),
                )
            )
    return lines


def _line(ref: str, edge: LineageEdgeView | None, version: VersionView | None, out: Output) -> str:
    """`translate:v3  × 0.6  production  svd, rank 4, loss 3.2%  bleu 0.31`"""
    parts = [out.paint(printable(ref), "bold")]
    if edge is not None:
        parts.append(printable(edge_label(edge)))
    if version is not None:
        parts.append(out.paint(printable(", ".join(version.stages)), "green"))
        parts.append("removed" if version.state == "removed" else "")
        parts.append(out.paint("recalled" if version.recall else "", "red"))
        parts.append(out.paint(printable(made(version)), "dim"))
        parts.append(out.paint(printable(metrics(headline(version))), "cyan"))
    return "  ".join(part for part in parts if part)


def _label(version: VersionView) -> list[str]:
    recalled = "recalled" if version.recall else ""
    return [part for part in (version.ref, recalled, ", ".join(version.stages), made(version)) if part]


def _by_child(edges: Sequence[LineageEdgeView]) -> _Edges:
    found: dict[str, list[LineageEdgeView]] = defaultdict(list)
    for edge in sorted(edges, key=lambda edge: (edge.child, edge.position)):
        found[edge.child].append(edge)
    return found


def _by_parent(edges: Sequence[LineageEdgeView]) -> _Edges:
    found: dict[str, list[LineageEdgeView]] = defaultdict(list)
    for edge in edges:
        if all(known.child != edge.child for known in found[edge.parent]):
            found[edge.parent].append(edge)
    return found


def _mermaid_text(text: str) -> str:
    """Entity codes for all that Mermaid or the HTML around it could read as more than text."""
    escaped = "".join(c if c.isalnum() or c in " .,:-_×%@+" else f"#{ord(c)};" for c in printable(text))
    return escaped or " "  # an empty label is an error of syntax


def _dot_text(text: str) -> str:
    """For a quoted string; Graphviz reads entities in it, and writes those that it does not know into its SVG."""
    return printable(text).replace("&", "&amp;").replace("\\", "\\\\").replace('"', '\\"')

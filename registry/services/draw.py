"""A lineage as one picture: SVG for documents and pages, HTML with a small script of ours for looking around in it.

Pure: a view in, text out, the same text for the same graph. Each result is one file in ASCII that loads nothing from
elsewhere; a page that is served (`Site`) links to others and reads receipts, of its own server only. Whatever a
registry holds (labels, metric names, tags) comes out as text, never as markup, style or script.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from urllib.parse import quote

from ..api import LineageEdgeView, LineageView, VersionView
from .words import edge_label, headline, loss, made, number, printable

#: Beyond this many versions the ones nearest to the root are drawn. 500 in a dense graph take 0.3 s, 2,000 take 8 s.
MOST = 300

NODE_WIDTH, NODE_HEIGHT = 248, 64
_COLUMN, _ROW = 280, 122  # from centre to centre
_MARGIN, _HEADER, _FOOTER = 32, 56, 36
#: Steps of the colours that a metric is shown in; the style has one class for each.
_HEATS = 7
_DEPTHS = (1, 2, 3, 5, 10)
_METRICS_OFFERED = 60
_KEYS = "Tab and arrows walk, Enter centres, + and &minus; zoom, 0 fits, / searches, Esc closes"
_KEYS_SERVED = _KEYS.replace("centres,", "centres, o opens,")
_STAGES = ("production", "staging")  # those with a colour, in the order of what matters most
#: Sits on the upper edge of a box, away from where lines arrive: the badge of a stage stands below it and stays.
_RECALLED = (
    f'<g class="recall" transform="translate({NODE_WIDTH - 82} -9)"><rect width="72" height="17" rx="8.5"/>'
    '<text x="36" y="12.5" text-anchor="middle">recalled</text></g>'
)
_STYLE = Path(__file__).with_name("draw.css")
_SCRIPT = Path(__file__).with_name("draw.js")

_Point = tuple[float, float]
_Pair = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Layout:
    """Centres of nodes, and for each (parent, child) the points its line goes through; the origin is top left."""

    width: float
    height: float
    nodes: Mapping[str, _Point]
    lines: Mapping[_Pair, tuple[_Point, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """Where a page is served: the ways from it to the root of our server and to MLflow's pages, with their last slash.

    `depth` is how many generations were asked for; the page's controls show it.
    """

    root: str
    mlflow: str
    depth: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Shades:
    """What is shown beside the graph itself: a metric that colours the versions, and the versions that are behind.

    `behind` maps a version to the newer version of a parent.
    """

    metric: str | None = None
    behind: Mapping[str, str] = field(default_factory=dict)


PLAIN = Shades()


@dataclass(frozen=True, slots=True)
class _Graph:
    """What is drawn. `more` maps the id of a "+N more" node to its label."""

    versions: Mapping[str, VersionView]
    pairs: Mapping[_Pair, tuple[LineageEdgeView, ...]]
    more: Mapping[str, str]
    more_pairs: tuple[_Pair, ...]
    total: int


def lineage_svg(view: LineageView, *, most: int = MOST, shades: Shades = PLAIN, abreast: int | None = None) -> str:
    """The graph as one SVG document, parents above children, in light and dark. `most` bounds the versions drawn.

    `abreast` is for a page that cuts off what is wider than it: so many versions of a generation are drawn, the
    picture shrinks where they still need more room, and the others are counted.
    """
    return _svg(_graph(view, most, abreast), view, shades, None, abreast=abreast)


def lineage_html(view: LineageView, *, most: int = MOST, shades: Shades = PLAIN, site: Site | None = None) -> str:
    """The same picture as a page: pan, zoom, search, keyboard, and a card with what is known of each version.

    With `site` it leads to the pages of other versions and to MLflow's, and lets people choose what is shown.
    """
    graph = _graph(view, most)
    cards = _json({"root": site.root if site else None, "versions": _cards(graph, shades, site)})
    return _ascii(
        f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy(served=site is not None)}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Lineage of {_text(view.root)}</title>
<style>{_asset(_STYLE)}</style>
</head>
<body>
<header>
<div><h1>Lineage of {_text(view.root)}</h1><p>{_text(_summary(graph, view))}</p></div>
{_controls(graph, view, shades, site) if site else ""}
<label>Search <input id="search" type="search" autocomplete="off" placeholder="name, stage, tag"></label>
<output id="found" for="search" aria-live="polite"></output>
<span class="buttons">
<button id="out" type="button" aria-label="Zoom out">&minus;</button>
<button id="in" type="button" aria-label="Zoom in">+</button>
<button id="fit" type="button">Fit</button>
</span>
</header>
<main>
{_svg(graph, view, shades, site, titled=False)}
<aside aria-label="Versions"{"" if site else ' class="empty"'}>
<section id="card" aria-label="Selected version" hidden></section>
{_list(graph, site) if site else ""}
</aside>
</main>
<footer>{_KEYS if site is None else _KEYS_SERVED}</footer>
<script type="application/json" id="data">{cards}</script>
<script>{_asset(_SCRIPT)}</script>
</body>
</html>"""
    )


def policy(*, served: bool) -> str:
    """The Content-Security-Policy of a page: its own style and script, and nothing from anywhere.

    One that is served may ask its own server, for a receipt or for itself in another shape.
    """
    own = "connect-src 'self'; form-action 'self'" if served else "form-action 'none'"
    style, script = _hash(_asset(_STYLE)), _hash(_asset(_SCRIPT))
    return f"default-src 'none'; style-src {style}; script-src {script}; base-uri 'none'; {own}"


def picture_policy() -> str:
    """The Content-Security-Policy of an SVG that is opened by itself."""
    return f"default-src 'none'; style-src {_hash(_asset(_STYLE))}; base-uri 'none'; form-action 'none'"


def _svg(
    graph: _Graph,
    view: LineageView,
    shades: Shades,
    site: Site | None,
    *,
    titled: bool = True,
    abreast: int | None = None,
) -> str:
    layout = place([*graph.versions, *graph.more], [*graph.pairs, *graph.more_pairs])
    heats = _heats(graph.versions.values(), shades.metric)
    legend = _legend(graph, shades)
    header, footer = _HEADER if titled else 0, _FOOTER + (24 if heats else 0)
    width = max(layout.width, 560, legend.width) + 2 * _MARGIN
    height = layout.height + header + footer + 2 * _MARGIN
    shrunk = 1.0 if abreast is None else min(1.0, (abreast * _COLUMN + 2 * _MARGIN) / width)
    left = (width - layout.width) / 2
    children, parents = Counter(parent for parent, _ in graph.pairs), Counter(child for _, child in graph.pairs)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_n(width)} {_n(height)}" width="{_n(width * shrunk)}"'
        f' height="{_n(height * shrunk)}" class="lineage" role="group" aria-labelledby="lineage-title lineage-desc">',
        f'<title id="lineage-title">Lineage of {_text(view.root)}</title>',
        f'<desc id="lineage-desc">{_text(_summary(graph, view))}</desc>',
        f"<style>{_asset(_STYLE)}</style>",
        # letters wider than usual end at the box
        f'<clipPath id="lineage-inside"><rect width="{NODE_WIDTH - 4}" height="{NODE_HEIGHT}"/></clipPath>',
        '<rect class="paper" width="100%" height="100%"/>',
        *(_header(graph, view) if titled else ()),
        f'<g transform="translate({_n(left)} {_MARGIN + header})">',
        *(
            # a label stands at the end that has fewer other lines
            _edge(
                edges, graph.versions[child], layout.lines[parent, child], near_child=children[parent] > parents[child]
            )
            for (parent, child), edges in graph.pairs.items()
        ),
        *(f'<path class="edge more" d="{_path(layout.lines[pair])}"/>' for pair in graph.more_pairs),
        *(
            _node(version, layout.nodes[ref], ref == view.root, shades, heats.get(ref))
            for ref, version in graph.versions.items()
        ),
        *(
            _more(label, layout.nodes[key], graph.versions[key.rpartition(" ")[0]], key.endswith(" parents"), site)
            for key, label in graph.more.items()
        ),
        "</g>",
        *legend.drawn(width / 2, height - _MARGIN - (24 if heats else 0)),
        *(_scale(graph, str(shades.metric), width / 2, height - _MARGIN) if heats else ()),
        "</svg>",
    ]
    return _ascii("\n".join(parts))


def place(nodes: Sequence[str], pairs: Sequence[_Pair]) -> Layout:
    """Layers from ancestors down to descendants; nodes do not overlap and long lines go around them.

    Source: Sugiyama, Tagawa & Toda 1981, https://doi.org/10.1109/TSMC.1981.4308636, by fast-sugiyama.
    """
    points, lines = _layered(pairs)
    alone = [node for node in nodes if node not in points]  # without any edge: a block beside the others
    left = max((x for x, _ in points.values()), default=-1.0) + 1
    columns = max(4, math.isqrt(len(alone)))
    for place_of, node in enumerate(alone):
        points[node] = (left + place_of % columns, float(place_of // columns))
    xs = [x for line in [points.values(), *lines.values()] for x, _ in line]
    left, right = min(xs), max(xs)
    rows = {y: row for row, y in enumerate(sorted({y for _, y in points.values()}))}

    def scaled(point: _Point) -> _Point:
        return (point[0] - left) * _COLUMN + NODE_WIDTH / 2, rows[point[1]] * _ROW + NODE_HEIGHT / 2

    return Layout(
        width=(right - left) * _COLUMN + NODE_WIDTH,
        height=(len(rows) - 1) * _ROW + NODE_HEIGHT,
        nodes={node: scaled(points[node]) for node in nodes},
        lines={pair: tuple(map(scaled, lines[pair])) for pair in pairs},
    )


def _layered(pairs: Sequence[_Pair]) -> tuple[dict[str, _Point], dict[_Pair, list[_Point]]]:
    """Points in columns and rows, row 0 on top; parts that have no edge between them stand side by side."""
    points: dict[str, _Point] = {}
    lines: dict[_Pair, list[_Point]] = {}
    offset = 0.0
    for part in _connected(pairs):
        found = _part(part)
        left, right = (end(x for line in found.values() for x, _ in line) for end in (min, max))
        for (parent, child), line in found.items():
            moved = [(x - left + offset, y) for x, y in line]
            points[parent], points[child], lines[parent, child] = moved[0], moved[-1], moved
        offset += right - left + 1
    return points, lines


def _part(pairs: Sequence[_Pair]) -> dict[_Pair, list[_Point]]:
    """The points of every line of a connected graph, from the parent's centre to the child's."""
    from fast_sugiyama import from_edges  # deferred: a compiled module, and only drawings need it

    names = list(dict.fromkeys(name for pair in pairs for name in pair))
    ids = {name: i for i, name in enumerate(names)}
    edges = [(ids[parent], ids[child]) for parent, child in pairs]
    ((placed, _, _, segments),) = from_edges(edges, vertex_spacing=1, dummy_vertices=True, dummy_size=0.5)
    top = max(y for _, (_, y) in placed)
    points = {int(node): (round(x, 4), float(round(top - y))) for node, (x, y) in placed}
    # where a line passes a layer it has a bend: a node with a number beyond ours, one way in and one way out
    following: dict[int, list[int]] = defaultdict(list)
    for start, end in segments or ():
        following[int(start)].append(int(end))
    lines = {}
    for node in range(len(names)):
        for step in following[node]:
            route = [node, step]
            while route[-1] >= len(names):
                route += following[route[-1]]
            lines[names[node], names[route[-1]]] = [points[i] for i in route]
    return lines


def _connected(pairs: Sequence[_Pair]) -> list[list[_Pair]]:
    """fast-sugiyama 0.5 gives a bend the number of a node when it gets several parts at once, so each goes alone."""
    parts: dict[str, list[_Pair]] = {}
    for pair in pairs:
        first, second = parts.setdefault(pair[0], []), parts.setdefault(pair[1], [])
        first.append(pair)
        if first is not second:
            first += second
            parts |= dict.fromkeys((name for joined in second for name in joined), first)
            parts[pair[1]] = first
    return list({id(part): part for part in parts.values()}.values())


def _graph(view: LineageView, most: int, abreast: int | None = None) -> _Graph:
    """The versions to draw in a stated order, nearest to the root first where there are too many of them."""
    known = {version.ref: version for version in view.versions}
    edges = [edge for edge in view.edges if edge.parent in known and edge.child in known]
    edges.sort(key=lambda edge: (_order(known[edge.child]), edge.position, _order(known[edge.parent])))
    kept = set(known)
    if len(known) > most or abreast is not None:
        kept = _nearest(view.root, known, edges, most, abreast)
    pairs: dict[_Pair, tuple[LineageEdgeView, ...]] = {}
    behind: dict[_Pair, set[str]] = defaultdict(set)
    for edge in edges:
        if edge.parent in kept and edge.child in kept:
            pair = (edge.parent, edge.child)
            pairs[pair] = (*pairs.get(pair, ()), edge)
        elif edge.parent in kept:
            behind[edge.parent, "children"].add(edge.child)
        elif edge.child in kept:
            behind[edge.child, "parents"].add(edge.parent)
    more, more_pairs = {}, []
    for (ref, side), hidden in behind.items():
        key = f"{ref} {side}"  # no ref holds a blank
        more[key] = f"+{len(hidden)} more"
        more_pairs.append((ref, key) if side == "children" else (key, ref))
    return _Graph(
        versions={ref: known[ref] for ref in sorted(kept, key=lambda ref: _order(known[ref]))},
        pairs=pairs,
        more=more,
        more_pairs=tuple(more_pairs),
        total=len(known),
    )


def _nearest(
    root: str,
    known: Mapping[str, VersionView],
    edges: Sequence[LineageEdgeView],
    most: int,
    abreast: int | None,
) -> set[str]:
    """Breadth first over parents and children alike, from the root, or from the newest versions of a whole adapter."""
    beside: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for edge in edges:
        beside[edge.parent].append((edge.child, 1))
        beside[edge.child].append((edge.parent, -1))
    own = [root] if root in known else sorted((ref for ref in known if known[ref].name == root), key=_newest(known))
    generation = dict.fromkeys((own or list(known))[:most], 0)
    counts: Counter[int] = Counter()
    waiting = deque(generation)
    while waiting and len(generation) < most:
        near = waiting.popleft()
        for ref, step in beside[near]:
            there = generation[near] + step
            if ref in generation or len(generation) == most or (abreast is not None and counts[there] >= abreast):
                continue
            generation[ref] = there
            counts[there] += 1
            waiting.append(ref)
    return set(generation)


def _newest(known: Mapping[str, VersionView]) -> Callable[[str], int]:
    return lambda ref: -known[ref].number


def _order(version: VersionView) -> tuple[str, int, str]:
    return version.name, version.number, version.ref


def _summary(graph: _Graph, view: LineageView) -> str:
    what = {"up": "ancestors", "down": "descendants", "both": "ancestors and descendants"}[view.direction]
    if all(view.root != version.ref for version in view.versions):  # an adapter, not one of its versions
        what = "every version, what they were made of and what was made of them"
    shown, total = len(graph.versions), graph.total
    if shown < total:
        return f"the {shown} of {total} versions nearest to it; depth and direction choose others"
    return f"{total} version{'' if total == 1 else 's'}: {what}, parents above children"


def _header(graph: _Graph, view: LineageView) -> list[str]:
    return [
        f'<text class="heading" x="{_MARGIN}" y="{_MARGIN + 14}">Lineage of {_text(_fit(view.root, 60))}</text>',
        f'<text class="small" x="{_MARGIN}" y="{_MARGIN + 34}">{_text(_summary(graph, view))}</text>',
    ]


def _node(version: VersionView, centre: _Point, root: bool, shades: Shades, heat: int | None) -> str:
    """A box of three lines: what it is called and serves, how it was made, and what it scored."""
    stages = sorted(version.stages, key=lambda stage: _STAGES.index(stage) if stage in _STAGES else len(_STAGES))
    removed = version.state == "removed"
    marks = (
        "root" if root else "",
        *(stage for stage in stages[:1] if stage in _STAGES),
        "removed" if removed else "",
        f"heat{heat}" if heat is not None else "",
        "recalled" if version.recall else "",
    )
    classes = ["node", *filter(None, marks)]
    x, y = centre[0] - NODE_WIDTH / 2, centre[1] - NODE_HEIGHT / 2
    badge = "removed" if removed else "".join(stages[:1]) + (f" +{len(stages) - 1}" if stages[1:] else "")
    newer = shades.behind.get(version.ref)
    lines = [
        f'<g class="{" ".join(classes)}" transform="translate({_n(x)} {_n(y)})" tabindex="0" role="img"'
        f' data-ref="{_text(version.ref)}" aria-label="{_text(_spoken(version, newer))}">',
        f"<title>{_text(_spoken(version, newer))}</title>",
        f'<rect class="box" width="{NODE_WIDTH}" height="{NODE_HEIGHT}" rx="7"/>',
        f'<path class="strip" d="M7 0.5H5.5A5 5 0 0 0 0.5 7V{NODE_HEIGHT - 7}A5 5 0 0 0 5.5 {NODE_HEIGHT - 0.5}H7Z"/>',
        '<g clip-path="url(#lineage-inside)">',
        f'<text class="ref" x="18" y="21">{_text(_fit(version.ref, 28 - len(badge[:13])))}</text>',
        f'<text class="badge" x="{NODE_WIDTH - 10}" y="20" text-anchor="end">{_text(_fit(badge, 13))}</text>'
        if badge
        else "",
        f'<text class="small" x="18" y="38">{_text(_fit(made(version) or _origin(version), 35))}</text>',
        f'<text class="small" x="18" y="54">{_text(third)}</text>'
        if (third := _scores(version, shades.metric))
        else "",
        f'<circle class="behind" cx="{NODE_WIDTH - 14}" cy="50" r="4"/>' if newer else "",
        "</g>",
        _RECALLED if version.recall else "",
        "</g>",
    ]
    return "".join(lines)


def _scores(version: VersionView, metric: str | None) -> str:
    """The chosen metric, or the headline figures, as far as they fit."""
    if metric is not None:
        value = version.metrics.get(metric)
        return _fit(f"{metric} {number(value)}" if value is not None else "", 35)
    scores = [f"{key} {number(value)}" for key, value in headline(version).items()]
    return _fit(", ".join(scores) if len(", ".join(scores)) <= 35 else scores[0], 35)


def _more(label: str, centre: _Point, beside: VersionView, above: bool, site: Site | None) -> str:
    """A pill where the line ends: at the lower edge of its place for parents, at the upper one for children.

    On a served page it leads to the version that it hangs on, where what is hidden here is near.
    """
    width, height = 104, 30
    x = centre[0] - width / 2
    y = centre[1] + NODE_HEIGHT / 2 - height if above else centre[1] - NODE_HEIGHT / 2
    pill = (
        f'<g class="node fold" transform="translate({_n(x)} {_n(y)})">'
        f'<rect class="box" width="{width}" height="{height}" rx="15"/>'
        f'<text class="small" x="{width // 2}" y="19" text-anchor="middle">{label}</text></g>'
    )
    if site is None:
        return pill
    spoken = f"{label} {'parents' if above else 'children'} of {beside.ref}"
    return f'<a href="{_text(_page(beside, site))}" aria-label="{_text(spoken)}">{pill}</a>'


def _edge(edges: Sequence[LineageEdgeView], child: VersionView, line: Sequence[_Point], *, near_child: bool) -> str:
    """One line a pair, with every weight that the parent has in the child, and the method that merged it."""
    label = " + ".join(map(edge_label, edges))
    merged = any(edge.weight is not None for edge in edges)
    if merged and child.method:
        label = f"{label} {child.method}"
    x, y = _label_point(line, near_child=near_child)
    shown = _fit(label, 22)
    width = 6.2 * len(shown) + 8
    spoken = f"{edges[0].parent} to {edges[0].child}: {label}"
    return (
        f'<g class="edge-group" data-parent="{_text(edges[0].parent)}" data-child="{_text(edges[0].child)}">'
        f"<title>{_text(spoken)}</title>"
        f'<path class="edge{"" if merged else " trained"}" d="{_path(line)}"/>'
        f'<rect class="paper" x="{_n(x - width / 2)}" y="{_n(y - 11)}" width="{_n(width)}" height="15" rx="3"/>'
        f'<text class="small" x="{_n(x)}" y="{_n(y)}" text-anchor="middle">{_text(shown)}</text></g>'
    )


def _path(line: Sequence[_Point]) -> str:
    """Vertical where it leaves and arrives, smooth through every bend."""
    start, end = _ends(line)
    points = [start, *line[1:-1], end]
    steps = [f"M{_n(start[0])} {_n(start[1])}"]
    for (x1, y1), (x2, y2) in pairwise(points):
        middle = (y1 + y2) / 2
        steps.append(f"C{_n(x1)} {_n(middle)} {_n(x2)} {_n(middle)} {_n(x2)} {_n(y2)}")
    return "".join(steps)


def _label_point(line: Sequence[_Point], *, near_child: bool) -> _Point:
    """A third of the way from one end of the line, on the line."""
    start, end = _ends(line)
    points = [start, *line[1:-1], end]
    (x1, y1), (x2, y2) = points[-2:] if near_child else points[:2]
    part = 0.7 if near_child else 0.3
    ease = 3 * part**2 * (1 - part) + part**3  # x of the curve of _path at `part`; `along` is its y
    along = 1.5 * part * (1 - part) + part**3
    return x1 + (x2 - x1) * ease, y1 + (y2 - y1) * along + 4


def _ends(line: Sequence[_Point]) -> tuple[_Point, _Point]:
    (x1, y1), (x2, y2) = line[0], line[-1]
    return (x1, y1 + NODE_HEIGHT / 2), (x2, y2 - NODE_HEIGHT / 2)


@dataclass(frozen=True, slots=True)
class _Legend:
    """The signs that occur in a picture, each with its word and where it stands in the row."""

    entries: tuple[tuple[float, str, str], ...]
    width: float

    def drawn(self, centre: float, y: float) -> list[str]:
        left = centre - self.width / 2
        return [
            f'<g class="legend" transform="translate({_n(left)} {_n(y)})" aria-hidden="true">',
            *(
                f'<g transform="translate({_n(x)} 0)">{sign}<text class="small" x="{36 if "path" in sign else 18}"'
                f' y="0">{word}</text></g>'
                for x, sign, word in self.entries
            ),
            "</g>",
        ]


def _legend(graph: _Graph, shades: Shades) -> _Legend:
    shown = graph.versions.values()
    edges = [edge for edges in graph.pairs.values() for edge in edges]
    line, box = '<path class="{}" d="M0 -4H28"/>', '<rect class="key {}" y="-10" width="12" height="12" rx="3"/>'
    signs = [
        (any(edge.weight is not None for edge in edges), line.format("edge"), "merge, × weight"),
        (any(edge.weight is None for edge in edges), line.format("edge trained"), "trained from"),
        (any("production" in version.stages for version in shown), box.format("production"), "production"),
        (any("staging" in version.stages for version in shown), box.format("staging"), "staging"),
        (any(version.state == "removed" for version in shown), box.format("gone"), "removed"),
        (any(version.recall is not None for version in shown), box.format("recalled"), "recalled"),
        (
            any(version.ref in shades.behind for version in shown),
            '<circle class="behind" cx="6" cy="-4" r="4"/>',
            "a parent has a newer version",
        ),
    ]
    entries, x = [], 0.0
    for occurs, sign, word in signs:
        if occurs:
            entries.append((x, sign, word))
            x += (36 if "path" in sign else 18) + 6.2 * len(word) + 22
    return _Legend(tuple(entries), max(0.0, x - 22))


def _heats(versions: Iterable[VersionView], metric: str | None) -> dict[str, int]:
    """The step of each version that has the metric, from the lowest value drawn to the highest."""
    values = {
        v.ref: v.metrics[metric]
        for v in versions
        if metric is not None and math.isfinite(v.metrics.get(metric, math.nan))
    }
    if not values:
        return {}
    low, high = min(values.values()), max(values.values())
    span = high - low
    return {ref: round((value - low) / span * (_HEATS - 1)) if span > 0 else 0 for ref, value in values.items()}


def _scale(graph: _Graph, metric: str, centre: float, y: float) -> list[str]:
    """What the colours of a metric mean: its lowest value on the left, its highest on the right."""
    values = [v.metrics[metric] for v in graph.versions.values() if math.isfinite(v.metrics.get(metric, math.nan))]
    left = centre - _HEATS * 9
    return [
        f'<g class="legend" transform="translate({_n(left)} {_n(y)})" aria-hidden="true">',
        f'<text class="small" x="-8" y="0" text-anchor="end">{_text(_fit(metric, 35))}: {number(min(values))}</text>',
        *(
            f'<g class="heat{i}"><rect class="box" x="{i * 18}" y="-10" width="18" height="12"/></g>'
            for i in range(_HEATS)
        ),
        f'<text class="small" x="{_HEATS * 18 + 8}" y="0">{number(max(values))}</text>',
        "</g>",
    ]


def _controls(graph: _Graph, view: LineageView, shades: Shades, site: Site) -> str:
    """A plain form: the page in another shape is another address, with or without a script."""
    counts = Counter(key for version in graph.versions.values() for key in version.metrics)
    metrics = sorted(counts, key=lambda key: (-counts[key], key))[:_METRICS_OFFERED]
    directions = (("both", "both ways"), ("up", "ancestors"), ("down", "descendants"))
    depths = [
        ("", "all"),
        *((str(depth), str(depth)) for depth in sorted({*_DEPTHS, *([site.depth] if site.depth else [])})),
    ]
    shown = [
        ("Show", "direction", directions, view.direction),
        ("Generations", "depth", depths, str(site.depth or "")),
        ("Colour", "metric", [("", "by stage"), *((key, key) for key in metrics)], shades.metric or ""),
    ]
    if view.root not in graph.versions:  # of a family all is shown
        shown = shown[2:]
    labels = (f"<label>{title} {_select(name, options, chosen)}</label>" for title, name, options, chosen in shown)
    return "\n".join(['<form id="look" method="get">', *labels, '<button type="submit">Show</button>', "</form>"])


def _select(name: str, options: Iterable[tuple[str, str]], chosen: str) -> str:
    marks = ((value, word, " selected" if value == chosen else "") for value, word in options)
    shown = (f'<option value="{_text(value)}"{mark}>{_text(_fit(word, 40))}</option>' for value, word, mark in marks)
    return f'<select name="{name}">{"".join(shown)}</select>'


def _list(graph: _Graph, site: Site) -> str:
    """Every version drawn, as text: for who cannot see the picture, or wants to go somewhere by its name."""
    rows = [
        f'<li><a href="{_text(_page(version, site))}">{_text(version.ref)}</a>'
        f" {_text(', '.join(_standing(version)))}</li>"
        for version in graph.versions.values()
    ]
    return "\n".join(
        ['<nav aria-label="Versions in the picture">', "<h2>In the picture</h2>", "<ul>", *rows, "</ul>", "</nav>"]
    )


def _standing(version: VersionView) -> list[str]:
    """What it serves, and what is wrong with it."""
    return [
        *version.stages,
        *(["recalled"] if version.recall else []),
        *(["removed"] if version.state == "removed" else []),
    ]


def _page(version: VersionView, site: Site) -> str:
    return f"{site.root}adapters/{quote(printable(version.name), safe='')}/v{version.number}"


def _addresses(version: VersionView, site: Site) -> Iterable[tuple[str, str]]:
    yield "Its own page", _page(version, site)
    if version.state != "removed":
        yield "In MLflow", f"{site.mlflow}#/models/{quote(printable(version.name), safe='')}/versions/{version.number}"
    yield "Its family", f"{site.root}adapters/{quote(printable(version.name), safe='')}"


def _origin(version: VersionView) -> str:
    return {"train": "trained", "import": "registered", "merge": "merged"}.get(version.kind, version.kind)


def _spoken(version: VersionView, newer: str | None) -> str:
    """What a screen reader says and a tooltip shows."""
    recalled = f"recalled ({version.recall.ref}: {version.recall.reason})" if version.recall else ""
    parts = [version.ref, recalled, *version.stages, "removed" if version.state == "removed" else "", _origin(version)]
    parts += [made(version), *(f"{key} {number(value)}" for key, value in headline(version).items())]
    parts += [f"made from {', '.join(parent.ref for parent in version.parents)}"] if version.parents else []
    parts += [f"{newer} is newer than its parent"] if newer else []
    return ", ".join(part for part in parts if part)


def _cards(graph: _Graph, shades: Shades, site: Site | None) -> dict[str, object]:
    """For the script: what the card of a version says, and who its parents and children are."""
    parents: dict[str, list[object]] = defaultdict(list)
    children: dict[str, list[object]] = defaultdict(list)
    for (parent, child), edges in graph.pairs.items():
        label = " + ".join(map(edge_label, edges))
        parents[child].append([printable(parent), printable(label)])
        children[parent].append([printable(child), printable(label)])
    for ref, version in graph.versions.items():  # and those that the picture does not show
        parents[ref] += [
            [printable(parent.ref), printable(edge_label(parent))]
            for parent in version.parents
            if (parent.ref, ref) not in graph.pairs
        ]
    return {
        printable(ref): {
            "facts": [[key, printable(value)] for key, value in _facts(version, shades.behind.get(ref)) if value],
            "metrics": [[printable(key), number(value)] for key, value in version.metrics.items()],
            "parents": parents[ref],
            "children": children[ref],
            "words": " ".join(map(str, _searched(version))).lower(),
            **({"links": list(map(list, _addresses(version, site))), "receipt": _receipt(version)} if site else {}),
        }
        for ref, version in graph.versions.items()
    }


def _receipt(version: VersionView) -> str | None:
    """Where the receipt of a merge is read, from the root of the server."""
    if not version.recipe_digest or version.state == "removed":
        return None
    return f"v1/adapters/{quote(printable(version.name), safe='')}/versions/{version.number}/receipt"


def _facts(version: VersionView, newer: str | None) -> Iterable[tuple[str, object]]:
    yield "stage", ", ".join(version.stages)
    yield "state", "removed" if version.state == "removed" else ""
    yield "recalled", f"{version.recall.ref}: {version.recall.reason}" if version.recall else ""
    yield "behind", f"{newer} is newer than its parent" if newer else ""
    yield "method" if version.method else "made", version.method or _origin(version)
    yield "loss", "" if version.loss is None else loss(version.loss)
    yield "rank", version.rank
    yield "base", version.base
    yield "dataset", version.dataset
    yield "license", version.license
    yield "created", f"{version.created_at.replace('T', ' ').replace('Z', ' UTC')}, {version.created_by}".strip(", ")
    yield "params", ", ".join(f"{key}={value}" for key, value in version.params.items())
    yield "tags", ", ".join(f"{key}={value}" for key, value in version.tags.items())


def _searched(version: VersionView) -> Iterable[object]:
    yield version.ref
    yield from version.stages
    yield "recalled" if version.recall else ""
    yield from (version.kind, version.state, version.method or "", version.dataset or "", version.created_by)
    for values in (version.params, version.tags):
        yield from (f"{key}={value}" for key, value in values.items())


def _fit(text: str, most: int) -> str:
    """Cut in the middle: names of a family differ at their end."""
    text = printable(text)
    if len(text) <= most:
        return text
    tail = most // 3
    return f"{text[: most - tail - 1]}…{text[-tail:]}"


def _text(text: str) -> str:
    """For element content and quoted attributes, of XML and HTML alike."""
    return html.escape(printable(text), quote=True)


def _json(value: object) -> str:
    """For a script element: nothing in it can end the element or open a comment."""
    plain = json.dumps(value, ensure_ascii=True, separators=(",", ":"))
    return plain.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _ascii(text: str) -> str:
    """The same bytes in every locale; style, script and JSON are ASCII already."""
    return text.encode("ascii", "xmlcharrefreplace").decode()


def _asset(path: Path) -> str:
    return f"\n{path.read_text(encoding='ascii')}"


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _n(value: float) -> str:
    """At most one decimal, for short files and stable bytes."""
    return f"{value:.1f}".removesuffix(".0")

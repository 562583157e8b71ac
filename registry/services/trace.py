"""Where a version comes from and what came of it: the lineage graph, up and down, from our edges alone."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from ..api import Direction, LineageEdgeView, LineageView, MetricPoint
from ..domain.errors import InvalidInput, NotFound
from ..domain.recall import DESCENT
from ..domain.refs import Ref
from ..domain.version import AdapterVersion, Edge
from ..ports import Ledger
from .resolve import known_adapter, resolve
from .views import version_views


def lineage(ledger: Ledger, ref: Ref, *, direction: Direction = "both", depth: int | None = None) -> LineageView:
    """Every version reached from `ref`, the root first, and the edges between them.

    `depth` counts generations; None means all of them. Tombstones are part of the graph.
    """
    if depth is not None and depth < 1:
        raise InvalidInput(f"depth {depth} is less than 1", hint="leave --depth out to see every generation")
    root = resolve(ledger, ref, removed=True)
    edges: list[Edge] = []
    if direction in ("up", "both"):
        edges += ledger.edges_up(root.id, depth)
    if direction in ("down", "both"):
        edges += ledger.edges_down(root.id, depth)
    return _view(ledger, root.label, direction, [root.id], edges)


def common_ancestors(ledger: Ledger, first: Ref, second: Ref) -> LineageView:
    """The versions that both are made of, the nearest to `first` first, and all ways there from either.

    Where one is an ancestor of the other, it is one of them.
    """
    one, two = (resolve(ledger, ref, removed=True) for ref in (first, second))
    up = [_made_of(ledger.edges_up(version.id)) for version in (one, two)]
    above = [
        dict.fromkeys([version.id, *(edge.parent_id for edge in edges)])
        for version, edges in zip((one, two), up, strict=True)
    ]
    common = [version_id for version_id in above[0] if version_id in above[1]]
    edges = list(dict.fromkeys([*up[0], *up[1]]))
    # every common one lies above the nearest of them, which are what the ways lead to
    toward = _beneath(edges, common)
    kept = [edge for edge in edges if edge.parent_id in toward]
    return _view(ledger, one.label, "up", [one.id, two.id], kept, found=common)


def path(ledger: Ledger, first: Ref, second: Ref) -> LineageView:
    """All ways between two versions, whichever is the ancestor; `found` is a shortest one, or empty."""
    one, two = (resolve(ledger, ref, removed=True) for ref in (first, second))
    upward: tuple[AdapterVersion, AdapterVersion, Direction] = (one, two, "up")
    downward: tuple[AdapterVersion, AdapterVersion, Direction] = (two, one, "down")
    for below, above, direction in (upward, downward):
        edges = _made_of(ledger.edges_up(below.id))
        beneath = _beneath(edges, [above.id])
        if below.id in beneath:
            kept = [edge for edge in edges if edge.parent_id in beneath]
            way = _shortest(kept, below.id, above.id)
            found = way if direction == "up" else way[::-1]
            return _view(ledger, one.label, direction, [one.id, two.id], kept, found=found)
    return _view(ledger, one.label, "both", [one.id, two.id], [])


def along(view: LineageView, metric: str) -> tuple[MetricPoint, ...]:
    """The values of a metric in the order of the view, each beside those of the version's parents.

    Raises `NotFound` where no version of the view has it, with the names that there are.
    """
    values = {version.ref: version.metrics[metric] for version in view.versions if metric in version.metrics}
    if not values:
        known = sorted({key for version in view.versions for key in version.metrics})
        raise NotFound(f"no version here has the metric {metric!r}", hint=", ".join(known[:8]) or "none has any")
    points = []
    for version in view.versions:
        parents = {parent.ref: values[parent.ref] for parent in version.parents if parent.ref in values}
        points.append(MetricPoint(version.ref, metric, values.get(version.ref), parents))
    return tuple(points)


def _made_of(edges: Sequence[Edge]) -> list[Edge]:
    return [edge for edge in edges if edge.kind in DESCENT]


def _beneath(edges: Sequence[Edge], start: Sequence[str]) -> set[str]:
    """`start`, and all that is made of it along these edges."""
    children: dict[str, list[str]] = {}
    for edge in edges:
        children.setdefault(edge.parent_id, []).append(edge.child_id)
    reached, waiting = set(start), list(start)
    while waiting:
        for child in children.get(waiting.pop(), ()):
            if child not in reached:
                reached.add(child)
                waiting.append(child)
    return reached


def _shortest(edges: Sequence[Edge], below: str, above: str) -> list[str]:
    """One of the shortest ways up; among equal ones that of the first parents."""
    parents: dict[str, list[str]] = {}
    for edge in edges:
        parents.setdefault(edge.child_id, []).append(edge.parent_id)
    came_from, waiting = {below: ""}, deque([below])
    while above not in came_from:
        node = waiting.popleft()
        for parent in parents.get(node, ()):
            if parent not in came_from:
                came_from[parent] = node
                waiting.append(parent)
    way = [above]
    while way[-1] != below:
        way.append(came_from[way[-1]])
    return way[::-1]


def family(ledger: Ledger, name: str, *, most: int) -> LineageView:
    """The newest versions of an adapter, what each was made of and what was made of it; `root` is the adapter's name.

    Tombstones are part of it.
    """
    known_adapter(ledger, name)
    ids = list(ledger.numbers(name, include_removed=True).values())[-most:]
    up = [edge for edges in ledger.parent_edges(ids).values() for edge in edges]
    down = [edge for version_id in ids for edge in ledger.edges_down(version_id, 1)]
    return _view(ledger, name, "both", ids, [*up, *down])


def _view(
    ledger: Ledger,
    root: str,
    direction: Direction,
    first: Sequence[str],
    edges: Sequence[Edge],
    *,
    found: Sequence[str] = (),
) -> LineageView:
    """The versions `first` and all at the ends of the edges, each once."""
    ids = dict.fromkeys([*first, *found, *(i for edge in edges for i in (edge.parent_id, edge.child_id))])
    versions = ledger.versions_by_id(list(ids))
    views = version_views(ledger, [versions[version_id] for version_id in ids])
    return LineageView(
        root=root,
        direction=direction,
        versions=tuple(views),
        edges=tuple(
            LineageEdgeView(
                child=versions[edge.child_id].label,
                parent=versions[edge.parent_id].label,
                kind=edge.kind,
                weight=edge.weight,
                position=edge.position,
            )
            for edge in dict.fromkeys(edges)
        ),
        found=tuple(versions[version_id].label for version_id in found),
    )

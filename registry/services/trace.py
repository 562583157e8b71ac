"""Where a version comes from and what came of it: the lineage graph, up and down, from our edges alone."""

from __future__ import annotations

from collections.abc import Sequence

from ..api import Direction, LineageEdgeView, LineageView
from ..domain.errors import InvalidInput
from ..domain.refs import Ref
from ..domain.version import Edge
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


def family(ledger: Ledger, name: str, *, most: int) -> LineageView:
    """The newest versions of an adapter, what each was made of and what was made of it; `root` is the adapter's name.

    Tombstones are part of it.
    """
    known_adapter(ledger, name)
    ids = [version.id for version in ledger.versions(name, include_removed=True)[-most:]]
    up = [edge for edges in ledger.parent_edges(ids).values() for edge in edges]
    down = [edge for version_id in ids for edge in ledger.edges_down(version_id, 1)]
    return _view(ledger, name, "both", ids, [*up, *down])


def _view(ledger: Ledger, root: str, direction: Direction, first: Sequence[str], edges: Sequence[Edge]) -> LineageView:
    """The versions `first` and all at the ends of the edges, each once."""
    ids = dict.fromkeys([*first, *(i for edge in edges for i in (edge.parent_id, edge.child_id))])
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
    )

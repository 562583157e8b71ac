"""Where a version comes from and what came of it: the lineage graph, up and down, from our edges alone."""

from __future__ import annotations

from ..api import Direction, LineageEdgeView, LineageView
from ..domain.errors import InvalidInput
from ..domain.refs import Ref
from ..ports import Ledger
from .resolve import resolve
from .views import version_views


def lineage(ledger: Ledger, ref: Ref, *, direction: Direction = "both", depth: int | None = None) -> LineageView:
    """Every version reached from `ref`, the root first, and the edges between them.

    `depth` counts generations; None means all of them. Tombstones are part of the graph.
    """
    if depth is not None and depth < 1:
        raise InvalidInput(f"depth {depth} is less than 1", hint="leave --depth out to see every generation")
    root = resolve(ledger, ref, removed=True)
    edges = []
    if direction in ("up", "both"):
        edges += ledger.edges_up(root.id, depth)
    if direction in ("down", "both"):
        edges += ledger.edges_down(root.id, depth)
    ids = dict.fromkeys([root.id, *(i for edge in edges for i in (edge.parent_id, edge.child_id))])
    versions = ledger.versions_by_id(list(ids))
    views = version_views(ledger, [versions[version_id] for version_id in ids])
    return LineageView(
        root=root.label,
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

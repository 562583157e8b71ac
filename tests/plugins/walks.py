"""What lies around a version in a model of lineage: for the tests that hold ours against plain Python."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, TypeVar

Row = TypeVar("Row", bound=tuple[Any, ...])


def around(edges: Collection[Row], version: str, *, up: bool) -> set[Row]:
    """All edges (child, position, parent, …) on the way up (or down), of every kind."""
    found: set[Row] = set()
    waiting, seen = [version], {version}
    while waiting:
        node = waiting.pop()
        for edge in edges:
            if edge[0 if up else 2] == node:
                found.add(edge)
                following = edge[2 if up else 0]
                if following not in seen:
                    seen.add(following)
                    waiting.append(following)
    return found

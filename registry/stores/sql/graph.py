"""Walks over the edges, and the recalls that reach a version along them. Functions of an open transaction.

One query a generation where the database is in this process. Where each query is a way to a server and back, a walk is
one query, and its answer one row a generation. That query knows the nodes of the generation before, but not all that it
has seen, so it may visit one once for every length of a path to it. Where that becomes too much, a second query brings
the whole walk, each edge once but in no order. docs/decisions/0005-the-row-is-the-truth.md has the figures.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from itertools import starmap
from operator import itemgetter
from typing import Any

from sqlalchemy import (
    Column,
    ColumnElement,
    Connection,
    FromClause,
    Integer,
    Select,
    Subquery,
    Text,
    bindparam,
    except_,
    func,
    insert,
    literal,
    literal_column,
    select,
    true,
)
from sqlalchemy.sql.selectable import LateralFromClause

from ...domain.errors import Recalled
from ...domain.recall import DESCENT, Recall, RecallAction, Recalls
from ...domain.version import Edge
from .engine import Now, among, is_remote, rows, these
from .tables import adapter, edge, meta, recall, version

#: How far the first query of a walk on a server goes; nearly every walk ends before.
_MOST_GENERATIONS, _MOST_EDGES = 32, 10_000

_FIELDS = list(Edge.__dataclass_fields__)
_EDGE = [edge.c[name] for name in _FIELDS]
_EDGES_AT = {
    column.name: select(*_EDGE).where(among(column)).order_by(column, edge.c.child_id, edge.c.position)
    for column in (edge.c.child_id, edge.c.parent_id)
}
_Look = Callable[[set[str]], list[tuple[Any, ...]]]


@cache  # only a ledger on a server needs it
def _by_generations(start: Column[str], end: Column[str]) -> Select[Any]:
    """The walk from the node `first`, a row a generation: each field of its edges an array, None where it has none."""
    edges, generation = func.count().label("edges"), literal(1).label("generation")
    walked = (
        select(*_arrays(edge), edges, generation, func.array_agg(start).label("before"))
        .where(start == bindparam("first", type_=Text()))
        .cte("walked", recursive=True)
    )
    ends, before = (
        select(func.unnest(walked.c[name]).label("node")).correlate(walked) for name in (end.name, "before")
    )
    # most ways to a node differ by one step, if at all: it comes back in the next generation, and is left out
    nodes = except_(ends, before).subquery("nodes")
    each = _leaving(nodes, start)
    found = select(*_arrays(each), edges).select_from(nodes.join(each, true())).lateral("found")
    step = (
        select(*(found.c[name] for name in _FIELDS), walked.c.edges + found.c.edges)
        .add_columns(walked.c.generation + 1, walked.c[end.name])
        .select_from(walked.join(found, true()))
        .where(walked.c[end.name].is_not(None), walked.c.edges < _MOST_EDGES)
        .where(walked.c.generation < bindparam("generations", type_=Integer()))
    )
    whole = walked.union_all(step)
    return select(*(whole.c[name] for name in _FIELDS)).order_by(whole.c.generation)


@cache
def _every_edge(start: Column[str], end: Column[str]) -> Select[Any]:
    """All edges of the walk from the node `first`, in no order; a step looks for the nodes that the last one found."""
    walked = select(*_EDGE).where(start == bindparam("first", type_=Text())).cte("walked", recursive=True)
    nodes = select(walked.c[end.name].label("node")).distinct().subquery("nodes")
    each = _leaving(nodes, start)
    step = select(*(each.c[name] for name in _FIELDS)).select_from(nodes.join(each, true()))
    return select(walked.union(step))


def _leaving(nodes: Subquery, start: Column[str]) -> LateralFromClause:
    """The edges of each node. OFFSET has the planner look for them node by node, whatever it believes of the table."""
    return select(*_EDGE).where(start == nodes.c.node).offset(literal_column("0")).lateral("each")


def _arrays(edges: FromClause) -> list[ColumnElement[Any]]:
    return [func.array_agg(edges.c[name]).label(name) for name in _FIELDS]


_OTHER = version.alias("other")
_SAME_CONTENT = (
    select(version.c.id.label("one"), _OTHER.c.id.label("other"))
    .join(_OTHER, (_OTHER.c.content_digest == version.c.content_digest) & (_OTHER.c.id != version.c.id))
    .where(among(version.c.id))
    .order_by(version.c.id, _OTHER.c.id)
)
_RECALL = select(*(recall.c[name] for name in Recall.__dataclass_fields__)).order_by(recall.c.id)


def walk(
    connection: Connection, version_id: str, depth: int | None, *, start: Column[str], end: Column[str]
) -> list[Edge]:
    """Edges from `start` to `end`, generation by generation, in each by `start`; a node is visited once."""
    look = _ask(connection, start)
    if is_remote(connection) and depth != 1:
        look = _read_ahead(connection, version_id, depth, start, end)
    found: list[tuple[Any, ...]] = []
    seen, generation = {version_id}, {version_id}
    toward = itemgetter(_FIELDS.index(end.name))
    while generation and (depth is None or depth > 0):
        edges = look(generation)
        found += edges
        generation = set(map(toward, edges)) - seen
        seen |= generation
        depth = None if depth is None else depth - 1
    return list(starmap(Edge, found))


def _ask(connection: Connection, start: Column[str]) -> _Look:
    return lambda nodes: rows(connection, _EDGES_AT[start.name], these(nodes))


def _read_ahead(
    connection: Connection, version_id: str, depth: int | None, start: Column[str], end: Column[str]
) -> _Look:
    """Reads the walk at once. What comes back answers as `_ask` would, for the walk's generations one by one."""
    most = _MOST_GENERATIONS if depth is None else min(depth, _MOST_GENERATIONS)
    ahead = iter(rows(connection, _by_generations(start, end), {"first": version_id, "generations": most}))
    begin = _FIELDS.index(start.name)
    order = itemgetter(begin, _FIELDS.index("child_id"), _FIELDS.index("position"))
    at: defaultdict[str, list[tuple[Any, ...]]] = defaultdict(list)

    def look(nodes: set[str]) -> list[tuple[Any, ...]]:
        fields = next(ahead, None)
        if fields is None:  # the first query ended before the walk did
            if not at:
                for row in rows(connection, _every_edge(start, end), {"first": version_id}):
                    at[row[begin]].append(row)
            return sorted((row for node in nodes if node in at for row in at[node]), key=order)
        if fields[begin] is None:
            return []
        edges: Iterable[tuple[Any, ...]] = zip(*fields, strict=True)
        if not nodes.issuperset(fields[begin]):  # what leaves the others came with an earlier generation
            edges = (row for row in edges if row[begin] in nodes)
        return sorted(edges, key=order)

    return look


def edges_at(connection: Connection, column: Column[str], nodes: Iterable[str]) -> list[Edge]:
    return [Edge(*row) for row in rows(connection, _EDGES_AT[column.name], these(nodes))]


def add_recall(
    connection: Connection, version_id: str, action: RecallAction, *, actor: str, reason: str
) -> tuple[Recall, int | None]:
    """Append a row, and give its id; or the row that says so already, and None."""
    lock_recalls(connection)
    last = _newest(connection, version_id)
    if last is not None and last.action == action:
        return last, None
    row = {"version_id": version_id, "action": action, "reason": reason, "actor": actor, "at": Now()}
    row_id = connection.execute(insert(recall).values(row).returning(recall.c.id)).scalar_one()
    added = _newest(connection, version_id)
    assert added is not None
    return added, row_id


def lock_recalls(connection: Connection, *, shared: bool = False) -> None:
    """A recall and a move of a stage see each other: whichever comes second sees the whole of the first."""
    connection.execute(select(meta.c.registry_id).with_for_update(read=shared))


def recalled(connection: Connection) -> Recalls:
    """Every version that a recall hits now, the recalled ones themselves first, then generation by generation.

    It hits the bytes: copies under other names, and all that is made of any of them.
    """
    newest = {each.version_id: each for each in (Recall(*row) for row in rows(connection, _RECALL))}
    said = {version_id: each for version_id, each in newest.items() if each.action == "recall"}
    return {version_id: said[root] for version_id, root in descend(connection, list(said), copies=True).items()}


def descend(connection: Connection, roots: Sequence[str], *, copies: bool = False) -> dict[str, str]:
    """The roots and every version that is made of one, each with its nearest root; a copy counts where asked for."""
    found = {root: root for root in roots}
    generation = list(found)
    while generation:
        edges = edges_at(connection, edge.c.parent_id, generation)
        pairs = [(each.parent_id, each.child_id) for each in edges if each.kind in DESCENT]
        if copies:
            pairs = [*_copies(connection, generation), *pairs]
        following: dict[str, None] = {}
        for above, below in pairs:
            if below not in found:
                found[below] = found[above]
                following[below] = None
        generation = list(following)
    return found


def _copies(connection: Connection, nodes: Iterable[str]) -> list[tuple[str, str]]:
    """Each of the versions with every other one of the same content, removed ones too."""
    return [(row.one, row.other) for row in connection.execute(_SAME_CONTENT, these(nodes))]


def check_not_recalled(connection: Connection, version_id: str, what: str) -> None:
    """Raise `Recalled` where a recall hits the version; `what` is not done then."""
    hit = recalled(connection).get(version_id)
    if hit is not None:
        names = labels(connection, [version_id, hit.version_id])
        raise Recalled.of(names[version_id], names[hit.version_id], hit.reason, what)


def labels(connection: Connection, version_ids: Iterable[str]) -> dict[str, str]:
    query = select(version.c.id, adapter.c.name, version.c.number).join(adapter, version.c.adapter_id == adapter.c.id)
    found = connection.execute(query.where(among(version.c.id)), these(version_ids))
    return {version_id: f"{name}:v{number}" for version_id, name, number in found}


def _newest(connection: Connection, version_id: str) -> Recall | None:
    said = connection.execute(_RECALL.where(recall.c.version_id == version_id)).all()
    return Recall(*said[-1]) if said else None

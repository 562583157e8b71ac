"""What happened, in the order in which it was committed. Functions of an open transaction, and the reading of it.

An id that the database hands out may be committed after a later one, and whoever has read the later one never looks
back. Ours are counted by one row that a writer locks until it commits: seen from outside they have no holes, and the
last one says what there is. docs/decisions/0018-one-feed.md tells what else was thought of.
"""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import ColumnElement, Connection, case, func, insert, select, update

from ...domain.errors import InvalidInput
from ...domain.event import Event, EventKind
from ...domain.refs import is_like
from .engine import Database, among, rows, these
from .graph import labels
from .tables import adapter, event, event_counter, gate_file, recall, stage_history, version

#: The id of the newest event.
LAST = select(event_counter.c.last)


def tell(
    connection: Connection,
    kind: EventKind,
    *,
    stage: str = "",
    adapter_id: str | None = None,
    version_id: str | None = None,
    seq: int | None = None,
    recall_id: int | None = None,
    gate_file_id: int | None = None,
) -> None:
    """Add an event, the last thing that a transaction does: from here on all others that tell something wait for it."""
    counted = update(event_counter).values(last=event_counter.c.last + 1).returning(event_counter.c.last)
    row = {
        "id": connection.execute(counted).scalar_one(),
        "kind": kind,
        "stage": stage,
        "adapter_id": adapter_id,
        "version_id": version_id,
        "seq": seq,
        "recall_id": recall_id,
        "gate_file_id": gate_file_id,
    }
    connection.execute(insert(event).values(row))


class FeedRows:
    """The part of the ledger that says what happened."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def feed(
        self,
        after: int | None,
        *,
        limit: int,
        kinds: Sequence[EventKind] = (),
        stage: str | None = None,
        names: str | None = None,
    ) -> tuple[list[Event], int]:
        with self._db.read() as connection:
            ((last,),) = rows(connection, LAST)
            if after is None or after == last:
                return [], last
            if after > last:
                raise InvalidInput(
                    f"event {after} is not there, the last one is {last}: the ledger is another one, or was restored",
                    hint="look at what is there now, and go on after that event",
                )
            where = [event.c.id > after]
            if kinds:
                where.append(event.c.kind.in_(kinds))
            if stage is not None:
                where.append(event.c.stage == stage)
            given = {}
            if names is not None:
                where.append(among(event.c.adapter_id))
                given = these(each.id for each in connection.execute(select(adapter)) if is_like(each.name, [names]))
            return _read(connection, where, given, limit), last


def _read(
    connection: Connection, where: Sequence[ColumnElement[bool]], given: dict[str, str], limit: int
) -> list[Event]:
    # facts are looked up for what is shown, not for all that is looked through
    shown = select(event).where(*where).order_by(event.c.id).limit(limit).subquery("shown")
    gone = shown.c.kind == "remove"
    made_or_gone = case((gone, version.c.removed_at), else_=version.c.created_at)
    by = case((gone, version.c.removed_by), else_=version.c.created_by)
    why = func.coalesce(stage_history.c.reason, recall.c.reason, case((gone, version.c.removed_reason)), "")
    query = (
        select(
            shown,
            func.coalesce(stage_history.c.at, recall.c.at, gate_file.c.at, made_or_gone).label("at"),
            func.coalesce(stage_history.c.actor, recall.c.actor, gate_file.c.set_by, by).label("actor"),
            why.label("reason"),
            stage_history.c.previous_id,
            stage_history.c.evidence,
            adapter.c.name,
        )
        .select_from(shown)
        .outerjoin(adapter, adapter.c.id == shown.c.adapter_id)
        .outerjoin(version, version.c.id == shown.c.version_id)
        .outerjoin(
            stage_history, (stage_history.c.adapter_id == shown.c.adapter_id) & (stage_history.c.seq == shown.c.seq)
        )
        .outerjoin(recall, recall.c.id == shown.c.recall_id)
        .outerjoin(gate_file, gate_file.c.id == shown.c.gate_file_id)
        .order_by(shown.c.id)
    )
    found = connection.execute(query, given).all()
    known = labels(connection, {each for row in found for each in (row.version_id, row.previous_id) if each})
    return [
        Event(
            id=row.id,
            at=row.at,
            kind=row.kind,
            name=row.name,
            ref=known.get(row.version_id),
            stage=row.stage,
            previous=known.get(row.previous_id),
            actor=row.actor,
            reason=row.reason,
            evidence=row.evidence,
        )
        for row in found
    ]

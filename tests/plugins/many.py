"""A registry of many versions, written past the ledger for speed, and how much a database reads to answer a question.

What is read is counted, not timed: on SQLite in steps of its virtual machine, on PostgreSQL in rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Connection, Engine, Pool, event, insert, select, text

from adapterctl.registry import wire
from adapterctl.registry.domain.adapter import AdapterFacts
from adapterctl.registry.domain.version import FileRecord, Placement, VersionDetail
from adapterctl.registry.stores.sql import tables
from adapterctl.registry.stores.sql.engine import Database

#: The adapter that has as many versions as all others together.
LARGE = "large"


def fill(database: Database, *, adapters: int, each: int, start: int = 0) -> None:
    """Adapters `many-000` and so on with so many versions, and one with as many as these; each serves a stage.

    Every tenth one is on another base, and has another tag and metric.
    """
    names = [f"many-{number:03}" for number in range(start, adapters)]
    with database.write() as connection:
        numbers = {name: range(1, each + 1) for name in names}
        numbers[LARGE] = range(start * each + 1, adapters * each + 1)
        if start == 0:
            bases = [{"id": name, "name": f"org/{name}", "created_at": 0.0} for name in ("often", "seldom")]
            connection.execute(insert(tables.base), bases)
        known = set(connection.execute(select(tables.adapter.c.id)).scalars())
        new = [{"id": name, "name": name, "created_at": 0.0} for name in numbers if name not in known]
        connection.execute(insert(tables.adapter), new)
        versions = [_version(name, number) for name, of_adapter in numbers.items() for number in of_adapter]
        connection.execute(insert(tables.version), versions)
        connection.execute(
            insert(tables.version_detail), [{"version_id": row["id"], "body": _DETAIL} for row in versions]
        )
        metrics = [
            {"version_id": row["id"], "key": "bleu", "value": 1.0 if row["base_id"] == "seldom" else 0.1}
            for row in versions
        ]
        connection.execute(insert(tables.metric), [{**row, "source": "registered", "at": 0.0} for row in metrics])
        held = [{"adapter_id": name, "stage": "production", "version_id": f"{name}-{each}"} for name in names]
        connection.execute(insert(tables.stage), held)
        if connection.dialect.name == "postgresql":
            connection.execute(text("ANALYZE"))  # a server does so by itself, within a minute
            # small tables would be read from end to end, which large ones are not
            name = connection.execute(text("SELECT current_database()")).scalar_one()
            for way in ("seqscan", "hashjoin", "mergejoin"):
                connection.execute(text(f"ALTER DATABASE {name} SET enable_{way} = off"))
    database.close()  # new connections know of it


def _version(name: str, number: int) -> dict[str, Any]:
    seldom = name.endswith("0")
    file = FileRecord("adapter_model.safetensors", 384, "0" * 64)
    return {
        "id": f"{name}-{number}",
        "adapter_id": name,
        "number": number,
        "kind": "import",
        "state": "live",
        "content_digest": wire.to_json(f"{name}-{number}").encode().hex(),
        "base_id": "seldom" if seldom else "often",
        "created_at": float(number),
        "created_by": "ada",
        "params": "{}",
        "tags": wire.to_json({"team": "few" if seldom else "many"}),
        "dataset": "few" if seldom else "many",
        "summary": '{"rank":16,"dtype":"BF16","modules":128,"parameters":1}',
        "placement": wire.to_json(Placement(number, "m", "run", "file:///artifacts", (file,))),
    }


_DETAIL = wire.to_json(VersionDetail(AdapterFacts((), "tiny", None, "CAUSAL_LM", False, {}, {}), {}, None, None))


class Work:
    """What was read so far."""

    amount = 0

    def step(self) -> int:
        self.amount += 1
        return 0


@contextmanager
def counted() -> Iterator[Work]:
    """Count what every database of this process reads in the block."""
    work = Work()

    def watch(connection: Any, *_: Any) -> None:
        if hasattr(connection, "set_progress_handler"):
            connection.set_progress_handler(work.step, 1)

    def leave(connection: Any, *_: Any) -> None:
        if hasattr(connection, "set_progress_handler"):
            connection.set_progress_handler(None, 1)

    def begin(connection: Connection) -> None:
        work.amount -= _rows_read(connection)  # of transactions before, which the server has not put away yet

    def commit(connection: Connection) -> None:
        work.amount += _rows_read(connection)

    listened = [
        (Pool, "checkout", watch),
        (Pool, "checkin", leave),
        (Engine, "begin", begin),
        (Engine, "commit", commit),
    ]
    for of, when, listener in listened:
        event.listen(of, when, listener)
    try:
        yield work
    finally:
        for of, when, listener in listened:
            event.remove(of, when, listener)


def _rows_read(connection: Connection) -> int:
    if connection.dialect.name != "postgresql":
        return 0
    read = "sum(coalesce(seq_tup_read, 0) + coalesce(idx_tup_fetch, 0)) FROM pg_stat_xact_user_tables"
    return int(connection.exec_driver_sql(f"SELECT {read}").scalar_one() or 0)

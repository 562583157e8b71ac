"""The workers of a shared registry, as rows that each of them renews. All times are the database's."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import delete, insert, select, update

from ...domain.worker import SILENT_S, Queue, Worker
from .engine import Database, Now
from .tables import worker

#: A worker that died is named for so long.
FORGOTTEN_S = 86_400.0


class WorkerRows:
    """The part of the ledger that is about workers."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def add_worker(self, worker_id: str, *, name: str, host: str, queues: Sequence[Queue], device: str) -> None:
        silent = worker.c.seen_at < Now() - SILENT_S
        forgotten = worker.c.seen_at < Now() - FORGOTTEN_S
        with self._db.write() as connection:
            connection.execute(delete(worker).where(((worker.c.name == name) & silent) | forgotten))
            values = {"id": worker_id, "name": name, "host": host, "queues": ",".join(queues), "device": device}
            connection.execute(insert(worker).values(**values, started_at=Now(), seen_at=Now(), draining=False))

    def see_worker(self, worker_id: str, *, draining: bool = False) -> bool:
        values = {"draining": True} if draining else {}
        with self._db.write() as connection:
            changed = connection.execute(update(worker).where(worker.c.id == worker_id).values(seen_at=Now(), **values))
            return changed.rowcount == 1

    def remove_worker(self, worker_id: str) -> None:
        with self._db.write() as connection:
            connection.execute(delete(worker).where(worker.c.id == worker_id))

    def workers(self) -> list[Worker]:
        query = select(worker, (Now() - worker.c.seen_at).label("silent_s")).order_by(worker.c.name, worker.c.id)
        with self._db.read() as connection:
            return [
                Worker(
                    id=row.id,
                    name=row.name,
                    host=row.host,
                    queues=tuple(row.queues.split(",")),
                    device=row.device,
                    started_at=row.started_at,
                    seen_at=row.seen_at,
                    draining=row.draining,
                    silent_s=row.silent_s,
                )
                for row in connection.execute(query)
            ]

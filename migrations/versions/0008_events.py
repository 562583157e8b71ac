"""What happened, in one order: the facts that are there by their times, those to come as they are committed."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from adapterctl.registry.stores.sql.engine import append_only

revision = "0008"
down_revision = "0007"

# Of one time, what an adapter got comes before what was decided about it.
_FACTS = """
INSERT INTO event (id, kind, stage, adapter_id, version_id, seq, recall_id, gate_file_id)
SELECT row_number() OVER (ORDER BY at, rank, adapter_id, place), kind, stage, adapter_id, version_id,
       CASE WHEN rank = 2 THEN place END, CASE WHEN rank = 3 THEN place END, CASE WHEN rank = 1 THEN place END
FROM (
    SELECT created_at AS at, 0 AS rank, number AS place,
           CASE kind WHEN 'merge' THEN 'merge' ELSE 'register' END AS kind, '' AS stage, adapter_id, id AS version_id
    FROM version
    UNION ALL
    SELECT at, 1, id, 'gates', '', NULL, NULL FROM gate_file
    UNION ALL
    SELECT at, 2, seq, action, stage, adapter_id, version_id FROM stage_history
    UNION ALL
    SELECT recall.at, 3, recall.id, CASE recall.action WHEN 'undo' THEN 'undo_recall' ELSE 'recall' END, '',
           version.adapter_id, version.id
    FROM recall JOIN version ON version.id = recall.version_id
    UNION ALL
    SELECT removed_at, 4, number, 'remove', '', adapter_id, id FROM version WHERE state = 'removed'
) AS fact
"""


def upgrade() -> None:
    op.create_table(
        "event",
        sa.Column("id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("stage", sa.Text(), nullable=False),
        sa.Column("adapter_id", sa.Text()),
        sa.Column("version_id", sa.Text()),
        sa.Column("seq", sa.Integer()),
        sa.Column("recall_id", sa.Integer()),
        sa.Column("gate_file_id", sa.Integer()),
        sa.PrimaryKeyConstraint("id", name="pk_event"),
    )
    op.create_table("event_counter", sa.Column("last", sa.Integer(), nullable=False))
    op.execute(_FACTS)
    op.execute("INSERT INTO event_counter (last) SELECT coalesce(max(id), 0) FROM event")
    for statement in append_only("event", op.get_bind().dialect.name):
        op.execute(statement)

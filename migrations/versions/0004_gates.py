"""Promotion by evidence: gate files, decisions, and the digest of its decision in each row of the history."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from adapterctl.registry.stores.sql.engine import append_only

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.create_table(
        "decision",
        sa.Column("digest", sa.Text(), nullable=False),
        sa.Column("body", sa.Text(), nullable=False),
        sa.Column("at", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("digest", name="pk_decision"),
    )
    op.create_table(
        "gate_file",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("digest", sa.Text(), nullable=False),
        sa.Column("body", sa.Text(), nullable=False),
        sa.Column("set_by", sa.Text(), nullable=False),
        sa.Column("at", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_gate_file"),
    )
    # rows that are there already have none, and their hashes stay as they are
    op.add_column("stage_history", sa.Column("evidence", sa.Text(), nullable=True))
    for table in ("decision", "gate_file"):
        for statement in append_only(table, op.get_bind().dialect.name):
            op.execute(statement)

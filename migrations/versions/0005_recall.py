"""Recalls, appended and never edited."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from adapterctl.registry.stores.sql.engine import append_only

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.create_table(
        "recall",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("version_id", sa.Text(), nullable=False),
        sa.Column("action", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("at", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(["version_id"], ["version.id"], name="fk_recall_version_id"),
        sa.PrimaryKeyConstraint("id", name="pk_recall"),
    )
    op.create_index("ix_recall_version_id", "recall", ["version_id"])
    for statement in append_only("recall", op.get_bind().dialect.name):
        op.execute(statement)

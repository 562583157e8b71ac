"""Signatures of versions, as their owners made them."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from adapterctl.registry.stores.sql.engine import append_only

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    op.create_table(
        "signature",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("version_id", sa.Text(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("envelope", sa.Text(), nullable=False),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("at", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(["version_id"], ["version.id"], name="fk_signature_version_id_version"),
        sa.PrimaryKeyConstraint("id", name="pk_signature"),
    )
    op.create_index("ix_signature_version_id", "signature", ["version_id"])
    for statement in append_only("signature", op.get_bind().dialect.name):
        op.execute(statement)

"""Versions are looked up by what they were trained on."""

from __future__ import annotations

from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.create_index("ix_version_dataset", "version", ["dataset"])

"""Lists a page at a time: an adapter's live versions in their order, and names in the order of code points."""

from __future__ import annotations

from alembic import op

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    op.create_index("ix_version_adapter_id_state_number", "version", ["adapter_id", "state", "number"])
    if op.get_bind().dialect.name == "postgresql":  # elsewhere no other order is known
        op.execute('ALTER TABLE adapter ALTER COLUMN name TYPE TEXT COLLATE "C"')

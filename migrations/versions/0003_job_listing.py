"""The queue as it is listed, newest first: without an index, every look at one page sorts the jobs of all time."""

from __future__ import annotations

from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.create_index("ix_job_created_at_id", "job", ["created_at", "id"])

"""The first tables. There is no way back but a backup: facts of record are never dropped."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from adapterctl.registry.stores.sql.engine import append_only

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "adapter",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_adapter"),
        sa.UniqueConstraint("name", name="uq_adapter_name"),
    )
    op.create_table(
        "base",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("revision", sa.Text(), nullable=True),
        sa.Column("config_digest", sa.Text(), nullable=True),
        sa.Column("weights_digest", sa.Text(), nullable=True),
        sa.Column("tokenizer_digest", sa.Text(), nullable=True),
        sa.Column("merged_into", sa.Text(), nullable=True),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(["merged_into"], ["base.id"], name="fk_base_merged_into"),
        sa.PrimaryKeyConstraint("id", name="pk_base"),
    )
    op.create_table(
        "eval_report",
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("subject", sa.Text(), nullable=False),
        sa.Column("base_id", sa.Text(), nullable=False),
        sa.Column("suite", sa.Text(), nullable=False),
        sa.Column("suite_digest", sa.Text(), nullable=False),
        sa.Column("at", sa.Float(), nullable=False),
        sa.Column("body", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("key", name="pk_eval_report"),
    )
    op.create_index("ix_eval_report_subject_base_id", "eval_report", ["subject", "base_id"])
    op.create_table(
        "job",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("title", sa.Text(), nullable=False),
        sa.Column("spec", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("max_attempts", sa.Integer(), nullable=False),
        sa.Column("created_by", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("updated_at", sa.Float(), nullable=False),
        sa.Column("owner", sa.Text(), nullable=True),
        sa.Column("lease_until", sa.Float(), nullable=True),
        sa.Column("started_at", sa.Float(), nullable=True),
        sa.Column("ended_at", sa.Float(), nullable=True),
        sa.Column("cancel_requested", sa.Boolean(), nullable=False),
        sa.Column("progress", sa.Text(), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("result", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_job"),
    )
    op.create_index("ix_job_state_created_at_id", "job", ["state", "created_at", "id"])
    op.create_index(
        "uq_job_live_key",
        "job",
        ["kind", "key"],
        unique=True,
        sqlite_where=sa.text("state IN ('queued', 'running')"),
        postgresql_where=sa.text("state IN ('queued', 'running')"),
    )
    op.create_table(
        "meta",
        sa.Column("registry_id", sa.Text(), nullable=False),
        sa.Column("mlflow_uri", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("registry_id", name="pk_meta"),
    )
    op.create_table(
        "adapter_suite",
        sa.Column("adapter_id", sa.Text(), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("digest", sa.Text(), nullable=False),
        sa.Column("body", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["adapter_id"], ["adapter.id"], name="fk_adapter_suite_adapter_id"),
        sa.PrimaryKeyConstraint("adapter_id", "position", name="pk_adapter_suite"),
    )
    op.create_table(
        "base_alias",
        sa.Column("spelling", sa.Text(), nullable=False),
        sa.Column("base_id", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["base_id"], ["base.id"], name="fk_base_alias_base_id"),
        sa.PrimaryKeyConstraint("spelling", name="pk_base_alias"),
    )
    op.create_table(
        "job_event",
        sa.Column("job_id", sa.Text(), nullable=False),
        sa.Column("seq", sa.Integer(), nullable=False),
        sa.Column("at", sa.Float(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("message", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["job.id"], name="fk_job_event_job_id"),
        sa.PrimaryKeyConstraint("job_id", "seq", name="pk_job_event"),
    )
    op.create_table(
        "stage_history",
        sa.Column("adapter_id", sa.Text(), nullable=False),
        sa.Column("seq", sa.Integer(), nullable=False),
        sa.Column("stage", sa.Text(), nullable=False),
        sa.Column("action", sa.Text(), nullable=False),
        sa.Column("version_id", sa.Text(), nullable=True),
        sa.Column("previous_id", sa.Text(), nullable=True),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("at", sa.Float(), nullable=False),
        sa.Column("prev_hash", sa.Text(), nullable=False),
        sa.Column("hash", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["adapter_id"], ["adapter.id"], name="fk_stage_history_adapter_id"),
        sa.PrimaryKeyConstraint("adapter_id", "seq", name="pk_stage_history"),
    )
    op.create_table(
        "version",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("adapter_id", sa.Text(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("content_digest", sa.Text(), nullable=False),
        sa.Column("base_id", sa.Text(), nullable=False),
        sa.Column("recipe_digest", sa.Text(), nullable=True),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("created_by", sa.Text(), nullable=False),
        sa.Column("license", sa.Text(), nullable=True),
        sa.Column("source", sa.Text(), nullable=True),
        sa.Column("dataset", sa.Text(), nullable=True),
        sa.Column("params", sa.Text(), nullable=False),
        sa.Column("tags", sa.Text(), nullable=False),
        sa.Column("summary", sa.Text(), nullable=False),
        sa.Column("placement", sa.Text(), nullable=False),
        sa.Column("removed_at", sa.Float(), nullable=True),
        sa.Column("removed_by", sa.Text(), nullable=True),
        sa.Column("removed_reason", sa.Text(), nullable=True),
        sa.ForeignKeyConstraint(["adapter_id"], ["adapter.id"], name="fk_version_adapter_id"),
        sa.ForeignKeyConstraint(["base_id"], ["base.id"], name="fk_version_base_id"),
        sa.PrimaryKeyConstraint("id", name="pk_version"),
        sa.UniqueConstraint("adapter_id", "number", name="uq_version_adapter_id_number"),
    )
    op.create_index("ix_version_base_id", "version", ["base_id"])
    op.create_index("ix_version_content_digest", "version", ["content_digest"])
    op.create_index(
        "uq_version_live_content",
        "version",
        ["adapter_id", "content_digest", "base_id"],
        unique=True,
        sqlite_where=sa.text("state = 'live' AND kind <> 'merge'"),
        postgresql_where=sa.text("state = 'live' AND kind <> 'merge'"),
    )
    op.create_index(
        "uq_version_live_recipe",
        "version",
        ["adapter_id", "recipe_digest"],
        unique=True,
        sqlite_where=sa.text("state = 'live' AND kind = 'merge'"),
        postgresql_where=sa.text("state = 'live' AND kind = 'merge'"),
    )
    op.create_table(
        "base_assignment",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("version_id", sa.Text(), nullable=False),
        sa.Column("base_id", sa.Text(), nullable=False),
        sa.Column("at", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(["base_id"], ["base.id"], name="fk_base_assignment_base_id"),
        sa.ForeignKeyConstraint(["version_id"], ["version.id"], name="fk_base_assignment_version_id"),
        sa.PrimaryKeyConstraint("id", name="pk_base_assignment"),
    )
    op.create_index("ix_base_assignment_version_id", "base_assignment", ["version_id"])
    op.create_table(
        "edge",
        sa.Column("child_id", sa.Text(), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("parent_id", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("weight", sa.Float(), nullable=True),
        sa.Column("recipe_digest", sa.Text(), nullable=True),
        sa.ForeignKeyConstraint(["child_id"], ["version.id"], name="fk_edge_child_id"),
        sa.ForeignKeyConstraint(["parent_id"], ["version.id"], name="fk_edge_parent_id"),
        sa.PrimaryKeyConstraint("child_id", "position", name="pk_edge"),
        sqlite_with_rowid=False,
    )
    down = ["parent_id", "child_id", "position", "kind", "weight", "recipe_digest"]
    op.create_index("ix_edge_down", "edge", down)
    op.create_table(
        "metric",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("version_id", sa.Text(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("value", sa.Float(), nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("at", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(["version_id"], ["version.id"], name="fk_metric_version_id"),
        sa.PrimaryKeyConstraint("id", name="pk_metric"),
    )
    op.create_index("ix_metric_version_id", "metric", ["version_id"])
    op.create_table(
        "stage",
        sa.Column("adapter_id", sa.Text(), nullable=False),
        sa.Column("stage", sa.Text(), nullable=False),
        sa.Column("version_id", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["adapter_id"], ["adapter.id"], name="fk_stage_adapter_id"),
        sa.ForeignKeyConstraint(["version_id"], ["version.id"], name="fk_stage_version_id"),
        sa.PrimaryKeyConstraint("adapter_id", "stage", name="pk_stage"),
    )
    op.create_index("ix_stage_version_id", "stage", ["version_id"])
    op.create_table(
        "version_detail",
        sa.Column("version_id", sa.Text(), nullable=False),
        sa.Column("body", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["version_id"], ["version.id"], name="fk_version_detail_version_id"),
        sa.PrimaryKeyConstraint("version_id", name="pk_version_detail"),
    )
    for table in ("base_assignment", "edge", "stage_history"):
        for statement in append_only(table, op.get_bind().dialect.name):
            op.execute(statement)

"""Our tables. `migrations/` builds them; a test holds both against each other.

Facts of record (`edge`, `base_assignment`, `stage_history`, `recall`, `decision`, `gate_file`, `signature`, `event`)
are append-only by triggers. Rules that concurrent writers could break are unique indexes: one live job a key, one live
version of the same content or recipe in an adapter.
"""

from __future__ import annotations

from sqlalchemy import (
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    PrimaryKeyConstraint,
    Table,
    Text,
    UniqueConstraint,
    text,
)

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

# one row
meta = Table(
    "meta",
    metadata,
    Column("registry_id", Text, primary_key=True),
    Column("mlflow_uri", Text, nullable=False),
    Column("created_at", Float, nullable=False),
)

# `merged_into` leads to the base that this one turned out to be; never to one that is merged itself.
base = Table(
    "base",
    metadata,
    Column("id", Text, primary_key=True),
    Column("name", Text, nullable=False),
    Column("revision", Text),
    Column("config_digest", Text),
    Column("weights_digest", Text),
    Column("tokenizer_digest", Text),
    Column("merged_into", Text, ForeignKey("base.id")),
    Column("created_at", Float, nullable=False),
)

base_alias = Table(
    "base_alias",
    metadata,
    Column("spelling", Text, primary_key=True),
    Column("base_id", Text, ForeignKey("base.id"), nullable=False),
)

adapter = Table(
    "adapter",
    metadata,
    Column("id", Text, primary_key=True),
    # lists are in the order of code points, as Python compares, whatever the language of a database
    Column("name", Text().with_variant(Text(collation="C"), "postgresql"), nullable=False, unique=True),
    Column("created_at", Float, nullable=False),
)

# `base_id` is the newest assignment; `stages`, metrics and edges have tables of their own.
version = Table(
    "version",
    metadata,
    Column("id", Text, primary_key=True),
    Column("adapter_id", Text, ForeignKey("adapter.id"), nullable=False),
    Column("number", Integer, nullable=False),
    Column("kind", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("content_digest", Text, nullable=False, index=True),
    Column("base_id", Text, ForeignKey("base.id"), nullable=False, index=True),
    Column("recipe_digest", Text),
    Column("created_at", Float, nullable=False),
    Column("created_by", Text, nullable=False),
    Column("license", Text),
    Column("source", Text),
    Column("dataset", Text, index=True),
    Column("params", Text, nullable=False),
    Column("tags", Text, nullable=False),
    Column("summary", Text, nullable=False),
    Column("placement", Text, nullable=False),
    Column("removed_at", Float),
    Column("removed_by", Text),
    Column("removed_reason", Text),
    UniqueConstraint("adapter_id", "number"),
    Index(None, "adapter_id", "state", "number"),  # an adapter's live versions are counted, and its newest is found
)
# No `postgresql_where` beside `sqlite_where`: it would load that dialect into every command, 50 ms.
_live_import, version_live_merge = text("state = 'live' AND kind <> 'merge'"), text("state = 'live' AND kind = 'merge'")
Index(
    "uq_version_live_content",
    version.c.adapter_id,
    version.c.content_digest,
    version.c.base_id,
    unique=True,
    sqlite_where=_live_import,
)
Index(
    "uq_version_live_recipe",
    version.c.adapter_id,
    version.c.recipe_digest,
    unique=True,
    sqlite_where=version_live_merge,
)

version_detail = Table(
    "version_detail",
    metadata,
    Column("version_id", Text, ForeignKey("version.id"), primary_key=True),
    Column("body", Text, nullable=False),
)

base_assignment = Table(
    "base_assignment",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("version_id", Text, ForeignKey("version.id"), nullable=False, index=True),
    Column("base_id", Text, ForeignKey("base.id"), nullable=False),
    Column("at", Float, nullable=False),
)

edge = Table(
    "edge",
    metadata,
    Column("child_id", Text, ForeignKey("version.id"), nullable=False),
    Column("position", Integer, nullable=False),
    Column("parent_id", Text, ForeignKey("version.id"), nullable=False),
    Column("kind", Text, nullable=False),
    Column("weight", Float),
    Column("recipe_digest", Text),
    # the whole row, so that a walk down needs no second look for each edge
    Index("ix_edge_down", "parent_id", "child_id", "position", "kind", "weight", "recipe_digest"),
    PrimaryKeyConstraint("child_id", "position"),
    sqlite_with_rowid=False,  # rows of one child lie together
)

# Every value that was ever set; the newest of a key counts.
metric = Table(
    "metric",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("version_id", Text, ForeignKey("version.id"), nullable=False, index=True),
    Column("key", Text, nullable=False),
    Column("value", Float, nullable=False),
    Column("source", Text, nullable=False),
    Column("at", Float, nullable=False),
)

job = Table(
    "job",
    metadata,
    Column("id", Text, primary_key=True),
    Column("kind", Text, nullable=False),
    Column("key", Text, nullable=False),
    Column("title", Text, nullable=False),
    Column("spec", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("max_attempts", Integer, nullable=False),
    Column("created_by", Text, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("updated_at", Float, nullable=False),
    Column("owner", Text),
    Column("lease_until", Float),
    Column("started_at", Float),
    Column("ended_at", Float),
    Column("cancel_requested", Boolean, nullable=False),
    Column("progress", Text),
    Column("error", Text),
    Column("result", Text, nullable=False),
    Column("queue", Text, nullable=False, server_default="cpu"),
)
Index("ix_job_state_created_at_id", job.c.state, job.c.created_at, job.c.id)
Index("ix_job_created_at_id", job.c.created_at, job.c.id)
job_live = text("state IN ('queued', 'running')")
Index(
    "uq_job_live_key",
    job.c.kind,
    job.c.key,
    unique=True,
    sqlite_where=job_live,
)

job_event = Table(
    "job_event",
    metadata,
    Column("job_id", Text, ForeignKey("job.id"), nullable=False),
    Column("seq", Integer, nullable=False),
    Column("at", Float, nullable=False),
    Column("kind", Text, nullable=False),
    Column("message", Text, nullable=False),
    PrimaryKeyConstraint("job_id", "seq"),
)

eval_report = Table(
    "eval_report",
    metadata,
    Column("key", Text, primary_key=True),
    Column("subject", Text, nullable=False),
    Column("base_id", Text, nullable=False),
    Column("suite", Text, nullable=False),
    Column("suite_digest", Text, nullable=False),
    Column("at", Float, nullable=False),
    Column("body", Text, nullable=False),
    Index(None, "subject", "base_id"),
)

adapter_suite = Table(
    "adapter_suite",
    metadata,
    Column("adapter_id", Text, ForeignKey("adapter.id"), nullable=False),
    Column("position", Integer, nullable=False),
    Column("name", Text, nullable=False),
    Column("digest", Text, nullable=False),
    Column("body", Text, nullable=False),
    PrimaryKeyConstraint("adapter_id", "position"),
)

stage = Table(
    "stage",
    metadata,
    Column("adapter_id", Text, ForeignKey("adapter.id"), nullable=False),
    Column("stage", Text, nullable=False),
    Column("version_id", Text, ForeignKey("version.id"), nullable=False, index=True),
    PrimaryKeyConstraint("adapter_id", "stage"),
)

stage_history = Table(
    "stage_history",
    metadata,
    Column("adapter_id", Text, ForeignKey("adapter.id"), nullable=False),
    Column("seq", Integer, nullable=False),
    Column("stage", Text, nullable=False),
    Column("action", Text, nullable=False),
    Column("version_id", Text),
    Column("previous_id", Text),
    Column("actor", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("at", Float, nullable=False),
    Column("prev_hash", Text, nullable=False),
    Column("hash", Text, nullable=False),
    Column("evidence", Text),
    PrimaryKeyConstraint("adapter_id", "seq"),
)

# The newest row of a version says whether it is recalled; its descendants are found along the edges.
recall = Table(
    "recall",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("version_id", Text, ForeignKey("version.id"), nullable=False, index=True),
    Column("action", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("actor", Text, nullable=False),
    Column("at", Float, nullable=False),
)

# What a move of a stage stood on: the canonical JSON that the history's `evidence` is the SHA-256 of.
decision = Table(
    "decision",
    metadata,
    Column("digest", Text, primary_key=True),
    Column("body", Text, nullable=False),
    Column("at", Float, nullable=False),
)

# Every gate file that was ever set; the newest counts.
gate_file = Table(
    "gate_file",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("digest", Text, nullable=False),
    Column("body", Text, nullable=False),
    Column("set_by", Text, nullable=False),
    Column("at", Float, nullable=False),
)

# An envelope as DSSE writes it, and the public key that it was held against before it was kept.
signature = Table(
    "signature",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("version_id", Text, ForeignKey("version.id"), nullable=False, index=True),
    Column("key", Text, nullable=False),
    Column("envelope", Text, nullable=False),
    Column("actor", Text, nullable=False),
    Column("at", Float, nullable=False),
)

# What happened, each row a pointer to the fact that it tells of. Who writes one locks the row of the counter until the
# commit: numbers become visible in their order. That lock has to be a writer's last, so there are no foreign keys here,
# whose checks would take others.
event = Table(
    "event",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("kind", Text, nullable=False),
    Column("stage", Text, nullable=False),
    Column("adapter_id", Text),
    Column("version_id", Text),
    Column("seq", Integer),
    Column("recall_id", Integer),
    Column("gate_file_id", Integer),
)

# one row
event_counter = Table("event_counter", metadata, Column("last", Integer, nullable=False))

# Suites that jobs refer to by digest, whatever became of their files.
suite = Table(
    "suite",
    metadata,
    Column("digest", Text, primary_key=True),
    Column("name", Text, nullable=False),
    Column("body", Text, nullable=False),
    Column("created_at", Float, nullable=False),
)

# What a job's attempts wrote, in pieces, for those who cannot see the worker's disk.
job_log = Table(
    "job_log",
    metadata,
    Column("job_id", Text, ForeignKey("job.id"), nullable=False),
    Column("seq", Integer, nullable=False),
    Column("text", Text, nullable=False),
    PrimaryKeyConstraint("job_id", "seq"),
)

# Processes that work on jobs of a shared registry; each renews its row.
worker = Table(
    "worker",
    metadata,
    Column("id", Text, primary_key=True),
    Column("name", Text, nullable=False),
    Column("host", Text, nullable=False),
    Column("queues", Text, nullable=False),
    Column("device", Text, nullable=False),
    Column("started_at", Float, nullable=False),
    Column("seen_at", Float, nullable=False),
    Column("draining", Boolean, nullable=False),
)

token = Table(
    "token",
    metadata,
    Column("id", Text, primary_key=True),
    Column("name", Text, nullable=False),
    Column("secret_sha256", Text, nullable=False, unique=True),
    Column("scope", Text, nullable=False),
    Column("names", Text, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("created_by", Text, nullable=False),
    Column("expires_at", Float),
    Column("last_used_at", Float),
    Column("revoked_at", Float),
)

# Answers to requests that carried an Idempotency-Key; without a status they are being worked on.
replay = Table(
    "replay",
    metadata,
    Column("caller", Text, nullable=False),
    Column("key", Text, nullable=False),
    Column("request", Text, nullable=False),
    Column("at", Float, nullable=False, index=True),
    Column("status", Integer),
    Column("headers", Text),
    Column("body", Text),
    PrimaryKeyConstraint("caller", "key"),
)

"""What Alembic runs: our tables only, in the connection and the transaction that `migrate` has opened."""

from __future__ import annotations

from alembic import context

from adapterctl.migrations import VERSION_TABLE
from adapterctl.registry.stores.sql.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    version_table=VERSION_TABLE,
    # a table that is not ours is none of our business: the database may be shared
    include_object=lambda item, name, kind, reflected, other: kind != "table" or name in metadata.tables,
    render_as_batch=True,
)
context.run_migrations()

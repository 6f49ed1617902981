"""Run by Alembic on the connection that `gladad.service.record` gives it."""

from __future__ import annotations

from alembic import context

from gladad.service.tables import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
context.run_migrations()

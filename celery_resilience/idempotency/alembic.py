"""What a revision of Alembic's calls to make the table of `once`.

    from alembic import op
    from celery_resilience.idempotency import alembic as resilience_once

    def upgrade():
        resilience_once.upgrade(op)

    def downgrade():
        resilience_once.downgrade(op)

Alembic itself is not imported: the revision brings `op`.
"""

from __future__ import annotations

from typing import Any

from celery_resilience.idempotency.once.sql import TABLE
from celery_resilience.idempotency.once.sql_table import (
    INDEX,
    INDEXED,
    OPTIONS,
    columns,
)


def upgrade(op: Any) -> None:
    """Make the table `resilience_once`, with *op* of a revision."""
    op.create_table(TABLE, *columns(), **OPTIONS)
    op.create_index(INDEX, TABLE, list(INDEXED))


def downgrade(op: Any) -> None:
    """Drop the table, and with it every key that is remembered."""
    op.drop_index(INDEX, table_name=TABLE)
    op.drop_table(TABLE)

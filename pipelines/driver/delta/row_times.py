"""Times of new rows, each later than the times of all existing rows even if the clock was set back.

Readers use the times of the rows to find the last decision on a model, the newest caption of a picture and the last
ingest of a table. Without this correction, a row that was written while the clock was ahead would count as newer than
the rows of later jobs.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyspark.sql import DataFrame


def later_than(newest: datetime | None) -> datetime:
    """Return the present time, or one microsecond after `newest` if the clock is not later than `newest`."""
    now = datetime.now(UTC)
    return now if newest is None or newest < now else newest + timedelta(microseconds=1)


def newest_time(rows: DataFrame, column: str) -> datetime | None:
    """Return the newest time in a column, or None if there are no rows."""
    from pyspark.sql import functions as F

    found: datetime | None = rows.agg(F.max(column)).toArrow()[0][0].as_py()
    return found

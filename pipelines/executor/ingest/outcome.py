"""Outcomes of decoding. The outcome of a row is exactly one sample or one refusal, both in the schema OUTCOME."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.formats.tables import TEXT_TYPE

OUTCOME = pa.schema(
    [
        ("source_row", pa.string()),  # <file>#<hash of the row's content>
        # The payload is the row as JSON, or as raw text if the row could not be parsed. A sample's payload omits the
        # picture, which is in `image`.
        ("payload", pa.string()),
        ("image_id", pa.string()),  # the columns from image_id to fingerprint are null if the row is refused
        ("sha256", pa.string()),
        ("image", pa.binary()),
        ("format", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("texts", pa.list_(TEXT_TYPE)),
        ("split", pa.string()),
        ("fingerprint", pa.binary()),
        ("stage", pa.string()),  # stage, reason and detail are null if the row is a sample
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("claimed_id", pa.string()),  # image id that a refused row would have as a sample; null if not known
    ]
)


class Refused(Exception):
    """Exception for a row that cannot become a sample and is written to the table `quarantine`.

    Attributes:
        stage: step of ingest that refused the row (read, decode or merge).
        reason: quarantine reason, one of tables.REASONS.
        detail: exact description of the problem.
    """

    def __init__(self, stage: str, reason: str, detail: str) -> None:
        super().__init__(stage, reason, detail)
        self.stage, self.reason, self.detail = stage, reason, detail


def outcome_batch(outcomes: Sequence[dict[str, Any]]) -> pa.RecordBatch:
    """Convert outcomes to one batch of the schema OUTCOME. A column for which an outcome has no value is null.

    This function copies each picture once. Arrow's own builder would copy all pictures again whenever its buffer grows.
    """
    columns = {field: [outcome.get(field.name) for outcome in outcomes] for field in OUTCOME}
    arrays = [_binary_array(c) if field.name == "image" else pa.array(c, field.type) for field, c in columns.items()]
    return pa.RecordBatch.from_arrays(arrays, schema=OUTCOME)


def _binary_array(values: Sequence[bytes | None]) -> pa.Array:
    parts = [value or b"" for value in values]
    offsets = np.cumsum([0, *map(len, parts)], dtype=np.int32)
    validity = pa.array([value is not None for value in values]).buffers()[1]
    return pa.Array.from_buffers(
        pa.binary(), len(parts), [validity, pa.py_buffer(offsets), pa.py_buffer(b"".join(parts))]
    )

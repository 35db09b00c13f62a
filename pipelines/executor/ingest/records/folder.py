"""Parser of folder sources: each row of a captions file names a picture file in the same folder.

A picture file that is missing or too large is a problem of its row. Any other disk error is a problem of the machine:
the error fails the task, and Spark retries the task. A network drive that is offline for a minute must not fill
`quarantine`.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator
from datetime import UTC, datetime
from hashlib import sha256
from itertools import islice
from pathlib import Path, PurePosixPath

import pyarrow as pa

from pipelines.config import PICTURE
from pipelines.executor.ingest.records.record import Problem, Read, Record

NOT_FOUND = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP})
NO_PICTURE = "no picture"
"""Value of the column `state` of the table `ingested` for a row whose picture cannot be found."""

CAPTION_ROWS = 1024
"""Number of rows in a CAPTIONS batch."""
CAPTIONS = pa.schema(
    [
        ("item", pa.string()),  # <captions file>#<hash of the row>
        ("state", pa.string()),  # change token of the picture
        ("file", pa.string()),  # the columns from `file` to `detail` hold the record
        ("fields", pa.string()),  # JSON
        ("raw", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)
"""Schema of the rows of a captions file, with the change tokens of their pictures."""


def change_token(size: int, modified: int) -> str:
    """Return a file's change token, a text of the size in bytes and the modification time (given in microseconds)."""
    return f"{size} bytes, {datetime.fromtimestamp(modified / 1e6, UTC):%Y-%m-%dT%H:%M:%S}.{modified % 1_000_000:06d}Z"


def list_captions(
    batches: Iterator[pa.RecordBatch], read: Read, captions: str, folder: str, column: str
) -> Iterator[pa.RecordBatch]:
    """Yield the rows of a captions file with the change tokens of their pictures, without opening a picture.

    Args:
        batches: input of `read`.
        read: parser of the captions file.
        captions: path of the captions file.
        folder: folder of the pictures.
        column: field that names a picture file.
    """
    records = read(batches)
    while rows := [_caption_row(record, captions, folder, column) for record in islice(records, CAPTION_ROWS)]:
        yield pa.RecordBatch.from_pylist(rows, CAPTIONS)


def _caption_row(record: Record, captions: str, folder: str, column: str) -> dict[str, str | None]:
    fields = json.dumps(record.fields, ensure_ascii=False, sort_keys=True)
    row_hash = sha256((record.raw or fields).encode()).hexdigest()[:16]
    state = NO_PICTURE if record.problem else _picture_state(folder, record.fields.get(column))
    row = {"item": f"{captions}#{row_hash}", "state": state, "file": record.file, "fields": fields, "raw": record.raw}
    return row | (record.problem._asdict() if record.problem else {})


def caption_records(batches: Iterator[pa.RecordBatch]) -> Iterator[Record]:
    """Convert CAPTIONS rows back to the records from which the rows were made."""
    for batch in batches:
        for row in batch.to_pylist():
            problem = Problem(row["reason"], row["detail"]) if row["reason"] else None
            yield Record(row["file"], json.loads(row["fields"]), row["raw"], problem)


def folder_records(
    batches: Iterator[pa.RecordBatch], read: Read, folder: str, column: str, max_bytes: int
) -> Iterator[Record]:
    """Add the field PICTURE to each record: the bytes of the picture file that the record names.

    Args:
        batches: input of `read`.
        read: function that yields records of the captions file.
        folder: folder of the pictures.
        column: field that names a picture file, relative to the folder.
        max_bytes: largest size of a picture file to read, in bytes.
    """
    for record in read(batches):
        if record.problem:
            yield record
            continue
        found = _read_picture(folder, record.fields.get(column), max_bytes)
        picture, problem = (None, found) if isinstance(found, Problem) else (found, None)
        yield record._replace(fields=record.fields | {PICTURE: picture}, problem=problem)


def _read_picture(folder: str, name: object, max_bytes: int) -> bytes | Problem:
    found = _find_picture(folder, name)
    if isinstance(found, Problem):
        return found
    if found.st_size > max_bytes:
        return Problem("too_large", f"{found.st_size} bytes, at most {max_bytes}")
    return Path(folder, str(name)).read_bytes()


def _picture_state(folder: str, name: object) -> str:
    found = _find_picture(folder, name)
    return NO_PICTURE if isinstance(found, Problem) else change_token(found.st_size, found.st_mtime_ns // 1000)


def _find_picture(folder: str, name: object) -> os.stat_result | Problem:
    """Find a file in the folder or in its subfolders. Return a Problem if the path leads outside the folder."""
    if not isinstance(name, str) or not name.strip():
        return Problem("missing_field", "no file is named")
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\0" in name:
        return Problem("missing_field", f"the file {name!r} is not inside the folder")
    try:
        found = Path(folder, name).stat()
    except OSError as error:
        if error.errno not in NOT_FOUND:
            raise
        return Problem("missing_field", f"the folder has no file {name!r}")
    return found if stat.S_ISREG(found.st_mode) else Problem("missing_field", f"{name!r} is not a regular file")

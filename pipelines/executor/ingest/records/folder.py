"""Parser of folder sources: pictures in a folder, and a captions file whose rows contain the paths of the pictures.

A row whose picture file is missing, not readable or too large is refused. An error that may be a fault of the machine
fails the Spark task, and Spark retries the task. Without a retry, a network drive that is offline for a minute would
fill the table `quarantine`. If the folder of the pictures is missing or empty, the drive is probably not mounted on
this machine, so this is a fault of the machine too.

The pictures are looked up twice: when the rows are listed (`list_captions`) and when the pictures are read
(`folder_records`). A row whose picture is missing or may not be read is refused in the listing, with the state
NO_PICTURE. The ledger stores the change token of any other picture, so a permission that is refused later must fail the
task: an ingest that refused the row would never read the picture again.
"""

from __future__ import annotations

import errno
import json
import os
import posixpath
from collections.abc import Iterator
from datetime import UTC, datetime
from hashlib import sha256
from itertools import islice

import pyarrow as pa

from pipelines.config import PICTURE
from pipelines.executor.ingest.records.pictures.files import HINT, PictureFile, find_file, read_file
from pipelines.executor.ingest.records.record import Problem, Read, Record
from pipelines.executor.ingest.storage import has_entries, printable
from pipelines.executor.ingest.values import is_missing

NO_PICTURE = "no picture"
"""Value of the column `state` of the table `ingested` for a row that could not be parsed or whose picture cannot be
found or may not be read."""

CAPTION_ROWS = 1024
"""Number of rows in a batch of captions."""
RECORDS = pa.schema(
    [
        ("file", pa.string()),
        ("fields", pa.string()),  # JSON
        ("raw", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)
"""Schema of the records of a captions file."""
CAPTIONS = pa.schema(
    [
        ("item", pa.string()),  # <captions file>#<hash of the row>
        ("state", pa.string()),  # change token of the picture, or NO_PICTURE
        *RECORDS,
        ("picture", pa.string()),  # path of the picture file after links are resolved; null if there is no file
    ]
)
"""Schema of the records of a captions file, with the change tokens of their pictures."""


def change_token(size: int, modified: int) -> str:
    """Return the change token of a file, a text with the size in bytes and the modification time in microseconds."""
    return f"{size} bytes, {datetime.fromtimestamp(modified / 1e6, UTC):%Y-%m-%dT%H:%M:%S}.{modified % 1_000_000:06d}Z"


def store_records(records: Iterator[Record]) -> Iterator[pa.RecordBatch]:
    """Convert the records of a captions file to batches of the schema RECORDS."""
    while rows := [_record_row(record) for record in islice(records, CAPTION_ROWS)]:
        yield pa.RecordBatch.from_pylist(rows, RECORDS)


def parse_captions(batches: Iterator[pa.RecordBatch], read: Read) -> Iterator[pa.RecordBatch]:
    """Parse a captions file into batches of the schema RECORDS.

    Args:
        batches: Arrow batches of raw rows, which `read` parses.
        read: function that parses raw rows of the captions file into records.
    """
    yield from store_records(read(batches))


def _fields(record: Record) -> str:
    return json.dumps(record.fields, ensure_ascii=False, sort_keys=True)


def _record_row(record: Record) -> dict[str, str | None]:
    row = {"file": record.file, "fields": _fields(record), "raw": record.raw}
    return row | (record.problem._asdict() if record.problem else {})


def list_captions(
    batches: Iterator[pa.RecordBatch], read: Read, captions: str, folder: str, column: str
) -> Iterator[pa.RecordBatch]:
    """Yield the rows of a captions file with the change tokens of their pictures, without opening a picture.

    Args:
        batches: Arrow batches of raw rows, which `read` parses.
        read: function that parses raw rows of the captions file into records.
        captions: path of the captions file.
        folder: folder of the pictures.
        column: name of the field with the path of the row's picture file.
    """
    records = read(batches)
    while rows := [_caption_row(record, captions, folder, column) for record in islice(records, CAPTION_ROWS)]:
        if not all(row["picture"] for row in rows):
            _require_entries(folder)
        yield pa.RecordBatch.from_pylist(rows, CAPTIONS)


def _caption_row(record: Record, captions: str, folder: str, column: str) -> dict[str, str | None]:
    item = f"{captions}#{sha256(str(record.raw or _fields(record)).encode()).hexdigest()[:16]}"
    name = record.fields.get(column)
    denied = Problem("unreadable_file", f"the file {name!r} cannot be read: {os.strerror(errno.EACCES)}")
    picture, state = None, NO_PICTURE
    try:
        found = _find_picture(folder, subfolder_of(captions, folder), name)
        if isinstance(found, PictureFile):
            picture = printable(str(found.path))
            # A changed permission changes neither size nor time, so a picture that may not be read gets no token.
            if not os.access(found.path, os.R_OK):
                found = denied
    except PermissionError:
        found = denied
    # A row that could not be parsed is not read again when its picture changes.
    if not record.problem:
        if isinstance(found, Problem):
            record = _with_picture(record, found)
        else:
            state = change_token(found.status.st_size, found.status.st_mtime_ns // 1000)
    return _record_row(record) | {"item": item, "state": state, "picture": picture}


def _require_entries(folder: str) -> None:
    """Check that the folder of the pictures has entries. The caller has not found a picture.

    Raises:
        OSError: the folder is missing or empty on this machine, or the drive does not answer.
    """
    if not has_entries(folder):
        text = "the folder of the pictures is empty or missing on this machine"
        raise FileNotFoundError(errno.ENOENT, text, folder)


def _with_picture(record: Record, content: bytes | Problem) -> Record:
    picture, problem = (None, content) if isinstance(content, Problem) else (content, None)
    return record._replace(fields=record.fields | {PICTURE: picture}, problem=problem)


def caption_records(batches: Iterator[pa.RecordBatch]) -> Iterator[Record]:
    """Convert rows of the schema RECORDS or CAPTIONS back to records."""
    for batch in batches:
        for row in batch.to_pylist():
            problem = Problem(row["reason"], row["detail"]) if row["reason"] else None
            yield Record(row["file"], json.loads(row["fields"]), row["raw"], problem)


def folder_records(
    batches: Iterator[pa.RecordBatch], read: Read, folder: str, column: str, max_bytes: int, *, subfolder: str = ""
) -> Iterator[Record]:
    """Add the field PICTURE to each record: the bytes of the picture file that the record names.

    A record that has a problem already is yielded unchanged. If the picture cannot be read, the record gets a problem.
    If this machine has no permission to read a picture, the task fails, because the picture could be read when the rows
    were listed.

    If consecutive records name the same picture, the picture is read once, and the records share one bytes object.

    Args:
        batches: Arrow batches of raw rows, which `read` parses.
        read: function that yields records of the captions file.
        folder: folder of the pictures.
        column: field with the path of a picture file, relative to the folder or to the subfolder.
        max_bytes: largest size of a picture file to read, in bytes.
        subfolder: path of the captions file's folder relative to `folder`, as `subfolder_of` returns it.
    """
    last: tuple[object, bytes | Problem] = None, b""
    for record in read(batches):
        if record.problem:
            yield record
            continue
        found = _find_picture(folder, subfolder, record.fields.get(column))
        if isinstance(found, PictureFile):
            unchanged = found.path, found.status.st_size, found.status.st_mtime_ns
            if unchanged != last[0]:
                last = unchanged, read_file(found, max_bytes)
        else:
            _require_entries(folder)
        yield _with_picture(record, found if isinstance(found, Problem) else last[1])


def subfolder_of(captions: str, folder: str) -> str:
    """Return the path of the subfolder with the captions file, relative to `folder`.

    The path is empty if the captions file is directly in `folder` or is not below `folder`.
    """
    subfolder = posixpath.relpath(posixpath.dirname(captions), folder)
    return "" if subfolder == "." or subfolder.startswith("..") else subfolder


def _find_picture(folder: str, subfolder: str, name: object) -> PictureFile | Problem:
    """Find the picture file that a row names, first relative to `folder`, then relative to `folder/subfolder`.

    Raises:
        OSError: the machine has a fault.
        PermissionError: this machine may not search a folder.
    """
    if is_missing(name):
        return Problem("missing_field", "the row names no file")
    if isinstance(name, float) and name.is_integer():
        name = int(name)
    if not isinstance(name, str | int):
        return Problem("malformed_record", f"a value of type {type(name).__name__} instead of the name of a file")
    name = str(name)
    found = find_file(folder, name)
    if isinstance(found, Problem) and subfolder:
        beside = find_file(folder, f"{subfolder}/{name}")
        found = beside if isinstance(beside, PictureFile) or HINT in beside.detail else found
    return found

"""Pictures that are files of their own, in a folder or in tars: what executors open themselves.

A file that is not there, or too large, is its row's trouble. Any other trouble with a disk is the machine's and fails
the task, which Spark then retries: a drive that is away for a minute must not fill quarantine.
"""

from __future__ import annotations

import errno
import gzip
import json
import os
import re
import stat
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from hashlib import sha256
from itertools import islice
from pathlib import Path, PurePosixPath

import pyarrow as pa

from pipelines.config import PICTURE
from pipelines.executor.ingest.records import Fields, Read, Record, Trouble, json_object

NOT_THERE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP})
BROKEN_TAR = (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile)
MISSING = "no picture"
MEMBER = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)")
"""<key>.<extension>: the extension begins at the first dot of a file's name. Names that begin with a dot are none."""

LISTED_ROWS = 1024
LISTED = pa.schema(
    [
        ("item", pa.string()),  # <captions file>#<hash of the row>
        ("state", pa.string()),  # of the picture
        ("file", pa.string()),  # from here on: the record
        ("fields", pa.string()),  # JSON
        ("raw", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)


def state_of(size: int, changed: int) -> str:
    """What tells whether a file is as it was: its size in bytes and the time of its last change in microseconds."""
    return f"{size} bytes, {datetime.fromtimestamp(changed / 1e6, UTC):%Y-%m-%dT%H:%M:%S}.{changed % 1_000_000:06d}Z"


def listed(
    batches: Iterator[pa.RecordBatch], read: Read, captions: str, folder: str, column: str
) -> Iterator[pa.RecordBatch]:
    """The rows of a captions file with the state of their pictures, no picture opened, as LISTED.

    Args:
        batches: what `read` takes.
        read: the reader of the captions file.
        captions: the captions file.
        folder: where the pictures are.
        column: the field that names a picture's file.
    """
    records = read(batches)
    while rows := [_listed(record, captions, folder, column) for record in islice(records, LISTED_ROWS)]:
        yield pa.RecordBatch.from_pylist(rows, LISTED)


def _listed(record: Record, captions: str, folder: str, column: str) -> dict[str, str | None]:
    fields = json.dumps(record.fields, ensure_ascii=False, sort_keys=True)
    name = sha256((record.raw or fields).encode()).hexdigest()[:16]
    state = MISSING if record.trouble else _state_in(folder, record.fields.get(column))
    row = {"item": f"{captions}#{name}", "state": state, "file": record.file, "fields": fields, "raw": record.raw}
    return row | (record.trouble._asdict() if record.trouble else {})


def listed_records(batches: Iterator[pa.RecordBatch]) -> Iterator[Record]:
    """The records of LISTED rows."""
    for batch in batches:
        for row in batch.to_pylist():
            trouble = Trouble(row["reason"], row["detail"]) if row["reason"] else None
            yield Record(row["file"], json.loads(row["fields"]), row["raw"], trouble)


def with_pictures(
    batches: Iterator[pa.RecordBatch], read: Read, folder: str, column: str, max_bytes: int
) -> Iterator[Record]:
    """Records with the bytes of the pictures that they name, as the further field PICTURE.

    Args:
        batches: what `read` takes.
        read: the reader of the captions file.
        folder: where the pictures are.
        column: the field that names a picture's file, relative to the folder.
        max_bytes: of a file; a larger one is not read.
    """
    for record in read(batches):
        if record.trouble:
            yield record
            continue
        found = _read_file(folder, record.fields.get(column), max_bytes)
        picture, trouble = (None, found) if isinstance(found, Trouble) else (found, None)
        yield record._replace(fields=record.fields | {PICTURE: picture}, trouble=trouble)


def _read_file(folder: str, name: object, max_bytes: int) -> bytes | Trouble:
    """The bytes of a file in the folder or below."""
    found = _found(folder, name)
    if isinstance(found, Trouble):
        return found
    if found.st_size > max_bytes:
        return Trouble("too_large", f"{found.st_size} bytes, at most {max_bytes}")
    return Path(folder, str(name)).read_bytes()


def _state_in(folder: str, name: object) -> str:
    found = _found(folder, name)
    return MISSING if isinstance(found, Trouble) else state_of(found.st_size, found.st_mtime_ns // 1000)


def _found(folder: str, name: object) -> os.stat_result | Trouble:
    """A file in the folder or below; never one outside, whatever a captions file says."""
    if not isinstance(name, str) or not name.strip():
        return Trouble("missing_field", "no file is named")
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\0" in name:
        return Trouble("missing_field", f"the file {name!r} is not inside the folder")
    try:
        found = Path(folder, name).stat()
    except OSError as error:
        if error.errno not in NOT_THERE:
            raise
        return Trouble("missing_field", f"the folder has no file {name!r}")
    return found if stat.S_ISREG(found.st_mode) else Trouble("missing_field", f"{name!r} is no file")


# ------------------------------------------------------------------------------------------------ tars


def tar_records(batches: Iterator[pa.RecordBatch], images: Sequence[str], max_bytes: int) -> Iterator[Record]:
    """Rows of WebDataset tars, one in memory at a time.

    Fields: __key__; PICTURE and __member__ (its name); a field a further member, called by its extension; and
    json.KEY for each key of a `json` member.

    Args:
        batches: column `path`.
        images: extensions of pictures; of several, the first one there is the row's.
        max_bytes: of a member; a larger one is not read.
    """
    for batch in batches:
        for path in batch.column("path").to_pylist():
            yield from _rows_of_tar(Path(path), images, max_bytes)


def _rows_of_tar(path: Path, images: Sequence[str], max_bytes: int) -> Iterator[Record]:
    row: _TarRow | None = None
    whole = 0
    with path.open("rb") as file:
        try:
            with tarfile.open(fileobj=file, mode="r|*") as tar:
                for member in tar:
                    tar.members = []  # type: ignore[attr-defined]  # else it remembers every one it has seen
                    name = MEMBER.fullmatch(member.name.encode(errors="surrogateescape").decode(errors="replace"))
                    if not (name and member.isfile()):
                        continue
                    if row and row.key != name[1]:
                        yield row.record(path.name, images)
                        whole, row = whole + 1, None
                    row = row or _TarRow(name[1])
                    row.add(tar, member, name[2].lower(), max_bytes)
        except BROKEN_TAR as error:
            rest = f"{path.name} from row {whole + 1} on"
            why = f"the tar breaks off after {whole} rows{f', in row {row.key}' if row else ''}: {error}"
            yield Record(path.name, {}, rest, Trouble("malformed_record", why))
            return
    if row:
        yield row.record(path.name, images)


class _TarRow:
    """Members of one key, as they come."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.members: dict[str, tuple[str, bytes]] = {}
        self.trouble: Trouble | None = None

    def add(self, tar: tarfile.TarFile, member: tarfile.TarInfo, extension: str, max_bytes: int) -> None:
        """Read a member, unless it is too large or a second one of its kind."""
        if member.size > max_bytes:
            self.trouble = Trouble("too_large", f"{member.name}: {member.size} bytes, at most {max_bytes}")
        elif extension in self.members:
            self.trouble = Trouble("malformed_record", f"two members of one name: {member.name}")
        else:
            opened = tar.extractfile(member)
            self.members[extension] = (member.name, opened.read() if opened else b"")

    def record(self, file: str, images: Sequence[str]) -> Record:
        """The row as a record."""
        fields: Fields = {"__key__": self.key, "__member__": None, PICTURE: None}
        picture = next((extension for extension in images if extension in self.members), None)
        trouble = self.trouble
        for extension, (name, content) in self.members.items():
            if extension == picture:
                fields |= {"__member__": name, PICTURE: content}
            elif extension in images:
                fields[extension] = content
            else:
                fields[extension] = content.decode("utf-8", errors="replace")
        document = json_object(fields["json"]) if "json" in fields else {}
        if isinstance(document, Trouble):
            trouble = trouble or document
        else:
            fields.pop("json", None)
            fields |= {f"json.{key}": value for key, value in document.items()}
        return Record(file, fields, None, trouble)

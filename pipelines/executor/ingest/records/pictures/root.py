"""Functions that check the root folder or URL of pictures, and add the bytes of the pictures to records."""

from __future__ import annotations

import errno
import os
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import pyarrow as pa

from pipelines.config import PICTURE, PICTURE_FOLDER
from pipelines.errors import UserError
from pipelines.executor.ingest.records.pictures.files import LOCAL_URI, PictureFile, find_file, read_file
from pipelines.executor.ingest.records.pictures.urls import read_url, require_readable, scheme_of
from pipelines.executor.ingest.records.record import Problem, Read, Record
from pipelines.executor.ingest.storage import StorageFault, has_entries, refuse_secrets
from pipelines.executor.ingest.values import is_missing

CHUNK_ROWS = 64
CHUNK_BYTES = 16 * 2**20
UNKNOWN_FOLDER = Problem(
    "missing_field",
    "image_root: the folder of the row's file is not known, because an earlier release refused the row; "
    "`lakesight ingest --refresh` reads the row again",
)
HELD_RECORDS = 16
"""Largest number of consecutive pictures with a StorageFault after which a task reads a readable picture again. The
number is small because a read may take a minute."""
MAX_NAME = 8_192
"""Largest number of characters of a picture's path or URL."""


@dataclass(frozen=True)
class PictureRoot:
    """Root folder or root URL of pictures.

    Attributes:
        location: path of the folder, or URL.
        max_bytes: largest size of a picture in bytes.
        may_be_missing: true if a row is refused when the folder is missing; false if a missing or empty folder counts
            as a fault of the machine, because the driver has checked that the folder is not empty.
    """

    location: str
    max_bytes: int
    may_be_missing: bool = False

    def read(self, name: object) -> bytes | Problem:
        """Read a picture, given its name in a row, or return a Problem that says why the picture cannot be read.

        Raises:
            OSError: the machine or the server has a fault, so Spark has to retry the task.
            StorageFault: an object store cannot be used.
        """
        if isinstance(name, bytes):
            name = name.decode("utf-8", "replace")
        if is_missing(name):
            return Problem("missing_field", "the row names no file")
        if not isinstance(name, str) or name.lstrip()[:5].lower() == "data:":
            kind = "a data URI" if isinstance(name, str) else f"a value of type {type(name).__name__}"
            return Problem("malformed_record", f"{kind} instead of the path or URL that image_root requires")
        if len(name) > MAX_NAME:
            return Problem(
                "malformed_record", f"a path or URL of {len(name)} characters; at most {MAX_NAME} are allowed"
            )
        if scheme_of(self.location):
            return read_url(self.location, name, self.max_bytes)
        return self._read_local(name)

    def _read_local(self, name: str) -> bytes | Problem:
        if self.may_be_missing and not Path(self.location).is_dir():
            return Problem("missing_field", f"image_root: there is no folder {self.location!r}")
        try:
            found = find_file(self.location, name)
            if isinstance(found, PictureFile):
                return read_file(found, self.max_bytes)
        except PermissionError as error:
            return Problem("unreadable_file", f"the file {name!r} cannot be read: {error.strerror}")
        if not self.may_be_missing and not has_entries(self.location):
            raise FileNotFoundError(errno.ENOENT, "image_root is empty or missing on this machine", self.location)
        return found


def plain_location(location: str) -> str:
    """Convert the location that a user gave into a plain path. Return the URL of a server unchanged.

    A leading `~` stands for the home folder of the user.
    """
    local = LOCAL_URI.fullmatch(location)
    return local[1] if local else os.path.expanduser(location)  # noqa: PTH111 (the location may be a URL)


def absolute_location(location: str) -> str:
    """Return a user's location as an absolute location. A relative path is relative to the working folder.

    Raises:
        UserError: the location is a URL with a secret (`refuse_secrets`).
    """
    plain = plain_location(location)
    refuse_secrets(plain, "image_root")
    return plain if is_absolute(plain) else str(Path(plain).absolute())


def join_location(folder: str, location: str) -> str:
    """Join a folder or URL with a location that is relative to this folder or URL. Return an absolute location
    unchanged."""
    if is_absolute(location):
        return location
    start, _, path = folder.rpartition("://")
    joined = posixpath.normpath(posixpath.join(path, location))
    return f"{start}://{joined}" if start else joined


def is_absolute(location: str) -> bool:
    """Return whether a location is a URL or an absolute path."""
    return scheme_of(location) is not None or Path(location).is_absolute()


def require_root(location: str) -> None:
    """Check on the driver that pictures below an absolute location can be read.

    Raises:
        UserError: there is no such folder, the folder is empty, or a URL cannot be used (`require_readable`).
    """
    if scheme_of(location):
        require_readable(location)
        return
    is_folder = Path(location).is_dir()
    if not is_folder or not has_entries(location):
        raise UserError(
            "the folder of the pictures cannot be read",
            where="image_root",
            got=f"{location} is empty" if is_folder else f"no folder {location}",
            fix="mount the drive of the folder, or give a folder that every executor sees, such as a Volume "
            "(/Volumes/...), or a URL",
        )


def picture_records(
    batches: Iterator[pa.RecordBatch],
    read: Read,
    location: str,
    column: str,
    max_bytes: int,
    *,
    base: str | None = None,
    is_replay: bool = False,
) -> Iterator[Record]:
    """Add the field PICTURE to the records of a source, with the bytes of the picture to which a column points.

    A relative `location` is relative to the folder of the row's file. The path of the file is in the column `path` of
    the batches. If `location` is relative and a picture cannot be read, the field PICTURE_FOLDER contains the folder of
    the row's file.

    Args:
        batches: batches that `read` parses.
        read: function that parses raw rows of the source into records.
        location: folder or URL of the pictures.
        column: name of the column with the path or URL of a row's picture.
        max_bytes: largest size of a picture to read, in bytes.
        base: folder of the source, to which PICTURE_FOLDER is relative, or None if the source is a single file. The
            records of a single file have no field PICTURE_FOLDER.
        is_replay: whether the rows come from `quarantine`. A row whose picture an object store does not send is then
            refused again, because it stays in `quarantine`. Otherwise, such a row is held back (`HeldRecords`).
    """
    held = None if is_replay else HeldRecords()
    if is_absolute(location):
        yield from add_pictures(read(batches), PictureRoot(location, max_bytes), column, held)
    else:
        for folder, parts in groupby(_split_by_folder(batches), key=lambda part: part[0]):
            root = PictureRoot(join_location(folder, location), max_bytes, may_be_missing=True)
            failed = {PICTURE_FOLDER: _below(base, folder) or "."} if base is not None else {}
            yield from add_pictures(read(batch for _, batch in parts), root, column, held, failed)
    if held:
        yield from held.finish()


def replayed_picture_records(
    batches: Iterator[pa.RecordBatch],
    read: Read,
    location: str,
    column: str,
    max_bytes: int,
    *,
    base: str,
    single_file: bool,
) -> Iterator[Record]:
    """Add the field PICTURE to the records of replayed rows, like `picture_records` for a relative `location`.

    The folder of a row's file is in the field PICTURE_FOLDER of the row, relative to `base`. A row without this field
    comes from the folder `base` if the source is a single file. If the source has several files, an earlier release has
    refused the row, and the folder is not known. The row is then refused again, because another folder may contain a
    different picture with the same name.
    """
    for record in read(batches):
        below = record.fields.get(PICTURE_FOLDER)
        if below is None and not single_file:
            yield record._replace(fields=record.fields | {PICTURE: None}, problem=UNKNOWN_FOLDER)
            continue
        folder = base if below in (None, ".") else join_location(base, str(below))
        root = PictureRoot(join_location(folder, location), max_bytes, may_be_missing=True)
        yield from add_pictures(iter([record]), root, column, None)


def _below(base: str, folder: str) -> str:
    """Return the path of a folder relative to the folder `base`, or the folder itself if it is not below `base`."""
    above = base.rstrip("/") + "/"
    return f"{folder}/".removeprefix(above).rstrip("/") if f"{folder}/".startswith(above) else folder


class HeldRecords:
    """Records of a task whose pictures an object store did not send.

    An object store may report a forbidden or slow picture by the same error as an expired token or a slow network. The
    records of such pictures are held back until another picture of the task can be read, and are refused then.
    """

    def __init__(self) -> None:
        self._refused: list[Record] = []
        self._fault: StorageFault | None = None
        self._readable: tuple[PictureRoot, object] | None = None

    def add(self, refused: Record, fault: StorageFault) -> list[Record]:
        """Hold a record back, and return the records that can be refused. `finish` explains the error."""
        self._refused.append(refused)
        self._fault = fault
        return self.finish() if len(self._refused) >= HELD_RECORDS else []

    def release(self, root: PictureRoot, name: object) -> list[Record]:
        """Return the held records, because the picture `name` could be read."""
        self._readable = root, name
        refused, self._refused = self._refused, []
        return refused

    def finish(self) -> list[Record]:
        """Return the held records if the last readable picture of the task can be read again.

        Raises:
            StorageFault: this picture cannot be read again, or no picture of the task could be read.
        """
        if not self._refused:
            return []
        assert self._fault
        if self._readable is None or isinstance(self._readable[0].read(self._readable[1]), Problem):
            raise self._fault
        return self.release(*self._readable)


def add_pictures(
    records: Iterator[Record],
    root: PictureRoot,
    column: str,
    held: HeldRecords | None,
    failed: Mapping[str, str] | None = None,
) -> Iterator[Record]:
    """Add the field PICTURE to each record whose column contains the path or URL of a picture.

    If the picture cannot be read, add the fields in `failed` too.

    Args:
        records: parsed records.
        root: folder or URL of the pictures.
        column: name of the column with the path or URL of a row's picture.
        held: held records of the Spark task, or None to refuse each record whose picture an object store does not send.
        failed: fields to add to a record whose picture cannot be read.

    Raises:
        OSError: the machine or the server has a fault.
    """
    for record in records:
        if record.problem or record.fields.get(PICTURE) is not None:
            yield record
            continue
        name, path = record.fields.get(column), record.fields.get(f"{column}.path")
        # Hugging Face's struct already contains the bytes of the picture, so no picture file is read.
        if path is not None and name is not None:
            yield record._replace(fields=record.fields | {PICTURE: name})
            continue
        name = name if path is None else path
        try:
            found = root.read(name)
        except StorageFault as fault:
            if fault.is_outage:
                raise
            refused = _refuse(record, Problem("unreadable_file", str(fault)), failed)
            yield from held.add(refused, fault) if held else [refused]
            continue
        if isinstance(found, Problem):
            yield _refuse(record, found, failed)
            continue
        if held:
            yield from held.release(root, name)
        yield record._replace(fields=record.fields | {PICTURE: found})


def _refuse(record: Record, problem: Problem, failed: Mapping[str, str] | None) -> Record:
    return record._replace(fields={**record.fields, PICTURE: None, **(failed or {})}, problem=problem)


def _split_by_folder(batches: Iterator[pa.RecordBatch]) -> Iterator[tuple[str, pa.RecordBatch]]:
    """Split batches into smaller batches whose rows come from files in the same folder.

    Yield pairs of a folder and its rows.
    """
    for batch in batches:
        folders = [posixpath.dirname(os.fsdecode(path)) for path in batch.column("path").to_pylist()]
        start = 0
        for folder, run in groupby(folders):
            count = len(list(run))
            yield folder, batch.slice(start, count)
            start += count


def read_picture_column(batches: Iterator[pa.RecordBatch], root: PictureRoot) -> Iterator[pa.RecordBatch]:
    """Replace the paths in the column `image` by pictures, and add the column `problem` (text, or null).

    A yielded batch has at most CHUNK_ROWS rows and about CHUNK_BYTES bytes, because all pictures of an input batch
    together may need too much memory.
    """
    for batch in batches:
        rows: list[tuple[bytes | None, str | None]] = []
        start, size = 0, 0
        for name in batch.column("image").to_pylist():
            found = _read_or_refuse(root, name)
            rows.append((None, f"{found.reason}: {found.detail}") if isinstance(found, Problem) else (found, None))
            size += len(rows[-1][0] or b"")
            if len(rows) == CHUNK_ROWS or size >= CHUNK_BYTES:
                yield _with_pictures(batch.slice(start, len(rows)), rows)
                start, size, rows = start + len(rows), 0, []
        if rows:
            yield _with_pictures(batch.slice(start), rows)


def _read_or_refuse(root: PictureRoot, name: object) -> bytes | Problem:
    """Read a picture for a captioning job, which reads a picture with the problem `unreadable_file` again in each job.

    An object store may report a picture that is forbidden or slow by the same error as an expired token or a slow
    network. One such picture must not stop the captioning of all other pictures.

    Raises:
        OSError: no picture can be read, so Spark has to retry the task.
    """
    try:
        return root.read(name)
    except StorageFault as fault:
        if fault.is_outage:
            raise
        return Problem("unreadable_file", str(fault))


def _with_pictures(batch: pa.RecordBatch, rows: Sequence[tuple[bytes | None, str | None]]) -> pa.RecordBatch:
    pictures, problems = zip(*rows, strict=True)
    columns = {name: batch.column(name) for name in batch.schema.names}
    columns |= {"image": pa.array(pictures, pa.binary()), "problem": pa.array(problems, pa.string())}
    return pa.RecordBatch.from_pydict(columns)

"""Parser of WebDataset tars, in which the members with the same key form one row."""

from __future__ import annotations

import gzip
import re
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa

from pipelines.config import PICTURE
from pipelines.executor.ingest.records.record import Fields, Problem, Record, parse_json_object

TAR_ERRORS = (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile)
MEMBER = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)")
"""Pattern of <key>.<extension>. The extension begins after the first dot of the name; hidden files do not match."""


def tar_records(batches: Iterator[pa.RecordBatch], images: Sequence[str], max_bytes: int) -> Iterator[Record]:
    """Read the rows of WebDataset tars as streams, with only one row in memory at a time.

    A record has the fields __key__, PICTURE, __member__ (the name of the picture's member), one field per further
    member (named by its extension), and json.KEY for each key of a `json` member.

    Args:
        batches: batches with the column `path`, the path of a tar.
        images: file extensions of pictures. If a row has several pictures, the picture whose extension comes first in
            this order is used.
        max_bytes: largest size of a tar member to read, in bytes.
    """
    for batch in batches:
        for path in batch.column("path").to_pylist():
            yield from _read_tar(Path(path), images, max_bytes)


def _read_tar(path: Path, images: Sequence[str], max_bytes: int) -> Iterator[Record]:
    row: _TarRow | None = None
    complete = 0
    with path.open("rb") as file:
        try:
            with tarfile.open(fileobj=file, mode="r|*") as tar:
                for member in tar:
                    tar.members = []  # type: ignore[attr-defined]  # otherwise tarfile keeps every member in memory
                    name = MEMBER.fullmatch(member.name.encode(errors="surrogateescape").decode(errors="replace"))
                    if not (name and member.isfile()):
                        continue
                    if row and row.key != name[1]:
                        yield row.record(path.name, images)
                        complete, row = complete + 1, None
                    row = row or _TarRow(name[1])
                    row.add(tar, member, name[2].lower(), max_bytes)
        except TAR_ERRORS as error:
            raw = f"{path.name} from row {complete + 1} on"  # hashed into source_row: do not reword
            detail = f"the tar ends or is damaged after {complete} rows{f', in row {row.key}' if row else ''}: {error}"
            yield Record(path.name, {}, raw, Problem("malformed_record", detail))
            return
    if row:
        yield row.record(path.name, images)


class _TarRow:
    """The members of a tar that have the same key, in the order of the tar."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.members: dict[str, tuple[str, bytes]] = {}
        self.problem: Problem | None = None

    def add(self, tar: tarfile.TarFile, member: tarfile.TarInfo, extension: str, max_bytes: int) -> None:
        """Read a member. A member that is too large or repeats an extension is a problem of the row."""
        if member.size > max_bytes:
            self.problem = Problem("too_large", f"{member.name}: {member.size} bytes, at most {max_bytes}")
        elif extension in self.members:
            self.problem = Problem("malformed_record", f"two members of one name: {member.name}")
        else:
            opened = tar.extractfile(member)
            self.members[extension] = (member.name, opened.read() if opened else b"")

    def record(self, file: str, images: Sequence[str]) -> Record:
        """Convert the row to a record."""
        fields: Fields = {"__key__": self.key, "__member__": None, PICTURE: None}
        picture = next((extension for extension in images if extension in self.members), None)
        problem = self.problem
        for extension, (name, content) in self.members.items():
            if extension == picture:
                fields |= {"__member__": name, PICTURE: content}
            elif extension in images:
                fields[extension] = content
            else:
                fields[extension] = content.decode("utf-8", errors="replace")
        document = parse_json_object(fields["json"]) if "json" in fields else {}
        if isinstance(document, Problem):
            problem = problem or document
        else:
            fields.pop("json", None)
            fields |= {f"json.{key}": value for key, value in document.items()}
        return Record(file, fields, None, problem)

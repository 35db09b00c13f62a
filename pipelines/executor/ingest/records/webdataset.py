"""Parser of WebDataset tars, in which the members with the same key form one row."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from hashlib import sha256
from typing import NamedTuple

import pyarrow as pa

from pipelines.config import PICTURE
from pipelines.executor.ingest.compression import open_decompressed
from pipelines.executor.ingest.encoding import decode_text
from pipelines.executor.ingest.records.record import Fields, Problem, Record, parse_json_object
from pipelines.executor.ingest.records.tar import Member, TarReader
from pipelines.executor.ingest.records.tar_links import Links, LinkTargets
from pipelines.executor.ingest.storage import FILE_ERRORS, require_damage

MEMBER = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL)
"""Pattern of <key>.<extension>.

Everything after the first dot of a name is the extension. The pattern does not match the names of hidden files.
"""
SYSTEM_FOLDER = re.compile(r"(?:^|/)__MACOSX/")
MAX_MEMBERS = 1_000
"""Largest number of tar members that one row may have."""
MAX_KEYS = 200_000
"""Largest number of keys that are remembered, to detect rows whose members are not consecutive in the tar."""
SIDE_BYTES = 16 * 2**20
"""Largest total size of all members of a row except pictures, in bytes. If a member would exceed this total, only the
size and the SHA-256 of the member are stored."""


class _Limits(NamedTuple):
    """Extensions of pictures, names of used columns, and largest sizes of one member and of all members of a row."""

    images: tuple[str, ...]
    named: tuple[str, ...]
    max_bytes: int
    row_bytes: int

    @property
    def needs_json(self) -> bool:
        """Whether a used column comes from a `json` member."""
        return any(name.startswith("json.") for name in self.named)


def tar_records(
    batches: Iterator[pa.RecordBatch], images: Sequence[str], named: Sequence[str], max_bytes: int
) -> Iterator[Record]:
    """Read the rows of WebDataset tars as streams, with only one row in memory at a time.

    A record has the fields __key__, PICTURE, and __member__ (the name of the picture's member). Each additional member
    becomes a field with the member's extension as its name. Each key of a `json` member becomes a field json.KEY. If a
    tar is damaged, the records of the rows before the damage are followed by one record that describes the damage. If a
    row has several pictures, the picture whose extension comes first in `images` is used. A `json` member that is not a
    JSON object becomes the text field `json`. However, if the name of a used column begins with `json.`, a row whose
    `json` member is not a JSON object is refused. A row whose members together are larger than 1.25 times `max_bytes`
    is refused too.

    Args:
        batches: batches with the columns `path` (path of a tar, encoded by os.fsencode) and `file` (name of the tar).
        images: file extensions of pictures.
        named: names of all columns that are used.
        max_bytes: largest size of a tar member to read, in bytes.
    """
    limits = _Limits(tuple(images), tuple(named), max_bytes, max_bytes + max_bytes // 4)
    for batch in batches:
        for row in batch.to_pylist():
            yield from _Tar(os.fsdecode(row["path"]), row["file"], limits).records()


class _Tar:
    """One tar, whose rows are read in one pass, or in three passes if the tar has links (`tar_links.py`)."""

    def __init__(self, path: str, file: str, limits: _Limits) -> None:
        self._path, self._file, self._limits = path, file, limits
        self._links = Links()
        self._row: _TarRow | None = None
        self._complete = 0

    def records(self) -> Iterator[Record]:
        has_links = is_damaged = False
        try:
            for row in self._rows():
                if row.has_links:
                    has_links = True
                else:
                    yield row.record(self._file)
                self._complete += 1
        except FILE_ERRORS as error:
            is_damaged = True
            yield self._damage(require_damage(error))
        if has_links:
            yield from self._linked_records(is_damaged=is_damaged)

    def _linked_records(self, *, is_damaged: bool) -> Iterator[Record]:
        """Yield the records of the rows that contain links.

        Args:
            is_damaged: whether the first pass has already yielded a record for damage of the tar. If false, this method
                yields a record for damage that a later pass finds.
        """
        damage = None
        with LinkTargets(self._links, self._limits.max_bytes) as targets:
            try:
                with open_decompressed(self._path) as file:
                    targets.collect(TarReader(file))
            except FILE_ERRORS as error:
                damage = require_damage(error)
            try:
                for row in self._rows():
                    if row.has_links:
                        row.follow_links(targets)
                        yield row.record(self._file)
            except FILE_ERRORS as error:
                damage = require_damage(error)
        if damage and not is_damaged:
            detail = f"the tar could not be read again for its rows with links: {damage}"
            raw = f"{self._file}: rows with links"
            yield Record(self._file, {}, raw, Problem("unreadable_file", detail))

    def _rows(self) -> Iterator[_TarRow]:
        """Yield the rows of the tar. When an exception is raised, `self._row` is the incomplete row, or None."""
        seen: set[int] = set()
        self._row = None
        with open_decompressed(self._path) as file:
            reader = TarReader(file)
            for member in reader:
                parts = _split_name(member) if member else None
                key = parts[1].removeprefix("./") if parts else None
                if self._row and (member is None or key not in (None, self._row.key)):
                    yield self._row
                    self._row = None
                if member and member.target is not None:
                    self._links.add(member)
                if not (member and parts and key):
                    continue
                if self._row is None:
                    self._row = _TarRow(key, parts[1], self._limits, is_again=hash(key) in seen)
                    if len(seen) < MAX_KEYS:
                        seen.add(hash(key))
                self._row.add(reader, member, parts[2].lower())

    def _damage(self, what: str) -> Record:
        where = f", in row {_readable(self._row.key)}" if self._row else ""
        detail = f"the tar ends or is damaged after {self._complete} rows{where}: {what}"
        # The identifier `source_row` is a hash of this text, so a new wording would add the row to `quarantine` again.
        raw = f"{self._file} from row {self._complete + 1} on"
        return Record(self._file, {}, raw, Problem("unreadable_file", detail))


class _TarRow:
    """The members of a tar that have the same key, in the order of the tar."""

    def __init__(self, key: str, shown_key: str, limits: _Limits, *, is_again: bool) -> None:
        self.key, self._shown_key, self._limits, self._is_again = key, shown_key, limits, is_again
        self._members: dict[str, tuple[str, bytes | Fields]] = {}
        self._targets: dict[str, tuple[str, str]] = {}
        self._count = self._size = self._side = 0
        self._problem: Problem | None = None

    @property
    def has_links(self) -> bool:
        """Whether a member of the row is a link."""
        return bool(self._targets)

    def add(self, reader: TarReader, member: Member, extension: str) -> None:
        """Read a member. If the member cannot be used, store a problem, so that the row will be refused."""
        self._count += 1
        extension, name = _readable(extension), _readable(member.name)
        if self._count > MAX_MEMBERS:
            self._refuse("malformed_record", f"the row has more than {MAX_MEMBERS} members")
        elif member.problem:
            self._refuse("malformed_record", f"{name} is {member.problem}")
        elif extension in self._members or extension in self._targets:
            self._refuse("malformed_record", f"two members have the same name: {name}")
        elif member.target is not None:
            self._targets[extension] = name, member.target
        elif self._fits(name, member.size):
            self._keep(extension, name, reader.read(member))

    def follow_links(self, targets: LinkTargets) -> None:
        """Read the members to which links lead. A row with a link that leads nowhere will be refused."""
        for extension, (name, target) in self._targets.items():
            size = targets.size_of(target)
            if isinstance(size, Problem):
                self._refuse(size.reason, f"{name} is a link to {_readable(target)}: {size.detail}")
            elif self._fits(name, size):
                self._keep(extension, name, targets.read(target))

    def _refuse(self, reason: str, detail: str) -> None:
        self._problem = self._problem or Problem(reason, detail)

    def _fits(self, name: str, size: int) -> bool:
        if size > self._limits.max_bytes:
            self._refuse("too_large", f"{name}: {size} bytes; at most {self._limits.max_bytes} are allowed")
        elif self._size + size > self._limits.row_bytes:
            self._refuse("too_large", f"the members of the row have more than {self._limits.row_bytes} bytes")
        else:
            self._size += size
            return True
        return False

    def _keep(self, extension: str, name: str, content: bytes) -> None:
        kept: bytes | Fields = content
        if extension not in self._limits.images:
            if self._side + len(content) > SIDE_BYTES:
                kept = {"bytes": len(content), "sha256": sha256(content).hexdigest()}
                if extension == "json" and self._limits.needs_json:
                    self._refuse("too_large", f"{name}: {len(content)} bytes; at most {SIDE_BYTES} are allowed")
            else:
                self._side += len(content)
        self._members[extension] = (name, kept)

    def record(self, file: str) -> Record:
        """Convert the row to a record."""
        images = self._limits.images
        fields: Fields = {"__key__": _readable(self._shown_key), "__member__": None, PICTURE: None}
        picture = next((extension for extension in images if extension in self._members), None)
        for extension, (name, content) in self._members.items():
            if extension == picture:
                fields |= {"__member__": name, PICTURE: content}
            elif extension in images or isinstance(content, dict):
                fields[extension] = content
            else:
                fields[extension] = decode_text(content)
        if isinstance(text := fields.get("json"), str):
            document = parse_json_object(text)
            if not isinstance(document, Problem):
                del fields["json"]
                fields |= {f"json.{key}": value for key, value in document.items()}
            elif self._limits.needs_json:
                self._refuse(*document)
        if picture is None or len(self._members) == 1:
            self._explain()
        return Record(file, fields, None, self._problem)

    def _explain(self) -> None:
        """Refuse an incomplete row if its member names show why the picture or the other members are missing."""
        alike = [extension for extension in self._members if extension.rpartition(".")[2] in self._limits.images]
        if self._is_again:
            detail = "its members are in several places of the tar: sort the tar by name"
            self._refuse("malformed_record", f"row {_readable(self.key)}: {detail}")
        elif alike and not any(extension in self._limits.images for extension in alike):
            detail = f"no picture, but {', '.join(alike[:3])}: an extension begins at the first dot of a name"
            self._refuse("missing_field", detail)
        elif not any(extension in self._limits.images for extension in self._members):
            names = ", ".join(list(self._members)[:5])
            detail = f"no picture: the row has the extensions {names}, and none is in data.source.columns.image"
            self._refuse("missing_field", detail)


def _split_name(member: Member) -> re.Match[str] | None:
    """Split the name of a member into key and extension, or return None if the member belongs to no row."""
    return None if member.folder or SYSTEM_FOLDER.search(member.name) else MEMBER.fullmatch(member.name)


def _readable(name: str) -> str:
    """Return a name in which bytes that are not UTF-8 are replaced by U+FFFD."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")

"""Functions for links inside a tar. A hard or symbolic link has the content of another member of the same tar.

A tar is read as a stream, and the target of a link may be anywhere in the tar. The first pass over the tar therefore
skips rows with links. The second pass copies the targets of links to a temporary file, and the third pass reads the
rows with links.
"""

from __future__ import annotations

import posixpath
import tempfile
from types import TracebackType
from typing import Self

from pipelines.executor.ingest.records.record import Problem
from pipelines.executor.ingest.records.tar import Member, TarReader

MAX_LINKS = 100_000
"""Largest number of links that are followed in one tar."""
MAX_HOPS = 16
"""Largest number of links in a chain of links, each of which leads to the next link."""
SPOOL_BYTES = 1 << 30
"""Largest size of the temporary file, in bytes."""


class Links:
    """Links of a tar, each with the name of its target."""

    def __init__(self) -> None:
        self._targets: dict[str, str] = {}

    def add(self, member: Member) -> None:
        """Store a link if fewer than MAX_LINKS links are stored. A link that is not stored counts as broken."""
        if member.target is not None and len(self._targets) < MAX_LINKS:
            self._targets[posixpath.normpath(member.name)] = posixpath.normpath(member.target)

    def follow(self, target: str) -> str:
        """Return the name of the member at the end of a chain of links.

        If the chain has too many links (MAX_HOPS), the result is the name of a link.
        """
        name = posixpath.normpath(target)
        for _ in range(MAX_HOPS):
            if name not in self._targets:
                break
            name = self._targets[name]
        return name

    def ends(self) -> set[str]:
        """Follow all chains of links, and return the names of the members at their ends."""
        return {self.follow(target) for target in self._targets.values()}


class LinkTargets:
    """Context manager for a temporary file that holds the contents of link targets until the block ends."""

    def __init__(self, links: Links, max_bytes: int) -> None:
        self._links, self._max_bytes = links, max_bytes
        self._found: dict[str, tuple[int, int] | Problem] = {}

    def __enter__(self) -> Self:
        self._file = tempfile.TemporaryFile(prefix="lakesight-links-")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._file.close()

    def collect(self, reader: TarReader) -> None:
        """Copy the contents of the link targets from a tar to the temporary file.

        A target that is too large, or whose name occurs several times, is stored as a Problem.

        Raises:
            tarfile.TarError: the tar is damaged. The targets before the damage have been copied.
        """
        wanted = self._links.ends()
        for member in reader:
            if member is None or member.target is not None or member.folder or member.problem:
                continue
            name = posixpath.normpath(member.name)
            if name in wanted:
                self._found[name] = self._copy(reader, member, name)

    def _copy(self, reader: TarReader, member: Member, name: str) -> tuple[int, int] | Problem:
        if name in self._found:
            return Problem("malformed_record", "the tar has several members with this name")
        if member.size > self._max_bytes:
            return Problem("too_large", f"{member.size} bytes; at most {self._max_bytes} are allowed")
        start = self._file.tell()
        if start + member.size > SPOOL_BYTES:
            return Problem("too_large", f"the linked members of the tar have more than {SPOOL_BYTES} bytes")
        self._file.write(reader.read(member))
        return start, member.size

    def size_of(self, target: str) -> int | Problem:
        """Return the size of the member to which a link leads, or a Problem that says what is wrong."""
        found = self._found.get(self._links.follow(target))
        if found is None:
            return Problem("malformed_record", "the tar has no such member")
        return found if isinstance(found, Problem) else found[1]

    def read(self, target: str) -> bytes:
        """Return the content of the member to which a link leads."""
        found = self._found[self._links.follow(target)]
        assert not isinstance(found, Problem)
        position = self._file.tell()
        self._file.seek(found[0])
        content = self._file.read(found[1])
        self._file.seek(position)
        return content

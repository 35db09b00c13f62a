"""Streaming reader of tar files, with memory bounded for every input.

Python's `tarfile` reads a header of any size into memory, and treats a damaged header as the end of the tar. The reader
in this module limits the size of headers, and distinguishes the end of a tar from damage. The reader continues after an
end mark, because tars may be concatenated. The reader uses only `TarInfo.frombuf` of `tarfile`, which parses one block.
"""

from __future__ import annotations

import posixpath
import tarfile
from collections.abc import Iterator, Mapping
from typing import IO, NamedTuple

from pipelines.executor.ingest.compression import archive_of, compression_of

BLOCK = tarfile.BLOCKSIZE
CHUNK = 1 << 20
HEADER_BYTES = 1 << 20
"""Largest size of an extended header, which contains a long name or attributes, in bytes."""
EXTENDED = {tarfile.GNUTYPE_LONGNAME: "path", tarfile.GNUTYPE_LONGLINK: "linkpath"}
"""Name of the attribute in each type of extended header. The attribute belongs to the next member of the tar."""
PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
KINDS = {
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
}
"""Description of each type of member without plain content, such as a device or a sparse file."""


class Member(NamedTuple):
    """A member of a tar.

    A byte of the name that is not UTF-8 is stored as a lone surrogate.

    Attributes:
        name: name of the member.
        size: number of bytes of the content.
        target: name of the member that this member links to, or None if the member is not a link.
        folder: whether the member is a folder.
        problem: reason for which the content of the member cannot be read, or None.
    """

    name: str
    size: int
    target: str | None = None
    folder: bool = False
    problem: str | None = None


class TarReader:
    """Iterator over the members of a tar or of concatenated tars.

    The content of a member can be read only until the next member is requested.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._left = 0  # number of bytes from the position in the file to the next header
        self._is_closed = False  # whether the last block was an end mark
        self._is_start = True  # whether no header has been read yet

    def __iter__(self) -> Iterator[Member | None]:
        """Yield the members of each tar, and None at the end mark of each tar.

        Raises:
            tarfile.TarError: a tar is damaged, or ends without an end mark.
        """
        attributes: dict[str, str] = {}
        problem = None
        while (block := self._read_block()) is not None:
            if not block.strip(b"\0"):
                if not self._is_closed:
                    yield None
                self._is_closed = True
                continue
            header = self._parse_header(block)
            if header.type in (*EXTENDED, *PAX, tarfile.XGLTYPE):
                found = self._read_attributes(header)
                if isinstance(found, str):
                    problem = found
                elif header.type != tarfile.XGLTYPE:  # in practice, a header for all members contains only comments
                    attributes |= found
                continue
            yield self._member(header, attributes, problem)
            attributes, problem = {}, None
        if attributes or problem:
            raise tarfile.ReadError("the tar ends after an extended header")

    def read(self, member: Member) -> bytes:
        """Return the content of the current member."""
        content = self._read(member.size)
        self._left -= member.size
        return content

    def _read_block(self) -> bytes | None:
        """Return the block after the current member, or None at the end of the file."""
        while self._left:
            self._left -= len(self._read(min(self._left, CHUNK)))
        block = self._file.read(BLOCK)
        if not block and not self._is_closed:
            raise tarfile.ReadError("no end mark")
        return block or None

    def _parse_header(self, block: bytes) -> tarfile.TarInfo:
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(self._describe_damage(block, error)) from None
        if header.size < 0:
            raise tarfile.ReadError(f"damaged header: {header.size} bytes")
        self._is_closed = self._is_start = False
        self._left = -(-header.size // BLOCK) * BLOCK
        _skip_sparse_map(self._file, block)
        return header

    def _describe_damage(self, block: bytes, error: tarfile.HeaderError) -> str:
        """Describe a block that is not a header of a tar."""
        if self._is_closed:
            return "the tar has other bytes after its end mark"
        if self._is_start and (kind := archive_of(block)):
            return f"the file is {kind}: unpack it, and write its files into a tar"
        if self._is_start and (compression := compression_of(block)):
            return f"the content is compressed a second time ({compression}): decompress it once"
        return f"damaged header: {error}"

    def _read_attributes(self, header: tarfile.TarInfo) -> dict[str, str] | str:
        """Read an extended header. Return the attributes of the next member, or a text that says why the content of the
        next member cannot be read."""
        if header.size > HEADER_BYTES:
            return f"an extended header of {header.size} bytes; at most {HEADER_BYTES} are allowed"
        content = self._read(header.size)
        self._left -= header.size
        if header.type in EXTENDED:
            return {EXTENDED[header.type]: content.partition(b"\0")[0].decode("utf-8", "surrogateescape")}
        try:
            return _parse_pax(content)
        except ValueError:
            return "a damaged extended header"

    def _member(self, header: tarfile.TarInfo, attributes: Mapping[str, str], problem: str | None) -> Member:
        name = attributes.get("GNU.sparse.name") or attributes.get("path") or header.name
        kind = KINDS.get(header.type)
        if any(key.startswith("GNU.sparse.") for key in attributes):
            kind = KINDS[tarfile.GNUTYPE_SPARSE]
        is_link = header.islnk() or header.issym()
        if header.isdir() or is_link or kind in ("a device", "a pipe"):
            self._left = 0  # a folder, link, device or pipe has no content, whatever size its header gives
        elif "size" in attributes:
            header.size = _parse_size(attributes["size"])
            self._left = -(-header.size // BLOCK) * BLOCK
        if not (header.isreg() or header.isdir() or is_link or kind):
            kind = f"a member of the unknown type {header.type!r}"
        if kind and not problem:
            problem = f"{kind}, not a plain file"
        target = None
        if is_link:
            target = attributes.get("linkpath") or header.linkname
            if header.issym():  # the target of a symbolic link is relative to the link's folder
                target = posixpath.join(posixpath.dirname(name), target)
        return Member(name, header.size, target, header.isdir(), problem)

    def _read(self, size: int) -> bytes:
        content = self._file.read(size)
        if len(content) < size:
            raise tarfile.ReadError("the tar ends inside a member")
        return content


def _skip_sparse_map(file: IO[bytes], block: bytes) -> None:
    """After the header of a sparse file in the old GNU format, skip the blocks that list more parts of the file."""
    is_continued = block[156:157] == tarfile.GNUTYPE_SPARSE and block[482]
    while is_continued:
        block = file.read(BLOCK)
        if len(block) < BLOCK:
            raise tarfile.ReadError("the tar ends inside a header")
        is_continued = block[504]


def _parse_pax(content: bytes) -> dict[str, str]:
    """Parse the records `<length> <key>=<value>` of an extended header.

    Raises:
        ValueError: a record is damaged.
    """
    attributes, at = {}, 0
    while at < len(content) and content[at]:
        space = content.index(b" ", at, at + 20)
        end = at + int(content[at:space])
        key, is_pair, value = content[space + 1 : end - 1].partition(b"=")
        if not (is_pair and space < end <= len(content)) or content[end - 1 : end] != b"\n":
            raise ValueError("damaged record")
        attributes[key.decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
        at = end
    return attributes


def _parse_size(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise tarfile.ReadError(f"damaged extended header: size {text[:40]!r}")
    return int(text)

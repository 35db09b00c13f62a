"""Functions that read compressed files. The compression is recognised by the first bytes of a file, not by its name."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, cast

import pyarrow as pa

from pipelines.executor.ingest.storage import open_binary

MAGIC = {
    "gzip": rb"\x1f\x8b\x08",
    "bz2": rb"BZh[1-9](?:1AY&|\x17rE8)",  # a text may also begin with "BZh"
    "xz": rb"\xfd7zXZ\0",
    "zstd": rb"\x28\xb5\x2f\xfd",
}
"""Pattern of the first bytes of each kind of compressed file."""
ARCHIVES = {
    (0, b"PK\x03\x04"): "a ZIP archive",
    (0, b"7z\xbc\xaf"): "a 7z archive",
    (0, b"Rar!"): "a RAR archive",
    (257, b"ustar"): "a tar",
}
"""Kind of archive for each signature. A signature is a position in the file and the bytes at this position.

A tar in the old format without `ustar`, or an empty ZIP archive, is not recognised.
"""
SKIPPABLE_FRAME = b"\x2a\x4d\x18"
"""Bytes 2 to 4 of a skippable zstd frame. A file that a parallel compressor wrote may begin with a skippable frame."""
XZ_MEMORY = 128 * 2**20
"""Limit of the memory for decompressing an xz file, in bytes. A file that needs more memory is refused. Files that were
written by `xz -9` need 65 MB.
"""
CHUNK = 1 << 20


def compression_of(start: bytes) -> str | None:
    """Return the compression of a file that begins with the bytes `start`, or None if no pattern in MAGIC fits."""
    if start[1:4] == SKIPPABLE_FRAME and 0x50 <= start[0] <= 0x5F:
        return "zstd"
    return next((name for name, magic in MAGIC.items() if re.match(magic, start)), None)


def archive_of(start: bytes) -> str | None:
    """Return the kind of archive of a file that begins with the bytes `start`, or None if no signature fits."""
    return next((name for (at, magic), name in ARCHIVES.items() if start.startswith(magic, at)), None)


@contextmanager
def open_decompressed(path: str) -> Iterator[IO[bytes]]:
    """Open a file or URL, and decompress its content while it is read.

    Raises:
        OSError: the file cannot be opened. Reading may raise other errors, which `describe_damage` describes.
    """
    with open_binary(path) as file:
        start = file.read(8)
        file.seek(0)
        yield decompress(file, start)


def decompress(file: IO[bytes], start: bytes) -> IO[bytes]:
    """Return a stream of the decompressed content of a file, or the file itself if it is not compressed.

    If the file is damaged, `read1` first returns all content before the damage, and then raises an exception.

    Args:
        file: file that is opened for reading and positioned at its beginning.
        start: first bytes of the file.
    """
    kind = compression_of(start)
    if kind == "gzip":
        return cast(IO[bytes], gzip.GzipFile(fileobj=file))
    if kind == "bz2":
        return bz2.BZ2File(file)
    if kind == "xz":
        return io.BufferedReader(_XzReader(file), CHUNK)  # type: ignore[type-var]
    if kind == "zstd":
        return io.BufferedReader(_ZstdReader(file), CHUNK)  # type: ignore[type-var]
    return file


class _ZstdReader(io.RawIOBase):
    """Decompressor of zstd frames.

    The decompressor reads small pieces. If a piece is damaged, Arrow returns no part of this piece.
    """

    PIECE = 4 << 10

    def __init__(self, file: IO[bytes]) -> None:
        self._content = pa.CompressedInputStream(pa.PythonFile(file, "r"), "zstd")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]
        content = self._content.read(min(len(buffer), self.PIECE))
        buffer[: len(content)] = content
        return len(content)


class _XzReader(io.RawIOBase):
    """Decompressor of an xz file with bounded memory. An xz file may consist of several streams."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._decoder: lzma.LZMADecompressor | None = None
        self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]
        while True:
            if self._decoder is None:
                self._rest = self._rest.lstrip(b"\0") or self._file.read(CHUNK).lstrip(b"\0")  # padding
                if not self._rest:
                    return 0
                self._decoder = lzma.LZMADecompressor(lzma.FORMAT_XZ, XZ_MEMORY)
            elif self._decoder.needs_input and not self._rest:
                self._rest = self._file.read(CHUNK)
                if not self._rest:
                    raise EOFError("the compressed file ends early")
            content = self._decoder.decompress(self._rest, len(buffer))
            self._rest = b""
            if self._decoder.eof:
                self._rest, self._decoder = self._decoder.unused_data, None
            if content:
                buffer[: len(content)] = content
                return len(content)

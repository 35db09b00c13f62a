"""Reading of compressed files. The first bytes of a file tell whether it is compressed, not its name."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, cast

import pyarrow as pa

from pipelines.executor.ingest.storage import open_binary

MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
"""First bytes of each kind of compressed file."""
XZ_MEMORY = 128 * 2**20
"""Largest memory of an xz decoder. A file that needs more is refused: `xz -9` needs 65 MB."""
CHUNK = 1 << 20


def compression_of(start: bytes) -> str | None:
    """Return the compression of a file that begins with these bytes, or None if it is not compressed."""
    return next((name for magic, name in MAGIC.items() if start.startswith(magic)), None)


@contextmanager
def open_decompressed(path: str) -> Iterator[IO[bytes]]:
    """Open a file or URL, and decompress its content while it is read.

    Raises:
        OSError: the file cannot be opened. Reading raises further errors, which `describe_damage` describes.
    """
    with open_binary(path) as file:
        start = file.read(8)
        file.seek(0)
        kind = compression_of(start)
        if kind == "gzip":
            yield cast(IO[bytes], gzip.GzipFile(fileobj=file))
        elif kind == "bz2":
            yield bz2.BZ2File(file)
        elif kind == "xz":
            yield io.BufferedReader(_XzReader(file), CHUNK)  # type: ignore[type-var]
        elif kind == "zstd":
            yield io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(file), "zstd"), CHUNK)
        else:
            yield file


class _XzReader(io.RawIOBase):
    """Decompressor of an xz file with bounded memory. A file may consist of several streams."""

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

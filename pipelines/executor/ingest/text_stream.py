"""Text files as streams of UTF-8. Compression and encoding are recognised by the content of a file, not by its name.

A stream is read in pieces, so a small file with gigabytes of decompressed content needs no more memory than any other
file.
"""

from __future__ import annotations

import codecs
import io
from typing import IO, Any, cast

from pipelines.executor.ingest.compression import archive_of, compression_of, decompress
from pipelines.executor.ingest.encoding import encoding_of
from pipelines.executor.ingest.storage import open_binary

HEAD_BYTES = 1024
"""Number of bytes from which compression and encoding are recognised."""
MAX_LAYERS = 3
"""Largest number of nested compressions. A web server may compress a file that is already compressed."""
PIECE_BYTES = 64 * 2**10


def is_plain(start: bytes) -> bool:
    """Return whether a file that begins with `start` is uncompressed UTF-8, so that it can be read in byte ranges."""
    return compression_of(start) is None and encoding_of(start)[0] == "utf-8"


def open_text(path: str) -> IO[bytes]:
    """Open a file as a stream of its decompressed content in UTF-8, without a byte-order mark.

    If the file is damaged, `read1` first returns all content before the damage, and then raises an exception that
    `describe_damage` can describe.

    Raises:
        OSError: the file cannot be opened.
        EOFError: the file is an archive, such as a ZIP file.
    """
    file = open_binary(path)
    try:
        return cast(IO[bytes], _TextStream(file))
    except BaseException:
        file.close()
        raise


class _TextStream(io.BufferedReader):
    """Stream of UTF-8. Closing the stream also closes the underlying file."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        stream = file
        for _ in range(MAX_LAYERS):
            stream, start = _peek(stream)
            if compression_of(start) is None:
                break
            stream = decompress(stream, start)
        stream, start = _peek(stream)
        if archive := archive_of(start):
            raise EOFError(f"the file is {archive}: unpack it")
        encoding, mark = encoding_of(start)
        stream.read(mark)
        super().__init__(_Recoded(stream, encoding) if encoding != "utf-8" else _Joined(b"", stream), PIECE_BYTES)

    def close(self) -> None:
        super().close()
        self._file.close()


def _peek(stream: IO[bytes]) -> tuple[IO[bytes], bytes]:
    """Return the next bytes of a stream, and a stream that is still at the position before these bytes.

    If the stream is damaged after these bytes, a later read of the returned stream raises the error.
    """
    start, damage = b"", None
    try:
        while len(start) < HEAD_BYTES and (more := _read1(stream, HEAD_BYTES - len(start))):
            start += more
    except Exception as error:
        if not start:
            raise
        damage = error
    return io.BufferedReader(_Joined(start, stream, damage), PIECE_BYTES), start


def _read1(stream: IO[bytes], size: int) -> bytes:
    return bytes(getattr(stream, "read1", stream.read)(size))


class _Joined(io.RawIOBase):
    """Stream that first returns bytes that were already read from another stream, and then the rest of that stream. If
    reading the other stream has failed, the error is raised after the bytes that were read before the failure.
    """

    def __init__(self, start: bytes, stream: IO[bytes], damage: Exception | None = None) -> None:
        self._start, self._stream, self._damage = start, stream, damage

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content, self._start = self._start[: len(buffer)], self._start[len(buffer) :]
        if not content and self._damage:
            raise self._damage
        content = content or _read1(self._stream, len(buffer))
        buffer[: len(content)] = content
        return len(content)


class _Recoded(io.RawIOBase):
    """Stream that converts text from another encoding to UTF-8. Invalid characters become U+FFFD."""

    def __init__(self, stream: IO[bytes], encoding: str) -> None:
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder(encoding)(errors="replace")
        self._content = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._content:
            more = _read1(self._stream, PIECE_BYTES)
            if not more:
                if self._decoder.getstate()[0]:
                    raise EOFError("the file ends inside a character")
                return 0
            self._content = self._decoder.decode(more).encode("utf-8", "replace")
        content, self._content = self._content[: len(buffer)], self._content[len(buffer) :]
        buffer[: len(content)] = content
        return len(content)

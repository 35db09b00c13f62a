"""Functions that read the sizes of a Parquet column's pages from the page headers, before Arrow decompresses the pages.

Arrow always decompresses a whole page. The header of a small page may say that the page contains gigabytes, or that its
lists have a billion elements. The class `_Thrift` reads the page headers, which are in Thrift's compact protocol
(https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import IO, Any, NamedTuple

import pyarrow as pa

MAX_PAGE_BYTES = 256 * 2**20
"""Largest decompressed size of a page whose compression ratio exceeds HONEST_RATIO, in bytes."""
MAX_LIST_VALUES = 2**24
"""Largest number of list elements in a column chunk that has more than HONEST_RATIO elements per byte."""
HONEST_RATIO = 4
"""A page with at most this compression ratio is read, however large it is.

After decompression, a page with this compression ratio is not much larger than its file.
"""
HEADER_BYTES = 256
MAX_HEADER_BYTES = 2**20
"""Largest size of a page header, in bytes. A header may contain the smallest and the largest value of the page."""


class PageSizes(NamedTuple):
    """Sizes of the pages of a column chunk.

    Attributes:
        per_value: mean size of a value in bytes without compression, for the page in which this mean is largest.
        dictionary: size of the dictionary page in bytes, or 0 if there is no dictionary page.
        repeats: whether all values are in the dictionary and occur at least REPETITIONS times on average.
        refused: reason for which the column chunk is not read, or None.
    """

    per_value: float
    dictionary: int
    repeats: bool
    refused: str | None


class _Page(NamedTuple):
    kind: int
    size: int
    compressed: int
    values: int
    encoding: int


DATA_PAGE, DICTIONARY_PAGE, DATA_PAGE_V2 = 0, 2, 3
DICTIONARY_ENCODINGS = (2, 8)
REPETITIONS = 4
"""The values of a dictionary count as repeated if they occur at least this many times on average."""


def page_sizes(file: IO[bytes], chunk: Any, *, in_lists: bool) -> PageSizes:
    """Read the sizes of the pages of a column chunk, without reading the pages.

    A damaged page and all later pages are left out, because Arrow reports the damage when it reads the damaged page.

    Args:
        file: Parquet file, opened for reading.
        chunk: Arrow's metadata of the column chunk.
        in_lists: whether the column chunk stores elements of lists.
    """
    pages: list[_Page] = []
    with suppress(pa.ArrowInvalid):
        pages.extend(_pages(file, first_byte(chunk), chunk.total_compressed_size, chunk.num_values))
    data = [page for page in pages if page.kind in (DATA_PAGE, DATA_PAGE_V2)]
    dictionaries = [page for page in pages if page.kind == DICTIONARY_PAGE]
    refused = None
    for page in pages:
        if page.size > max(MAX_PAGE_BYTES, HONEST_RATIO * page.compressed):
            refused = f"a page of {page.compressed:,} bytes claims to hold {page.size:,} bytes"
    if in_lists and chunk.num_values > max(MAX_LIST_VALUES, HONEST_RATIO * chunk.total_compressed_size):
        refused = f"lists of {chunk.total_compressed_size:,} bytes claim to hold {chunk.num_values:,} values"
    return PageSizes(
        per_value=max((page.size / max(page.values, 1) for page in data), default=0.0),
        dictionary=max((page.size for page in dictionaries), default=0),
        repeats=all(page.encoding in DICTIONARY_ENCODINGS for page in data)
        and chunk.num_values >= REPETITIONS * sum(page.values for page in dictionaries) > 0,
        refused=refused,
    )


def first_byte(chunk: Any) -> int:
    """Return the position of the first byte of a column chunk in its file.

    A chunk may begin with a dictionary page. Some programs write position 0 if a chunk has no dictionary page.
    """
    dictionary = chunk.dictionary_page_offset
    data = chunk.data_page_offset
    return int(dictionary if dictionary and 0 < dictionary < data else data)


def _pages(file: IO[bytes], at: int, size: int, values: int) -> Iterator[_Page]:
    """Yield the pages of a column chunk, up to the page with the last byte or the last value of the chunk."""
    end = at + size
    while at < end and values > 0:
        page, header_bytes = _read_header(file, at)
        if page.compressed < 0 or page.size < 0:
            raise pa.ArrowInvalid(f"the page at byte {at} has a size below 0")
        yield page
        at += header_bytes + page.compressed
        values -= page.values if page.kind in (DATA_PAGE, DATA_PAGE_V2) else 0


def _read_header(file: IO[bytes], at: int) -> tuple[_Page, int]:
    length = HEADER_BYTES
    while True:
        file.seek(at)
        content = file.read(length)
        try:
            thrift = _Thrift(content)
            fields = thrift.struct()
            break
        except IndexError:
            if len(content) < length or length > MAX_HEADER_BYTES:
                raise pa.ArrowInvalid(f"the page header at byte {at} is cut") from None
            length *= 16
    detail = fields.get(5) or fields.get(7) or fields.get(8) or {}
    detail = detail if isinstance(detail, dict) else {}
    sizes = [fields.get(1), fields.get(2), fields.get(3), detail.get(1, 0), detail.get(4 if 8 in fields else 2, 0)]
    if not all(isinstance(one, int) for one in sizes):
        raise pa.ArrowInvalid(f"there is no page header at byte {at}")
    return _Page(*sizes), thrift.at


class _Thrift:
    """Reader of a struct in Thrift's compact protocol. Fields are booleans, numbers or structs.

    The values of doubles and byte strings are skipped and become None.
    """

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.at = 0

    def struct(self, depth: int = 0) -> dict[int, Any]:
        fields: dict[int, Any] = {}
        number = 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._zigzag()
            fields[number] = self._value(head & 15, depth)
        return fields

    def _value(self, kind: int, depth: int) -> Any:
        value: Any = None
        if kind in (1, 2):  # in Thrift, the type code of a boolean says whether it is true, and no value follows
            value = kind == 1
        elif kind == 3:
            value = self._byte()
        elif kind in (4, 5, 6):
            value = self._zigzag()
        elif kind in (7, 8):
            self._skip(8 if kind == 7 else self._varint())
        elif kind == 12 and depth < 8:
            value = self.struct(depth + 1)
        else:  # a valid page header contains neither lists nor maps
            raise pa.ArrowInvalid(f"a page header has a field of the type {kind}")
        return value

    def _byte(self) -> int:
        value = self.content[self.at]
        self.at += 1
        return value

    def _skip(self, length: int) -> None:
        self.at += length
        if self.at > len(self.content):
            raise IndexError

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
            if shift > 63:
                raise pa.ArrowInvalid("a page header has a number of more than 64 bits")

    def _zigzag(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)

"""A Parquet file whose columns are read one by one, in batches of bounded size.

Columns are selected by position, because column names may contain dots, may be repeated, and may differ only in case.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.executor.ingest.records.arrow_values import stored_type
from pipelines.executor.ingest.records.parquet_pages import PageSizes, first_byte, page_sizes
from pipelines.executor.ingest.storage import is_url, open_binary, printable

BATCH_BYTES = 16 * 2**20
BATCH_ROWS = 1024
DICTIONARY_BYTES = 64 * 2**20
"""Lists of texts are read as Arrow dictionary arrays if the texts of a row group have at most this number of bytes.

If the file's dictionary page lacks some values, Arrow adds these values to the dictionary of the array. The dictionary
may therefore become as large as the column chunk.
"""

SIGNATURE_BYTES = 28
"""Size in bytes of the signature that follows the metadata of a file with encrypted columns."""


class ParquetColumns:
    """An opened Parquet file.

    Args:
        path: path or URL of the file.
        buffer_bytes: size of the read buffer of each column, in bytes.

    Attributes:
        names: names of the columns of the file.
    """

    def __init__(self, path: str, buffer_bytes: int = 2**20) -> None:
        native = not is_url(path) and printable(path) == path  # Arrow cannot open a file whose name is not UTF-8
        self.file = _open_native(path) if native else open_binary(path)
        self.buffer_bytes = buffer_bytes
        self._readers: dict[tuple[int, bool], pq.ParquetFile] = {}
        try:
            self.plain = self._open([])
            self.metadata = self.plain.metadata
            self._refuse_encrypted()
            fields = list(self.plain.schema_arrow)
        except BaseException:
            self.close()
            raise
        self.names = [field.name for field in fields]
        ends = [0]
        for field in fields:
            ends.append(ends[-1] + _count_leaves(field.type))
        self.leaves = [range(*pair) for pair in pairwise(ends)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self.file.close()

    def _open(self, dictionaries: Sequence[int], metadata: pq.FileMetaData | None = None) -> pq.ParquetFile:
        return pq.ParquetFile(
            self.file,
            metadata=metadata,
            read_dictionary=list(dictionaries),
            buffer_size=self.buffer_bytes,
            coerce_int96_timestamp_unit="us",
        )

    def _refuse_encrypted(self) -> None:
        """Refuse a file with encrypted columns, because Arrow ends the process when an encrypted column is accessed."""
        self.file.seek(-8, os.SEEK_END)
        if int.from_bytes(self.file.read(4), "little") == self.metadata.serialized_size + SIGNATURE_BYTES:
            raise pa.ArrowInvalid("columns of the file are encrypted")

    def rows(self, group: int) -> int:
        """Return the number of rows of a row group."""
        return int(self.metadata.row_group(group).num_rows)

    def groups(self, position: int, start: int, end: int) -> list[int]:
        """Return the row groups whose column at `position` begins in a byte range of the file."""
        leaf = self.leaves[position][0]
        begins = [first_byte(self._chunk(group, leaf)) for group in range(self.metadata.num_row_groups)]
        return [group for group, begin in enumerate(begins) if start <= begin < end]

    def arrays(self, group: int, position: int, parts: Sequence[str] = ()) -> Iterator[pa.Array]:
        """Yield the values of a column of a row group, in batches.

        Args:
            group: number of the row group, from 0.
            position: position of the column in the file, from 0.
            parts: names of the fields to read from a struct. If the struct lacks the first field, all fields are read.

        Raises:
            pa.ArrowException, OSError: the column is damaged, or its pages are too large.
        """
        leaves = self._leaves(position, parts)
        sizes = [self._sizes(group, leaf) for leaf in leaves]
        kept = self._keeps_dictionaries(group, dict(zip(leaves, sizes, strict=True)))
        width = sum(self._row_bytes(group, leaf, size, kept=kept) for leaf, size in zip(leaves, sizes, strict=True))
        rows = min(max(int(BATCH_BYTES // width), 1), BATCH_ROWS)
        rows = 1 << rows.bit_length() - 1
        reader = self._reader(rows, kept=kept).reader
        for batch in reader.iter_batches(rows, [group], column_indices=leaves, use_threads=False):
            yield batch.column(0)

    def _reader(self, rows: int, *, kept: bool) -> pq.ParquetFile:
        """Return the reader for batches of `rows` rows.

        Each batch size needs its own reader, because a reader cannot change its batch size.
        """
        if (rows, kept) not in self._readers:
            self._readers[rows, kept] = self._open(self._texts if kept else [], metadata=self.metadata)
        return self._readers[rows, kept]

    def _leaves(self, position: int, parts: Sequence[str]) -> list[int]:
        leaves = list(self.leaves[position])
        if parts:
            paths = {self._column(leaf).path.rpartition(".")[2]: leaf for leaf in leaves}
            leaves = sorted(paths[part] for part in parts if part in paths) if parts[0] in paths else leaves
        return leaves

    def _sizes(self, group: int, leaf: int) -> PageSizes:
        column = self._column(leaf)
        sizes = page_sizes(self.file, self._chunk(group, leaf), in_lists=column.max_repetition_level > 0)
        if sizes.refused:
            raise pa.ArrowInvalid(f"column {column.path}: {sizes.refused}")
        return sizes

    def _keeps_dictionaries(self, group: int, sizes: Mapping[int, PageSizes]) -> bool:
        """Return whether to read a column as an Arrow dictionary array.

        A dictionary array stores a repeated value only once. A column with lists of texts is read as a dictionary array
        if its texts take at most DICTIONARY_BYTES. A column without lists is read as a dictionary array if its values
        repeat and the dictionary in the file is larger than BATCH_BYTES.
        """
        texts = [leaf for leaf in sizes if leaf in self._texts]
        if not any(self._column(leaf).max_repetition_level for leaf in texts):
            return any(sizes[leaf].repeats and sizes[leaf].dictionary > BATCH_BYTES for leaf in texts)
        return sum(int(self._chunk(group, leaf).total_uncompressed_size) for leaf in texts) <= DICTIONARY_BYTES

    def _row_bytes(self, group: int, leaf: int, sizes: PageSizes, *, kept: bool) -> float:
        """Estimate the number of bytes that a row takes in a batch."""
        chunk = self._chunk(group, leaf)
        repeated = 0 if kept and leaf in self._texts else sizes.dictionary
        value: float = max(sizes.per_value, repeated, self._column(leaf).length, 8)
        values: float = max(chunk.num_values / max(self.rows(group), 1), 1)
        return value * values

    @cached_property
    def _texts(self) -> list[int]:
        """Positions of the Parquet columns that Arrow can read as dictionaries: strings and binary values."""
        columns = enumerate(self.plain.schema)
        return [leaf for leaf, c in columns if c.physical_type == "BYTE_ARRAY" and c.logical_type.type != "DECIMAL"]

    def _column(self, leaf: int) -> Any:
        return self.plain.schema.column(leaf)

    def _chunk(self, group: int, leaf: int) -> Any:
        return self.metadata.row_group(group).column(leaf)


def _open_native(path: str) -> pa.OSFile:
    """Open a local file.

    If the file cannot be opened, add the path of the file to the error. Arrow's error has no path, but
    `describe_damage` needs the path.
    """
    try:
        return pa.OSFile(path)
    except OSError as error:
        error.filename = path
        raise


def _count_leaves(kind: pa.DataType) -> int:
    """Return how many Parquet columns are needed to store a column of an Arrow type."""
    kind = stored_type(kind)
    return sum(_count_leaves(kind.field(index).type) for index in range(kind.num_fields)) or 1

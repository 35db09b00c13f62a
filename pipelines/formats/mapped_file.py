"""Memory-mapped shard files. The limit of open files is raised, because each mapped file counts as an open file."""

from __future__ import annotations

import errno
import mmap
import resource
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from pipelines.errors import StageFailed, UserError


class MappedFile(NamedTuple):
    """A memory-mapped shard file or a memory-mapped local copy of a shard file.

    Rows are read in random order, so read-ahead is disabled for the mapping. The kernel is asked to read each picture
    as one range instead of page by page.
    """

    path: Path
    memory: mmap.mmap
    address: int
    batches: pa.ipc.RecordBatchFileReader

    @classmethod
    def of(cls, path: Path) -> MappedFile:
        """Map a shard file into memory.

        `pa.memory_map` is not used because it makes the kernel read a whole record batch for each row.

        Raises:
            StageFailed: the file is not a shard file.
            UserError: the process has reached its limit of open or mapped files.
        """
        try:
            with path.open("rb") as file:
                # The mapping is private, because a file system with direct I/O, such as a Databricks Volume, refuses a
                # shared mapping.
                memory = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
            memory.madvise(mmap.MADV_RANDOM)
            buffer = pa.py_buffer(memory)
            return cls(path, memory, buffer.address, pa.ipc.open_file(buffer))
        except (ValueError, OSError) as error:  # Arrow's errors and the error of an empty file are ValueErrors
            if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
                limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
                raise UserError(
                    "the shards have more files than a process may open on this host",
                    where=str(path.parent),
                    got=f"{error.strerror}, with a limit of {limit:,} open files",
                    fix="raise the limit (`ulimit -Hn`, vm.max_map_count), or raise data.shards.rows for fewer files",
                ) from None
            raise damaged_shard(path, f"{type(error).__name__}: {error}") from error

    def pixels(self, batch: int, offset: int) -> tuple[pa.RecordBatch, pa.Buffer]:
        """Return a record batch, and the stored picture of one of its rows as a view of the memory-mapped file.

        Args:
            batch: number of the record batch in the file, from 0.
            offset: number of the row in the record batch, from 0.
        """
        rows = self.batches.get_batch(batch)
        column = rows.column("pixels")
        *_, offsets, data = column.buffers()
        if pa.types.is_fixed_size_binary(column.type):
            start, end = (column.type.byte_width * row for row in (offset, offset + 1))
        else:
            start, end = np.frombuffer(offsets, np.int32, 2, 4 * offset).tolist()
        stored = data.slice(start, end - start)
        position = stored.address - self.address
        into_page = position % mmap.PAGESIZE  # madvise needs a page-aligned start
        self.memory.madvise(mmap.MADV_WILLNEED, position - into_page, into_page + stored.size)
        return rows, stored


def damaged_shard(path: Path, got: str, *, row: int | None = None) -> StageFailed:
    """Build the error for a shard file that differs from its manifest or has a row that cannot be read."""
    return StageFailed(
        "a training shard is damaged",
        where=str(path) if row is None else f"{path}, row {row}",
        got=got,
        fix=f"remove {path.parent} and run `lakesight shard` again",
    )


def raise_open_file_limit(files: int) -> None:
    """Raise the soft limit of open files by the number `files`, but not above the hard limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY:
        limit = soft + files if hard == resource.RLIM_INFINITY else min(soft + files, hard)
        # If macOS rejects a limit that macOS itself reports, `MappedFile.of` raises a UserError for the first file
        # above the present limit.
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))

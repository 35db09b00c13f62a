"""The training-shard format: a folder of Arrow IPC files and a manifest, written last.

A rank memory-maps the files and reads any row at once: its file is found by bisection, and every record batch of a
file has BATCH_ROWS rows but the last. With `raw` encoding a row's pixels are its bytes; nothing is decoded. The
folder's name is a hash of what determines its content. A manifest may name files of folders beside its own: so several
sources are mixed, and no pixel is copied.
"""

from __future__ import annotations

import errno
import io
import mmap
import resource
import time
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image
from pydantic import ValidationError

from pipelines.config import Split, short_hash
from pipelines.errors import StageFailed, UserError
from pipelines.formats.tables import TEXT_TYPE
from vlm.config import Config, ImageConfig
from vlm.files import atomic_write, file_digest

BATCH_ROWS = 64
MANIFEST = "manifest.json"
FORMAT: Literal[2] = 2


class ShardRequest(Config):
    """What determines the content of a shard folder."""

    table: str
    table_id: str
    table_version: int
    source: str
    split: Split
    image: ImageConfig
    encoding: Literal["raw", "jpeg"]
    rows: int
    seed: int
    where: str = ""
    draft: bool = False

    @property
    def folder_name(self) -> str:
        """`<source>-<split>-<hash>`: the same request finds the same folder."""
        return f"{self.source}-{self.split}-{short_hash(FORMAT, self.model_dump())}"


class ShardFile(Config):
    """One file of a shard folder, or of a folder beside it: its path from there."""

    file: str
    rows: int
    bytes: int
    sha256: str


class Part(Config):
    """One source of a mix: its rows follow those of the parts before it. `draws` of them are shown in an epoch."""

    source: str
    rows: int
    draws: int


class Manifest(Config):
    """What a shard folder holds; its presence says the folder is complete.

    Attributes:
        format: of the folder.
        request: what its rows were asked for by; of a mix, the first part's.
        files: in order.
        parts: of a mix; else none.
    """

    format: Literal[2] = FORMAT
    request: ShardRequest
    files: tuple[ShardFile, ...]
    parts: tuple[Part, ...] = ()

    @cached_property
    def num_rows(self) -> int:
        """Rows in all files."""
        return sum(file.rows for file in self.files)

    @property
    def content_hash(self) -> str:
        """A hash of every file's content: equal hashes mean equal training data."""
        parts = [(part.rows, part.draws) for part in self.parts]
        return short_hash([file.sha256 for file in self.files], *parts)


class Mapped(NamedTuple):
    """A shard file, or a copy of it, in memory as far as it is read.

    The kernel is told to read nothing beside what is asked for, because the next row is somewhere else; and a picture
    is asked for at once, not page by page.
    """

    path: Path
    memory: mmap.mmap
    address: int
    batches: pa.ipc.RecordBatchFileReader

    @classmethod
    def of(cls, path: Path) -> Mapped:
        """Map a file. Not by `pa.memory_map`: it has the kernel read a whole batch at each row that is asked for.

        Raises:
            StageFailed: it is no shard file.
            UserError: the process may open or map no more files.
        """
        try:
            with path.open("rb") as file:
                memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            memory.madvise(mmap.MADV_RANDOM)
            buffer = pa.py_buffer(memory)
            return cls(path, memory, buffer.address, pa.ipc.open_file(buffer))
        except (ValueError, OSError) as error:  # Arrow's errors are ValueErrors; so is that of an empty file
            if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
                limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
                raise UserError(
                    "the shards have more files than a process may open here",
                    where=str(path.parent),
                    got=f"{error.strerror}, with a limit of {limit:,} open files",
                    fix="raise it (`ulimit -Hn`, vm.max_map_count), or write fewer and larger files: data.shards.rows",
                ) from None
            raise damaged(path, f"{type(error).__name__}: {error}") from error

    def pixels(self, batch: int, offset: int) -> tuple[pa.RecordBatch, pa.Buffer]:
        """A batch by its number, and what it holds of the picture of one of its rows: a view, not a copy."""
        rows = self.batches.get_batch(batch)
        column = rows.column("pixels")
        *_, places, data = column.buffers()
        if pa.types.is_fixed_size_binary(column.type):
            start, end = (column.type.byte_width * row for row in (offset, offset + 1))
        else:
            start, end = np.frombuffer(places, np.int32, 2, 4 * offset).tolist()
        stored = data.slice(start, end - start)
        place = stored.address - self.address
        begun = place % mmap.PAGESIZE
        self.memory.madvise(mmap.MADV_WILLNEED, place - begun, begun + stored.size)
        return rows, stored


class Row(NamedTuple):
    """One training row: id, pixels (HWC, uint8), and (prompt, text) pairs."""

    image_id: str
    pixels: npt.NDArray[np.uint8]
    texts: list[tuple[str, str]]


def shard_schema(request: ShardRequest) -> pa.Schema:
    """Columns of a shard file: image_id, pixels (fixed-size bytes for raw), texts."""
    side = request.image.size
    pixels = pa.binary(side * side * 3) if request.encoding == "raw" else pa.binary()
    return pa.schema([("image_id", pa.string()), ("pixels", pixels), ("texts", pa.list_(TEXT_TYPE))])


def encode_pixels(pixels: npt.NDArray[np.uint8], encoding: Literal["raw", "jpeg"]) -> bytes:
    """Pixels (HWC, uint8) as a shard stores them."""
    if encoding == "raw":
        return pixels.tobytes()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


def write_shard_file(folder: Path, index: int, request: ShardRequest, rows: Iterable[pa.RecordBatch]) -> ShardFile:
    """Write one shard file atomically (temporary name, then rename): a retried task repeats it without harm.

    Args:
        folder: the shard folder, existing.
        index: the file's number.
        request: what the folder holds.
        rows: batches of `shard_schema`, any sizes, in order.
    """
    schema = shard_schema(request)
    path = folder / f"shard-{index:06d}.arrow"
    count = 0
    with atomic_write(path) as temporary:
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            for batch in _rebatch(rows, schema):
                writer.write_batch(batch)
                count += batch.num_rows
        digest = file_digest(temporary)
        size = temporary.stat().st_size
    return ShardFile(file=path.name, rows=count, bytes=size, sha256=digest)


def _rebatch(batches: Iterable[pa.RecordBatch], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """The same rows in batches of exactly BATCH_ROWS, the last one shorter."""
    pending: list[pa.RecordBatch] = []
    held = 0
    for batch in batches:
        pending.append(batch)
        held += batch.num_rows
        while held >= BATCH_ROWS:
            table = pa.Table.from_batches(pending, schema)
            yield table.slice(0, BATCH_ROWS).combine_chunks().to_batches()[0]
            pending = table.slice(BATCH_ROWS).to_batches()
            held -= BATCH_ROWS
    if held:
        yield pa.Table.from_batches(pending, schema).combine_chunks().to_batches()[0]


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Commit a shard folder: after this it is complete, before it is rubbish to be cleaned up."""
    with atomic_write(folder / MANIFEST) as temporary:
        temporary.write_text(manifest.model_dump_json(indent=2), encoding="utf-8")


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a complete shard folder.

    Raises:
        UserError: no folder, no manifest, or one of another format.
    """
    path = folder / MANIFEST
    try:
        return Manifest.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            "there are no training shards", where=str(folder), got=f"no {MANIFEST}", fix="run `lakesight shard` first"
        ) from None
    except ValidationError as error:
        raise UserError(
            "the shards' manifest cannot be read",
            where=str(path),
            got=f"{error.error_count()} problems",
            fix=f"remove the folder and run `lakesight shard` again (this version reads format {FORMAT})",
        ) from None


@dataclass(frozen=True)
class Shards:
    """Random access to the rows of a shard folder; pickles as its path."""

    folder: Path
    _mapped: dict[int, Mapped] = field(default_factory=dict, init=False, repr=False, compare=False)
    """Files by number, each from its first row on."""

    @classmethod
    def open(cls, folder: Path) -> Shards:
        """Open a folder and check that every file the manifest names is there, whole.

        Raises:
            UserError: no manifest. StageFailed: a file is missing or has another size.
        """
        shards = cls(folder)
        _let_open(len(shards.manifest.files))
        for file in shards.manifest.files:
            path = folder / file.file
            size = path.stat().st_size if path.exists() else -1
            if size != file.bytes:
                raise damaged(path, "no file" if size < 0 else f"{size} bytes, the manifest says {file.bytes}")
        return shards

    def verify(self, seconds: float) -> None:
        """Compare the content of every file with the manifest, as many as can be read in so many seconds.

        Raises:
            StageFailed: names the first that is not what the manifest says.
        """
        until = time.monotonic() + seconds
        for file in self.manifest.files:
            if time.monotonic() < until:
                verify_file(self.folder / file.file, file)

    @cached_property
    def manifest(self) -> Manifest:
        """The folder's manifest."""
        return read_manifest(self.folder)

    @cached_property
    def _starts(self) -> list[int]:
        """The first row of each file."""
        return list(accumulate((file.rows for file in self.manifest.files[:-1]), initial=0))

    def __len__(self) -> int:
        return self.manifest.num_rows

    def __reduce__(self) -> tuple[type[Shards], tuple[Path]]:
        return Shards, (self.folder,)

    def row(self, index: int) -> Row:
        """Row `index` (0 <= index < len): one bisection, one division and a read of that row alone."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        file = bisect_right(self._starts, index) - 1
        within = index - self._starts[file]
        number, offset = divmod(within, BATCH_ROWS)
        mapped = self._file(file)
        try:
            return self._read(mapped, number, offset)
        except (ValueError, OSError, IndexError) as error:  # Arrow's and Pillow's are among them
            raise damaged(mapped.path, f"{type(error).__name__}: {error}", row=within) from error

    def read_from(self, file: int, copy: Path) -> None:
        """From now on read the rows of one file, by its number, from a copy; others may read rows meanwhile."""
        self._mapped[file] = Mapped.of(copy)

    def _file(self, number: int) -> Mapped:
        if mapped := self._mapped.get(number):
            return mapped
        mapped = Mapped.of(self.folder / self.manifest.files[number].file)
        return self._mapped.setdefault(number, mapped)  # where others were faster, theirs: a copy may have come

    def _read(self, mapped: Mapped, number: int, offset: int) -> Row:
        request = self.manifest.request
        batch, stored = mapped.pixels(number, offset)
        if request.encoding == "raw":
            side = request.image.size
            pixels = np.frombuffer(stored, np.uint8).reshape(side, side, 3)
        else:
            pixels = np.asarray(Image.open(io.BytesIO(stored)).convert("RGB"))
        texts = [(pair["prompt"], pair["text"]) for pair in batch.column("texts")[offset].as_py()]
        return Row(batch.column("image_id")[offset].as_py(), pixels, texts)

    def texts(self) -> Iterator[str]:
        """Every prompt and text, in shard order, without touching a pixel: what a tokenizer learns from."""
        for file in range(len(self.manifest.files)):
            batches = self._file(file).batches
            for number in range(batches.num_record_batches):
                for pairs in batches.get_batch(number).column("texts").to_pylist():
                    for pair in pairs:
                        if pair["prompt"]:
                            yield pair["prompt"]
                        yield pair["text"]


def damaged(path: Path, got: str, *, row: int | None = None) -> StageFailed:
    """The error of a shard file, or of a row in it, that is not what its manifest says."""
    return StageFailed(
        "a training shard is damaged",
        where=str(path) if row is None else f"{path}, row {row}",
        got=got,
        fix=f"remove {path.parent} and run `lakesight shard` again",
    )


def verify_file(path: Path, file: ShardFile, copy: Path | None = None) -> None:
    """Compare the content of a shard file, or of a copy of it, with what its manifest says.

    Raises:
        StageFailed: they differ.
    """
    if file_digest(copy or path) != file.sha256:
        raise damaged(path, "other content than the manifest says (SHA-256)")


def _let_open(files: int) -> None:
    """Have the system allow this process so many more open files, up to its hard limit: each mapped file is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY:
        limit = soft + files if hard == resource.RLIM_INFINITY else min(soft + files, hard)
        with suppress(ValueError, OSError):  # macOS promises more than it gives: opening will tell
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))

"""Format of training shards: a folder of Arrow IPC files, and a manifest that is written last.

A rank memory-maps the files and finds any row fast. The rank finds the file of the row by bisection, and the record
batch by division. Every record batch of a file has BATCH_ROWS rows, except the last record batch. With the encoding
`raw`, the stored bytes are the pixels, so no decoding is necessary. The name of a shard folder contains a hash of
everything that determines the folder's content. The manifest of a mix lists files in other shard folders, so several
sources are mixed without copying pixels.
"""

from __future__ import annotations

import io
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image
from pydantic import ValidationError

from pipelines.config import Split, TextWeights, short_hash
from pipelines.errors import UserError
from pipelines.formats.mapped_file import MappedFile, damaged_shard, raise_open_file_limit
from pipelines.formats.tables import TEXT_TYPE
from vlm.config import ADDED_LATER, Config, ImageConfig
from vlm.files import atomic_write, file_digest

BATCH_ROWS = 64
MANIFEST = "manifest.json"
FORMAT: Literal[2] = 2

T = TypeVar("T")


class ShardRequest(Config):
    """Everything that determines the content of a shard folder.

    Attributes:
        table_commit: id of the commit that made `table_version`. A table that was restored from a copy may have another
            version with the same number.
        image: image config of the model, or None for shards of text.
        left_out: ids of the training pictures that are left out of a mix, because they are copies of a validation or
            test picture of another source.
    """

    table: str
    table_id: str
    table_version: int
    source: str
    split: Split
    image: ImageConfig | None
    encoding: Literal["raw", "jpeg"]
    rows: int
    seed: int
    where: str = ""
    draft: bool = False
    text_weights: Annotated[TextWeights, ADDED_LATER] = "frequency"
    left_out: Annotated[tuple[str, ...], ADDED_LATER] = ()
    table_commit: Annotated[str | None, ADDED_LATER] = None

    @property
    def folder_name(self) -> str:
        """Folder name `<source>-<split>-<hash>`. Equal requests have equal folder names."""
        return f"{self.source}-{self.split}-{short_hash(FORMAT, self.hashed_settings())}"


class ShardFile(Config):
    """Manifest entry of a shard file: path relative to the shard folder, number of rows, size in bytes, and SHA-256."""

    file: str
    rows: int
    bytes: int
    sha256: str


class MixPart(Config):
    """One source of a mix. The manifest of the mix lists the files of all sources, in the order of the sources.

    Attributes:
        source: name of the source.
        rows: number of rows of the source.
        draws: number of rows that are drawn from the source in each epoch of the mix.
    """

    source: str
    rows: int
    draws: int


class Manifest(Config):
    """Description of the content of a shard folder.

    The manifest is written last, so a folder with a manifest is complete.

    Attributes:
        format: version of the shard format.
        request: shard request that determines the content of the folder; for a mix, the shard request of the first
            source.
        files: one entry for each shard file, in row order.
        parts: sources of a mix, or empty if there is only one source.
    """

    format: Literal[2] = FORMAT
    request: ShardRequest
    files: tuple[ShardFile, ...]
    parts: tuple[MixPart, ...] = ()

    @cached_property
    def num_rows(self) -> int:
        """Number of rows of all shard files together."""
        return sum(file.rows for file in self.files)

    @property
    def content_hash(self) -> str:
        """Hash of the contents of all shard files and of the rule by which training draws texts.

        Equal hashes mean equal training data.
        """
        parts: list[object] = [(part.rows, part.draws) for part in self.parts]
        if self.request.text_weights != "frequency":
            parts.append(self.request.text_weights)
        return short_hash([file.sha256 for file in self.files], *parts)


class Row(NamedTuple):
    """A row of the shards: the picture's id, its pixels (HWC, uint8), and its (prompt, text) pairs."""

    image_id: str
    pixels: npt.NDArray[np.uint8]
    texts: list[tuple[str, str]]


def shard_schema(request: ShardRequest) -> pa.Schema:
    """Return the schema of a shard file. The column `pixels` has fixed-size values if the encoding is raw.

    A shard file of texts has text ids, and no pixels.
    """
    if request.image is None:
        return pa.schema([("text_id", pa.string()), ("texts", pa.list_(TEXT_TYPE))])
    side = request.image.size
    pixels = pa.binary(side * side * 3) if request.encoding == "raw" else pa.binary()
    return pa.schema([("image_id", pa.string()), ("pixels", pixels), ("texts", pa.list_(TEXT_TYPE))])


def encode_pixels(pixels: npt.NDArray[np.uint8], encoding: Literal["raw", "jpeg"]) -> bytes:
    """Encode pixels (HWC, uint8) as raw bytes or as a JPEG file."""
    if encoding == "raw":
        return pixels.tobytes()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


def write_shard_file(folder: Path, index: int, request: ShardRequest, rows: Iterable[pa.RecordBatch]) -> ShardFile:
    """Write one shard file atomically. A retried Spark task writes the same file again.

    Args:
        folder: shard folder, which exists.
        index: number of the shard file.
        request: shard request, which determines the content of the folder.
        rows: record batches with the columns of `shard_schema`, of any size, in row order.
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
    """Regroup rows into record batches of exactly BATCH_ROWS rows. The last batch may have fewer than BATCH_ROWS
    rows."""
    pending: list[pa.RecordBatch] = []
    held = 0
    for batch in batches:
        pending.append(batch)
        held += batch.num_rows
        while held >= BATCH_ROWS:
            table = pa.Table.from_batches(pending, schema)
            yield _copy(table.slice(0, BATCH_ROWS))
            pending = table.slice(BATCH_ROWS).to_batches()
            held -= BATCH_ROWS
    if held:
        yield _copy(pa.Table.from_batches(pending, schema))


def _copy(rows: pa.Table) -> pa.RecordBatch:
    """Copy rows into one record batch whose buffers contain only these rows.

    Arrow pads the buffers in a file. A slice of a larger batch is padded with bytes of the larger batch's next rows.
    Without a copy, the bytes of the file would therefore depend on the sizes of Spark's batches.
    """
    # `combine_chunks` copies the rows of a table only if the table has several parts, so an empty part is added.
    two_parts = pa.concat_tables([rows.schema.empty_table(), rows])
    return two_parts.combine_chunks().to_batches()[0]


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest atomically. The manifest marks the shard folder as complete."""
    with atomic_write(folder / MANIFEST) as temporary:
        temporary.write_text(manifest.model_dump_json(indent=2), encoding="utf-8")


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a complete shard folder.

    Raises:
        UserError: the folder or manifest is missing, or this version cannot read the manifest's format.
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
            "the manifest of the shards cannot be read",
            where=str(path),
            got=f"{error.error_count()} problems",
            fix=f"remove the folder and run `lakesight shard` again (this version reads format {FORMAT})",
        ) from None


@dataclass(frozen=True)
class Shards:
    """Reader with random access to the rows of a shard folder. A pickle of a reader contains only the folder's path."""

    folder: Path
    _mapped: dict[int, MappedFile] = field(default_factory=dict, init=False, repr=False, compare=False)
    """Memory-mapped files by file number. A file is mapped when a row of the file is read for the first time."""

    @classmethod
    def open(cls, folder: Path) -> Shards:
        """Open a shard folder and check that every file in the manifest exists with the expected size.

        Raises:
            UserError: the shard folder has no manifest, or this version cannot read the manifest's format.
            StageFailed: a shard file is missing, or its size differs from the manifest.
        """
        shards = cls(folder)
        raise_open_file_limit(len(shards.manifest.files))
        for file in shards.manifest.files:
            path = folder / file.file
            size = path.stat().st_size if path.exists() else -1
            if size != file.bytes:
                raise damaged_shard(path, "no file" if size < 0 else f"{size} bytes instead of {file.bytes}")
        return shards

    def verify(self, seconds: float) -> None:
        """Compare the SHA-256 of each file with the manifest, file by file, until `seconds` have passed.

        Raises:
            StageFailed: a file differs from the manifest. The error names the first file that differs.
        """
        deadline = time.monotonic() + seconds
        for file in self.manifest.files:
            if time.monotonic() < deadline:
                verify_file(self.folder / file.file, file)

    @cached_property
    def manifest(self) -> Manifest:
        """Manifest of the shard folder."""
        return read_manifest(self.folder)

    @cached_property
    def _starts(self) -> list[int]:
        """Index of the first row of each file."""
        return list(accumulate((file.rows for file in self.manifest.files[:-1]), initial=0))

    def __len__(self) -> int:
        return self.manifest.num_rows

    def __reduce__(self) -> tuple[type[Shards], tuple[Path]]:
        return Shards, (self.folder,)

    def row(self, index: int) -> Row:
        """Read one row in constant time, without reading its neighbours.

        Raises:
            IndexError: `index` is not in [0, number of rows).
            StageFailed: the file or the row is damaged.
            UserError: the process has reached its limit of open files.
        """
        return self._read(index, self._decode_row)

    def texts_of(self, index: int) -> list[tuple[str, str]]:
        """Read the (prompt, text) pairs of one row without its picture. Raise the same errors as the method `row`."""
        return self._read(index, _pairs_of)

    def drawn_texts(self, texts: list[tuple[str, str]]) -> list[tuple[str, str]]:
        """Return the (prompt, text) pairs of a row from which training draws one pair, each with equal probability.

        The loss of a picture is the mean over the returned pairs. A text that occurs n times in the row occurs n times
        in the result. However, if `data.text_weights` is `uniform`, each distinct text occurs only once.
        """
        return list(dict.fromkeys(texts)) if self.manifest.request.text_weights == "uniform" else texts

    def use_copy(self, file: int, copy: Path) -> None:
        """Let all later reads of one shard file use a local copy.

        Other threads may read rows during this call.
        """
        self._mapped[file] = MappedFile.of(copy)

    def _file(self, number: int) -> MappedFile:
        if mapped := self._mapped.get(number):
            return mapped
        mapped = MappedFile.of(self.folder / self.manifest.files[number].file)
        return self._mapped.setdefault(number, mapped)  # another thread may already have mapped the file

    def _read(self, index: int, read: Callable[[MappedFile, int, int], T]) -> T:
        """Call `read` with the file of a row, the number of the record batch, and the row's offset in the batch."""
        if not 0 <= index < len(self):
            raise IndexError(f"there is no row {index} in {len(self)} rows")
        file = bisect_right(self._starts, index) - 1
        within = index - self._starts[file]
        mapped = self._file(file)
        try:
            return read(mapped, *divmod(within, BATCH_ROWS))
        except (ValueError, OSError, IndexError) as error:  # Arrow and Pillow raise subclasses of these exceptions
            raise damaged_shard(mapped.path, f"{type(error).__name__}: {error}", row=within) from error

    def _decode_row(self, mapped: MappedFile, number: int, offset: int) -> Row:
        request = self.manifest.request
        batch, stored = mapped.pixels(number, offset)
        assert request.image is not None, "shards of text have no pixels"
        if request.encoding == "raw":
            side = request.image.size
            pixels = np.frombuffer(stored, np.uint8).reshape(side, side, 3)
        else:
            pixels = np.asarray(Image.open(io.BytesIO(stored)).convert("RGB"))
        return Row(batch.column("image_id")[offset].as_py(), pixels, _pairs_of(mapped, number, offset))

    def texts(self) -> Iterator[str]:
        """Yield the texts, and the prompts that are not empty, in row order, without reading pixels.

        Tokenizers are trained on these prompts and texts.

        If one row contains the same (prompt, text) pair more than once, the pair is yielded only once.
        """
        for file in range(len(self.manifest.files)):
            batches = self._file(file).batches
            for number in range(batches.num_record_batches):
                for pairs in batches.get_batch(number).column("texts").to_pylist():
                    for prompt, text in dict.fromkeys((pair["prompt"], pair["text"]) for pair in pairs):
                        if prompt:
                            yield prompt
                        yield text


def _pairs_of(mapped: MappedFile, number: int, offset: int) -> list[tuple[str, str]]:
    texts = mapped.batches.get_batch(number).column("texts")[offset].as_py()
    return [(pair["prompt"], pair["text"]) for pair in texts]


def verify_file(path: Path, file: ShardFile, copy: Path | None = None) -> None:
    """Compare the SHA-256 of a shard file or its copy with the manifest entry of the shard file.

    Raises:
        StageFailed: the SHA-256 differs from the manifest entry.
    """
    if file_digest(copy or path) != file.sha256:
        raise damaged_shard(path, "the SHA-256 of the file differs from the SHA-256 in the manifest")

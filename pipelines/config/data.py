"""The data section of a run: where samples come from, how they are split, what a row may be, how shards look.

Imported through `pipelines.config.run`, like every other section.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from vlm.config import Config, Probability

Split = Literal["train", "val", "test"]
PICTURE = "__picture__"
"""The field of a record that holds the bytes of a picture which the source keeps beside its row."""


# ------------------------------------------------------------------------------------------------ columns


class ColumnNames(Config):
    """Names of the source's columns. `id` and `prompt` are optional: null means the source has none."""

    image: str = "b64string_images"
    text: str = "caption"
    id: str | None = None
    prompt: str | None = None

    @property
    def wanted(self) -> dict[str, str]:
        """Every column that is named, by what it is for."""
        return {purpose: name for purpose, name in self if name is not None}


class PlainColumns(ColumnNames):
    """As most tables of pictures call them."""

    image: str = "image"
    text: str = "text"


class FolderColumns(ColumnNames):
    """Columns of a captions file: `image` names the file of a picture, relative to the folder."""

    image: str = "file_name"
    text: str = "text"


class MemberColumns(ColumnNames):
    """Members of a tar, by extension: of several for the picture, parted by semicolons, the first one there.

    A key of a `json` member is called json.KEY; the common part of the names is __key__.
    """

    image: str = "jpg;jpeg;png;webp;gif;tif;tiff;bmp;avif"
    text: str = "txt"


# ------------------------------------------------------------------------------------------------ sources


class SourceBase(Config):
    """What every source has. `path` is a file, a folder or a pattern; `columns` name what is in a row."""

    path: str = ""
    columns: ColumnNames = ColumnNames()

    @property
    def record_columns(self) -> ColumnNames:
        """The columns as the records on executors have them."""
        return self.columns

    @property
    def where(self) -> str:
        """What a message calls this source."""
        return self.path


class CsvSourceConfig(SourceBase):
    """Base64 pictures in CSV files. `multiline` allows line breaks inside quotes.

    The path `scenes:COUNT` or `scenes:COUNT:SEED` is a file that Lakesight draws itself.
    """

    kind: Literal["csv"] = "csv"
    multiline: bool = False


class JsonlSourceConfig(SourceBase):
    """Base64 pictures in JSON lines: an object a line."""

    kind: Literal["jsonl"]
    columns: PlainColumns = PlainColumns()


class ParquetSourceConfig(SourceBase):
    """Parquet files. A picture is binary, base64, or Hugging Face's struct of bytes and path."""

    kind: Literal["parquet"]
    columns: PlainColumns = PlainColumns()


class TableSourceConfig(SourceBase):
    """A Delta table by name or by path, at a version (default: the newest when the ingest begins).

    Attributes:
        filter: SQL condition on the table's rows; empty for all of them.
    """

    kind: Literal["table"]
    table: Annotated[str, Field(pattern=r"^$|^[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+){0,2}$")] = ""
    version: Annotated[int, Field(ge=0)] | None = None
    filter: str = ""
    columns: PlainColumns = PlainColumns()

    @model_validator(mode="after")
    def _named_once(self) -> Self:
        if self.table and self.path:
            raise ValueError("a table has a name or a path: give one of table and path")
        return self

    @property
    def where(self) -> str:
        """The table's name, or its path."""
        return self.table or self.path


class FolderSourceConfig(SourceBase):
    """A folder of picture files, and a captions file in it: CSV, JSON lines, or COCO captions JSON."""

    kind: Literal["folder"]
    captions: str
    columns: FolderColumns = FolderColumns()

    @property
    def record_columns(self) -> ColumnNames:
        """The picture's bytes stand beside its file's name."""
        return self.columns.model_copy(update={"image": PICTURE})


class WebDatasetSourceConfig(SourceBase):
    """WebDataset tars: members of one name and several extensions are a row."""

    kind: Literal["webdataset"]
    columns: MemberColumns = MemberColumns()

    @property
    def record_columns(self) -> ColumnNames:
        """The picture stands in one field, whichever extension it had."""
        return self.columns.model_copy(update={"image": PICTURE})


SourceConfig = Annotated[
    CsvSourceConfig
    | JsonlSourceConfig
    | ParquetSourceConfig
    | TableSourceConfig
    | FolderSourceConfig
    | WebDatasetSourceConfig,
    Field(discriminator="kind"),
]


# ------------------------------------------------------------------------------------------------ splits


class HashSplitConfig(Config):
    """Split by the picture's sha256: stable for ever, equal pictures on one side."""

    kind: Literal["hash"] = "hash"
    val: Probability = 0.05
    test: Probability = 0.05

    @model_validator(mode="after")
    def _something_to_train_on(self) -> Self:
        if self.val + self.test >= 1:
            raise ValueError("val + test leaves nothing to train on: keep their sum below 1")
        return self


class FileSplitConfig(Config):
    """Split given by the source: files named train, val and test."""

    kind: Literal["file"]


class ColumnSplitConfig(Config):
    """Split given by the source: a column that says train, val or test (or validation, valid, dev)."""

    kind: Literal["column"]
    column: str = "split"


SplitConfig = Annotated[HashSplitConfig | FileSplitConfig | ColumnSplitConfig, Field(discriminator="kind")]


# ------------------------------------------------------------------------------------------------ the whole


class LimitsConfig(Config):
    """What a row may be at most, and a picture at least; a row beyond is quarantined.

    `max_bad_share` is of an ingest's rows: with more refused, the job fails after it has written everything.
    """

    max_bytes: PositiveInt = 64 * 2**20
    max_pixels: PositiveInt = 64_000_000
    min_side: PositiveInt = 4
    max_decode_seconds: PositiveFloat = 30.0
    max_text_chars: PositiveInt = 2_000
    max_bad_share: Annotated[float, Field(ge=0, le=1)] = 1.0


class ShardConfig(Config):
    """Training shards: pixels raw (random access, no decoding) or jpeg (small), and rows in one file.

    Attributes:
        encoding: of the pixels.
        rows: in one file.
        seed: of the order.
        where: SQL condition on columns of `samples`; rows that do not meet it are left out, of every split.
        draft: let JPEG's decoder halve large pictures, down to the model's resolution: far faster, and pixels differ a
            little from those of a picture that is decoded whole, as captioning does.
    """

    encoding: Literal["raw", "jpeg"] = "raw"
    rows: PositiveInt = 1024
    seed: int = 0
    where: str = ""
    draft: bool = False


Share = Annotated[float, Field(gt=0, lt=1)]


class DataConfig(Config):
    """Where samples come from (CSV, unless the source says its kind), how they are split, and which split is for what.

    With `near_duplicates`, a new picture that nearly equals another one is flagged, and goes to the same split. `mix`
    gives other sources of `samples` a share each of what is learned from; the rest is this source's own.
    """

    source: SourceConfig = CsvSourceConfig()
    split: SplitConfig = HashSplitConfig()
    near_duplicates: bool = True
    limits: LimitsConfig = LimitsConfig()
    shards: ShardConfig = ShardConfig()
    validate_on: Split = "val"
    evaluate_on: Split = "test"
    mix: dict[str, Share] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _csv_unless_said(cls, raw: Any) -> Any:
        source = raw.get("source") if isinstance(raw, dict) else None
        return raw | {"source": {"kind": "csv"} | source} if isinstance(source, dict) else raw

    @model_validator(mode="after")
    def _files_say_the_split(self) -> Self:
        if self.split.kind == "file" and self.source.kind == "table":
            raise ValueError("a table has no files that could say the split: use split kind hash or column")
        return self

    @model_validator(mode="after")
    def _own_rows_are_left(self) -> Self:
        if sum(self.mix.values()) >= 1:
            raise ValueError("mix leaves no share to this source itself: keep the sum of its shares below 1")
        if self.mix and "train" in (self.validate_on, self.evaluate_on):
            raise ValueError("a mix is for learning: validate_on and evaluate_on must be val or test")
        return self

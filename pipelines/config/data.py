"""The `data` section of a run: the source, its columns, the split, limits of a row, and training shards."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from vlm.config import Config, Probability

Split = Literal["train", "val", "test"]
PICTURE = "__picture__"
"""Field of a record with the bytes of a picture that the source stores as a file of its own."""


# ------------------------------------------------------------------------------------------------ columns


class ColumnNames(Config):
    """Names of the source's columns. `id` and `prompt` are optional; null means that the source has none."""

    image: str = "b64string_images"
    text: str = "caption"
    id: str | None = None
    prompt: str | None = None

    @property
    def named(self) -> dict[str, str]:
        """Map the purpose of each named column to its name."""
        return {purpose: name for purpose, name in self if name is not None}


class PlainColumns(ColumnNames):
    """Column names with the usual defaults of tables and JSON lines."""

    image: str = "image"
    text: str = "text"


class FolderColumns(ColumnNames):
    """Columns of a captions file. `image` is the column with the picture's path, relative to the folder."""

    image: str = "file_name"
    text: str = "text"


class MemberColumns(ColumnNames):
    """Members of a tar, by extension. Alternatives are separated by semicolons; the first one that exists counts.

    `json.KEY` is a key of a `json` member. `__key__` is the part that the names of a row's members share.
    """

    image: str = "jpg;jpeg;png;webp;gif;tif;tiff;bmp;avif"
    text: str = "txt"


# ------------------------------------------------------------------------------------------------ sources


class SourceBase(Config):
    """Settings that all sources share. `path` is a file, a folder or a wildcard pattern."""

    path: str = ""
    columns: ColumnNames = ColumnNames()

    @property
    def record_columns(self) -> ColumnNames:
        """Column names of the records that executors read."""
        return self.columns

    @property
    def where(self) -> str:
        """The source's name in messages: its path."""
        return self.path


class CsvSourceConfig(SourceBase):
    """CSV files with base64 pictures. `multiline` allows line breaks inside quotes.

    The path `scenes:COUNT` or `scenes:COUNT:SEED` stands for a generated file of COUNT drawn scenes.
    """

    kind: Literal["csv"] = "csv"
    multiline: bool = False


class JsonlSourceConfig(SourceBase):
    """JSON lines with base64 pictures, one object per line."""

    kind: Literal["jsonl"]
    columns: PlainColumns = PlainColumns()


class ParquetSourceConfig(SourceBase):
    """Parquet files. A picture is binary, base64 text, or Hugging Face's struct of bytes and path."""

    kind: Literal["parquet"]
    columns: PlainColumns = PlainColumns()


class TableSourceConfig(SourceBase):
    """Delta table, by name or by path.

    Attributes:
        version: version to read; null: the newest version at the start of the ingest.
        filter: SQL condition on the table's rows; empty: all rows.
    """

    kind: Literal["table"]
    table: Annotated[str, Field(pattern=r"^$|^[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+){0,2}$")] = ""
    version: Annotated[int, Field(ge=0)] | None = None
    filter: str = ""
    columns: PlainColumns = PlainColumns()

    @model_validator(mode="after")
    def _named_once(self) -> Self:
        if self.table and self.path:
            raise ValueError("give either table (a name) or path, not both")
        return self

    @property
    def where(self) -> str:
        """The table's name, or its path."""
        return self.table or self.path


class FolderSourceConfig(SourceBase):
    """Folder of picture files with a captions file in it: CSV, JSON lines, or COCO captions JSON."""

    kind: Literal["folder"]
    captions: str
    columns: FolderColumns = FolderColumns()

    @property
    def record_columns(self) -> ColumnNames:
        """Column names of the records: the picture's bytes are in a field of their own."""
        return self.columns.model_copy(update={"image": PICTURE})


class WebDatasetSourceConfig(SourceBase):
    """WebDataset tars. Members with the same name and different extensions form a row."""

    kind: Literal["webdataset"]
    columns: MemberColumns = MemberColumns()

    @property
    def record_columns(self) -> ColumnNames:
        """Column names of the records: the picture is in one field, whatever its extension."""
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
    """Split by the SHA-256 of the picture. It never changes, and equal pictures are in the same split."""

    kind: Literal["hash"] = "hash"
    val: Probability = 0.05
    test: Probability = 0.05

    @model_validator(mode="after")
    def _something_to_train_on(self) -> Self:
        if self.val + self.test >= 1:
            raise ValueError("val + test leaves no rows to train on: keep their sum below 1")
        return self


class FileSplitConfig(Config):
    """Split given by file names: train, val and test."""

    kind: Literal["file"]


class ColumnSplitConfig(Config):
    """Split given by a column with the values train, val (or validation, valid, dev) and test."""

    kind: Literal["column"]
    column: str = "split"


SplitConfig = Annotated[HashSplitConfig | FileSplitConfig | ColumnSplitConfig, Field(discriminator="kind")]


# ------------------------------------------------------------------------------------------------ the whole


class LimitsConfig(Config):
    """Limits of a row. A row outside them is quarantined.

    Attributes:
        max_bytes: largest picture file, bytes.
        max_pixels: largest width times height.
        min_side: smallest width and height, pixels.
        max_decode_seconds: longest time to decode one picture.
        max_text_chars: longest text, characters.
        max_bad_share: share of refused rows above which the job fails, after it has written both tables.
    """

    max_bytes: PositiveInt = 64 * 2**20
    max_pixels: PositiveInt = 64_000_000
    min_side: PositiveInt = 4
    max_decode_seconds: PositiveFloat = 30.0
    max_text_chars: PositiveInt = 2_000
    max_bad_share: Annotated[float, Field(ge=0, le=1)] = 1.0


class ShardConfig(Config):
    """Format of training shards.

    Attributes:
        encoding: `raw` pixels (random access without decoding) or `jpeg` (smaller).
        rows: rows per file.
        seed: seed of the shuffle.
        where: SQL condition on columns of `samples`. Rows that do not meet it are left out of every split.
        draft: let the JPEG decoder halve large pictures until they are near the model's resolution. This is far faster.
            The pixels differ slightly from those of a full decode, which captioning does.
    """

    encoding: Literal["raw", "jpeg"] = "raw"
    rows: PositiveInt = 1024
    seed: int = 0
    where: str = ""
    draft: bool = False


Share = Annotated[float, Field(gt=0, lt=1)]


class DataConfig(Config):
    """Source of samples and how they are used.

    Attributes:
        source: where rows come from; `kind: csv` unless given.
        split: how rows are divided into train, val and test.
        near_duplicates: flag a new picture that nearly equals another one, and put both into the same split.
        limits: limits of a row.
        shards: format of training shards.
        validate_on: split for validation during training.
        evaluate_on: split for evaluation of a registered version.
        mix: share of the training rows by name of another source in `samples`. The rest comes from this source.
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
    def _default_to_csv(cls, raw: Any) -> Any:
        source = raw.get("source") if isinstance(raw, dict) else None
        return raw | {"source": {"kind": "csv"} | source} if isinstance(source, dict) else raw

    @model_validator(mode="after")
    def _files_say_the_split(self) -> Self:
        if self.split.kind == "file" and self.source.kind == "table":
            raise ValueError("a table has no file names to split by: use split kind hash or column")
        return self

    @model_validator(mode="after")
    def _own_rows_are_left(self) -> Self:
        if sum(self.mix.values()) >= 1:
            raise ValueError("mix leaves no share for this source itself: keep the sum of its shares below 1")
        if self.mix and "train" in (self.validate_on, self.evaluate_on):
            raise ValueError("a mix changes the train split: validate_on and evaluate_on must be val or test")
        return self

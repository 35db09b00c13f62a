"""The `data` section of a run: the source and its columns, the split, the limits of a row, and the training shards."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt, model_validator

from pipelines.config.split import HashSplitConfig, Split, SplitConfig
from vlm.config import ADDED_LATER, Config

TextWeights = Literal["frequency", "uniform"]
MAX_DOCUMENT_CHARS = 16 * 2**20
"""Default of `limits.max_text_chars` for a source of kind `text`."""
LINE_BREAKS = "\r\n"
PICTURE = "__picture__"
"""Name of the record field with the bytes of a picture, if the source stores each picture as a separate file."""
PICTURE_FOLDER = "__folder__"
"""Name of the record field that holds the folder of a row's file, relative to the folder of the source. A record has
the field only if three conditions hold: paths of pictures are relative to the row's file, the picture could not be
read, and the source may have several files."""


# ------------------------------------------------------------------------------------------------ columns


class ColumnNames(Config):
    """Names of the source's columns.

    Attributes:
        image: column with the picture.
        text: column with the caption or a list of captions.
        id: column with the id of the row, or null if the source has no ids.
        prompt: column with the question or other text that precedes the caption, or null if the source has no such
            texts.
    """

    image: str = "b64string_images"
    text: str = "caption"
    id: str | None = None
    prompt: str | None = None

    @property
    def named(self) -> dict[str, str]:
        """Map each purpose (image, text, id, prompt) to the name of its column, and leave out purposes whose column is
        null."""
        return {purpose: name for purpose, name in self if name is not None}


class PlainColumns(ColumnNames):
    """Names of the source's columns. The defaults are usual names in tables and JSON lines files."""

    image: str = "image"
    text: str = "text"


class FolderColumns(ColumnNames):
    """Names of the columns of a captions file. The column `image` holds the picture's path, relative to the folder."""

    image: str = "file_name"
    text: str = "text"


class MemberColumns(ColumnNames):
    """File extensions of the tar members that serve as columns.

    Semicolons separate the possible extensions of the picture. If a row has members with several of these extensions,
    the first extension in the list is used. `json.KEY` selects the value of KEY in the row's `json` member. `__key__`
    is the name that all members of a row share, without the extension.
    """

    image: str = "jpg;jpeg;png;webp;gif;tif;tiff;bmp;avif"
    text: str = "txt"


# ------------------------------------------------------------------------------------------------ sources


class SourceBase(Config):
    """Settings that all sources share.

    Attributes:
        path: path of a file or folder, or a wildcard pattern.
    """

    path: str = ""
    columns: ColumnNames = ColumnNames()

    @property
    def record_columns(self) -> ColumnNames:
        """Column names of the records that executors read."""
        return self.columns

    @property
    def where(self) -> str:
        """Path of the source, as shown in messages."""
        return self.path


class RowSourceBase(SourceBase):
    """Settings of sources whose rows contain pictures, or the paths or URIs of pictures.

    Attributes:
        image_root: folder or URL of the pictures if the image column holds paths or URIs, or null if the image column
            holds the pictures themselves. If `image_root` is a relative path, it is relative to the folder of the row's
            file, or to the working folder if the source is a table.
    """

    image_root: Annotated[str | None, Field(min_length=1), ADDED_LATER] = None

    @property
    def record_columns(self) -> ColumnNames:
        """Column names of the records that executors read. If the rows of the source contain only paths of pictures,
        the bytes of a picture are in the field PICTURE.
        """
        return self.columns if self.image_root is None else self.columns.model_copy(update={"image": PICTURE})


def _require_one_character(value: str) -> str:
    if len(value) != 1 or value in LINE_BREAKS:
        raise ValueError("expected one character that is not a line break")
    return value


Character = Annotated[str, AfterValidator(_require_one_character)]


class CsvSourceConfig(RowSourceBase):
    """CSV files with a header. The pictures are base64 text or (with `image_root`) paths of picture files.

    Attributes:
        path: path of a file or folder, or a wildcard pattern. `scenes:COUNT` or `scenes:COUNT:SEED` stands for a
            generated file with COUNT drawn pictures; SEED is the random seed of the pictures.
        multiline: whether a field in quotes may contain line breaks.
        delimiter: character between fields, or null to detect the character from the header of each file.
        escape: character that precedes a quote inside a quoted field, such as the backslash that Spark writes, or null
            if the source writes two quotes instead.
        quote: character before and after a field that contains delimiters, or null if quotes are ordinary characters
            of the texts, as in many TSV files.
    """

    kind: Literal["csv"] = "csv"
    multiline: bool = False
    delimiter: Annotated[Character | None, ADDED_LATER] = None
    escape: Annotated[Character | None, ADDED_LATER] = None
    quote: Annotated[Character | None, ADDED_LATER] = '"'

    @model_validator(mode="after")
    def _quoted_where_needed(self) -> Self:
        if self.quote is None and (self.multiline or self.escape):
            raise ValueError("multiline and escape need quoted fields: set quote, or remove multiline and escape")
        if self.quote is not None and self.quote in (self.delimiter, self.escape):
            raise ValueError(f"quote {self.quote!r} is also the delimiter or the escape character")
        return self


class JsonlSourceConfig(RowSourceBase):
    """JSON lines files. Each line is a JSON object with a base64 picture or (with `image_root`) a picture's path."""

    kind: Literal["jsonl"]
    columns: PlainColumns = PlainColumns()


class ParquetSourceConfig(RowSourceBase):
    """Parquet files. A picture is binary data, base64 text, Hugging Face's struct, or (with `image_root`) a file path.

    Hugging Face's struct has the fields `bytes` and `path`.
    """

    kind: Literal["parquet"]
    columns: PlainColumns = PlainColumns()


class TableSourceConfig(RowSourceBase):
    """Delta table, which is given by its name or by its path.

    Attributes:
        path: path or URL of the table's folder, or empty if `table` names the table.
        table: name of the table, or empty if `path` locates the table.
        version: table version to read, or null for the newest version at the start of the ingest.
        filter: SQL condition on the table's rows, or empty to read all rows.
    """

    kind: Literal["table"]
    table: Annotated[str, Field(pattern=r"^$|^[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+){0,2}$")] = ""
    version: Annotated[int, Field(ge=0)] | None = None
    filter: str = ""
    columns: PlainColumns = PlainColumns()

    @model_validator(mode="after")
    def _named_once(self) -> Self:
        if self.table and self.path:
            raise ValueError("table and path are both set: give either table (a name) or path (a folder)")
        return self

    @property
    def where(self) -> str:
        """Name or path of the table, as shown in messages."""
        return self.table or self.path


class FolderSourceConfig(SourceBase):
    """Folder with picture files and one captions file (CSV, JSON lines or COCO captions).

    Attributes:
        path: path of the folder.
        captions: path of the captions file, relative to the folder.
    """

    kind: Literal["folder"]
    captions: str
    columns: FolderColumns = FolderColumns()

    @property
    def record_columns(self) -> ColumnNames:
        """Column names of the records that executors read. The bytes of the picture are in the field PICTURE."""
        return self.columns.model_copy(update={"image": PICTURE})


class WebDatasetSourceConfig(SourceBase):
    """WebDataset tars, in which members with the same name and different extensions form a row."""

    kind: Literal["webdataset"]
    columns: MemberColumns = MemberColumns()

    @property
    def record_columns(self) -> ColumnNames:
        """Column names of the records that executors read. The field PICTURE has the picture, whatever the picture's
        file extension.
        """
        return self.columns.model_copy(update={"image": PICTURE})


class TextSourceConfig(SourceBase):
    """Files of plain text without pictures, on which a text-only model (`model.text_only`) is trained.

    Attributes:
        rows: unit of text that becomes a row of table `texts`: a `document` (a file), a `paragraph` (text between blank
            lines) or a `line`. Blank lines separate rows, but are not rows themselves.
    """

    kind: Literal["text"]
    rows: Literal["document", "paragraph", "line"] = "document"

    @model_validator(mode="after")
    def _without_columns(self) -> Self:
        if self.columns != ColumnNames():
            raise ValueError("plain text has no columns: remove data.source.columns")
        return self


SourceConfig = Annotated[
    CsvSourceConfig
    | JsonlSourceConfig
    | ParquetSourceConfig
    | TableSourceConfig
    | FolderSourceConfig
    | WebDatasetSourceConfig
    | TextSourceConfig,
    Field(discriminator="kind"),
]


# ------------------------------------------------------------------------------------------------ the whole


class LimitsConfig(Config):
    """Limits on the picture and the texts of a row. A row that violates a limit is quarantined.

    Attributes:
        max_bytes: largest accepted size of a picture file, in bytes.
        max_pixels: largest accepted number of pixels (width times height) of a picture.
        min_side: smallest accepted width and height of a picture, in pixels.
        max_decode_seconds: longest accepted time to decode one picture, in seconds.
        max_text_chars: largest accepted length of a text, in characters. For a source of kind `text`, the default is
            16,777,216.
        max_texts: largest accepted number of different texts of a picture, or null for no limit.
        max_bad_share: largest accepted share of refused rows. If the share is larger than `max_bad_share`, the ingest
            still writes the accepted rows and the table `quarantine`, and then fails.
    """

    max_bytes: PositiveInt = 64 * 2**20
    max_pixels: PositiveInt = 64_000_000
    min_side: PositiveInt = 4
    max_decode_seconds: PositiveFloat = 30.0
    max_text_chars: PositiveInt = 2_000
    max_texts: Annotated[PositiveInt | None, ADDED_LATER] = None
    max_bad_share: Annotated[float, Field(ge=0, le=1)] = 1.0


class ShardConfig(Config):
    """Format of training shards.

    Attributes:
        encoding: how shards store pictures. `raw` stores pixels, so training need not decode pictures. `jpeg` needs
            less disk space.
        rows: number of rows per shard file.
        seed: random seed of the order of rows in the shards.
        where: SQL condition on columns of the table `samples` (for a source of kind `text`: of the table `texts`), or
            an empty text for all rows. Shards of every split contain only rows that meet the condition.
        draft: whether the JPEG decoder shrinks large pictures to near the model's resolution during decoding. With
            `draft`, decoding is far faster, but the training pixels differ slightly from the pixels of the same picture
            in a caption job.
    """

    encoding: Literal["raw", "jpeg"] = "raw"
    rows: PositiveInt = 1024
    seed: int = 0
    where: str = ""
    draft: bool = False


Share = Annotated[float, Field(gt=0, lt=1)]


class DataConfig(Config):
    """Where the rows come from, and how training and evaluation use the rows.

    For a source of kind `text`, the settings `near_duplicates`, `text_weights` and the limits of pictures have no
    effect. The settings `mix`, `object_words`, `shards.encoding` and `shards.draft` must keep their defaults.

    Attributes:
        source: where the rows come from. If the section has no `kind`, the source is a csv source.
        split: rule that divides rows into train, val and test.
        near_duplicates: whether the ingest searches for pictures that are nearly equal to a new picture. If the kind of
            `split` is `hash`, a new picture is put into the split of the nearly equal pictures.
        limits: limits of pictures and texts; a row that violates a limit is quarantined.
        shards: format of training shards.
        validate_on: split on which the model is validated during training.
        evaluate_on: split on which a registered model version is evaluated.
        mix: mapping from the names of other sources in the table `samples` to the share of training rows that is drawn
            from each source, such as {birds: 0.2}. The remaining training rows come from `source`.
        text_weights: how often each text of a picture is drawn for training. With `frequency`, a text is drawn in
            proportion to the number of times that the source repeats the text. With `uniform`, all different texts of a
            picture are drawn equally often.
        object_words: path of a text file with one object per line, such as `dog, dogs, puppy`, or null. With this file,
            `evaluate` computes how often captions mention objects that no human text of the picture mentions (CHAIR).
    """

    source: SourceConfig = CsvSourceConfig()
    split: SplitConfig = HashSplitConfig()
    near_duplicates: bool = True
    limits: LimitsConfig = LimitsConfig()
    shards: ShardConfig = ShardConfig()
    validate_on: Split = "val"
    evaluate_on: Split = "test"
    mix: dict[str, Share] = Field(default_factory=dict)
    text_weights: Annotated[TextWeights, ADDED_LATER] = "frequency"
    object_words: Annotated[str | None, Field(min_length=1), ADDED_LATER] = None

    @model_validator(mode="before")
    @classmethod
    def _add_default_kinds(cls, raw: Any) -> Any:
        """If the source or the split has no `kind`, add the default: csv for the source, hash for the split."""
        if not isinstance(raw, dict):
            return raw
        defaults = {"source": "csv", "split": "hash"}
        given = {name: raw[name] for name in defaults if isinstance(raw.get(name), dict)}
        return raw | {name: {"kind": defaults[name]} | value for name, value in given.items()}

    @model_validator(mode="before")
    @classmethod
    def _allow_long_documents(cls, raw: Any) -> Any:
        """Raise the default limit of a text's length for plain text, because a document is longer than a caption."""
        source, limits = (raw.get("source"), raw.get("limits", {})) if isinstance(raw, dict) else (None, None)
        if isinstance(source, dict) and source.get("kind") == "text" and isinstance(limits, dict):
            return raw | {"limits": {"max_text_chars": MAX_DOCUMENT_CHARS} | limits}
        return raw

    @model_validator(mode="after")
    def _fits_plain_text(self) -> Self:
        if self.source.kind != "text":
            return self
        if self.split.kind == "column":
            raise ValueError("plain text has no column of splits: use split kind hash or file")
        if self.mix or self.object_words:
            raise ValueError("mix and object_words need pictures and captions: remove them for a source of kind text")
        if self.shards.encoding != "raw" or self.shards.draft:
            raise ValueError("plain text has no pictures: leave out shards.encoding and shards.draft")
        return self

    @model_validator(mode="after")
    def _files_say_the_split(self) -> Self:
        if self.split.kind == "file" and self.source.kind == "table":
            raise ValueError("split.kind is file, but a table has no file names: set split.kind to hash or column")
        return self

    @model_validator(mode="after")
    def _own_rows_are_left(self) -> Self:
        if sum(self.mix.values()) >= 1:
            raise ValueError("the shares in mix leave no share for `source`: keep the sum of the shares below 1")
        if self.mix and "train" in (self.validate_on, self.evaluate_on):
            raise ValueError("with mix, validate_on and evaluate_on cannot be train: set them to val or test")
        return self

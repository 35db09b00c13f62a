"""Every table: its columns, their types and what they mean. Columns are named here and nowhere else.

A type is written once, as an Arrow type, because executors speak Arrow; the SQL type is derived from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pyarrow as pa

if TYPE_CHECKING:
    from deltalake import DeltaTable
    from pyarrow.dataset import Dataset

REASONS = (
    "malformed_record",
    "missing_field",
    "bad_base64",
    "not_an_image",
    "truncated_image",
    "unsupported_format",
    "too_large",
    "too_small",
    "empty_text",
    "text_too_long",
    "conflicting_id",
    "decode_timeout",
    "decoder_crash",
)
"""Why a row is in quarantine: a closed list."""

TEXT_TYPE = pa.struct([pa.field("prompt", pa.string(), nullable=False), pa.field("text", pa.string(), nullable=False)])
TIME_TYPE = pa.timestamp("us", tz="UTC")


@dataclass(frozen=True)
class Column:
    """One column: name, Arrow type, meaning."""

    name: str
    type: pa.DataType
    comment: str
    nullable: bool = False

    def ddl(self) -> str:
        """The column in a CREATE TABLE statement."""
        return f"{self.name} {sql_type(self.type)}{'' if self.nullable else ' NOT NULL'} COMMENT '{self.comment}'"


@dataclass(frozen=True)
class Table:
    """One table: name, key, meaning, columns.

    `checks` are SQL conditions that Delta demands of every row, by name; columns to cluster by are those that stages
    choose rows by; a followed table has a change data feed.
    """

    name: str
    key: tuple[str, ...]
    comment: str
    columns: tuple[Column, ...]
    checks: Mapping[str, str] = field(default_factory=dict)
    cluster_by: tuple[str, ...] = ()
    followed: bool = False

    @property
    def properties(self) -> dict[str, str]:
        """Delta's properties of the table. Without deletion vectors every Delta reader can read it, `deltalake` too.

        Delta counts what columns hold; a picture would be copied for that, to learn that it is not null.
        """
        feed = {"delta.enableChangeDataFeed": "true"} if self.followed else {}
        plain = [c.name for c in self.columns if not (pa.types.is_nested(c.type) or pa.types.is_binary(c.type))]
        counted = {"delta.dataSkippingStatsColumns": ",".join(plain)}
        return {"delta.enableDeletionVectors": "false", **counted, **feed}

    @property
    def arrow_schema(self) -> pa.Schema:
        """The Arrow schema, nullability included."""
        return pa.schema([pa.field(c.name, c.type, nullable=c.nullable) for c in self.columns])

    @property
    def names(self) -> list[str]:
        """Column names in order."""
        return [c.name for c in self.columns]

    def ddl(self) -> str:
        """The column list of a CREATE TABLE statement, comments included."""
        return ", ".join(column.ddl() for column in self.columns)


def sql_type(arrow: pa.DataType) -> str:
    """Spark SQL's name of an Arrow type used by a table here.

    Raises:
        ValueError: a type no table uses yet.
    """
    if pa.types.is_struct(arrow):
        return f"STRUCT<{', '.join(f'{f.name}: {sql_type(f.type)}' for f in arrow)}>"
    if pa.types.is_list(arrow):
        return f"ARRAY<{sql_type(arrow.value_type)}>"
    names = {
        pa.string(): "STRING",
        pa.binary(): "BINARY",
        pa.int32(): "INT",
        pa.int64(): "BIGINT",
        pa.float64(): "DOUBLE",
        TIME_TYPE: "TIMESTAMP",
    }
    if arrow not in names:
        raise ValueError(f"no SQL type for the Arrow type {arrow}: add it to tables.sql_type")
    return names[arrow]


SAMPLES = Table(
    "samples",
    ("image_id",),
    "One row a picture that can be trained on",
    (
        Column("image_id", pa.string(), "<source>/<id>, or <source>/<start of sha256> where the source has no ids"),
        Column("sha256", pa.string(), "SHA-256 of the image bytes, hex"),
        Column("image", pa.binary(), "The picture, the bytes as received"),
        Column("format", pa.string(), "Picture format as Pillow names it, such as PNG"),
        Column("width", pa.int32(), "Pixels"),
        Column("height", pa.int32(), "Pixels"),
        Column("texts", pa.list_(TEXT_TYPE), "Captions (prompt empty) and answers (prompt is the question)"),
        Column(
            "split",
            pa.string(),
            "train, val or test: from sha256, as a near duplicate has, or given by the source",
        ),
        Column("source", pa.string(), "Name of the data config that brought the row"),
        Column("source_row", pa.string(), "<file>#<hash of the row>: the first row this picture came from"),
        Column("ingest_id", pa.string(), "Ingest that brought the row: a hash of the source and its files"),
        Column("ingested_at", TIME_TYPE, "When"),
        Column("fingerprint", pa.binary(), "What near duplicates share: executor/near.py; null before", nullable=True),
        Column("near_of", pa.string(), "A picture that this one nearly equals; null: none", nullable=True),
    ),
    checks={
        "usable": "split IN ('train', 'val', 'test') AND width > 0 AND height > 0 AND size(texts) > 0 "
        "AND length(sha256) = 64"
    },
    cluster_by=("source", "split"),
)

QUARANTINE = Table(
    "quarantine",
    ("ingest_id", "source_row"),
    "One row a source row that was refused, whole, with the reason",
    (
        Column("ingest_id", pa.string(), "Ingest that refused the row"),
        Column("source", pa.string(), "Name of the data config"),
        Column("source_row", pa.string(), "<file>#<hash of the row>"),
        Column("payload", pa.string(), "All the row had: JSON object of column to string, or the raw line"),
        Column("stage", pa.string(), "Where it was refused: read, decode or merge"),
        Column("reason", pa.string(), f"One of {', '.join(REASONS)}"),
        Column("detail", pa.string(), "What exactly was wrong"),
        Column("quarantined_at", TIME_TYPE, "When"),
        Column("replayed_at", TIME_TYPE, "When a replay accepted it; null before", nullable=True),
    ),
)

INGESTED = Table(
    "ingested",
    ("source", "item", "state", "rules"),
    "One row an item that was taken in whole: as long as it stays as it was, it is not read again",
    (
        Column("source", pa.string(), "Name of the data config"),
        Column("item", pa.string(), "A file; of a folder, a row of its captions file; or a table, by its id"),
        Column("state", pa.string(), "Size and time of last change of the file or picture, or version of the table"),
        Column("rules", pa.string(), "Hash of what decides over a row: columns, limits, split"),
        Column("ingest_id", pa.string(), "Ingest that took it in"),
        Column("ingested_at", TIME_TYPE, "When; the same for all that one ingest took in"),
    ),
)

GENERATED_CAPTIONS = Table(
    "generated_captions",
    ("source_table", "image_id", "model_name", "model_version", "settings_hash"),
    "One row a picture of a table, model version and decoding settings",
    (
        Column("image_id", pa.string(), "Id of the row in the source table"),
        Column("model_name", pa.string(), "Registered model"),
        Column("model_version", pa.string(), "Its version"),
        Column("settings_hash", pa.string(), "Hash of prompt, decoding settings and precision"),
        Column("caption", pa.string(), "The caption; null where there is an error", nullable=True),
        Column("error", pa.string(), "Why there is no caption; null when good", nullable=True),
        Column("sha256", pa.string(), "SHA-256 of the captioned picture; null without one", nullable=True),
        Column("prompt", pa.string(), "The prompt; empty for a plain caption"),
        Column("settings", pa.string(), "Decoding settings and precision, JSON"),
        Column("num_tokens", pa.int32(), "Generated tokens, end token included"),
        Column("mean_logprob", pa.float64(), "Mean log-probability of the generated tokens", nullable=True),
        Column("source_table", pa.string(), "Table the picture came from"),
        Column("source_version", pa.int64(), "Version of that table"),
        Column("run_id", pa.string(), "MLflow run that trained the model version"),
        Column("captioned_at", TIME_TYPE, "When"),
    ),
    checks={"caption_or_error": "(caption IS NULL) != (error IS NULL)"},
)

EVALUATIONS = Table(
    "evaluations",
    ("model_name", "model_version", "source", "dataset_version", "split", "slice", "metric"),
    "One row a model version, dataset version, split, slice and metric",
    (
        Column("model_name", pa.string(), "Registered model"),
        Column("model_version", pa.string(), "Its version"),
        Column("source", pa.string(), "Name of the data config"),
        Column("dataset_version", pa.int64(), "Version of samples the split was read at"),
        Column("split", pa.string(), "Split evaluated"),
        Column("metric", pa.string(), "Metric, such as cider; constant_cider and neighbour_cider are of the baselines"),
        Column("value", pa.float64(), "Point estimate"),
        Column("low", pa.float64(), "2.5th percentile of the bootstrap over pictures"),
        Column("high", pa.float64(), "97.5th percentile"),
        Column("n", pa.int64(), "Pictures"),
        Column("evaluated_at", TIME_TYPE, "When"),
        Column("run_id", pa.string(), "MLflow run that trained the model version"),
        Column("slice", pa.string(), "Part of the split, as column=value; null: all of it", nullable=True),
    ),
)

VERDICTS = Table(
    "verdicts",
    ("source_table", "image_id", "model_name", "model_version", "settings_hash"),
    "One row a caption that a person has judged, with its picture: a source to train on",
    (
        Column("image_id", pa.string(), "Id of the row in the source table"),
        Column("source_table", pa.string(), "Table the picture came from"),
        Column("model_name", pa.string(), "Registered model that wrote the caption"),
        Column("model_version", pa.string(), "Its version"),
        Column("settings_hash", pa.string(), "As in generated_captions"),
        Column("prompt", pa.string(), "The prompt; empty for a plain caption"),
        Column("caption", pa.string(), "What the model said"),
        Column("verdict", pa.string(), "good, bad or corrected"),
        Column("text", pa.string(), "What is right: the caption, or its correction; null where bad", nullable=True),
        Column("image", pa.binary(), "The picture as it was judged"),
        Column("sha256", pa.string(), "SHA-256 of it, hex"),
        Column("reviewer", pa.string(), "Who"),
        Column("judged_at", TIME_TYPE, "When"),
    ),
    followed=True,
)

DECISIONS = Table(
    "decisions",
    ("decision_id",),
    "One row a decision on which model version serves, in the order of decided_at",
    (
        Column("decision_id", pa.string(), "Drawn at random"),
        Column("model_name", pa.string(), "Registered model"),
        Column("model_version", pa.string(), "Version decided on"),
        Column("action", pa.string(), "promote, refuse or rollback"),
        Column("champion", pa.string(), "Version that served when it was decided; null: none", nullable=True),
        Column("reasons", pa.list_(pa.string()), "Why it was refused; empty otherwise"),
        Column("figures", pa.string(), "What the decision rests on, a JSON object"),
        Column("decided_by", pa.string(), "User of the process that decided"),
        Column("decided_at", TIME_TYPE, "When"),
    ),
)

TABLES = (SAMPLES, QUARANTINE, INGESTED, GENERATED_CAPTIONS, EVALUATIONS, VERDICTS, DECISIONS)


def files_of(table: DeltaTable) -> Dataset:
    """The rows of a table on a local disk, read by Arrow alone.

    Without a file system of Arrow's own its threads read through Python, and one that is late aborts the process as the
    interpreter ends: all is printed, and the exit code is 134 (delta-io/delta-rs issue 2184).
    """
    from pyarrow.fs import FileSystem, SubTreeFileSystem

    system, root = FileSystem.from_uri(table.table_uri)
    return table.to_pyarrow_dataset(filesystem=SubTreeFileSystem(root, system))

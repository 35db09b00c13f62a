"""Definitions of all Delta tables: columns, types and comments. No other module defines a column.

The type of a column is given once, as an Arrow type, because executors exchange Arrow batches. The SQL type is derived
from the Arrow type.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import pyarrow as pa

from pipelines.formats.format_version import FORMAT, PROPERTY

REASONS = (
    "unreadable_file",
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
    "too_many_texts",
    "conflicting_id",
    "decode_timeout",
    "decoder_crash",
)
"""All reasons for which a row can be in the table `quarantine`."""

TEXT_TYPE = pa.struct([pa.field("prompt", pa.string(), nullable=False), pa.field("text", pa.string(), nullable=False)])
TIME_TYPE = pa.timestamp("us", tz="UTC")


@dataclass(frozen=True)
class Column:
    """A column of a Delta table: its name, its Arrow type, its comment, and whether its values may be null."""

    name: str
    type: pa.DataType
    comment: str
    nullable: bool = False

    def ddl(self) -> str:
        """Return the column's part of a CREATE TABLE statement."""
        return f"{self.name} {sql_type(self.type)}{'' if self.nullable else ' NOT NULL'} COMMENT '{self.comment}'"


@dataclass(frozen=True)
class Table:
    """A Delta table.

    Attributes:
        name: name of the table without catalog and schema.
        key: names of the columns that identify a row.
        comment: what a row of the table stands for, such as "One row per picture that can be trained on".
        columns: all columns, in the order of the table.
        checks: CHECK constraints: a dict from the name of each constraint to its SQL condition.
        cluster_by: names of the columns by which Delta clusters the rows, because pipeline stages select rows by them.
        followed: whether the change data feed of the table is enabled.
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
        """Table properties for Delta.

        Deletion vectors are off, so that every Delta reader can read the table, including the package `deltalake`.
        Delta collects statistics of scalar columns only. To count the nulls of a picture column, Delta would copy all
        pictures.
        """
        feed = {"delta.enableChangeDataFeed": "true"} if self.followed else {}
        scalar = [c.name for c in self.columns if not (pa.types.is_nested(c.type) or pa.types.is_binary(c.type))]
        statistics = {"delta.dataSkippingStatsColumns": ",".join(scalar)}
        return {"delta.enableDeletionVectors": "false", PROPERTY: str(FORMAT), **statistics, **feed}

    @property
    def arrow_schema(self) -> pa.Schema:
        """Arrow schema of the table, including which columns may be null."""
        return pa.schema([pa.field(c.name, c.type, nullable=c.nullable) for c in self.columns])

    @property
    def names(self) -> list[str]:
        """Names of the columns, in the order of `columns`."""
        return [c.name for c in self.columns]

    def insert_clause(self, alias: str) -> str:
        """Return the INSERT clause of a MERGE statement with the columns of this definition.

        `INSERT *` would also require values for columns that users have added to the table.
        """
        return f"INSERT ({', '.join(self.names)}) VALUES ({', '.join(f'{alias}.{name}' for name in self.names)})"  # noqa: S608 (names of our own)

    def update_clause(self, alias: str) -> str:
        """Return the UPDATE clause of a MERGE statement with the columns of this definition."""
        return f"UPDATE SET {', '.join(f'{name} = {alias}.{name}' for name in self.names)}"

    def ddl(self) -> str:
        """Return the column list of a CREATE TABLE statement, including comments."""
        return ", ".join(column.ddl() for column in self.columns)


def sql_type(arrow: pa.DataType) -> str:
    """Return the name of an Arrow type in Spark SQL.

    Raises:
        ValueError: this function knows no SQL name for the Arrow type.
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
    "One row per picture that can be trained on",
    (
        Column(
            "image_id",
            pa.string(),
            "Id of the picture: <source>/<id>, or <source>/<start of sha256> if the source has no ids",
        ),
        Column("sha256", pa.string(), "SHA-256 of the bytes in column image, hexadecimal"),
        Column("image", pa.binary(), "Bytes of the picture file, unchanged"),
        Column("format", pa.string(), "Pillow name of the picture format, such as PNG"),
        Column("width", pa.int32(), "Width in pixels"),
        Column("height", pa.int32(), "Height in pixels"),
        Column(
            "texts",
            pa.list_(TEXT_TYPE),
            "Captions and answers of the picture, in the order of the source, with repeats. The prompt of an "
            "answer is the question; the prompt of a caption is empty",
        ),
        Column(
            "split",
            pa.string(),
            "Split of the row: train, val or test. The split comes from the source if the source has splits; "
            "else from a nearly equal picture; else from sha256",
        ),
        Column("source", pa.string(), "Name of the data config that added the row"),
        Column("source_row", pa.string(), "First source row with this picture, as <file>#<hash of the row>"),
        Column("ingest_id", pa.string(), "Hash that identifies the ingest that added the row"),
        Column("ingested_at", TIME_TYPE, "Time at which the row was added"),
        Column(
            "fingerprint",
            pa.binary(),
            "Fingerprint by which near duplicates are found; null if data.near_duplicates is false",
            nullable=True,
        ),
        Column(
            "near_of",
            pa.string(),
            "image_id of a picture that is nearly equal; null if no such picture was found",
            nullable=True,
        ),
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
    "One row per source row that was refused, with the whole content of the source row and the reason",
    (
        Column("ingest_id", pa.string(), "Hash that identifies the ingest that refused the row"),
        Column("source", pa.string(), "Name of the data config of the source"),
        Column("source_row", pa.string(), "Source row, as <file>#<hash of the row>"),
        Column(
            "payload",
            pa.string(),
            "Whole source row as a JSON object of its columns, or the raw line if the line could not be parsed",
        ),
        Column("stage", pa.string(), "Stage of the ingest that refused the row: read, decode or merge"),
        Column("reason", pa.string(), f"Reason of the refusal: one of {', '.join(REASONS)}"),
        Column("detail", pa.string(), "What exactly is wrong, such as the size of a picture that is too large"),
        Column("quarantined_at", TIME_TYPE, "Time at which the row was added"),
        Column(
            "replayed_at",
            TIME_TYPE,
            "Time at which a replay accepted the row; null if no replay has accepted the row",
            nullable=True,
        ),
    ),
)

INGESTED = Table(
    "ingested",
    ("source", "item", "state", "rules"),
    "One row per item of a source (file, row of a captions file, or table) that was ingested completely. An "
    "item that has not changed since is not read again",
    (
        Column("source", pa.string(), "Name of the data config of the source"),
        Column("item", pa.string(), "What was read: path of a file, row of a captions file, or id of a table"),
        Column(
            "state",
            pa.string(),
            "State in which the item was read: size and modification time of the file or picture, or version "
            "of the table",
        ),
        Column(
            "rules",
            pa.string(),
            "Hash of the settings that decide which rows are accepted, such as columns, limits and split",
        ),
        Column("ingest_id", pa.string(), "Hash that identifies the ingest that read the item"),
        Column("ingested_at", TIME_TYPE, "Time of the ingest; all items of an ingest have the same time"),
    ),
)

MODEL_DIGEST = Column(
    "model_digest",
    pa.string(),
    "Digest of the files of the model; null in rows that Lakesight 0.1.0 wrote",
    nullable=True,
)
"""Digest that identifies a model by its content. Two registries may have versions with the same name and number."""

PICTURE_COLUMNS = (
    Column(
        "id_column",
        pa.string(),
        "Column of source_table with the ids; null in rows that Lakesight 0.1.0 wrote",
        nullable=True,
    ),
    Column(
        "image_column",
        pa.string(),
        "Column of source_table with the pictures; null in rows that Lakesight 0.1.0 wrote",
        nullable=True,
    ),
    Column(
        "image_root",
        pa.string(),
        "Folder or URL of the pictures if image_column holds paths or URLs; null otherwise",
        nullable=True,
    ),
)
"""Columns that say where the picture of a caption is stored, so that the picture can be shown with the caption."""

GENERATED_CAPTIONS = Table(
    "generated_captions",
    ("source_table", "image_id", "model_name", "model_version", "settings_hash", MODEL_DIGEST.name),
    "One row per picture of a captioned table, model version and set of decoding settings",
    (
        Column("image_id", pa.string(), "Id of the picture in source_table"),
        Column("model_name", pa.string(), "Name of the registered model"),
        Column("model_version", pa.string(), "Version of the registered model"),
        Column("settings_hash", pa.string(), "Hash of prompt, decoding settings and precision"),
        Column("caption", pa.string(), "Generated caption; null if there is an error", nullable=True),
        Column("error", pa.string(), "Reason for which there is no caption; null if there is a caption", nullable=True),
        Column(
            "sha256",
            pa.string(),
            "SHA-256 of the captioned picture; null if the row of source_table has no picture",
            nullable=True,
        ),
        Column("prompt", pa.string(), "Question about the picture; empty for a plain caption"),
        Column("settings", pa.string(), "Decoding settings and precision, as JSON"),
        Column("num_tokens", pa.int32(), "Number of generated tokens, including the end token"),
        Column("mean_logprob", pa.float64(), "Mean log-probability of the generated tokens", nullable=True),
        Column("source_table", pa.string(), "Table that was captioned, which contains the picture"),
        Column("source_version", pa.int64(), "Delta version of source_table from which the picture was read"),
        Column("run_id", pa.string(), "MLflow run that trained the model version"),
        Column("captioned_at", TIME_TYPE, "Time of captioning"),
        MODEL_DIGEST,
        *PICTURE_COLUMNS,
    ),
    checks={"caption_or_error": "(caption IS NULL) != (error IS NULL)"},
    followed=True,
)

EVALUATIONS = Table(
    "evaluations",
    ("model_name", "model_version", "source", "dataset_version", "split", "slice", "metric", MODEL_DIGEST.name),
    "One row per model version, version of table samples, split, slice and metric",
    (
        Column("model_name", pa.string(), "Name of the registered model"),
        Column("model_version", pa.string(), "Version of the registered model"),
        Column("source", pa.string(), "Name of the data config of the source"),
        Column(
            "dataset_version", pa.int64(), "Delta version of table samples from which the rows of the split were read"
        ),
        Column("split", pa.string(), "Split whose rows were evaluated: train, val or test"),
        Column(
            "metric",
            pa.string(),
            "Metric, such as cider. constant_cider and neighbour_cider are the values of the two baselines",
        ),
        Column("value", pa.float64(), "Point estimate of the metric"),
        Column(
            "low", pa.float64(), "Lower bound of the 95% confidence interval, from bootstrap samples of the pictures"
        ),
        Column("high", pa.float64(), "Upper bound of the 95% confidence interval"),
        Column("n", pa.int64(), "Number of pictures over which the metric was computed"),
        Column("evaluated_at", TIME_TYPE, "Time of the evaluation"),
        Column("run_id", pa.string(), "MLflow run that trained the model version"),
        Column(
            "slice",
            pa.string(),
            "Slice: the part of the split whose rows have a value in a column, as column=value; null for the "
            "whole split",
            nullable=True,
        ),
        MODEL_DIGEST,
        Column(
            "tokenisation",
            pa.string(),
            "Name of the rules that split texts into words; null if the metric uses no words, and in rows of "
            "earlier releases",
            nullable=True,
        ),
    ),
)

VERDICTS = Table(
    "verdicts",
    ("source_table", "image_id", "model_name", "model_version", "settings_hash", MODEL_DIGEST.name),
    "One row per caption that a person has reviewed, with the picture. Training can use the rows of this table",
    (
        Column("image_id", pa.string(), "Id of the picture in source_table"),
        Column("source_table", pa.string(), "Table that was captioned, which contains the picture"),
        Column("model_name", pa.string(), "Registered model that generated the caption"),
        Column("model_version", pa.string(), "Version of the registered model"),
        Column(
            "settings_hash", pa.string(), "Hash of prompt, decoding settings and precision, as in generated_captions"
        ),
        Column("prompt", pa.string(), "Question about the picture; empty for a plain caption"),
        Column("caption", pa.string(), "Caption that the model generated"),
        Column("verdict", pa.string(), "Verdict of the reviewer: good, bad or corrected"),
        Column(
            "text",
            pa.string(),
            "Right text: the caption if the verdict is good, the correction if the verdict is corrected, null "
            "if the verdict is bad",
            nullable=True,
        ),
        Column("image", pa.binary(), "Bytes of the picture file that was reviewed"),
        Column("sha256", pa.string(), "SHA-256 of the bytes in column image, in hexadecimal digits"),
        Column("reviewer", pa.string(), "Name of the user who reviewed the caption"),
        Column("judged_at", TIME_TYPE, "Time of the review"),
        MODEL_DIGEST,
    ),
    followed=True,
)

DECISIONS = Table(
    "decisions",
    ("decision_id",),
    "One row per decision about which model version is the champion",
    (
        Column("decision_id", pa.string(), "Random id of the decision"),
        Column("model_name", pa.string(), "Name of the registered model"),
        Column("model_version", pa.string(), "Model version that the decision is about"),
        Column("action", pa.string(), "Decision: promote, refuse or rollback"),
        Column(
            "champion",
            pa.string(),
            "Version that was the champion before the decision; null if there was no champion",
            nullable=True,
        ),
        Column("reasons", pa.list_(pa.string()), "Reasons of a refusal; empty for other decisions"),
        Column("figures", pa.string(), "Metrics and limits on which the decision is based, as a JSON object"),
        Column("decided_by", pa.string(), "Name of the user who ran the command that made the decision"),
        Column("decided_at", TIME_TYPE, "Time of the decision"),
        MODEL_DIGEST,
    ),
)

TABLES = (SAMPLES, QUARANTINE, INGESTED, GENERATED_CAPTIONS, EVALUATIONS, VERDICTS, DECISIONS)

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
    """A column of a table: name, Arrow type, comment, and whether a value may be null."""

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
        comment: description of a row.
        columns: all columns, in the order of the table.
        checks: SQL conditions of the CHECK constraints, by the name of the constraint.
        cluster_by: names of the clustering columns, by which pipeline stages select rows.
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
        Delta collects statistics of scalar columns only, because it would copy each picture just to count nulls.
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
        Column("image_id", pa.string(), "<source>/<id>, or <source>/<start of sha256> if the source has no ids"),
        Column("sha256", pa.string(), "SHA-256 of the image bytes, hexadecimal"),
        Column("image", pa.binary(), "Bytes of the picture file, as received"),
        Column("format", pa.string(), "Picture format by Pillow, such as PNG"),
        Column("width", pa.int32(), "Width in pixels"),
        Column("height", pa.int32(), "Height in pixels"),
        Column(
            "texts",
            pa.list_(TEXT_TYPE),
            "Texts of the picture in the order of the source, with repeats: captions have an empty prompt, answers "
            "have the question as prompt",
        ),
        Column(
            "split",
            pa.string(),
            "train, val or test; derived from sha256, from a near duplicate, or from the source",
        ),
        Column("source", pa.string(), "Name of the data config that added the row"),
        Column("source_row", pa.string(), "<file>#<hash of the row> of the first source row with this picture"),
        Column("ingest_id", pa.string(), "Hash that identifies the ingest that added the row"),
        Column("ingested_at", TIME_TYPE, "Time at which the row was added"),
        Column(
            "fingerprint",
            pa.binary(),
            "Fingerprint for near duplicates (executor/ingest/fingerprint.py); null if not computed",
            nullable=True,
        ),
        Column("near_of", pa.string(), "image_id of a near duplicate; null if there is none", nullable=True),
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
    "One row per source row that was refused, with its whole content and the reason",
    (
        Column("ingest_id", pa.string(), "Hash that identifies the ingest that refused the row"),
        Column("source", pa.string(), "Name of the data config"),
        Column("source_row", pa.string(), "<file>#<hash of the row>"),
        Column(
            "payload", pa.string(), "Whole row as a JSON object of columns, or the raw line if it could not be parsed"
        ),
        Column("stage", pa.string(), "Stage that refused the row: read, decode or merge"),
        Column("reason", pa.string(), f"One of {', '.join(REASONS)}"),
        Column("detail", pa.string(), "Details of the reason"),
        Column("quarantined_at", TIME_TYPE, "Time at which the row was added"),
        Column(
            "replayed_at", TIME_TYPE, "Time at which a replay accepted the row; null if no replay has", nullable=True
        ),
    ),
)

INGESTED = Table(
    "ingested",
    ("source", "item", "state", "rules"),
    "One row per item that was ingested completely. An unchanged item is not read again",
    (
        Column("source", pa.string(), "Name of the data config"),
        Column("item", pa.string(), "A file, a row of a captions file, or the id of a table"),
        Column("state", pa.string(), "Size and modification time of the file or picture, or version of the table"),
        Column(
            "rules",
            pa.string(),
            "Hash of the settings that decide whether a row is accepted, such as columns, limits and split",
        ),
        Column("ingest_id", pa.string(), "Hash that identifies the ingest that read the item"),
        Column("ingested_at", TIME_TYPE, "Time of the ingest, which is equal for all items of the ingest"),
    ),
)

MODEL_DIGEST = Column(
    "model_digest", pa.string(), "Digest of the files of the model; null in rows of Lakesight 0.1.0", nullable=True
)
"""Digest that identifies a model by its content. Two registries may have versions with the same name and number."""

PICTURE_COLUMNS = (
    Column("id_column", pa.string(), "Column of source_table with the ids; null in rows of 0.1.0", nullable=True),
    Column("image_column", pa.string(), "Column with the pictures; null in rows of 0.1.0", nullable=True),
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
    "One row per picture of a source table, per model version and per decoding settings",
    (
        Column("image_id", pa.string(), "Id of the row in the source table"),
        Column("model_name", pa.string(), "Registered model"),
        Column("model_version", pa.string(), "Version of the registered model"),
        Column("settings_hash", pa.string(), "Hash of prompt, decoding settings and precision"),
        Column("caption", pa.string(), "Generated caption; null if there is an error", nullable=True),
        Column("error", pa.string(), "Reason for a missing caption; null if there is a caption", nullable=True),
        Column("sha256", pa.string(), "SHA-256 of the captioned picture; null if there is no picture", nullable=True),
        Column("prompt", pa.string(), "Prompt; empty for a plain caption"),
        Column("settings", pa.string(), "Decoding settings and precision, as JSON"),
        Column("num_tokens", pa.int32(), "Number of generated tokens, including the end token"),
        Column("mean_logprob", pa.float64(), "Mean log-probability of the generated tokens", nullable=True),
        Column("source_table", pa.string(), "Table that contains the picture"),
        Column("source_version", pa.int64(), "Version of source_table that was read"),
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
    "One row per model version, dataset version, split, slice and metric",
    (
        Column("model_name", pa.string(), "Registered model"),
        Column("model_version", pa.string(), "Version of the registered model"),
        Column("source", pa.string(), "Name of the data config"),
        Column("dataset_version", pa.int64(), "Version of the table samples from which the split was read"),
        Column("split", pa.string(), "Evaluated split"),
        Column("metric", pa.string(), "Metric, such as cider; constant_cider and neighbour_cider are baselines"),
        Column("value", pa.float64(), "Point estimate of the metric"),
        Column("low", pa.float64(), "Lower bound of the 95% bootstrap confidence interval over pictures"),
        Column("high", pa.float64(), "Upper bound of the 95% bootstrap confidence interval"),
        Column("n", pa.int64(), "Number of pictures"),
        Column("evaluated_at", TIME_TYPE, "Time of the evaluation"),
        Column("run_id", pa.string(), "MLflow run that trained the model version"),
        Column("slice", pa.string(), "Part of the split, as column=value; null for the whole split", nullable=True),
        MODEL_DIGEST,
        Column(
            "tokenisation",
            pa.string(),
            "Rules that split texts into words; null for a metric without words and in rows of earlier versions",
            nullable=True,
        ),
    ),
)

VERDICTS = Table(
    "verdicts",
    ("source_table", "image_id", "model_name", "model_version", "settings_hash", MODEL_DIGEST.name),
    "One row per caption that a person has reviewed, with its picture. The table can be trained on",
    (
        Column("image_id", pa.string(), "Id of the row in the source table"),
        Column("source_table", pa.string(), "Table that contains the picture"),
        Column("model_name", pa.string(), "Registered model that generated the caption"),
        Column("model_version", pa.string(), "Version of the registered model"),
        Column(
            "settings_hash", pa.string(), "Hash of prompt, decoding settings and precision, as in generated_captions"
        ),
        Column("prompt", pa.string(), "Prompt; empty for a plain caption"),
        Column("caption", pa.string(), "Caption that the model generated"),
        Column("verdict", pa.string(), "good, bad or corrected"),
        Column(
            "text",
            pa.string(),
            "Correct text, which is the caption or its correction; null if the verdict is bad",
            nullable=True,
        ),
        Column("image", pa.binary(), "Bytes of the picture file that was reviewed"),
        Column("sha256", pa.string(), "SHA-256 of image, hexadecimal"),
        Column("reviewer", pa.string(), "User who reviewed the caption"),
        Column("judged_at", TIME_TYPE, "Time of the review"),
        MODEL_DIGEST,
    ),
    followed=True,
)

DECISIONS = Table(
    "decisions",
    ("decision_id",),
    "One row per decision about the serving model version, in the order of decided_at",
    (
        Column("decision_id", pa.string(), "Random id of the decision"),
        Column("model_name", pa.string(), "Registered model"),
        Column("model_version", pa.string(), "Model version that the decision is about"),
        Column("action", pa.string(), "promote, refuse or rollback"),
        Column("champion", pa.string(), "Serving version at that time; null if there was none", nullable=True),
        Column("reasons", pa.list_(pa.string()), "Reasons for a refusal; empty otherwise"),
        Column("figures", pa.string(), "Figures that the decision is based on, as a JSON object"),
        Column("decided_by", pa.string(), "User of the process that made the decision"),
        Column("decided_at", TIME_TYPE, "Time of the decision"),
        MODEL_DIGEST,
    ),
)

TABLES = (SAMPLES, QUARANTINE, INGESTED, GENERATED_CAPTIONS, EVALUATIONS, VERDICTS, DECISIONS)

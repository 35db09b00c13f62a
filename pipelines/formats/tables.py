"""Definitions of all Delta tables: columns, types and comments. No other module defines columns of a Delta table."""

from __future__ import annotations

import pyarrow as pa

from pipelines.formats.table_schema import TIME_TYPE, Column, Table
from vlm.errors import IMAGE_REASONS

REASONS = (
    "unreadable_file",
    "malformed_record",
    *IMAGE_REASONS,
    "empty_text",
    "text_too_long",
    "too_many_texts",
    "conflicting_id",
    "decode_timeout",
    "decoder_crash",
)
"""All reasons for which a row can be in the table `quarantine`."""

TEXT_TYPE = pa.struct([pa.field("prompt", pa.string(), nullable=False), pa.field("text", pa.string(), nullable=False)])

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
        Column("format", pa.string(), "Name of the picture format in Pillow, such as PNG"),
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

TEXTS = Table(
    "texts",
    ("text_id",),
    "One row per text that can be trained on without a picture",
    (
        Column("text_id", pa.string(), "Id of the text: <source>/<start of sha256>"),
        Column("sha256", pa.string(), "SHA-256 of text in UTF-8, hexadecimal"),
        Column("text", pa.string(), "Document, paragraph or line, in Unicode NFC"),
        Column(
            "split",
            pa.string(),
            "Split of the text: train, val or test. The split comes from the name of the file if data.split.kind is "
            "file; else from sha256",
        ),
        Column("source", pa.string(), "Name of the data config that added the row"),
        Column("source_row", pa.string(), "First source row with this text, as <file>#<hash of the row>"),
        Column("ingest_id", pa.string(), "Hash that identifies the ingest that added the row"),
        Column("ingested_at", TIME_TYPE, "Time at which the row was added"),
    ),
    checks={"usable": "split IN ('train', 'val', 'test') AND length(text) > 0 AND length(sha256) = 64"},
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
    "item that has not changed since its ingest is not read again",
    (
        Column("source", pa.string(), "Name of the data config of the source"),
        Column("item", pa.string(), "What was read: path of a file, row of a captions file, or id of a table"),
        Column(
            "state",
            pa.string(),
            "State in which the item was read: size and modification time of the file or picture, or version "
            "of the table and id of the commit that made the version",
        ),
        Column(
            "rules",
            pa.string(),
            "Hash of the settings that decide which rows are accepted, such as columns, limits and split",
        ),
        Column("ingest_id", pa.string(), "Hash that identifies the ingest that read the item"),
        Column("ingested_at", TIME_TYPE, "Time of the ingest; all items of an ingest have the same time"),
        Column(
            "filled_version",
            pa.int64(),
            "Version of the Delta table (samples, or texts for plain text) that contains the rows of the item; null if "
            "an earlier release wrote the row",
            nullable=True,
        ),
        Column(
            "filled_commit",
            pa.string(),
            "Id of the commit that made filled_version. If the table no longer has this commit, the item is read again",
            nullable=True,
        ),
        Column(
            "refused_version",
            pa.int64(),
            "Delta version of table quarantine that contains the refused rows of the item; null if no row was refused, "
            "or if an earlier release wrote the row",
            nullable=True,
        ),
        Column(
            "refused_commit",
            pa.string(),
            "Id of the commit that made refused_version. If table quarantine no longer has this commit, the item is "
            "read again",
            nullable=True,
        ),
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
    (
        *("source_table", "id_column", "image_column", "image_id"),
        *("model_name", "model_version", "settings_hash", MODEL_DIGEST.name),
    ),
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
        Column(
            "source_commit",
            pa.string(),
            "Id of the commit that made source_version; null if an earlier release wrote the row",
            nullable=True,
        ),
        Column("run_id", pa.string(), "MLflow run that trained the model version"),
        Column("captioned_at", TIME_TYPE, "Time of captioning"),
        MODEL_DIGEST,
        *PICTURE_COLUMNS,
        Column(
            "read_at",
            TIME_TYPE,
            "Time of the last captioning job that read the picture, even if the job did not caption the picture again; "
            "null if an earlier release wrote the row",
            nullable=True,
        ),
        Column(
            "source_file",
            pa.string(),
            "Data file and columns of source_table from which the picture was read: name, size and time of the file, "
            "and a hash of the columns; `unreadable_file:` and a time in microseconds if a later job could not read "
            "the picture again; null if an earlier release wrote the row",
            nullable=True,
        ),
    ),
    checks={"caption_or_error": "(caption IS NULL) != (error IS NULL)"},
    followed=True,
)

EVALUATIONS = Table(
    "evaluations",
    (
        *("model_name", "model_version", "source", "dataset_version", "split", "shards_where", "slice", "metric"),
        MODEL_DIGEST.name,
    ),
    "One row per model version, version of table samples, split, condition on the pictures, slice and metric",
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
        Column(
            "n",
            pa.int64(),
            "Number of pictures of the split, or number of rows (picture and prompt) of the slice",
        ),
        Column(
            "evaluated_at",
            TIME_TYPE,
            "Time of the evaluation. If an evaluation is repeated with the same results, and no other evaluation was "
            "newer, the time does not change",
        ),
        Column("run_id", pa.string(), "MLflow run that trained the model version"),
        Column(
            "slice",
            pa.string(),
            "Condition that selects the rows of the split, as column=value; null for the whole split",
            nullable=True,
        ),
        MODEL_DIGEST,
        Column(
            "tokenisation",
            pa.string(),
            "Name of the rules that split texts into words; null if the metric uses no words, or if an "
            "earlier release wrote the row",
            nullable=True,
        ),
        Column(
            "shards_where",
            pa.string(),
            "SQL condition data.shards.where, which selected the pictures of the split; null if all pictures of the "
            "split were evaluated, or if an earlier release wrote the row",
            nullable=True,
        ),
    ),
)

VERDICTS = Table(
    "verdicts",
    ("source_table", "image_id", "sha256", "model_name", "model_version", "settings_hash", MODEL_DIGEST.name),
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
        Column("model_version", pa.string(), "Model version that was promoted, refused or restored by the decision"),
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
        Column(
            "champion_digest",
            pa.string(),
            "Digest of the files of the version in column champion; null if unknown or if there was no champion",
            nullable=True,
        ),
    ),
)

TABLES = (SAMPLES, TEXTS, QUARANTINE, INGESTED, GENERATED_CAPTIONS, EVALUATIONS, VERDICTS, DECISIONS)

"""Check without Spark whether every row of a caption job has its caption. Spark starts only if a row may lack one.

The check reads only Delta logs and small columns of tables. If the check is not certain that every row has its caption,
Spark starts and looks for rows without a caption. The check is not certain, for example, if the job has an SQL
condition, or if a table is in a catalog or on an object store. The check is also not certain if data files of the
table were replaced, or if the table may have deletion vectors or column mapping. Deletion vectors delete rows without
replacing a data file. If an earlier job failed or was killed, Spark counts the rows of that job.
"""

from __future__ import annotations

import time
from pathlib import Path

import pyarrow as pa
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError

from pipelines.driver.caption.run import (
    CaptionReport,
    CaptionRequest,
    caption_key,
    check_request,
    failed_jobs,
    pending_folder,
)
from pipelines.driver.caption.source_table import hash_columns
from pipelines.driver.model_files import ModelFiles
from pipelines.errors import UserError
from pipelines.executor.caption import UNREADABLE
from pipelines.executor.ingest.storage import is_url
from pipelines.formats.caption_stats import CaptionStats
from pipelines.formats.delta_files import open_delta, query, quoted_text
from pipelines.formats.tables import GENERATED_CAPTIONS
from pipelines.platform import Platform
from vlm.errors import did_you_mean


def find_finished(platform: Platform, model: ModelFiles, request: CaptionRequest) -> CaptionReport | None:
    """Return the report of the job if every row certainly has a caption or an error, else None.

    Raises:
        UserError: the request or its source table is invalid (`check_request`, `check_source`).
    """
    started = time.monotonic()
    check_request(model, request)
    check_source(platform, request)
    if request.where or request.source_version is not None or request.retry_errors or request.remove_deleted:
        return None
    tables = _open_tables(platform, request)
    if tables is None:
        return None
    source, captions = tables
    *_, key = caption_key(model, request, request.source_table)
    failed = failed_jobs(platform, model, request, request.source_table)
    if any(pending_folder(platform, key).glob("*.parquet")) or failed.since():
        return None
    if source.protocol().min_reader_version > 1:  # the table may have deletion vectors or column mapping
        return None
    rows = _count_captioned_rows(source, captions, key, model, request)
    if rows is None:
        return None
    return CaptionReport(
        **key,
        model_digest=model.digest,
        run_id=model.run_id,
        source_version=source.version(),
        considered=rows,
        already=rows,
        captioned=0,
        errors=0,
        changed=0,
        recovered=0,
        removed=0,
        figures=CaptionStats().figures(),
        seconds=time.monotonic() - started,
    )


def check_source(platform: Platform, request: CaptionRequest) -> None:
    """Before Spark starts, check that a source table on a local disk exists and has the id column and picture column.

    Raises:
        UserError: there is no Delta table in the folder, or a column is missing.
    """
    location = platform.table_location(request.source_table)
    if platform.remote or location is None or is_url(location):
        return
    if not Path(location, "_delta_log").is_dir():
        known = sorted(path.parent.name for path in (platform.tables or Path()).glob("*/_delta_log"))
        raise UserError(
            "the table cannot be read as a Delta table",
            where=request.source_table,
            got=f"no Delta table in folder {location}",
            fix=f"give the path of a Delta table's folder, or one of these table names: {', '.join(known)}"
            if known
            else "run `lakesight ingest`",
        )
    try:
        names = [field.name for field in open_delta(location).schema().fields]
    except DeltaError:
        return  # Spark may read a table that deltalake cannot read
    for column in (request.id_column, request.image_column):
        if column not in names:
            raise UserError(
                f"table {request.source_table} has no column {column!r}",
                where="--id-column, --image-column",
                got=column,
                fix=f"choose one of {', '.join(names)}{did_you_mean(column, names)}",
            )


def _open_tables(platform: Platform, request: CaptionRequest) -> tuple[DeltaTable, DeltaTable] | None:
    """Open the source table and `generated_captions`.

    Return None if a table cannot be read from a local disk, or if `generated_captions` lacks a column.
    """
    location = platform.table_location(request.source_table)
    if platform.tables is None or location is None or not Path(location, "_delta_log").is_dir():
        return None
    captions = platform.tables / GENERATED_CAPTIONS.name
    if not Path(captions, "_delta_log").is_dir():
        return None
    try:
        opened = open_delta(location), open_delta(captions)
    except DeltaError:
        return None
    is_current = {field.name for field in opened[1].schema().fields} >= set(GENERATED_CAPTIONS.names)
    return opened if is_current else None


def _count_captioned_rows(
    source: DeltaTable, captions: DeltaTable, key: dict[str, str], model: ModelFiles, request: CaptionRequest
) -> int | None:
    """Return the number of rows of a table, or None if a row may lack a caption (or an error) for its current picture.

    A row whose picture could not be read (UNREADABLE) may lack a caption, because the picture may be readable now.

    Delta never changes a data file, and each caption has the identity of the data file from which its picture was read.
    Therefore, if a data file has as many captions as rows, each of its rows has a caption. If two rows have the same
    id, they share one caption, so one of their data files has fewer captions than rows.
    """
    condition = " AND ".join(f"{name} = {quoted_text(value)}" for name, value in key.items())
    of_run = f"model_digest IS NULL AND run_id = {quoted_text(model.run_id)}"
    of_model = f"(model_digest = {quoted_text(model.digest)} OR {of_run})" if model.digest else f"({of_run})"
    sql = f"""
    SELECT source_file, COUNT(DISTINCT image_id) AS num_rows FROM captions
    WHERE source_file IS NOT NULL AND COALESCE(error NOT LIKE '{UNREADABLE}%', TRUE) AND {condition} AND {of_model}
    GROUP BY source_file
    """  # noqa: S608 the values are quoted literals
    found = query({"captions": captions}, sql).read_all()
    captioned = dict(zip(found["source_file"].to_pylist(), found["num_rows"].to_pylist(), strict=True))
    columns = hash_columns((request.id_column, request.image_column, request.image_root), None)
    rows = 0
    # pyarrow.table() would import pandas
    files = pa.RecordBatchReader.from_stream(source.get_add_actions(flatten=True)).read_all()
    for file in files.select(["path", "size_bytes", "modification_time", "num_records"]).to_pylist():
        name = file["path"].rpartition("/")[2]
        time = file["modification_time"] * 1000  # Spark gives microseconds, and Delta's log has milliseconds
        if file["num_records"] is None:
            return None
        if captioned.get(f"{name} {file['size_bytes']} {time} {columns}", 0) != file["num_records"]:
            return None
        rows += file["num_records"]
    return rows

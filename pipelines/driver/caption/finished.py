"""Check whether every row of a caption job has its caption, so that Spark starts only if it is needed.

The check reads only Delta logs and small columns of tables. If the check is not certain that every row has its caption,
Spark starts and looks for rows without a caption. The check is not certain, for example, if the job has an SQL
condition, or if a table is in a catalog or on an object store. The check is also not certain if data files of a
captioned table version were replaced, or if the table may have deletion vectors. Deletion vectors delete rows without
replacing a data file.
"""

from __future__ import annotations

import time
from pathlib import Path

import pyarrow as pa
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError

from pipelines.driver.caption.run import CaptionReport, CaptionRequest, caption_key, check_request, pending_folder
from pipelines.driver.model_files import ModelFiles
from pipelines.errors import UserError
from pipelines.executor.ingest.storage import is_url
from pipelines.formats.caption_stats import CaptionStats
from pipelines.formats.delta_files import commit_id, local_folder, open_delta, query, quoted_name, quoted_text
from pipelines.formats.tables import GENERATED_CAPTIONS
from pipelines.platform import Platform
from vlm.errors import did_you_mean

ID_TYPES = (pa.string(), pa.int8(), pa.int16(), pa.int32(), pa.int64())
"""Types of an id column whose values Spark and DataFusion (the SQL engine of this check) convert to the same text."""
IMAGE_TYPES = (pa.string(), pa.binary())


def find_finished(platform: Platform, model: ModelFiles, request: CaptionRequest) -> CaptionReport | None:
    """Return the report of the job if every row already has a caption, or None if a row may lack a caption.

    Raises:
        UserError: the request is invalid, as in `check_request`.
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
    if any(pending_folder(platform, key).glob("*.parquet")) or not _is_plain(source, request):
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
            fix=f"name the folder of a Delta table, or one of {', '.join(known)}"
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
    """Open the source table and `generated_captions`, or return None if a table cannot be read from a local disk."""
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


def _is_plain(source: DeltaTable, request: CaptionRequest) -> bool:
    """Return whether every Delta reader can read the table and whether its id and picture columns have usual types.

    A Delta table with reader version 1 has no deletion vectors and no column mapping.
    """
    types = {field.name: pa.field(field).type for field in source.schema().fields}
    image = (pa.string(),) if request.image_root is not None else IMAGE_TYPES
    plain = source.protocol().min_reader_version == 1
    return plain and types.get(request.id_column) in ID_TYPES and types.get(request.image_column) in image


def _count_captioned_rows(
    source: DeltaTable, captions: DeltaTable, key: dict[str, str], model: ModelFiles, request: CaptionRequest
) -> int | None:
    """Return the number of rows of a table if each row has a caption or an error for its current picture, else None.

    Delta never changes a data file. If the newest table version still has all data files of an earlier captioned
    version, the rows that were captioned at the earlier version are unchanged. An earlier version counts only if the
    table still has the commit that made this version.
    """
    read_from = {"id_column": request.id_column, "image_column": request.image_column}
    if request.image_root is not None:
        read_from["image_root"] = request.image_root
    condition = " AND ".join(f"{name} = {quoted_text(value)}" for name, value in (key | read_from).items())
    if request.image_root is None:
        condition += " AND image_root IS NULL"
    of_run = f"model_digest IS NULL AND run_id = {quoted_text(model.run_id)}"
    of_model = f"(model_digest = {quoted_text(model.digest)} OR {of_run})" if model.digest else f"({of_run})"
    sql = f"""
    SELECT source_version, source_commit, COUNT(*) AS num_rows, COUNT(id) AS num_ids, COUNT(DISTINCT id) AS distinct_ids
    FROM (
      SELECT CAST({quoted_name(request.id_column)} AS VARCHAR) AS id FROM source
    ) AS ids LEFT JOIN (
      SELECT image_id, MIN(source_version) AS source_version, MIN(source_commit) AS source_commit
      FROM captions WHERE {condition} AND {of_model} GROUP BY image_id
    ) AS done ON id = image_id GROUP BY source_version, source_commit
    """  # noqa: S608 the values are quoted literals
    found = query({"source": source, "captions": captions}, sql).read_all().to_pylist()
    folder, files = local_folder(source), set(source.file_uris())
    for row in found:
        version, commit = row["source_version"], row["source_commit"]
        if commit is None or commit != commit_id(folder, version):
            return None  # the row has no caption, or the table was written anew or restored after the captioning
        if not row["num_rows"] == row["num_ids"] == row["distinct_ids"]:
            return None
        if version != source.version() and not _files_at(source, version) <= files:
            return None
    return sum(int(row["num_rows"]) for row in found)


def _files_at(source: DeltaTable, version: int) -> set[str]:
    """Return the URIs of the data files of a table version, or {""} if Delta no longer has the version."""
    try:
        return set(open_delta(source.table_uri, version).file_uris())
    except DeltaError:
        return {""}

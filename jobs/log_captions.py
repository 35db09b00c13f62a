"""Log a captioning job to MLflow: parameters, the captioned table as input, metrics, a drift table, and a gallery."""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.common import Job
from jobs.output import first_line

if TYPE_CHECKING:
    from pipelines.driver.caption.run import CaptionReport, CaptionRequest
    from pipelines.tracking.reports import StageLog

logger = logging.getLogger(__name__)

SHOWN_CAPTIONS = 24
"""Maximum number of captions on the gallery page of a job. The page shows the least certain captions."""
NAMES = ("model_name", "model_version", "model_digest", "settings_hash", "source_table", "source_version")
COLUMNS = ("id_column", "image_column")


@contextmanager
def only_warn(what: str) -> Iterator[None]:
    """Log a warning if the block fails, because the captions are already written.

    An error of the block would replace the report of the job, and the error of a job that fails because of its rows.

    Args:
        what: clause that says what has failed, for the warning.
    """
    try:
        yield
    except Exception as error:  # noqa: BLE001 no error of any library may end the job
        logger.warning("the captions are written, but %s: %s", what, first_line(error))


def log_captions(job: Job, report: CaptionReport, request: CaptionRequest, started: datetime, *, good: bool) -> None:
    """Log a caption report to MLflow if the job captioned a row, found an error in a row, or recovered a caption.

    The captions have already been written, so a failure only causes a warning.

    Args:
        job: running command.
        report: report of the job, with the drift.
        request: request of the job.
        started: time at which the job started, in UTC.
        good: whether the job succeeded.
    """
    if report.considered == report.already and not report.recovered:
        return
    from pipelines.tracking.reports import log_stage

    with only_warn("the report could not be logged to MLflow"):
        log_stage(job.platform, _stage_log(job, report, request, started), good=good)


def _stage_log(job: Job, report: CaptionReport, request: CaptionRequest, started: datetime) -> StageLog:
    from pipelines.driver.caption.source_table import arrow_columns
    from pipelines.tracking.describe.datasets import captioned_input
    from pipelines.tracking.reports import StageLog

    profile = {name: getattr(report, name) for name in ("considered", "already", "captioned", "errors")}
    columns = arrow_columns(job.spark.read.table(report.source_table).schema)
    drift = [{"figure": name} | each.model_dump() for name, each in report.drift.items()]
    captioned = f"{report.model_name} version {report.model_version} on {report.source_table}"
    return StageLog(
        kind="caption",
        name=f"{captioned}: {report.captioned:,} captions"
        + (f", {report.recovered:,} recovered" if report.recovered else ""),
        report=report.model_dump(),
        tags={name: getattr(report, name) for name in NAMES}
        | {name: getattr(request, name) for name in COLUMNS}
        | {"drifted": ", ".join(name for name, each in report.drift.items() if each.beyond)},
        params=_params(report, request),
        tables={"drift": {name: [row[name] for row in drift] for name in drift[0]}} if drift else {},
        inputs=[captioned_input((report.source_table, report.source_version), columns, profile)],
        pages=_write_gallery(job, report, request, started),
        text=_describe(job, report, request),
    )


def _params(report: CaptionReport, request: CaptionRequest) -> dict[str, str]:
    """Return the parameters of a job: model version, table, the options that select rows, and generation settings."""
    selection = ("id_column", "image_column", "image_root", "prompt", "where", "retry_errors", "remove_deleted")
    params = {name: getattr(report, name) for name in ("model_name", "model_version", "source_table", "source_version")}
    params |= {name: getattr(request, name) for name in (*selection, "precision", "max_error_share")}
    settings = request.settings.model_dump(mode="json") if request.settings else {}
    params |= {f"generation.{name}": json.dumps(value) for name, value in settings.items()}
    return {name: str(value) for name, value in params.items() if value not in (None, "")}


def _describe(job: Job, report: CaptionReport, request: CaptionRequest) -> str:
    from pipelines.tracking.describe.notes import code_block, version_link

    beyond = [name for name, each in report.drift.items() if each.beyond]
    drift = ""
    if report.drift:
        rows = " in the rows of an earlier job that failed" if report.drift_of_failed else ""
        drift = (
            f" Drift beyond its limit{rows}: {', '.join(beyond)}." if beyond else f" No drift beyond its limits{rows}."
        )
    if report.drift_unchecked:
        drift += f" Drift was not checked: {report.drift_unchecked}."
    recovered = f" {report.recovered:,} captions of an interrupted job were recovered." if report.recovered else ""
    return "\n\n".join(
        [
            f"{version_link(job.platform, report.model_name, report.model_version)} captioned {report.captioned:,} of "
            f"{report.considered:,} rows of `{report.source_table.replace('`', '')}` (version "
            f"{report.source_version}); {report.errors:,} rows have an error.{recovered}{drift}",
            code_block(_command(job, report, request)),
        ]
    )


def _command(job: Job, report: CaptionReport, request: CaptionRequest) -> str:
    """Return the command line that selects the same rows, and uses the same model version and the same settings.

    Options with their default values are left out, except the table, its columns and the version.
    """
    from pipelines.platform.platform import TABLE_IN_FOLDER

    in_folder = TABLE_IN_FOLDER.fullmatch(report.source_table)
    options = {
        "--table": in_folder["path"] if in_folder else report.source_table,
        "--id-column": request.id_column,
        "--image-column": request.image_column,
        "--version": report.model_version,
    }
    defaults = {name: field.default for name, field in type(request).model_fields.items()}
    for name in ("image_root", "where", "prompt", "precision", "max_error_share"):
        if (value := getattr(request, name)) != defaults[name]:
            options[f"--{name.replace('_', '-')}"] = str(value)
    words = [word for pair in options.items() for word in pair]
    words += [f"--{name.replace('_', '-')}" for name in ("retry_errors", "remove_deleted") if getattr(request, name)]
    return f"{job.command('caption')} {shlex.join(words)}"


def _write_gallery(job: Job, report: CaptionReport, request: CaptionRequest, started: datetime) -> list[Path]:
    """Write a page of the job's least certain captions with their pictures, if the platform's tables are files.

    The page shows captions that were written since the start of the job for the same table and columns, by the same
    model with the same settings. If another job captions other rows of these columns at the same time, its captions may
    be on the page too. The result is a list with the path of the page, or an empty list if there is no page.
    """
    from pipelines.formats.delta_files import is_supported, quoted_text

    if not is_supported(job.platform.tables):
        return []
    from jobs.show import write_gallery
    from jobs.table_files import open_table, table_relation
    from pipelines.review.source_pictures import PictureColumns

    names = ("source_table", "model_name", "model_version", "model_digest", "settings_hash")
    key = {name: getattr(report, name) for name in names} | {name: getattr(request, name) for name in COLUMNS}
    conditions = [f"COALESCE({name}, '') = {quoted_text(value)}" for name, value in key.items()]
    where = " AND ".join([*conditions, f"captioned_at >= '{started.isoformat()}'"])
    captions = open_table(job, "generated_captions", None)
    rows = table_relation(captions).select([], where, "mean_logprob", SHOWN_CAPTIONS).read_all()
    if not rows.num_rows:
        return []
    return [write_gallery(job, "generated_captions", captions.version(), rows, PictureColumns(), selection=(where,))]

"""Totals of an ingest: what became of every row, and the check that the ingest may count as a success."""

from __future__ import annotations

from pipelines.config import DataConfig
from pipelines.driver.ingest.near_duplicates import NearReport
from pipelines.errors import StageFailed, UserError
from vlm.config import Config


class IngestReport(Config):
    """Result of an ingest: rows_in = new + merged + duplicates + quarantined.

    Attributes:
        source: name of the data config.
        ingest_id: hash of the source and its files.
        items: items read: files, rows of a folder's captions file, or a table.
        unchanged: items not read, because they were ingested before and have not changed.
        rows_in: rows read.
        new: rows that added a picture to `samples`, with all their texts.
        merged: rows that added a text to a picture.
        duplicates: rows that added nothing: same picture and text, or a row that is already in `quarantine`.
        quarantined: rows added to `quarantine`.
        refused: rows of this input that cannot be samples, including those already in `quarantine`.
        reasons: `quarantined` by reason.
        removed: pictures removed from `samples`, because the source table has changed or deleted their rows.
        replaced: rows of each table that a full refresh has replaced.
        splits: pictures of this source in `samples`, by split.
        equal_pictures_across_splits: pictures of this input with the same bytes in two splits of the source.
        near_duplicates: new pictures that resemble another picture of the source.
        dataset_version: version of `samples` that last changed this source.
        seconds: duration.
    """

    source: str
    ingest_id: str
    items: int
    unchanged: int
    rows_in: int
    new: int
    merged: int
    duplicates: int
    quarantined: int
    refused: int
    reasons: dict[str, int]
    removed: int
    replaced: dict[str, int]
    splits: dict[str, int]
    equal_pictures_across_splits: int
    near_duplicates: NearReport
    dataset_version: int
    seconds: float

    @property
    def nothing_new(self) -> bool:
        """Whether the ingest left the tables unchanged."""
        return self.rows_in == self.duplicates and not (self.removed or self.replaced)


class TooManyRefused(StageFailed):
    """More rows were refused than data.limits.max_bad_share allows. Both tables are written, as `report` says."""

    def __init__(self, report: IngestReport, where: str, max_bad_share: float) -> None:
        self.report = report
        super().__init__(
            "too many rows were refused",
            where=f"{where}, data {report.source}, ingest {report.ingest_id}",
            got=f"{report.refused} of {report.rows_in} rows ({report.refused / report.rows_in:.1%}, "
            f"data.limits.max_bad_share is {max_bad_share:.1%}); {_newly_quarantined(report)}",
            fix="both tables are written. Inspect the bad rows with `lakesight quarantine`, fix the cause, then run "
            "`lakesight quarantine replay --reason REASON` or ingest again",
        )


def _newly_quarantined(report: IngestReport) -> str:
    reasons = ", ".join(f"{count} {reason}" for reason, count in report.reasons.items())
    return f"newly quarantined: {reasons or 'none, all were quarantined before'}"


def check_totals(report: IngestReport, config: DataConfig) -> None:
    """Check that the rows of an ingest add up and that enough of them could be used.

    Raises:
        UserError: the input has no rows, or none that can be used.
        StageFailed: the rows do not add up.
        TooManyRefused: more rows were refused than data.limits.max_bad_share allows.
    """
    total = report.new + report.merged + report.duplicates + report.quarantined
    if total != report.rows_in:
        raise StageFailed(
            "the rows of an ingest do not add up",
            where=config.source.where,
            got=f"{report.rows_in} in; {report.new} new + {report.merged} merged + {report.duplicates} duplicates + "
            f"{report.quarantined} quarantined = {total}",
            fix="this is a defect of Lakesight: please report it with the ingest's log",
        )
    if not any(report.splits.values()):
        raise _no_samples_error(report, config)
    if report.refused > config.limits.max_bad_share * report.rows_in:
        raise TooManyRefused(report, config.source.where, config.limits.max_bad_share)


def _no_samples_error(report: IngestReport, config: DataConfig) -> UserError:
    if report.unchanged:
        return UserError(
            "the whole input was ingested before, but samples has no row of it",
            where=config.source.where,
            got=f"{report.unchanged} unchanged files or rows of captions",
            fix="if the rows were deleted, `lakesight ingest --refresh` reads everything again",
        )
    if not report.rows_in:
        return UserError("the input has no rows", where=config.source.where, got="only a header", fix="add rows")
    return UserError(
        "not one row of the input could be used",
        where=config.source.where,
        got=f"{report.rows_in} rows, {_newly_quarantined(report)}",
        fix="inspect them with `lakesight quarantine`; check data.source.columns",
    )

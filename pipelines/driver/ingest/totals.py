"""The account of an ingest: what became of every row, and whether that may end green."""

from __future__ import annotations

from pipelines.config import DataConfig
from pipelines.driver.ingest.near_duplicates import NearReport
from pipelines.errors import StageFailed, UserError
from vlm.config import Config


class IngestReport(Config):
    """What became of the rows: rows_in = new + merged + duplicates + quarantined.

    Attributes:
        source: name of the data config.
        ingest_id: hash of the source and its files.
        items: what was read: files; of a folder, rows of its captions file; or a table.
        unchanged: what was not read, because it was taken in before and is as it was.
        rows_in: records read.
        new: rows that brought a picture new to `samples`, with all their texts.
        merged: rows that brought a further text for a picture.
        duplicates: rows that brought nothing: same picture and text, or the same refused row again.
        quarantined: rows newly in `quarantine`.
        refused: rows of this input that cannot be samples, those that were in `quarantine` before included.
        reasons: `quarantined` by reason.
        removed: pictures taken out of `samples`: the table they came from changed their rows or has them no more.
        replaced: by a full refresh, rows of each table that went before its own came.
        splits: pictures of this source now in `samples`, by split.
        equal_pictures_across_splits: pictures of this input with the same bytes in two splits (given by the source).
        near_duplicates: new pictures that nearly equal another one of the source.
        dataset_version: the version of `samples` that last changed this source.
        seconds: how long it took.
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
        """Whether the tables are as they were."""
        return self.rows_in == self.duplicates and not (self.removed or self.replaced)


class TooManyRefused(StageFailed):
    """More rows were refused than data.limits.max_bad_share allows. Both tables are written, as `report` says."""

    def __init__(self, report: IngestReport, where: str, max_bad_share: float) -> None:
        self.report = report
        super().__init__(
            "too many rows were refused",
            where=f"{where}, data {report.source}, ingest {report.ingest_id}",
            got=f"{report.refused} of {report.rows_in} rows ({report.refused / report.rows_in:.1%}, "
            f"data.limits.max_bad_share is {max_bad_share:.1%}); {_newly(report)}",
            fix="both tables are written: look at the bad rows with `lakesight quarantine`, mend their cause, then "
            "`lakesight quarantine replay --reason REASON`, or ingest again",
        )


def _newly(report: IngestReport) -> str:
    reasons = ", ".join(f"{count} {reason}" for reason, count in report.reasons.items())
    return f"newly quarantined: {reasons or 'none, all were there before'}"


def checked(report: IngestReport, config: DataConfig) -> IngestReport:
    """The report, if its rows add up and enough of them could be used.

    Raises:
        UserError: no rows at all, or not one that can be used.
        StageFailed: they do not add up.
        TooManyRefused: more were refused than is borne.
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
        raise _without_samples(report, config)
    if report.refused > config.limits.max_bad_share * report.rows_in:
        raise TooManyRefused(report, config.source.where, config.limits.max_bad_share)
    return report


def _without_samples(report: IngestReport, config: DataConfig) -> UserError:
    if report.unchanged:
        return UserError(
            "all of the input was taken in before, and samples has none of it",
            where=config.source.where,
            got=f"{report.unchanged} files or rows of captions that are as they were",
            fix="did someone delete them? `lakesight ingest --refresh` reads everything again",
        )
    if not report.rows_in:
        return UserError("the input has no rows", where=config.source.where, got="a header", fix="add rows")
    return UserError(
        "not one row of the input could be used",
        where=config.source.where,
        got=f"{report.rows_in} rows, {_newly(report)}",
        fix="look at them with `lakesight quarantine`; check data.source.columns",
    )

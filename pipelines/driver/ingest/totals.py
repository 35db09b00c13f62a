"""Totals of an ingest: how many rows were added, were duplicates or were quarantined, and whether the ingest is a
success."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import Field

from pipelines.config import DataConfig
from pipelines.driver.ingest.near_duplicates import NearReport
from pipelines.driver.ingest.plan import PlanTotals
from pipelines.driver.ingest.sources.walk import NAMED_FILES, PassedOver
from pipelines.errors import FailedWithReport, StageFailed, UserError
from pipelines.formats.table_schema import Table
from pipelines.formats.tables import SAMPLES, TEXTS
from vlm.config import Config


@dataclass(frozen=True)
class Written:
    """Counts of what one ingest wrote to `quarantine` and to the source's table, `samples` or `texts`.

    Attributes:
        totals: row counts and picture counts of the plan. In an ingest of plain text, each new text counts in `new`.
        reasons: number of rows added to `quarantine`, by quarantine reason.
        near: counts of near duplicates among the new pictures.
        across: number of pictures whose bytes occur in more than one split of the source.
        other_splits: number of pictures that stay in their split, although their rows in the input have another split.
        removed: number of pictures removed from `samples`.
        updated: in a refresh, number of pictures or texts that were in the source's table before the refresh. These
            pictures or texts also count in `totals.new`.
        unreadable: files and details of rows with the reason `unreadable_file`; at most NAMED_FILES.
    """

    totals: PlanTotals = field(default_factory=PlanTotals)
    reasons: dict[str, int] = field(default_factory=dict)
    near: NearReport = field(default_factory=NearReport)
    across: int = 0
    other_splits: int = 0
    removed: int = 0
    updated: int = 0
    unreadable: list[str] = field(default_factory=list)


def table_of_source(config: DataConfig) -> Table:
    """Return the table to which an ingest adds the usable rows of a source."""
    return TEXTS if config.source.kind == "text" else SAMPLES


class IngestReport(Config):
    """Result of an ingest, with rows_in = new + updated + merged + duplicates + quarantined.

    Attributes:
        source: name of the source, which is the name of its data config.
        ingest_id: id of the ingest, a hash of the source's name and of the state of its files or table.
        items: number of items that were read. An item is a file, a row of a folder's captions file, or a table.
        unchanged: number of items that were not read, because they were ingested before and have not changed.
        rows_in: number of rows that were read.
        new: number of rows that added a picture to `samples`, or a text to `texts`.
        updated: in a refresh, number of rows that replaced a picture or a text of the source's table.
        merged: number of rows that added a text to a picture.
        duplicates: number of rows that added nothing, because the source's table or `quarantine` already has their
            content.
        quarantined: number of rows added to `quarantine`.
        refused: number of rows that cannot become samples, including rows that were already in `quarantine`.
        reasons: number of rows added to `quarantine`, by quarantine reason.
        removed: number of pictures removed from `samples`, because the source table has changed or deleted their rows.
        replaced: number of rows that a refresh has replaced, by table (`quarantine` and the source's table).
        splits: number of pictures of this source in `samples`, or of its texts in `texts`, by split.
        equal_pictures_across_splits: number of input pictures whose bytes occur in more than one split of the source.
        pictures_of_other_splits: number of input pictures that stay in the split of an earlier ingest, although their
            rows in the input have another split. Only a refresh changes the split.
        near_duplicates: counts of new pictures that resemble another picture of the source.
        dataset_version: version of the source's table that last changed this source.
        seconds: duration of the ingest, in seconds.
        passed_over: names of files and folders of the source that were not read, by reason (one of
            `sources.walk.PASSED_OVER`); at most NAMED_FILES names.
        passed_over_count: number of files and folders of the source that were not read, by reason.
        unreadable_files: files and details of rows with the reason `unreadable_file`; at most NAMED_FILES. This reason
            means that a source file could not be read to its end, or that the picture file of a row could not be read.
    """

    source: str
    ingest_id: str
    items: int
    unchanged: int
    rows_in: int
    new: int
    updated: int = 0
    merged: int
    duplicates: int
    quarantined: int
    refused: int
    reasons: dict[str, int]
    removed: int
    replaced: dict[str, int]
    splits: dict[str, int]
    equal_pictures_across_splits: int
    pictures_of_other_splits: int = 0
    near_duplicates: NearReport
    dataset_version: int
    seconds: float
    passed_over: dict[str, list[str]] = Field(default_factory=dict)
    passed_over_count: dict[str, int] = Field(default_factory=dict)
    unreadable_files: list[str] = Field(default_factory=list)

    @property
    def nothing_new(self) -> bool:
        """Whether all rows were duplicates, and no row was removed or replaced."""
        return self.rows_in == self.duplicates and not (self.removed or self.replaced)


def describe_counts(report: IngestReport) -> str:
    """Return the sum of the row counts as a text. Only a refresh can update rows."""
    updated = f" + {report.updated:,} updated" if report.replaced else ""
    return (
        f"{report.new:,} new{updated} + {report.merged:,} merged + {report.duplicates:,} duplicates + "
        f"{report.quarantined:,} quarantined"
    )


def describe_passed_over(entries: Sequence[PassedOver], counts: Mapping[str, int] | None = None) -> dict[str, Any]:
    """Return the fields `passed_over` and `passed_over_count` of a report.

    Args:
        entries: files and folders that are not read.
        counts: number of all such files and folders by reason, or None if `entries` has all of them.
    """
    names: dict[str, list[str]] = defaultdict(list)
    for entry in entries[:NAMED_FILES]:
        names[entry.reason].append(entry.relative)
    counted = dict(Counter(entry.reason for entry in entries) if counts is None else counts)
    return {"passed_over": dict(names), "passed_over_count": counted}


def require_usable_rows(totals: PlanTotals, config: DataConfig) -> None:
    """Check that a refresh leaves rows in the source's table.

    Raises:
        UserError: not one row of the input can be used.
    """
    if not totals.usable:
        raise UserError(
            "a refresh would remove all rows of the source, because not one row of the input can be used",
            where=config.source.where,
            got=f"{totals.bad} of {totals.rows_in} rows are bad",
            fix="to write the bad rows to quarantine, ingest without --refresh; this refresh has replaced nothing",
        )


class TooManyRefused(FailedWithReport):
    """More rows were refused than data.limits.max_bad_share allows. All rows are written before the error is raised."""

    def __init__(self, report: IngestReport, where: str, max_bad_share: float) -> None:
        self.report: IngestReport = report
        super().__init__(
            "too many rows were refused",
            where=f"{where}, data {report.source}, ingest {report.ingest_id}",
            got=f"{report.refused} of {report.rows_in} rows ({report.refused / report.rows_in:.1%}, "
            f"data.limits.max_bad_share is {max_bad_share:.1%}); {_newly_quarantined(report)}",
            fix="inspect the bad rows with `lakesight quarantine`, and fix the cause. Then run `lakesight quarantine "
            "replay --reason REASON`, or ingest again. All rows of this ingest are written",
        )


def _newly_quarantined(report: IngestReport) -> str:
    reasons = ", ".join(f"{count} {reason}" for reason, count in report.reasons.items())
    return f"newly quarantined: {reasons or 'none, all were quarantined before'}"


def _unreadable(report: IngestReport) -> str:
    return "".join(f"; cannot read {file}" for file in report.unreadable_files[:3])


def check_totals(report: IngestReport, config: DataConfig) -> None:
    """Check that the row counts of an ingest add up and that enough rows could be used.

    Raises:
        UserError: the source's table has no row of the source, for example because no row of the input is usable.
        StageFailed: the row counts do not add up.
        TooManyRefused: more rows were refused than data.limits.max_bad_share allows.
    """
    total = report.new + report.updated + report.merged + report.duplicates + report.quarantined
    if total != report.rows_in:
        raise StageFailed(
            "the row counts of an ingest do not add up",
            where=config.source.where,
            got=f"{report.rows_in} rows read; {describe_counts(report)} = {total}",
            fix="this is a defect of Lakesight: please report it with the ingest's log",
        )
    if not any(report.splits.values()):
        raise _no_samples_error(report, config)
    if report.refused > config.limits.max_bad_share * report.rows_in:
        raise TooManyRefused(report, config.source.where, config.limits.max_bad_share)


def _no_samples_error(report: IngestReport, config: DataConfig) -> UserError:
    if report.unchanged:
        table = table_of_source(config).name
        return UserError(
            f"the whole input was ingested before, but table {table} has no row of this input",
            where=config.source.where,
            got=f"{report.unchanged} unchanged files or rows of captions",
            fix=f"if the rows were deleted from {table}, read the whole input again with `lakesight ingest --refresh`",
        )
    if not report.rows_in:
        return UserError(
            "the input has no rows",
            where=config.source.where,
            got="0 rows",
            fix="add rows to the input, or correct data.source.path (for a table also data.source.filter)",
        )
    return UserError(
        "not one row of the input could be used",
        where=config.source.where,
        got=f"{report.rows_in} rows, {_newly_quarantined(report)}{_unreadable(report)}",
        fix="inspect the refused rows with `lakesight quarantine`, and check data.source.columns",
    )

"""Report of an ingest of plain text: row counts, lengths of the new texts, and an HTML page with some refused rows."""

from __future__ import annotations

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from pipelines.driver.ingest.quarantine_report import card_of, select_examples
from pipelines.driver.ingest.report import REFUSED_ROWS_PER_REASON, Figures, FullReport, find_report, page_path
from pipelines.driver.ingest.table_rows import rows_of_source
from pipelines.driver.ingest.totals import IngestReport
from pipelines.formats.run_folder import write_json
from pipelines.formats.tables import QUARANTINE, TEXTS
from pipelines.pages.page import Chart, FormattedValue, Gallery, Page, write_page
from pipelines.platform import Platform


def write_text_report(spark: SparkSession, platform: Platform, report: IngestReport) -> FullReport:
    """Compute the lengths, and write the page and the lengths as files.

    If the ingest added nothing and both files exist, the files are kept.
    """
    if report.nothing_new and (found := find_report(platform, report)):
        return found
    path, ours = page_path(platform, report), F.col("ingest_id") == report.ingest_id
    chars = count_lengths(rows_of_source(spark, platform, TEXTS.name, report.source).filter(ours))
    refused = rows_of_source(spark, platform, QUARANTINE.name, report.source).filter(ours)
    cards = [card_of(row) for row in select_examples(refused, REFUSED_ROWS_PER_REASON)]
    write_page(path, page_of(report, chars, [Gallery("Refused", cards)] if cards else []))
    figures = Figures(formats={}, sides={}, texts={}, chars=chars)
    write_json(path.with_suffix(".json"), figures)
    return FullReport(**report.model_dump(), figures=figures, page=str(path))


def count_lengths(texts: DataFrame) -> dict[str, int]:
    """Count texts by length in characters, in ranges such as `64-127`."""
    power = F.floor(F.log2(F.length("text"))).cast("int").alias("power")
    counts = texts.groupBy(power).count().orderBy("power").collect()
    return {f"{2 ** row['power']}-{2 ** (row['power'] + 1) - 1}": row["count"] for row in counts}


def page_of(report: IngestReport, chars: dict[str, int], galleries: list[Gallery]) -> Page:
    """Return the contents of the HTML page of an ingest of plain text."""
    numbers = {
        "rows in": report.rows_in,
        "new texts": report.new,
        **({"updated texts": report.updated} if report.replaced else {}),
        "duplicate rows": report.duplicates,
        "rows newly quarantined": report.quarantined,
    }
    charts = {
        "Rows newly quarantined, by reason": report.reasons,
        "Files passed over, by reason": report.passed_over_count,
        "Texts of this source, by split": report.splits,
        "New texts by length, characters": chars,
    }
    return Page(
        title=f"Ingest of {report.source}",
        about=f"Ingest {report.ingest_id} took {report.seconds:,.0f} s. Version {report.dataset_version} of table "
        "texts last changed this source. Rows in = new texts (in a refresh also updated texts) + duplicates + "
        "quarantined.",
        figures={name: FormattedValue(f"{number:,}") for name, number in numbers.items()},
        charts=[Chart(title, values) for title, values in charts.items() if values],
        galleries=galleries,
    )

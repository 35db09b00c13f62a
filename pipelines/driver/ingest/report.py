"""Report of an ingest: row counts, distributions, and an HTML page with some accepted rows and some refused rows.

The report reads the rows of the ingest from `samples` and `quarantine`, after both tables are written.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from pipelines.driver.ingest.quarantine_report import card_of, select_examples
from pipelines.driver.ingest.table_rows import rows_of_source
from pipelines.driver.ingest.totals import IngestReport
from pipelines.formats.run_folder import read_json, write_json
from pipelines.formats.tables import QUARANTINE, SAMPLES
from pipelines.pages.page import Card, CardText, Chart, FormattedValue, Gallery, Page, write_page
from pipelines.pages.thumbnail import make_thumbnail
from pipelines.platform import Platform
from vlm.config import Config

ACCEPTED_ROWS = 24
SHOWN_TEXTS = 20
"""Largest number of texts that the page shows for an accepted picture. A picture may have a hundred thousand texts."""
REFUSED_ROWS_PER_REASON = 3


class Figures(Config):
    """Distributions of the pictures that an ingest added. Sides and lengths are grouped into ranges such as `64-127`.

    Attributes:
        formats: number of pictures of each file format.
        sides: number of pictures for each range of the longer side, in pixels.
        texts: number of pictures for each number of texts per picture.
        chars: number of texts for each range of the text's length, in characters.
    """

    formats: dict[str, int]
    sides: dict[str, int]
    texts: dict[str, int]
    chars: dict[str, int]


class FullReport(IngestReport):
    """Report of an ingest, with the distributions and the path of the HTML page."""

    figures: Figures
    page: str


def write_report(spark: SparkSession, platform: Platform, report: IngestReport) -> FullReport:
    """Compute the distributions, and write the page and the distributions as files.

    If the ingest added nothing, existing files are kept.
    """
    if report.nothing_new and (found := find_report(platform, report)):
        return found
    samples = _of_ingest(rows_of_source(spark, platform, SAMPLES.name, report.source), report)
    figures = figures_of(samples)
    path = page_path(platform, report)
    if not (report.nothing_new and path.exists()):
        refused = _of_ingest(rows_of_source(spark, platform, QUARANTINE.name, report.source), report)
        texts = (F.slice("texts", 1, SHOWN_TEXTS).alias("texts"), F.size("texts").alias("num_texts"))
        accepted = samples.select("image_id", "image", *texts).limit(ACCEPTED_ROWS).collect()
        galleries = [
            Gallery("Accepted", [_card(row.asDict()) for row in accepted]),
            Gallery("Refused", [card_of(row) for row in select_examples(refused, REFUSED_ROWS_PER_REASON)]),
        ]
        write_page(path, page_of(report, figures, galleries))
    write_json(path.with_suffix(".json"), figures)
    return FullReport(**report.model_dump(), figures=figures, page=str(path))


def find_report(platform: Platform, report: IngestReport) -> FullReport | None:
    """Return the full report of an ingest that added nothing.

    The distributions and the page are read from the files that an earlier ingest wrote. If the files are missing,
    return None.
    """
    path = page_path(platform, report)
    if not (path.exists() and path.with_suffix(".json").exists()):
        return None
    return FullReport(**report.model_dump(), figures=read_json(path.with_suffix(".json"), Figures), page=str(path))


def page_path(platform: Platform, report: IngestReport) -> Path:
    """Return the path of the page of an ingest."""
    return platform.folder("reports") / f"ingest-{report.source}-{report.ingest_id}.html"


def _of_ingest(rows: DataFrame, report: IngestReport) -> DataFrame:
    return rows.filter(F.col("ingest_id") == report.ingest_id)


def figures_of(samples: DataFrame) -> Figures:
    """Compute the distributions of rows of `samples` in one pass, without reading the pictures."""

    def value(figure: str, name: Column, order: Column) -> Column:
        return F.struct(F.lit(figure).alias("figure"), order.cast("int").alias("order"), name.alias("name"))

    def power_range(figure: str, number: Column) -> Column:
        power = F.floor(F.log2(number))
        low = F.pow(F.lit(2), power).cast("int")
        high = F.when(low > 1, (low * 2 - 1).cast("string"))
        return value(figure, F.concat_ws("-", low.cast("string"), high), power)

    values = F.array(
        value("formats", F.col("format"), F.lit(0)),
        power_range("sides", F.greatest("width", "height")),
        value("texts", F.size("texts").cast("string"), F.size("texts")),
    )
    chars = F.transform("texts", lambda text: power_range("chars", F.length(text["text"])))
    grouped = samples.select(F.explode(F.concat(values, chars)).alias("value")).groupBy("value").count()
    counts: dict[str, dict[str, int]] = defaultdict(dict)
    for row in grouped.orderBy("value").collect():
        counts[row["value"]["figure"]][row["value"]["name"]] = row["count"]
    return Figures(**{name: counts[name] for name in Figures.model_fields})


def page_of(report: IngestReport, figures: Figures, galleries: list[Gallery]) -> Page:
    """Return the contents of the HTML page of an ingest."""
    near = report.near_duplicates
    numbers = {
        "rows in": report.rows_in,
        "new pictures": report.new,
        **({"updated pictures": report.updated} if report.replaced else {}),
        "rows with a new text": report.merged,
        "duplicate rows": report.duplicates,
        "rows newly quarantined": report.quarantined,
        "near duplicates": near.pictures,
        "near duplicates moved to another split": near.moved,
        "pictures or near duplicates in two splits": near.across_splits + report.equal_pictures_across_splits,
    }
    charts = {
        "Rows newly quarantined, by reason": report.reasons,
        "Files passed over, by reason": report.passed_over_count,
        "Pictures of this source, by split": report.splits,
        "Pictures by format": figures.formats,
        "Pictures by longer side, pixels": figures.sides,
        "Texts by length, characters": figures.chars,
        "Pictures by number of texts": figures.texts,
    }
    return Page(
        title=f"Ingest of {report.source}",
        about=f"Ingest {report.ingest_id} took {report.seconds:,.0f} s. Version {report.dataset_version} of table "
        "samples last changed this source. Rows in = new pictures (in a refresh also updated pictures) + rows with a "
        "new text + duplicates + quarantined. The accepted pictures, and the charts of formats, sides and texts, show "
        "what this ingest added.",
        figures={name: FormattedValue(f"{number:,}") for name, number in numbers.items()},
        charts=[Chart(title, values) for title, values in charts.items() if values],
        galleries=[gallery for gallery in galleries if gallery.cards],
    )


def _card(row: Mapping[str, Any]) -> Card:
    texts = [CardText(f"{text['prompt']} {text['text']}".strip()) for text in row["texts"]]
    if further := row["num_texts"] - len(texts):
        texts.append(CardText(f"and {further:,} further texts"))
    return Card(row["image_id"], make_thumbnail(bytes(row["image"])), texts)

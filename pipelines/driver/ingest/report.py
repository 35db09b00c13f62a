"""The report of an ingest: what came, what became of it, and some of it to look at, as figures and as one HTML page.

Pictures and rows are read from the two tables, by ingest, after both are written.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from pipelines.driver.ingest.commit import rows_of_source
from pipelines.driver.ingest.quarantine import card_of, some_of
from pipelines.driver.ingest.totals import IngestReport
from pipelines.formats.tables import QUARANTINE, SAMPLES
from pipelines.pages.page import Card, CardText, Chart, FormattedValue, Gallery, Page, write_page
from pipelines.pages.thumbnail import make_thumbnail
from pipelines.platform import Platform
from vlm.config import Config

GOOD_ROWS = 24
BAD_ROWS = 3
"""Of each reason."""


class Figures(Config):
    """Pictures that an ingest brought, by what they are like; a range of numbers is called `64-127`.

    Attributes:
        formats: pictures by format.
        sides: pictures by their longer side, pixels.
        texts: pictures by how many texts they have now.
        chars: texts by length, characters.
    """

    formats: dict[str, int]
    sides: dict[str, int]
    texts: dict[str, int]
    chars: dict[str, int]


class FullReport(IngestReport):
    """An ingest's report with figures, and the page that shows both."""

    figures: Figures
    page: str


def write_report(spark: SparkSession, platform: Platform, report: IngestReport) -> FullReport:
    """Look at what an ingest brought, and write the page. A run that brought nothing leaves an earlier page alone."""
    samples = _of_ingest(rows_of_source(spark, platform, SAMPLES.name, report.source), report)
    figures = figures_of(samples)
    path = platform.folder("reports") / f"ingest-{report.source}-{report.ingest_id}.html"
    if not (report.nothing_new and path.exists()):
        refused = _of_ingest(rows_of_source(spark, platform, QUARANTINE.name, report.source), report)
        good = [_card(row.asDict()) for row in samples.select("image_id", "image", "texts").limit(GOOD_ROWS).collect()]
        bad = [card_of(row) for row in some_of(refused, BAD_ROWS, pictures=True)]
        write_page(path, page_of(report, figures, [Gallery("Taken in", good), Gallery("Refused", bad)]))
    return FullReport(**report.model_dump(), figures=figures, page=str(path))


def _of_ingest(rows: DataFrame, report: IngestReport) -> DataFrame:
    return rows.filter(F.col("ingest_id") == report.ingest_id)


def figures_of(samples: DataFrame) -> Figures:
    """Count rows of `samples` by what they are like, in one pass over narrow columns."""

    def mark(kind: str, name: Column, order: Column) -> Column:
        return F.struct(F.lit(kind).alias("kind"), order.cast("int").alias("place"), name.alias("name"))

    def ranged(kind: str, number: Column) -> Column:
        power = F.floor(F.log2(number))
        low = F.pow(F.lit(2), power).cast("int")
        high = F.when(low > 1, (low * 2 - 1).cast("string"))
        return mark(kind, F.concat_ws("-", low.cast("string"), high), power)

    marks = F.array(
        mark("formats", F.col("format"), F.lit(0)),
        ranged("sides", F.greatest("width", "height")),
        mark("texts", F.size("texts").cast("string"), F.size("texts")),
    )
    chars = F.transform("texts", lambda text: ranged("chars", F.length(text["text"])))
    counted = samples.select(F.explode(F.concat(marks, chars)).alias("mark")).groupBy("mark").count()
    counts: dict[str, dict[str, int]] = defaultdict(dict)
    for row in counted.orderBy("mark").collect():
        counts[row["mark"]["kind"]][row["mark"]["name"]] = row["count"]
    return Figures(**{name: counts[name] for name in Figures.model_fields})


def page_of(report: IngestReport, figures: Figures, galleries: list[Gallery]) -> Page:
    """The page of a report."""
    near = report.near_duplicates
    numbers = {
        "rows in": report.rows_in,
        "new pictures": report.new,
        "rows with a further text": report.merged,
        "duplicate rows": report.duplicates,
        "rows newly quarantined": report.quarantined,
        "near duplicates": near.pictures,
        "of them moved to another split": near.moved,
        "across splits": near.across_splits + report.equal_pictures_across_splits,
    }
    charts = {
        "Rows newly quarantined, by reason": report.reasons,
        "Pictures of this source, by split": report.splits,
        "Pictures by format": figures.formats,
        "Pictures by longer side, pixels": figures.sides,
        "Texts by length, characters": figures.chars,
        "Pictures by number of texts": figures.texts,
    }
    return Page(
        title=f"Ingest of {report.source}",
        about=f"Ingest {report.ingest_id}, samples at version {report.dataset_version}, {report.seconds:,.0f} s. "
        "Rows in = new + further texts + duplicates + quarantined. Pictures are those that this ingest brought.",
        figures={name: FormattedValue(f"{number:,}") for name, number in numbers.items()},
        charts=[Chart(title, values) for title, values in charts.items() if values],
        galleries=[gallery for gallery in galleries if gallery.cards],
    )


def _card(row: Mapping[str, Any]) -> Card:
    texts = [CardText(f"{text['prompt']} {text['text']}".strip()) for text in row["texts"]]
    return Card(row["image_id"], make_thumbnail(bytes(row["image"])), texts)

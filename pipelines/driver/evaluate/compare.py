"""Comparison of two model versions on the same rows, with a paired bootstrap."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pyspark.sql import SparkSession

from pipelines.driver.delta.tables import ensure_tables
from pipelines.driver.delta.thumbnails import read_thumbnails
from pipelines.driver.delta.versions import rows_of_source
from pipelines.driver.evaluate.bootstrap import Interval, pair_rows, paired_metrics
from pipelines.driver.evaluate.gallery import (
    GROUP_ROWS,
    HEADLINES,
    NAMES,
    GalleryRow,
    ModelCaption,
    bar_group,
    write_html,
)
from pipelines.driver.evaluate.metrics import ScoredRow
from pipelines.driver.evaluate.run import EvaluationReport
from pipelines.driver.evaluate.verdict import JUDGED
from pipelines.errors import StageFailed
from pipelines.formats.shards import ShardRequest
from pipelines.pages.page import BarGroup, Gallery, Page
from pipelines.platform import Platform
from vlm.config import Config
from vlm.text.words import TOKENISATION

Pair = tuple[ScoredRow, ScoredRow]


class Comparison(Config):
    """Comparison of model version `one` with model version `other`.

    Attributes:
        rows: number of rows that both versions captioned.
        tokenisation: name of the rules that split texts into words.
        metric: name of the metric that decides which version is better.
        differences: a dict from the name of a metric to the difference (`one` minus `other`), with the interval of a
            paired bootstrap.
        one_metrics: a dict from the name of a metric to its value for version `one` on the rows that both versions
            captioned.
        other_metrics: a dict like `one_metrics`, but with the values for version `other`.
        wins: number of rows where `one` has the higher word F1.
        losses: number of rows where `other` has the higher word F1.
        ties: number of rows where `one` and `other` have the same word F1.
        page: path of the HTML page that shows the rows with the largest differences.
    """

    model_name: str
    one: str
    other: str
    source: str
    split: str
    rows: int
    tokenisation: str
    metric: str
    differences: dict[str, Interval]
    one_metrics: dict[str, Interval]
    other_metrics: dict[str, Interval]
    wins: int
    losses: int
    ties: int
    page: Path


def compare(
    spark: SparkSession,
    platform: Platform,
    request: ShardRequest,
    one: EvaluationReport,
    other: EvaluationReport,
    *,
    metric: str,
) -> Comparison:
    """Compare two evaluations of the split in a shard request, and write the HTML page.

    The metric of the promotion gate, `metric`, decides which version is better. If an evaluation lacks this metric, the
    first metric in JUDGED that both evaluations have decides.

    Raises:
        StageFailed: the two versions have no captioned row in common.
    """
    pairs = list(zip(*pair_rows(one.scores(), other.scores()), strict=True))
    if not pairs:
        raise StageFailed(
            "the two model versions cannot be compared",
            where=f"{request.source}, split {request.split}",
            got=f"no row has captions of both version {one.model_version} and version {other.model_version}",
            fix="evaluate both model versions on the same table version",
        )
    names = (one.model_version, other.model_version)
    metrics = paired_metrics(one.scores(), other.scores())
    report = Comparison(
        model_name=one.model_name,
        one=names[0],
        other=names[1],
        source=one.source,
        split=one.split,
        rows=len(pairs),
        tokenisation=TOKENISATION,
        metric=next(name for name in (metric, *JUDGED) if name in metrics),
        differences={name: metric.difference for name, metric in metrics.items()},
        one_metrics={name: metric.one for name, metric in metrics.items()},
        other_metrics={name: metric.other for name, metric in metrics.items()},
        wins=sum(a.f1 > b.f1 for a, b in pairs),
        losses=sum(a.f1 < b.f1 for a, b in pairs),
        ties=sum(a.f1 == b.f1 for a, b in pairs),
        page=platform.folder("reports") / f"compare-{one.scores_hash}-{other.scores_hash}.html",
    )
    ensure_tables(spark, platform)
    _write_page(spark, request, report, pairs)
    return report


def _write_page(spark: SparkSession, request: ShardRequest, report: Comparison, pairs: Sequence[Pair]) -> None:
    """Write the HTML page of a comparison, given the rows that both versions captioned."""
    names = (report.one, report.other)
    groups = _groups(pairs, names)
    samples = rows_of_source(spark, request.table, request.source)
    thumbnails = read_thumbnails(samples, [a.image_id for rows in groups.values() for a, _ in rows])
    title = f"{report.model_name}: version {names[0]} and version {names[1]} on {report.source} ({report.split})"
    about = (
        f"Metrics of version {names[0]} minus those of version {names[1]} on the same {report.rows} rows, with 95 % "
        f"intervals of a paired bootstrap. Word F1 of version {names[0]} is better on {report.wins} rows, "
        f"worse on {report.losses} and equal on {report.ties}. Texts are split into words by {report.tokenisation}. "
        "The page shows the rows that differ most, and some rows with equal word F1."
    )
    rows = [
        _gallery_row(pair, names, thumbnails.get(pair[0].image_id), group)
        for group, pairs_of_group in groups.items()
        for pair in pairs_of_group
    ]
    page = Page(
        title,
        about,
        galleries=[Gallery("", [row.card() for row in rows])],
        verdict=describe_outcome(report),
        bars=[_bars(report, name) for name in HEADLINES if name in report.differences],
    )
    write_html(report.page, page, report.differences, signed=True)


def describe_outcome(report: Comparison) -> str:
    """Return one sentence that says which version has better captions."""
    name, difference = report.metric, report.differences[report.metric]
    outcome = "not clearly better or worse than"
    if difference.low > 0 or difference.high < 0:
        outcome = "better than" if difference.low > 0 else "worse than"
    return (
        f"On {report.rows:,} rows, the captions of version {report.one} are {outcome} those of version {report.other}: "
        f"{NAMES[name]} {report.one_metrics[name].value:.3g} and {report.other_metrics[name].value:.3g}, difference "
        f"{difference.value:+.3g} ({difference.low:+.3g} to {difference.high:+.3g})."
    )


def _bars(report: Comparison, name: str) -> BarGroup:
    difference = report.differences[name]
    bars = {f"version {report.one}": report.one_metrics[name], f"version {report.other}": report.other_metrics[name]}
    return bar_group(name, bars, f": {difference.value:+z.3f} ({difference.low:+z.3f} to {difference.high:+z.3f})")


def _groups(pairs: Sequence[Pair], names: tuple[str, str]) -> dict[str, list[Pair]]:
    """For each group of the page (one version is better, the other is better, both are equal), select at most
    GROUP_ROWS rows to show. Rows with the largest difference in word F1 come first.
    """
    by_gain = sorted(pairs, key=lambda pair: (pair[1].f1 - pair[0].f1, pair[0].row))
    better, worse = f"{names[0]}-better", f"{names[1]}-better"
    return {
        better: [pair for pair in by_gain if pair[0].f1 > pair[1].f1][:GROUP_ROWS],
        worse: [pair for pair in reversed(by_gain) if pair[0].f1 < pair[1].f1][:GROUP_ROWS],
        "equal": [pair for pair in pairs if pair[0].f1 == pair[1].f1][:GROUP_ROWS],
    }


def _gallery_row(pair: Pair, names: tuple[str, str], thumbnail: bytes | None, group: str) -> GalleryRow:
    return GalleryRow(
        image_id=pair[0].image_id,
        thumbnail=thumbnail,
        prompt=pair[0].prompt,
        human=" / ".join(dict.fromkeys(pair[0].references)),
        captions=tuple(ModelCaption.of_row(f"Version {name}", item) for name, item in zip(names, pair, strict=True)),
        groups=(group,),
    )

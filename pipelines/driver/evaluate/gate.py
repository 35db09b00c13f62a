"""Promotion gate: checks that a model version must pass before it becomes the champion.

A small captioning model easily learns to write plausible captions without using the picture. The loss of such a model
is good, but its blind gap (loss with the pictures of other rows, minus loss with the right pictures) is zero. A model
that uses the picture may still be worse than a copied caption or the current champion. The gate runs every check and
reports all failures, not only the first failure.
"""

from __future__ import annotations

from collections.abc import Sequence

from pyspark.sql import SparkSession

from pipelines.config import GateConfig, Trial
from pipelines.driver.delta.versions import rows_of_source
from pipelines.driver.evaluate.baselines import baselines
from pipelines.driver.evaluate.bootstrap import Interval, metric_differences, pair_rows
from pipelines.driver.evaluate.metrics import ScoredRow, captioned, tokenisation_of
from pipelines.driver.evaluate.run import EvaluationReport
from pipelines.errors import StageFailed
from pipelines.formats.shards import Shards
from vlm.config import Config
from vlm.text.words import words

BASELINES = {"constant": "the best caption that ignores the picture", "neighbour": "the nearest neighbour's caption"}

NO_NEIGHBOUR = (
    "no comparison with the nearest neighbour's caption: no picture of the training split has the prompt of one of the "
    "evaluated pictures. Longer training does not help; remove neighbour from gate.baselines"
)


class GateCheck(Config):
    """Result of one check of the gate, and a description of what the check found."""

    passed: bool
    found: str


class GateResult(Config):
    """Results of all checks of a model version (by the name of the check), and the metrics that the checks used.

    Attributes:
        pictures: number of pictures of the evaluation, including pictures without a caption.
        tokenisation: name of the rules that split texts into words for the gate's metric, or None if the metric ignores
            words.
    """

    checks: dict[str, GateCheck]
    figures: dict[str, Interval]
    pictures: int
    tokenisation: str | None

    @property
    def reasons(self) -> tuple[str, ...]:
        """Descriptions of the failed checks; empty if the model version passed every check."""
        return tuple(check.found for check in self.checks.values() if not check.passed)


def apply_gate(
    gate: GateConfig, report: EvaluationReport, champion: EvaluationReport | None, trial: Trial
) -> GateResult:
    """Run every check of the promotion gate. If a metric is missing or NaN, the check of that metric fails.

    Args:
        gate: config of the gate, with the limit of each check.
        report: evaluation of the model version.
        champion: evaluation of the current champion on the same split, or None if there is no champion.
        trial: result of loading and running the model version in a fresh process.
    """
    metrics = report.metrics
    shown: tuple[str, ...] = (gate.metric, "loss", "blind_gap", "error_share")
    figures = {name: metrics[name] for name in shown if name in metrics}
    checks = {
        "loads": GateCheck(passed=not trial.failure, found=trial.failure or "it loads in a fresh process"),
        "errors": _check_errors(gate, metrics["error_share"].value, trial),
        "looks": _check_blind_gap(gate, metrics.get("blind_gap")),
    }
    scored = report.scores()
    pictures = len({row.row for row in scored})
    rows_of = baselines(captioned(scored), gate.metric)
    if "constant" in gate.baselines:
        checks["varied"] = _check_varied(gate, captioned(scored))
    for name in gate.baselines:
        found = metric_differences(scored, rows_of[name], names=[gate.metric]) if name in rows_of else {}
        gain = found.get(gate.metric)
        checks[name] = _check_baseline(gate, gain, BASELINES[name], pictures=pictures)
        if name == "neighbour" and name not in rows_of:
            checks[name] = GateCheck(passed=False, found=NO_NEIGHBOUR)
        figures |= {f"over_{name}": gain} if gain else {}
    if champion:
        difference = metric_differences(scored, champion.scores(), names=[gate.metric]).get(gate.metric)
        rows = len(pair_rows(scored, champion.scores())[0])
        checks["champion"] = _check_champion(gate, difference, champion.model_version, rows)
        if difference:
            figures["over_champion"] = difference
    return GateResult(checks=checks, figures=figures, pictures=pictures, tokenisation=tokenisation_of(gate.metric))


def _check_errors(gate: GateConfig, share: float, trial: Trial) -> GateCheck:
    """Check the share of errors in the evaluation and the share of errors in the smoke test (`trial`)."""
    tried = len(trial.errors) / trial.pictures if trial.pictures else 0.0
    found = (
        f"no caption for a share of {share:.3g} of the split and for {len(trial.errors)} of {trial.pictures} pictures "
        f"in a fresh process, limit {gate.max_error_share:g}"
    )
    if trial.errors:
        found += f" ({trial.errors[0]})"
    return GateCheck(passed=max(share, tried) <= gate.max_error_share, found=found)


def _check_blind_gap(gate: GateConfig, gap: Interval | None) -> GateCheck:
    """Check that the model uses its pictures, which means that its blind gap is large enough."""
    if gap is None:
        found = "the blind gap is unknown, because the split has only one picture"
        return GateCheck(passed=False, found=found)
    passed = gap.value >= gate.min_blind_gap
    found = f"a blind gap of {gap.value:z.3f} nats per token, limit {gate.min_blind_gap:g}"
    return GateCheck(passed=passed, found=found if passed else f"it does not use its pictures: {found}")


def _check_varied(gate: GateConfig, scored: Sequence[ScoredRow]) -> GateCheck:
    """Check that the captions have enough distinct texts, compared with one human caption for each row."""
    captions = _count_distinct([item.caption or "" for item in scored])
    human = _count_distinct([item.references[item.row % len(item.references)] for item in scored])
    enough = max(2 if human > 1 else 1, gate.min_distinct * human)
    passed = captions >= enough
    found = (
        f"{captions} distinct captions of {len(scored)} ({captions / len(scored):.3g}), {human} of the human captions "
        f"({human / len(scored):.3g}), limit {enough:.3g}"
    )
    return GateCheck(passed=passed, found=found if passed else f"its captions are nearly all the same: {found}")


def _count_distinct(texts: Sequence[str]) -> int:
    return len({" ".join(words(text)) for text in texts})


def _check_baseline(gate: GateConfig, gain: Interval | None, baseline: str, *, pictures: int) -> GateCheck:
    """Check that the model version beats a baseline: the whole confidence interval of the gain must be above zero.

    A higher value of the metric is not enough. By chance, a model that is only as good as the baseline has a higher
    value in half of all evaluations. With fewer than `gate.min_pictures` pictures, only the gain itself must be above
    zero. Some bootstrap samples of so few pictures repeat a single picture, so the interval reaches zero even for a
    perfect model.
    """
    if gain is None:
        return GateCheck(
            passed=False,
            found=f"no comparison with {baseline}, because {gate.metric} cannot be computed for so few pictures",
        )
    few = pictures < gate.min_pictures
    passed = (gain.value if few else gain.low) > 0
    than = "better than" if passed else "no better than"
    note = f"; {pictures} pictures are too few for an interval, so the value decides" if few else ""
    return GateCheck(passed=passed, found=f"{than} {baseline}: {gate.metric} {_format_difference(gain)}{note}")


def _format_difference(difference: Interval) -> str:
    return f"{difference.value:+z.3f} ({difference.low:+z.3f} to {difference.high:+z.3f})"


def _check_champion(gate: GateConfig, difference: Interval | None, version: str, rows: int) -> GateCheck:
    """Check that the confidence interval of the difference from the champion is not completely below zero.

    By chance, this check refuses one in forty model versions that are as good as the champion.
    """
    if difference is None:
        return GateCheck(
            passed=False,
            found=f"no comparison with the champion, version {version}, because no row has captions of both versions",
        )
    passed = difference.high >= 0
    change = f"{gate.metric} {_format_difference(difference)}"
    found = f"{change} against the champion, version {version}, on the same {rows} rows"
    return GateCheck(passed=passed, found=found if passed else f"worse than the champion: {found}")


# ------------------------------------------------------------------------------------------------ trial and decisions


def read_trial_pictures(spark: SparkSession, shards: Shards, count: int) -> list[tuple[bytes, str]]:
    """Read the original files of the first `count` pictures of a split. Return pairs of a picture and its first prompt.

    This function leaves out pictures that an ingest has removed from the table since the shards were written.

    Raises:
        StageFailed: none of the pictures is in the table any more.
    """
    rows = [shards.row(index) for index in range(min(count, len(shards)))]
    request = shards.manifest.request
    samples = rows_of_source(spark, request.table, request.source)
    chosen = samples.where(samples.image_id.isin([row.image_id for row in rows])).select("image_id", "image")
    images = {row["image_id"]: bytes(row["image"]) for row in chosen.collect()}
    pictures = [(images[row.image_id], row.texts[0][0]) for row in rows if row.image_id in images]
    if rows and not pictures:
        raise StageFailed(
            "the model version cannot be tried, because table samples no longer has the pictures of the shards",
            where=f"{request.table}, source {request.source}, split {request.split}",
            got=f"none of the first {len(rows)} pictures of the shards is in the table",
            fix="run `lakesight promote` again, which writes and evaluates shards of the newest table version",
        )
    return pictures

"""May a model version serve? The gate that a version passes before it becomes the champion.

A small captioning model easily learns to write a plausible caption without looking: its loss is beautiful and its blind
gap (loss with the pictures of other rows, minus loss with the right ones) is zero. And a model that looks may still say
less than a copied sentence does, or less than the model that serves now. Every check is made and told, not the first
that fails.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Literal
from uuid import uuid4

from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from pipelines.config import GateConfig, Trial
from pipelines.driver.delta.tables import ensure_tables
from pipelines.driver.evaluate.bootstrap import Interval, differences, paired
from pipelines.driver.evaluate.metrics import baselines, captioned
from pipelines.driver.evaluate.run import EvaluationReport
from pipelines.formats.shards import Shards
from pipelines.formats.tables import DECISIONS
from pipelines.platform import Platform
from vlm.config import Config

BASELINES = {"constant": "the best caption that ignores the picture", "neighbour": "the nearest neighbour's caption"}


class GateCheck(Config):
    """One question of the gate, and what was found."""

    passed: bool
    found: str


class GateResult(Config):
    """All checks of a version, by name, and the figures they rest on."""

    checks: dict[str, GateCheck]
    figures: dict[str, Interval]

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why the version may not serve; empty when it may."""
        return tuple(check.found for check in self.checks.values() if not check.passed)


def check_gate(
    gate: GateConfig, report: EvaluationReport, champion: EvaluationReport | None, trial: Trial
) -> GateResult:
    """Put a version's evaluation and trial to every check.

    A figure that is missing or not a number passes no check.

    Args:
        gate: the limits.
        report: of the version.
        champion: of the version that serves, on the same split; None where none does.
        trial: of the version, in a fresh process.
    """
    metrics = report.metrics
    shown: tuple[str, ...] = (gate.metric, "loss", "blind_gap", "error_share")
    figures = {name: metrics[name] for name in shown if name in metrics}
    checks = {
        "loads": GateCheck(passed=not trial.failure, found=trial.failure or "it loads in a fresh process"),
        "errors": _errors(gate, metrics["error_share"].value, trial),
        "looks": _looks(gate, metrics.get("blind_gap")),
    }
    scored = report.scores()
    there = baselines(captioned(scored))
    for name in gate.baselines:
        if name in there:
            gain = differences(scored, there[name], names=[gate.metric]).get(gate.metric)
            checks[name] = _beats(gate, gain, BASELINES[name])
            figures |= {f"over_{name}": gain} if gain else {}
    if champion:
        difference = differences(scored, champion.scores(), names=[gate.metric]).get(gate.metric)
        rows = len(paired(scored, champion.scores())[0])
        checks["champion"] = _not_worse(gate, difference, champion.model_version, rows)
        if difference:
            figures["over_champion"] = difference
    return GateResult(checks=checks, figures=figures)


def _errors(gate: GateConfig, share: float, trial: Trial) -> GateCheck:
    tried = len(trial.errors) / trial.pictures if trial.pictures else 0.0
    found = (
        f"no caption for a share of {share:.3g} of the split and for {len(trial.errors)} of {trial.pictures} pictures "
        f"in a fresh process, limit {gate.max_error_share:g}"
    )
    if trial.errors:
        found += f" ({trial.errors[0]})"
    return GateCheck(passed=max(share, tried) <= gate.max_error_share, found=found)


def _looks(gate: GateConfig, gap: Interval | None) -> GateCheck:
    if gap is None:
        found = "nobody knows whether it looks at its pictures: a split of one picture has no blind gap"
        return GateCheck(passed=False, found=found)
    passed = gap.value >= gate.min_blind_gap
    found = f"a blind gap of {gap.value:.3f} nats per token, limit {gate.min_blind_gap:g}"
    return GateCheck(passed=passed, found=found if passed else f"it does not look at its pictures: {found}")


def _beats(gate: GateConfig, gain: Interval | None, what: str) -> GateCheck:
    """Better is what even the lower end of the interval calls better: guessing beats a constant half of the time."""
    if gain is None:
        return GateCheck(
            passed=False, found=f"nobody knows whether it is better than {what}: {gate.metric} is not measured"
        )
    passed = gain.low > 0
    than = "better than" if passed else "no better than"
    return GateCheck(passed=passed, found=f"{than} {what}: {gate.metric} {_told(gain)}")


def _told(gain: Interval) -> str:
    return f"{gain.value:+.3f} ({gain.low:+.3f} to {gain.high:+.3f})"


def _not_worse(gate: GateConfig, difference: Interval | None, version: str, rows: int) -> GateCheck:
    """Worse is what even the upper end of the interval calls worse: chance alone refuses one version in forty."""
    if difference is None:
        return GateCheck(
            passed=False, found=f"it cannot be compared with the champion, version {version}: no common rows"
        )
    passed = difference.high >= 0
    found = f"{gate.metric} {_told(difference)} against the champion, version {version}, on the same {rows} rows"
    return GateCheck(passed=passed, found=found if passed else f"worse than the champion: {found}")


# ------------------------------------------------------------------------------------------------ pictures and trail


def read_trial_pictures(spark: SparkSession, shards: Shards, count: int) -> list[tuple[bytes, str]]:
    """The first pictures of a split as they were ingested, each with a prompt of its."""
    rows = [shards.row(index) for index in range(min(count, len(shards)))]
    request = shards.manifest.request
    samples = spark.read.option("versionAsOf", request.table_version).table(request.table)
    wanted = samples.where(samples.image_id.isin([row.image_id for row in rows])).select("image_id", "image")
    images = {row["image_id"]: bytes(row["image"]) for row in wanted.collect()}
    return [(images[row.image_id], row.texts[0][0]) for row in rows]


def record_decision(
    spark: SparkSession,
    platform: Platform,
    *,
    model: str,
    version: str,
    action: Literal["promote", "refuse", "rollback"],
    champion: str | None,
    reasons: Sequence[str] = (),
    figures: str = "{}",
) -> None:
    """Append a decision to table `decisions`, before it takes effect: what is done was always written down first.

    Args:
        spark: the session, whose user is who decided.
        platform: where.
        model: registered model.
        version: decided on.
        action: what was decided.
        champion: version that serves now; None where none does.
        reasons: why it was refused.
        figures: what the decision rests on, a JSON object.
    """
    ensure_tables(spark, platform)
    row = {
        "decision_id": uuid4().hex,
        "model_name": model,
        "model_version": version,
        "action": action,
        "champion": champion,
        "reasons": list(reasons),
        "figures": figures,
        "decided_by": "",
        "decided_at": datetime.now(UTC),
    }
    new = spark.createDataFrame([tuple(row[name] for name in DECISIONS.names)], DECISIONS.ddl())
    new.withColumn("decided_by", F.current_user()).writeTo(platform.table(DECISIONS.name)).append()

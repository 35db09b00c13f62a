"""`lakesight decisions`: list promotions, refusals and rollbacks of a model, with user, time and reasons.

The commands `promote` and `rollback` record decisions with the function `record`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal

from jobs.common import Job, JsonOption, PlatformOption, RunOption, SetOption, open_job
from jobs.evaluate import open_model
from jobs.table_files import open_table, table_relation

if TYPE_CHECKING:
    from pipelines.driver.model_files import ModelFiles
    from pipelines.tracking.registry import ModelVersion

logger = logging.getLogger(__name__)

LONGEST_MOVE = timedelta(hours=1)
"""Time after a decision in which the command that has recorded it may still be about to move the alias. If the registry
does not answer, MLflow repeats a request for minutes."""


def decisions(
    *,
    run: RunOption = "demo",
    platform: PlatformOption = "local",
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """List promotions, refusals and rollbacks of a model.

    The command prints time, action, version, user and reasons of each decision on the run's model, newest last.

    \b
    Example:
      lakesight decisions --run demo
    """
    with open_job(run, platform, overrides, as_json, needs_space=False) as job:
        found = run_decisions(job)
        for row in found:
            champion = f" (serving: {row['champion']})" if row["champion"] else ""
            job.output.hanging(
                f"{row['decided_at']:%Y-%m-%d %H:%M}  {row['action']:<8} ",
                f"version {row['model_version']}{champion}, by {row['decided_by']}",
            )
            for reason in row["reasons"]:
                job.output.hanging("    - ", reason)
        job.output.report({"decisions": found})


def run_decisions(job: Job) -> list[dict[str, Any]]:
    """Return the promotions, refusals and rollbacks of the run's model, newest last.

    Raises:
        UserError: table `decisions` does not exist, or the platform's tables are not readable as files.
    """
    from pipelines.formats.delta_files import quoted_text, to_rows

    of_model = f"model_name = {quoted_text(job.model_name)}"
    rows = table_relation(open_table(job, "decisions", None)).select([], of_model, "decided_at", None).read_all()
    return [row | {"figures": json.loads(row["figures"])} for row in to_rows(rows)]


def record(
    job: Job,
    version: str,
    action: Literal["promote", "refuse", "rollback"],
    *,
    champion: ModelVersion | None,
    reasons: Sequence[str] = (),
    figures: str = "{}",
    seen_at: datetime | None = None,
) -> None:
    """In table `decisions`, record a decision about a version of the run's model, with the digests of this version and
    of the current champion.

    `record_decision` explains the arguments.
    """
    from pipelines.driver.evaluate.decisions import record_decision
    from pipelines.tracking.home_store.copied_version import DIGEST_TAG

    record_decision(
        lambda: job.spark,
        job.platform,
        model=job.model_name,
        version=version,
        digest=open_model(job, version).digest,
        action=action,
        champion=champion.version if champion else None,
        champion_digest=champion.tags.get(DIGEST_TAG) if champion else None,
        reasons=reasons,
        figures=figures,
        seen_at=seen_at,
    )


def record_champion(job: Job, champion: ModelVersion, seen_at: datetime | None = None) -> None:
    """If table `decisions` has a different champion than the registry, record the champion of the registry.

    An earlier promotion or rollback may have been recorded but not carried out, because the command was killed or the
    registry did not answer. The home folder may also use another registry than before, whose champion has the same
    number but other files. The view `champion_captions` would then show captions of a version that is not the champion.

    `record_decision` explains `seen_at`.
    """
    from pipelines.driver.evaluate.decisions import recorded_champion

    recorded = recorded_champion(lambda: job.spark, job.platform, champion.name)
    if recorded != (champion.version, digest_of(job, champion)):
        reason = "this version is the champion in the registry, but the last recorded decision names another version"
        if recorded and recorded[0] == champion.version:
            reason = f"{reason} with this number" if recorded[1] else "the last recorded decision has no digest"
        record(job, champion.version, "promote", champion=champion, reasons=[reason], seen_at=seen_at)


def record_other_promotion(job: Job, champion: ModelFiles) -> None:
    """If table `decisions` names another champion than the champion of the registry, which has captioned a table,
    record the champion.

    A promotion in another home folder, or on the page of the registry, leaves no row in table `decisions`. Without this
    row, the view `champion_captions` in a catalog would show the captions of the earlier champion for ever.

    Nothing is recorded if another command may be moving the aliases now, or if the registry has another champion than
    at the start of the job. The next job then compares again.
    """
    from pipelines.driver.evaluate.decisions import newest_champion_change

    seen_at = datetime.now(UTC)
    newest = newest_champion_change(lambda: job.spark, job.platform, champion.name)
    if newest and (newest["model_version"], newest["model_digest"]) == (champion.version, champion.digest):
        return
    # A promotion or rollback records its decision before it moves the alias.
    if newest and seen_at - newest["decided_at"] < LONGEST_MOVE:
        return
    from pipelines.tracking.aliases import find_settled_champion

    present = find_settled_champion(job.platform, champion.name)
    if present is None:
        logger.warning(
            "table decisions and the registry disagree on the champion of model %s: a promotion or rollback is "
            "running, was interrupted, or the champion was removed; if none is running, run promote or rollback again",
            champion.name,
        )
    elif present.version == champion.version:
        record_champion(job, present, seen_at)


def digest_of(job: Job, version: ModelVersion) -> str:
    """Return the digest of a version's files. If Lakesight 0.1.0 has registered the version, its files are
    downloaded."""
    from pipelines.tracking.home_store.copied_version import DIGEST_TAG

    return version.tags.get(DIGEST_TAG) or open_model(job, version.version).digest

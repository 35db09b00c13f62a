"""`lakesight decisions`: list promotions, refusals and rollbacks of a model, with user, time and reasons.

The commands `promote` and `rollback` record decisions with the function `record`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from jobs.common import Job, JsonOption, PlatformOption, RunOption, SetOption, open_job
from jobs.evaluate import open_model
from jobs.table_files import open_table, table_relation

if TYPE_CHECKING:
    from pipelines.tracking.registry import ModelVersion


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
    )

"""`lakesight decisions`: which versions were promoted, refused and rolled back to: who, when, and why."""

from __future__ import annotations

import json
from typing import Any

from jobs.common import Job, JsonOption, PlatformOption, RunOption, SetOption, open_job
from jobs.show import open_table


def decisions(
    *,
    run: RunOption = "demo",
    platform: PlatformOption = "local",
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show who decided which version serves.

    Every promotion, refusal and rollback of the run's model, the newest last: who, when, why, and the figures.

    \b
    Example:
      lakesight decisions --run demo
    """
    with open_job(run, platform, overrides, as_json) as job:
        found = run_decisions(job)
        for row in found:
            after = f" (serving: {row['champion']})" if row["champion"] else ""
            job.screen.text(
                f"{row['decided_at']:%Y-%m-%d %H:%M}  {row['action']:<8} version {row['model_version']}{after}, "
                f"by {row['decided_by']}"
            )
            for reason in row["reasons"]:
                job.screen.text(f"    {reason}")
        job.screen.report({"decisions": found})


def run_decisions(job: Job) -> list[dict[str, Any]]:
    """The rows of the run's model, the newest last.

    Raises:
        UserError: tables here are no files, or there is no such table yet.
    """
    import pyarrow.compute as pc

    from pipelines.formats.tables import arrow_dataset

    table = arrow_dataset(open_table(job, "decisions", None))
    rows = table.to_table(filter=pc.field("model_name") == job.model_name).sort_by("decided_at").to_pylist()
    return [row | {"figures": json.loads(row["figures"])} for row in rows]

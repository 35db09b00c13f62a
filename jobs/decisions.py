"""`lakesight decisions`: list promotions, refusals and rollbacks of a model, with user, time and reasons."""

from __future__ import annotations

import json
from typing import Any

from jobs.common import Job, JsonOption, PlatformOption, RunOption, SetOption, open_job
from jobs.table_files import open_table


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
    with open_job(run, platform, overrides, as_json) as job:
        found = run_decisions(job)
        for row in found:
            champion = f" (serving: {row['champion']})" if row["champion"] else ""
            job.output.text(
                f"{row['decided_at']:%Y-%m-%d %H:%M}  {row['action']:<8} version {row['model_version']}{champion}, "
                f"by {row['decided_by']}"
            )
            for reason in row["reasons"]:
                job.output.hanging("    - ", reason)
        job.output.report({"decisions": found})


def run_decisions(job: Job) -> list[dict[str, Any]]:
    """Return the promotions, refusals and rollbacks of the run's model, newest last.

    Raises:
        UserError: table `decisions` does not exist, or the platform's tables are not readable as files.
    """
    import pyarrow.compute as pc

    from pipelines.formats.delta_files import arrow_dataset

    table = arrow_dataset(open_table(job, "decisions", None))
    rows = table.to_table(filter=pc.field("model_name") == job.model_name).sort_by("decided_at").to_pylist()
    return [row | {"figures": json.loads(row["figures"])} for row in rows]

"""Reports of ingest and caption jobs in MLflow: each is one run with metrics, tags and HTML pages.

All ingests share one experiment and all caption jobs another. They are separate from training runs, because many
training runs share the same data.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, Literal

from mlflow.entities import Metric, RunTag

from pipelines.platform import Platform
from pipelines.tracking.server import REQUEST_ERRORS, connect, experiment_id, unchanged_environment, unreachable

RETRIES = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"


def log_stage(
    platform: Platform,
    kind: Literal["ingest", "caption"],
    name: str,
    report: Mapping[str, Any],
    *,
    tags: Mapping[str, object],
    pages: Sequence[Path] = (),
    good: bool,
) -> str:
    """Log the report and pages of a stage as a new MLflow run; returns the run id.

    A server that does not answer is retried twice only, while MLflow by default retries for minutes: the tables are
    written, and a user waits for the command to end.

    Args:
        platform: platform with the tracking server.
        kind: name of the stage and of its experiment.
        name: name of the run.
        report: the report; every number in it, at any depth, becomes a metric.
        tags: tags to search runs by, without the prefix `lakesight.`.
        pages: HTML pages, logged as artifacts.
        good: whether the run's final status is FINISHED; else it is FAILED.

    Raises:
        UserError: the server does not answer, or the experiment was deleted.
    """
    with unchanged_environment(RETRIES):
        os.environ.setdefault(RETRIES, "2")
        client = connect(platform)
        try:
            tracked = client.create_run(experiment_id(client, kind, platform), run_name=name)
            run_id, now = str(tracked.info.run_id), int(time.time() * 1000)
            client.log_batch(
                run_id,
                metrics=[Metric(key, float(value), now, 0) for key, value in _numbers(report).items()],
                tags=[RunTag(f"lakesight.{key}", str(value)) for key, value in {"kind": kind, **tags}.items()],
            )
            client.log_dict(run_id, dict(report), f"{kind}.json")
            for page in pages:
                client.log_artifact(run_id, str(page))
            client.set_terminated(run_id, "FINISHED" if good else "FAILED")
        except REQUEST_ERRORS as error:
            raise unreachable(platform, error) from None
    return run_id


def _numbers(report: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Collect the numbers of a nested mapping by path, keys joined with `/` as MLflow metric names allow."""
    found: dict[str, float] = {}
    for key, value in report.items():
        if isinstance(value, Mapping):
            found |= _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, Real):
            found[f"{prefix}{key}"] = float(value)
    return found

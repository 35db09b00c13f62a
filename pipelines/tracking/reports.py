"""Reports of ingest and caption jobs in MLflow. A report becomes one MLflow run with metrics, tags and HTML pages.

All ingests share one MLflow experiment, and all caption jobs share another experiment. These reports are not part of
training runs, because many training runs use the same data.
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
from pipelines.tracking.server import REQUEST_ERRORS, connect, experiment_id, unchanged_environment, unusable

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
    """Log the report and pages of a stage as a new MLflow run, and return the id of the run.

    A request to a server that does not answer is retried only twice, because a user waits for the command to end. By
    default, MLflow would retry for minutes.

    Args:
        platform: platform with the tracking server.
        kind: name of the stage and of its experiment.
        name: name of the MLflow run.
        report: report as a nested mapping. Every number in the report, at any depth, becomes a metric.
        tags: tags by which runs can be searched, without the prefix `lakesight.`.
        pages: paths of HTML pages, which are logged as artifacts.
        good: whether the final status of the run is FINISHED. If false, the status is FAILED.

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
            raise unusable(platform, error) from None
    return run_id


def _numbers(report: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Return the numbers in a nested mapping. The key of a number is its path of keys, joined with `/`."""
    found: dict[str, float] = {}
    for key, value in report.items():
        if isinstance(value, Mapping):
            found |= _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, Real):
            found[f"{prefix}{key}"] = float(value)
    return found

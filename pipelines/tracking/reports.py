"""A stage's report in MLflow: a run of its own kind, with the report's figures as metrics and its pages as artifacts.

Ingests of all sources are in one experiment, captionings of all tables in another, apart from trainings: they belong
to data that many runs share.
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
from pipelines.tracking.runs import OUTAGE, connect, experiment_id, unchanged_environment, unreachable

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
    """Log a stage's report and pages; returns the MLflow run's id.

    A server that does not answer is asked again twice, not for minutes as MLflow would: the tables are written, and
    somebody waits.

    Args:
        platform: where the tracking server is.
        kind: of the stage; its experiment is called so.
        name: of the run.
        report: every number in it, however deep, becomes a metric.
        tags: what the runs are looked for by.
        pages: HTML pages.
        good: whether the run ends FINISHED, else FAILED.

    Raises:
        UserError: the server does not answer, or its experiment of that kind was deleted.
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
        except OUTAGE as error:
            raise unreachable(platform, error) from None
    return run_id


def _numbers(report: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Numbers of nested mappings by their paths, as MLflow allows metrics to be called."""
    found: dict[str, float] = {}
    for key, value in report.items():
        if isinstance(value, Mapping):
            found |= _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, Real):
            found[f"{prefix}{key}"] = float(value)
    return found

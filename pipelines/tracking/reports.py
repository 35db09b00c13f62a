"""Reports of ingest and caption jobs in MLflow. A report becomes one MLflow run with metrics, tags and HTML pages.

All ingests share one MLflow experiment, and all caption jobs share another experiment, unless `platform.experiment`
names one experiment for everything. Reports of ingests and caption jobs are not logged to training runs, because many
training runs use the same data.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any, Literal

from mlflow.entities import DatasetInput, Metric, Param, RunTag
from pydantic import ConfigDict, Field

from pipelines.platform import Platform
from pipelines.tracking.describe.notes import NOTE
from pipelines.tracking.describe.training import MAX_PARAM_CHARS
from pipelines.tracking.server import REQUEST_ERRORS, connect, experiment_id, unchanged_environment, unusable
from vlm.config import Config

RETRIES = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"


class StageLog(Config):
    """Data that one stage logs to an MLflow run.

    The numbers in the report and in its nested dicts become metrics. Numbers under a top-level key that is also the
    name of a parameter or table are left out.

    Attributes:
        kind: name of the stage, from which `Platform.experiment` makes the name of the MLflow experiment.
        name: name of the MLflow run.
        report: report of the stage, as a nested dict.
        tags: tags by which runs can be searched, without the prefix `lakesight.`.
        params: parameters of the MLflow run, such as the settings of the stage.
        tables: columns (names and values) of the tables to log as MLflow artifacts, by name of the table.
        inputs: MLflow datasets that describe what the stage has read.
        pages: paths of HTML pages, which are logged as artifacts.
        text: description of the run, in Markdown.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    kind: Literal["ingest", "caption"]
    name: str
    report: dict[str, Any]
    tags: dict[str, Any]
    params: dict[str, str] = Field(default_factory=dict)
    tables: dict[str, dict[str, list[Any]]] = Field(default_factory=dict)
    inputs: list[DatasetInput] = Field(default_factory=list)
    pages: list[Path] = Field(default_factory=list)
    text: str


def log_stage(platform: Platform, log: StageLog, *, good: bool) -> str:
    """Log the report and pages of a stage as a new MLflow run, and return the id of the run.

    A request to a server that does not answer is retried only twice, because a user waits for the command to end. By
    default, MLflow would retry for minutes. The final status of the run is FINISHED if `good` is true, else FAILED.

    Raises:
        UserError: the server does not answer or refuses a request, or the experiment was deleted.
    """
    numbers = _numbers({key: value for key, value in log.report.items() if key not in (*log.params, *log.tables)})
    tags = {f"lakesight.{key}": str(value) for key, value in {"kind": log.kind, **log.tags}.items()} | {NOTE: log.text}
    with unchanged_environment(RETRIES):
        os.environ.setdefault(RETRIES, "2")
        client = connect(platform)
        try:
            tracked = client.create_run(experiment_id(client, log.kind, platform), run_name=log.name)
            run_id, now = str(tracked.info.run_id), int(time.time() * 1000)
            client.log_batch(
                run_id,
                metrics=[Metric(key, value, now, 0) for key, value in numbers.items()],
                params=[Param(key, value[:MAX_PARAM_CHARS]) for key, value in log.params.items()],
                tags=[RunTag(key, value) for key, value in tags.items()],
            )
            client.log_dict(run_id, log.report, f"{log.kind}.json")
            for name, columns in log.tables.items():
                client.log_table(run_id, columns, f"{name}.json")
            if log.inputs:
                client.log_inputs(run_id, log.inputs)
            for page in log.pages:
                client.log_artifact(run_id, str(page))
            client.set_terminated(run_id, "FINISHED" if good else "FAILED")
        except REQUEST_ERRORS as error:
            raise unusable(platform, error) from None
    return run_id


def _numbers(report: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Flatten a nested mapping to a dict of its numbers. The key of a number is its path, such as `figures/words`."""
    found: dict[str, float] = {}
    for key, value in report.items():
        if isinstance(value, Mapping):
            found |= _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, Real):
            found[f"{prefix}{key}"] = float(value)
    return found

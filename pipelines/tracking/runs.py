"""Training runs in MLflow: parameters, tags, metrics and sample captions.

Ranks never call MLflow. Rank 0 writes small immutable files into the run folder, and a thread of the driver, the
`Follower`, logs the files in order. No metric is lost in an outage of the server, because the files stay in the run
folder. After an outage, and also when a run is resumed, the follower asks MLflow which points are stored, and logs the
missing points. The MLflow run therefore has no gaps and no repeated points. If the server is down when training starts,
the follower opens the MLflow run as soon as the server answers.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import mlflow
from mlflow import MlflowClient
from mlflow.entities import DatasetInput, Metric, Run
from mlflow.exceptions import MlflowException

from pipelines.config import RunConfig
from pipelines.errors import StageFailed, UserError
from pipelines.formats.run_files.new_files import new_metrics, new_samples, sample_metrics
from pipelines.formats.run_folder import CaptionSamples, Metrics, RunFolder, read_json, write_json
from pipelines.formats.run_owner import LeaseLost, is_owned_elsewhere
from pipelines.formats.shards import Shards
from pipelines.platform import Platform
from pipelines.tracking.describe.figures import LEARNING_CURVE, training_figures
from pipelines.tracking.describe.names import run_name
from pipelines.tracking.describe.training import add_sections, describe_training, show_learning_curve
from pipelines.tracking.outage import TrackingDown, first_line
from pipelines.tracking.server import REQUEST_ERRORS, connect, experiment_id, short_requests, unusable
from vlm.config import Config
from vlm.errors.printable import hide_secrets

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

SAMPLES_TABLE = "samples.json"
CAUSE_TAG = "lakesight.cause"
POLL_SECONDS = 1.0
MAX_PAUSE_SECONDS = 30.0
DRAIN_SECONDS = 60.0
STOP_SECONDS = 15.0
"""Time in seconds that an interrupted command waits for the last request of the follower thread."""
MAX_TAG_CHARS = 5000
FOLLOWER_ERRORS = (*REQUEST_ERRORS, UserError)
"""Exceptions after which the follower sends a failed request again."""


class Tracking(Config):
    """tracking.json: id of the MLflow run to which a run folder was logged last, and ids of its other MLflow runs, for
    example on other servers.
    """

    run_id: str
    others: tuple[str, ...] = ()


@contextmanager
def follow(run: RunFolder, config: RunConfig, platform: Platform, *, may_be_down: bool = True) -> Iterator[Follower]:
    """Log a training run to MLflow while the block executes. After the block, the follower's `run_id` is the id of the
    MLflow run.

    This function starts an MLflow run, or continues the MLflow run that the folder's tracking.json names. After the
    block, the remaining metric files are logged and the status of the MLflow run becomes FINISHED, KILLED
    (KeyboardInterrupt) or FAILED (any other exception). The message of the exception is logged as a tag, and failure
    records are logged as artifacts. If another process has taken over the run folder, the MLflow run belongs to that
    process, and its status and tags stay as they are.

    Args:
        run: run folder.
        config: config of the run.
        platform: platform whose tracking server is used.
        may_be_down: whether the block executes even if the server is down.

    Raises:
        TrackingDown: the server is down at the start, and may_be_down is false.
        UserError: the server refuses the request at the start.
        StageFailed: training succeeded, but requests to the server fail at the end.
    """
    follower = Follower(run, config, platform)
    try:
        follower.open_run()
    except TrackingDown as error:
        if not may_be_down:
            raise
        logger.warning(
            "training starts without MLflow, and keeps the metrics in %s until MLflow answers: %s", run.path, error
        )
    follower.start()
    try:
        yield follower
    except BaseException as error:
        with short_requests():
            follower.stop(STOP_SECONDS)
            if not (isinstance(error, LeaseLost) or is_owned_elsewhere(run)):
                follower.mark_failed(error)
        raise
    follower.stop()
    try:
        follower.drain(DRAIN_SECONDS)
        follower.open_run().set_terminated(follower.run_id, "FINISHED")
    except FOLLOWER_ERRORS as error:
        raise StageFailed(
            "training succeeded, but not all of it could be logged to MLflow",
            where=hide_secrets(platform.tracking_uri),
            got=_cause(error),
            fix="start the MLflow server, and run `lakesight train`, `evaluate`, `promote` or `caption` for this run: "
            f"the command logs the results, which are in {run.path}, and registers the model",
        ) from None


def log_report(
    platform: Platform,
    run_id: str,
    name: str,
    metrics: Mapping[str, float],
    files: Sequence[Path] = (),
    *,
    tables: Mapping[str, dict[str, list[object]]] | None = None,
    figures: Mapping[str, Figure] | None = None,
    inputs: Sequence[DatasetInput] = (),
    step: int = 0,
    sections: Mapping[str, str] | None = None,
) -> None:
    """Log a stage's report to an existing MLflow run.

    Files, tables and figures are logged in the artifact folder `name`. A table that the run already has is not logged
    again, because MLflow would append its rows to the logged table.

    Args:
        platform: platform whose tracking server is used.
        run_id: id of the MLflow run.
        name: name of the stage, such as 'evaluate', or a folder of the stage, such as 'evaluate/version-2'.
        metrics: values of the metrics to log, by name.
        files: paths of the files to log.
        tables: columns (names and values) of the tables to log as MLflow artifacts, by file name.
        figures: figures to log, by file name.
        inputs: MLflow datasets that describe what the stage has read.
        step: training step of the metrics. MLflow shows the value of the largest step as the value of a run's metric.
        sections: sections of the run's description to replace or append, by heading.

    Raises:
        UserError: the server does not answer or does not have the MLflow run.
    """
    client = connect(platform)
    now = int(time.time() * 1000)
    try:
        client.log_batch(run_id, metrics=[Metric(key, value, now, step) for key, value in metrics.items()])
        for file in files:
            client.log_artifact(run_id, str(file), name)
        existing = {artifact.path for artifact in client.list_artifacts(run_id, name)} if tables else set()
        for file_name, columns in (tables or {}).items():
            if f"{name}/{file_name}" not in existing:
                client.log_table(run_id, columns, f"{name}/{file_name}")
        for file_name, figure in (figures or {}).items():
            client.log_figure(run_id, figure, f"{name}/{file_name}")
        if inputs:
            client.log_inputs(run_id, inputs)
        if sections:
            add_sections(client, run_id, sections)
    except REQUEST_ERRORS as error:
        raise UserError(
            f"the {name} report cannot be logged to MLflow",
            where=f"run {run_id} on {hide_secrets(platform.tracking_uri)}",
            got=first_line(error),
            fix="check that the server is running and that the run was not deleted",
        ) from None


class Follower(threading.Thread):
    """Thread that logs the metric and sample files of a run folder to MLflow, each once and in step order."""

    def __init__(self, run: RunFolder, config: RunConfig, platform: Platform) -> None:
        super().__init__(name="lakesight-mlflow-follower", daemon=True)
        self._run, self._config, self._platform = run, config, platform
        self.client: MlflowClient | None = None
        self.run_id = ""  # id of the MLflow run; empty until the run is open
        self._stopping = threading.Event()
        self._metrics_step = self._samples_step = -1
        self._read: dict[int, Metrics] = {}
        # False at the start and after an error, because MLflow may then have points that this thread does not know
        self._in_sync = False

    def open_run(self) -> MlflowClient:
        """Start or continue the MLflow run if the run is not open yet. Return the client.

        Raises:
            TrackingDown: the server is down.
            UserError: the server refuses the request.
        """
        if self.client is None:
            client = connect(self._platform)
            self.run_id = _open_run(client, self._run, self._config, self._platform)
            self.client = client
        return self.client

    def run(self) -> None:
        """Log new files until `stop` is called. After an error, wait with exponential backoff."""
        pause = POLL_SECONDS
        while not self._stopping.wait(pause):
            try:
                self.catch_up()
                pause = POLL_SECONDS
            except FOLLOWER_ERRORS as error:
                pause = min(2 * pause, MAX_PAUSE_SECONDS)
                logger.warning("metrics cannot be logged to MLflow (%s); next try in %.0f s", _cause(error), pause)

    def stop(self, seconds: float | None = None) -> None:
        """Stop the thread, and wait for its last request, by default without a limit. Files that are not logged yet
        stay in the run folder.
        """
        self._stopping.set()
        self.join(seconds)

    def drain(self, seconds: float) -> None:
        """Log the remaining files, the figures, the profile and the hosts. After an error, retry for `seconds`.

        Raises:
            MlflowException, OSError, ValueError, UserError: requests still fail after `seconds`.
        """
        deadline, pause = time.monotonic() + seconds, POLL_SECONDS
        while True:
            try:
                client = self.catch_up(to_end=True)
                self._log_figures(client)
                for file, folder in ((self._run.profile, "profile"), (self._run.hosts, None)):
                    if file.exists():
                        client.log_artifact(self.run_id, str(file), folder)
                return
            except FOLLOWER_ERRORS:
                if time.monotonic() + pause > deadline:
                    raise
                time.sleep(pause)
                pause *= 2

    def catch_up(self, *, to_end: bool = False) -> MlflowClient:
        """Log every metric file and sample file that MLflow does not have yet. Return the client.

        Args:
            to_end: whether the ranks have ended; if true, the folders are listed, so that every file is found.

        Raises:
            MlflowException, OSError, ValueError, UserError: a request failed. The next call of this method logs the
                remaining files.
        """
        client = self.open_run()
        in_sync, self._in_sync = self._in_sync, False
        points = set() if in_sync else _logged_points(client, self.run_id)
        sample_steps = set() if in_sync else _logged_sample_steps(client, self.run_id)
        listed = to_end or not in_sync
        self._log_metrics(client, points, listed=listed)
        after = self._samples_step
        new = self._run.read_samples(after) if listed else new_samples(self._run, self._config.train, after)
        for samples in new:
            if samples.step not in sample_steps:
                self._log_samples(client, samples)
            self._samples_step = samples.step
        self._in_sync = True
        return client

    def mark_failed(self, cause: BaseException) -> None:
        """Set the status of the MLflow run to FAILED or KILLED. If a request fails, only log a warning."""
        killed = isinstance(cause, KeyboardInterrupt)
        if (client := self.client) is None:
            logger.warning(
                "training run %s failed, but the failure is not logged to MLflow, because the server is down",
                self._run.path,
            )
            return
        try:
            client.set_tag(self.run_id, CAUSE_TAG, (str(cause) or type(cause).__name__)[:MAX_TAG_CHARS])
            if self._run.failures.is_dir():
                client.log_artifacts(self.run_id, str(self._run.failures), "failures")
            client.set_terminated(self.run_id, "KILLED" if killed else "FAILED")
            self.drain(POLL_SECONDS)
        except FOLLOWER_ERRORS as error:
            logger.warning(
                "the final status of training run %s could not be logged to MLflow: %s", self._run.path, _cause(error)
            )

    def _log_metrics(self, client: MlflowClient, known: set[tuple[str, int]], *, listed: bool) -> None:
        if known:  # points are logged in step order, so only the last logged step can lack points
            last = max(step for _, step in known)
            self._metrics_step = max(self._metrics_step, last - 1 - self._config.train.log_every)
        after = self._metrics_step
        files = list(self._run.read_metrics(after) if listed else new_metrics(self._run, self._config.train, after))
        self._read |= {file.step: file for file in files}
        client.log_batch(
            self.run_id,
            metrics=[
                Metric(key, value, int(file.time * 1000), file.step)
                for file in files
                for key, value in file.points.items()
                if (key, file.step) not in known
            ],
        )
        if files:
            self._metrics_step = files[-1].step

    def _log_figures(self, client: MlflowClient) -> None:
        names = []
        for name, figure in training_figures(sample_metrics(self._run, self._config.train, self._read)):
            client.log_figure(self.run_id, figure, name)
            names.append(name)
        if LEARNING_CURVE in names:
            show_learning_curve(client, self._platform, self.run_id)

    def _log_samples(self, client: MlflowClient, samples: CaptionSamples) -> None:
        file = self._run.read_run()
        shards = Shards.open(self._run.shard_folder(file.validate_shards))
        pictures: dict[str, list[object]] = {}
        if not file.config.model.text_only:
            pictures["picture"] = [mlflow.Image(shards.row(sample.row).pixels) for sample in samples.samples]
            pictures["image_id"] = [sample.image_id for sample in samples.samples]
        client.log_table(
            self.run_id,
            {
                "step": [samples.step] * len(samples.samples),
                **pictures,
                "text": [sample.text for sample in samples.samples],
                "caption": [sample.caption for sample in samples.samples],
            },
            SAMPLES_TABLE,
        )


def _cause(error: Exception) -> str:
    """Return one line that describes why a request failed."""
    return error.got if isinstance(error, UserError) else first_line(error)


def _logged_points(client: MlflowClient, run_id: str) -> set[tuple[str, int]]:
    """Return a pair (metric, step) for every point that is stored in the MLflow run."""
    metrics = client.get_run(run_id).data.metrics
    return {(key, point.step) for key in metrics for point in client.get_metric_history(run_id, key)}


def _logged_sample_steps(client: MlflowClient, run_id: str) -> set[int]:
    """Return the steps for which sample captions are logged in the MLflow run."""
    if SAMPLES_TABLE not in {artifact.path for artifact in client.list_artifacts(run_id)}:
        return set()
    table = mlflow.artifacts.load_dict(f"runs:/{run_id}/{SAMPLES_TABLE}")
    column = table["columns"].index("step")
    return {int(row[column]) for row in table["data"]}


def _open_run(client: MlflowClient, run: RunFolder, config: RunConfig, platform: Platform) -> str:
    known = logged_ids(run)
    try:
        tracked = _tracked_run(client, known)
        if tracked is None:
            if known:
                logger.info("MLflow run %s is not on this server: a new MLflow run is created", known[0])
            tracked = client.create_run(experiment_id(client, config.name, platform), run_name=run_name(config))
        else:
            client.update_run(tracked.info.run_id, status="RUNNING")
            if CAUSE_TAG in tracked.data.tags:
                client.delete_tag(tracked.info.run_id, CAUSE_TAG)
        run_id = str(tracked.info.run_id)
        if known[:1] != [run_id]:
            write_json(run.tracking, Tracking(run_id=run_id, others=tuple(each for each in known if each != run_id)))
        describe_training(client, tracked, run, config)
    except REQUEST_ERRORS as error:
        raise unusable(platform, error) from None
    return run_id


def logged_ids(run: RunFolder) -> list[str]:
    """Return the ids of all MLflow runs to which a run folder was logged, on any server. The first id belongs to the
    MLflow run to which the folder was logged last.
    """
    if not run.tracking.exists():
        return []
    tracking = read_json(run.tracking, Tracking)
    return [tracking.run_id, *tracking.others]


def _tracked_run(client: MlflowClient, run_ids: Sequence[str]) -> Run | None:
    """Look up the ids in order, and return the first MLflow run that is on the server and not deleted, or None."""
    for run_id in run_ids:
        try:
            found = client.get_run(run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            continue
        if found.info.lifecycle_stage == "active":
            return found
    return None

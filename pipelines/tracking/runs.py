"""A training run in MLflow: parameters, tags, and a follower that carries metric files there.

Ranks never talk to MLflow. They write small immutable files into the run folder, and a thread on the driver logs them
in order. So an outage of the server costs nothing: the files wait, the follower asks MLflow which points it already
has, and logs the rest. The same question makes a resumed run go on in its old MLflow run without a gap or a double.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException

from pipelines.config import RunConfig
from pipelines.errors import StageFailed, UserError
from pipelines.formats.run_folder import CaptionSamples, Metrics, RunFile, RunFolder, read_json, write_json
from pipelines.formats.shards import Shards
from pipelines.platform import Platform, redact_uri
from pipelines.tracking.expert_load_plot import draw_expert_load
from vlm.config import Config

logger = logging.getLogger(__name__)

SAMPLES_TABLE = "samples.json"
LOAD_PICTURE = "expert_load.png"
CAUSE_TAG = "lakesight.cause"
POLL_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 30.0
DRAIN_SECONDS = 60.0
MAX_PARAM_CHARS = 500  # what every tracking server accepts
MAX_TAG_CHARS = 5000

OUTAGE = (MlflowException, OSError)
"""What a request to a server that is away or unwilling raises. Errors of `requests` are OSErrors."""


class Tracking(Config):
    """tracking.json: the MLflow run that this run folder is logged to."""

    run_id: str


def connect(platform: Platform) -> MlflowClient:
    """Point MLflow at the platform's tracking server and registry, quietly.

    Raises:
        UserError: the server does not answer.
    """
    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # we say ourselves that a server is away
    # MLflow also writes the addresses into the environment, where `platform.local` would later read them as a user's
    # wish, and a child process as its own.
    with unchanged_environment("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        mlflow.set_tracking_uri(platform.tracking_uri)
        mlflow.set_registry_uri(platform.registry_uri)
    try:
        client = MlflowClient()
        client.search_experiments(max_results=1)
    except OUTAGE as error:
        raise unreachable(platform, error) from None
    return client


@contextmanager
def unchanged_environment(*names: str) -> Iterator[None]:
    """Put these variables back, or away, after the block."""
    before = {name: os.environ.get(name) for name in names}
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def run_id_of(run: RunFolder) -> str:
    """The MLflow run that a run folder was logged to.

    Raises:
        UserError: the folder was never tracked (a run of plain torchrun).
    """
    return read_json(run.tracking, Tracking).run_id


@contextmanager
def follow(run: RunFolder, config: RunConfig, platform: Platform) -> Iterator[str]:
    """Log a run to MLflow while the body trains it; yields the MLflow run id.

    Starts an MLflow run, or goes on in the one that the folder's tracking.json names. When the body ends, what is left
    of the metric files is logged and the run is FINISHED, KILLED (KeyboardInterrupt) or FAILED (any other exception:
    its message becomes a tag, the failure records become artifacts).

    Raises:
        UserError: the tracking server does not answer at the start.
        StageFailed: it does not answer at the end, after a training that went well.
    """
    client = connect(platform)
    run_id = _open_run(client, run, config, platform)
    follower = Follower(client, run, run_id)
    follower.start()
    try:
        yield run_id
    except BaseException as error:
        follower.stop()
        _close_badly(client, run, run_id, follower, error)
        raise
    follower.stop()
    try:
        follower.drain(DRAIN_SECONDS)
        client.set_terminated(run_id, "FINISHED")
    except OUTAGE as error:
        raise StageFailed(
            "the training went well, but MLflow does not have all of it",
            where=redact_uri(platform.tracking_uri),
            got=_first_line(error),
            fix=f"start the server and repeat the command: everything is in {run.path}",
        ) from None


def log_report(
    platform: Platform,
    run_id: str,
    name: str,
    metrics: Mapping[str, float],
    files: Sequence[Path] = (),
    *,
    tables: Mapping[str, dict[str, list[object]]] | None = None,
) -> None:
    """Add a stage's report to an MLflow run: metrics as `<name>/<metric>`, files and tables in folder `name`.

    A table that the run has is not logged again: MLflow would add its rows once more.

    Raises:
        UserError: the server does not answer, or has no such run.
    """
    client = connect(platform)
    now = int(time.time() * 1000)
    try:
        client.log_batch(run_id, metrics=[Metric(f"{name}/{key}", value, now, 0) for key, value in metrics.items()])
        for file in files:
            client.log_artifact(run_id, str(file), name)
        there = {artifact.path for artifact in client.list_artifacts(run_id, name)} if tables else set()
        for file_name, columns in (tables or {}).items():
            if f"{name}/{file_name}" not in there:
                client.log_table(run_id, columns, f"{name}/{file_name}")
    except OUTAGE as error:
        raise UserError(
            f"the {name} report cannot be logged to MLflow",
            where=f"run {run_id} on {redact_uri(platform.tracking_uri)}",
            got=_first_line(error),
            fix="check that the server runs and that the run was not deleted there",
        ) from None


class Follower(threading.Thread):
    """Carries metric and sample files of a run folder into MLflow, in order, each once."""

    def __init__(self, client: MlflowClient, run: RunFolder, run_id: str) -> None:
        super().__init__(name="lakesight-mlflow-follower", daemon=True)
        self._client, self._run, self._run_id = client, run, run_id
        self._stopping = threading.Event()
        self._metrics_step = self._samples_step = -1
        self._routed: Metrics | None = None  # the last step that tells of experts
        self._certain = False  # whether we know what MLflow has: not at the start, nor after a failed request

    def run(self) -> None:
        """Poll until stopped; after an error wait longer each time."""
        pause = POLL_SECONDS
        while not self._stopping.wait(pause):
            try:
                self.catch_up()
                pause = POLL_SECONDS
            except OUTAGE as error:
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
                logger.warning("MLflow does not take metrics (%s); next try in %.0f s", _first_line(error), pause)

    def stop(self) -> None:
        """End the thread; what is not logged yet stays in the files."""
        self._stopping.set()
        self.join()

    def drain(self, seconds: float) -> None:
        """Log what is left, with the last load of experts as a picture, the trace and the hosts, trying for `seconds`.

        Raises:
            MlflowException, OSError: the last error, when time is up.
        """
        deadline, pause = time.monotonic() + seconds, POLL_SECONDS
        while True:
            try:
                self.catch_up()
                if self._routed is not None:
                    self._client.log_figure(self._run_id, draw_expert_load(self._routed), LOAD_PICTURE)
                for file, folder in ((self._run.profile, "profile"), (self._run.hosts, None)):
                    if file.exists():
                        self._client.log_artifact(self._run_id, str(file), folder)
                return
            except OUTAGE:
                if time.monotonic() + pause > deadline:
                    raise
                time.sleep(pause)
                pause *= 2

    def catch_up(self) -> None:
        """Log every file that MLflow does not have yet."""
        points = set() if self._certain else _points(self._client, self._run_id)
        tables = set() if self._certain else _table_steps(self._client, self._run_id)
        self._certain = False
        self._log_metrics(points)
        for samples in self._run.read_samples(after=self._samples_step):
            if samples.step not in tables:
                self._log_samples(samples)
            self._samples_step = samples.step
        self._certain = True

    def _log_metrics(self, known: set[tuple[str, int]]) -> None:
        files = list(self._run.read_metrics(after=self._metrics_step))
        self._client.log_batch(
            self._run_id,
            metrics=[
                Metric(key, value, int(file.time * 1000), file.step)
                for file in files
                for key, value in file.points.items()
                if (key, file.step) not in known
            ],
        )
        if files:
            self._metrics_step = files[-1].step
        self._routed = next((file for file in reversed(files) if file.expert_load), self._routed)

    def _log_samples(self, samples: CaptionSamples) -> None:
        shards = Shards.open(Path(self._run.read_run().validate_shards))
        self._client.log_table(
            self._run_id,
            {
                "step": [samples.step] * len(samples.samples),
                "picture": [mlflow.Image(shards.row(sample.row).pixels) for sample in samples.samples],
                "text": [sample.text for sample in samples.samples],
                "caption": [sample.caption for sample in samples.samples],
                "image_id": [sample.image_id for sample in samples.samples],
            },
            SAMPLES_TABLE,
        )


def _points(client: MlflowClient, run_id: str) -> set[tuple[str, int]]:
    """(metric, step) of everything the MLflow run has."""
    metrics = client.get_run(run_id).data.metrics
    return {(key, point.step) for key in metrics for point in client.get_metric_history(run_id, key)}


def _table_steps(client: MlflowClient, run_id: str) -> set[int]:
    """Steps whose sample captions the MLflow run has."""
    if SAMPLES_TABLE not in {artifact.path for artifact in client.list_artifacts(run_id)}:
        return set()
    table = mlflow.artifacts.load_dict(f"runs:/{run_id}/{SAMPLES_TABLE}")
    column = table["columns"].index("step")
    return {int(row[column]) for row in table["data"]}


def _open_run(client: MlflowClient, run: RunFolder, config: RunConfig, platform: Platform) -> str:
    file = run.read_run()
    try:
        tracked = _tracked_run(client, run)
        if tracked is None:
            tracked = client.create_run(experiment_id(client, config.name, platform), run_name=run.path.name)
            write_json(run.tracking, Tracking(run_id=tracked.info.run_id))
        else:
            client.update_run(tracked.info.run_id, status="RUNNING")
            if CAUSE_TAG in tracked.data.tags:
                client.delete_tag(tracked.info.run_id, CAUSE_TAG)
        _describe(client, tracked, run, file, config)
    except OUTAGE as error:
        raise unreachable(platform, error) from None
    return str(tracked.info.run_id)


def _tracked_run(client: MlflowClient, run: RunFolder) -> Run | None:
    """The MLflow run that the folder names, unless it was deleted or lives on another server."""
    if not run.tracking.exists():
        return None
    run_id = run_id_of(run)
    try:
        found = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        found = None
    if found is None or found.info.lifecycle_stage != "active":
        logger.info("MLflow run %s is not on this server any more: the whole run folder goes into a new one", run_id)
        return None
    return found


def experiment_id(client: MlflowClient, name: str, platform: Platform) -> str:
    """The experiment of that name, made where there is none.

    Raises:
        UserError: it was deleted.
    """
    experiment_name = platform.experiment(name)
    experiment = client.get_experiment_by_name(experiment_name)
    if experiment is None:
        # A server keeps artifacts where it was told to; a bare database file needs a folder beside it.
        bare = platform.tracking_uri.startswith("sqlite:")
        location = (platform.root / "mlartifacts").as_uri() if bare else None
        try:
            return str(client.create_experiment(experiment_name, artifact_location=location))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            experiment = client.get_experiment_by_name(experiment_name)  # another run made it this moment
            assert experiment is not None
    if experiment.lifecycle_stage != "active":
        raise UserError(
            "the MLflow experiment was deleted",
            where=f"{experiment_name} on {redact_uri(platform.tracking_uri)}",
            fix=f"restore it: mlflow experiments restore --experiment-id {experiment.experiment_id}",
        )
    return str(experiment.experiment_id)


def _describe(client: MlflowClient, tracked: Run, run: RunFolder, file: RunFile, config: RunConfig) -> None:
    """Parameters, tags, run.json and the dataset. A parameter cannot change, so a resumed run adds only new ones."""
    run_id = tracked.info.run_id
    request = Shards(Path(file.train_shards)).manifest.request
    params = {key: value[:MAX_PARAM_CHARS] for key, value in flatten(json.loads(config.to_json())).items()}
    tags = {
        "lakesight.run": config.name,
        "lakesight.run_folder": str(run.path),
        "lakesight.code_version": file.code_version,
        "lakesight.table": request.table,
        "lakesight.table_version": str(file.dataset_version),
        "lakesight.content_hash": file.content_hash,
        "lakesight.world_size": str(file.world_size),
    }
    client.log_batch(
        run_id,
        params=[Param(key, value) for key, value in params.items() if key not in tracked.data.params],
        tags=[RunTag(key, value) for key, value in tags.items()],
    )
    client.log_artifact(run_id, str(run.run_file))
    source = json.dumps({"delta_table_name": request.table, "delta_table_version": file.dataset_version})
    dataset = Dataset(request.table, file.content_hash, "delta_table", source)
    client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested mappings as dotted names; everything else as text."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, Mapping) else {name: str(value)}
    return flat


def _close_badly(client: MlflowClient, run: RunFolder, run_id: str, follower: Follower, cause: BaseException) -> None:
    """Mark the run FAILED or KILLED. The cause is already on its way up: an outage here must not hide it."""
    killed = isinstance(cause, KeyboardInterrupt)
    try:
        client.set_tag(run_id, CAUSE_TAG, (str(cause) or type(cause).__name__)[:MAX_TAG_CHARS])
        if run.failures.is_dir():
            client.log_artifacts(run_id, str(run.failures), "failures")
        client.set_terminated(run_id, "KILLED" if killed else "FAILED")
        follower.drain(POLL_SECONDS)
    except OUTAGE as error:
        logger.warning("MLflow run %s was not told how the training ended: %s", run_id, _first_line(error))


def unreachable(platform: Platform, error: Exception) -> UserError:
    """What to say where a request to the tracking server failed."""
    return UserError(
        "the MLflow tracking server cannot be used",
        where=redact_uri(platform.tracking_uri),
        got=_first_line(error),
        fix="start it, correct MLFLOW_TRACKING_URI, or unset that to track in the Lakesight home folder",
    )


def _first_line(error: Exception) -> str:
    return redact_uri((str(error) or type(error).__name__).splitlines()[0])[:300]

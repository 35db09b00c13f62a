"""Functions that connect to the MLflow tracking server and model registry of a platform."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath
from urllib.parse import urlsplit

import mlflow
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.store.artifact import artifact_repository_registry as repositories
from mlflow.store.artifact.artifact_repo import ArtifactRepository
from mlflow.store.artifact.http_artifact_repo import HttpArtifactRepository
from mlflow.store.artifact.mlflow_artifacts_repo import MlflowArtifactsRepository

from pipelines.errors import StageFailed, UserError
from pipelines.platform import Platform
from pipelines.tracking.database import check_database
from pipelines.tracking.describe.notes import KIND, TRAINING_KIND, describe_experiment
from pipelines.tracking.home_store.moved_home import artifact_root, follow_moved_home
from pipelines.tracking.outage import TrackingDown, disk_problem, first_line, http_status, is_outage
from vlm.errors.printable import PrintableFormatter, hide_secrets

REQUEST_ERRORS = (MlflowException, OSError, ValueError)
"""Classes of the exceptions that a failed request to the tracking server raises.

Exceptions of the packages `requests` and `databricks.sdk` are OSErrors. A ValueError means that the server has returned
a malformed value, for example an artifact location that is not a valid URI.
"""

DISK_FIX = (
    "free disk space for the tracking database, its artifacts and temporary files (TMPDIR), or make their folders "
    "writable, and run the same command again"
)
HTTP_PORTS = {"http": 80, "https": 443}
CHECK_TIMEOUT = ("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
"""Environment variable of MLflow's request timeout, and its value in seconds for requests that let users wait: the
first request to the tracking server, and requests at the end of an interrupted command. MLflow's default of two minutes
would be too long."""


def connect(platform: Platform) -> MlflowClient:
    """Point MLflow to the platform's tracking server and model registry, and return a client.

    Raises:
        TrackingDown: the server or the database gives no answer, or the server reports an internal error.
        UserError: an address is not a valid URI, the server or the database cannot be used, or the store of a moved
            home folder cannot be updated.
    """
    _check_addresses(platform)
    check_database(platform.tracking_uri)
    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # The warnings of urllib3 and the tracebacks of MLflow's database module repeat our errors.
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    print_logs_safely()
    refuse_foreign_hosts()
    follow_moved_home(platform)
    # `mlflow.set_tracking_uri` and `mlflow.set_registry_uri` also set these environment variables. `platform.local` and
    # child processes would mistake the variables for settings of the user.
    with unchanged_environment("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        mlflow.set_tracking_uri(platform.tracking_uri)
        mlflow.set_registry_uri(platform.registry_uri)
    try:
        client = MlflowClient()
        with short_requests():
            client.search_experiments(max_results=1)
    except REQUEST_ERRORS as error:
        raise unusable(platform, error) from None
    return client


def _check_addresses(platform: Platform) -> None:
    """Raise a UserError if the address of the tracking server or of the model registry is not a valid URI.

    For such an address, MLflow raises a ValueError that does not name the address.
    """
    for name, uri in (
        ("MLFLOW_TRACKING_URI", platform.tracking_uri),
        ("MLFLOW_REGISTRY_URI", platform.registry_uri),
    ):
        try:
            urlsplit(uri)
        except ValueError as error:
            raise UserError(
                "the address of an MLflow server is not a valid URI",
                where=name,
                got=f"{hide_secrets(uri)}: {error}",
                fix=f"correct {name}, or unset it to use the Lakesight home folder",
            ) from None


def print_logs_safely() -> None:
    """Hide secrets in the log lines that MLflow prints, because a line may quote an answer of a server."""
    for handler in logging.getLogger("mlflow").handlers:
        handler.setFormatter(PrintableFormatter("%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S"))


@contextmanager
def unchanged_environment(*names: str) -> Iterator[None]:
    """Restore the named environment variables after the block."""
    before = {name: os.environ.get(name) for name in names}
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@contextmanager
def short_requests() -> Iterator[None]:
    """Limit the duration of requests in the block to CHECK_TIMEOUT, unless the user has set another limit."""
    with unchanged_environment(CHECK_TIMEOUT[0]):
        os.environ.setdefault(*CHECK_TIMEOUT)
        yield


def ensure_experiment(platform: Platform, name: str) -> None:
    """Find or create an MLflow experiment, and check that this user may change the experiment.

    Raises:
        UserError: the server refuses the request, or the experiment was deleted.
        TrackingDown: the server does not answer.
    """
    try:
        client = connect(platform)
        number = experiment_id(client, name, platform)
        client.set_experiment_tag(number, KIND, client.get_experiment(number).tags.get(KIND, TRAINING_KIND))
    except REQUEST_ERRORS as error:
        raise unusable(platform, error) from None


def experiment_id(client: MlflowClient, name: str, platform: Platform) -> str:
    """Return the id of an MLflow experiment. Create the experiment if it does not exist.

    Raises:
        UserError: the experiment was deleted.
    """
    experiment_name = platform.experiment(name)
    experiment = client.get_experiment_by_name(experiment_name)
    if experiment is None:
        # A tracking server chooses the location of artifacts. If the tracking database is an SQLite file, artifacts are
        # stored in the home folder.
        is_sqlite = platform.tracking_uri.startswith("sqlite")
        location = artifact_root(platform).as_uri() if is_sqlite else None
        try:
            if platform.kind == "databricks":
                _create_workspace_folder(PurePosixPath(experiment_name).parent)
            tags = describe_experiment(name)
            return str(client.create_experiment(experiment_name, artifact_location=location, tags=tags))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            # another process has just created the experiment
            experiment = client.get_experiment_by_name(experiment_name)
            assert experiment is not None
    if experiment.lifecycle_stage != "active":
        raise UserError(
            "the MLflow experiment was deleted",
            where=f"{experiment_name} on {hide_secrets(platform.tracking_uri)}",
            fix=f"restore the experiment: mlflow experiments restore --experiment-id {experiment.experiment_id}",
        )
    # An experiment that an earlier version of Lakesight created has no tag KIND.
    if KIND not in experiment.tags:
        for key, value in describe_experiment(name).items():
            if key not in experiment.tags:
                client.set_experiment_tag(experiment.experiment_id, key, value)
    return str(experiment.experiment_id)


def _create_workspace_folder(folder: PurePosixPath) -> None:
    """Create a workspace folder and its parents, because a workspace refuses an experiment in a missing folder."""
    from databricks.sdk import WorkspaceClient

    WorkspaceClient().workspace.mkdirs(str(folder))


def unusable(platform: Platform, error: Exception) -> UserError:
    """Return the error for a failed request to the tracking server. The error is a TrackingDown if a later request may
    succeed."""
    what, where, got = (
        "the MLflow tracking server cannot be used",
        hide_secrets(platform.tracking_uri),
        first_line(error),
    )
    workspace = platform.kind == "databricks"
    if is_outage(error):
        fix = "start the server, or unset MLFLOW_TRACKING_URI to track in the Lakesight home folder"
        if workspace:
            fix = "run the command again; if it fails again, check that the cluster can reach the workspace"
        return TrackingDown(what, where=where, got=got, fix=fix)
    fix = "correct MLFLOW_TRACKING_URI, or unset MLFLOW_TRACKING_URI to track in the Lakesight home folder"
    if problem := disk_problem(error):
        got, fix = problem, DISK_FIX
    if http_status(error) in (401, 403):
        fix = "check MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
    if workspace:
        fix = "correct the problem that the workspace reports, or grant the user of this command the missing permission"
    return UserError(what, where=where, got=got, fix=fix)


def registry_failure(platform: Platform, model: str, error: Exception) -> StageFailed:
    """Return the error for a failed request to the model registry, or for files of a model that cannot be copied."""
    where = f"{model} in {hide_secrets(platform.registry_uri)}"
    if problem := disk_problem(error):
        return StageFailed("the files of a model cannot be copied", where=where, got=problem, fix=DISK_FIX)
    return StageFailed(
        f"the model registry {'did not answer' if is_outage(error) else 'rejected'} a request",
        where=where,
        got=first_line(error),
        fix="run the command again when the registry answers, or check its address, the model name and permissions",
    )


def refuse_foreign_hosts() -> None:
    """Make MLflow refuse artifacts on each HTTP server that is neither the tracking server nor the model registry.

    A registry says where each artifact is stored, for example in the field `source` of a model version. MLflow adds the
    credentials of the tracking server (`MLFLOW_TRACKING_TOKEN`, or user and password) to every HTTP request for
    artifacts, whatever the host. For each upload and download, MLflow creates an artifact repository with a function
    from an internal table. `refuse_foreign_hosts` puts its own functions into this table. These functions check the
    host first, so MLflow cannot skip the check. Locations without a host (`mlflow-artifacts:/x`) and in object stores
    (`s3://...`) stay allowed.
    """
    for scheme in HTTP_PORTS:
        repositories._artifact_repository_registry.register(scheme, _http_repository)  # type: ignore[no-untyped-call]
    repositories._artifact_repository_registry.register("mlflow-artifacts", _proxied_repository)  # type: ignore[no-untyped-call]


def _http_repository(
    artifact_uri: str, tracking_uri: str | None = None, registry_uri: str | None = None
) -> ArtifactRepository:
    _check(artifact_uri, artifact_uri, tracking_uri, registry_uri)
    return HttpArtifactRepository(artifact_uri, tracking_uri, registry_uri)  # type: ignore[no-untyped-call]


def _proxied_repository(
    artifact_uri: str, tracking_uri: str | None = None, registry_uri: str | None = None
) -> ArtifactRepository:
    tracking_uri = tracking_uri or mlflow.get_tracking_uri()
    if urlsplit(artifact_uri).netloc:
        # MLflow replaces `mlflow-artifacts:` by the protocol of the tracking server.
        address = artifact_uri.replace("mlflow-artifacts", urlsplit(tracking_uri).scheme, 1)
        _check(address, artifact_uri, tracking_uri, registry_uri)
    return MlflowArtifactsRepository(artifact_uri, tracking_uri, registry_uri)


def _check(address: str, artifact_uri: str, *servers: str | None) -> None:
    """Compare the server of an artifact with the tracking server and the model registry.

    Raises:
        UserError: the artifact is on another server.
    """
    own = {_server(uri) for uri in (*servers, mlflow.get_tracking_uri(), mlflow.get_registry_uri()) if uri}
    if (named := _server(address)) is None or named not in own:
        raise UserError(
            "the artifacts are on a server that is neither the tracking server nor the model registry",
            where=artifact_uri,
            got="no request was sent, because MLflow would send the credentials of the tracking server there",
            fix="correct the artifact location of the experiment or the source of the model version, or ask whoever "
            "may write to the registry",
        )


def _server(uri: str) -> tuple[str, str, int] | None:
    """Return protocol, host and port of an HTTP address, or None if the address is invalid or of another protocol."""
    try:
        parts = urlsplit(uri)
        port = parts.port or HTTP_PORTS.get(parts.scheme, 0)
    except ValueError:
        return None
    return (parts.scheme, parts.hostname, port) if parts.scheme in HTTP_PORTS and parts.hostname else None

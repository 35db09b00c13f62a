"""`lakesight ui`: MLflow's own web page on what was tracked on this laptop."""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
from contextlib import suppress
from typing import Annotated

import typer

from jobs.common import PlatformOption, RunOption, SetOption, open_job
from pipelines.errors import StageFailed, UserError
from pipelines.platform import redact_uri

HOST = "127.0.0.1"

log = logging.getLogger(__name__)


def ui(
    *,
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Port to listen on.")] = 5000,
    run: RunOption = "demo",
    platform: PlatformOption = "local",
    overrides: SetOption = None,
) -> None:
    """Serve the MLflow UI until Ctrl-C.

    It shows what was tracked in this home folder, to this machine alone.

    \b
    Example:
      lakesight ui --port 5001
    """
    with open_job(run, platform, overrides, as_json=False) as job:
        uri = job.platform.tracking_uri
        if not uri.startswith("sqlite:"):
            raise UserError(
                "there is nothing to serve: runs are tracked by a server already",
                where="MLFLOW_TRACKING_URI" if platform == "local" else f"platform {platform}",
                got=redact_uri(uri),
                fix="open that server's own page",
            )
        check_port_free(port)
        job.screen.line("ui", f"http://{HOST}:{port}  (Ctrl-C ends it)")
        command = [
            sys.executable,
            "-m",
            "mlflow",
            "ui",
            "--backend-store-uri",
            uri,
            "--host",
            HOST,
            "--port",
            str(port),
        ]
        with suppress(KeyboardInterrupt):  # the ordinary way to end a server
            code = subprocess.call(command)  # noqa: S603 our own arguments
            raise StageFailed("the MLflow UI ended by itself", got=f"exit code {code}", fix="see its messages above")


def check_port_free(port: int) -> None:
    """Refuse a port that something listens on, before anything starts.

    Raises:
        UserError: the port is taken, or not ours to take.
    """
    with socket.socket() as probe:
        # As the server itself does: a port that a just ended server leaves behind in TIME_WAIT counts as free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise UserError(
                "the port cannot be used",
                where=f"{HOST}:{port}",
                got=str(error.strerror or error),
                fix=f"end what listens there, or choose another: lakesight ui --port {port % 65535 + 1}",
            ) from None

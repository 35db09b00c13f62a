"""`lakesight ui`: serve the MLflow UI, which shows the runs and models of the home folder."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from jobs.common import PlatformOption, RunOption, SetOption, open_job
from pipelines.child_process import end_group
from pipelines.errors import StageFailed, UserError
from pipelines.platform import redact_uri

HOST = "127.0.0.1"


def ui(
    *,
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Port to listen on.", metavar="PORT")] = 5000,
    run: RunOption = "demo",
    platform: PlatformOption = "local",
    overrides: SetOption = None,
) -> None:
    """Serve the MLflow UI until Ctrl-C.

    The MLflow UI shows the runs and models of the home folder. The server accepts connections from this machine only.

    \b
    Example:
      lakesight ui --port 5001
    """
    from pipelines.tracking.moved_home import follow_moved_home

    with open_job(run, platform, overrides, as_json=False) as job:
        uri = job.platform.tracking_uri
        if not uri.startswith("sqlite"):
            raise UserError(
                "there is nothing to serve: a tracking server is in use",
                where="MLFLOW_TRACKING_URI" if platform == "local" else f"platform {platform}",
                got=redact_uri(uri),
                fix="open the page of that server",
            )
        follow_moved_home(job.platform)
        check_port_free(port)
        job.output.line("ui", f"http://{HOST}:{port}  (Ctrl-C stops it)")
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
            # With several workers, uvicorn kills a worker that needs more than five seconds to start, again and again.
            "--workers",
            "1",
        ]
        with suppress(KeyboardInterrupt):  # Ctrl-C is the usual way to stop a server
            # Without PYTHONSAFEPATH, the server would put its working folder, the home folder, first on sys.path, and
            # a file in the home folder could shadow a module.
            environment = os.environ | {"PYTHONSAFEPATH": "1"}
            code = _serve(command, environment, job.platform.root)
            raise StageFailed("the MLflow UI stopped", got=f"exit code {code}", fix="read the MLflow messages above")


def _serve(command: list[str], environment: dict[str, str], folder: Path) -> int:
    """Run a server until it ends. If this process is interrupted, end the server and all processes of the server."""
    server = subprocess.Popen(command, env=environment, cwd=folder, start_new_session=True)  # noqa: S603 our own
    try:
        return server.wait()
    finally:
        end_group(server)


def check_port_free(port: int) -> None:
    """Check that a port is free, before a server is started on the port.

    Raises:
        UserError: the port is in use, or this user may not listen on it.
    """
    with socket.socket() as probe:
        # A port in state TIME_WAIT (whose server has just stopped) counts as free, because the new server can use the
        # port.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise UserError(
                "the port cannot be used",
                where=f"{HOST}:{port}",
                got=str(error.strerror or error),
                fix=f"stop the process that uses it, or choose another port: --port {port % 65535 + 1}",
            ) from None

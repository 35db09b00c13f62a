"""`lakesight ui`: serve the MLflow UI, which shows the runs and models of the home folder."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from functools import partial
from typing import Annotated

import typer

from jobs.common import PlatformOption, RunOption, SetOption, open_job
from jobs.local_server import HOST, check_port_free, run_server
from pipelines.child_process import child_environment
from pipelines.errors import StageFailed, UserError
from vlm.errors.printable import hide_secrets

ALLOWED_HOSTS = ",".join(f"{host}{port}" for host in (HOST, "localhost") for port in ("", ":*"))
"""Values of the `Host` header that the MLflow UI accepts by default."""


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
    from pipelines.tracking.describe.notes import VIEW
    from pipelines.tracking.home_store.moved_home import follow_moved_home

    with open_job(run, platform, overrides, as_json=False, needs_space=False) as job:
        uri = job.platform.tracking_uri
        if not uri.startswith("sqlite"):
            raise UserError(
                "`lakesight ui` has nothing to serve, because runs are logged to a tracking server",
                where="MLFLOW_TRACKING_URI" if platform == "local" else f"platform {platform}",
                got=hide_secrets(uri),
                fix="open the tracking server's own page in a browser",
            )
        follow_moved_home(job.platform)
        check_port_free(port)
        # If the URL parameter VIEW is missing, a user who is new to MLflow sees MLflow's pages for agents.
        address = f"http://{HOST}:{port}/#/experiments?{VIEW}  (Ctrl-C stops it)"
        job.output.line("ui", "starting MLflow")
        command = [
            sys.executable,
            "-m",
            "mlflow",
            "ui",
            "--host",
            HOST,
            "--port",
            str(port),
            # With several workers, uvicorn kills and restarts each worker that needs more than five seconds to start.
            "--workers",
            "1",
        ]
        with suppress(KeyboardInterrupt):  # no error: people stop a server by Ctrl-C
            environment = ui_environment(uri)
            code = run_server(
                command, environment, job.platform.root, port, ready=partial(job.output.line, "ui", address)
            )
            raise StageFailed("the MLflow UI stopped", got=f"exit code {code}", fix="read the MLflow messages above")


def ui_environment(uri: str) -> dict[str, str]:
    """Return the environment of the MLflow UI: the variables of child processes, `MLFLOW_SERVER_*` and the database.

    By default, MLflow also accepts `Host` headers that begin like a private address, such as `10.evil.example`. The
    owner of such a name could let the name resolve to this machine, and a web page of this owner could then use the UI.
    Therefore only loopback names are accepted, unless the user has set MLFLOW_SERVER_ALLOWED_HOSTS.

    The URI is passed as an environment variable, not as an argument, because every user of this machine can read the
    arguments of a process. Without PYTHONSAFEPATH, the server would put its working folder, the home folder, first on
    sys.path, and a file in the home folder could replace a module.
    """
    settings = {"MLFLOW_SERVER_ALLOWED_HOSTS": ALLOWED_HOSTS}
    settings |= {name: value for name, value in os.environ.items() if name.startswith("MLFLOW_SERVER_")}
    return child_environment(**settings, MLFLOW_BACKEND_STORE_URI=uri, PYTHONSAFEPATH="1")

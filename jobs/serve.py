"""`lakesight serve`: serve a model version over REST, after a check that its files equal the registered files."""

from __future__ import annotations

import sys
import tempfile
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from jobs.common import Job, PlatformOption, RunOption, SetOption, open_job
from jobs.evaluate import VersionOption
from jobs.generation_options import with_generation_options
from jobs.local_server import HOST, check_port_free, run_server
from jobs.settings_of_version import changes_model, decoding_settings
from pipelines.child_process import child_environment
from pipelines.errors import StageFailed


@with_generation_options
def serve(
    *,
    version: VersionOption = "champion",
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Port to listen on.", metavar="PORT")] = 5001,
    run: RunOption = "demo",
    platform: PlatformOption = "local",
    overrides: SetOption = None,
) -> None:
    """Serve a model version over REST until Ctrl-C.

    The command checks that the version's files equal the registered files. Then a process without credentials serves a
    local copy of the version, like `mlflow models serve`. The server accepts connections from this machine only, and
    refuses requests that pages of other websites send.

    A request may set generation settings in its params. If a request does not set a setting, the value of the command's
    option is used. Without this option, the version's own value is used.

    \b
    Examples:
      lakesight serve --run demo --version champion --port 5002
      lakesight serve --run demo --num-beams 4
    """
    from pipelines.tracking.children.serve_child import SERVE_SCRIPT
    from pipelines.tracking.download import download_checked
    from pipelines.tracking.registry import resolve

    with (
        open_job(run, platform, overrides, as_json=False, uses_version=True) as job,
        tempfile.TemporaryDirectory() as temporary,
    ):
        check_port_free(port)
        chosen = resolve(job.platform, job.model_name, version)
        folder = download_checked(job.platform, chosen, Path(temporary))
        _apply_settings(job, folder, f"{chosen.name}/{chosen.version}")
        job.output.line("serve", f"starting {chosen.name} version {chosen.version}")
        # With -P, Python does not import modules from the script's folder or the working folder.
        command = [sys.executable, "-P", str(SERVE_SCRIPT), str(folder), str(port)]
        with suppress(KeyboardInterrupt):  # no error: people stop a server by Ctrl-C
            address = f"http://{HOST}:{port}/invocations  (Ctrl-C stops it)"
            ready = partial(job.output.line, "serve", address)
            code = run_server(command, child_environment(), Path(temporary), port, ready)
            raise StageFailed("the model server stopped", got=f"exit code {code}", fix="read MLflow's messages above")


def _apply_settings(job: Job, folder: Path, name: str) -> None:
    """Change the default generation settings of a downloaded version to the settings of the command.

    Raises:
        UserError: an override changes a setting that training has fixed, the settings exclude each other, or the
            version accepts no generation settings.
    """
    if not changes_model(job):
        return
    from pipelines.tracking.logged_model import read_config, set_generation_defaults

    config = read_config(folder)
    settings = decoding_settings(job, config, name)
    if settings != config.generation:
        set_generation_defaults(folder, settings, where=name)

"""`lakesight review`: a page on which people say whether captions are good."""

from __future__ import annotations

import getpass
from typing import Annotated

import typer

from jobs.common import PlatformOption, RunOption, SetOption, open_job
from jobs.show import open_table
from jobs.ui import HOST, check_port_free
from pipelines.errors import UserError


def review(
    *,
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Port to listen on.")] = 5002,
    run: RunOption = "demo",
    platform: PlatformOption = "local",
    overrides: SetOption = None,
) -> None:
    """Judge captions on a page: good, bad, or what they should say.

    Verdicts are rows of the table `verdicts`, with their pictures; `lakesight ingest --run reviewed` learns from them.

    \b
    Example:
      lakesight review --run demo
    """
    with open_job(run, platform, overrides, as_json=False) as job:
        import uvicorn

        from pipelines.review.server import open_app
        from pipelines.review.verdicts import Review

        captions, samples = (open_table(job, name, None) for name in ("generated_captions", "samples"))
        assert job.platform.tables, "open_table refuses platforms without"
        own = job.platform.table("samples")
        found = Review(captions, samples, job.platform.tables / "verdicts", table=own, model=job.model_name)
        if not found.captions:
            raise UserError(
                "there are no captions to judge",
                where=f"generated_captions, of {own} by model {job.model_name}",
                fix=f"run `{job.command('caption')}` first",
            )
        check_port_free(port)
        job.screen.line("review", f"http://{HOST}:{port}  (Ctrl-C ends it)")
        app = open_app(found, f"Captions of {job.model_name}", getpass.getuser())
        uvicorn.run(app, host=HOST, port=port, log_level="warning")
        job.screen.line("judged", f"{len(found.judged):,} of {len(found.captions):,} captions")
        job.screen.line("next", "lakesight show verdicts, or lakesight ingest --run reviewed")

"""`lakesight review`: serve a web page on which people judge captions."""

from __future__ import annotations

from typing import Annotated

import typer

from jobs.common import PlatformOption, RunOption, SetOption, open_job
from jobs.local_server import HOST, check_port_free
from jobs.table_files import open_table
from pipelines.errors import UserError
from pipelines.platform import user_name


def review(
    *,
    table: Annotated[
        str,
        typer.Option(
            "--table", help="Captioned table: the name of the table, or the path of its folder.", metavar="TABLE"
        ),
    ] = "samples",
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Port to listen on.", metavar="PORT")] = 5002,
    run: RunOption = "demo",
    platform: PlatformOption = "local",
    overrides: SetOption = None,
) -> None:
    """Judge captions on a local web page.

    On the page, mark captions as good or bad, or correct the captions. Verdicts and their pictures are stored in table
    verdicts. To add the verdicts to the training data, run lakesight ingest --run reviewed.

    \b
    Examples:
      lakesight review --run demo
      lakesight review --run demo --table shop/products
    """
    with open_job(run, platform, overrides, as_json=False) as job:
        import uvicorn

        from pipelines.review.server import open_app
        from pipelines.review.source_pictures import open_source
        from pipelines.review.verdicts import Review

        captions = open_table(job, "generated_captions", None)
        assert job.platform.tables, "open_table raises an error if the platform has no tables folder"
        name = job.platform.resolve_table(table)
        pictures = open_source(job.platform, name)
        reviewed = Review(captions, pictures, job.platform.tables / "verdicts", table=name, model=job.model_name)
        if not reviewed.captions:
            raise UserError(
                "there are no captions to judge",
                where=f"generated_captions, source table {name}, model {job.model_name}",
                fix=f"run `{job.command('caption')}{'' if table == 'samples' else f' --table {table}'}` first",
            )
        check_port_free(port)
        job.output.line("review", f"http://{HOST}:{port}  (Ctrl-C stops it)")
        app = open_app(reviewed, f"Captions of {job.model_name}", user_name())
        uvicorn.run(app, host=HOST, port=port, log_level="warning")
        job.output.line("judged", f"{len(reviewed.judged):,} of {len(reviewed.captions):,} captions")
        job.output.next("lakesight show verdicts", "lakesight ingest --run reviewed")

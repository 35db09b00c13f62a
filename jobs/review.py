"""`lakesight review`: serve a web page on which people judge captions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from jobs.common import Job, PlatformOption, RunOption, SetOption, open_job
from jobs.local_server import HOST, check_port_free
from jobs.next_commands import after_review, caption_table
from jobs.table_files import open_table, registered_champion
from pipelines.errors import UserError
from pipelines.platform import app_port, user_name

if TYPE_CHECKING:
    from pipelines.review.verdicts import CaptionStore, Review

ALL_DEVICES = "0.0.0.0"  # noqa: S104 in the container of a Databricks App, only the proxy of the workspace can connect
ShownVersionOption = Annotated[
    str,
    typer.Option("--version", help="Version that wrote the captions: a number, champion, or all.", metavar="VERSION"),
]
WarehouseOption = Annotated[
    str | None,
    typer.Option(
        "--warehouse",
        help="Id of the SQL warehouse that reads and writes the tables of a workspace.",
        metavar="ID",
    ),
]


def review(
    *,
    table: Annotated[
        str,
        typer.Option(
            "--table", help="Captioned table: the name of the table, or the path of its folder.", metavar="TABLE"
        ),
    ] = "samples",
    version: ShownVersionOption = "champion",
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Port to listen on.", metavar="PORT")] = 5002,
    warehouse: WarehouseOption = None,
    run: RunOption = "demo",
    platform: PlatformOption = "local",
    overrides: SetOption = None,
) -> None:
    """Judge captions on a local web page.

    On the page, mark captions as good or bad, or correct the captions. Verdicts and their pictures are stored in table
    verdicts. To add good and corrected captions to the training data, run lakesight ingest --run reviewed.

    The page shows the captions of the champion, or of all versions if no version was promoted.

    With --platform databricks and --warehouse, the page shows the captions of a workspace. As a Databricks App, the
    command serves the page to users of the workspace.

    \b
    Examples:
      lakesight review --run demo
      lakesight review --run demo --table shop/products
    """
    _check_version(version)
    with open_job(run, platform, overrides, as_json=False) as job:
        from pipelines.review.verdicts import Review

        name = job.platform.resolve_table(table)
        opened = _open_workspace if job.platform.kind == "databricks" else _open_home
        store, user = opened(job, name, version, warehouse)
        reviewed = Review(store, table=name, model=job.model_name)
        in_app = app_port() if job.platform.kind == "databricks" else None
        if in_app is None and not reviewed.captions:
            others, _ = opened(job, name, "all", warehouse)
            numbers = sorted({row["model_version"] for row in others.read_captions()}, key=int)
            raise UserError(
                "there are no captions to judge",
                where=f"generated_captions, source table {name}, model {job.model_name}, --version {version}",
                got=f"captions of version {', '.join(numbers)}" if numbers else "",
                fix=f"run `{caption_table(job, table)}` first"
                + (f", or add --version {numbers[-1]} or --version all" if numbers else ""),
            )
        title = f"Captions of {job.model_name}"
        if in_app is None:
            _serve(job, reviewed, title, user, port)
        else:
            _serve_app(reviewed, title, in_app)
        job.output.line("judged", f"{len(reviewed.judged):,} of {len(reviewed.captions):,} captions")
        job.output.next(*after_review(job, reviewed.judged.values()))


def _check_version(version: str) -> None:
    if version not in ("champion", "all") and not version.isdecimal():
        raise UserError(
            "the page cannot show the captions of this version",
            where="--version",
            got=version,
            fix="give the number of a version, champion, or all",
        )


def _open_home(job: Job, table: str, version: str, warehouse: str | None) -> tuple[CaptionStore, str]:
    """Open the captions of a table in the home folder. Return the store, and the name of this user.

    Raises:
        UserError: a table does not exist or cannot be read as files, or a warehouse was given.
    """
    from pipelines.review.delta_store import DeltaStore
    from pipelines.review.source_pictures import open_source

    if warehouse is not None:
        raise UserError(
            "a SQL warehouse reads only the tables of a workspace",
            where="--warehouse",
            got=f"--platform {job.platform.kind}",
            fix="omit --warehouse, or add --platform databricks",
        )
    captions = open_table(job, "generated_captions", None)
    assert job.platform.tables, "open_table raises an error if the platform has no tables folder"
    pictures = open_source(job.platform, table)
    store = DeltaStore(
        captions,
        pictures,
        job.platform.tables / "verdicts",
        table=table,
        model=job.model_name,
        version=version,
        has_texts=table == job.platform.table("samples"),
        find_champion=lambda: registered_champion(job, job.model_name),
    )
    return store, user_name()


def _open_workspace(job: Job, table: str, version: str, warehouse: str | None) -> tuple[CaptionStore, str]:
    """Open the captions of a table of a workspace. Return the store, and the user whose login the command uses.

    Raises:
        UserError: no warehouse was given, or the login to the workspace fails.
    """
    from databricks.sdk import WorkspaceClient
    from databricks.sdk.errors.base import DatabricksError

    from pipelines.review.warehouse_store import Warehouse, WarehouseStore

    if warehouse is None:
        raise UserError(
            "a SQL warehouse is needed to read the tables of a workspace",
            where="--warehouse",
            got="no id",
            fix="add --warehouse with an id that `databricks warehouses list` prints",
        )
    try:
        client = WorkspaceClient()
        user = client.current_user.me().user_name or "unknown"
    except (DatabricksError, OSError, ValueError) as error:
        raise UserError(
            "the login to the Databricks workspace fails",
            where="DATABRICKS_HOST, or the profile of the Databricks CLI",
            got=" ".join(str(error).split())[:300],
            fix="run `databricks auth login --host https://...`",
        ) from None
    opened = Warehouse(client, warehouse)
    return WarehouseStore(opened, job.platform, table=table, model=job.model_name, version=version), user


def _serve(job: Job, reviewed: Review, title: str, user: str, port: int) -> None:
    """Serve the page on this machine until Ctrl-C. All verdicts have the same reviewer.

    Raises:
        UserError: the port cannot be used.
    """
    import uvicorn

    from pipelines.review.server import open_app

    check_port_free(port)
    job.output.line("review", f"http://{HOST}:{port}  (Ctrl-C stops it)")
    uvicorn.run(open_app(reviewed, title, lambda _: user), host=HOST, port=port, log_level="warning")


def _serve_app(reviewed: Review, title: str, port: int) -> None:
    """Serve the page as a Databricks App, until Databricks stops the app. The reviewer is the user of each request."""
    import uvicorn

    from pipelines.review.server import ALL_HOSTS, forwarded_user, open_app

    app = open_app(reviewed, title, forwarded_user, ALL_HOSTS)
    uvicorn.run(app, host=ALL_DEVICES, port=port, log_level="warning")

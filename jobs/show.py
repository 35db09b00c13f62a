"""`lakesight show`: print rows of a table version and, on request, write an HTML page of pictures, without Spark."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.common import Job, JsonOption, PlatformOption, RunOption, SetOption, open_job
from pipelines.errors import UserError
from vlm.config import Config

if TYPE_CHECKING:
    from deltalake import DeltaTable

WIDTH = 100
"""Number of characters after which a value is cut off in the output."""


class TableReport(Config):
    """Report of `lakesight show`. Field `rows` contains the first rows; binary values are replaced by their sizes."""

    table: str
    version: int
    num_rows: int
    columns: dict[str, str]
    rows: tuple[dict[str, Any], ...]
    gallery: str | None


def show(
    table: Annotated[
        str,
        typer.Argument(help="Table, such as samples, quarantine, generated_captions or evaluations.", metavar="TABLE"),
    ],
    *,
    rows: Annotated[int, typer.Option("--rows", min=0, help="Number of rows to show.", metavar="N")] = 5,
    version: Annotated[
        int | None, typer.Option("--version", min=0, help="Version of the table. Default: the latest.", metavar="N")
    ] = None,
    gallery: Annotated[bool, typer.Option("--gallery", help="Write an HTML page with the rows' pictures.")] = False,
    run: RunOption = "demo",
    platform: PlatformOption = "local",
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show rows and pictures of a table.

    The command prints the table's version, row count, columns and first rows. With --gallery, the command also writes
    an HTML page of the rows' pictures.

    \b
    Examples:
      lakesight show samples
      lakesight show generated_captions --rows 40 --gallery
    """
    with open_job(run, platform, overrides, as_json) as job:
        delta = open_table(job, table, version)
        num_rows = count_rows(delta, table)
        found = first_rows(delta, rows)
        page = write_gallery(job, table, delta.version(), found) if gallery else None
        report = TableReport(
            table=table,
            version=delta.version(),
            num_rows=num_rows,
            columns={field.name: _type_name(field.type) for field in delta.schema().fields},
            rows=tuple(readable(row) for row in found),
            gallery=str(page) if page else None,
        )
        _print(job, report)
        job.output.report(report)


def open_table(job: Job, name: str, version: int | None) -> DeltaTable:
    """Open a version of a table of the platform. If the version is None, open the latest version.

    Raises:
        UserError: the platform's tables cannot be read as files, or the table or the version does not exist.
    """
    from deltalake import DeltaTable
    from deltalake.exceptions import DeltaError

    if job.platform.tables is None:
        raise UserError(
            "show cannot read the tables of a catalog; it reads local Delta files only",
            where=f"platform {job.platform.kind}",
            fix=f"open {job.platform.table(name)} in Catalog Explorer or in a notebook",
        )
    names = sorted(path.parent.name for path in job.platform.tables.glob("*/_delta_log"))
    if name not in names:
        raise UserError(
            f"there is no table {name!r}",
            where=str(job.platform.tables),
            got=f"tables: {', '.join(names)}" if names else "no tables at all",
            fix="name one of these tables" if names else "run `lakesight demo` or `lakesight ingest` first",
        )
    latest = DeltaTable(job.platform.tables / name)
    if version is None or version == latest.version():
        return latest
    try:
        return DeltaTable(job.platform.tables / name, version=version)
    except DeltaError as error:
        raise UserError(
            f"table {name!r} has no version {version}",
            where=str(job.platform.tables / name),
            got=str(error).splitlines()[0],
            fix=f"the latest version is {latest.version()}",
        ) from None


def count_rows(delta: DeltaTable, name: str) -> int:
    """Count the rows of a table version.

    Raises:
        UserError: VACUUM has removed files of the version.
    """
    from pipelines.formats.tables import arrow_dataset

    try:
        return int(arrow_dataset(delta).count_rows())
    except FileNotFoundError as error:
        raise UserError(
            f"version {delta.version()} of table {name!r} can no longer be read",
            where=delta.table_uri,
            got=f"VACUUM has removed its files ({str(error).splitlines()[0][:200]})",
            fix="omit --version to show the newest version",
        ) from None


def first_rows(delta: DeltaTable, count: int) -> list[dict[str, Any]]:
    """Return the first rows of a table as dicts of Python values."""
    from pipelines.formats.tables import arrow_dataset

    rows: list[dict[str, Any]] = arrow_dataset(delta).head(count).to_pylist()
    return rows


def readable(row: Mapping[str, Any]) -> dict[str, Any]:
    """Replace each binary value of a row by a text that states the size of the value."""
    return {name: f"<{len(value):,} bytes>" if isinstance(value, bytes) else value for name, value in row.items()}


def _print(job: Job, report: TableReport) -> None:
    job.output.line("table", f"{report.table}, version {report.version}, {report.num_rows:,} rows")
    job.output.line("columns", ", ".join(f"{name} {kind}" for name, kind in report.columns.items()))
    width = max(map(len, report.columns), default=0)
    for number, row in enumerate(report.rows, 1):
        job.output.text(f"\nrow {number}")
        for name, value in row.items():
            text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False).strip('"')
            job.output.text(f"  {name:<{width}}  {text if len(text) <= WIDTH else text[: WIDTH - 3] + '...'}")
    if report.gallery:
        job.output.text("")
        job.output.line("gallery", report.gallery)


def _type_name(kind: Any) -> str:
    """Return Delta's name of a column type, for example `string`, `struct` or `array`."""
    described = json.loads(kind.to_json())
    return described if isinstance(described, str) else str(described["type"])


# ------------------------------------------------------------------------------------------------ the gallery


def write_gallery(job: Job, table: str, version: int, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write an HTML page with the rows' pictures and texts, and return the path of the page.

    A table without a picture column, such as generated_captions, shows the pictures of `samples`.

    Raises:
        UserError: there are no rows, or the table has no column image_id.
    """
    from pipelines.executor.thumbnail import make_thumbnails
    from pipelines.pages.page import Card, CardText, Gallery, Page, write_page

    if not rows or "image_id" not in rows[0]:
        raise UserError(
            f"there are no pictures to show in {table!r}",
            got="no rows" if not rows else f"columns {', '.join(rows[0])}",
            fix="--gallery needs rows with an image_id, as in samples and generated_captions",
        )
    pictures = {row["image_id"]: row["image"] for row in rows if "image" in row} or _read_pictures(job, rows)
    thumbnails = make_thumbnails([pictures.get(row["image_id"]) for row in rows])
    cards = [
        Card(row["image_id"], thumbnail, [CardText(text) for text in _texts(row)])
        for row, thumbnail in zip(rows, thumbnails, strict=True)
    ]
    path = job.platform.folder("reports") / f"{table}-v{version}.html"
    write_page(path, Page(f"{table}, version {version}", f"{len(rows):,} rows", galleries=[Gallery("", cards)]))
    return path


def _read_pictures(job: Job, rows: Sequence[Mapping[str, Any]]) -> dict[str, bytes]:
    """Read the pictures of the rows from table `samples`, by image_id."""
    import pyarrow.compute as pc

    from pipelines.formats.tables import arrow_dataset

    wanted = pc.field("image_id").isin([row["image_id"] for row in rows])
    samples = arrow_dataset(open_table(job, "samples", None))
    return {row["image_id"]: row["image"] for row in samples.to_table(["image_id", "image"], filter=wanted).to_pylist()}


def _texts(row: Mapping[str, Any]) -> list[str]:
    """Return the human texts of a row or, if the row has no column `texts`, the caption or error of the row."""
    if "texts" in row:
        return [f"{pair['prompt']} {pair['text']}".strip() for pair in row["texts"]]
    return [str(row[name]) for name in ("caption", "error") if row.get(name)]

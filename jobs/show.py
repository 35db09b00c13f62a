"""`lakesight show`: without Spark, print rows of a table version, and write a page of pictures or a file of rows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.common import (
    ImageRootOption,
    Job,
    JsonOption,
    PlatformOption,
    RunOption,
    SetOption,
    WhereOption,
    open_job,
    refuse_options,
)
from jobs.output import TEXT_WIDTH
from jobs.table_files import Relation, champion_captions, existing_files, open_table, table_relation
from pipelines.config import short_hash
from pipelines.errors import UserError
from pipelines.formats.champion_captions import NAME as VIEW
from vlm.config import Config

if TYPE_CHECKING:
    import pyarrow as pa

    from pipelines.review.source_pictures import PictureColumns

WIDTH = 100
"""Largest number of characters of a printed value that contains spaces. A longer value is cut and ends with three
dots."""


class TableReport(Config):
    """Report of `lakesight show`.

    Attributes:
        table: name of the table, as the user gave it.
        version: version of the table; for the view champion_captions, the version of table generated_captions.
        num_rows: number of all rows of the table version.
        columns: dict from the name of each chosen column to its Delta type, such as `string`.
        rows: first rows of the selection; binary values are replaced by their sizes.
        gallery: path of the HTML page, or None without --gallery.
        output: path of the file with all selected rows, or None without --output.
    """

    table: str
    version: int
    num_rows: int
    columns: dict[str, str]
    rows: tuple[dict[str, Any], ...]
    gallery: str | None
    output: str | None = None


ColumnsOption = Annotated[
    str, typer.Option("--columns", help="Columns to show, separated by commas. Default: all.", metavar="NAMES")
]
OrderOption = Annotated[
    str,
    typer.Option(
        "--order", help="Sort by these columns, as in SQL ORDER BY. Default: the order of the files.", metavar="SQL"
    ),
]
OutputOption = Annotated[
    Path | None, typer.Option("--output", help="Write all selected rows to a .parquet or .csv file.", metavar="FILE")
]
IdOption = Annotated[
    str | None,
    typer.Option(
        "--id-column", help="Column with the row ids that --gallery shows. Default: image_id.", metavar="COLUMN"
    ),
]
ImageOption = Annotated[
    str | None,
    typer.Option(
        "--image-column", help="Column with the pictures that --gallery shows. Default: image.", metavar="COLUMN"
    ),
]


def show(
    table: Annotated[
        str,
        typer.Argument(
            help="Table such as samples or generated_captions, view champion_captions, or path of a table's folder.",
            metavar="TABLE",
        ),
    ],
    *,
    rows: Annotated[int, typer.Option("--rows", min=0, help="Number of rows to show.", metavar="N")] = 5,
    version: Annotated[
        int | None, typer.Option("--version", min=0, help="Version of the table. Default: the latest.", metavar="N")
    ] = None,
    columns: ColumnsOption = "",
    where: WhereOption = "",
    order: OrderOption = "",
    output: OutputOption = None,
    gallery: Annotated[bool, typer.Option("--gallery", help="Write an HTML page with the rows' pictures.")] = False,
    id_column: IdOption = None,
    image_column: ImageOption = None,
    image_root: ImageRootOption = None,
    run: RunOption = "demo",
    platform: PlatformOption = "local",
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show rows and pictures of a table.

    The command prints the table's version, row count, columns and first rows. With --gallery, the command also writes
    an HTML page of the rows' pictures. The pictures of captions are read from the table that was captioned. The view
    champion_captions has, for each picture and prompt, the champion's newest caption that was not judged as bad.

    \b
    Examples:
      lakesight show samples
      lakesight show generated_captions --rows 40 --gallery
      lakesight show generated_captions --where 'error IS NOT NULL'
      lakesight show champion_captions --output captions.csv
      lakesight show shop/products --gallery --id-column sku --image-column photo
    """
    place = _choose_pictures(id_column, image_column, image_root, gallery=gallery)
    with open_job(run, platform, overrides, as_json, needs_space=gallery) as job:
        report = run_show(
            job,
            table,
            version=version,
            selection=(columns, where, order),
            count=rows,
            place=place,
            output=output,
        )
        _print(job, report)
        job.output.report(report)


def _choose_pictures(
    id_column: str | None, image_column: str | None, image_root: str | None, *, gallery: bool
) -> PictureColumns | None:
    """Return the columns and the folder of the pictures that --gallery shows, or None without --gallery.

    Raises:
        UserError: one of these options was given without --gallery.
    """
    if not gallery:
        given = {"--id-column": id_column, "--image-column": image_column, "--image-root": image_root}
        refuse_options(given, "only --gallery needs the pictures")
        return None
    # Only the page needs the libraries that read pictures.
    from pipelines.executor.ingest.records.pictures.root import absolute_location
    from pipelines.review.source_pictures import PictureColumns

    root = None if image_root is None else absolute_location(image_root)
    return PictureColumns(id_column or "image_id", image_column or "image", root)


def run_show(
    job: Job,
    table: str,
    *,
    version: int | None,
    selection: tuple[str, str, str],
    count: int,
    place: PictureColumns | None,
    output: Path | None,
) -> TableReport:
    """Read the first selected rows of a table. On request, write the page of their pictures, and the file of all
    selected rows.

    Args:
        job: running command.
        table: name of the table or of the view, or path of a folder.
        version: version of the table, or None for the latest.
        selection: columns separated by commas, an SQL condition, and an SQL list of columns to sort by. Each of the
            three texts may be empty.
        count: number of rows in the report and on the page.
        place: columns and folder that say where the pictures of the page are, or None for no page.
        output: file to which all selected rows are written, or None for no file.
    """
    from deltalake import Schema

    from pipelines.formats.delta_files import to_rows

    relation, number = _open(job, table, version)
    names, where, order = selection
    columns = [name.strip() for name in names.split(",")] if names else []
    with existing_files(table, number):
        first = relation.select(columns, where, order, count).read_all()
        page = None
        if place:
            shown = relation.select([], where, order, count).read_all() if columns else first
            page = write_gallery(job, table, number, shown, place, selection=(where, order, str(count)))
        if output:
            write_rows(relation.select(columns, where, order, None), output)
    return TableReport(
        table=table,
        version=number,
        num_rows=relation.count(),
        columns={field.name: _type_name(field.type) for field in Schema.from_arrow(first.schema).fields},
        rows=tuple(readable(row) for row in to_rows(first)),
        gallery=str(page) if page else None,
        output=str(output) if output else None,
    )


def _open(job: Job, name: str, version: int | None) -> tuple[Relation, int]:
    """Open a table or the view. Return the relation to read, and the version of the table."""
    if name != VIEW:
        table = open_table(job, name, version)
        return table_relation(table), table.version()
    if version is not None:
        raise UserError(
            "a view has no versions", where=f"view {name}", got=f"--version {version}", fix="omit --version"
        )
    view = champion_captions(job)
    return view, view.tables["generated_captions"].version()


def write_rows(rows: pa.RecordBatchReader, path: Path) -> None:
    """Write rows to a Parquet or CSV file. An existing file is replaced after all rows have been written.

    Raises:
        UserError: the suffix of the file is neither .parquet nor .csv, or a column cannot be written as CSV.
    """
    import pyarrow as pa
    from pyarrow import csv, parquet

    from vlm.files import atomic_write

    writers = {".parquet": parquet.ParquetWriter, ".csv": csv.CSVWriter}
    if path.suffix not in writers:
        raise UserError(
            "the output format is unknown",
            where="--output",
            got=path.name,
            fix="choose a file name that ends in .parquet or .csv",
        )
    try:
        with atomic_write(path) as temporary, writers[path.suffix](temporary, rows.schema) as writer:
            for batch in rows:
                writer.write_batch(batch)
    except pa.ArrowInvalid as error:
        raise UserError(
            "the rows cannot be written",
            where=str(path),
            got=str(error),
            fix="choose columns with --columns, or write a .parquet file",
        ) from None


def readable(row: Mapping[str, Any]) -> dict[str, Any]:
    """Replace each binary value of a row by a text that states the size of the value."""
    return {name: f"<{len(value):,} bytes>" if isinstance(value, bytes) else value for name, value in row.items()}


def _print(job: Job, report: TableReport) -> None:
    job.output.line("table", f"{report.table}, version {report.version}, {report.num_rows:,} rows")
    job.output.items("columns", [f"{name} {kind}" for name, kind in report.columns.items()])
    width = max(map(len, report.columns), default=0)
    for number, row in enumerate(report.rows, 1):
        job.output.text(f"\nrow {number}")
        for name, value in row.items():
            text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False).strip('"')
            # A text without spaces, such as base64, is cut to one line, because lines are broken only between words.
            limit = WIDTH if " " in text else max(20, TEXT_WIDTH - width - 4)
            job.output.hanging(f"  {name:<{width}}  ", text if len(text) <= limit else f"{text[: limit - 3]}...")
    for label, path in (("gallery", report.gallery), ("output", report.output)):
        if path:
            job.output.text("")
            job.output.line(label, path)


def _type_name(kind: Any) -> str:
    """Return Delta's name of a column type, for example `string`, `struct` or `array`."""
    described = json.loads(kind.to_json())
    return described if isinstance(described, str) else str(described["type"])


# ------------------------------------------------------------------------------------------------ the gallery


def write_gallery(
    job: Job, name: str, version: int, rows: pa.Table, place: PictureColumns, *, selection: tuple[str, ...]
) -> Path:
    """Write an HTML page with the rows' pictures and texts, and return the path of the page.

    The name of the page contains a hash of the table's full name, of `place` and of `selection`. Pages of other rows
    therefore have other names, even if the folders of two tables have the same name.

    Args:
        job: running command.
        name: name of the table, as the user gave it.
        version: version of the table.
        rows: rows with all columns of the table.
        place: columns and folder that say where the pictures are, if the rows have pictures. Captions are shown with
            the pictures of the table that was captioned.
        selection: texts that identify the rows, such as the SQL condition and the order with which they were selected.

    Raises:
        UserError: there are no rows, the table has neither captions nor the columns of `place`, or `place` is not the
            default although the rows are captions.
    """
    from pipelines.executor.thumbnail import make_thumbnails
    from pipelines.pages.page import Card, CardText, Gallery, Page, write_page
    from pipelines.review.source_pictures import read_pictures

    found = rows.to_pylist()
    is_captions = {"source_table", "image_id", "sha256"} <= set(rows.column_names) and "image" not in rows.column_names
    if not found or not (is_captions or {place.id_column, place.image_column} <= set(rows.column_names)):
        raise UserError(
            f"there are no pictures to show in {name!r}",
            got=f"columns {', '.join(rows.column_names)}" if found else "no rows",
            fix="use --gallery on rows of generated_captions, or set --id-column and --image-column",
        )
    if is_captions:
        given = {"--id-column": place.id_column != "image_id", "--image-column": place.image_column != "image"}
        refuse_options(
            given | {"--image-root": place.image_root}, "the pictures of captions are in the table that was captioned"
        )
        by_key = read_pictures(job.platform, found)
        pictures = [by_key.get((row["image_id"], row["sha256"])) for row in found]
    else:
        pictures = [place.picture(row[place.image_column]) for row in found]
    labels = _caption_labels(found) if is_captions else [str(row[place.id_column]) for row in found]
    cards = [
        Card(label, thumbnail, [CardText(text) for text in _texts(row)])
        for label, row, thumbnail in zip(labels, found, make_thumbnails(pictures), strict=True)
    ]
    identity = short_hash(job.platform.resolve_table(name), astuple(place), selection)
    path = job.platform.folder("reports") / f"{Path(name).name}-v{version}_{identity}.html"
    write_page(path, Page(f"{name}, version {version}", f"{len(found):,} rows", galleries=[Gallery("", cards)]))
    return path


def _caption_labels(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a label for each caption: the id of its picture. If the pictures are in several columns, the label also
    names the column and the table."""
    from pipelines.review.source_pictures import PictureColumns

    columns = [(PictureColumns.of_caption(row), row["source_table"]) for row in rows]
    if len(set(columns)) == 1:
        return [row["image_id"] for row in rows]
    return [
        f"{row['image_id']}, column {place.image_column} of {table.replace('`', '').removeprefix('delta.')}"
        for row, (place, table) in zip(rows, columns, strict=True)
    ]


def _texts(row: Mapping[str, Any]) -> list[str]:
    """Return the human texts of a row or, if the row has no column `texts`, the caption or error of the row.

    A text that answers a question begins with the question.
    """
    if "texts" in row:
        return [f"{pair['prompt']} {pair['text']}".strip() for pair in row["texts"]]
    prompt = row.get("prompt") or ""
    return [f"{prompt} {row[name]}".strip() for name in ("caption", "error") if row.get(name)]

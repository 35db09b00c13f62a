"""Random input of every kind of source, drawn with a seed."""

from __future__ import annotations

import csv
import io
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
from deltalake import DeltaTable, write_deltalake
from random_files import Draw, NaiveRow, RandomFile, csv_file, jsonl_file, parquet_file, readable, tar_file


class RandomSource(NamedTuple):
    """Config of a source, the files of its input, and all texts that were drawn."""

    config: dict[str, Any]
    files: list[RandomFile]
    texts: set[str]


def draw_source(kind: str, folder: Path, count: int, seed: int) -> RandomSource:
    """Draw the input of one kind of source into a folder.

    Args:
        kind: kind of the source, such as `csv`.
        folder: folder to create for the input.
        count: how many files to draw; for a picture folder, how many pictures; for a Delta table, how many writes.
        seed: seed of the random choices.
    """
    draw = Draw(seed)
    config = {"kind": kind, "path": str(folder)} | CONFIGS.get(kind, {})
    return RandomSource(config, SOURCES[kind](draw, folder, count), set(draw.texts))


def _files(one: Callable[[Draw, Path, int], RandomFile]) -> Callable[[Draw, Path, int], list[RandomFile]]:
    return lambda draw, folder, count: [one(draw, folder, number) for number in range(count)]


# ------------------------------------------------------------------------------------------------ folders

SPELLINGS: tuple[Callable[[str], str], ...] = (
    str,
    lambda name: name.replace("/", "\\"),
    lambda name: name.replace(" ", "%20"),
    lambda name: f" {name} ",
    lambda name: f"./{name}",
    lambda name: unicodedata.normalize("NFD", name),
    lambda name: unicodedata.normalize("NFC", name),
)
"""Functions that spell the path of a picture differently, as other programs do; every spelling finds the same file."""


def folder_files(draw: Draw, folder: Path, count: int) -> list[RandomFile]:
    """Draw a folder of pictures, and a captions file with rows for most pictures. Some pictures have several rows.

    Some rows have an empty file name, or the name of a missing file, of a folder, or of a file outside of the folder.
    Some pictures have no row, some are links, and a file of another kind lies beside the pictures.
    """
    rng = draw.rng
    rows: list[tuple[str, bool]] = []
    files = [RandomFile(folder / "notes.md", "a file of another kind", None)]
    for number in range(count):
        path = draw.path(folder, number, rng.choice((".png", ".JPG", ".jpeg", ".webp", "")))
        path.write_bytes(draw.picture())
        if number and files[-1].rows is not None and rng.random() < 0.2:
            path.unlink()
            path.symlink_to(files[-1].path)
        name, good = str(path.relative_to(folder)), readable(path.read_bytes())
        named = [(rng.choice(SPELLINGS)(name), good) for _ in range(rng.choice((0, 1, 1, 1, 2)))]
        rows += named
        is_read = bool(named) or path.is_symlink()  # a link leads to a picture that has a row
        files.append(RandomFile(path, f"picture {name!r}", [] if is_read else None))
    (folder / "notes.md").write_text("no picture")
    rows += [(name, False) for name in ("", "missing.png", "../outside.png", "/etc/hostname", "sub", "a\0b.png")]
    rng.shuffle(rows)
    records = [{"file_name": name, "text": draw.text() if rng.random() < 0.95 else ""} for name, _ in rows]
    naive = [
        NaiveRow(record["text"], good and bool(record["text"])) for record, (_, good) in zip(records, rows, strict=True)
    ]
    out = io.StringIO()
    writer = csv.DictWriter(out, ("text", "file_name"), lineterminator=rng.choice(("\n", "\r\n")))
    writer.writeheader()
    writer.writerows(records)
    captions = folder / "captions.csv"
    captions.write_bytes(draw.encode(out.getvalue())[0])
    return [*files, RandomFile(captions, "captions", naive)]


# ------------------------------------------------------------------------------------------------ tables

DELTA_COLUMNS: dict[str, Callable[[int], pa.Array]] = {
    "width": lambda n: pa.array(range(n), pa.int16()),
    "meta": lambda n: pa.array([{"a.b": 1, "c": [None]}] * n),
    "price": lambda n: pa.array([7] * n, pa.decimal128(38, 10)),
    "year": lambda n: pa.array([2**60] * n, pa.timestamp("us", "UTC")),
    "\u00fc": lambda n: pa.array([[("k", 1)]] * n, pa.map_(pa.string(), pa.int8())),
    "flag": lambda n: pa.array([None] * n, pa.bool_()),
}
"""Columns that occur in no config, with unusual types and names that Delta tables allow."""


def table_files(draw: Draw, folder: Path, count: int) -> list[RandomFile]:
    """Draw a Delta table whose history has writes with new columns, deletions of rows, checkpoints and compaction."""
    rng = draw.rng
    binary = rng.random() < 0.5
    for number in range(count):
        rows = draw.rows()
        pictures = [image if binary else draw.base64(image) for image, _ in rows]
        columns = {
            "image": pa.array(pictures, pa.binary() if binary else pa.string()),
            "text": pa.array([said or None for _, said in rows], pa.string()),
            "day": pa.array([number] * len(rows), pa.int32()),
        }
        columns |= {name: DELTA_COLUMNS[name](len(rows)) for name in rng.sample(sorted(DELTA_COLUMNS), 2)}
        write_deltalake(folder, pa.table(columns), mode="append", schema_mode="merge")
        if rng.random() < 0.2:
            DeltaTable(folder).delete(f"day = {rng.randint(0, number)}")
        if rng.random() < 0.1:
            DeltaTable(folder).optimize.compact()
        if rng.random() < 0.1:
            DeltaTable(folder).create_checkpoint()
    left = DeltaTable(folder).to_pyarrow_table(columns=["image", "text"]).to_pylist()
    naive = [NaiveRow(row["text"] or "", readable(row["image"]) and bool(row["text"])) for row in left]
    return [RandomFile(folder, f"table of {count} writes, binary {binary}", naive)]


SOURCES: dict[str, Callable[[Draw, Path, int], list[RandomFile]]] = {
    "csv": _files(csv_file),
    "jsonl": _files(jsonl_file),
    "parquet": _files(parquet_file),
    "webdataset": _files(tar_file),
    "folder": folder_files,
    "table": table_files,
}
COLUMNS = {"columns": {"image": "image", "text": "text"}}
CONFIGS: dict[str, dict[str, Any]] = {
    "csv": COLUMNS,
    "jsonl": COLUMNS,
    "parquet": COLUMNS,
    "table": COLUMNS,
    "folder": {"captions": "captions.csv"},
}

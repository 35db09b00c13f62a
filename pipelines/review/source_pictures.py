"""Pictures of captioned rows, read from the tables that were captioned, without Spark."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError, TableNotFoundError

from pipelines.config import LimitsConfig
from pipelines.errors import UserError
from pipelines.executor.ingest.records.pictures.root import PictureRoot
from pipelines.formats.delta_files import open_delta, query, quoted_name, quoted_text
from pipelines.platform import Platform
from vlm.errors import ImageError
from vlm.image import picture_bytes

logger = logging.getLogger(__name__)

Pictures = dict[tuple[str, str], bytes]
"""Picture files: a dict from (image_id, SHA-256 of the file) to the bytes of the file."""


@dataclass(frozen=True)
class PictureColumns:
    """Columns of a table that contain the pictures and their ids.

    Attributes:
        id_column: name of the column of ids.
        image_column: name of the column of pictures (bytes or base64 text), or of their paths or URLs.
        image_root: folder or URL of the pictures if `image_column` holds paths or URLs, else None.
    """

    id_column: str = "image_id"
    image_column: str = "image"
    image_root: str | None = None

    @classmethod
    def of_caption(cls, row: Mapping[str, Any]) -> PictureColumns:
        """Return the columns that are stored with a caption, or the default columns if Lakesight 0.1.0 wrote the
        caption."""
        return cls(row.get("id_column") or "image_id", row.get("image_column") or "image", row.get("image_root"))

    def picture(self, value: Any) -> bytes | None:
        """Return the picture that a value of `image_column` contains or points to, or None if the picture cannot be
        read."""
        limit = LimitsConfig().max_bytes
        if self.image_root is not None:
            try:
                read = PictureRoot(self.image_root, limit).read(value)
            except OSError:  # this machine lacks the folder, or the server does not answer
                return None
            return read if isinstance(read, bytes) else None
        try:
            return picture_bytes(value, limit)
        except ImageError:
            return None


class SourcePictures:
    """Reader of the captioned pictures of a Delta table, without Spark. Several threads may use the reader.

    Each read uses the newest version of the table.

    Args:
        table: Delta table.
    """

    def __init__(self, table: DeltaTable) -> None:
        self._table = table
        self._lock = threading.Lock()

    def read(self, captions: Iterable[Mapping[str, Any]]) -> Pictures:
        """Read the pictures of captions. Leave out pictures that the table does not contain any more.

        A picture is left out if its bytes have another SHA-256 than the captioned picture, so that no caption is shown
        beside a picture that the model has not seen.

        Args:
            captions: rows with the columns image_id, sha256 and PICTURE_COLUMNS. A row that Lakesight 0.1.0 wrote may
                lack the PICTURE_COLUMNS.

        Raises:
            UserError: the package `deltalake` cannot read the table or its ids.
        """
        wanted: dict[PictureColumns, set[tuple[str, str]]] = {}
        for row in captions:
            wanted.setdefault(PictureColumns.of_caption(row), set()).add((row["image_id"], row["sha256"]))
        found: Pictures = {}
        for columns, keys in wanted.items():
            for image_id, picture in self._read_columns(columns, sorted({image_id for image_id, _ in keys})).items():
                key = image_id, hashlib.sha256(picture).hexdigest()
                if key in keys:
                    found[key] = picture
        return found

    def read_texts(self, ids: Sequence[str]) -> dict[str, Any]:
        """Read the human texts of pictures of table `samples` by id.

        Raises:
            UserError: the package `deltalake` cannot read the table.
        """
        return self._read_column("image_id", "texts", ids)

    def _read_columns(self, columns: PictureColumns, ids: Sequence[str]) -> dict[str, bytes]:
        """Read pictures by id. Leave out ids that the table does not contain, and rows without a readable picture."""
        found = self._read_column(columns.id_column, columns.image_column, ids)
        pictures = {image_id: columns.picture(value) for image_id, value in found.items()}
        return {image_id: picture for image_id, picture in pictures.items() if picture is not None}

    def _read_column(self, id_column: str, column: str, ids: Sequence[str]) -> dict[str, Any]:
        """Read the values of a column by id. Leave out ids that the table does not contain.

        The SQL engine of `deltalake` reads the table, because Arrow refuses tables with deletion vectors and reads only
        nulls from tables with column mapping.

        Raises:
            UserError: the package `deltalake` cannot read the table or its ids.
        """
        identity, value = quoted_name(id_column), quoted_name(column)
        wanted = ", ".join(map(quoted_text, ids)) or "NULL"
        text = f"CAST({identity} AS VARCHAR)"
        sql = f"SELECT {text} AS id, {value} AS value FROM source WHERE {text} IN ({wanted})"  # noqa: S608 quoted
        try:
            with self._lock:
                # Read the newest version, because a server may run for days, and VACUUM removes files of older
                # versions.
                self._table.update_incremental()
                found = query({"source": self._table}, sql).read_all().to_pylist()
        except (DeltaError, OSError, ValueError, pa.ArrowException) as error:
            raise UserError(
                "the pictures of the table cannot be read without Spark",
                where=self._table.table_uri,
                got=str(error).splitlines()[0],
                fix="show the captions without pictures, or read the pictures with Spark",
            ) from None
        return {row["id"]: row["value"] for row in found}


def open_source(platform: Platform, name: str) -> DeltaTable:
    """Open a captioned table, given the value of the column `source_table` of a caption.

    Raises:
        UserError: the table cannot be read as files, because a catalog manages the table or its folder is not readable.
    """
    location = platform.table_location(name)
    if location is None:
        raise UserError(
            "the pictures of the table cannot be read without Spark",
            where=name,
            got="the table belongs to a catalog",
            fix="caption the table under the path of its folder: `lakesight caption --table /path/of/the/table`",
        )
    try:
        return open_delta(location)
    except (TableNotFoundError, DeltaError, OSError) as error:
        raise UserError(
            "the table cannot be read as a Delta table",
            where=location,
            got=str(error).splitlines()[0],
            fix="give the name of an existing table, or the path of the folder that contains its _delta_log",
        ) from None


def read_pictures(platform: Platform, captions: Iterable[Mapping[str, Any]]) -> Pictures:
    """Read the pictures of captions from the captioned tables, as `SourcePictures.read` does.

    If a table cannot be read as files, log a warning and leave out its pictures.
    """
    of_table: dict[str, list[Mapping[str, Any]]] = {}
    for row in captions:
        of_table.setdefault(row["source_table"], []).append(row)
    found: Pictures = {}
    for name, rows in of_table.items():
        try:
            found |= SourcePictures(open_source(platform, name)).read(rows)
        except UserError as error:
            logger.warning("captions are shown without pictures: %s", error)
    return found

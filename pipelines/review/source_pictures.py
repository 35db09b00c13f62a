"""Pictures of captioned rows, read from the tables that were captioned, without Spark."""

from __future__ import annotations

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
        """Return the columns that a caption names, or the default columns for a caption that Lakesight 0.1.0 wrote."""
        return cls(row.get("id_column") or "image_id", row.get("image_column") or "image", row.get("image_root"))

    def picture(self, value: Any) -> bytes | None:
        """Return the picture that a value of `image_column` contains or names, or None if it cannot be read."""
        limit = LimitsConfig().max_bytes
        if self.image_root is not None:
            read = PictureRoot(self.image_root, limit).read(value)
            return read if isinstance(read, bytes) else None
        try:
            return picture_bytes(value, limit)
        except ImageError:
            return None


class SourcePictures:
    """Reader of the pictures of a Delta table by id, without Spark. Several threads may use the reader.

    Each read uses the newest version of the table.

    Args:
        table: Delta table.
        columns: columns of the pictures and their ids.
    """

    def __init__(self, table: DeltaTable, columns: PictureColumns) -> None:
        self._table = table
        self._columns = columns
        self._lock = threading.Lock()

    def read(self, ids: Sequence[str]) -> dict[str, bytes]:
        """Read pictures by id. Leave out ids that the table does not contain, and rows without a readable picture.

        The SQL engine reads the table, because Arrow refuses tables with deletion vectors and reads only nulls from
        tables with column mapping.

        Raises:
            UserError: the package `deltalake` cannot read the table or its ids.
        """
        identity, picture = (quoted_name(name) for name in (self._columns.id_column, self._columns.image_column))
        wanted = ", ".join(map(quoted_text, ids)) or "NULL"
        text = f"CAST({identity} AS VARCHAR)"
        sql = f"SELECT {text} AS id, {picture} AS picture FROM source WHERE {text} IN ({wanted})"  # noqa: S608 quoted
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
        pictures = {row["id"]: self._columns.picture(row["picture"]) for row in found}
        return {image_id: picture for image_id, picture in pictures.items() if picture is not None}


def open_source(platform: Platform, name: str) -> DeltaTable:
    """Open the table that a caption's column `source_table` names.

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
            fix="name an existing table, or the folder that contains its _delta_log",
        ) from None


def read_pictures(platform: Platform, captions: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], bytes]:
    """Read the pictures of captions from the captioned tables. The keys of the result are (`source_table`, `image_id`).

    If a table cannot be read as files, log a warning and leave out its pictures.
    """
    ids: dict[tuple[str, PictureColumns], list[str]] = {}
    for row in captions:
        ids.setdefault((row["source_table"], PictureColumns.of_caption(row)), []).append(row["image_id"])
    found: dict[tuple[str, str], bytes] = {}
    for (name, columns), wanted in ids.items():
        try:
            pictures = SourcePictures(open_source(platform, name), columns).read(wanted)
        except UserError as error:
            logger.warning("captions are shown without pictures: %s", error)
            continue
        found |= {(name, image_id): picture for image_id, picture in pictures.items()}
    return found

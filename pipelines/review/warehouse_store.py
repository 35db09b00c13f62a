"""Captions, pictures and verdicts in the tables of a Databricks workspace, through a SQL warehouse."""

from __future__ import annotations

import base64
import logging
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pipelines.errors import UserError
from pipelines.formats.tables import GENERATED_CAPTIONS, PICTURE_COLUMNS, VERDICTS
from pipelines.platform import Platform
from pipelines.review.source_pictures import PictureColumns
from pipelines.review.verdicts import CAPTION_COLUMNS

if TYPE_CHECKING:
    from databricks.sdk import WorkspaceClient
    from databricks.sdk.service.sql import StatementResponse

logger = logging.getLogger(__name__)

MAX_CAPTIONS = 5000
"""Number of captions that the page shows at most. The warehouse returns at most 25 MiB in one answer."""
MAX_PICTURE_BYTES = 15 * 2**20
"""Size of the largest picture that the page shows. In base64, the picture is a third larger."""
POLL_SECONDS = 1.0
WAIT_SECONDS = 30
"""Time for which one request waits for the result of a statement, in seconds. Databricks accepts 5 to 50 seconds."""


class Warehouse:
    """SQL warehouse of a workspace, which runs statements with the identity of `client`."""

    def __init__(self, client: WorkspaceClient, warehouse_id: str) -> None:
        self._client, self._id = client, warehouse_id

    def run(self, statement: str, values: Mapping[str, str | None]) -> list[dict[str, str | None]]:
        """Run a statement and return its rows. All values of a row are texts or None.

        Wait until the warehouse has started. The statement names a value as `:name`.

        Raises:
            UserError: the workspace refuses the statement, or the statement fails.
        """
        from databricks.sdk.errors.base import DatabricksError
        from databricks.sdk.service.sql import ExecuteStatementRequestOnWaitTimeout, StatementParameterListItem

        try:
            found = self._client.statement_execution.execute_statement(
                statement,
                self._id,
                parameters=[StatementParameterListItem(name=name, value=value) for name, value in values.items()],
                wait_timeout=f"{WAIT_SECONDS}s",
                on_wait_timeout=ExecuteStatementRequestOnWaitTimeout.CONTINUE,
            )
            return self._rows(self._wait(found))
        except (DatabricksError, OSError) as error:
            raise _failure(self._id, str(error)) from None

    def _wait(self, found: StatementResponse) -> StatementResponse:
        """Wait until a statement has succeeded."""
        from databricks.sdk.service.sql import StatementState

        assert found.statement_id
        while True:
            assert found.status
            if found.status.state not in (StatementState.PENDING, StatementState.RUNNING):
                break
            time.sleep(POLL_SECONDS)
            found = self._client.statement_execution.get_statement(found.statement_id)
        if found.status.state != StatementState.SUCCEEDED:
            error = found.status.error
            raise _failure(self._id, (error and error.message) or str(found.status.state))
        return found

    def _rows(self, found: StatementResponse) -> list[dict[str, str | None]]:
        """Return the rows of all chunks of a result."""
        assert found.statement_id
        schema = found.manifest and found.manifest.schema
        names = [column.name or "" for column in (schema and schema.columns) or []]
        rows: list[dict[str, str | None]] = []
        chunk = found.result
        while chunk is not None:
            rows += [dict(zip(names, values, strict=True)) for values in chunk.data_array or []]
            if chunk.next_chunk_index is None:
                break
            chunk = self._client.statement_execution.get_statement_result_chunk_n(
                found.statement_id, chunk.next_chunk_index
            )
        return rows


class WarehouseStore:
    """Captions of one model for the pictures of one table, with verdicts, in Unity Catalog.

    Args:
        warehouse: SQL warehouse that runs all statements.
        platform: platform of the workspace, which names the tables.
        table: full name of the captioned table.
        model: full name of the model.

    Raises:
        UserError: the captioned table does not contain the pictures as bytes.
    """

    def __init__(self, warehouse: Warehouse, platform: Platform, *, table: str, model: str) -> None:
        self._warehouse = warehouse
        self._table, self._model = table, model
        self._captions, self._verdicts = platform.table(GENERATED_CAPTIONS.name), platform.table(VERDICTS.name)
        self._columns = PictureColumns()

    def read_captions(self) -> list[dict[str, Any]]:
        """Read at most MAX_CAPTIONS rows, rows without a verdict first. See `CaptionStore.read_captions`."""
        columns = (*CAPTION_COLUMNS, *(column.name for column in PICTURE_COLUMNS))
        chosen = ", ".join(f"c.{name}" for name in columns)
        found = self._warehouse.run(
            f"SELECT {chosen}, v.verdict FROM {self._captions} c "  # noqa: S608 names of our own tables and columns
            f"LEFT JOIN {self._verdicts} v ON {_same_caption('v', 'c')} "
            "WHERE c.source_table = :table AND c.model_name = :model AND c.caption IS NOT NULL "
            f"ORDER BY v.verdict IS NOT NULL, c.mean_logprob LIMIT {MAX_CAPTIONS}",
            {"table": self._table, "model": self._model},
        )
        rows: list[dict[str, Any]] = [
            {**row, "mean_logprob": None if row["mean_logprob"] is None else float(row["mean_logprob"])}
            for row in found
        ]
        if rows:
            self._columns = PictureColumns.of_caption(max(rows, key=lambda row: row["captioned_at"]))
            self._check_pictures()
        return rows

    def _check_pictures(self) -> None:
        """Raise an error if the captioned table does not contain the pictures as bytes."""
        sql = f"SELECT typeof({_quoted(self._columns.image_column)}) AS type FROM {self._table} LIMIT 1"  # noqa: S608 the user's own table
        found = [row["type"] for row in self._warehouse.run(sql, {})]
        if self._columns.image_root is not None or found not in (["binary"], []):
            got = "paths or URLs" if self._columns.image_root is not None else str(found[0])
            raise UserError(
                "in a workspace, only pictures that a table contains as bytes can be reviewed",
                where=f"column {self._columns.image_column} of {self._table}",
                got=got,
                fix="caption a table with a column of type BINARY, such as table samples",
            )

    def _picture(self) -> str:
        """Return a query that selects the picture whose id is the value `image_id`."""
        identity, picture = _quoted(self._columns.id_column), _quoted(self._columns.image_column)
        return (
            f"SELECT {picture} AS image FROM {self._table} "  # noqa: S608 quoted columns of the user's own table
            f"WHERE CAST({identity} AS STRING) = :image_id AND {picture} IS NOT NULL LIMIT 1"
        )

    def read_picture(self, image_id: str) -> bytes | None:
        """Read a picture of at most MAX_PICTURE_BYTES bytes. See `CaptionStore.read_picture`."""
        found = self._warehouse.run(
            f"SELECT CASE WHEN octet_length(image) <= {MAX_PICTURE_BYTES} THEN base64(image) END AS text, "  # noqa: S608
            f"octet_length(image) AS num_bytes FROM ({self._picture()})",
            {"image_id": image_id},
        )
        for row in found:
            if row["text"] is not None:
                return base64.b64decode(row["text"])
            logger.warning("picture %s is not shown, because it has %s bytes", image_id, row["num_bytes"])
        return None

    def write_verdict(self, row: Mapping[str, Any]) -> bool:
        """Merge a row into table `verdicts`. See `CaptionStore.write_verdict`.

        The statement copies the picture from the captioned table.
        """
        given = {name: value for name, value in row.items() if name != "judged_at"}
        columns = ", ".join(f":{name} AS {name}" for name in given)
        done = self._warehouse.run(
            f"MERGE INTO {self._verdicts} old USING ("  # noqa: S608 names of our own tables and columns
            f"SELECT {columns}, image, sha2(image, 256) AS sha256, current_timestamp() AS judged_at "
            f"FROM ({self._picture()})) new ON {_same_caption('old', 'new')} "
            "WHEN MATCHED THEN UPDATE SET * WHEN NOT MATCHED THEN INSERT *",
            given,
        )
        return done[0]["num_affected_rows"] != "0"


def _same_caption(left: str, right: str) -> str:
    return " AND ".join(f"{left}.{column} <=> {right}.{column}" for column in VERDICTS.key)


def _quoted(name: str) -> str:
    return f"`{name.replace('`', '``')}`"


def _failure(warehouse_id: str, got: str) -> UserError:
    return UserError(
        "the SQL warehouse cannot run a statement",
        where=f"warehouse {warehouse_id}",
        got=" ".join(got.split())[:500],
        fix="correct the cause in the answer of Databricks; the user needs CAN USE on the warehouse, SELECT on the "
        "captioned table and on generated_captions, and MODIFY on verdicts",
    )

"""Captions, pictures and verdicts in the tables of a Databricks workspace, through a SQL warehouse."""

from __future__ import annotations

import base64
import json
import logging
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pipelines.errors import UserError
from pipelines.formats.tables import SAMPLES, VERDICTS
from pipelines.platform import Platform
from pipelines.review.shown_captions import ALL, CHAMPION, TABLES, Selection, select
from pipelines.review.source_pictures import PictureColumns
from pipelines.review.verdicts import Texts

if TYPE_CHECKING:
    from databricks.sdk import WorkspaceClient
    from databricks.sdk.service.sql import StatementResponse

logger = logging.getLogger(__name__)

MAX_CAPTIONS = 5000
"""Largest number of captions that the page shows. The warehouse returns at most 25 MiB in one answer."""
MAX_PICTURE_BYTES = 15 * 2**20
"""Largest size of a picture that the page shows, in bytes. In base64, the picture is a third larger."""
POLL_SECONDS = 1.0
WAIT_SECONDS = 30
"""Time for which one request waits for the result of a statement, in seconds. Databricks accepts 5 to 50 seconds."""


class Warehouse:
    """SQL warehouse of a workspace, which runs statements with the identity of `client`."""

    def __init__(self, client: WorkspaceClient, warehouse_id: str) -> None:
        self._client, self._id = client, warehouse_id

    def run(self, statement: str, values: Mapping[str, str | None]) -> list[dict[str, str | None]]:
        """Run a statement and return its rows. All values of a row are texts or None.

        Wait until the warehouse has started. In the statement, `:name` stands for the value of the key `name`.

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
        platform: platform of the workspace. The full names of the tables come from this platform.
        table: full name of the captioned table.
        model: full name of the model.
        version: version whose captions are read: a number, `champion` or `all` (see `shown_captions.select`).
    """

    def __init__(
        self, warehouse: Warehouse, platform: Platform, *, table: str, model: str, version: str = CHAMPION
    ) -> None:
        self._warehouse = warehouse
        self._table, self._model, self._version = table, model, version
        self._has_texts = table == platform.table(SAMPLES.name)
        self._names = {name: platform.table(name) for name in TABLES}
        self._verdicts = self._names[VERDICTS.name]

    def read_captions(self) -> list[dict[str, Any]]:
        """Read at most MAX_CAPTIONS rows, rows without a verdict first. See `CaptionStore.read_captions`.

        Captions of pictures that the table does not contain as bytes are left out with a warning.

        Raises:
            UserError: the tables cannot be read, or there are captions and the table contains none of the captioned
                pictures as bytes.
        """
        values = {"table": self._table, "model": self._model}
        if self._version not in (CHAMPION, ALL):
            values["version"] = self._version
        chosen = select(self._names, Selection(":table", ":model", ":version"), self._version)
        found = self._warehouse.run(
            f"{chosen}\nORDER BY verdict IS NOT NULL, mean_logprob LIMIT {MAX_CAPTIONS}", values
        )
        rows: list[dict[str, Any]] = [
            {**row, "mean_logprob": None if row["mean_logprob"] is None else float(row["mean_logprob"])}
            for row in found
        ]
        problems = {
            columns: self._find_problem(columns) for columns in {PictureColumns.of_caption(row) for row in rows}
        }
        kept = [row for row in rows if problems[PictureColumns.of_caption(row)] is None]
        for problem in filter(None, problems.values()):
            if not kept:
                raise problem
            logger.warning("some captions are not shown: %s", problem)
        return kept

    def _find_problem(self, columns: PictureColumns) -> UserError | None:
        """Return an error if the captioned table does not contain the pictures as bytes, else None."""
        sql = f"SELECT typeof({_quoted(columns.image_column)}) AS type FROM {self._table} LIMIT 1"  # noqa: S608 the user's own table
        found = [row["type"] for row in self._warehouse.run(sql, {})]
        if columns.image_root is None and found in (["binary"], []):
            return None
        return UserError(
            "in a workspace, only pictures that a table contains as bytes can be reviewed",
            where=f"column {columns.image_column} of {self._table}",
            got="paths or URLs" if columns.image_root is not None else str(found[0]),
            fix="caption a table with a column of type BINARY, such as table samples",
        )

    def _picture(self, caption: Mapping[str, Any]) -> str:
        """Return a query that selects the captioned picture by the values `image_id` and `sha256`."""
        columns = PictureColumns.of_caption(caption)
        identity, picture = _quoted(columns.id_column), _quoted(columns.image_column)
        return (
            f"SELECT {picture} AS image FROM {self._table} "  # noqa: S608 quoted columns of the user's own table
            f"WHERE CAST({identity} AS STRING) = :image_id AND sha2({picture}, 256) = :sha256 LIMIT 1"
        )

    def read_picture(self, caption: Mapping[str, Any]) -> bytes | None:
        """Read a picture of at most MAX_PICTURE_BYTES bytes. See `CaptionStore.read_picture`."""
        found = self._warehouse.run(
            f"SELECT CASE WHEN octet_length(image) <= {MAX_PICTURE_BYTES} THEN base64(image) END AS text, "  # noqa: S608
            f"octet_length(image) AS num_bytes FROM ({self._picture(caption)})",
            {"image_id": caption["image_id"], "sha256": caption["sha256"]},
        )
        for row in found:
            if row["text"] is not None:
                return base64.b64decode(row["text"])
            logger.warning("picture %s is not shown, because it has %s bytes", caption["image_id"], row["num_bytes"])
        return None

    def read_texts(self, captions: Sequence[Mapping[str, Any]]) -> Texts:
        """Read human texts. See `CaptionStore.read_texts`."""
        if not self._has_texts or not captions:
            return {}
        ids = {f"id{number}": row["image_id"] for number, row in enumerate(captions)}
        found = self._warehouse.run(
            f"SELECT image_id, to_json(texts) AS texts FROM {self._table} "  # noqa: S608 a name of our own table
            f"WHERE image_id IN ({', '.join(f':{name}' for name in ids)})",
            ids,
        )
        return {str(row["image_id"]): json.loads(row["texts"] or "[]") for row in found}

    def write_verdict(self, row: Mapping[str, Any], caption: Mapping[str, Any]) -> bool:
        """Merge a row into table `verdicts`. See `CaptionStore.write_verdict`.

        The statement copies the picture from the captioned table.
        """
        given = {name: value for name, value in row.items() if name != "judged_at"}
        columns = ", ".join(f":{name} AS {name}" for name in given)
        done = self._warehouse.run(
            f"MERGE INTO {self._verdicts} old USING ("  # noqa: S608 names of our own tables and columns
            f"SELECT {columns}, image, current_timestamp() AS judged_at "
            f"FROM ({self._picture(caption)})) new ON {_same_caption('old', 'new')} "
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
        fix="correct the cause that Databricks reports; the user needs CAN USE on the warehouse, SELECT on the "
        "captioned table, on generated_captions and on decisions, and MODIFY on verdicts",
    )

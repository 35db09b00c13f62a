"""Function that checks a tracking database before MLflow opens the database.

MLflow itself would try for minutes to open an unreachable database, and then raise an exception of a database library.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from pipelines.errors import UserError
from pipelines.tracking.outage import DATABASE_DOWN, TrackingDown, first_line
from vlm.errors.printable import hide_secrets

CONNECT_SECONDS = 10
"""Longest time to wait for an answer of a PostgreSQL or MySQL server, in seconds."""

DRIVERS = {
    "postgresql": "'lakesight[postgres]'",
    "postgresql+psycopg2": "psycopg2-binary",
    "mysql": "pymysql",
    "mssql": "pymssql",
}
"""Package to install for each kind of database, by the scheme of the tracking URI, such as `mysql`."""


@cache  # an exception is not cached, so a failed check is repeated
def check_database(uri: str) -> None:
    """Check that the database of a tracking URI can be read. A missing SQLite file is accepted, and the URI of an HTTP
    server or workspace is not checked.

    Raises:
        TrackingDown: the database server does not answer, or is starting or stopping.
        UserError: the Python driver of the database is not installed, the server refuses the user, or the file is
            locked or not a database.
    """
    dialect = uri.partition(":")[0]
    kind = dialect.partition("+")[0]
    if kind != "sqlite" and kind not in DRIVERS:
        return
    import sqlalchemy
    from sqlalchemy.exc import NoSuchModuleError, SQLAlchemyError

    limit = {"connect_timeout": CONNECT_SECONDS} if kind in ("postgresql", "mysql") else {}
    try:
        engine = sqlalchemy.create_engine(uri, poolclass=sqlalchemy.NullPool, connect_args=limit)
        file = str(engine.url.database or "").removeprefix("file:")
        if kind == "sqlite" and not Path(file).exists():
            return  # MLflow creates the missing file
        with engine.connect() as connection:
            sqlalchemy.inspect(connection).get_table_names()
    except (ImportError, NoSuchModuleError) as error:
        raise UserError(
            "the Python driver of the tracking database is not installed",
            where=hide_secrets(uri),
            got=first_line(error),
            fix=f"pip install {DRIVERS.get(dialect) or DRIVERS.get(kind, 'the driver')}",
        ) from None
    except (SQLAlchemyError, ValueError) as error:  # ValueError: the port in the URI is not a number
        down = kind != "sqlite" and DATABASE_DOWN.search(str(error))
        raise (TrackingDown if down else UserError)(
            "the tracking database cannot be used",
            where=hide_secrets(uri),
            got=first_line(error),
            fix=_fix(kind, str(error)),
        ) from None


def _fix(kind: str, message: str) -> str:
    """Return the advice of the error message, which says how to make the database usable."""
    if kind != "sqlite":
        return "start the server, and check host, port, user, password and name of the database in MLFLOW_TRACKING_URI"
    if "locked" in message:
        return "end the process that has locked the file, then repeat the command; `lsof FILE` names the process"
    return "restore the file from a backup; or move it away to begin with an empty database (runs and models are lost)"

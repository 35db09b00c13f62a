"""Distinguish a tracking server that is temporarily down from a server that refuses this user or does not exist.

Training may start while the server is down, because the metrics are stored in the run folder until the server answers.
The cause of a refusal (wrong password, unknown host, unknown database) would still exist after hours of training, so a
refusal stops a command immediately.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator

import requests
from mlflow.exceptions import MlflowException, RestException

from pipelines.errors import UserError
from vlm.errors.printable import hide_secrets

DATABASE_DOWN = re.compile(
    r"connection refused|time(out| ?d out)|unreachable|no route|starting up|shutting down|closed the connection"
    r"|connection reset|recovery mode",
    re.IGNORECASE,
)
"""Pattern of the messages with which database drivers report a server that does not answer, starts or stops."""
DISK_PROBLEM = re.compile(
    r"(\[Errno \d+\] )?(No space left on device|Read-only file system)"
    r"|\([\w.]+\) (database or disk is full|disk I/O error|attempt to write a readonly database)"
)
"""Pattern of the messages for files that cannot be written because their disk is full or read-only."""


class TrackingDown(UserError):
    """Error for a tracking server or database that gives no answer, or for a server that reports an internal error
    (HTTP 5xx). The exit code is 1, because a retry may succeed.
    """

    exit_code = 1


def is_outage(error: BaseException) -> bool:
    """Return whether a failed request may succeed later without a change of settings.

    An unknown host name, a certificate that is not trusted and an invalid URL are mistakes, not outages.
    """
    if status := http_status(error):
        return status >= 500
    chain = list(_causes(error))
    if any(isinstance(cause, socket.gaierror | requests.exceptions.SSLError | ValueError) for cause in chain):
        return False
    no_answer = (requests.ConnectionError, requests.Timeout, requests.exceptions.RetryError, TimeoutError)
    return any(isinstance(cause, no_answer) for cause in chain)


def first_line(error: BaseException) -> str:
    """Return the first line of an error message without passwords, cut after 300 characters."""
    return hide_secrets((str(error) or type(error).__name__).splitlines()[0])[:300]


def disk_problem(error: BaseException) -> str:
    """Search an error and its causes for a message about a full or read-only disk, and return the message or ""."""
    found = (DISK_PROBLEM.search(str(cause)) for cause in _causes(error))
    return next((match[0] for match in found if match), "")


def http_status(error: BaseException) -> int:
    """Return the HTTP status of an error response, or 0 if the error does not come from an HTTP response."""
    if isinstance(error, RestException):
        return int(error.get_http_status_code())  # type: ignore[no-untyped-call]
    named = re.search(r"failed with error code (\d{3}) ", str(error)) if isinstance(error, MlflowException) else None
    return int(named[1]) if named else 0


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and all its causes, because MLflow wraps the errors of libraries in its own errors."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__

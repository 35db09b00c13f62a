"""Functions that open the files and URLs of a source, and distinguish a damaged file from a fault of the machine."""

from __future__ import annotations

import errno
import os
import re
import tarfile
import zlib
from lzma import LZMAError
from typing import IO, Any

import pyarrow as pa

from pipelines.errors import UserError

INACCESSIBLE = frozenset(
    {
        *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EPERM),
        errno.EINVAL,  # a damaged offset may cause a seek to a negative position
    }
)
"""Codes of operating system errors that affect only one file. An error code that is not listed here counts as a machine
failure.
"""
DAMAGE = (EOFError, zlib.error, LZMAError, UnicodeError, tarfile.TarError, pa.ArrowException)
"""Exceptions that decompressors and parsers raise for damaged data."""
FILE_ERRORS = (OSError, *DAMAGE)
"""Exceptions whose cause may be a single file.

`require_damage` decides whether an exception of these classes means a damaged file or a fault of the machine.
"""

WEB = re.compile(r"(?:^|::)https?://", re.IGNORECASE)
"""Start of a URL of a web server. `::` separates the URLs of a chain such as zip://a.csv::https://host/b.zip."""
WEB_USER = re.compile(r"(?:^|::)(https?://)[^/?#]*@", re.IGNORECASE)
"""URL of a web server with text before `@`."""
PASSWORD = re.compile(r"(?:^|::)([\w+.-]+://)(?!arn:)[^/?#@:\[]*:(?!\d*(?:[/?#,]|$)|:[\w+.-]+://).*@")
"""URL with a colon before `@`. The colon starts a password, unless it belongs to a port number, an IPv6 address, an ARN
or the `::` of a chain. A password may contain slashes.
"""


def is_url(path: str) -> bool:
    """Return whether a path is a URL such as s3://bucket/folder, which `fsspec` opens."""
    return "://" in path


def refuse_secrets(location: str, setting: str) -> None:
    """Check that a location that is stored in tables is not a URL with a secret.

    A web server's user name is a secret too, because a token may be given as the user name. In URLs of other kinds, the
    text before `@` is the name of a user or a container. The query of a signed URL is a secret. In a URL of an object
    store, `?` and `#` may also be part of a name, so such a URL is refused only if the part after `?` or `#` contains
    `=`. If several URLs are chained with `::`, each URL is checked.

    Raises:
        UserError: a URL has a password, a query or a fragment, or a URL of a web server has a user name. The message
            does not contain these parts.
    """
    if found := PASSWORD.search(location) or WEB_USER.search(location):
        raise UserError(
            f"a URL contains a {'password' if found.re is PASSWORD else 'user name'}, which would be stored in tables",
            where=setting,
            got=f"{found[1]}***@{location[found.end() :].partition('?')[0]}",
            fix="remove user and password from the URL, and give credentials of an object store in environment "
            "variables",
        )
    if is_url(location) and re.search("[?#]" if WEB.search(location) else "[?#].*=", location):
        raise UserError(
            "a URL has a query or a fragment, which may be a secret and would be stored in tables",
            where=setting,
            got=f"{re.split('[?#]', location)[0]} with more text after ? or #",
            fix="remove the part from ? or #, and give credentials of an object store in environment variables",
        )


def open_binary(path: str) -> IO[bytes]:
    """Open a local file or a URL for reading.

    Raises:
        OSError: the file cannot be opened. `describe_damage` says why the file cannot be opened.
        UserError: the package for this kind of URL is missing.
    """
    if not is_url(path):
        return open(path, "rb", buffering=1 << 20)  # noqa: PTH123 (a path may hold undecodable bytes)
    system, inside = url_system(path)
    opened: IO[bytes] = system.open(inside, "rb")
    return opened


def url_system(path: str) -> tuple[Any, str]:
    """Return the `fsspec` file system of a URL, and the path inside this file system.

    Raises:
        UserError: `fsspec` or the package for this kind of URL is missing, or no package supports such URLs.
    """
    scheme = path.partition("://")[0]
    try:
        from fsspec.core import url_to_fs

        system, inside = url_to_fs(path)
    except Exception as error:  # noqa: BLE001 each package has exception classes of its own for a wrong URL
        raise UserError(
            f"URLs of kind {scheme}:// cannot be opened",
            where=path,
            got=" ".join(str(error).split()),
            fix="correct the URL, install the fsspec package for this storage (such as s3fs, gcsfs or adlfs) on the "
            "driver and on all executors, or give a mounted folder such as a Volume",
        ) from None
    return system, inside


def describe_damage(error: Exception) -> str | None:
    """Describe an error that affects only one file, or return None if the error counts as a machine failure.

    If the result is None, the caller must raise the error, so that Spark retries the task. Without a retry,
    files would be refused because a network drive was offline for a moment.
    """
    if isinstance(error, OSError):
        if (error.errno is not None and error.errno not in INACCESSIBLE) or _has_lost_its_folder(error):
            return None
        return (error.strerror or str(error)).strip()[:500]
    return f"{type(error).__name__}: {error}".strip()[:500] if isinstance(error, DAMAGE) else None


def require_damage(error: Exception) -> str:
    """Describe an error that affects only one file. Raise the error if it is a fault of the machine."""
    damage = describe_damage(error)
    if damage is None:
        raise error
    return damage


def _has_lost_its_folder(error: OSError) -> bool:
    """Return whether the folder of a missing local file is missing too, as on a disconnected network drive."""
    path = error.filename
    return error.errno == errno.ENOENT and isinstance(path, str) and not os.path.isdir(os.path.dirname(path))  # noqa: PTH112, PTH120


def printable(path: str) -> str:
    """Return a path as text that UTF-8 can encode. Bytes that are not UTF-8 become escapes such as \\xff."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")

"""Functions that open the files and URLs of a source, and distinguish a damaged file from a fault of the machine."""

from __future__ import annotations

import errno
import io
import os
import re
import ssl
import tarfile
import zlib
from collections.abc import Callable
from gzip import BadGzipFile
from lzma import LZMAError
from typing import IO, Any, TypeVar

import pyarrow as pa

from pipelines.errors import UserError

Result = TypeVar("Result")

INACCESSIBLE = frozenset(
    {
        *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP),
        errno.EINVAL,  # a damaged offset may cause a seek to a negative position
    }
)
"""Codes of operating system errors that affect only one file. An error code that is not listed here counts as a machine
failure.

A refused permission (EACCES, EPERM) counts as a machine failure too: it is also the error of an expired ticket of a
network drive, or of one machine that lacks a right. Files that the driver may not read are refused without being opened
(`refuse_denied`).
"""
ONE_FILE = (OSError, BadGzipFile, FileNotFoundError, IsADirectoryError, NotADirectoryError)
"""Classes of errors without a code that affect only one file.

For damaged data, Arrow and the bz2 decompressor raise an exception of the class OSError itself. Client libraries of
storages raise other subclasses of OSError without a code, for example after a time-out or a failed connection. If an
error without a code has a class that is not listed here, the error counts as a machine failure.
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
    store, `?` and `#` may also be part of a name. A URL of an object store is therefore refused only if the part after
    `?` or `#` contains `=`. If several URLs are chained with `::`, each URL is checked.

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
            fix="remove the part that begins with ? or #, and give credentials of an object store in environment "
            "variables",
        )


class StorageFault(OSError):
    """Fault of the storage behind a URL, of the network or of the credentials, which affects more than one file."""

    @property
    def is_outage(self) -> bool:
        """Whether the error says that no file can be read, for example because the server refuses connections.

        A time-out, a refused permission or an error of an unknown class may also be the error of a single file.
        """
        cause = self.__cause__
        may_be_one_file = isinstance(cause, TimeoutError | PermissionError)
        return isinstance(cause, OSError) and not may_be_one_file and describe_damage(cause) is None


def open_binary(path: str) -> IO[bytes]:
    """Open a local file or a URL for reading.

    Raises:
        OSError: the file cannot be opened. `describe_damage` says why the file cannot be opened.
        StorageFault: the storage of the URL cannot be used. Reading the file may also raise this error.
        UserError: the package for this kind of URL is missing.
    """
    if not is_url(path):
        return open(path, "rb", buffering=1 << 20)  # noqa: PTH123 (a path may hold undecodable bytes)
    system, inside = url_system(path)
    return _UrlFile(path, call_storage(path, system.open, inside, "rb"))  # type: ignore[return-value]


class _UrlFile(io.RawIOBase):
    """File at a URL, opened for reading. An error of the storage becomes a StorageFault.

    Without this conversion, an error of the storage cannot be distinguished from an error of a decompressor or parser
    that reads the file.
    """

    def __init__(self, path: str, opened: Any) -> None:
        self._path, self._opened = path, opened

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return bool(self._opened.seekable())

    def read(self, size: int | None = -1) -> bytes:
        return bytes(call_storage(self._path, self._opened.read, -1 if size is None else size))

    def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]
        content = self.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Change the position. A negative position raises the same error as for a local file (EINVAL)."""
        if whence == os.SEEK_SET and offset < 0:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        call_storage(self._path, self._opened.seek, offset, whence)
        return self.tell()

    def tell(self) -> int:
        return int(self._opened.tell())

    def close(self) -> None:
        if not self.closed:
            self._opened.close()
        super().close()


def call_storage(path: str, function: Callable[..., Result], *arguments: object) -> Result:
    """Call a function that uses an `fsspec` file system or file. `path` is the URL of the file.

    Raises:
        OSError, DAMAGE: the error affects only the file at `path`.
        StorageFault: the storage has another fault. Many client libraries have exception classes of their own.
    """
    try:
        return function(*arguments)
    except MemoryError:
        raise
    except Exception as error:
        if _affects_one_url(path, error):
            raise
        text = " ".join(str(error).split())[:500]
        raise StorageFault(f"{path} cannot be read: {type(error).__name__}{text and f': {text}'}") from error


def _affects_one_url(path: str, error: Exception) -> bool:
    """Return whether an error of an `fsspec` file system affects only the file at a URL.

    The error of an expired token and the error of a forbidden object may be equal. Examples are a PermissionError
    without a code (s3fs), EINVAL (s3fs, if the server answers without a text) and OSError (gcsfs). An error that may
    come from an expired token counts as a fault of the storage, so that no file is refused because of the token.
    """
    if isinstance(error, EOFError):  # a damaged archive of a chain, or the end of an FTP or SFTP connection
        return "::" in path
    if not isinstance(error, OSError):  # DAMAGE: a damaged archive of a chain, or a name that UTF-8 cannot encode
        return isinstance(error, DAMAGE)
    if isinstance(error, FileNotFoundError):
        cause = error.__cause__
        if cause is None or isinstance(cause, FileNotFoundError):
            return True
        if WEB.search(path):  # fsspec raises FileNotFoundError for any failure of a web server
            return getattr(cause, "status", None) in (404, 410)
        return not isinstance(cause, OSError)
    # The code of an SSLError is not a code of the operating system.
    has_code = error.errno in INACCESSIBLE - {errno.EINVAL} and not isinstance(error, ssl.SSLError)
    return has_code or isinstance(error, IsADirectoryError | NotADirectoryError)


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
        is_fault = isinstance(error, TimeoutError | ConnectionError | ssl.SSLError | StorageFault)
        if is_fault or not _affects_one_file(error) or _has_lost_its_folder(error):
            return None
        return (error.strerror or str(error)).strip()[:500]
    return f"{type(error).__name__}: {error}".strip()[:500] if isinstance(error, DAMAGE) else None


def require_damage(error: Exception) -> str:
    """Describe an error that affects only one file. Raise the error if it is a fault of the machine."""
    damage = describe_damage(error)
    if damage is None:
        raise error
    return damage


def _affects_one_file(error: OSError) -> bool:
    return type(error) in ONE_FILE if error.errno is None else error.errno in INACCESSIBLE


def _has_lost_its_folder(error: OSError) -> bool:
    """Return whether the folder of a missing local file is missing or empty, as on a disconnected network drive."""
    path = error.filename
    if error.errno != errno.ENOENT or not isinstance(path, str):
        return False
    try:
        return not has_entries(os.path.dirname(path) or ".")  # noqa: PTH120 (a path may hold undecodable bytes)
    except OSError:
        return True


def has_entries(folder: str) -> bool:
    """Return whether a folder has an entry. The folder of a drive that is not mounted is missing or has no entry.

    A folder that this process has no permission to list counts as a folder with entries.

    Raises:
        OSError: the drive does not answer.
    """
    try:
        with os.scandir(folder) as entries:
            return any(entries)
    except FileNotFoundError:
        return False
    except PermissionError:
        return True


def printable(path: str) -> str:
    """Return a path as text that UTF-8 can encode. Bytes that are not UTF-8 become escapes such as \\xff."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")

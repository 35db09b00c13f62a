"""Functions that read pictures from web servers and object stores, given the pictures' URLs or paths below a URL.

Object stores are read through `fsspec`, which needs a package for the store. Web servers need no package. Size and time
of a read are limited, and a picture is never read from outside the root URL.
"""

from __future__ import annotations

import gzip
import http.client
import re
import threading
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable
from functools import lru_cache, partial
from http.client import HTTPMessage
from queue import Empty, SimpleQueue
from typing import IO, Any
from urllib.parse import quote, unquote, urlsplit

from pipelines.errors import UserError
from pipelines.executor.ingest.records.record import Problem
from pipelines.executor.ingest.storage import (
    FILE_ERRORS,
    call_storage,
    refuse_secrets,
    require_damage,
    url_system,
)

READ_SECONDS = 60.0
"""Longest time to read one path, in seconds."""
CHUNK = 1 << 20
WEB = ("http", "https")
STORES = {"s3": "s3", "s3a": "s3", "s3n": "s3", "gs": "gs", "gcs": "gs", "abfs": "abfs", "abfss": "abfs", "az": "abfs"}
"""Kind of object store for each URL scheme."""
MAX_KEY = 1024
"""Longest key of an object, in bytes; for Azure, in characters."""
ATTEMPTS = 3
RETRIED = frozenset({429, 500, 502, 503, 504})
"""HTTP status codes after which a request is sent again."""
USER_AGENT = "lakesight"
"""Name of the client in each request. Some servers refuse requests with the default name of Python's library."""
PAUSE_SECONDS = 1.0


def scheme_of(location: str) -> str | None:
    """Return the scheme of a URL in lower case, or None if the location is a path."""
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", location)
    return found[1].lower() if found else None


def require_readable(root: str) -> None:
    """Check that pictures below a URL can be read.

    Raises:
        UserError: the URL has a secret (`refuse_secrets`), has no host, has an unknown scheme or is a chain of URLs, or
            the package for the object store is missing.
    """
    refuse_secrets(root, "image_root")
    scheme, server = scheme_of(root), urlsplit(root).netloc
    if scheme not in (*WEB, *STORES) or not server or "::" in root:
        raise UserError(
            "pictures cannot be read from this folder or URL",
            where="image_root",
            got=root,
            fix=f"give a folder, or a URL with a host and with one of the schemes {', '.join((*WEB, *STORES))}",
        )
    if scheme in STORES:
        _store(root)


def read_url(root: str, name: str, max_bytes: int) -> bytes | Problem:
    """Read a picture below a root URL, given the name in a row. Return a Problem if the picture cannot be read.

    Args:
        root: root URL of all pictures.
        name: path relative to the root URL, or a URL below the root URL.
        max_bytes: largest size of a picture, in bytes.

    Raises:
        OSError: the web server cannot be reached, so Spark has to retry the task. A time-out or an error code of a web
            server is a Problem.
        StorageFault: the object store cannot be used, for example because of a time-out or an expired token.
    """
    paths = _paths_below(root, name)
    if isinstance(paths, Problem):
        return paths
    read = _read_web if scheme_of(root) in WEB else _read_store
    found: bytes | Problem = Problem("missing_field", f"the row names no file: {name!r}")
    for path in paths:
        found = read(root, path, max_bytes)
        if not (isinstance(found, Problem) and found.reason == "missing_field"):
            break
    return found


def _paths_below(root: str, name: str) -> list[str] | Problem:
    """Return the paths below the root URL that a name may mean, or a Problem if the name is not below the root URL.

    The path that is spelled like the name comes first. On a web server, a name means only this path.
    """
    outside = Problem("missing_field", f"{name!r} is not below {root}")
    if scheme_of(name):
        parts, top = urlsplit(name), urlsplit(root)
        if _server(name) != _server(root) or parts.username != top.username:
            return outside
        above = top.path.rstrip("/") + "/"
        path = name.partition("://")[2].partition("/")[2]
        if not f"/{path}".startswith(above):
            return outside
        name = f"/{path}"[len(above) :]
    elif name.startswith("/"):
        return outside
    if not name.strip() or "\0" in name:
        return Problem("missing_field", "the row names no file")
    paths = list(dict.fromkeys([name, name.replace("\\", "/"), unquote(name)]))
    if any(".." in re.split(r"[/\\]", unquote(unquote(path)).partition("?")[0]) for path in paths):
        return outside
    return paths[:1] if scheme_of(root) in WEB else paths


def _server(url: str) -> tuple[str, str]:
    """Return the scheme and the host of a URL, which identify a server or a bucket."""
    parts, scheme = urlsplit(url), str(scheme_of(url))
    return STORES.get(scheme, scheme), parts.netloc.rpartition("@")[2].lower() if scheme in WEB else parts.netloc


# ------------------------------------------------------------------------------------------------ time


def _in_time(fetch: Callable[[float], bytes | Problem]) -> bytes | Problem:
    """Call a function in a separate thread, for at most READ_SECONDS.

    The thread is necessary because no client library limits the total time of a request. The function receives the
    deadline as its argument. The thread may continue to run after this call, until the deadline or the end of its
    connection.

    Raises:
        TimeoutError: the function takes longer than READ_SECONDS, or raises this error.
    """
    done: SimpleQueue[bytes | Problem | Exception] = SimpleQueue()
    deadline = time.monotonic() + READ_SECONDS

    def run() -> None:
        try:
            done.put(fetch(deadline))
        except Exception as error:  # noqa: BLE001 raised in the other thread
            done.put(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        result = done.get(timeout=READ_SECONDS + PAUSE_SECONDS)
    except Empty:
        raise TimeoutError(_too_slow()) from None
    if isinstance(result, Exception):
        raise result
    return result


def _too_slow() -> str:
    return f"not read within {READ_SECONDS:g} seconds"


def _read_bounded(
    file: IO[bytes] | gzip.GzipFile | http.client.HTTPResponse, max_bytes: int, deadline: float
) -> bytes | Problem:
    content = bytearray()
    while chunk := file.read(min(CHUNK, max_bytes + 1 - len(content))):
        content += chunk
        if len(content) > max_bytes:
            return Problem("too_large", f"more than {max_bytes} bytes")
        if time.monotonic() > deadline:
            raise TimeoutError(_too_slow())
    return bytes(content)


# ------------------------------------------------------------------------------------------------ object stores


@lru_cache(maxsize=8)
def _store(root: str) -> tuple[Any, str]:
    scheme = str(scheme_of(root))
    return url_system(root.replace("s3n://", "s3://", 1) if scheme == "s3n" else root)


def _read_store(root: str, path: str, max_bytes: int) -> bytes | Problem:
    """Read a picture from an object store.

    Raises:
        StorageFault: the error may affect all pictures, so that refusing the row could lose many good rows.
    """
    system, top = _store(root)
    if not _is_key(root, path):
        return Problem("missing_field", f"{path[:200]!r} cannot be the name of a file in {root}")
    fetch = partial(_fetch_store, system, f"{top.rstrip('/')}/{path}", max_bytes)
    try:
        return call_storage(f"{root.rstrip('/')}/{path}", _in_time, fetch)
    except FileNotFoundError:
        return Problem("missing_field", f"{root} has no file {path!r}")
    except FILE_ERRORS as error:
        return Problem("unreadable_file", f"{path!r}: {require_damage(error)}")


def _is_key(root: str, path: str) -> bool:
    """Return whether an object below the root URL may have this path. A store may answer another path with an error."""
    key = f"{urlsplit(root).path.strip('/')}/{path}".strip("/")
    size = len(key) if STORES[str(scheme_of(root))] == "abfs" else len(key.encode("utf-8", "surrogatepass"))
    return size <= MAX_KEY and not re.search(r"[\x00-\x1f]", path)


def _fetch_store(system: Any, path: str, max_bytes: int, deadline: float) -> bytes | Problem:
    with system.open(path, "rb") as file:
        return _read_bounded(file, max_bytes, deadline)


# ------------------------------------------------------------------------------------------------ web servers


class _StayBelow(urllib.request.HTTPRedirectHandler):
    """Redirect handler that follows a redirection only to a URL below the root URL."""

    def __init__(self, root: str) -> None:
        self._root = root

    def redirect_request(  # noqa: PLR0917 (the signature of urllib)
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> urllib.request.Request | None:
        if isinstance(_paths_below(self._root, newurl), Problem):
            raise urllib.error.HTTPError(newurl, 403, f"redirected to {newurl}, outside of the root", headers, fp)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _read_web(root: str, path: str, max_bytes: int) -> bytes | Problem:
    try:
        return _in_time(partial(_fetch_web, root, path, max_bytes))
    except TimeoutError:
        return Problem("unreadable_file", _too_slow())


def _fetch_web(root: str, path: str, max_bytes: int, deadline: float) -> bytes | Problem:
    encoded = quote(re.sub(r"%(?![0-9A-Fa-f]{2})", "%25", path), safe="/%?&=+,;:@!$'()*~")
    url = f"{root.rstrip('/')}/{encoded}"
    opener = urllib.request.build_opener(_StayBelow(root))
    opener.addheaders = [("User-Agent", USER_AGENT)]
    for attempt in range(1, ATTEMPTS + 1):
        try:
            with opener.open(url, timeout=max(0.1, deadline - time.monotonic())) as answer:
                packed = answer.headers.get("Content-Encoding", "").strip().lower() in ("gzip", "x-gzip")
                content = _read_bounded(gzip.GzipFile(fileobj=answer) if packed else answer, max_bytes, deadline)
                if isinstance(content, bytes) and answer.length and not packed:
                    # The server has closed the connection early, which `read` does not report.
                    raise http.client.IncompleteRead(content, answer.length)
                return content
        except urllib.error.HTTPError as error:
            if error.code in (404, 410):
                return Problem("missing_field", f"{root} has no file {path!r}: status {error.code}")
            if error.code not in RETRIED or attempt == ATTEMPTS:
                return Problem("unreadable_file", f"{url}: status {error.code} {' '.join(str(error.reason).split())}")
        except TimeoutError:
            raise
        except urllib.error.URLError as error:
            if isinstance(error.reason, TimeoutError):
                raise TimeoutError from None
            if attempt == ATTEMPTS:
                raise ConnectionError(f"{root} does not answer: {error.reason}") from None
        except (http.client.HTTPException, OSError, EOFError, zlib.error, ValueError) as error:
            if attempt == ATTEMPTS:
                return Problem("unreadable_file", f"{url}: {type(error).__name__}: {error}")
        time.sleep(min(PAUSE_SECONDS * attempt, max(0.0, deadline - time.monotonic())))
    raise AssertionError("the last pass of the loop always returns or raises")

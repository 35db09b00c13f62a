"""Listing of the files below a path. Every file is either returned, or passed over for a reason in PASSED_OVER.

The name of a file is never read as a pattern, and no file is left out without a reason. Spark, in contrast, silently
leaves out files whose names begin with `_` or `.`, and reads `[1]` in a name as a pattern.
"""

from __future__ import annotations

import glob
import heapq
import logging
import os
import re
import stat
from collections import Counter
from collections.abc import Collection, Iterator
from datetime import datetime
from fnmatch import fnmatchcase
from glob import has_magic
from pathlib import Path
from time import time_ns
from typing import Any, NamedTuple

from pipelines.errors import UserError
from pipelines.executor.ingest.storage import WEB, is_url, printable, url_system

logger = logging.getLogger(__name__)

LOGGED_MATCHES = 20
"""Largest number of matching paths in the log message about a pattern."""

NAMED_FILES = 1_000
"""Largest number of file names in a report; further files are only counted."""
TIMES = ("mtime", "LastModified", "last_modified", "updated", "modified", "created")
"""Names under which the file systems of `fsspec` store the modification time of a file. The file system of web servers
has none of these names."""
VERSIONS = (
    *("Last-Modified", "ETag", "etag", "Content-MD5", "content_md5", "Digest"),
    *("checksum", "sha", "blob_id", "CRC", "modificationTime", "modify", "last_write_time", "timeModified"),
)
"""Names of values that change if the content of a file changes: headers of a web server, and names under which further
file systems of `fsspec` store checksums or times."""
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".tif", ".tiff", ".bmp", ".avif")
SYSTEM_FOLDERS = ("_delta_log", "_temporary", "_spark_metadata", "__MACOSX", "__pycache__")
MARKERS = ("_SUCCESS", "_committed_*", "_started_*", "_metadata", "_common_metadata", "*.crc", "*._COPYING_")
PASSED_OVER = {
    "hidden": "the name begins with a dot, or the folder belongs to a system, such as `_delta_log` or `__MACOSX`",
    "marker": "the file marks the end of a job, or is a checksum or an index: `_SUCCESS`, `_metadata`, `*.crc`",
    "empty": "the file has no bytes",
    "other_kind": "the suffix belongs to another kind of source",
    "no_split": "`split.kind` is `file`, and neither the file name nor a folder name decides the split",
    "not_named": "in a source of kind `folder`, a picture to which no row of the captions file refers",
    "link_outside": "in a source of kind `folder`, a link that points outside the source's folder",
    "not_regular": "a pipe, a socket, a device, a link to nothing, or a link to a folder that contains the link",
    "no_access": "this process has no permission to list the folder",
}
"""All reasons for which an entry can be passed over, with their meanings."""


class PassedOver(NamedTuple):
    """A file or folder, below the path of a source, that is not read. The name of a folder ends with a slash."""

    relative: str
    reason: str


class Found(NamedTuple):
    """A file below the path of a source.

    Attributes:
        path: path or URL that opens the file.
        relative: path below the listed folder, with slashes; the file name if the path of the source is this file.
        size: size of the file, in bytes.
        modified: modification time of the file, in microseconds since the epoch.
        accessible: whether this process may read the file.
        named: whether the path of the source is the path of this file, and not of a folder.
        version: text that changes whenever the file changes; empty if `modified` is known. For a web server, this text
            has the time and the checksums that the server sends. If the server sends neither a time nor a checksum, the
            text is different in each listing, so that each ingest reads the file. For other file systems without these
            values, the text is empty.
    """

    path: str
    relative: str
    size: int
    modified: int
    accessible: bool = True
    named: bool = False
    version: str = ""


def list_entries(path: str) -> list[Found | PassedOver]:
    """List the file at an absolute path or URL, or all entries below the folder at this path, sorted by name.

    If the path does not exist and has wildcards, the path is a pattern.

    Raises:
        OSError: nothing is at the path, or the path cannot be listed.
        UserError: the package for this kind of URL is missing.
    """
    if is_url(path):
        try:
            return _list_url(path)
        except (OSError, UserError):
            raise
        except Exception as error:  # packages for URLs have exceptions without a common base class
            raise OSError(f"{type(error).__name__}: {' '.join(str(error).split())}") from error
    if os.path.isdir(path):  # noqa: PTH112 (a path may hold undecodable bytes)
        return list(_walk(path, "", frozenset()))
    if not os.path.exists(path) and (matches := _match(path)):  # noqa: PTH110
        logger.info("%s matches %s", path, ", ".join(printable(match) for match in matches[:LOGGED_MATCHES]))
        if len(matches) > LOGGED_MATCHES:
            logger.info("pattern %s matches %d files and folders in total", path, len(matches))
        base = os.path.commonpath([os.path.dirname(match) for match in matches])  # noqa: PTH120
        return [entry for match in matches for entry in _list_match(match, os.path.relpath(match, base))]
    status = os.stat(path)  # noqa: PTH116
    found = _file(path, path.rpartition("/")[2], status)
    return [found._replace(named=True) if isinstance(found, Found) else found]


def _match(path: str) -> list[str]:
    """Return the files and folders that match a pattern.

    If the beginning of the path exists as a folder, wildcards in this beginning are taken literally.
    """
    literal, pattern = path, ""
    while literal and not os.path.exists(literal):  # noqa: PTH110
        literal, _, name = literal.rpartition("/")
        pattern = f"/{name}{pattern}"
    root = glob.escape(literal)
    return sorted({m for one in expand_braces(pattern) for m in glob.glob(root + one, recursive=True)})  # noqa: PTH207


def _list_match(path: str, relative: str) -> Iterator[Found | PassedOver]:
    status = os.stat(path)  # noqa: PTH116
    if stat.S_ISDIR(status.st_mode):
        yield from _walk(path, f"{relative}/", frozenset())
    else:
        yield _file(path, relative, status)


def _walk(folder: str, prefix: str, outer: frozenset[tuple[int, int]]) -> Iterator[Found | PassedOver]:
    status = os.stat(folder)  # noqa: PTH116 (a path may hold undecodable bytes)
    inner = outer | {(status.st_dev, status.st_ino)}
    with os.scandir(folder) as scanned:
        entries = sorted(scanned, key=lambda entry: entry.name)
    for entry in entries:
        relative = prefix + entry.name
        try:
            found = entry.stat()
        except OSError:
            yield PassedOver(printable(relative), "not_regular")
            continue
        if not stat.S_ISDIR(found.st_mode):
            yield _file(entry.path, relative, found)
        elif reason := folder_reason(entry.name):
            yield PassedOver(printable(relative) + "/", reason)
        elif (found.st_dev, found.st_ino) in inner:
            yield PassedOver(printable(relative) + "/", "not_regular")
        else:
            try:
                yield from _walk(entry.path, relative + "/", inner)
            except PermissionError:
                yield PassedOver(printable(relative) + "/", "no_access")


def _file(path: str, relative: str, status: os.stat_result) -> Found | PassedOver:
    if not stat.S_ISREG(status.st_mode):
        return PassedOver(printable(relative), "not_regular")
    return Found(path, relative, status.st_size, status.st_mtime_ns // 1000, os.access(path, os.R_OK))


def _list_url(url: str) -> list[Found | PassedOver]:
    system, root = url_system(url)
    if not system.exists(root) and (matches := system.glob(root) if has_magic(root) else []):
        logger.info("%s matches %s", url, ", ".join(matches[:LOGGED_MATCHES]))
        return [entry for match in matches for entry in _list_below(system, match, match.rpartition("/")[0])]
    return _list_below(system, root, root)


def _list_below(system: Any, root: str, base: str) -> list[Found | PassedOver]:
    """Return the file at a path of an `fsspec` file system, or all entries below the path, named relative to `base`.

    Raises:
        FileNotFoundError: nothing is at the path.
    """
    if system.isfile(root):
        found = _url_file(system, root, root.rpartition("/")[2], system.info(root))
        return [found._replace(named=base == root)]
    entries: list[Found | PassedOver] = []
    for path, info in sorted(system.find(root, detail=True).items()):
        relative = path.removeprefix(base).lstrip("/")
        folders = relative.split("/")[:-1]
        passed = next((depth for depth, folder in enumerate(folders, 1) if folder_reason(folder)), 0)
        if not passed:
            entries.append(_url_file(system, path, relative, info))
        elif (entry := PassedOver("/".join(folders[:passed]) + "/", "hidden")) not in entries[-1:]:
            entries.append(entry)
    if not entries:
        raise FileNotFoundError(root)
    return entries


def _url_file(system: Any, path: str, relative: str, info: dict[str, Any]) -> Found:
    """Describe a file of an `fsspec` file system, given the information that the file system has about the file.

    Raises:
        UserError: the size of the file is not known.
    """
    if info.get("size") is None:
        info = system.info(path)  # the listing of a web page has no sizes and no times
    if info.get("size") is None:
        raise UserError(
            "the server does not send the size of a file",
            where=path,
            got="an answer without Content-Length, or with Content-Encoding",
            fix="download the file, or read it from a server that sends Content-Length",
        )
    time = next((info[key] for key in TIMES if info.get(key) is not None), None)
    version = ""
    if time is None:  # for example a file of a web server
        version = ", ".join(str(info[key]) for key in VERSIONS if info.get(key))
        if not version and WEB.search(system.unstrip_protocol(path)):
            version = f"read at {time_ns()}"
    time = datetime.fromisoformat(time) if isinstance(time, str) else time
    seconds = time.timestamp() if isinstance(time, datetime) else float(time or 0)
    path = system.unstrip_protocol(path)
    return Found(path, relative, int(info["size"]), int(seconds * 1_000_000), version=version)


def folder_reason(name: str) -> str | None:
    """Return why a folder of this name is passed over, or None if the folder is listed."""
    return "hidden" if name.startswith(".") or name in SYSTEM_FOLDERS else None


def file_reason(name: str) -> str | None:
    """Return why a file with this name is passed over in a folder, or None if the name gives no reason."""
    if any(fnmatchcase(name, marker) for marker in MARKERS):
        return "marker"
    return "hidden" if name.startswith(".") else None


def expand_braces(pattern: str) -> list[str]:
    """Expand alternatives such as {a,b} in a pattern. Spark's paths allow alternatives, and Python's `glob` does
    not."""
    found = re.search(r"\{([^{}]*,[^{}]*)\}", pattern)
    if not found:
        return [pattern]
    before, after = pattern[: found.start()], pattern[found.end() :]
    return [one for part in found[1].split(",") for one in expand_braces(before + part + after)]


def passed_over(folder: str, used: Collection[str | None]) -> tuple[tuple[PassedOver, ...], dict[str, int]]:
    """Return the names and the counts of the files and folders that are not read. Pictures to which no row refers are
    not read. Only the first NAMED_FILES files and folders, in the order of their names, are named. All of them are
    counted, by reason.

    Args:
        folder: path of the folder, with all links resolved.
        used: paths of the captions file and of the pictures to which rows refer, with all links resolved.
    """
    counts: Counter[str] = Counter()

    def unread() -> Iterator[PassedOver]:
        for key, entry in walk_entries(folder):
            if key is None or key not in used:
                counts[entry.reason] += 1
                yield entry

    named = tuple(heapq.nsmallest(NAMED_FILES, unread()))
    return named, dict(sorted(counts.items()))


def walk_entries(folder: str) -> Iterator[tuple[str | None, PassedOver]]:
    """Yield the files below a folder, and the folders that are never read.

    An entry has two parts. The first part is the path of the file, with links resolved, or None if the entry is never
    read. The second part is the reason why the file is passed over if no row refers to the file. Links to folders are
    not followed, because a link may lead to all files of the machine.

    Args:
        folder: path of the folder, with all links resolved.
    """
    folders = [folder]
    while folders:
        top = folders.pop()
        try:
            with os.scandir(top) as scanned:
                for entry in scanned:
                    if not _is_folder(entry):
                        yield _read_from(entry), PassedOver(_relative(entry.path, folder), _file_reason(entry, folder))
                    elif reason := _leads_out(entry, folder) or folder_reason(entry.name):
                        yield None, PassedOver(_relative(entry.path, folder) + "/", reason)
                    elif not entry.is_symlink():
                        folders.append(entry.path)
        except OSError:  # the folder cannot be opened, or a network file system cannot list the whole folder
            yield None, PassedOver(_relative(top, folder) + "/", "no_access")


def _relative(path: str, folder: str) -> str:
    return printable(os.path.relpath(path, folder))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that cannot be followed
        return False


def _read_from(entry: os.DirEntry[str]) -> str:
    """Return the path from which a file is read, with links resolved."""
    return printable(os.path.realpath(entry.path) if entry.is_symlink() else entry.path)


def _leads_out(entry: os.DirEntry[str], folder: str) -> str | None:
    is_outside = entry.is_symlink() and not Path(os.path.realpath(entry.path)).is_relative_to(folder)
    return "link_outside" if is_outside else None


def _file_reason(entry: os.DirEntry[str], folder: str) -> str:
    try:
        is_regular = entry.is_file()
    except OSError:  # a link that cannot be followed
        is_regular = False
    if outside := _leads_out(entry, folder):
        return outside
    if not is_regular:
        return "not_regular"
    is_picture = entry.name.lower().endswith(PICTURE_SUFFIXES)
    return file_reason(entry.name) or ("not_named" if is_picture else "other_kind")

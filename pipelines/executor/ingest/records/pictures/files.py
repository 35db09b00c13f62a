"""Functions that read picture files below a local folder. The paths of the files are in the rows of a source.

A path may have been written on any operating system. The path may contain backslashes or percent escapes, or the
Unicode form of the path may differ from the Unicode form of the file's name. The file with exactly the given name is
tried first. A link may lead anywhere inside the folder, but no path may lead out of the folder.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import unicodedata
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from pipelines.executor.ingest.records.record import Problem
from pipelines.executor.ingest.storage import require_damage

LOCAL_URI = re.compile(r"(?:file:(?://(?:localhost)?)?|dbfs:)(/.*)", re.DOTALL | re.IGNORECASE)
"""Pattern of a URI of a local file, or of a file on a Volume."""
HINT = ", did you mean "
"""Beginning of the hint in the message about a missing file. The hint suggests a file with a similar name."""
MAX_LISTED = 200_000
"""Largest number of entries of a folder that are searched for a name in another Unicode form."""


class PictureFile(NamedTuple):
    """A picture file: the path after all links are resolved, and the result of `os.stat`."""

    path: Path
    status: os.stat_result


class _Outside(Exception):
    """Exception for a path that leads out of the folder."""


def find_file(folder: str, name: str) -> PictureFile | Problem:
    """Find a picture file below a folder, given the name in a row.

    Args:
        folder: folder that the path must not leave.
        name: relative path, absolute path, or URI that begins with `file:` or `dbfs:`.

    Returns:
        The file, or a problem if there is no such file below the folder, or if the file is not readable.

    Raises:
        OSError: the machine has a fault, for example because a network drive does not answer.
        PermissionError: this machine may not search a folder on the path of the file.
    """
    root = Path(os.path.realpath(folder))
    missing = None
    for spelling in _spellings(name):
        try:
            found = _walk(root, _parts((folder, str(root)), spelling))
        except _Outside:
            return missing or Problem("missing_field", f"the file {name!r} is not inside the folder")
        except ValueError:  # the name contains a null character or a surrogate
            return Problem("missing_field", f"{name!r} cannot be the name of a file")
        except OSError as error:
            return Problem("unreadable_file", f"the file {name!r} cannot be read: {require_damage(error)}")
        if isinstance(found, PictureFile):
            if stat.S_ISREG(found.status.st_mode):
                return found
            return Problem("missing_field", f"{name!r} is not a regular file")
        missing = missing or Problem("missing_field", f"the folder has no file {name!r}{found}")
    assert missing is not None
    return missing


def read_file(found: PictureFile, max_bytes: int) -> bytes | Problem:
    """Read a picture file. Return a problem if the file is empty, damaged or larger than `max_bytes`.

    Raises:
        OSError: the machine has a fault.
        PermissionError: this machine may not read the file.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK  # a link or a pipe may have replaced the file
    try:
        with os.fdopen(os.open(found.path, flags), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                return Problem("missing_field", "not a regular file")
            content = file.read(max_bytes + 1) if status.st_size <= max_bytes else b""
    except OSError as error:
        return Problem("unreadable_file", require_damage(error))
    size = max(status.st_size, len(content))
    if not size:
        return Problem("missing_field", f"the picture file {found.path.name!r} is empty")
    return content if size <= max_bytes else Problem("too_large", f"{size} bytes; at most {max_bytes} are allowed")


def _spellings(name: str) -> Iterator[str]:
    """Yield a name unchanged, and then the paths that the name may mean on other operating systems."""
    local = LOCAL_URI.fullmatch(name)
    path = local[1] if local else name
    slashes = path.replace("\\", "/")
    yield from dict.fromkeys([path, path.strip(), slashes, unquote(path), unquote(slashes).strip()])


def _parts(roots: Sequence[str], path: str) -> list[str]:
    """Split a path below the root folder into the names of its folders and of its file.

    `roots` are all known paths of the root folder.

    Raises:
        _Outside: an absolute path is not below the folder, or the path is a URI.
    """
    if path.startswith("/"):
        above = next((top for top in roots if path.startswith(top.rstrip("/") + "/")), None)
        if above is None:
            raise _Outside
        path = path[len(above) :]
    elif re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", path):
        raise _Outside
    return [part for part in path.split("/") if part not in ("", ".")]


def _walk(root: Path, parts: list[str]) -> PictureFile | str:
    """Follow a path one name at a time, and check that each folder or file on the path is inside the root folder.

    Returns:
        The file, or a text that follows "the folder has no file PATH" in the error message. The text is, for example,
        ": the link leads nowhere", and may be empty.
    """
    path, status = root, root.stat()
    for part in parts:
        if part == "..":
            path = path.parent
            _require_inside(root, path)
            status = path.stat()
            continue
        found = _find_entry(path, part)
        if isinstance(found, str):
            return found
        path, status = found
        if stat.S_ISLNK(status.st_mode):
            path = Path(os.path.realpath(path))
            _require_inside(root, path)
            try:
                status = path.stat()
            except OSError as error:
                require_damage(error)
                return ": the link leads nowhere"
    return PictureFile(path, status)


def _require_inside(root: Path, path: Path) -> None:
    if not path.is_relative_to(root):
        raise _Outside


def _find_entry(folder: Path, name: str) -> PictureFile | str:
    """Find an entry of a folder by its name in any Unicode form. Names that differ in case are different names."""
    for form in dict.fromkeys([name, *(unicodedata.normalize(form, name) for form in ("NFC", "NFD"))]):
        path = folder / form
        try:
            return PictureFile(path, path.lstat())
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                return ""
            raise
    try:
        alike = _names(folder, folder.stat().st_mtime_ns).get(_fold(name), [])
    except (FileNotFoundError, NotADirectoryError):
        return ""
    composed = unicodedata.normalize("NFC", name)
    for other in alike:
        if unicodedata.normalize("NFC", other) == composed:
            return PictureFile(folder / other, (folder / other).lstat())
    return f"{HINT}{alike[0]!r}?" if alike else ""


def _fold(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


@lru_cache(maxsize=8)
def _names(folder: Path, _modified: int) -> dict[str, list[str]]:
    """Group the names in a folder by their folded form (see `_fold`). Only the first MAX_LISTED entries are read.

    After the folder has changed, it has a new modification time, so the folder is listed again.
    """
    names: dict[str, list[str]] = {}
    with os.scandir(folder) as entries:
        for entry in islice(entries, MAX_LISTED):
            names.setdefault(_fold(entry.name), []).append(entry.name)
    return names

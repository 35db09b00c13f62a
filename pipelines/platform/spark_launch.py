"""Private files of Spark's JVM (settings of the session, log, crash reports), and a check of a server's address.

Every user of a machine can read the command lines of its processes. PySpark would pass each setting, such as the key of
an object store, as an argument `--conf name=value` of `spark-submit` and of the JVM.
"""

from __future__ import annotations

import os
import re
import shlex
import socket
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

from pipelines.errors import UserError

SUBMIT_ARGUMENTS = "PYSPARK_SUBMIT_ARGS"
OPTION = "--properties-file"
LOAD_DEFAULTS = "--load-spark-defaults"
"""Option that makes Spark read conf/spark-defaults.conf in addition to the properties file."""
CONNECT_SECONDS = 10.0
"""Longest time to wait until a server accepts a connection, in seconds."""


@contextmanager
def private_settings(settings: Mapping[str, str]) -> Iterator[None]:
    """Let a JVM that is started in the block read Spark settings from a file that only this user can read.

    The file is in a temporary folder that only this user can open, and is deleted after the block. Arguments of the
    user in PYSPARK_SUBMIT_ARGS stay valid. If these arguments name a properties file, the settings in the user's file
    are copied in front of `settings`. Spark reads only one properties file, and uses the last value of a repeated
    setting.

    Raises:
        UserError: the properties file of the user cannot be read.
    """
    before = os.environ.get(SUBMIT_ARGUMENTS)
    with tempfile.TemporaryDirectory(prefix="lakesight-") as folder:
        arguments, given = _split_properties_file(shlex.split(before or "pyspark-shell"))
        file = Path(folder) / "spark.properties"
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:
            out.write(given + _properties(settings).encode("ascii"))
        defaults = [] if given else [LOAD_DEFAULTS]
        os.environ[SUBMIT_ARGUMENTS] = shlex.join([OPTION, str(file), *defaults, *arguments])
        try:
            yield
        finally:
            os.environ.pop(SUBMIT_ARGUMENTS)
            if before is not None:
                os.environ[SUBMIT_ARGUMENTS] = before


def crash_options(folder: Path, options: str, umask: int) -> str:
    """Return JVM options, to be appended to `options`, that make the JVM write its crash reports into a private folder.

    By default, a JVM that crashes writes `hs_err_pid*.log` into the working folder, where every user may read it. The
    report contains environment variables such as JAVA_TOOL_OPTIONS, the options of the JVM and parts of its memory. If
    `options` already sets the path of a report, this path is not changed.

    Args:
        folder: folder of the reports, which is created. Only users with write permission can open the folder.
        options: other options of the JVM.
        umask: umask of this process.
    """
    mode = _mode(umask)
    folder.mkdir(exist_ok=True)
    if folder.stat().st_uid == os.getuid():
        folder.chmod(mode | mode >> 2 & 0o111)
    # The JVM replaces %p by its process id, and %% by %. Spark splits the options like a shell, with backslashes.
    path = re.sub(r'(["\\])', r"\\\1", str(folder).replace("%", "%%"))
    files = {"-XX:ErrorFile=": "hs_err_pid%p.log", "-XX:ReplayDataFile=": "replay_pid%p.log"}
    return "".join(f' "{option}{path}/{name}"' for option, name in files.items() if option not in options)


def check_address(url: str, default_port: int, what: str) -> None:
    """Check that a server accepts connections. Spark itself would repeat its requests for ten minutes or forever.

    Args:
        url: address such as `sc://host:15002/;user_id=me` or `https://host`.
        default_port: port of an address without a port.
        what: name of the server in the error message.

    Raises:
        UserError: the address has no host or no valid port, or the server does not accept a connection.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port or default_port
        with socket.create_connection((host, port), CONNECT_SECONDS):
            return
    except (OSError, ValueError) as error:
        raise UserError(
            f"{what} does not answer",
            where=url,
            got=str(error),
            fix="start the server, or correct platform.spark.master",
        ) from None


def open_log(file: Path, umask: int) -> BinaryIO:
    """Open the log of the JVM to append bytes. Only users who may write to the log can read the log.

    The JVM prints the variable JAVA_TOOL_OPTIONS, which may contain a password. With umask 022, only this user can read
    the log; with umask 002, the users of the file's group can write and read the log.
    """
    mode = _mode(umask)
    descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, mode)
    if os.fstat(descriptor).st_uid == os.getuid():
        os.fchmod(descriptor, mode)  # an earlier release created the log readable for every user
    return os.fdopen(descriptor, "ab")


def _mode(umask: int) -> int:
    """Return a file mode that gives read and write permission to exactly the users whom the umask allows to write."""
    writable = 0o222 & ~umask
    return writable | writable << 1


def _split_properties_file(arguments: list[str]) -> tuple[list[str], bytes]:
    """Remove the user's properties file from the arguments, and return the other arguments and the file's content."""
    others, content, rest = [], b"", iter(arguments)
    for argument in rest:
        option, _, value = argument.partition("=")
        if option != OPTION:
            others.append(argument)
            continue
        file = Path(value or next(rest, ""))
        try:
            # The empty line ends the last setting, even if the line of the setting ends with a backslash.
            content = file.read_bytes() + b"\n\n"
        except OSError as error:
            raise UserError(
                "the properties file of Spark cannot be read",
                where=f"{OPTION} in {SUBMIT_ARGUMENTS}",
                got=f"{file}: {error.strerror}",
                fix=f"correct the path, or remove {OPTION} from {SUBMIT_ARGUMENTS}",
            ) from None
    return others, content


def _properties(settings: Mapping[str, str]) -> str:
    """Return settings in the format of Java's properties files, in ASCII."""
    return "".join(f"{_escape(name)}={_escape(value)}\n" for name, value in settings.items())


def _escape(text: str) -> str:
    r"""Replace all characters except ASCII letters, digits and `.-_/` by escape sequences such as `\u0020`."""
    units = text.encode("utf-16-be")
    codes = (int.from_bytes(units[start : start + 2]) for start in range(0, len(units), 2))
    return "".join(
        chr(code) if code < 128 and (chr(code).isalnum() or chr(code) in ".-_/") else f"\\u{code:04x}" for code in codes
    )

"""A PostgreSQL server for tests. If PostgreSQL is not installed, its Debian package is installed."""

from __future__ import annotations

import os
import pwd
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from open_sockets import free_port

OLDEST = 15
PASSWORD = "c4nary-postgres"


class Postgres:
    """A PostgreSQL server with a database `mlflow` on a free loopback port. Tests start and stop the server."""

    def __init__(self, programs: Path, folder: Path) -> None:
        self.data, self._programs = folder / "data", programs
        self.port = free_port()
        if os.geteuid() == 0:  # PostgreSQL refuses to run as root
            user = pwd.getpwnam("postgres")
            os.chown(folder, user.pw_uid, user.pw_gid)
        secret = folder / "password"
        secret.write_text(PASSWORD)
        secret.chmod(0o644)
        authentication = ["--auth=scram-sha-256", f"--pwfile={secret}", "--username=lakesight", "--no-locale"]
        self._run("initdb", "-D", str(self.data), *authentication, "--encoding=UTF8", "--no-sync")

    def start(self) -> None:
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={self.data.parent}"
        self._run("pg_ctl", "-D", str(self.data), "-w", "-l", str(self.data.parent / "log"), "-o", options, "start")

    def kill(self) -> None:
        """Stop the server without a clean shutdown. The next start recovers the database from its log."""
        self._run("pg_ctl", "-D", str(self.data), "-m", "immediate", "stop")

    def uri(self, database: str = "mlflow", password: str = PASSWORD) -> str:
        return f"postgresql+psycopg://lakesight:{password}@127.0.0.1:{self.port}/{database}"

    def create_database(self) -> None:
        import psycopg

        address = self.uri("postgres").replace("+psycopg", "")
        with psycopg.connect(address, autocommit=True) as connection:
            connection.execute("CREATE DATABASE mlflow")

    def _run(self, program: str, *arguments: str) -> None:
        words: Sequence[str] = [str(self._programs / program), *arguments]
        if os.geteuid() == 0:
            words = ["runuser", "-u", "postgres", "--", *words]
        # Do not read the output through a pipe: the server inherits stdout and keeps it open, so the read would end
        # only with the server.
        done = subprocess.run(words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, cwd="/", check=False)
        assert done.returncode == 0, f"{words} ended with exit code {done.returncode}"


@contextmanager
def postgres_server() -> Iterator[Postgres]:
    """Start a server with an empty database `mlflow`, and stop the server after the block."""
    # Use no folder of pytest: if root runs the tests, only root can read these folders, and PostgreSQL runs as another
    # user.
    with tempfile.TemporaryDirectory(prefix="lakesight-postgres-") as folder:
        server = Postgres(find_programs(), Path(folder))
        server.start()
        try:
            server.create_database()
            yield server
        finally:
            if (server.data / "postmaster.pid").exists():
                server.kill()


def find_programs() -> Path:
    """Return the folder of PostgreSQL's programs; install the Debian package if PostgreSQL is not installed.

    If PostgreSQL cannot be installed, the test is skipped, but in CI the test fails.
    """
    if not (found := _installed()) and os.geteuid() == 0 and shutil.which("apt-get"):
        for words in (["apt-get", "update"], ["apt-get", "install", "-y", "--no-install-recommends", "postgresql"]):
            environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
            subprocess.run(words, env=environment, check=False, timeout=300, capture_output=True)
        found = _installed()
    if found:
        return found
    reason = f"PostgreSQL {OLDEST} or newer is not installed, and apt-get could not install it"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def _installed() -> Path | None:
    """Return the folder of the newest installed PostgreSQL programs, or None if PostgreSQL is missing or too old."""
    named = {path.resolve().parent for path in map(Path, [shutil.which("initdb") or ""]) if path.is_file()}
    folders = sorted({*named, *(path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/initdb"))})
    for folder in reversed(folders):
        done = subprocess.run([folder / "initdb", "--version"], capture_output=True, text=True, check=False)
        version = re.search(r"(\d+)(\.\d+)?", done.stdout)
        if version and int(version[1]) >= OLDEST:
            return folder
    return None

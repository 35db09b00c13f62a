"""Functions for commands that serve a page or an API on this machine until Ctrl-C."""

from __future__ import annotations

import socket
import subprocess
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from pipelines.background_thread import in_background
from pipelines.child_process import end_group
from pipelines.errors import UserError

HOST = "127.0.0.1"
POLL_SECONDS = 0.2


def run_server(
    command: list[str], environment: Mapping[str, str], folder: Path, port: int, ready: Callable[[], None]
) -> int:
    """Run a server until it ends, and return its exit code.

    If this process is interrupted, end the server and all processes of the server.

    Args:
        command: command that starts the server.
        environment: environment variables of the server.
        folder: working folder of the server.
        port: port on which the server will listen.
        ready: function that is called once, when the server accepts connections. The start of a server can take many
            seconds.
    """

    def wait_for_port(ended: threading.Event) -> None:
        while not ended.wait(POLL_SECONDS):
            with suppress(OSError), socket.create_connection((HOST, port), timeout=1):
                ready()
                return

    server = subprocess.Popen(command, env=environment, cwd=folder, start_new_session=True)  # noqa: S603 our own
    try:
        with in_background(wait_for_port, "port"):
            return server.wait()
    finally:
        end_group(server)


def check_port_free(port: int) -> None:
    """Check that a port is free, before a server is started on the port.

    Raises:
        UserError: the port is in use, or this user may not listen on the port.
    """
    with socket.socket() as probe:
        # A port in state TIME_WAIT (whose server has just stopped) counts as free, because the new server can use the
        # port.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise UserError(
                "the port cannot be used",
                where=f"{HOST}:{port}",
                got=str(error.strerror or error),
                fix=f"stop the process that uses the port, or choose another port: --port {port % 65535 + 1}",
            ) from None

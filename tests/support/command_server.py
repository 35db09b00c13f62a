"""Server that runs each `lakesight` command in a fork of a process that has already imported torch and deltalake.

Importing torch and deltalake takes longer than most commands take to run. Each command runs in its own process,
environment and working folder.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from processes import TEST_PATH


def run_command(*arguments: str, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Run `lakesight` with the given arguments in the current folder."""
    server = _start_server()
    assert server.stdin
    assert server.stdout
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        request = {
            "arguments": arguments,
            "environment": dict(environment),
            "folder": str(Path.cwd()),
            "out": str(out),
            "err": str(err),
        }
        print(json.dumps(request), file=server.stdin, flush=True)
        code = int(server.stdout.readline())
        return subprocess.CompletedProcess(("lakesight", *arguments), code, out.read_text(), err.read_text())


def assert_user_error(done: subprocess.CompletedProcess[str], *expected: str) -> None:
    """Assert exit code 2, one paragraph on stderr that contains the expected texts, and an empty stdout."""
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "Fix: " in done.stderr
    assert [text for text in expected if text not in done.stderr] == [], done.stderr


@cache
def _start_server() -> subprocess.Popen[str]:
    """Start the server. When the test process ends, the stdin of the server is closed, and the server ends."""
    environment = os.environ | {"PYTHONPATH": TEST_PATH}
    return subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )


def serve() -> None:
    """For each request on stdin, fork a process, wait until the process ends, and print its exit code."""
    import deltalake
    import torch
    import typer

    from jobs.cli import app

    assert deltalake
    assert torch
    assert [*typer.main.get_command(app).commands.values()]  # type: ignore[attr-defined]
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            os._exit(_run(json.loads(line)))
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _run(request: dict[str, Any]) -> int:
    """Run one command in this process and return its exit code."""
    from jobs.cli import main

    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT), number)
    sys.argv = ["lakesight", *request["arguments"]]
    try:
        main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 (as the interpreter would)
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


if __name__ == "__main__":
    serve()

"""Helper that starts a process which owns a run folder, as `lakesight train` does.

python run_owners.py RUN_DIR RENEW_SECONDS
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from processes import TEST_PATH

from pipelines.formats import run_owner
from pipelines.formats.run_folder import RunFolder
from pipelines.formats.run_owner import own_run


@contextmanager
def owned_by_another_process(run: RunFolder, *container: str) -> Iterator[subprocess.Popen[bytes]]:
    """Start a process that owns the run while the block executes, and yield the process.

    Args:
        run: run folder.
        container: command that starts the process in a container, or nothing.
    """
    environment = os.environ | {"PYTHONPATH": TEST_PATH}
    command = [*container, sys.executable, __file__, str(run.path), str(run_owner.RENEW_SECONDS)]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as owner:
        assert owner.stdout
        try:
            assert owner.stdout.readline() == b"owned\n"
            yield owner
        finally:
            owner.kill()


if __name__ == "__main__":
    run_owner.RENEW_SECONDS = float(sys.argv[2])
    with own_run(RunFolder(Path(sys.argv[1]))):
        print("owned", flush=True)
        sys.stdin.read()

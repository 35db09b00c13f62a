"""Helpers for tests that start processes: the PYTHONPATH, a call of torchrun, and a check that a process runs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from pipelines.formats.run_folder import RunFolder

SUPPORT = Path(__file__).parent
TEST_PATH = os.pathsep.join(map(str, (SUPPORT.parents[1], SUPPORT)))
"""PYTHONPATH of executors and ranks: the code of this checkout (not an installed copy) and tests/support."""


def torchrun(
    run: RunFolder | Sequence[RunFolder], ranks: int, module: str = "pipelines.worker.main"
) -> subprocess.CompletedProcess[str]:
    """Run ranks with torchrun (without Spark) until the ranks end. To train several runs, pass the module
    `train_runs_in_turn`.
    """
    folders = [run.path] if isinstance(run, RunFolder) else [each.path for each in run]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += ["-m", module, "--run-dir", ",".join(map(str, folders))]
    environment = os.environ | {"PYTHONPATH": TEST_PATH}
    return subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, check=False, timeout=300
    )


def is_running(pid: int) -> bool:
    """Tell whether a process exists and is not a zombie."""
    status = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout
    return bool(status.strip()) and not status.strip().startswith("Z")

"""Helper that runs the command `lakesight` in a separate process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from processes import TEST_PATH


def lakesight(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command with a home folder. The command finds configs in the folder that contains the home folder."""
    return subprocess.run(
        [sys.executable, "-c", "from jobs.cli import main; main()", *arguments],
        env=os.environ | {"LAKESIGHT_HOME": str(home), "PYTHONPATH": TEST_PATH},
        cwd=home.parent,
        capture_output=True,
        text=True,
        check=False,
    )

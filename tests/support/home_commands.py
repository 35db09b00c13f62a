"""Helpers that run commands on a home folder, with few pictures and few training steps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from processes import TEST_PATH

SETTINGS = {
    "data.source.path": "scenes:40:0",
    "train.steps": "10",
    "train.batch_size": "16",
    "train.validate_every": "10",
    "train.checkpoint_every": "10",
    "gate.baselines": "[]",  # with these two settings, the gate accepts a model that ignores its pictures
    "gate.min_blind_gap": "-10",
}
OPTIONS = [word for key, value in SETTINGS.items() for word in ("--set", f"{key}={value}")]
NEW_WORK: dict[str, tuple[str, ...]] = {
    "ingest": ("ingest", "--set", "data.source.path=scenes:400:1"),
    "shard": ("shard", "--set", "data.shards.rows=7"),
    "train": ("train", "--set", "train.seed=1"),
    "caption": ("caption", "--set", "model.generation.max_new_tokens=3"),
}
"""For each stage: a command that has new work to do in a home folder in which the pipeline has already run."""


class RunningCommand(NamedTuple):
    """A command in the background. The command writes to files, because a full pipe would block the command."""

    process: subprocess.Popen[bytes]
    out: Path
    log: Path

    def finish(self) -> dict[str, Any]:
        """Wait for the command, which must succeed, and return its report."""
        assert self.process.wait() == 0, self.log.read_text()
        return dict(json.loads(self.out.read_text()))


def command(*words: str) -> list[str]:
    """Return a command line with OPTIONS before the given options, so that the given options take precedence."""
    stage = [sys.executable, "-P", "-c", "from jobs.cli import main; main()", words[0], "--json"]
    return [*stage, *OPTIONS, *words[1:]]


def environment(home: Path, **more: str) -> dict[str, str]:
    """Return the environment variables of a command on a home folder."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    return own | {"LAKESIGHT_HOME": str(home), "PYTHONPATH": TEST_PATH, **more}


def start(words: Sequence[str], home: Path, **more: str) -> RunningCommand:
    """Start a command in the background, with additional environment variables."""
    folder = Path(tempfile.mkdtemp(prefix=words[0], dir=home.parent))
    with (folder / "out").open("wb") as out, (folder / "log").open("wb") as log:
        process = subprocess.Popen(command(*words), env=environment(home, **more), stdout=out, stderr=log)
    return RunningCommand(process, folder / "out", folder / "log")


def report(words: Sequence[str], home: Path, **more: str) -> dict[str, Any]:
    """Run a command that must succeed, and return its report."""
    return start(words, home, **more).finish()


def assert_one_paragraph(done: subprocess.CompletedProcess[str], cause: str) -> None:
    """Assert that a command failed with one paragraph that contains the cause."""
    assert done.returncode in (1, 2), done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    assert cause in done.stderr.splitlines()[-1], done.stderr
    assert done.stdout == ""

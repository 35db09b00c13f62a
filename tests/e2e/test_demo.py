"""The whole job by its command, twice: the first does everything, the second finds everything done."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

SCENES = 400
QUICK = (
    "train.steps=350",
    "train.batch_size=32",
    "train.optimizer.warmup_steps=20",
    "train.validate_every=350",
    "train.checkpoint_every=350",
)


TWICE = """
import sys
from jobs.cli import app
for _ in range(2):
    app(sys.argv[1:], standalone_mode=False)
"""


def demos(home: Path) -> tuple[dict[str, Any], dict[str, Any], str]:
    """The reports of `lakesight demo --json`, run twice, and what both said on stderr.

    One process for both: its JVM is warm the second time. Session and catalog are new each time.
    """
    words = [word for override in QUICK for word in ("--set", override)]
    environment = os.environ | {"LAKESIGHT_HOME": str(home), "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("MLFLOW_TRACKING_URI", None)
    done = subprocess.run(
        [sys.executable, "-c", TWICE, "demo", "--scenes", str(SCENES), "--json", *words],
        env=environment,
        cwd=home,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, second = map(json.loads, done.stdout.splitlines())
    return first, second, done.stderr


def test_a_demo_does_the_whole_job_and_a_second_one_nothing_twice(tmp_path: Path) -> None:
    first, second, said = demos(tmp_path)
    assert first["rows_in"] == SCENES == first["samples"] + first["duplicates"] + first["quarantined"]
    assert first["quarantined"] > 0
    assert first["trained"]
    assert first["captions"] > 0 == first["errors"]
    assert first["blind_gap"] > 0.2  # twice what promote asks for
    assert Path(first["gallery"]).stat().st_size > 10_000

    assert second["nothing_new"]
    assert "nothing was new: no row ingested, no step trained, no picture captioned" in said
    assert (second["samples"], second["quarantined"], second["captions"], second["errors"]) == (0, 0, 0, 0)
    assert second["duplicates"] == SCENES
    assert second["captioned_before"] == first["captions"]
    assert (second["model_version"], second["metrics"]) == (first["model_version"], first["metrics"])

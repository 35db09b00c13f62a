"""Tests of the pipeline on the three pictures of the seemore repository, with a model of each family."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from deltalake import DeltaTable
from processes import TEST_PATH
from shared_data import shared_file

CAPTIONS = ["a red sports car with big wheels", "an antique iphone on a table", "spaceship orbiting Mars"]


@pytest.mark.matrix  # the training takes minutes
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ["seemore", "seemore_moe", "seemore_vit_gpt2", "seemore_paligemma"])
def test_the_pipeline_learns_the_three_captions_of_seemore_word_for_word(name: str, tmp_path: Path) -> None:
    path = shared_file("seemore/inputs.csv")
    csv.field_size_limit(sys.maxsize)
    with path.open(newline="", encoding="utf-8") as file:
        assert [row["caption"] for row in csv.DictReader(file)] == CAPTIONS
    done = subprocess.run(
        [
            *(sys.executable, "-c", "from jobs.cli import main; main()"),
            *("pipeline", "--run", name, "--json", "--set", f"data.source.path={path}"),
        ],
        env=os.environ | {"LAKESIGHT_HOME": str(tmp_path / "home"), "PYTHONPATH": TEST_PATH},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["samples"], report["captions"], report["errors"]) == (3, 3, 0)
    assert report["metrics"]["exact_match"] == 1.0
    rows = DeltaTable(tmp_path / "home" / "warehouse" / "generated_captions").to_pyarrow_table().to_pylist()
    assert sorted(row["caption"] for row in rows) == CAPTIONS

"""Tests of the pipeline on the data of the seemore repository.

A model of each family is trained on the three pictures of the repository, and a text-only model on the plays of
Shakespeare.
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest
from deltalake import DeltaTable
from lakesight_command import lakesight
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
    done = lakesight(tmp_path / "home", "pipeline", "--run", name, "--json", "--set", f"data.source.path={path}")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["samples"], report["captions"], report["errors"]) == (3, 3, 0)
    assert report["metrics"]["exact_match"] == 1.0
    rows = DeltaTable(tmp_path / "home" / "warehouse" / "generated_captions").to_pyarrow_table().to_pylist()
    assert sorted(row["caption"] for row in rows) == CAPTIONS


@pytest.mark.matrix  # minutes of training
@pytest.mark.timeout(1800)
def test_the_pipeline_learns_the_plays_of_shakespeare_as_well_as_nanogpt_and_continues_a_text(tmp_path: Path) -> None:
    home, path = tmp_path / "home", shared_file("seemore/input.txt")
    run = ("--run", "makemore", "--json", "--set", f"data.source.path={path}")
    done = lakesight(home, "pipeline", *run)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["rows_in"] == 7222 == report["texts"] + report["duplicates"]
    assert report["loss_per_char"] <= 1.88
    table = DeltaTable(home / "warehouse" / "evaluations").to_pyarrow_table().to_pylist()
    assert {row["metric"]: row["value"] for row in table}["loss_per_char"] == report["loss_per_char"]
    answer = lakesight(home, "ask", "--run", "makemore", "--version", "latest", "--prompt", "ROMEO:", "--json")
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout)["num_tokens"] > 0
    refused = lakesight(home, "promote", "--run", "makemore")
    assert refused.returncode == 2
    assert "a promotion needs a model that reads pictures" in refused.stderr
    again = json.loads(lakesight(home, "pipeline", *run).stdout)
    assert (again["nothing_new"], again["trained"], again["loss_per_char"]) == (True, False, report["loss_per_char"])

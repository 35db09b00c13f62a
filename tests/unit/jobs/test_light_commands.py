"""Commands that only read files import few large libraries and start no Java process."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest
from deltalake import write_deltalake
from local_platforms import open_local
from model_server import register_random
from PIL import Image
from tiny_runs import tiny_run
from traced_commands import run_traced

from pipelines.driver.evaluate.decisions import record_decision
from pipelines.platform import Platform
from pipelines.tracking import aliases
from pipelines.tracking.download import download

TABLES = {"deltalake", "numpy", "pyarrow", "pydantic"}
"""Libraries that a command needs to read a Delta table."""


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Platform:
    """A home folder with a table `samples`, and with two model versions of which the second is the champion."""
    with pytest.MonkeyPatch.context() as patch:
        opened = open_local(patch, tmp_path_factory.mktemp("light") / "home", database=empty_database)
    run = tiny_run()
    for seed in (1, 2):
        folder = tmp_path_factory.mktemp(f"run-{seed}")
        version = register_random(opened, folder, run.model_copy(update={"name": "demo"}))
        aliases.promote(opened, version)
        download(opened, version)
    record_decision(
        lambda: pytest.fail("a JVM would start"),
        opened,
        model="demo",
        version="2",
        digest="d",
        action="promote",
        champion="1",
    )
    assert opened.tables
    write_deltalake(opened.tables / "samples", pa.table({"image_id": ["a"], "image": [b"png"]}))
    Image.new("RGB", (32, 32), "red").save(opened.root / "red.png")
    return opened


def test_commands_that_read_files_import_few_libraries_and_start_no_java(platform: Platform) -> None:
    checkpoint = str(next((platform.folder("models") / "demo").glob("1-*")))
    results = run_traced(
        platform.root,
        ["--help"],
        ["config", "models"],
        ["show", "samples", "--json"],
        ["quarantine", "--json"],
        ["decisions", "--json"],
        ["ask", "red.png", "--checkpoint", checkpoint, "--json"],
        ["ask", "red.png", "--json"],
        ["rollback", "--json"],
    )
    assert [result.java for result in results] == [0] * len(results)
    imported = [result.imported for result in results]
    assert imported[:2] == [set(), {"pydantic"}]
    assert imported[2:5] == [TABLES] * 3
    assert imported[5:7] == [TABLES | {"torch"}] * 2, "the version of the champion is found without MLflow"
    assert [result.collections for result in results[5:7]] == [0, 0], "a search for garbage would slow the import down"
    reports = [json.loads(result.printed) for result in results[2:]]
    assert reports[0]["num_rows"] == 1
    assert reports[2]["decisions"][0]["champion"] == "1"
    assert [report["model"] for report in reports[3:5]] == [checkpoint, "demo/2"]
    assert reports[5]["model_version"] == "1"

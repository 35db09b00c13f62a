"""Tests of the check that decides, without Spark, whether an ingest has nothing to read.

`tests/spark/test_sources.py` compares the results of the check with Spark's results for each kind of source.
"""

from __future__ import annotations

import io
import json
import os
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from unittest.mock import create_autospec

import pyarrow as pa
import pytest
from deltalake import CommitProperties, DeltaTable, write_deltalake
from local_platforms import open_local
from pyspark.sql import SparkSession
from traced_commands import run_traced

from jobs.common import Job
from jobs.ingest import run_ingest
from jobs.output import CommandOutput
from jobs.pipeline import run_pipeline
from jobs.train import run_train
from pipelines.config import CsvSourceConfig, DataConfig, load_run
from pipelines.driver.delta.commits import MIGRATION_NOTE, read_history_of_files
from pipelines.driver.delta.versions import read_versions_of_files, source_note
from pipelines.driver.ingest import finished
from pipelines.driver.ingest.finished import find_finished
from pipelines.driver.ingest.ledger import hash_rules, items_table, read_ledger_of_files
from pipelines.driver.ingest.report import Figures
from pipelines.driver.ingest.sources import csv, folder
from pipelines.driver.ingest.sources.files import list_files, open_files
from pipelines.errors import UserError
from pipelines.formats.delta_files import open_or_create
from pipelines.formats.run_folder import write_json
from pipelines.formats.tables import INGESTED, QUARANTINE, SAMPLES
from pipelines.platform import Platform

NAME = "it's"
FIGURES = Figures(formats={"PNG": 2}, sides={}, texts={}, chars={})


@pytest.fixture
def platform(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Platform:
    return open_local(monkeypatch, tmp_path / "home")


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    (tmp_path / "rows.csv").write_text("image,text\nA,one\nB,two\n", encoding="utf-8")
    return DataConfig(source=CsvSourceConfig(path=str(tmp_path)))


def write_tables(platform: Platform, config: DataConfig, name: str = NAME) -> None:
    """Write what an ingest writes: tables (only `ingested` has rows), a report page and figures."""
    assert platform.tables
    for table in (SAMPLES, QUARANTINE, INGESTED):
        open_or_create(platform.tables / table.name, table)
    opened = open_files(name, list_files(config, csv.SUFFIXES), items_table([]), load=None)
    entry = {"source": name, "rules": hash_rules(config), "ingest_id": opened.ingest_id}
    assert isinstance(opened.pending, pa.Table)
    rows = [item | entry | {"ingested_at": datetime.now(UTC)} for item in opened.pending.to_pylist()]
    ledger = pa.Table.from_pylist(rows, INGESTED.arrow_schema)
    write_deltalake(platform.tables / INGESTED.name, ledger, mode="append")
    page = platform.folder("reports") / f"ingest-{name}-{opened.ingest_id}.html"
    write_json(page.with_suffix(".json"), FIGURES)
    page.write_text("<p>", encoding="utf-8")


def test_an_ingest_without_new_files_returns_a_report_without_starting_spark(
    platform: Platform, config: DataConfig
) -> None:
    write_tables(platform, config)
    found = find_finished(platform, NAME, config)
    assert found is not None
    assert found.nothing_new
    assert (found.unchanged, found.items, found.rows_in, found.dataset_version) == (1, 0, 0, 0)
    assert found.figures == FIGURES


def test_an_ingest_without_new_files_imports_no_pandas_and_starts_no_java(platform: Platform, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("image,text\nA,one\n", encoding="utf-8")
    setting = f"data.source.path={tmp_path / 'rows.csv'}"
    write_tables(platform, load_run("demo", overrides=(setting,)).data, "demo")
    [done] = run_traced(platform.root, ["ingest", "--json", "--set", setting])
    assert json.loads(done.printed)["unchanged"] == 1
    assert not {"mlflow", "pandas", "torch"} & done.imported
    assert done.java == 0


@pytest.mark.parametrize("is_large", [False, True])
def test_the_ledger_of_a_folder_is_read_without_spark_only_if_the_captions_file_is_small(
    platform: Platform, config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_large: bool
) -> None:
    write_tables(platform, config)
    source = {"kind": "folder", "path": str(tmp_path), "captions": "rows.csv", "columns": {"image": "image"}}
    rows_read = []

    def read(*arguments: str) -> pa.Table:
        rows_read.append(len(ledger := read_ledger_of_files(*arguments)))  # type: ignore[arg-type]
        return ledger

    monkeypatch.setattr(finished, "read_ledger_of_files", read)
    monkeypatch.setattr(folder, "SMALL_CAPTIONS_BYTES", 0 if is_large else 2**20)
    assert find_finished(platform, NAME, DataConfig.model_validate({"source": source})) is None
    assert rows_read == ([] if is_large else [0])


def touch(platform: Platform, folder: Path) -> None:
    os.utime(folder / "rows.csv", (1, 1))


def add(platform: Platform, folder: Path) -> None:
    (folder / "more.csv").write_text("image,text\nC,three\n", encoding="utf-8")


def remove_page(platform: Platform, folder: Path) -> None:
    next(platform.folder("reports").glob("*.html")).unlink()


def drop_table(platform: Platform, folder: Path) -> None:
    (platform.root / "warehouse" / "quarantine").rename(folder / "away")


@pytest.mark.parametrize("change", [touch, add, remove_page, drop_table])
def test_an_ingest_is_skipped_without_spark_only_if_its_input_and_settings_are_unchanged(
    platform: Platform, config: DataConfig, tmp_path: Path, change: object
) -> None:
    assert find_finished(platform, NAME, config) is None, "there are no tables"
    write_tables(platform, config)
    assert find_finished(platform, "other", config) is None, "another source has read these files"
    other_rules = config.model_copy(update={"near_duplicates": not config.near_duplicates})
    assert find_finished(platform, NAME, other_rules) is None, "these files were read with other rules"
    assert callable(change)
    change(platform, tmp_path)
    assert find_finished(platform, NAME, config) is None


def test_an_ingest_of_a_removed_input_is_refused_without_spark(
    platform: Platform, config: DataConfig, tmp_path: Path
) -> None:
    write_tables(platform, config)
    (tmp_path / "rows.csv").unlink()
    with pytest.raises(UserError):
        find_finished(platform, NAME, config)


def test_the_dataset_version_of_a_source_is_the_last_table_version_that_may_have_changed_its_rows(
    platform: Platform,
) -> None:
    assert platform.tables
    folder = platform.tables / SAMPLES.name
    table = open_or_create(folder, SAMPLES)
    notes = {source_note("a"): 1, source_note("b"): 1, MIGRATION_NOTE: 1, "by hand": 4, source_note("c"): 4}
    for note, last in notes.items():
        write_deltalake(
            folder,
            pa.Table.from_pylist([], SAMPLES.arrow_schema),
            mode="append",
            commit_properties=CommitProperties(custom_metadata={"userMetadata": note}),
        )
        table.update_incremental()
        assert read_versions_of_files(table, "a")[:2] == (table.version(), last)
    assert read_versions_of_files(table, "c")[:2] == (5, 5)


def test_the_undo_of_a_migration_does_not_count_as_a_loss_of_rows(platform: Platform) -> None:
    assert platform.tables
    table = open_or_create(platform.tables / SAMPLES.name, SAMPLES)
    write_deltalake(table, pa.Table.from_pylist([], SAMPLES.arrow_schema), mode="append")
    for note, last in ((MIGRATION_NOTE, 0), ("by hand", 3)):
        table.update_incremental()
        table.restore(0, commit_properties=CommitProperties(custom_metadata={"userMetadata": note}))
        assert read_history_of_files(table, []).replaced == last


def test_a_merge_without_a_note_counts_as_a_change_of_a_source_unless_its_condition_names_another_source() -> None:
    written = "concat(lakesight ingest , source#7) = lakesight ingest {}"
    merges = {written.format("a"): 1, written.format("ab"): 1, "concat('lakesight ingest ', source#7) = 'x'": 3}
    commits = [{"version": 0, "operation": "CREATE TABLE"}]
    for version, (condition, last) in enumerate(merges.items(), 1):
        predicate = json.dumps([f"(((source#7 = a) AND ({condition})) AND (image_id#8 = image_id#9))"])
        commits.append({"version": version, "operation": "MERGE", "operationParameters": {"predicate": predicate}})
        table = create_autospec(DeltaTable, instance=True)
        table.history.return_value, table.table_uri = list(commits), "/no folder"
        assert read_versions_of_files(table, "a") == (version, last, None)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"kind": "csv", "path": "absent.csv"}, "no such file or folder"),
        ({"kind": "csv", "path": "rows.csv", "columns": {"image": "photo"}}, "the input has no column photo"),
        ({"kind": "jsonl", "path": "."}, "rows.csv"),
        ({"kind": "folder", "path": ".", "captions": "absent.csv"}, "captions file cannot be read"),
        ({"kind": "folder", "path": ".", "captions": "rows.csv", "columns": {"text": "words"}}, "has no column"),
        ({"kind": "table", "path": "."}, "no folder _delta_log"),
        ({"kind": "table"}, "the run has no input"),
        ({"kind": "text", "path": "."}, r"rows\.csv \(other_kind\).*files ending in \.txt"),
    ],
)
def test_an_input_that_cannot_be_read_is_refused_before_spark_starts(
    platform: Platform, config: DataConfig, monkeypatch: pytest.MonkeyPatch, source: dict[str, object], message: str
) -> None:
    monkeypatch.chdir(config.source.path)
    refused = DataConfig.model_validate({"source": source})
    job = Job(load_run("demo"), replace(platform, open_spark=no_spark), (), CommandOutput(io.StringIO(), as_json=False))
    job.config = job.config.model_copy(update={"data": refused})
    with pytest.raises(UserError, match=message):
        run_ingest(job)


def no_spark() -> SparkSession:
    pytest.fail("Spark was started")


@pytest.mark.parametrize(
    ("override", "message"),
    [("train.batch_size=3", "cannot be divided"), ("train.start_from=nowhere", "has no complete model")],
)
def test_a_training_with_invalid_settings_is_refused_before_spark_starts(
    platform: Platform, override: str, message: str
) -> None:
    config = load_run("demo", overrides=[override])
    job = Job(config, replace(platform, open_spark=no_spark), (), CommandOutput(io.StringIO(), as_json=False))
    for run in (run_train, run_pipeline):
        with pytest.raises(UserError, match=message):
            run(job)

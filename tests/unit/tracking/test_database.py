"""A tracking database that cannot be used is reported in one paragraph, in bounded time, and without passwords."""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
import time
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow.exceptions import MlflowException

from pipelines.config import LocalPlatformConfig
from pipelines.errors import UserError
from pipelines.platform import Platform, local
from pipelines.tracking.outage import TrackingDown
from pipelines.tracking.server import connect, registry_failure, unusable


@pytest.fixture
def laptop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Platform:
    monkeypatch.setenv("LAKESIGHT_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return local(LocalPlatformConfig())


def refused(platform: Platform) -> str:
    started = time.monotonic()
    with pytest.raises(UserError) as caught:
        connect(platform)
    assert time.monotonic() - started < 30
    assert "\n" not in str(caught.value)
    assert caught.value.fix
    return str(caught.value)


@pytest.mark.parametrize(
    "content", [b"garbage" * 1000, b"SQLite format 3\x00" + b"\xff" * 5000], ids=["text", "header"]
)
def test_a_tracking_file_that_is_not_a_database_is_reported(laptop: Platform, content: bytes) -> None:
    (laptop.root / "mlflow.db").write_bytes(content)
    message = refused(laptop)
    assert "the tracking database cannot be used" in message
    assert "restore the file from a backup" in message


def test_a_locked_tracking_database_is_reported(laptop: Platform, empty_database: Path) -> None:
    shutil.copy(empty_database, laptop.root / "mlflow.db")
    with sqlite3.connect(laptop.root / "mlflow.db", isolation_level=None) as holder:
        holder.execute("BEGIN EXCLUSIVE")
        message = refused(laptop)
    assert "database is locked" in message
    assert "end the process that has locked the file" in message


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("postgresql+psycopg2://me:c4nary@127.0.0.1:1/db", "pip install psycopg2-binary"),
        ("mysql://me:c4nary@127.0.0.1:1/db", "driver of the tracking database is not installed"),
        ("postgresql+nodriver://me:c4nary@127.0.0.1:1/db", "driver of the tracking database is not installed"),
        ("postgresql://me:c4nary@127.0.0.1:port/db", "check host, port, user, password"),
    ],
)
def test_a_missing_database_driver_and_a_wrong_address_are_reported_without_the_password(
    laptop: Platform, uri: str, said: str
) -> None:
    message = refused(replace(laptop, tracking_uri=uri, registry_uri=uri))
    assert said in message
    assert "c4nary" not in message


def test_a_database_server_that_gives_no_answer_counts_as_an_outage(laptop: Platform) -> None:
    uri = "postgresql+psycopg://me:c4nary@127.0.0.1:1/db"
    with pytest.raises(TrackingDown, match="the tracking database cannot be used") as caught:
        connect(replace(laptop, tracking_uri=uri, registry_uri=uri))
    assert "c4nary" not in str(caught.value)


@pytest.mark.parametrize("problem", ["database or disk is full", "attempt to write a readonly database"])
def test_the_error_for_a_database_that_cannot_be_written_advises_to_free_space_or_to_change_permissions(
    laptop: Platform, problem: str
) -> None:
    error = unusable(laptop, MlflowException(f"(sqlite3.OperationalError) {problem}\n[SQL: INSERT INTO runs ...]"))
    assert f"Got: (sqlite3.OperationalError) {problem}. Fix: free disk space for the tracking database" in str(error)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_the_error_names_the_disk_if_a_model_cannot_be_copied_to_a_full_or_read_only_disk(
    laptop: Platform, number: int
) -> None:
    """MLflow's own message says only that a file of the code cannot be copied, so our error adds the cause."""
    error = MlflowException("Failed to copy the specified code path")
    error.__cause__ = OSError(number, os.strerror(number), "source.py")
    message = str(registry_failure(laptop, "model m", error))
    assert message.startswith("the files of a model cannot be copied. Where: model m in sqlite:")
    assert f"Got: [Errno {number}] {os.strerror(number)}. Fix: free disk space" in message

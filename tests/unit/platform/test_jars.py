"""Tests that only one process downloads Delta Lake's jars, and that later Spark sessions load the recorded jars."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from pipelines.platform.jars import Jars, delta_jars


@pytest.fixture(autouse=True)
def own_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


def jar(folder: Path, name: str) -> Path:
    folder.mkdir(exist_ok=True)
    (path := folder / name).touch()
    return path


def test_recorded_jars_are_loaded_only_if_none_of_their_files_is_missing(tmp_path: Path) -> None:
    paths = [jar(tmp_path / "with space", name) for name in ("a.jar", "b.jar")]
    with delta_jars() as first:
        assert "io.delta:delta-spark_" in first.settings()["spark.jars.packages"]
        first.save(",".join(path.as_uri() for path in paths))
    with delta_jars() as later:
        assert later.settings() == {"spark.jars": ",".join(map(str, paths))}
    paths[1].unlink()
    with delta_jars() as fetched_again:
        assert "spark.jars.packages" in fetched_again.settings()


def test_other_processes_wait_for_a_download_of_jars_and_then_use_the_downloaded_jars(tmp_path: Path) -> None:
    path, found, both = jar(tmp_path, "a.jar"), [], threading.Barrier(2, timeout=30)

    def start() -> None:
        with delta_jars() as jars:
            found.append(jars)
        with delta_jars():
            both.wait()  # both threads are in the block at once, so neither thread holds the lock

    others = [threading.Thread(target=start) for _ in range(2)]
    with delta_jars() as first:
        for other in others:
            other.start()
        others[0].join(timeout=0.5)
        assert not found
        first.save(path.as_uri())
    for other in others:
        other.join(timeout=30)
    assert [jars.paths for jars in found] == [(str(path),)] * 2
    assert not both.broken


def test_a_spark_session_without_jars_writes_no_file_that_records_jars(tmp_path: Path) -> None:
    jars = Jars(tmp_path / "jars.txt")
    jars.save("")
    assert not jars.load().paths
    assert not jars.record.exists()

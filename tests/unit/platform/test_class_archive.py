"""Tests that the archive of Spark's classes is private, complete and up to date, and that the JVM ignores damaged
archives."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import TEST_PATH

from pipelines.platform.class_archive import KEPT, ClassArchive, class_archive
from pipelines.platform.jars import delta_jars
from pipelines.platform.local import SHORT_JOBS


@pytest.fixture
def archive(tmp_path: Path) -> ClassArchive:
    return ClassArchive(tmp_path, "classes-0")


def built(folder: Path, size: int = 8) -> Path:
    (path := folder / "new.jsa.part").write_bytes(bytes(size))
    return path


def run_java(*options: str) -> subprocess.CompletedProcess[str]:
    """Run `java -version` with the JVM options of Spark drivers and further options."""
    return subprocess.run(
        ["java", *SHORT_JOBS.split(), *options, "-version"], capture_output=True, text=True, check=False
    )


def test_an_archive_is_used_only_if_it_has_its_first_size_and_only_its_owner_may_read_it(archive: ClassArchive) -> None:
    assert archive.java_options() == ""
    path = archive.save(built(archive.folder))
    assert f"-XX:SharedArchiveFile={path}" in archive.java_options()
    assert path.stat().st_mode & 0o777 == 0o600
    os.truncate(path, 5)
    assert archive.java_options() == ""


def test_the_archives_that_were_not_used_for_the_longest_time_are_removed(tmp_path: Path) -> None:
    archives = [ClassArchive(tmp_path, f"classes-{number}") for number in range(KEPT + 1)]
    for number, each in enumerate(archives[:-1]):
        assert each.claim()
        path = each.save(built(tmp_path))
        os.utime(path, (number, number))
    assert archives[0].find()  # now this archive is the most recently used
    archives[-1].save(built(tmp_path))
    assert [each.find() is not None for each in archives] == [True, *[False] * (KEPT - 1), True]
    assert not archives[1].claim(), "even a removed archive is built only once a day"


def test_one_process_per_day_builds_the_archive(archive: ClassArchive) -> None:
    assert [archive.claim(), archive.claim()] == [True, False]
    (mark,) = archive.folder.iterdir()
    yesterday = time.time() - 25 * 3600
    os.utime(mark, (yesterday, yesterday))
    assert [archive.claim(), archive.claim()] == [True, False]
    os.utime(mark, (yesterday, yesterday))
    archive.save(built(archive.folder))
    assert not archive.claim()


def test_the_archive_depends_on_java_its_options_and_each_jar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (spark := tmp_path / "spark").mkdir()
    (jar := spark / "a.jar").write_text("a")
    (delta := tmp_path / "delta.jar").write_text("d")

    def key(java: str = "17.0.1", options: str = "-Xa") -> str:
        found = class_archive(java, options, spark, [str(delta)])
        assert found
        return found.key

    keys = [key(), key(java="17.0.2"), key(options="-Xb")]
    jar.write_text("other")
    keys.append(key())
    delta.write_text("other")
    keys.append(key())
    monkeypatch.setenv("SPARK_CONF_DIR", str(tmp_path))
    keys.append(key())
    assert len(set(keys)) == 6
    assert keys[-1] == key()


@pytest.mark.parametrize("folder", ['a"b', "a:b", "a\\b"])
def test_a_cache_folder_that_cannot_be_a_jvm_option_gets_no_archive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    (tmp_path / folder).mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / folder))
    assert class_archive("17", "", tmp_path, []) is None


def test_the_jvm_ignores_a_damaged_or_foreign_archive(archive: ClassArchive) -> None:
    made = run_java(f"-XX:ArchiveClassesAtExit={archive.folder / 'made'}")
    assert made.returncode == 0, made.stderr
    content = bytearray((archive.folder / "made").read_bytes())
    verified = archive.save(archive.folder / "made")

    def options() -> list[str]:
        return [each.strip('"') for each in archive.java_options().split()]

    intact = run_java(*options(), "-Xshare:on", "-Xlog:cds")
    assert intact.returncode == 0, intact.stdout
    for damaged in (
        bytes(0xFF if i % 50 == 0 and i > 2**13 else b for i, b in enumerate(content)),
        b"x" * len(content),
    ):
        verified.chmod(0o600)
        verified.write_bytes(damaged)
        assert str(verified) in " ".join(options())
        assert run_java(*options()).returncode == 0
        assert run_java(*options(), "-Xshare:on").returncode != 0  # the JVM has noticed the damage


@pytest.mark.matrix
def test_the_second_start_of_spark_maps_the_archive_that_a_background_process_has_built(tmp_path: Path) -> None:
    with delta_jars() as jars:
        assert jars.paths, "Spark has never started on this machine"
    (temporary := tmp_path / "with space" / f"lakesight-jars-{os.getuid()}").mkdir(parents=True, mode=0o700)
    shutil.copy(jars.record, temporary)
    code = (
        "from pipelines.config import LocalPlatformConfig\nfrom pipelines.platform import local\n"
        "spark = local(LocalPlatformConfig()).open_spark()\n"
        "pid = spark.sparkContext._gateway.proc.pid\nprint(open(f'/proc/{pid}/maps').read())\n"
    )
    environment = os.environ | {
        "TMPDIR": str(temporary.parent),
        "LAKESIGHT_HOME": str(tmp_path / "home"),
        "PYTHONPATH": TEST_PATH,
    }

    def mapped() -> str:
        done = subprocess.run(
            [sys.executable, "-P", "-c", code], env=environment, capture_output=True, text=True, check=True
        )
        return done.stdout

    assert ".jsa" not in mapped().replace("classes.jsa", "")
    deadline = time.monotonic() + 300
    while not (files := list(temporary.glob("*.jsa"))) and time.monotonic() < deadline:
        time.sleep(1)
    assert [path.stat().st_mode & 0o777 for path in files] == [0o600]
    assert str(files[0]) in mapped()

"""Tests that other users of the machine cannot read the log of Spark's JVM."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

import pytest

from pipelines.config import LocalPlatformConfig
from pipelines.errors import UserError
from pipelines.platform import local
from pipelines.platform.spark_launch import open_log


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o600), (0o077, 0o600), (0o002, 0o660)])
def test_only_users_who_may_write_sparks_log_can_read_it(tmp_path: Path, umask: int, mode: int) -> None:
    log = tmp_path / "spark.log"
    log.write_bytes(b"old")
    log.chmod(0o644)
    with open_log(log, umask) as out:
        assert out.tell() == 3
        subprocess.run(["echo", "new"], stdout=out, check=True)
    assert stat.S_IMODE(log.stat().st_mode) == mode
    assert log.read_bytes() == b"oldnew\n"


def test_other_users_cannot_read_what_the_jvm_prints_at_its_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit = tmp_path / "spark" / "bin" / "spark-submit"
    submit.parent.mkdir(parents=True)
    submit.write_text("#!/bin/sh\necho 'Picked up JAVA_TOOL_OPTIONS: -Dx.password=c4nary'\nexit 1\n")
    submit.chmod(0o755)
    monkeypatch.setenv("SPARK_HOME", str(tmp_path / "spark"))
    monkeypatch.setenv("LAKESIGHT_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("pyspark.SparkContext._gateway", None)
    monkeypatch.setattr("pyspark.SparkContext._active_spark_context", None)
    before = os.umask(0o022)
    try:
        with pytest.raises(UserError, match="Spark did not start"):
            local(LocalPlatformConfig()).open_spark()
    finally:
        os.umask(before)
    log = tmp_path / "home" / "logs" / "spark.log"
    assert "c4nary" in log.read_text()
    assert stat.S_IMODE(log.stat().st_mode) == 0o600

"""Tests of the check of packages and hardware on executors, before ranks start on the executors."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import venv
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from open_sockets import free_port
from processes import TEST_PATH
from pyspark.sql import SparkSession
from tiny_runs import tiny_run, write_run, write_shards

from pipelines.driver.train.hosts import check_hosts
from pipelines.driver.train.launch import check_slots
from pipelines.driver.train.run import launch
from pipelines.errors import UserError
from pipelines.formats.run_folder import HostsFile, Result, RunFolder, read_json
from pipelines.platform import Launch, Platform

pytestmark = pytest.mark.matrix  # the executors are processes, whose JVMs take half a minute to start


def make_python(folder: Path, *without: str) -> Path:
    """Create a Python interpreter with the installed packages, except packages whose names start with `without`."""
    venv.create(folder, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    for installed in Path(sysconfig.get_path("purelib")).iterdir():
        if not installed.name.startswith(without):
            (site / installed.name).symlink_to(installed)
    return folder / "bin" / "python"


def test_the_hosts_of_executors_are_described_in_a_file_and_in_one_log_line(
    spark: SparkSession, platform: Platform, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shards = write_shards(tmp_path / "shards", rows=4)
    run = write_run(tmp_path / "run", tiny_run(), shards, shards)
    with caplog.at_level(logging.INFO):
        check_hosts(run, lambda: spark, platform.launch)
    (host,) = read_json(run.hosts, HostsFile).hosts  # the two executors have equal descriptions
    assert (host.name, host.packages["torch"]) == (socket.gethostname(), torch.__version__)
    assert any(f"ranks run on these hosts: {socket.gethostname()}; " in message for message in caplog.messages)


def test_no_rank_starts_if_executors_lack_packages_and_the_error_names_the_packages(
    spark: SparkSession, platform: Platform, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder(tmp_path / "run")
    first = make_python(tmp_path / "first", "pydantic")
    second = make_python(tmp_path / "second", "pipelines", "_editable_impl_lakesight")
    bare = f"env -u PYTHONPATH {second}"  # PYTHONPATH would make Lakesight importable
    monkeypatch.setattr(spark.sparkContext, "pythonExec", either(tmp_path / "either", str(first), bare))
    with pytest.raises(UserError, match="packages that ranks need are missing") as caught:
        launch(run, platform, lambda: spark)
    here = socket.gethostname()
    assert sorted(caught.value.got.split("; ")) == [
        f"no lakesight on host {here} ({second})",
        f"no pydantic on host {here} ({first})",
    ]
    assert run.read_ranks() == []


def test_no_rank_starts_if_torch_versions_differ_and_the_error_names_the_executors(
    spark: SparkSession, platform: Platform, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder(tmp_path / "run")
    other = make_python(tmp_path / "other", "torch")
    (site,) = (tmp_path / "other").glob("lib/python*/site-packages")
    (site / "torch").mkdir()
    (site / "torch" / "__init__.py").touch()
    (site / "torch" / "version.py").write_text('__version__ = "2.6.0"; cuda = None')
    monkeypatch.setattr(spark.sparkContext, "pythonExec", either(tmp_path / "either", sys.executable, str(other)))
    with pytest.raises(UserError, match="different versions of torch") as caught:
        launch(run, platform, lambda: spark)
    here = socket.gethostname()
    assert set(caught.value.got.split("; ")) == {
        f"2.6.0 on host {here} ({other})",
        f"{torch.__version__} on host {here} ({sys.executable})",
    }
    assert run.read_ranks() == []


def test_no_rank_starts_if_a_host_has_no_gpu_and_the_error_names_the_host(
    spark: SparkSession, platform: Platform, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (smi := tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho no devices were found\nexit 6\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    on_gpus = replace(platform, launch=Launch(2, local_mode=True, use_gpu=True))
    run = RunFolder(tmp_path / "run")
    with pytest.raises(UserError, match=r"no devices were found on host .* Fix: .*use_gpu=false"):
        launch(run, on_gpus, lambda: spark)
    assert run.read_ranks() == []


WITHOUT = ("pyspark", "py4j", "delta", "mlflow", "databricks", "grpc")
"""Name prefixes of packages that a node of AI Runtime may lack. The prefix `delta` matches both delta-spark and
deltalake.
"""


def test_the_ai_runtime_script_gives_the_same_weights_as_torchdistributor_without_java_spark_and_mlflow(
    spark: SparkSession, platform: Platform, tmp_path: Path
) -> None:
    shards = write_shards(tmp_path / "shards", rows=24)
    config = tiny_run(steps=6)
    expected = launch(write_run(tmp_path / "runs" / "distributor", config, shards, shards), platform, lambda: spark)

    run = write_run(tmp_path / "runs" / "tiny", config, shards, shards)
    (tmp_path / "runs" / "ai_runtime.prepared").write_text(f"{run.path}\n")
    python = make_python(tmp_path / "bare", *WITHOUT)
    commands = python.parent
    (commands / "torchrun").write_text(f'#!/bin/sh\nexec {python} -m torch.distributed.run "$@"\n')
    (commands / "torchrun").chmod(0o755)
    for tool in ("cat", "env", "bash"):
        (commands / tool).symlink_to(str(shutil.which(tool)))
    environment = {"PATH": str(commands), "PYTHONPATH": TEST_PATH, "PET_MASTER_PORT": str(free_port())}
    environment |= {"LAKESIGHT_RUNS": str(tmp_path / "runs"), "LAKESIGHT_RANKS": "2"}
    probe = "import importlib.util as u, shutil; print([n for n in 'pyspark mlflow delta'.split() if u.find_spec(n)],"
    probe += "shutil.which('java'))"
    lacking = subprocess.run([python, "-c", probe], env=environment, capture_output=True, text=True, check=True)
    assert lacking.stdout.split() == ["[]", "None"]
    script = Path(__file__).parents[2] / "jobs" / "ai_runtime.sh"
    ended = subprocess.run([str(script)], env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = read_json(run.result, Result)
    assert (found.step, found.world_size) == (expected.step, expected.world_size) == (6, 2)
    for name in ("model.safetensors", "training.safetensors"):
        assert (Path(found.checkpoint) / name).read_bytes() == (Path(expected.checkpoint) / name).read_bytes()


def either(path: Path, first: str, second: str) -> str:
    """Create a script that runs interpreter `first` when it first starts, and interpreter `second` at later starts."""
    path.write_text(f'#!/bin/sh\nmkdir "$0.taken" 2>/dev/null && exec {first} "$@"\nexec {second} "$@"\n')
    path.chmod(0o755)
    return str(path)


def test_two_spark_sessions_that_start_in_the_same_second_have_separate_executor_folders(
    spark: SparkSession,
) -> None:
    """Check that the application id ends with the process id. Spark names executor folders after the application id.

    A Spark session removes its executor folders when the session ends. If two sessions shared a folder, the executors
    of the longer session could no longer import modules from the folder.
    """
    assert spark.sparkContext.applicationId.endswith(f"-{os.getpid()}")


def test_no_rank_starts_if_spark_has_too_few_task_slots_for_the_ranks(platform: Platform, spark: SparkSession) -> None:
    assert not platform.launch.local_mode
    with pytest.raises(UserError, match=r"too few task slots for the ranks.*2 task slots, but 3 ranks need 3"):
        check_slots(lambda: spark, replace(platform.launch, ranks=3), seconds=0.5)

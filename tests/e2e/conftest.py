"""Spark session of the slow tests in this folder, and a home folder in which the pipeline has run.

The executors of the session are separate processes. `make test` never opens this Spark session.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from home_commands import report
from local_platforms import open_local
from pyspark.sql import SparkSession
from spark_session import open_session

from pipelines.config import LocalPlatformConfig, SparkConfig
from pipelines.platform import Platform


@pytest.fixture(scope="session")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Platform:
    """A local platform with two executors and a new home folder."""
    with pytest.MonkeyPatch.context() as patch:
        config = LocalPlatformConfig(ranks=2, spark=SparkConfig(master="local-cluster[2,1,1024]"))
        return open_local(patch, tmp_path_factory.mktemp("home"), config)


@pytest.fixture(scope="session")
def spark(platform: Platform) -> Iterator[SparkSession]:
    """A Spark session on two executors, with all tables created."""
    with open_session(platform) as session:
        yield session


@pytest.fixture(scope="session")
def pipeline_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home folder in which the pipeline has run once. Tests must not change this folder."""
    home = tmp_path_factory.mktemp("finished") / "home"
    report(["pipeline"], home)
    return home


@pytest.fixture
def finished_home(pipeline_home: Path, tmp_path: Path) -> Path:
    """A copy of a home folder in which the pipeline has run once."""
    return Path(shutil.copytree(pipeline_home, tmp_path / "home"))

"""Spark session of the slow tests in this folder. Its executors are processes. `make test` never opens this session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
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

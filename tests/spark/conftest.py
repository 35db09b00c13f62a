"""The Spark session of the tests in this folder, in Spark's local mode."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from pyspark.sql import SparkSession
from spark_session import open_session

from pipelines.platform import Platform


@pytest.fixture(scope="session")
def spark(platform: Platform) -> Iterator[SparkSession]:
    """A Spark session with two task threads, each of which starts its own Python workers; all tables exist."""
    with open_session(platform) as session:
        yield session

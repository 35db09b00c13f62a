"""What all tests share: one torch thread, one Spark session on real executors, one home folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import TEST_PATH
from pyspark.sql import SparkSession

from pipelines.config import LocalPlatformConfig, SparkConfig, short_hash
from pipelines.driver.delta.tables import ensure_tables
from pipelines.platform import Platform, local


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist looks for groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where two processes share the tests, each takes half of those that need Spark, and has one session for them."""
    for item in items:
        if "spark" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group(f"spark in {item.path.parent.name}"))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Two processes share the tests and the cores: a second thread each would only wait, tiny models most of all."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Platform:
    """A laptop's platform with two executors, on a fresh home folder that all tests share; sources keep them apart."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAKESIGHT_HOME", str(tmp_path_factory.mktemp("home")))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        return local(LocalPlatformConfig(ranks=2, spark=SparkConfig(master="local-cluster[2,1,1024]")))


@pytest.fixture(scope="session")
def spark(platform: Platform) -> Iterator[SparkSession]:
    """The one Spark session, with every table there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", TEST_PATH)  # executors run entries of the tests too
        session = platform.open_spark()
    # A few rows a query: compiling it to bytecode and planning it again would take longer than running it. The demo's
    # test does both.
    session.conf.set("spark.sql.codegen.wholeStage", "false")
    session.conf.set("spark.sql.codegen.factoryMode", "NO_CODEGEN")
    session.conf.set("spark.sql.adaptive.enabled", "false")
    ensure_tables(session, platform)
    yield session
    session.stop()


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Creating MLflow's tables takes seconds; copying them does not."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def source(request: pytest.FixtureRequest) -> str:
    """A source name that no other test uses."""
    return f"test-{short_hash(request.node.nodeid)}"

"""Fixtures for all tests: one torch thread, one home folder, and one empty MLflow database."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
from hypothesis import settings
from local_platforms import open_local

from pipelines.config import LocalPlatformConfig, SparkConfig, short_hash
from pipelines.platform import Platform

# Each run of the suite draws the same values. Option --hypothesis-profile=random draws new values.
settings.register_profile("suite", derandomize=True, deadline=None)
settings.register_profile("random", deadline=None)
settings.load_profile("suite")

LONGEST_FIRST = (
    "spark in e2e",
    "spark in spark",
    "pipelines",
    "training",
    "test_failures",
    "finished home",
    "parallel",
)
"""Test groups for pytest-xdist, in the order in which they start; the slowest group is first. Tests without a group run
last, in the process that becomes free first.
"""


@pytest.hookimpl(tryfirst=True)  # this hook must run before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put tests that share a Spark session or slow fixtures into one group, and sort all tests by group.

    The tests of a folder that need Spark share one Spark session. Slow tests that need no Spark session may share the
    fixtures of their file.
    """
    for item in items:
        if re.search(r" at 0x[0-9a-fA-F]", item.nodeid):
            raise pytest.UsageError(
                f"the id of a test differs between processes, because the id contains an address: {item.nodeid}"
            )
        if "spark" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group(f"spark in {item.path.parent.name}"))
        elif item.get_closest_marker("matrix") and not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
    items.sort(key=_rank)  # the sort is stable: tests of a group keep their order


def _rank(item: pytest.Item) -> int:
    marker = item.get_closest_marker("xdist_group")
    return LONGEST_FIRST.index(marker.args[0]) if marker and marker.args[0] in LONGEST_FIRST else len(LONGEST_FIRST)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Use one torch thread: two test processes share two cores, and tiny models run no faster with more threads."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_closed_log_streams() -> None:
    """Remove log handlers whose stream pytest has closed, because each log line to a closed stream would print an
    error.
    """
    root = logging.getLogger()
    root.handlers[:] = [each for each in root.handlers if not getattr(getattr(each, "stream", None), "closed", False)]


@pytest.fixture(scope="session")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Platform:
    """A local platform with two Spark threads and a new home folder.

    All tests that one process runs share this platform, except the tests in tests/e2e.
    """
    with pytest.MonkeyPatch.context() as patch:
        config = LocalPlatformConfig(ranks=2, spark=SparkConfig(master="local[2]"))
        return open_local(patch, tmp_path_factory.mktemp("home"), config)


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database without runs. Tests copy this file, because creating an MLflow database takes seconds."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def source(request: pytest.FixtureRequest) -> str:
    """Return a source name that no other test uses."""
    return f"test-{short_hash(request.node.nodeid)}"

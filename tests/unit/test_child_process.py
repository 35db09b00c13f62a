"""Tests of the environment variables of child processes, and of the identity of a process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from pipelines.child_process import child_environment, drop_other_variables, start_ticks

SECRETS = (
    "AWS_SECRET_ACCESS_KEY",
    "AZURE_CLIENT_SECRET",
    "DATABRICKS_TOKEN",
    "GITHUB_TOKEN",
    "HF_TOKEN",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_URI",
    "PYSPARK_GATEWAY_SECRET",
    "PYTHON_WORKER_FACTORY_SECRET",
    "TORCH_HUB_TOKEN",
    "anything_else",
)
NEEDED = (
    "PATH",
    "PYTHONPATH",
    "PYTHONSAFEPATH",
    "CUDA_VISIBLE_DEVICES",
    "LD_LIBRARY_PATH",
    "LC_ALL",
    "OMP_NUM_THREADS",
)


def test_a_child_process_receives_the_environment_variables_that_it_needs_and_no_credentials(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in (*SECRETS, *NEEDED):
        monkeypatch.setenv(name, "value")
    environment = child_environment(RANK="1")
    assert environment["RANK"] == "1"
    assert set(NEEDED) <= environment.keys()
    assert not set(SECRETS) & environment.keys()


def test_a_rank_removes_the_credentials_of_the_executor_and_keeps_the_variables_that_describe_the_rank(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in (*SECRETS, *NEEDED, "MASTER_ADDR", "LOCAL_RANK"):
        monkeypatch.setenv(name, "value")
    before = dict(os.environ)
    try:
        drop_other_variables("MASTER_.+", "LOCAL_RANK")
        assert {*NEEDED, "MASTER_ADDR", "LOCAL_RANK"} <= os.environ.keys()
        assert not set(SECRETS) & os.environ.keys()
    finally:
        os.environ.update(before)


def test_a_process_that_reuses_a_process_id_is_recognised_by_its_start_time() -> None:
    if not start_ticks(os.getpid()):
        pytest.skip("the start times of processes cannot be read on this system")
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert start_ticks(child.pid) > start_ticks(os.getpid()) == start_ticks(os.getpid())
    child.communicate(b"\n")
    assert start_ticks(child.pid) == 0

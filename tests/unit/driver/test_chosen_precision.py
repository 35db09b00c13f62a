"""Tests of `train.precision: auto`: the choice is measured once for each device, and stored in the run."""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from shard_reports import shard_report
from tiny_runs import tiny_run, write_shards

from pipelines.config import LocalPlatformConfig
from pipelines.driver.train.precision import MIN_RATIO, Measured, choose_precision
from pipelines.driver.train.run import prepare
from pipelines.errors import UserError
from pipelines.executor.host_info import describe_host
from pipelines.platform import Platform, local


@pytest.fixture
def laptop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Platform:
    monkeypatch.setenv("LAKESIGHT_HOME", str(tmp_path / "home"))
    return local(LocalPlatformConfig())


def test_bf16_is_chosen_only_if_it_is_clearly_faster() -> None:
    def choice(ratio: float) -> str:
        return Measured(device="cpu", fp32=ratio, bf16=1.0).choice

    assert [choice(ratio) for ratio in (0.5, 1.0, MIN_RATIO - 0.01, MIN_RATIO + 0.01, 3.0)] == [
        *("fp32", "fp32", "fp32"),
        *("bf16", "bf16"),
    ]


@pytest.mark.matrix  # a second process imports torch and measures some steps
def test_the_precision_auto_is_measured_once_and_the_run_has_the_chosen_precision(
    laptop: Platform, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    report = shard_report(write_shards(tmp_path / "shards", rows=8))
    with caplog.at_level(logging.INFO):
        run = prepare(tiny_run(precision="auto"), laptop, report, report)
    (measured,) = json.loads((laptop.root / "precision.json").read_text()).values()
    chosen = Measured.model_validate(measured).choice
    assert measured["fp32"] > 0 < measured["bf16"]
    assert run.read_run().config.train.precision == chosen
    assert f"train.precision auto is {chosen}: on " in caplog.text
    monkeypatch.setattr(sys, "executable", "/no/python/that/could/measure/again")
    assert prepare(tiny_run(precision="auto"), laptop, report, report) == run
    assert prepare(tiny_run(precision=chosen), laptop, report, report) == run


@pytest.mark.skipif(bool(describe_host()["gpus"]), reason="this machine has a GPU")
def test_without_a_gpu_on_the_driver_the_precision_of_gpu_ranks_must_be_given(laptop: Platform) -> None:
    with_gpus = replace(laptop, launch=replace(laptop.launch, use_gpu=True))
    with pytest.raises(UserError, match="the driver has no GPU"):
        choose_precision(tiny_run(precision="auto"), with_gpus)
    assert choose_precision(tiny_run(precision="tf32"), with_gpus) == tiny_run(precision="tf32")

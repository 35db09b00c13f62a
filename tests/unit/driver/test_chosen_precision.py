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
from pipelines.driver.train import precision
from pipelines.driver.train.precision import MIN_RATIO, Measured, choose_precision, describe_device
from pipelines.driver.train.run import prepare
from pipelines.errors import UserError
from pipelines.executor.host_info import describe_host
from pipelines.formats.run_folder import Result, write_json
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


def measured_before(platform: Platform, **seconds: float) -> None:
    """Write precision.json as an earlier run on this machine would have written it."""
    measured = Measured.model_validate({"device": "cpu", **seconds})
    (platform.root / "precision.json").write_text(json.dumps({describe_device(platform): measured.model_dump()}))


def replace_python(folder: Path, script: str, patch: pytest.MonkeyPatch) -> None:
    """Let a shell script take the place of the program that measures, which takes seconds."""
    program = folder / "python"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    patch.setattr(sys, "executable", str(program))


@pytest.mark.parametrize(("existing", "faster"), [("fp32", "bf16"), ("bf16", "fp32")])
def test_the_precision_auto_is_that_of_an_existing_run_with_equal_settings_whatever_this_machine_measures(
    existing: str, faster: str, laptop: Platform, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    report = shard_report(write_shards(tmp_path / "shards", rows=8))
    measured_before(laptop, **{existing: 2.0, faster: 1.0 if faster == "bf16" else 2.0})
    run = prepare(tiny_run(precision=existing), laptop, report, report)
    with caplog.at_level(logging.INFO):
        assert prepare(tiny_run(precision="auto"), laptop, report, report) == run
    assert f"train.precision auto is {existing}, as in the existing run {run.path.name}" in caplog.text

    result = Result(status="ok", step=12, world_size=2, checkpoint=str(run.checkpoint(12)), metrics={}, seconds=1.0)
    write_json(run.result, result)
    run.checkpoint(12).mkdir(parents=True)
    assert prepare(tiny_run(precision="auto"), laptop, report, report) == run, "a finished run is found too"
    model = tiny_run().model.model_dump() | {"generation": {"max_new_tokens": 5}}
    assert prepare(tiny_run(precision="auto", model=model), laptop, report, report) == run

    other = prepare(tiny_run(precision="auto", seed=1), laptop, report, report)
    assert other.read_run().config.train.precision == faster, "the existing run has another seed"
    prepare(tiny_run(precision=faster), laptop, report, report)
    both = prepare(tiny_run(precision="auto"), laptop, report, report)
    assert both.read_run().config.train.precision == faster, "with a run in each format, the measurement decides"


def test_a_damaged_measurement_of_the_precision_is_measured_again(
    laptop: Platform, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_python(tmp_path, """echo '{"device": "cpu", "fp32": 2.0, "bf16": 1.0}'""", monkeypatch)
    for content in ("{", "[]", json.dumps({describe_device(laptop): {"device": "cpu", "fp32": 1.0}})):
        (laptop.root / "precision.json").write_text(content)
        assert choose_precision(tiny_run(precision="auto"), laptop).train.precision == "bf16"
        assert "precision.json is damaged" in caplog.text
        caplog.clear()
        assert choose_precision(tiny_run(precision="auto"), laptop).train.precision == "bf16"
        assert "damaged" not in caplog.text


def test_a_measurement_of_the_precision_that_takes_too_long_is_refused_with_the_setting_to_change(
    laptop: Platform, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_python(tmp_path, "exec sleep 60", monkeypatch)
    monkeypatch.setattr(precision, "MEASURE_SECONDS", 0.2)
    with pytest.raises(UserError, match=r"longer than 0\.2 seconds.*--set train\.precision=fp32"):
        choose_precision(tiny_run(precision="auto"), laptop)


def test_two_runs_that_measure_the_precision_at_once_keep_the_first_result_and_the_results_of_other_devices(
    laptop: Platform, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While this run measures, another run stores its results for the same device and for another device."""
    path = laptop.root / "precision.json"
    names = (describe_device(laptop), "another processor")
    first = {name: {"device": "cpu", "fp32": 2.0, "bf16": 1.0} for name in names}
    (tmp_path / "first.json").write_text(json.dumps(first))
    own = '{"device": "cpu", "fp32": 1.0, "bf16": 1.0}'
    replace_python(tmp_path, f"cp '{tmp_path}/first.json' '{path}'\necho '{own}'", monkeypatch)
    assert choose_precision(tiny_run(precision="auto"), laptop).train.precision == "bf16"
    assert json.loads(path.read_text()) == first


@pytest.mark.skipif(bool(describe_host()["gpus"]), reason="this machine has a GPU")
def test_without_a_gpu_on_the_driver_the_precision_of_gpu_ranks_must_be_given(laptop: Platform) -> None:
    with_gpus = replace(laptop, launch=replace(laptop.launch, use_gpu=True))
    with pytest.raises(UserError, match="the driver has no GPU"):
        choose_precision(tiny_run(precision="auto"), with_gpus)
    assert choose_precision(tiny_run(precision="tf32"), with_gpus) == tiny_run(precision="tf32")

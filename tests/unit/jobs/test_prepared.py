"""Tests of run folders whose ranks another program starts: `train --no-launch` and `train --finish`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from bundle import ROOT
from local_platforms import open_local
from tiny_runs import finish_run, tiny_run, write_run, write_shards
from typer.testing import CliRunner

from jobs.cli import app
from jobs.common import Job, open_output
from jobs.prepared import announce_prepared, read_finished
from jobs.train import run_train
from pipelines.config import RunConfig
from pipelines.errors import UserError
from pipelines.formats.run_folder import RunFolder
from pipelines.platform import Platform

CONFIG = tiny_run()


@pytest.fixture
def platform(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> Platform:
    return open_local(monkeypatch, tmp_path / "home", database=empty_database)


@pytest.fixture
def run(tmp_path: Path, platform: Platform) -> RunFolder:
    shards = write_shards(tmp_path / "shards", rows=6)
    return write_run(platform.folder("runs") / "tiny-0123", CONFIG, shards, shards)


def job_of(platform: Platform, config: RunConfig = CONFIG) -> Job:
    with open_output(as_json=False) as output:
        return Job(config, platform, (), output)


def test_a_prepared_run_is_registered_only_after_its_ranks_have_finished(platform: Platform, run: RunFolder) -> None:
    job = job_of(platform)
    with pytest.raises(UserError, match="no run folder was prepared"):
        read_finished(job, "gpus")
    announce_prepared(job, run, "gpus")
    with pytest.raises(UserError, match="have not finished"):
        read_finished(job, "gpus")
    finish_run(run)
    report = run_train(job, read_finished(job, "gpus"))
    assert (report.run_folder, report.trained, report.model_version) == (str(run.path), False, "1")


def test_a_prepared_run_of_another_config_is_refused(platform: Platform, run: RunFolder) -> None:
    announce_prepared(job_of(platform), run, "gpus")
    finish_run(run)
    with pytest.raises(UserError, match="run tiny"):
        read_finished(job_of(platform, CONFIG.model_copy(update={"name": "other"})), "gpus")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--finish", "--no-launch"), "contradict"),
        (("--finish", "--replay-step", "1"), "contradict"),
        (("--prepared-as", "gpus"), "--finish"),
    ],
)
def test_options_of_train_that_contradict_each_other_are_refused(
    options: tuple[str, ...], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAKESIGHT_HOME", str(tmp_path))
    done = CliRunner().invoke(app, ["train", *options])
    assert done.exit_code != 0
    assert text in str(done.exception)


def test_all_tasks_of_the_ai_runtime_job_use_the_run_folder_that_its_first_task_has_prepared() -> None:
    settings = yaml.safe_load((ROOT / "jobs" / "ai_runtime.yml").read_text())["resources"]["jobs"]["ai_runtime"]
    wheels = {
        task["task_key"]: task["python_wheel_task"]["parameters"]
        for task in settings["tasks"]
        if "python_wheel_task" in task
    }
    script = (ROOT / "jobs" / "ai_runtime.sh").read_text()
    (name,) = re.findall(r'cat "\$RUNS/(\w+)\.prepared"', script)
    for parameters in wheels.values():
        assert f"--prepared-as={name}" in parameters
    assert "--no-launch" in wheels["prepare"]
    assert "--finish" in wheels["register"]
    assert "demo" not in script

"""Tests of the commands that a finished command suggests: the named version and pictures, and the platform."""

from __future__ import annotations

import io
import logging
import shlex
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from evaluation_reports import evaluation_report
from local_platforms import open_local
from tiny_runs import write_run, write_shards

from jobs import next_commands
from jobs.cli import app
from jobs.common import Job
from jobs.output import CommandOutput
from pipelines.config import load_run
from pipelines.driver.evaluate.bootstrap import Interval
from pipelines.driver.evaluate.compare import Comparison, describe_outcome
from pipelines.tracking.home_store.copied_version import TAG_PREFIX
from pipelines.tracking.registry import CHAMPION, resolve
from pipelines.tracking.server import connect
from vlm.config import GenerationConfig

CAPTION = """lakesight caption --run demo --where "source = 'demo'\""""
PROMOTE = "lakesight promote --run demo --version"
LONGER = "lakesight train --run demo --set train.seed=1 --set train.steps=6400"
"""Command that repeats the training of the registered versions with twice the number of steps."""


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Job:
    """A job whose registry has two versions of one run. The run was trained with other settings than the job has."""
    with pytest.MonkeyPatch.context() as patch:
        platform = open_local(patch, tmp_path_factory.mktemp("next") / "home", database=empty_database)
    shards = write_shards(tmp_path_factory.mktemp("trained") / "shards", rows=4)
    config = load_run("demo", overrides=["train.steps=3200", "train.seed=1"])
    run = write_run(platform.folder("runs") / "demo-0123", config, shards, shards)
    client = connect(platform)
    client.create_registered_model("demo")
    for _ in range(2):
        client.create_model_version("demo", str(run.path), tags={f"{TAG_PREFIX}run": run.path.name})
    return make_job(platform)


@pytest.fixture
def set_champion(job: Job) -> Iterator[Callable[[str], None]]:
    """Function that makes a version the champion for the duration of a test."""
    client = connect(job.platform)
    yield lambda number: client.set_registered_model_alias("demo", CHAMPION, number)
    client.delete_registered_model_alias("demo", CHAMPION)


def make_job(platform: Any, *overrides: str) -> Job:
    return Job(load_run("demo", overrides=overrides), platform, overrides, CommandOutput(io.StringIO(), as_json=False))


def interval(low: float, high: float) -> Interval:
    return Interval(value=(low + high) / 2, low=low, high=high)


def same(first: list[str], second: list[str]) -> bool:
    """Return whether two lists of commands have the same words. Two shells may quote the same word differently."""
    return [shlex.split(command) for command in first] == [shlex.split(command) for command in second]


# ------------------------------------------------------------------------------------------------ compare


def comparison(page: Path, **differences: Interval) -> Comparison:
    sides = {"model_name": "demo", "one": "2", "other": "1", "source": "demo", "split": "test", "rows": 9}
    counts = {"wins": 3, "losses": 3, "ties": 3, "page": page, "tokenisation": "words"}
    metrics = dict.fromkeys(("differences", "one_metrics", "other_metrics"), differences)
    return Comparison.model_validate(sides | counts | metrics | {"metric": "word_f1"})


BETTER, EQUAL, WORSE = (0.1, 0.3), (-0.1, 0.1), (-0.3, -0.1)


@pytest.mark.parametrize(
    ("found", "champion", "command"),
    [
        *((BETTER, None, f"{PROMOTE} 2"), (BETTER, "1", f"{PROMOTE} 2"), (BETTER, "2", LONGER)),
        *((EQUAL, None, f"{PROMOTE} 2"), (EQUAL, "1", f"{PROMOTE} 2"), (EQUAL, "2", LONGER)),
        *((WORSE, None, f"{PROMOTE} 1"), (WORSE, "1", LONGER), (WORSE, "2", f"{PROMOTE} 1")),
    ],
)
def test_after_a_comparison_the_better_version_is_promoted_unless_it_is_the_champion(
    found: tuple[float, float],
    champion: str | None,
    command: str,
    job: Job,
    set_champion: Callable[[str], None],
    tmp_path: Path,
) -> None:
    if champion:
        set_champion(champion)
    report = comparison(tmp_path / "page.html", word_f1=interval(*found), cider=interval(-0.9, -0.8))
    assert same(next_commands.after_comparison(job, report), [command])
    outcome = {BETTER: "better than", EQUAL: "not clearly better or worse than", WORSE: "worse than"}[found]
    assert f"of version 2 are {outcome} those of version 1: word F1" in describe_outcome(report)


def test_the_settings_of_the_command_are_used_for_a_version_that_was_trained_in_another_home_folder(job: Job) -> None:
    steps = 2 * job.config.train.steps
    version = resolve(job.platform, "demo", "2").model_copy(update={"tags": {"run": "demo-4567"}})
    assert next_commands.train_longer(job, version) == [f"lakesight train --run demo --set train.steps={steps}"]


def test_no_command_is_suggested_if_the_registry_cannot_be_read(
    job: Job, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    down = "http://127.0.0.1:9"
    cut = replace(job, platform=replace(job.platform, tracking_uri=down, registry_uri=down))
    with caplog.at_level(logging.WARNING):
        assert next_commands.after_comparison(cut, comparison(tmp_path, word_f1=interval(*BETTER))) == []
    assert "the registry cannot be read" in caplog.text


# ------------------------------------------------------------------------------------------------ evaluate


def measured(folder: Path, value: float, settings: GenerationConfig | None = None) -> Any:
    metrics = {"word_f1": interval(value - 0.1, value + 0.1), "constant_word_f1": interval(0.5, 0.5)}
    return evaluation_report(folder, metrics, model_version="2", settings=settings)


@pytest.mark.parametrize(
    ("value", "champion", "settings", "command"),
    [
        (0.8, "1", None, f"{PROMOTE} 2"),
        (0.45, "1", None, f"{PROMOTE} 2"),
        (0.3, "1", None, LONGER),
        (0.3, "2", None, CAPTION),
        (0.8, "1", GenerationConfig(num_beams=4), CAPTION.replace("--where", "--version 2 --where")),
    ],
)
def test_after_an_evaluation_the_next_command_uses_the_measured_version(
    value: float,
    champion: str,
    settings: GenerationConfig | None,
    command: str,
    job: Job,
    set_champion: Callable[[str], None],
    tmp_path: Path,
) -> None:
    set_champion(champion)
    found = next_commands.after_evaluation(job, measured(tmp_path, value, settings))
    assert same(found, [command])


def test_a_gate_without_baselines_does_not_keep_a_version_from_being_promoted(job: Job, tmp_path: Path) -> None:
    free = make_job(job.platform, "gate.baselines=[]")
    found = next_commands.after_evaluation(free, measured(tmp_path, 0.3))
    assert same(found, ["lakesight promote --run demo --set gate.baselines=[] --version 2"])


# ------------------------------------------------------------------------------------------------ platforms


def suggested(job: Job) -> list[str]:
    """Return all commands that do not depend on figures."""
    return [
        next_commands.evaluate_version(job, "3"),
        next_commands.ask_text_model(job, "3"),
        next_commands.caption_source(job),
        next_commands.caption_source(job, "3"),
        next_commands.caption_table(job, "shop/my products"),
        next_commands.show_quarantine(job),
        *next_commands.show_captions(job),
        *next_commands.after_review(job, ["good"]),
        *next_commands.show_runs(job),
    ]


PLATFORMS: dict[str, Callable[[Any], Any]] = {
    "a laptop": lambda platform: platform,
    "a tracking server": lambda platform: replace(platform, tracking_uri="http://mlflow.example"),
    "a workspace": lambda platform: replace(platform, kind="databricks", tracking_uri="databricks", tables=None),
}


@pytest.mark.parametrize("place", PLATFORMS)
def test_suggested_commands_are_valid_and_work_on_the_platform_of_the_finished_command(place: str, job: Job) -> None:
    found = suggested(replace(job, platform=PLATFORMS[place](job.platform)))
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    chosen = []
    for command in found:
        program, name, *words = shlex.split(command)
        parameters = commands[name].make_context(name, words).params
        chosen.append((program, name, parameters.get("where") or parameters.get("table")))
    names = [name for _, name, _ in chosen]
    assert ("show" in names) == (place != "a workspace")
    assert ("ui" in names) == (place == "a laptop")
    assert chosen.count(("lakesight", "caption", "source = 'demo'")) == 2
    assert ("lakesight", "caption", "shop/my products") in chosen
    assert (("lakesight", "show", "model_name = 'demo'") in chosen) == ("show" in names)


def test_a_suggested_command_selects_the_platform_and_names_no_setting_of_spark(job: Job) -> None:
    settings = ("platform.cache_gib=1", "train.seed=1", "platform.spark.conf.spark.secret=s3cret")
    own = make_job(job.platform, *settings)
    assert next_commands.show_runs(own) == ["lakesight ui --set platform.cache_gib=1"]
    assert "s3cret" not in " ".join(suggested(own))


@pytest.mark.parametrize(
    ("verdicts", "names"), [([], []), (["bad"], ["show"]), (["bad", "corrected"], ["show", "ingest"])]
)
def test_only_good_and_corrected_captions_are_suggested_for_training(
    verdicts: list[str], names: list[str], job: Job
) -> None:
    assert [command.split()[1] for command in next_commands.after_review(job, verdicts)] == names

"""Tests that no scheduled job undoes a rollback, and that a promotion takes the version that the job run has trained.

The commands run without Spark until the gate starts. The home folder has no pictures, so the gate always ends with an
error.
"""

from __future__ import annotations

import dataclasses
import io
import shutil
from contextlib import AbstractContextManager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from bundle import job_tasks
from deltalake import DeltaTable
from local_platforms import open_local
from tiny_runs import tiny_run, write_shards
from trained_models import register
from typer.testing import CliRunner

from jobs.cli import app
from jobs.common import Job
from jobs.decisions import record, record_other_promotion
from jobs.evaluate import choose_version, open_model
from jobs.job_run import record_trained_version
from jobs.output import CommandOutput
from jobs.promote import run_promote
from jobs.rollback import run_rollback
from pipelines.errors import StageFailed, UserError
from pipelines.platform import Platform
from pipelines.tracking import aliases, registry
from pipelines.tracking.server import connect
from vlm import text
from vlm.factory import build_model

NAME = "demo"
VALUES = {"var.catalog": "c"} | {
    f"resources.{kind}": "x" for kind in ("schemas.lakesight.name", "volumes.files.name", "experiments.runs.name")
}


def decisions_folder(platform: Platform) -> Path:
    assert platform.tables
    return platform.tables / "decisions"


def decisions(platform: Platform) -> list[tuple[str, str, str | None]]:
    """Return action, version and earlier champion of each decision, oldest first."""
    rows = DeltaTable(decisions_folder(platform)).to_pyarrow_table().sort_by("decided_at").to_pylist()
    return [(row["action"], row["model_version"], row["champion"]) for row in rows]


def newest_digests(job: Job) -> list[str]:
    """Return the digests of the version and of the earlier champion in the newest decision."""
    rows = DeltaTable(decisions_folder(job.platform)).to_pyarrow_table().sort_by("decided_at").to_pylist()
    return [rows[-1]["model_digest"], rows[-1]["champion_digest"]]


def make_champion(job: Job, *versions: str) -> None:
    """Promote versions one after the other without the checks of the gate."""
    for version in versions:
        record(job, version, "promote", champion=aliases.find_champion(job.platform, NAME))
        aliases.promote(job.platform, registry.resolve(job.platform, NAME, version))


def present_aliases(job: Job) -> dict[str, str]:
    found = connect(job.platform).get_registered_model(NAME).aliases
    return {alias: str(version) for alias, version in found.items()}


def gate_starts() -> AbstractContextManager[object]:
    """Expect that the gate starts: its first step reads pictures, and the home has no pictures."""
    return pytest.raises(UserError, match="the test split has no rows")


@pytest.fixture(scope="module")
def three_versions(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Path:
    """Return a home folder with three versions of a model, which have different weights."""
    home = tmp_path_factory.mktemp("three") / "home"
    with pytest.MonkeyPatch.context() as patch:
        platform = open_local(patch, home, database=empty_database)
        config = tiny_run(ranks=1).model_copy(update={"name": NAME})
        shards = write_shards(tmp_path_factory.mktemp("shards") / "shards", rows=8)
        for seed in range(3):
            torch.manual_seed(seed)
            model = build_model(config.model, text.learn(config.model.text, []).vocab_size)
            register(platform, platform.folder("runs") / f"{NAME}-{seed}", config, shards, model)
    return home


@pytest.fixture
def job(three_versions: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """Return a job on the home folder, with neither decisions nor aliases. The job's session of Spark cannot start."""

    def refuse() -> Any:
        raise AssertionError("a JVM would start")

    platform = dataclasses.replace(open_local(monkeypatch, three_versions), open_spark=refuse)
    shutil.rmtree(decisions_folder(platform), ignore_errors=True)
    client = connect(platform)
    for alias in client.get_registered_model(NAME).aliases:
        client.delete_registered_model_alias(NAME, alias)
    config = tiny_run(ranks=1).model_copy(update={"name": NAME})
    return Job(config, platform, (), CommandOutput(io.StringIO(), as_json=False))


def test_a_version_that_was_rolled_back_is_promoted_only_if_its_number_is_given(job: Job) -> None:
    make_champion(job, "1", "2")
    assert run_rollback(job) == "1"
    before, recorded = present_aliases(job), decisions(job.platform)
    assert recorded[-1] == ("rollback", "1", "2")
    assert newest_digests(job) == [registry.resolve(job.platform, NAME, version).tags["digest"] for version in "12"]
    for which in ("2", "previous"):
        report = run_promote(job, which)
        assert (report.model_version, report.rolled_back, report.already) == ("2", True, False)
    assert (present_aliases(job), decisions(job.platform)) == (before, recorded), "nothing was changed or recorded"
    with gate_starts():
        run_promote(job, "2", by_number=True)


def test_a_version_is_not_promoted_if_another_command_changes_the_champion_while_the_gate_runs(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_champion(job, "1")
    monkeypatch.setattr("jobs.promote.check_gate", lambda *_: make_champion(job, "3"))
    with pytest.raises(StageFailed, match=r"compared with version 1; now version 3 is the champion"):
        run_promote(job, "2")
    assert present_aliases(job)["champion"] == "3"
    assert decisions(job.platform)[-1] == ("promote", "3", "1")


@pytest.mark.matrix
def test_a_version_that_became_the_champion_again_after_a_rollback_is_promoted_without_its_number(job: Job) -> None:
    make_champion(job, "1", "2")
    assert (run_rollback(job), run_rollback(job)) == ("1", "2")
    assert run_promote(job, "2").already
    assert run_promote(job, "1").rolled_back, "the second rollback has replaced version 1"
    make_champion(job, "1", "3")
    with gate_starts():
        run_promote(job, "1")


@pytest.mark.matrix
def test_a_rollback_of_versions_that_no_gate_has_promoted_is_kept_too(job: Job) -> None:
    for version in ("1", "2"):  # as if somebody had moved the aliases in the registry
        aliases.promote(job.platform, registry.resolve(job.platform, NAME, version))
    assert run_rollback(job) == "1"
    assert run_promote(job, "2").rolled_back
    with gate_starts():
        run_promote(job, "3")


@pytest.mark.matrix
def test_a_home_folder_without_decisions_promotes_every_version(job: Job) -> None:
    with gate_starts():
        run_promote(job, "latest")


@pytest.mark.matrix
@pytest.mark.parametrize("digests", ["of another registry", "missing, as in the first release"])
def test_a_rolled_back_version_is_recognised_by_its_digest_and_by_its_number_only_without_a_digest(
    job: Job, digests: str
) -> None:
    make_champion(job, "1", "2")
    run_rollback(job)
    other = "NULL" if digests.startswith("missing") else "'other'"
    DeltaTable(decisions_folder(job.platform)).update({"model_digest": other, "champion_digest": other})
    if other == "NULL":
        assert run_promote(job, "2").rolled_back
        return
    with gate_starts():
        run_promote(job, "2")


@pytest.mark.matrix
@pytest.mark.parametrize("digest", [None, "digest of version 2 in another registry"])
def test_the_champion_is_recorded_again_if_the_last_decision_has_its_number_but_not_its_digest(
    job: Job, digest: str | None
) -> None:
    make_champion(job, "1", "2")
    stored = "NULL" if digest is None else f"'{digest}'"
    DeltaTable(decisions_folder(job.platform)).update({"model_digest": stored})
    for _ in range(2):
        assert run_promote(job, "champion").already
    assert decisions(job.platform)[2:] == [("promote", "2", "2")]
    assert newest_digests(job) == [registry.resolve(job.platform, NAME, "2").tags["digest"]] * 2


def make_decisions_older(job: Job) -> None:
    """Move all decisions two hours into the past, so that no command may still be about to move the aliases."""
    past = datetime.now(UTC) - timedelta(hours=2)
    DeltaTable(decisions_folder(job.platform)).update(
        {"decided_at": f"to_timestamp_micros({past.timestamp():.0f}000000)"}
    )


def test_a_caption_job_records_a_champion_that_was_promoted_elsewhere(job: Job) -> None:
    make_champion(job, "1")
    aliases.promote(job.platform, registry.resolve(job.platform, NAME, "2"))
    make_decisions_older(job)
    for _ in range(2):
        record_other_promotion(job, open_model(job, "champion"))
    assert decisions(job.platform) == [("promote", "1", None), ("promote", "2", "2")]


def test_a_caption_job_records_nothing_between_the_decision_of_a_rollback_and_the_move_of_the_alias(job: Job) -> None:
    make_champion(job, "1", "2")
    captioned = open_model(job, "champion")
    record(job, "1", "rollback", champion=aliases.find_champion(job.platform, NAME))
    recorded = decisions(job.platform)
    record_other_promotion(job, captioned)
    assert decisions(job.platform) == recorded


def test_a_caption_job_neither_cancels_nor_finishes_a_running_move_of_the_aliases(
    job: Job, caplog: pytest.LogCaptureFixture
) -> None:
    make_champion(job, "1", "2")
    captioned = open_model(job, "champion")
    make_decisions_older(job)
    DeltaTable(decisions_folder(job.platform)).update({"model_version": "'1'"})
    planned = aliases.plan_rollback(job.platform, NAME)
    assert planned is not None
    client = connect(job.platform)
    client.set_registered_model_tag(NAME, aliases.MOVE_TAG, planned.model_dump_json())
    before = decisions(job.platform)
    record_other_promotion(job, captioned)
    assert aliases.MOVE_TAG in client.get_registered_model(NAME).tags, "the move was not cancelled"
    assert f"disagree on the champion of model {NAME}" in caplog.text
    client.set_registered_model_alias(NAME, "champion", "1")
    record_other_promotion(job, open_model(job, "champion"))
    assert aliases.MOVE_TAG in client.get_registered_model(NAME).tags, "the move was not finished"
    assert decisions(job.platform) == before
    aliases.promote(job.platform, registry.resolve(job.platform, NAME, "2"))  # this command finishes the move first


def test_a_rollback_stays_the_newest_decision_if_a_caption_job_has_asked_the_registry_before(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rollback takes place between the question to the registry and the decision of the caption job."""
    make_champion(job, "1")
    aliases.promote(job.platform, registry.resolve(job.platform, NAME, "2"))
    make_decisions_older(job)
    captioned = open_model(job, "champion")
    ask = aliases.find_settled_champion

    def ask_and_roll_back(platform: Platform, name: str) -> registry.ModelVersion | None:
        found = ask(platform, name)
        run_rollback(job)
        return found

    monkeypatch.setattr(aliases, "find_settled_champion", ask_and_roll_back)
    record_other_promotion(job, captioned)
    assert decisions(job.platform)[-1] == ("rollback", "1", "2")
    assert run_promote(job, "2").rolled_back


def deployed(job: str, command: str) -> list[str]:
    """Return the parameters of a deployed task, without the settings of a workspace."""
    (parameters,) = (task for task in job_tasks(job, VALUES, {"run": NAME}) if task[0] == command)
    return [text for text in parameters if not text.startswith(("--platform", "--set=platform."))]


@pytest.mark.parametrize("kind", ["pipeline", pytest.param("finetune", marks=pytest.mark.matrix)])
def test_the_task_promote_judges_the_version_that_the_job_run_has_trained_and_keeps_a_rollback(
    job: Job, kind: str
) -> None:
    make_champion(job, "1", "2")
    run_rollback(job)
    parameters = deployed(kind, "promote")
    (job_run,) = (text.removeprefix("--job-run=") for text in parameters if text.startswith("--job-run"))
    missing = CliRunner().invoke(app, parameters)
    assert isinstance(missing.exception, UserError)
    assert "no model version was recorded for the job run" in str(missing.exception)
    record_trained_version(job, job_run, "2")
    done = CliRunner().invoke(app, parameters)
    assert done.exception is None, done.exception
    assert "demo version 2 is not promoted, because" in done.output
    assert "version 1 stays the champion" in done.output
    assert "lakesight promote --run demo --version 2" in done.output
    assert present_aliases(job)["champion"] == "1"


def test_the_version_of_a_job_run_is_chosen_instead_of_a_newer_version(job: Job) -> None:
    record_trained_version(job, "7", "1")
    record_trained_version(job, "8", "2")
    assert [choose_version(job, "latest", None, job_run) for job_run in ("7", "8", None)] == ["1", "2", "latest"]
    with pytest.raises(UserError, match="two options choose a model version"):
        choose_version(job, "3", None, "7")
    with pytest.raises(UserError, match="id of a job run is not valid"):
        choose_version(job, "latest", None, "{{job.run_id}}")


@pytest.mark.usefixtures("job")
@pytest.mark.parametrize("other", [("--no-launch",), ("--replay-step", "1")])
def test_command_train_refuses_a_job_run_if_it_registers_no_version(other: tuple[str, ...]) -> None:
    done = CliRunner().invoke(app, ["train", "--job-run", "7", *other])
    assert isinstance(done.exception, UserError)
    assert "registers no model version" in str(done.exception)

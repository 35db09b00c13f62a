"""Tests of the preparation of a run folder: the name of the folder, and refused inputs."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from run_owners import owned_by_another_process
from shard_reports import shard_report
from tiny_runs import tiny_run, write_shards

from pipelines.config import LocalPlatformConfig, short_hash
from pipelines.driver.shard.run import ShardReport
from pipelines.driver.train.code import read_code
from pipelines.driver.train.run import prepare
from pipelines.driver.train.run_folders import finished_result
from pipelines.driver.train.vocabulary import warn_of_unknown
from pipelines.errors import UserError
from pipelines.formats.run_folder import Result, RunFolder, write_json
from pipelines.formats.training_code import TrainingCode
from pipelines.platform import Platform, local
from vlm import text
from vlm.config import WordsConfig
from vlm.text.cider import END, Cider


@pytest.fixture
def laptop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Platform:
    monkeypatch.setenv("LAKESIGHT_HOME", str(tmp_path / "home"))
    return local(LocalPlatformConfig())


@pytest.fixture
def report(tmp_path: Path) -> ShardReport:
    return shard_report(write_shards(tmp_path / "shards", rows=8))


def test_equal_runs_share_a_run_folder_and_different_runs_have_different_run_folders(
    laptop: Platform, report: ShardReport, tmp_path: Path
) -> None:
    run = prepare(tiny_run(), laptop, report, report)
    other_data = shard_report(write_shards(tmp_path / "other", rows=9))
    assert prepare(tiny_run(), laptop, report, report) == run
    assert prepare(tiny_run(ranks=1), laptop, report, report) == run  # the number of ranks is not in the folder name
    others = [
        prepare(tiny_run(seed=1), laptop, report, report),
        prepare(tiny_run(), laptop, other_data, report),
        prepare(tiny_run(), laptop, report, other_data),
    ]
    assert len({run, *others}) == 4
    assert run.path.parent == laptop.folder("runs")
    assert run.path.name.startswith("tiny-")


def test_a_command_that_does_not_train_keeps_the_number_of_ranks_with_which_the_run_was_started(
    laptop: Platform, report: ShardReport
) -> None:
    run = prepare(tiny_run(), replace(laptop, launch=replace(laptop.launch, ranks=4)), report, report)
    before = run.run_file.read_bytes()
    assert run.read_run().world_size == 4
    assert prepare(tiny_run(), laptop, report, report, keep_run_file=True) == run
    assert run.run_file.read_bytes() == before


def test_generation_settings_change_the_run_folder_only_if_captions_are_scored_during_training(
    laptop: Platform, report: ShardReport
) -> None:
    def run_with(settings: dict[str, Any], **train: Any) -> RunFolder:
        model = tiny_run().model.model_dump() | {"generation": {"max_new_tokens": 16} | settings}
        return prepare(tiny_run(model=model, **train), laptop, report, report)

    run = run_with({})
    before = run.run_file.read_bytes()
    for settings in ({"num_beams": 3}, {"max_new_tokens": 4, "repetition_penalty": 1.2}):
        assert run_with(settings) == run
    assert run.run_file.read_bytes() == before, "run.json keeps the settings with which the run was started"
    assert run_with({"num_beams": 3}, seed=1) != run
    scored = run_with({}, score_every=6)
    assert run_with({"num_beams": 3}, score_every=6) != scored
    changed_code = read_code().model_copy(update={"digest": "0123"})
    model = tiny_run().model.model_dump() | {"generation": {"num_beams": 3, "max_new_tokens": 16}}
    retrained = prepare(tiny_run(model=model), laptop, report, report, changed_code)
    assert retrained.read_run().config.model.generation.num_beams == 3, "changed code uses the present settings"


def test_the_run_folder_contains_document_frequencies_only_if_a_training_stage_rewards_cider(
    laptop: Platform, report: ShardReport, tmp_path: Path
) -> None:
    stage = {"steps": 12, "groups": [{"pattern": ".*", "lr": 1e-3}], "objective": {"kind": "cider"}}
    assert not prepare(tiny_run(), laptop, report, report).cider.exists()
    texts = shard_report(write_shards(tmp_path / "texts", rows=8, texts=2))
    found = Cider.load(prepare(tiny_run(stages=[stage]), laptop, texts, texts).cider)
    assert found.documents == 8
    assert found.frequencies[("red",)] == 2
    assert found.frequencies[("x", END)] == 8
    assert ("red", "x", END) in found.frequencies


def test_the_run_folder_contains_the_run_file_and_the_tokenizer(laptop: Platform, report: ShardReport) -> None:
    run = prepare(tiny_run(), laptop, report, report)
    file = run.read_run()
    assert file.config == tiny_run()
    assert (file.train_shards, file.dataset_version, file.world_size) == (report.folder, 3, 2)
    assert text.load(run.tokenizer).decode(text.load(run.tokenizer).encode("red")) == "red"


# ------------------------------------------------------------------------------------------------ refused inputs


def test_a_batch_size_that_ranks_cannot_divide_is_refused_and_the_error_names_a_valid_batch_size(
    laptop: Platform, report: ShardReport
) -> None:
    with pytest.raises(UserError, match=r"batch size 5 for 2 ranks.*train\.batch_size=6"):
        prepare(tiny_run(batch_size=5), laptop, report, report)
    assert not laptop.folder("runs").exists()


@pytest.mark.parametrize(("train_rows", "validate_rows", "purpose"), [(0, 8, "train on"), (8, 0, "validate on")])
def test_training_or_validating_on_an_empty_split_is_refused(
    laptop: Platform, report: ShardReport, train_rows: int, validate_rows: int, purpose: str
) -> None:
    train, validate = (report.model_copy(update={"num_rows": rows}) for rows in (train_rows, validate_rows))
    with pytest.raises(UserError, match=f"there are no rows to {purpose}"):
        prepare(tiny_run(), laptop, train, validate)


def test_a_run_is_finished_only_if_its_result_and_its_last_checkpoint_exist(
    laptop: Platform, report: ShardReport
) -> None:
    run = prepare(tiny_run(), laptop, report, report)
    assert finished_result(run) is None
    result = Result(status="ok", step=12, world_size=2, checkpoint=str(run.checkpoint(12)), metrics={}, seconds=1.0)
    write_json(run.result, result)
    assert finished_result(run) is None
    run.checkpoint(12).mkdir(parents=True)
    assert finished_result(run) == result
    before = run.run_file.read_bytes()
    prepare(tiny_run(ranks=1), laptop, report, report)
    assert run.run_file.read_bytes() == before  # run.json of a finished run never changes


def test_changed_settings_start_a_new_run_and_the_differences_from_the_unfinished_run_are_logged(
    laptop: Platform, report: ShardReport, caplog: pytest.LogCaptureFixture
) -> None:
    unfinished = prepare(tiny_run(), laptop, report, report)
    unfinished.checkpoint(4).mkdir(parents=True)
    same = prepare(tiny_run(timeout_seconds=5, max_restarts=1, parallel="fsdp", rows_at_once=1), laptop, report, report)
    assert same == unfinished
    assert caplog.messages == []
    assert prepare(tiny_run(seed=3, steps=20), laptop, report, report) != unfinished
    (message,) = caplog.messages
    assert unfinished.path.name in message
    assert (
        "train.seed is 0 in the saved config, 3 in the run; train.steps is 12 in the saved config, 20 in the run"
        in message
    )


def finish(run: RunFolder) -> None:
    run.checkpoint(12).mkdir(parents=True)
    write_json(run.result, Result(status="ok", step=12, world_size=2, checkpoint="", metrics={}, seconds=1.0))


def changed(code: TrainingCode, name: str = "vlm/training/objective.py") -> TrainingCode:
    files = code.files | {name: "changed"}
    return code.model_copy(update={"files": files, "digest": short_hash(files)})


def test_the_code_recorded_for_a_run_is_the_model_library_and_the_code_that_ranks_execute(
    laptop: Platform, report: ShardReport
) -> None:
    code = read_code()
    assert {"vlm/training/objective.py", "pipelines/worker/main.py"} <= code.files.keys()
    assert {name.rpartition("/")[0].partition("/")[0] for name in code.files} == {"vlm", "pipelines"}
    assert not [name for name in code.files if "jobs" in name or "driver" in name]
    assert prepare(tiny_run(), laptop, report, report).read_run().code == code
    assert changed(code).different_files(code) == ["vlm/training/objective.py"]


def test_a_finished_run_is_reused_if_its_code_is_unchanged_and_trained_again_if_the_code_has_changed(
    laptop: Platform, report: ShardReport
) -> None:
    code = read_code()
    finish(prepare(tiny_run(), laptop, report, report, code))
    other = prepare(tiny_run(), laptop, report, report, changed(code))
    assert finished_result(other) is None
    finish(other)
    assert finished_result(prepare(tiny_run(), laptop, report, report, changed(code)))
    assert prepare(tiny_run(), laptop, report, report, changed(code)) == other
    first = prepare(tiny_run(), laptop, report, report, code)
    assert first != other
    assert finished_result(first)


def test_an_unfinished_run_of_other_code_is_resumed_only_on_request_and_the_log_names_the_changed_files(
    laptop: Platform, report: ShardReport, caplog: pytest.LogCaptureFixture
) -> None:
    code = read_code()
    unfinished = prepare(tiny_run(), laptop, report, report, code)
    unfinished.checkpoint(4).mkdir(parents=True)
    assert prepare(tiny_run(), laptop, report, report, code) == unfinished
    assert caplog.messages == []
    fresh = prepare(tiny_run(), laptop, report, report, changed(code))
    assert fresh != unfinished
    (message,) = caplog.messages
    assert "changed in vlm/training/objective.py; to resume the unfinished run with the changed code" in message
    assert "--set train.resume_changed_code=true" in message

    other = changed(code, "vlm/model.py")
    resumed = prepare(tiny_run(resume_changed_code=True), laptop, report, report, other)
    assert resumed == unfinished
    assert resumed.read_run().earlier_code == (code.digest,)
    assert prepare(tiny_run(), laptop, report, report, other) == unfinished  # run.json now records the digest


def test_a_finished_run_is_found_in_a_home_folder_that_was_moved(
    laptop: Platform, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = shard_report(write_shards(laptop.folder("shards") / "tiny-train-0123", rows=8))
    run = prepare(tiny_run(), laptop, shards, shards)
    finish(run)
    assert run.read_run().train_shards == "../../shards/tiny-train-0123"
    laptop.root.rename(tmp_path / "moved [1] %41")
    monkeypatch.setenv("LAKESIGHT_HOME", str(tmp_path / "moved [1] %41"))
    moved = local(LocalPlatformConfig())
    folder = moved.folder("shards") / "tiny-train-0123"
    shards = shards.model_copy(update={"folder": str(folder)})
    found = prepare(tiny_run(), moved, shards, shards)
    assert found.path == moved.folder("runs") / run.path.name
    assert finished_result(found)
    assert found.shard_folder(found.read_run().train_shards) == folder
    assert found.shard_folder(str(laptop.folder("shards") / folder.name)) == folder  # Lakesight 0.1.0 stored this path


def test_a_finished_run_of_the_first_lakesight_release_is_reused_unless_the_code_has_changed_since_then(
    laptop: Platform, report: ShardReport
) -> None:
    code = read_code()
    old = prepare(tiny_run(), laptop, report, report, code)
    without_code = json.loads(old.run_file.read_text())
    del without_code["code"], without_code["earlier_code"], without_code["config"]["train"]["resume_changed_code"]
    write_json(old.run_file, without_code)
    finish(old)
    assert prepare(tiny_run(), laptop, report, report, code) == old
    assert old.read_run().code_tags() == {
        "code_version": code.release,
        "code_digest": code.digest,
        "code_earlier": code.release,
    } | ({"code_commit": code.commit} if code.commit else {})
    assert finished_result(prepare(tiny_run(), laptop, report, report, changed(code))) is None


def test_folders_of_other_programs_and_damaged_run_folders_only_cause_a_warning(
    laptop: Platform, report: ShardReport, caplog: pytest.LogCaptureFixture
) -> None:
    prepare(tiny_run(), laptop, report, report).checkpoint(4).mkdir(parents=True)
    foreign = laptop.folder("runs") / "tiny-0123456789abcdef"
    (foreign / "checkpoints" / "step_000004").mkdir(parents=True)
    (foreign / "run.json").write_text("[]")
    unrelated = laptop.folder("runs") / "tiny-er"
    shutil.copytree(foreign, unrelated)
    (laptop.folder("runs") / "tiny-abc").write_text("a file")
    assert prepare(tiny_run(seed=3), laptop, report, report).run_file.exists()
    (message,) = caplog.messages
    assert str(foreign) in message


def test_preparing_a_run_that_another_process_trains_is_refused_and_changes_no_file(
    laptop: Platform, report: ShardReport
) -> None:
    run = prepare(tiny_run(), laptop, report, report)
    before = run.run_file.read_bytes()
    with owned_by_another_process(run), pytest.raises(UserError, match="this run is already being trained"):
        prepare(tiny_run(ranks=1, timeout_seconds=5), laptop, report, report)
    assert run.run_file.read_bytes() == before


def test_words_that_the_vocabulary_lacks_are_logged_with_their_counts(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = text.learn(WordsConfig(kind="words"), ["a red car", "a red bus"])
    warn_of_unknown(tokenizer, ["a red car"] * 3 + ["a blue car"], "validation texts")
    assert caplog.messages == [
        "5 of 12 tokens of the validation texts are unknown to the tokenizer (41.67 %). "
        "The 2 different unknown texts include: 'car' (4), 'blue' (1)"
    ]
    caplog.clear()
    warn_of_unknown(tokenizer, ["a red"], "validation texts")
    assert not caplog.messages


def test_a_step_to_register_whose_checkpoint_the_run_will_not_have_is_refused_before_the_training(
    laptop: Platform, report: ShardReport
) -> None:
    with pytest.raises(UserError, match=r"no checkpoint of the step in train\.register.*train\.register: 13.*12 steps"):
        prepare(tiny_run(register=13), laptop, report, report)
    run = prepare(tiny_run(), laptop, report, report)
    run.checkpoint(8).mkdir(parents=True)
    for step in (8, 9):
        assert prepare(tiny_run(register=step), laptop, report, report) == run
    with pytest.raises(UserError, match=r"train\.register: 7.*checkpoints of the steps 8"):
        prepare(tiny_run(register=7), laptop, report, report)
    assert run.read_run().config.train.register_ == 9

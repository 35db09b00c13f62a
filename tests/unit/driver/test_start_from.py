"""Tests of `train.start_from`: the name of the run folder, and start folders that are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from shard_reports import shard_report
from tiny_runs import tiny_run, write_shards

from pipelines.config import LocalPlatformConfig
from pipelines.driver.shard.run import ShardReport
from pipelines.driver.train.run import prepare
from pipelines.driver.train.run_folders import hash_run
from pipelines.errors import UserError
from pipelines.formats.model_copy import record_copy
from pipelines.formats.run_folder import RunFolder
from pipelines.platform import Platform, local
from vlm import text
from vlm.checkpoint import atomic_folder
from vlm.config import CharsConfig, ModelConfig
from vlm.files import IMPORT_RECORD, file_digest


@pytest.fixture
def laptop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Platform:
    monkeypatch.setenv("LAKESIGHT_HOME", str(tmp_path / "home"))
    return local(LocalPlatformConfig())


@pytest.fixture
def report(tmp_path: Path) -> ShardReport:
    return shard_report(write_shards(tmp_path / "shards", rows=8))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Write a checkpoint folder of the tiny model, with a tokenizer unlike that of the run, and a tiny weights file."""
    config = tiny_run().model
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "base" / "config.json").write_text(config.model_dump_json())
    text.save(text.learn(CharsConfig(kind="chars", alphabet="zyx"), ()), tmp_path / "base" / "tokenizer.json")
    return tmp_path / "base"


def test_the_name_of_the_run_folder_depends_on_the_content_of_the_start_folder(
    laptop: Platform, report: ShardReport, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = prepare(tiny_run(), laptop, report, report)
    run = prepare(tiny_run(start_from=str(base)), laptop, report, report)
    shutil.copytree(base, tmp_path / "copy")
    assert prepare(tiny_run(start_from=str(tmp_path / "copy")), laptop, report, report) == run
    adapted = prepare(tiny_run(start_from=str(base), adapter={"pattern": "decoder.*"}), laptop, report, report)
    ranked = prepare(
        tiny_run(start_from=str(base), adapter={"pattern": "decoder.*", "rank": 2}), laptop, report, report
    )
    (base / "model.safetensors").write_bytes(b"trained further")
    further = prepare(tiny_run(start_from=str(base)), laptop, report, report)
    assert len({fresh, run, adapted, ranked, further}) == 5

    monkeypatch.chdir(tmp_path)
    relative = prepare(tiny_run(start_from="base"), laptop, report, report)
    assert relative.read_run().config.train.start_from == str(base)  # ranks may run in another working folder
    assert relative.tokenizer.read_bytes() == (base / "tokenizer.json").read_bytes()


def test_a_start_folder_with_another_tokenizer_starts_another_run(
    laptop: Platform, report: ShardReport, base: Path
) -> None:
    run = prepare(tiny_run(start_from=str(base)), laptop, report, report)
    text.save(text.learn(CharsConfig(kind="chars", alphabet="xyz"), ()), base / "tokenizer.json")
    corrected = prepare(tiny_run(start_from=str(base)), laptop, report, report)
    assert corrected != run
    assert corrected.tokenizer.read_bytes() == (base / "tokenizer.json").read_bytes() != run.tokenizer.read_bytes()


def test_a_run_of_an_earlier_release_whose_name_lacks_the_tokenizer_is_found_if_the_tokenizer_is_the_same(
    laptop: Platform, report: ShardReport, base: Path
) -> None:
    new = prepare(tiny_run(start_from=str(base)), laptop, report, report)
    settings = tiny_run(start_from=str(base)).train.science() | {"start_from": file_digest(base / "model.safetensors")}
    name = f"tiny-{hash_run(tiny_run().model, settings, report.content_hash, report.content_hash)}"
    earlier = RunFolder(new.path.rename(new.path.with_name(name)))
    assert prepare(tiny_run(start_from=str(base)), laptop, report, report) == earlier
    content = json.loads((base / "tokenizer.json").read_text())
    (base / "tokenizer.json").write_text(json.dumps(content, indent=4))
    assert prepare(tiny_run(start_from=str(base)), laptop, report, report) == earlier, "only the layout differs"
    text.save(text.learn(CharsConfig(kind="chars", alphabet="xyz"), ()), base / "tokenizer.json")
    assert prepare(tiny_run(start_from=str(base)), laptop, report, report) != earlier


def test_starting_from_weights_of_a_different_model_is_refused_and_the_error_lists_all_differences(
    laptop: Platform, report: ShardReport, base: Path
) -> None:
    other = tiny_run().model.model_dump()
    other["decoder"]["transformer"]["depth"] = 3
    other["vision"]["stem"] = {"kind": "conv", "channels": [8, 8, 8]}
    (base / "config.json").write_text(ModelConfig.model_validate(other).model_dump_json())
    with pytest.raises(UserError) as caught:
        prepare(tiny_run(start_from=str(base)), laptop, report, report)
    message = str(caught.value)
    assert "model.decoder.transformer.depth is 3 in the saved config, 1 in the run" in message
    assert "model.vision.stem.kind is 'conv' in the saved config, 'patch' in the run" in message
    (base / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"the model in train\.start_from cannot be read"):
        prepare(tiny_run(start_from=str(base)), laptop, report, report)
    (base / "model.safetensors").unlink()
    with pytest.raises(
        UserError, match=r"the folder in train\.start_from has no complete model.*has no model\.safetensors"
    ):
        prepare(tiny_run(start_from=str(base)), laptop, report, report)


def test_a_run_may_start_from_weights_whose_generation_settings_differ_from_its_own(
    laptop: Platform, report: ShardReport, base: Path
) -> None:
    other = tiny_run().model.model_dump() | {"generation": {"max_new_tokens": 3}}
    (base / "config.json").write_text(ModelConfig.model_validate(other).model_dump_json())
    assert prepare(tiny_run(start_from=str(base)), laptop, report, report).tokenizer.exists()


def test_a_run_can_continue_only_an_earlier_run_with_the_same_settings_and_fewer_steps(
    laptop: Platform, report: ShardReport, base: Path
) -> None:
    def longer(**settings: Any) -> RunFolder:
        return prepare(tiny_run(start_from=str(base), start_state="training", **settings), laptop, report, report)

    with pytest.raises(
        UserError,
        match=r"the folder in train\.start_from has no training state.*has no training\.safetensors, no training\.json",
    ):
        longer(steps=20)
    (base / "training.safetensors").write_bytes(b"state")
    (base / "training.json").write_text('{"step": 12}')
    shutil.copy(prepare(tiny_run(), laptop, report, report).run_file, base / "run.json")
    first = longer(steps=20, validate_every=3, log_every=1, stop=2)
    assert first.tokenizer.read_bytes() == (base / "tokenizer.json").read_bytes()
    (base / "training.safetensors").write_bytes(b"other state")
    assert longer(steps=20, validate_every=3, log_every=1, stop=2) != first
    with pytest.raises(UserError, match=r"already taken all steps.*train\.steps is 12, and checkpoint .* has 12 steps"):
        longer()
    with pytest.raises(
        UserError, match=r"had other settings.*train\.batch_size is 4 in the saved config, 8 in the run"
    ):
        longer(steps=20, batch_size=8)
    with pytest.raises(UserError, match=r"train\.optimizer\.ema_decay is None in the saved config, 0\.9 in the run"):
        longer(steps=20, optimizer={"warmup_steps": 2, "ema_decay": 0.9})


def write_training_state(base: Path, run: RunFolder) -> None:
    """Make the folder `base` a checkpoint of step 12 of a run."""
    (base / "training.safetensors").write_bytes(b"state")
    (base / "training.json").write_text('{"step": 12}')
    shutil.copy(run.run_file, base / "run.json")


def test_a_continued_run_registers_only_steps_after_those_of_the_earlier_run(
    laptop: Platform, report: ShardReport, base: Path
) -> None:
    write_training_state(base, prepare(tiny_run(), laptop, report, report))
    continued: dict[str, Any] = {"steps": 20, "start_from": str(base), "start_state": "training"}
    for step in (7, 12):
        with pytest.raises(UserError, match=rf"train\.register: {step}.*starts after step 12"):
            prepare(tiny_run(**continued, register=step), laptop, report, report)
    assert prepare(tiny_run(**continued, register=13), laptop, report, report).run_file.exists()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_continued_run_with_precision_auto_keeps_the_precision_of_the_earlier_run(
    precision: str, laptop: Platform, report: ShardReport, base: Path
) -> None:
    write_training_state(base, prepare(tiny_run(precision=precision), laptop, report, report))
    continued = tiny_run(precision="auto", steps=20, start_from=str(base), start_state="training")
    assert prepare(continued, laptop, report, report).read_run().config.train.precision == precision


def test_a_run_with_stages_can_be_continued_with_more_steps_of_its_last_stage(
    laptop: Platform, report: ShardReport, base: Path
) -> None:
    def stages(*steps: int) -> dict[str, Any]:
        listed = [{"steps": number, "groups": [{"pattern": ".*", "lr": 1e-3}]} for number in steps]
        return {"steps": sum(steps), "stages": listed}

    write_training_state(base, prepare(tiny_run(**stages(4, 8)), laptop, report, report))
    longer = tiny_run(start_from=str(base), start_state="training", **stages(4, 20))
    assert prepare(longer, laptop, report, report).read_run().config.train.steps == 24
    for other in ((5, 20), (4, 4, 20)):
        with pytest.raises(UserError, match=r"had other settings.*train\.stages.*more steps of the last stage"):
            prepare(tiny_run(start_from=str(base), start_state="training", **stages(*other)), laptop, report, report)


def test_a_run_does_not_continue_a_training_on_other_rows_unless_it_has_already_started(
    laptop: Platform, report: ShardReport, base: Path, tmp_path: Path
) -> None:
    write_training_state(base, prepare(tiny_run(), laptop, report, report))
    grown = shard_report(write_shards(tmp_path / "grown", rows=9))
    config = tiny_run(steps=20, start_from=str(base), start_state="training")
    with pytest.raises(UserError, match=r"other training data.*was \w+, and is now \w+.*start_state: weights"):
        prepare(config, laptop, grown, report)
    assert prepare(config, laptop, report, grown), "the validation rows may change"
    assert prepare(tiny_run(steps=20, start_from=str(base)), laptop, grown, report)
    (base / "run.json").write_text((base / "run.json").read_text().replace(report.content_hash, grown.content_hash))
    started = prepare(config, laptop, grown, report)
    started.checkpoint(16).mkdir(parents=True)
    shutil.copy(prepare(tiny_run(), laptop, report, report).run_file, base / "run.json")
    assert prepare(config, laptop, grown, report) == started


def test_a_run_does_not_start_from_files_that_were_changed_after_they_were_written(
    laptop: Platform, report: ShardReport, base: Path, tmp_path: Path
) -> None:
    downloaded = shutil.copytree(base, tmp_path / "downloaded")
    record_copy(downloaded)
    with atomic_folder(checkpoint := tmp_path / "step_000012") as folder:
        shutil.copytree(base, folder, dirs_exist_ok=True)
    for number, start in enumerate((downloaded, checkpoint)):
        config = tiny_run(start_from=str(start), seed=number)
        shutil.copytree(start, intact := tmp_path / f"intact-{number}")
        (start / "model.safetensors").write_bytes(b"wrights")
        with pytest.raises(UserError, match=r"train\.start_from is damaged.*model\.safetensors has changed"):
            prepare(config, laptop, report, report)
        shutil.copyfile(intact / "model.safetensors", start / "model.safetensors")
        assert prepare(config, laptop, report, report).tokenizer.exists()


def write_import_record(base: Path, *fresh: str) -> None:
    """Make the folder `base` an imported checkpoint in which the parameters `fresh` have random weights."""
    (base / IMPORT_RECORD).write_text(json.dumps({"request": {}, "report": {"parameters": 1, "fresh": fresh}}))


def test_an_adapter_does_not_freeze_parameters_that_an_import_has_initialised_at_random(
    laptop: Platform, report: ShardReport, base: Path
) -> None:
    adapted = tiny_run(start_from=str(base), adapter={"pattern": "decoder.blocks.*"})
    write_import_record(base, "projector.bias", "projector.weight")
    with pytest.raises(UserError, match=r"train\.adapter does not train projector\.bias, projector\.weight.*stages"):
        prepare(adapted, laptop, report, report)
    assert prepare(tiny_run(start_from=str(base)), laptop, report, report), "without an adapter, the run trains both"
    write_import_record(base)
    assert prepare(adapted, laptop, report, report)
    (base / IMPORT_RECORD).write_text("{")
    with pytest.raises(UserError, match=r"the record of the import cannot be read"):
        prepare(adapted, laptop, report, report)


def test_stages_train_each_parameter_that_an_import_has_initialised_at_random(
    laptop: Platform, report: ShardReport, base: Path
) -> None:
    def stages(*groups: tuple[str, float]) -> RunFolder:
        listed = [{"pattern": pattern, "lr": lr} for pattern, lr in groups]
        stage = {"steps": 12, "groups": listed}
        return prepare(tiny_run(start_from=str(base), stages=[stage]), laptop, report, report)

    write_import_record(base, "decoder.cross_blocks.{0..2}.attention_gate", "projector.weight")
    assert stages((r"(projector|decoder\.cross_blocks).*", 1e-3))
    for partly in (r"projector.*|decoder\.cross_blocks\.[01].*", r"projector.*|decoder\.cross_blocks\.[02].*"):
        with pytest.raises(UserError, match=r"train\.stages does not train decoder\.cross_blocks\.\{0\.\.2\}"):
            stages((partly, 1e-3))
    with pytest.raises(UserError, match=r"train\.stages does not train projector\.weight"):
        stages(("projector.*", 0.0), (".*", 1e-3))
    write_import_record(base, "projector.{0,2}.weight")
    assert stages((r"projector\.[02].*", 1e-3))

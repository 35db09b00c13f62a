"""Tests of training in stages: frozen parameters, learning rates per stage, and resumption in any stage."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from one_rank import Killed, open_group_of_one, train
from safetensors.torch import load_file
from tiny_runs import tiny_run, write_run, write_shards

from pipelines.config import OptimizerConfig, StageConfig, TrainConfig, load_run
from pipelines.errors import ConfigError
from pipelines.formats.run_folder import RunFolder
from pipelines.worker.train.stages import plan_stages
from vlm.config import ConstantScheduleConfig
from vlm.training.loop import SLOWER, NotFiniteError

PROJECTOR = {"steps": 6, "groups": [{"pattern": "projector.*", "lr": 4e-3}]}
ALL = {"steps": 8, "groups": [{"pattern": "encoder.*", "lr": 1e-3}, {"pattern": ".*", "lr": 2e-3}]}


@pytest.fixture(autouse=True)
def group_of_one() -> Iterator[None]:
    with open_group_of_one():
        yield


@pytest.fixture
def make_run(tmp_path: Path) -> Any:
    shards = [write_shards(tmp_path / name, rows=9) for name in ("train", "val")]
    settings: Any = {"stages": [PROJECTOR, ALL], "checkpoint_every": 3, "validate_every": 14, "keep_checkpoints": 9}
    return lambda name, **more: write_run(tmp_path / name, tiny_run(steps=14, **settings, **more), *shards)


@pytest.fixture
def make_longer(tmp_path: Path) -> Any:
    """Return a function that writes a run with a constant learning rate and averaged weights."""
    shards = [write_shards(tmp_path / name, rows=9) for name in ("train", "val")]
    optimizer = OptimizerConfig(warmup_steps=2, ema_decay=0.9, schedule=ConstantScheduleConfig(kind="constant"))
    settings: Any = {"optimizer": optimizer, "checkpoint_every": 3, "validate_every": 14, "keep_checkpoints": 9}
    return lambda name, steps, **more: write_run(tmp_path / name, tiny_run(steps=steps, **settings, **more), *shards)


def weights(run: RunFolder, step: int) -> dict[str, torch.Tensor]:
    return load_file(run.checkpoint(step) / "model.safetensors")


def learning_rates(run: RunFolder) -> list[float]:
    return [metrics.values["train/lr"] for metrics in run.read_metrics()]


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_frozen_parameters_do_not_change_and_a_resumed_run_ends_with_equal_weights(
    make_run: Any, ema_decay: float | None
) -> None:
    optimizer = OptimizerConfig(warmup_steps=2, ema_decay=ema_decay)
    whole = make_run("whole", optimizer=optimizer)
    train(whole)
    first, middle, last = (weights(whole, step) for step in (3, 6, 14))
    moved = {name for name in first if not torch.equal(first[name], middle[name])}
    assert moved == {name for name in first if name.startswith("projector.")}
    assert {name for name in first if not torch.equal(middle[name], last[name])} == set(first)
    state = {name.partition(":")[0] for name in load_file(whole.checkpoint(6) / "training.safetensors")}
    assert state == moved  # frozen parameters have no optimizer state

    for after in (5, 8, 11):  # resume within a stage, at a boundary, and within the next stage
        broken = make_run(f"broken-{after}", optimizer=optimizer)
        with pytest.raises(Killed):
            train(broken, after)
        train(broken)
        assert all(torch.equal(tensor, last[name]) for name, tensor in weights(broken, 14).items())
        assert [m.values["train/lr"] for m in broken.read_metrics()] == [
            m.values["train/lr"] for m in whole.read_metrics()
        ]


def test_a_run_that_continues_a_shorter_run_equals_an_uninterrupted_run_if_the_schedule_is_constant(
    make_longer: Any,
) -> None:
    short, whole = make_longer("short", 8), make_longer("whole", 14)
    train(short)
    train(whole)
    last = weights(whole, 14)
    for after in (99, 11):  # with 11, the longer run is killed, and resumes from step 9
        longer = make_longer(f"longer-{after}", 14, start_from=str(short.checkpoint(8)), start_state="training")
        if after < 14:
            with pytest.raises(Killed):
                train(longer, after)
        train(longer)
        assert all(torch.equal(tensor, last[name]) for name, tensor in weights(longer, 14).items())
        assert longer.finished_checkpoints()[0] == longer.checkpoint(9)
    again = make_longer("again", 14, start_from=str(short.checkpoint(8)))
    train(again)
    assert any(not torch.equal(tensor, last[name]) for name, tensor in weights(again, 14).items())


@pytest.mark.parametrize("patterns", [["decoders.*"], [".*", "decoder.*"]])
def test_a_pattern_without_effect_in_a_later_stage_is_refused_before_the_first_step(
    tmp_path: Path, patterns: list[str]
) -> None:
    shards = [write_shards(tmp_path / name, rows=9) for name in ("train", "val")]
    stages = [PROJECTOR, {"steps": 8, "groups": [{"pattern": pattern, "lr": 1e-3} for pattern in patterns]}]
    run = write_run(tmp_path / "run", tiny_run(steps=14, stages=stages, checkpoint_every=3), *shards)
    with pytest.raises(ConfigError, match="has no effect") as caught:
        train(run)
    assert caught.value.got == patterns[-1]
    assert not run.finished_checkpoints()
    assert not list(run.read_metrics())


def test_each_training_stage_has_its_own_warmup_and_decay(make_run: Any) -> None:
    settings = make_run("run").read_run().config.train
    first, second = plan_stages(settings)
    assert [(s.first, s.end, s.lr) for s in (first, second)] == [(0, 6, 4e-3), (6, 14, 2e-3)]
    assert [first.lr_of(step, settings) for step in (0, 2)] == [2e-3, 4e-3]  # warmup_steps is 2
    assert [second.lr_of(step, settings) for step in (6, 8)] == [1e-3, 2e-3]
    assert first.lr_of(5, settings) == pytest.approx(0.05 * 4e-3)
    longer = plan_stages(TrainConfig.model_validate({"stages": [PROJECTOR, ALL | {"warmup_steps": 4}]}))[1]
    assert [longer.lr_of(step, settings) for step in (6, 9)] == [0.5e-3, 2e-3]


def test_the_number_of_steps_of_a_run_is_the_sum_over_its_training_stages() -> None:
    assert TrainConfig.model_validate({"stages": [PROJECTOR, ALL]}).steps == 14
    assert TrainConfig.model_validate({"stages": [StageConfig.model_validate(ALL)]}).steps == 8


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        ("train.steps=20", "steps is 20, but the stages together have 450 steps: remove the key steps"),
        (
            "train.stages=[{steps: 5, groups: [{pattern: '.*', lr: 0}]}]",
            "every group has lr 0, so no parameter would learn",
        ),
        ("train.stages=[{steps: 5, groups: []}]", "train.stages.0.groups"),
        ("train.stages=[{steps: 5, groups: [{pattern: '(', lr: 1}]}]", "not a regular expression"),
        ("train.stages=[{groups: [{pattern: '.*', lr: 1}]}]", "train.stages.0.steps: missing"),
        (
            "train.stages=[{steps: 5, groups: [{pattern: a, lr: 1}, {pattern: a, lr: 2}]}]",
            "two groups have the same pattern",
        ),
    ],
)
def test_invalid_training_stages_are_refused(setting: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_run("staged", overrides=[setting])
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (["train.optimizer.lr=5e-4"], "train.optimizer.lr has no effect"),
        (["train.optimizer={lr: 5e-4, warmup_steps: 10}"], "train.optimizer.lr has no effect"),
        (
            [
                "train.stages=[{steps: 5, warmup_steps: 2, groups: [{pattern: '.*', lr: 1}]}]",
                "train.optimizer.warmup_steps=9",
            ],
            "train.optimizer.warmup_steps has no effect",
        ),
    ],
)
def test_a_setting_of_the_optimizer_that_the_stages_replace_is_refused(settings: list[str], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        load_run("staged", overrides=settings)
    used = load_run("staged", overrides=["train.optimizer.warmup_steps=9", "train.optimizer.weight_decay=0"])
    assert used.train.optimizer.warmup_steps == 9
    assert load_run("demo", overrides=["train.optimizer.lr=5e-4"]).train.optimizer.lr == 5e-4


def test_the_error_of_a_training_with_stages_that_diverged_names_the_settings_of_the_stages(
    make_run: Any, tmp_path: Path
) -> None:
    error = NotFiniteError("training diverged", where="step 1", got="loss nan", fix=SLOWER)
    error.step = 1
    staged = train(make_run("staged"))
    assert "lower the lr of the groups in train.stages" in staged.with_pictures(error).fix
    assert "train.optimizer" not in staged.with_pictures(error).fix
    shards = [write_shards(tmp_path / f"plain-{name}", rows=9) for name in ("train", "val")]
    plain = train(write_run(tmp_path / "plain", tiny_run(steps=2), *shards))
    assert "lower train.optimizer.lr" in plain.with_pictures(error).fix

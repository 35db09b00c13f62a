"""Tests of CIDEr during training, and of training that ends early because the validation metric no longer improves."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from file_calls import counted_calls
from one_rank import Killed, open_group_of_one, train
from safetensors.torch import load_file
from tiny_runs import tiny_run, write_run, write_shards

from pipelines.config import OptimizerConfig, RunConfig
from pipelines.driver.evaluate.metrics import ngram_metrics
from pipelines.driver.train.run_folders import finished_result
from pipelines.errors import ConfigError
from pipelines.formats.run_folder import Metrics, RunFolder, write_json
from pipelines.worker.caption import load_captioner
from pipelines.worker.train.checkpoints import MetricHistory
from vlm.text.words import words


@pytest.fixture(autouse=True)
def group_of_one() -> Iterator[None]:
    with open_group_of_one():
        yield


@pytest.fixture
def make_run(tmp_path: Path) -> Any:
    shards = [write_shards(tmp_path / name, rows=9, texts=2) for name in ("train", "val")]
    return lambda name, **settings: write_run(tmp_path / name, tiny_run(**settings), *shards)


def scores_of(run: RunFolder) -> dict[int, float]:
    return {m.step: m.values["val/cider"] for m in run.read_metrics() if "val/cider" in m.values}


def test_the_logged_cider_equals_the_cider_of_an_evaluation_of_the_same_captions(make_run: Any) -> None:
    optimizer = OptimizerConfig(lr=2e-2, warmup_steps=2, ema_decay=0.8)
    run = make_run("run", steps=50, score_every=40, validate_every=20, validate_rows=8, optimizer=optimizer)
    train(run)
    assert list(scores_of(run)) == [40, 50]
    captioner, shards = load_captioner(str(run.checkpoint(50))), train(run).validate_shards
    rows = [shards.row(index) for index in range(8)]
    answers = captioner.complete([row.pixels for row in rows], [""] * 8, captioner.model.config.generation)
    captions = [words(getattr(answer, "text", "")) for answer in answers]
    references = [[words(text) for _, text in row.texts] for row in rows]
    expected = float(ngram_metrics(captions, references)["cider"](np.ones((1, 8)))[0])
    assert scores_of(run)[50] == pytest.approx(expected, rel=1e-9)
    assert expected > 0.1


STALLED: dict[str, Any] = {
    "steps": 40,
    "score_every": 4,
    "validate_every": 40,
    "checkpoint_every": 5,
    "best_by": "cider",
    "stop": 2,
    "optimizer": OptimizerConfig(lr=1e-9, warmup_steps=2),  # this learning rate is too small to change a caption
}


def test_early_stopping_ends_a_resumed_run_at_the_same_step_as_an_uninterrupted_run(make_run: Any) -> None:
    whole = make_run("whole", **STALLED)
    train(whole).write_result()
    result = finished_result(whole)
    assert result is not None
    assert (result.step, Path(result.checkpoint)) == (12, whole.checkpoint(12))
    assert result.best_checkpoint == str(whole.checkpoint(4)), "step 4 is no multiple of checkpoint_every"
    assert list(scores_of(whole)) == [4, 8, 12]
    assert {"train/loss", "val/loss", "val/blind_gap", "val/cider"} <= result.metrics.keys()
    broken = make_run("broken", **STALLED)
    with pytest.raises(Killed):
        train(broken, 10)  # step 8 has a score, but the last checkpoint is from step 5
    assert list(scores_of(broken)) == [4, 8]
    train(broken)
    final = [load_file(run.checkpoint(12) / "model.safetensors") for run in (whole, broken)]
    assert all(torch.equal(final[0][name], final[1][name]) for name in final[0])
    again = train(broken)  # the run was killed after its last checkpoint and before result.json
    again.write_result()
    assert finished_result(broken) == result.model_copy(
        update={
            "checkpoint": str(broken.checkpoint(12)),
            "best_checkpoint": str(broken.checkpoint(4)),
            "metrics": [*broken.read_metrics()][-1].values,
            "seconds": 0.0,
        }
    )


def test_training_does_not_stop_early_while_the_metric_improves_within_the_patience(make_run: Any) -> None:
    run = make_run("run", steps=40, score_every=4, best_by="cider", stop=2)
    stop = MetricHistory(run, run.read_run().config.train, 0)
    for cider, reached in ((0.1, False), (0.0, False), (0.2, False), (0.2, False), (0.1, True)):
        stop.add({"val/loss": 1.0})  # a step without a score does not count
        stop.add({"val/cider": cider})
        assert stop.ends_training == reached
    losses = make_run("losses", steps=40, validate_every=4, stop=1)
    for step, loss in ((4, 3.0), (8, 2.0), (12, 2.5), (16, 2.6)):
        write_json(losses.metrics(step), Metrics(step=step, time=0.0, values={"val/loss": loss}))
    ended = [MetricHistory(losses, losses.read_run().config.train, step).ends_training for step in (4, 8, 12)]
    assert ended == [False, False, True]


def test_the_step_with_the_best_metric_has_a_checkpoint_if_the_best_checkpoint_is_to_be_registered(
    make_run: Any,
) -> None:
    settings = STALLED | {"steps": 12, "score_every": 3, "stop": None, "keep_checkpoints": 1}
    best = make_run("best", **settings, register="best")
    train(best).write_result()
    assert list(scores_of(best)) == [3, 6, 9, 12]
    assert len({*scores_of(best).values()}) == 1, "the first of several equal values is the best"
    result = finished_result(best)
    assert result is not None
    assert result.best_checkpoint == str(best.checkpoint(3))
    last = make_run("last", **settings)
    train(last)
    assert [folder.name for folder in last.finished_checkpoints()] == ["step_000012"]
    assert not tiny_run(stop=1, adapter={"pattern": "x"}, start_from="x").train.saves_best


def test_the_step_in_train_register_has_a_checkpoint_that_is_kept(make_run: Any) -> None:
    run = make_run("run", steps=12, checkpoint_every=4, keep_checkpoints=1, register=7)
    train(run)
    assert [folder.name for folder in run.finished_checkpoints()] == ["step_000007", "step_000012"]


def test_the_last_step_of_a_run_that_ends_early_by_its_loss_has_a_cider(make_run: Any) -> None:
    optimizer = OptimizerConfig(lr=1e-9, warmup_steps=2, ema_decay=None)
    run = make_run("run", steps=40, validate_every=4, score_every=30, stop=1, optimizer=optimizer, batch_size=4)
    trainer = train(run)
    assert trainer.done < 40
    assert list(scores_of(run))[-1] == trainer.done


def test_ending_or_resuming_a_run_of_many_steps_does_not_read_the_metrics_of_all_steps(make_run: Any) -> None:
    run = make_run("run", steps=40, log_every=1, validate_every=20, checkpoint_every=20, stop=3)
    trainer = train(run)
    assert len(list(run.read_metrics())) == 40
    with counted_calls(run.metrics(0).parent) as calls:
        trainer.write_result()
        MetricHistory(run, run.read_run().config.train, 40)
    assert {int(Path(path).stem) for path in calls.opened} <= {20, 39, 40}


def test_choosing_checkpoints_by_cider_is_refused_if_captions_are_not_scored_during_training() -> None:
    run = tiny_run().model_dump(mode="json", by_alias=True)
    run["train"]["best_by"] = "cider"
    with pytest.raises(ConfigError, match="best_by cider needs score_every"):
        RunConfig.from_json(json.dumps(run))
    science = tiny_run().train.science()
    assert not {"score_every", "best_by", "stop", "label_smoothing"} & science.keys()
    used = tiny_run(score_every=3, best_by="cider", stop=2, label_smoothing=0.1).train.science()
    assert used == science | {"score_every": 3, "best_by": "cider", "stop": 2, "label_smoothing": 0.1}

"""Training of a text-only model: windows of a token file, exact resume, a captioner that starts from the decoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from one_rank import Killed, open_group_of_one, train
from PIL import Image
from text_runs import random_texts, text_run, write_texts
from tiny_runs import tiny_model_config, tiny_run, write_shards

import vlm
from pipelines.config import LocalPlatformConfig, RunConfig
from pipelines.driver.shard.run import ShardReport
from pipelines.driver.train.run import prepare
from pipelines.errors import StageFailed, UserError
from pipelines.formats.run_files.token_file import TRAIN_TOKENS, VALIDATE_TOKENS, read_tokens
from pipelines.formats.run_folder import RunFolder
from pipelines.platform import Platform, local
from pipelines.worker.data.windows import Windows, training_windows
from pipelines.worker.train.initial_weights import ModelBuilder
from pipelines.worker.train.text_trainer import TextTrainer
from vlm.batch import IGNORE
from vlm.factory import build_model
from vlm.text import load


@pytest.fixture(scope="module", autouse=True)
def group() -> Any:
    with open_group_of_one():
        yield


@pytest.fixture
def laptop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Platform:
    monkeypatch.setenv("LAKESIGHT_HOME", str(tmp_path / "home"))
    return local(LocalPlatformConfig())


@pytest.fixture
def report(tmp_path: Path) -> ShardReport:
    return write_texts(tmp_path / "texts", random_texts(20))


def weights(run: RunFolder, step: int) -> bytes:
    return (run.checkpoint(step) / "model.safetensors").read_bytes()


def test_each_token_of_held_out_windows_is_a_target_once_and_start_tokens_are_never_targets(
    laptop: Platform, report: ShardReport
) -> None:
    run = prepare(text_run(), laptop, report, report)
    ids, summary = read_tokens(run.path / TRAIN_TOKENS)
    windows = Windows(ids, context=32, bos_id=1, pad_id=0)
    batch = windows.held_out_batch(np.arange(summary.windows(32)))
    labels = batch.labels_BT[batch.labels_BT != IGNORE].tolist()
    assert labels == [i for i in ids.tolist() if i != 1]
    assert len(labels) == summary.targets == summary.chars + summary.texts


def test_the_windows_of_an_epoch_cover_the_tokens_and_do_not_depend_on_ranks_or_threads() -> None:
    windows = Windows(np.arange(3, 3 + 320, dtype=np.uint16), context=32, bos_id=1, pad_id=0)

    def steps(ranks: int, workers: int) -> list[list[list[int]]]:
        parts = [
            list(
                training_windows(
                    windows, steps=range(4), rank=rank, world_size=ranks, batch_size=10, seed=3, workers=workers
                )
            )
            for rank in range(ranks)
        ]
        return [[row for (batch,) in part for row in batch.tokens_BT.tolist()] for part in zip(*parts, strict=True)]

    alone = steps(1, 0)
    assert alone == steps(2, 2)
    epochs = [sorted(token for row in rows for token in row) for rows in alone]
    assert epochs == [list(range(3, 323))] * 4, "each epoch of ten windows has every token once"
    assert len({min(row[0] % 32 for row in rows) for rows in alone}) > 1, "epochs are cut at different places"


def test_a_resumed_training_on_text_equals_the_uninterrupted_training_and_lowers_the_loss(
    laptop: Platform, report: ShardReport, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"steps": 40, "optimizer": {"lr": 1e-2, "warmup_steps": 2}, "batch_size": 8}
    run = prepare(text_run(**settings), laptop, report, report)
    train(run, kind=TextTrainer)
    first, *_, last = run.read_metrics()
    assert last.values["val/loss"] < 0.8 * first.values["train/loss"]
    _, summary = read_tokens(run.path / VALIDATE_TOKENS)
    per_char = last.values["val/loss"] * summary.targets / summary.chars
    assert last.values["val/loss_per_char"] == pytest.approx(per_char)
    assert "val/blind_gap" not in last.values
    samples = json.loads(run.samples(40).read_text())["samples"]
    assert samples[0]["caption"].startswith(samples[0]["text"][:7])

    again = RunFolder(tmp_path / "again")
    again.path.mkdir()
    for file in (run.run_file, run.tokenizer, *run.path.glob("tokens-*")):
        (again.path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(Killed):
        train(again, after=23, kind=TextTrainer)
    assert train(again, kind=TextTrainer).resume_step == 20
    assert weights(again, 40) == weights(run, 40)


def test_the_error_for_a_damaged_token_file_names_the_file(laptop: Platform, report: ShardReport) -> None:
    run = prepare(text_run(), laptop, report, report)
    tokens = run.path / TRAIN_TOKENS
    tokens.write_bytes(tokens.read_bytes()[:-2])
    with pytest.raises(StageFailed, match=r"token file is damaged.*tokens-train\.bin.*instead of"):
        read_tokens(run.path / TRAIN_TOKENS)


def test_a_text_only_model_continues_a_text_refuses_pictures_and_has_no_encoder() -> None:
    config = text_run().model
    captioner = vlm.build(config, [])
    names = {name.partition(".")[0] for name, _ in captioner.model.named_parameters()}
    assert names == {"decoder"}
    pieces = list(captioner.stream([], "the cat", max_new_tokens=8))
    assert len("".join(pieces)) <= 8
    assert captioner.request([], "the").prefix == [1, *captioner.tokenizer.encode("the")]
    picture = Image.new("RGB", (16, 16))
    for call in (lambda: captioner.caption([picture]), lambda: captioner.request([picture])):
        with pytest.raises(UserError, match="the model reads no pictures"):
            call()


def test_a_captioner_starts_from_the_decoder_of_a_text_only_model(
    laptop: Platform, report: ShardReport, tmp_path: Path
) -> None:
    text = prepare(text_run(steps=8), laptop, report, report)
    train(text, kind=TextTrainer)
    shards = write_shards(tmp_path / "pictures", rows=8)
    pictures = report.model_copy(
        update={"folder": str(shards.folder), "num_rows": 8, "content_hash": shards.manifest.content_hash}
    )
    start: dict[str, Any] = {"start_from": str(text.checkpoint(8))}
    run = prepare(tiny_run(ranks=1, steps=4, **start), laptop, pictures, pictures)
    assert run.tokenizer.read_bytes() == text.tokenizer.read_bytes()
    file = run.read_run().config
    builder = ModelBuilder(file.model, file.train, load(run.tokenizer))
    torch.manual_seed(0)
    started = dict(builder.model(torch.device("cpu")).named_parameters())
    torch.manual_seed(0)
    fresh = dict(build_model(file.model, builder.tokenizer.vocab_size).named_parameters())
    learned = vlm.load(text.checkpoint(8), device="cpu").model.state_dict()
    assert {name for name in started if torch.equal(started[name], fresh[name])} >= {
        name for name in started if name.startswith(("encoder.", "projector."))
    }
    assert all(torch.equal(started[name], learned[name]) for name in started if name.startswith("decoder."))
    train(run)
    assert "val/blind_gap" in [*run.read_metrics()][-1].values

    for setting in ({"adapter": {"pattern": "decoder.*"}}, {"start_state": "training"}):
        with pytest.raises(UserError, match="a decoder alone"):
            prepare(tiny_run(ranks=1, **start, **setting), laptop, pictures, pictures)
    wider = tiny_run(ranks=1, **start).model.model_dump()
    wider["decoder"]["context"] = 40
    with pytest.raises(UserError, match=r"differs from the run's model.*decoder\.context is 32.*40"):
        prepare(tiny_run(ranks=1, model=wider, **start), laptop, pictures, pictures)


def test_a_text_source_needs_a_text_only_model_and_vice_versa() -> None:
    run = text_run().model_dump(by_alias=True)
    for changes in ({"model": tiny_model_config().model_dump()}, {"data": tiny_run().data.model_dump()}):
        with pytest.raises(ValueError, match=r"model\.text_only must be true for a source of kind text"):
            RunConfig.model_validate(run | changes)

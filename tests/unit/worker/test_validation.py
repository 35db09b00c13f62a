"""Tests of validation: training, validation and evaluation define the loss equally, and a loss must be finite."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_runs import tiny_model_config, write_shards

from pipelines.config import TextWeights
from pipelines.driver.evaluate.metrics import ScoredRow, model_metrics
from pipelines.formats.shards import Row, Shards
from pipelines.worker.data.batches import Collator
from pipelines.worker.rank.metrics import MeanSinceLog
from pipelines.worker.rank.relay import ProgressRelay
from pipelines.worker.score import score_rows
from pipelines.worker.train.validation import caption_samples, name_pictures, validate
from vlm import text
from vlm.captioner import Captioner
from vlm.errors import UserError
from vlm.factory import build_model
from vlm.training.loop import NotFiniteError
from vlm.training.objective import row_scores

ROWS = 5


@pytest.mark.parametrize("weights", ["frequency", "uniform"])
def test_the_loss_of_validation_and_evaluation_is_the_mean_over_all_texts_from_which_training_draws(
    tmp_path: Path, weights: TextWeights
) -> None:
    shards = write_shards(tmp_path / "shards", rows=ROWS, texts=2, repeats=2, text_weights=weights)
    config = tiny_model_config()
    tokenizer = text.learn(config.text, [])
    torch.manual_seed(3)
    model = build_model(config, tokenizer.vocab_size).eval()
    collator = Collator(tokenizer, config)
    nats = tokens = 0.0
    for row in map(shards.row, range(ROWS)):
        drawn = row.texts if weights == "frequency" else sorted(set(row.texts))
        for one in drawn:
            with torch.no_grad():
                loss, count, _ = row_scores(model, collator.collate([row], [one]))
            nats, tokens = nats + loss.item() / len(drawn), tokens + int(count) / len(drawn)
    settings = {"step": 0, "num_rows": ROWS, "rank": 0, "world_size": 1, "report_progress": lambda: None}
    found = [validate(model, shards, collator, batch_size=size, **settings) for size in (2, 64)]  # type: ignore[arg-type]
    for values in found:
        assert values["val/loss"] == pytest.approx(nats / tokens, rel=1e-5)
        assert values["val/blind_gap"] == pytest.approx(found[0]["val/blind_gap"], rel=1e-4)
    model.eval()
    captioner = Captioner(model, tokenizer)
    scored = [
        ScoredRow(**vars(score), neighbour=None)
        for score in score_rows(captioner, shards, range(ROWS), captioner.settings(temperature=0.0))
    ]
    evaluated = model_metrics(scored)["loss"](np.ones((1, ROWS)))[0]
    assert evaluated == pytest.approx(nats / tokens, rel=1e-5)
    assert scored[1].references == ("green", "green", "green", "green x"), "references keep repeated texts"


def test_a_loss_that_is_nan_at_a_late_token_is_an_error_of_the_evaluation(tmp_path: Path) -> None:
    """The captions have one token, so only the losses of the longer texts reach the token with the NaN."""
    shards = write_shards(tmp_path / "shards", rows=ROWS)
    config = tiny_model_config()
    tokenizer = text.learn(config.text, [])
    model = build_model(config, tokenizer.vocab_size).eval()
    with torch.no_grad():
        model.decoder.tokens.weight[tokenizer.encode("e")] = math.nan
    captioner = Captioner(model, tokenizer)
    settings = captioner.settings(temperature=0.0, max_new_tokens=1)
    with pytest.raises(UserError, match=r"NaN or infinite values.*decoder\.tokens\.weight"):
        list(score_rows(captioner, shards, range(ROWS), settings))


def test_validation_reads_each_picture_of_a_batch_only_once_for_any_number_of_its_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = write_shards(tmp_path / "shards", rows=ROWS, texts=4)
    config = tiny_model_config()
    tokenizer = text.learn(config.text, [])
    model, collator = build_model(config, tokenizer.vocab_size), Collator(tokenizer, config)
    read: list[int] = []
    row = Shards.row

    def counted(self: Shards, index: int) -> Row:
        read.append(index)
        return row(self, index)

    monkeypatch.setattr(Shards, "row", counted)
    validate(
        model,
        shards,
        collator,
        step=0,
        num_rows=ROWS,
        batch_size=64,
        rank=0,
        world_size=1,
        report_progress=lambda: None,
    )
    assert sorted(read) == list(range(ROWS))


def test_the_human_text_beside_a_sample_caption_is_not_always_the_first_text_of_its_picture(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", rows=4, texts=2)
    config = tiny_model_config()
    tokenizer = text.learn(config.text, [])
    samples = caption_samples(build_model(config, tokenizer.vocab_size), tokenizer, shards, 4)
    assert [sample.text for sample in samples] == ["red", "green x", "blue", "white x"]


def test_the_logged_training_loss_is_the_mean_per_token_since_the_last_log() -> None:
    mean = MeanSinceLog()
    mean.add(3.0, 10)
    mean.add(1.0, 30)
    assert mean.take() == pytest.approx(1.5)
    mean.add(9.0, 5)
    mean.restart()  # after a checkpoint, a new mean starts
    mean.add(2.0, 5)
    assert mean.take() == pytest.approx(2.0)


def test_a_validation_loss_that_is_not_finite_names_its_pictures_and_step(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", rows=6)  # only row 3 has a text with a `w`
    tokenizer = text.learn(tiny_model_config().text, shards.texts())
    model = build_model(tiny_model_config(), tokenizer.vocab_size)

    def check() -> dict[str, float]:
        return validate(
            model,
            shards,
            Collator(tokenizer, tiny_model_config()),
            step=41,
            num_rows=6,
            batch_size=4,
            rank=0,
            world_size=1,
            report_progress=lambda: None,
        )

    assert math.isfinite(check()["val/loss"])
    [letter] = tokenizer.encode("w")
    with torch.no_grad():
        model.decoder.tokens.weight[letter] = math.nan
    with pytest.raises(NotFiniteError, match="NaN or infinity for tiny/3\\.") as caught:
        check()
    assert caught.value.where == "the validation after step 41"
    assert caught.value.in_validation


def test_an_error_about_many_pictures_names_only_the_first_pictures() -> None:
    named = name_pictures([f"p{number}" for number in range(100)])
    assert named.startswith("p0, p1, ")
    assert named.endswith(" and 84 more")


def test_each_generated_token_of_the_sample_captions_is_reported_as_progress(tmp_path: Path) -> None:
    shards, config = write_shards(tmp_path / "shards", rows=ROWS), tiny_model_config()
    tokenizer = text.learn(config.text, [])
    torch.manual_seed(3)
    model, reports = build_model(config, tokenizer.vocab_size), list[int]()
    relay = ProgressRelay(lambda: reports.append(1), torch.device("cpu"), sharded=False)
    with relay.reporting(model.decoder):
        samples = caption_samples(model, tokenizer, shards, 3)
    assert len(samples) == 3
    tokens = [len(tokenizer.encode(sample.caption)) for sample in samples]
    assert sum(tokens) <= len(reports) <= sum(tokens) + 3  # the end of a caption is a token too
    caption_samples(model, tokenizer, shards, 1)
    assert len(reports) <= sum(tokens) + 3, "nothing is reported after the captions"

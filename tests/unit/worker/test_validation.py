"""Tests that a validation loss that is not finite names the pictures that cause it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tiny_runs import tiny_model_config, write_shards

from pipelines.worker.data.batches import Collator
from pipelines.worker.train.validation import name_pictures, validate
from vlm import text
from vlm.build import build_model
from vlm.training.loop import NotFiniteError


def test_a_validation_loss_that_is_not_finite_names_its_pictures_and_step(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", rows=6)  # row 3 alone has a text with a `w`
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


def test_a_long_list_of_pictures_is_cut() -> None:
    named = name_pictures([f"p{number}" for number in range(100)])
    assert named.startswith("p0, p1, ")
    assert named.endswith(" and 84 more")

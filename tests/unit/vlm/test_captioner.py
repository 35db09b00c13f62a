"""Tests of the captioner: the size of batches, the order of results, and errors that concern only one row."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import tiny_config, tiny_model, tiny_pixels

from vlm import captioner as captioner_module
from vlm import text
from vlm.captioner import Captioner
from vlm.config import GenerationConfig
from vlm.errors import UserError
from vlm.factory import build_model

SETTINGS: dict[str, Any] = {"max_new_tokens": 6}
MIN_SIDE = 8


def files(count: int) -> list[bytes | str | None]:
    found: list[bytes | str | None] = []
    for pixels in tiny_pixels(count):
        buffer = io.BytesIO()
        Image.fromarray(pixels.numpy()).save(buffer, "PNG")
        found.append(buffer.getvalue())
    return found


@pytest.mark.parametrize("changes", [{}, {"temperature": 1.0, "seed": 5}, {"num_beams": 3}])
def test_a_caption_does_not_depend_on_the_lengths_of_other_prompts_in_the_batch(changes: dict[str, object]) -> None:
    captioner = Captioner(*tiny_model("other"))
    settings = SETTINGS | changes
    images, prompts = files(12), ["", "what", "a long question", "why"] * 3
    together = captioner.caption(images, prompts, min_side=MIN_SIDE, **settings)
    for image, prompt, result in zip(images, prompts, together, strict=True):
        (alone,) = captioner.caption([image], [prompt], min_side=MIN_SIDE, **settings)
        assert (alone.caption, alone.num_tokens, alone.sha256) == (result.caption, result.num_tokens, result.sha256)
        assert alone.mean_logprob == pytest.approx(result.mean_logprob, abs=1e-4)
    assert len({result.caption for result in together}) > 1


def test_a_long_prompt_or_a_broken_picture_causes_an_error_only_in_its_row() -> None:
    captioner = Captioner(*tiny_model("other"))
    good, other, broken = *files(2), b"no picture"
    results = captioner.caption([good, other, broken], ["a", "what" * 20, "a"], min_side=MIN_SIDE, **SETTINGS)
    assert [result.error is None for result in results] == [True, False, False]
    assert "does not fit the model's context" in str(results[1].error)
    assert "not_an_image" in str(results[2].error)
    assert results[1].sha256 is not None


def test_a_prompt_that_is_not_unicode_causes_an_error_only_in_its_row() -> None:
    captioner = Captioner(*tiny_model("other"))
    good, bad = captioner.caption(files(2), ["what", "\ud800"], min_side=MIN_SIDE, **SETTINGS)
    assert (good.error, bad.caption) == (None, None)
    assert "not valid Unicode" in str(bad.error)


def test_a_caption_ends_before_the_first_stop_string() -> None:
    captioner = Captioner(*tiny_model("other"))
    (free,) = captioner.caption(files(1), [""], min_side=MIN_SIDE, **SETTINGS)
    assert free.caption is not None
    word = free.caption[2:4]
    (cut,) = captioner.caption(files(1), [""], min_side=MIN_SIDE, **SETTINGS, stop=(word,))
    assert cut.caption == free.caption[: free.caption.index(word)]


def test_the_captioner_limits_the_rows_of_a_batch_and_the_positions_of_all_beams(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(captioner_module, "BATCH_ROWS", 5)
    monkeypatch.setattr(captioner_module, "BATCH_POSITIONS", 200)
    model, tokenizer = tiny_model("plain")
    shapes: list[tuple[int, int]] = []
    model.decoder.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape[:2])))
    pictures = [np.asarray(pixels) for pixels in tiny_pixels(12)]
    prompts = ["", "q" * 30, "", "what"] * 3
    for num_beams in (1, 4):
        shapes.clear()
        settings = GenerationConfig(max_new_tokens=6, num_beams=num_beams)
        answers = Captioner(model, tokenizer).complete(pictures, prompts, settings)
        first_passes = [(rows, length) for rows, length in shapes if length > 1]
        assert sum(rows for rows, _ in first_passes) == len(answers) == 12
        assert all(rows <= 5 for rows, _ in first_passes)
        assert all(rows == 1 or rows * (length + 6) * num_beams <= 200 for rows, length in first_passes)
        assert [length for _, length in first_passes] == sorted((length for _, length in first_passes), reverse=True)


@pytest.mark.parametrize("limits", [{"max_pixels": 100}, {"min_side": 17}])
def test_size_limits_hold_for_pillow_images_as_for_files(limits: dict[str, Any]) -> None:
    captioner = Captioner(*tiny_model("other"))
    (data,) = files(1)
    assert isinstance(data, bytes)
    picture = Image.open(io.BytesIO(data))
    image, file = captioner.caption([picture, data], **limits, **SETTINGS)
    assert image.error == file.error
    assert str(image.error).startswith(("too_large: 16 x 16 pixels", "too_small: 16 x 16 pixels"))


def test_the_log_probabilities_of_a_text_only_model_are_computed_without_pictures() -> None:
    config = tiny_config("plain").model_copy(update={"text_only": True})
    tokenizer = text.learn(config.text, [])
    torch.manual_seed(1)
    captioner = Captioner(build_model(config, tokenizer.vocab_size).eval(), tokenizer)
    first, second = captioner.logprobs([], ["a cat", "a"], [" sat", " dog"])
    (alone,) = captioner.logprobs([], "a cat", [" sat"])
    assert first.total == pytest.approx(alone.total, rel=1e-4)
    assert "".join(second.tokens) == " dog"
    (other,) = captioner.logprobs([], "b", [" sat"])
    assert other.total != pytest.approx(alone.total, rel=1e-4)
    with pytest.raises(UserError, match="the model reads no pictures"):
        captioner.logprobs(tiny_pixels(1)[0].numpy(), "a cat", [" sat"])
    with pytest.raises(UserError, match="different lengths"):
        Captioner(*tiny_model("plain")).logprobs([], "a cat", [" sat"])

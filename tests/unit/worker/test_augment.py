"""Tests of augmentation: it is reproducible and off by default, and must not make the text of a picture wrong."""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from tiny_runs import global_batches, tiny_run, write_shards

from pipelines.config import AugmentConfig, RunConfig
from pipelines.errors import ConfigError
from pipelines.formats.shards import Row, Shards
from pipelines.worker.data.augment import Augmenter
from pipelines.worker.data.order import RowPicks
from vlm.text.chars import CharTokenizer

ALL = AugmentConfig(
    scale=(0.4, 0.9), flip=0.5, flip_vertical=0.5, rotate=0.5, erase=0.5, brightness=0.4, contrast=0.4, saturation=0.4
)
TOKENIZER = CharTokenizer("abcdefghijklmnopqrstuvwxyz ")
EPOCHS = 40
SLOPE = np.linspace(0, 255, 16 * 24).astype(np.uint8).reshape(16, 24)
PICTURE = np.stack([SLOPE // 2 + 60, SLOPE, 255 - SLOPE], axis=-1)
"""Picture, 16 pixels high and 24 pixels wide, with a green gradient that grows to the right and downwards."""

Pixels = npt.NDArray[np.uint8]


def augmented(config: AugmentConfig, text: str = "a cat", prompt: str = "", picture: Pixels = PICTURE) -> list[Pixels]:
    """Return the augmented picture of each of EPOCHS epochs."""
    picks = RowPicks(np.full(EPOCHS, 7), np.arange(EPOCHS))
    texts = [(prompt, text)] * EPOCHS
    return [row.pixels for row in Augmenter(config, 3).rows([Row("a/1", picture, texts)] * EPOCHS, texts, picks)]


def samples(
    shards: Shards, steps: range = range(8), world_size: int = 1, workers: int = 0, config: AugmentConfig | None = ALL
) -> list[tuple[bytes, str]]:
    """Return pixels and text of each sample in each global batch."""
    batches = global_batches(shards, TOKENIZER, steps, world_size=world_size, workers=workers, augment=config)
    return [sample for batch in batches for sample in batch]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    return write_shards(tmp_path_factory.mktemp("augment") / "shards", rows=10, texts=2)


def test_augmented_pictures_do_not_depend_on_the_number_of_ranks_or_workers_or_on_the_first_step(
    shards: Shards,
) -> None:
    whole = samples(shards)
    assert len({pixels for pixels, _ in whole}) > 50, "rows differ by epoch; bright rows may all be white"
    for world_size, workers in itertools.product((1, 2, 4), (0, 1, 3)):
        assert samples(shards, world_size=world_size, workers=workers) == whole
    assert samples(shards, range(5, 8), 2, 3) == whole[5 * 8 :]


def test_training_pixels_equal_the_pixels_of_the_shards_without_augmentation(shards: Shards) -> None:
    stored = {shards.row(index).pixels.tobytes() for index in range(len(shards))}
    assert {pixels for pixels, _ in samples(shards, config=None)} == stored
    assert tiny_run().train.augment is None


def test_only_the_shown_text_of_a_picture_limits_its_augmentation(shards: Shards) -> None:
    stored = {shards.row(index).pixels.tobytes() for index in range(len(shards))}
    pictures = samples(shards, config=AugmentConfig(flip=1, sided_words=("x",)))
    assert {text.endswith(" x") for _, text in pictures} == {True, False}
    assert all((pixels in stored) == text.endswith(" x") for pixels, text in pictures)


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("", "a cat on the left of a dog"),
        ("", "the LEFT-hand one"),
        ("What is on the right?", "a dog"),
        ("", "it turns clockwise."),
        ("detect cat", "<loc0102><loc0307><loc0922><loc0716> cat"),
    ],
)
def test_a_picture_whose_text_names_a_side_is_never_flipped(prompt: str, text: str) -> None:
    assert all((pixels == PICTURE).all() for pixels in augmented(AugmentConfig(flip=1), text, prompt))


@pytest.mark.parametrize("text", ["a cat", "he is upright, and bright", "leftover pizza"])
def test_pictures_whose_text_names_no_side_are_sometimes_flipped(text: str) -> None:
    flipped = [(pixels == PICTURE[:, ::-1]).all() for pixels in augmented(AugmentConfig(flip=0.5), text)]
    same = [(pixels == PICTURE).all() for pixels in augmented(AugmentConfig(flip=0.5), text)]
    assert all(one != other for one, other in zip(flipped, same, strict=True))
    assert EPOCHS / 4 < sum(flipped) < EPOCHS * 3 / 4


def test_words_that_prevent_flipping_can_be_set_for_other_languages() -> None:
    config = AugmentConfig(flip=1, sided_words=("links", "nach rechts"))
    assert [(pixels == PICTURE).all() for pixels in augmented(config, "Er schaut nach rechts")] == [True] * EPOCHS
    assert [(pixels == PICTURE).all() for pixels in augmented(config, "Er hat recht")] == [False] * EPOCHS
    config = AugmentConfig(
        flip=1, sided_words=("\u092c\u093e\u090f\u0901",)
    )  # Hindi word for left, which ends in a sign
    assert [(pixels == PICTURE).all() for pixels in augmented(config, "\u092c\u093e\u090f\u0901 x")] == [True] * EPOCHS


def test_an_augmentation_crop_has_an_area_within_the_configured_scale_and_a_random_position() -> None:
    row = np.linspace(0, 255, 96)
    picture = np.stack([np.tile(row, (96, 1)), np.tile(row, (96, 1)).T, np.zeros((96, 96))], axis=-1).astype(np.uint8)
    crops = augmented(AugmentConfig(scale=(0.25, 0.64)), picture=picture)
    across = np.array([float(pixels[:, -1, 0].mean()) - float(pixels[:, 0, 0].mean()) for pixels in crops]) / 255
    down = np.array([float(pixels[-1, :, 1].mean()) - float(pixels[0, :, 1].mean()) for pixels in crops]) / 255
    assert (across * down > 0.22).all()
    assert (across * down < 0.66).all()
    assert (across / down < 1.4).all()
    assert (down / across < 1.4).all()
    lefts = [float(pixels[:, 0, 0].mean()) for pixels in crops]
    assert min(lefts) < 20 < 80 < max(lefts)


def test_a_picture_with_boxes_in_its_text_is_not_cropped_but_its_colours_may_change() -> None:
    boxed = "<loc0102><loc0307><loc0922><loc0716> cat"
    assert all((pixels == PICTURE).all() for pixels in augmented(AugmentConfig(scale=(0.2, 0.5)), boxed))
    assert not any((pixels == PICTURE).all() for pixels in augmented(AugmentConfig(brightness=0.5), boxed))


def measured(pixels: Pixels) -> tuple[float, float, float]:
    """Return mean and standard deviation of the grey values, and the mean difference of colour values from grey."""
    grey = pixels @ np.array([0.299, 0.587, 0.114])
    return float(grey.mean()), float(grey.std()), float(np.abs(pixels - grey[:, :, None]).mean())


@pytest.mark.parametrize(
    ("strength", "changed", "kept"),
    [("brightness", [0, 1, 2], []), ("contrast", [1, 2], [0]), ("saturation", [2], [0, 1])],
)
def test_brightness_contrast_and_saturation_each_change_only_their_own_property(
    strength: str, changed: list[int], kept: list[int]
) -> None:
    middle = PICTURE // 2 + 64  # grey levels that augmentation does not clip
    config = AugmentConfig.model_validate({strength: 0.3})
    values = np.array([measured(pixels) for pixels in augmented(config, picture=middle)]) / measured(middle)
    assert np.abs(values[:, kept] - 1).max(initial=0) < 0.02
    assert (np.abs(values[:, changed] - 1) < 0.32).all()
    assert (values[:, changed].min(axis=0) < 0.8).all()
    assert (values[:, changed].max(axis=0) > 1.2).all()


def test_augmentation_keeps_shape_and_type_and_does_not_modify_the_pixels_in_the_shard() -> None:
    square = PICTURE[:, :16]  # the pictures of shards are square
    before = square.copy()
    before.flags.writeable = False  # the pixels of a memory-mapped file are also read-only
    for pixels in augmented(ALL, picture=before):
        assert pixels.shape == square.shape
        assert pixels.dtype == np.uint8
    assert (before == square).all()


@pytest.mark.parametrize(
    ("augment", "problem"),
    [
        ({"brightness": 1.5}, "train.augment.brightness: Input should be less than 1 (got 1.5)"),
        ({"contrast": -0.1}, "train.augment.contrast: Input should be greater than or equal to 0 (got -0.1)"),
        ({"flip": 2}, "train.augment.flip: Input should be less than or equal to 1 (got 2)"),
        ({"scale": [0.9, 0.5]}, "train.augment: scale is [0.9, 0.5]: give the smallest share (above 0), then"),
        ({"scale": [0, 0.5]}, "train.augment: scale is [0, 0.5]"),
        ({"hue": 0.1}, "train.augment.hue: unknown key"),
        ({}, "train.augment: augment changes no picture"),
        ({"flip": 0.5, "sided_words": []}, "train.augment.sided_words"),
        ({"rotate": 1.1}, "train.augment.rotate: Input should be less than or equal to 1 (got 1.1)"),
    ],
)
def test_the_error_for_an_invalid_setting_names_the_setting(augment: dict[str, Any], problem: str) -> None:
    run = tiny_run().model_dump(mode="json", by_alias=True)
    run["train"]["augment"] = augment
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_json(json.dumps(run))
    assert problem in caught.value.got


def test_augmentation_settings_are_hashed_into_the_run_only_if_they_are_set() -> None:
    before = tiny_run().train.science()
    assert "augment" not in before
    assert "ema_decay" not in before["optimizer"]
    assert tiny_run(augment={"flip": 0.5}).train.science()["augment"]["flip"] == 0.5


def test_vertical_flips_and_quarter_turns_are_chosen_independently_and_keep_every_pixel() -> None:
    square = PICTURE[:, :16]
    turned = [np.rot90(square, turns).tobytes() for turns in range(4)]
    flipped = [np.rot90(square[::-1], turns).tobytes() for turns in range(4)]
    found = [pixels.tobytes() for pixels in augmented(AugmentConfig(flip_vertical=0.5, rotate=0.75), picture=square)]
    assert set(found) == {*turned, *flipped}
    assert {pixels.tobytes() for pixels in augmented(AugmentConfig(rotate=1), picture=square)} == set(turned[1:])
    assert {pixels.tobytes() for pixels in augmented(AugmentConfig(flip_vertical=1), picture=square)} == {flipped[0]}


@pytest.mark.parametrize(
    "text",
    ["a car LEFT of a house", "a pond above the road", "the northern bank", "<loc0102><loc0307><loc0922><loc1> a"],
)
def test_a_picture_whose_text_names_a_direction_is_neither_turned_nor_flipped_vertically(text: str) -> None:
    config = AugmentConfig(flip_vertical=1, rotate=1)
    assert all((pixels == PICTURE).all() for pixels in augmented(config, text))
    assert not any((pixels.shape == PICTURE.shape) and (pixels == PICTURE).all() for pixels in augmented(config))
    of_other_language = AugmentConfig(flip_vertical=1, upright_words=("oben",))
    assert all((pixels == PICTURE).all() for pixels in augmented(of_other_language, "Oben ist eine Katze"))


def test_erasing_fills_one_rectangle_of_limited_area_with_the_mean_colour_and_spares_pictures_with_boxes() -> None:
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 120, (96, 64, 3)).astype(np.uint8) * 2  # even values, so no value equals an odd mean
    before = picture.copy()
    tops = set()
    for pixels in augmented(AugmentConfig(erase=1), picture=picture):
        changed = (pixels != picture).any(axis=2)
        rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
        box = pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert (box == box[0, 0]).all()
        assert np.abs(box[0, 0] - picture.mean(axis=(0, 1))).max() <= 1
        assert 0.015 < box[..., 0].size / picture[..., 0].size < 0.36
        tops.add(int(rows[0]))
    assert len(tops) > EPOCHS / 4
    assert (picture == before).all()
    changed_pictures = sum((pixels != picture).any() for pixels in augmented(AugmentConfig(erase=0.5), picture=picture))
    assert EPOCHS / 4 < changed_pictures < EPOCHS * 3 / 4
    boxed = "<loc0102><loc0307><loc0922><loc0716> cat"
    assert all((pixels == picture).all() for pixels in augmented(AugmentConfig(erase=1), boxed, picture=picture))

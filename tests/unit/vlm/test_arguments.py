"""Tests of wrong and unusual arguments of the Python API.

Each argument is either used as the documentation says, or refused with an error that names the argument and the value.
"""

from __future__ import annotations

import contextlib
import io
import math
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_models import tiny_model, tiny_pixels

import vlm
from vlm.captioner import Captioner
from vlm.config import GenerationConfig
from vlm.errors import ArgumentError, CheckpointError, ConfigError, ImageError, LakesightError, UserError
from vlm.inputs import DecodedPicture

CAPTIONER = Captioner(*tiny_model("plain"))
PIXELS = tiny_pixels(1)[0].numpy()
PICTURE = Image.fromarray(PIXELS)
SHORT: dict[str, Any] = {"max_new_tokens": 3}
MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "I;16")
Call = Callable[[Any], Any]


def encoded(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def closed_picture() -> Image.Image:
    picture = PICTURE.copy()
    picture.close()
    return picture


def closed_file() -> Image.Image:
    picture = Image.open(io.BytesIO(encoded(PICTURE)))
    picture.close()
    return picture


def read_requests(picture: Any) -> list[str]:
    """Return the error of each method of the API for a wrong picture."""
    calls: list[Call] = [
        lambda value: CAPTIONER.stream([value], **SHORT),
        lambda value: CAPTIONER.logprobs([value], "", ["a"]),
        lambda value: CAPTIONER.request([value]),
    ]
    errors = []
    for call in calls:
        with pytest.raises(ImageError) as caught:
            call(picture)
        errors.append(str(caught.value))
    with pytest.raises(LakesightError) as refused:
        CAPTIONER.attention(picture, **SHORT)
    (result,) = CAPTIONER.caption([picture], **SHORT)
    assert result.caption is None
    return [*errors, str(refused.value), str(result.error)]


# ------------------------------------------------------------------------------------------------ pictures

WRONG_PICTURES: dict[str, tuple[Callable[[], Any], str]] = {
    "number": (lambda: 3, "int 3"),
    "list": (lambda: [PICTURE], "list"),
    "dict": (lambda: {"image": PICTURE}, "dict"),
    "generator": (lambda: iter([PICTURE]), "list_iterator"),
    "open file": (lambda: io.BytesIO(encoded(PICTURE)), "its method read"),
    "tensor": (lambda: tiny_pixels(1)[0], r"Tensor of shape \(16, 16, 3\)|to_pil_image"),
    "tensor on another device": (lambda: tiny_pixels(1)[0].to("meta"), "to_pil_image"),
    "floats": (lambda: PIXELS / 255, r"shape \(16, 16, 3\) and type float64; expected uint8"),
    "channels first": (lambda: PIXELS.transpose(2, 0, 1), r"shape \(3, 16, 16\).*\(height, width, 3\)"),
    "no pixels": (lambda: np.zeros((0, 5, 3), np.uint8), "too_small.*5 x 0 pixels"),
    "path as text": (lambda: "pictures/cat.png", "pathlib.Path"),
    "short path as text": (lambda: "/tmp/cat.jpg", "pathlib.Path"),
    "URL": (lambda: "https://example.com/cat", "download a URL first"),
    "missing file": (lambda: Path("missing.png"), "missing.png: No such file"),
    "path with NUL": (lambda: Path("a\0b.png"), "null byte"),
    "empty bytes": (lambda: b"", "no picture"),
    "closed": (closed_picture, "the Pillow image is closed; open the picture again"),
    "closed file": (closed_file, "the Pillow image is closed; open the picture again"),
    "zero width": (lambda: Image.new("RGB", (0, 5)), "too_small.*0 x 5 pixels"),
    "32 bits": (lambda: Image.new("I", (9, 9)), "32 bits"),
    "floats of Pillow": (lambda: Image.new("F", (9, 9)), "32 bits"),
}


@pytest.mark.parametrize("name", WRONG_PICTURES)
def test_a_wrong_picture_is_refused_by_each_method_and_the_error_says_what_is_wrong(name: str) -> None:
    make, expected = WRONG_PICTURES[name]
    stream, logprobs, request, attention, caption = read_requests(make())
    for message in (stream, logprobs, request, caption):
        assert re.search(expected, message), message
    assert "picture 1 of 1" in stream
    if name not in ("list", "dict", "generator", "number"):  # the argument of `attention` is one picture
        assert re.search(expected, attention), attention


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(width=st.integers(4, 20), height=st.integers(4, 20), seed=st.integers(0, 99))
def test_a_pillow_image_of_each_mode_gets_the_caption_of_the_same_picture_in_a_file(
    mode: str, width: int, height: int, seed: int
) -> None:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 4), np.uint8)
    picture = Image.fromarray(values).convert(
        {"La": "LA", "PA": "P", "I;16": "L"}.get(mode, mode if mode != "LAB" else "RGB")
    )
    if mode in ("La", "PA", "LAB", "I;16"):
        picture = Image.new(mode, (width, height)) if mode == "LAB" else picture.convert(mode)
    (result,) = CAPTIONER.caption([picture], **SHORT)
    assert (result.error, result.sha256) == (None, None)
    if mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):  # the modes that a PNG file can have
        (same,) = CAPTIONER.caption([encoded(picture)], **SHORT)
        assert same.caption == result.caption


@pytest.mark.parametrize("shape", [(16, 16), (16, 16, 1), (16, 16, 3), (16, 16, 4)])
def test_a_numpy_array_gets_the_caption_of_the_pillow_image_with_the_same_pixels(shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(1).integers(0, 256, shape, np.uint8)
    picture = Image.fromarray(array.squeeze())
    assert CAPTIONER.caption(array) == CAPTIONER.caption([picture])
    assert CAPTIONER.caption([array[::-1]]) == CAPTIONER.caption([picture.transpose(Image.Transpose.FLIP_TOP_BOTTOM)])
    assert "".join(CAPTIONER.stream(array)) == CAPTIONER.caption([picture])[0].caption


def test_one_picture_or_an_iterator_of_pictures_is_accepted_where_a_list_is_expected() -> None:
    data = encoded(PICTURE)
    expected = CAPTIONER.caption([PICTURE])[0].caption
    for one in (PICTURE, data, bytearray(data), memoryview(data), PIXELS):
        assert [result.caption for result in CAPTIONER.caption(one)] == [expected]
    several: list[Any] = [iter([PICTURE, data]), (PICTURE, data), np.stack([PIXELS, PIXELS])]
    for pictures in several:
        assert [result.caption for result in CAPTIONER.caption(pictures, iter(["", ""]))] == [expected] * 2
    assert CAPTIONER.caption([]) == []
    assert CAPTIONER.logprobs([], [], []) == []
    scored = CAPTIONER.logprobs([PICTURE] * 2, ["what"] * 2, ["a", "b"])
    assert CAPTIONER.logprobs(PICTURE, "what", iter(["a", "b"])) == scored


def test_logprobs_names_a_bad_picture_by_its_position_in_the_given_list() -> None:
    cases: list[tuple[Any, str]] = [
        ([PICTURE, PICTURE, b"bad"], "picture 3 of 3"),
        ([PICTURE, b"bad", PICTURE], "picture 2 of 3"),
        (b"bad", "picture 1 of 1"),
    ]
    for pictures, place in cases:
        with pytest.raises(ImageError, match=place):
            CAPTIONER.logprobs(pictures, "", ["a", "b", "c"])


def kind_name(value: object) -> str:
    """Return the id of a case. The text of a value may contain an address, or depend on the order of a set."""
    return type(value).__name__


@pytest.mark.parametrize("images", [None, 3, {"a": PICTURE}, {1, 2}, ValueError("x")], ids=kind_name)
def test_an_argument_that_is_no_list_of_pictures_is_refused_by_name(images: Any) -> None:
    calls: list[Call] = [
        CAPTIONER.caption,
        CAPTIONER.stream,
        CAPTIONER.request,
        lambda value: CAPTIONER.logprobs(value, "", ["a"]),
    ]
    for call in calls:
        with pytest.raises(ArgumentError, match=r"the argument `images` cannot be used. .*a list of pictures"):
            call(images)
    with pytest.raises(ArgumentError, match=r"the argument `image` cannot be used. .*one picture"):
        CAPTIONER.attention(images)


# ------------------------------------------------------------------------------------------------ texts

WRONG_TEXTS: list[Any] = [None, 3, b"a", ["a"], ("a", "b"), {"a": 1}, np.array(["a"]), object()]


@pytest.mark.parametrize("prompt", [*WRONG_TEXTS, "\ud800"], ids=kind_name)
def test_a_prompt_that_is_no_text_is_refused_by_name(prompt: Any) -> None:
    calls: list[Call] = [
        lambda value: CAPTIONER.stream(PICTURE, value),
        lambda value: CAPTIONER.attention(PICTURE, value),
        lambda value: CAPTIONER.request([PICTURE], value),
    ]
    for call in calls:
        with pytest.raises(ArgumentError, match="the argument `prompt` "):
            call(prompt)
    with pytest.raises(ArgumentError, match=r"the argument `prompts\[1\]` "):
        CAPTIONER.logprobs([PICTURE] * 2, ["a", prompt], ["a", "b"])
    with pytest.raises(ArgumentError, match=r"the argument `answers\[1\]` "):
        CAPTIONER.logprobs([PICTURE] * 2, "", ["a", prompt])
    good, bad = CAPTIONER.caption([PICTURE] * 2, ["a", prompt], **SHORT)
    assert (good.error, bad.caption) == (None, None)
    assert "the prompt is not" in str(bad.error)


@pytest.mark.parametrize("prompts", [None, 3, b"ab", {"a": 1, "b": 2}, {"a", "b"}], ids=kind_name)
def test_prompts_that_are_no_list_are_refused_by_name(prompts: Any) -> None:
    with pytest.raises(ArgumentError, match="the argument `prompts` cannot be used"):
        CAPTIONER.caption([PICTURE] * 2, prompts)
    with pytest.raises(ArgumentError, match="the argument `prompts` cannot be used"):
        CAPTIONER.logprobs([PICTURE] * 2, prompts, ["a", "b"])
    with pytest.raises(ArgumentError, match="the argument `answers` cannot be used"):
        CAPTIONER.logprobs([PICTURE] * 2, "", prompts)
    with pytest.raises(ArgumentError, match="the argument `answers` cannot be used"):
        CAPTIONER.logprobs([PICTURE] * 2, "", "ab")


# ------------------------------------------------------------------------------------------------ settings

VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 9), st.integers(), st.floats(), st.text(max_size=3),
    st.binary(max_size=2), st.lists(st.one_of(st.text(max_size=2), st.integers()), max_size=3),
    st.dictionaries(st.text(max_size=2), st.none()),
)  # fmt: skip


@settings(max_examples=300)
@given(name=st.sampled_from(list(GenerationConfig.model_fields)), value=VALUES)
def test_each_value_of_a_setting_is_used_exactly_or_refused_with_the_name_and_the_value(name: str, value: Any) -> None:
    message, used = "", None
    try:
        used = getattr(CAPTIONER.settings(**{name: value}), name)
    except ConfigError as error:
        message = error.got
    if message:
        assert name in message
        assert isinstance(value, dict) or name == "stop" or repr(value)[:9] in message
    elif name == "stop":
        assert used == ((value,) if isinstance(value, str) else tuple(value))
    else:
        assert not isinstance(value, bool)
        assert used == (float(value) if isinstance(used, float) else value), "a whole number becomes the nearest float"


WRONG_SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"max_new_tokens": 0}, r"max_new_tokens: .*greater than 0 \(got 0\)"),
    ({"max_new_tokens": -1}, r"max_new_tokens: .*greater than 0 \(got -1\)"),
    ({"max_new_tokens": 1.5}, r"max_new_tokens: .*integer.* \(got 1.5\)"),
    ({"max_new_tokens": True}, "max_new_tokens must be a number, not True"),
    ({"max_new_tokens": b"1"}, "max_new_tokens must be a number, not b'1'"),
    ({"temperature": False}, "temperature must be a number, not False"),
    ({"temperature": math.nan}, r"temperature: .*finite.* \(got nan\)"),
    ({"top_p": 2}, r"top_p: .*less than or equal to 1 \(got 2\)"),
    ({"top_k": 0}, r"top_k: .*greater than 0 \(got 0\)"),
    ({"stop": ""}, r"stop.0: .*at least 1 character \(got ''\)"),
    ({"stop": [3]}, r"stop.0: .*valid string \(got 3\)"),
    ({"num_beams": 2, "temperature": 1.0}, "num_beams 2 and temperature 1.0 exclude each other"),
    ({"num_beams": 10**30}, r"num_beams: .*less than or equal to"),
    ({"temp": 1}, "temp, did you mean 'temperature'"),
    ({"max_tokens": 1}, "max_tokens, did you mean 'max_new_tokens'"),
    ({"max_length": 1}, "max_length, did you mean 'max_new_tokens'"),
    ({"do_sample": True}, "do_sample, did you mean 'temperature'"),
    ({"stop_strings": ["a"]}, "stop_strings, did you mean 'stop'"),
    ({"beams": 2}, "beams, did you mean 'num_beams'"),
]


@pytest.mark.parametrize(("wrong", "expected"), WRONG_SETTINGS, ids=lambda value: str(value)[:40])
def test_a_wrong_setting_is_refused_by_each_method_with_the_name_the_value_and_what_is_allowed(
    wrong: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ConfigError, match=expected):
        CAPTIONER.settings(**wrong)
    calls: list[Callable[..., Any]] = [CAPTIONER.caption, CAPTIONER.stream, CAPTIONER.attention]
    for call in calls:
        with pytest.raises(ConfigError, match=expected):
            call(PICTURE, **wrong)


def test_a_misspelled_argument_is_refused_with_the_name_of_the_argument() -> None:
    with pytest.raises(ConfigError, match="max_pixel, did you mean 'max_pixels'"):
        CAPTIONER.caption([PICTURE], max_pixel=3)
    with pytest.raises(ConfigError, match="prompt, did you mean 'prompts'"):
        CAPTIONER.caption([PICTURE], prompt="what")
    with pytest.raises(ConfigError, match="prompts, did you mean 'prompt'"):
        CAPTIONER.stream(PICTURE, prompts="what")


def test_one_stop_text_means_the_same_as_a_list_with_this_text() -> None:
    assert CAPTIONER.settings(stop="ab").stop == ("ab",)
    free = str(CAPTIONER.caption(PICTURE)[0].caption)
    assert CAPTIONER.caption(PICTURE, stop=free[2])[0].caption == free[: free.index(free[2])]


@pytest.mark.parametrize(
    "useless", [{"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.5}, {"seed": 5}, {"length_penalty": 2.0}], ids=str
)
def test_a_warning_names_a_setting_that_has_no_effect(useless: dict[str, Any]) -> None:
    calls: list[Callable[..., Any]] = [CAPTIONER.caption, CAPTIONER.stream, CAPTIONER.attention]
    for call in calls:
        with pytest.warns(UserWarning, match=f"the setting {next(iter(useless))} .* has no effect") as caught:
            call(PICTURE, **useless, **SHORT)
        assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        used = {"num_beams": 2} if "length_penalty" in useless else {"temperature": 1.0}
        CAPTIONER.caption(PICTURE, **useless, **used, **SHORT)
        CAPTIONER.caption(PICTURE, **GenerationConfig(**SHORT).model_dump())


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"repetition_penalty": 0}, "greater than or equal to 1e-100 "),
        ({"num_beams": 2, "length_penalty": 1e301}, "less than or equal to 1e[+]300 "),
        ({"stop": None}, "stop: Input should be a list "),
    ],
    ids=str,
)
def test_the_error_for_an_invalid_setting_states_the_limit_or_the_kind_in_short_words(
    setting: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        CAPTIONER.caption(PICTURE, **setting)
    assert len(str(raised.value)) < 300


@pytest.mark.parametrize("value", [0, -1, "8", None, True, 1.5, math.nan, math.inf, [], 10**30], ids=str)
@pytest.mark.parametrize("limit", ["max_pixels", "min_side", "max_bytes"])
def test_a_limit_that_is_no_positive_whole_number_is_refused_by_name(limit: str, value: Any) -> None:
    with pytest.raises(ArgumentError, match=f"the argument `{limit}` cannot be used. .*a whole number from 1"):
        CAPTIONER.caption([PICTURE], **{limit: value})
    (result,) = CAPTIONER.caption([PICTURE], max_pixels=1e9, min_side=np.int64(3), **SHORT)  # type: ignore[arg-type]
    assert result.error is None


# ------------------------------------------------------------------------------------------------ decoded pictures


def test_decoded_pictures_of_a_wrong_type_or_number_are_refused_by_name() -> None:
    chosen = CAPTIONER.settings(**SHORT)
    wrong: list[Any] = [np.zeros((9, 9, 3), np.uint8), PIXELS / 255, PIXELS.transpose(2, 0, 1), None, PICTURE]
    for picture in wrong:
        with pytest.raises(ArgumentError, match=r"the argument `pictures\[0\]` .*with the shape \(16, 16, 3\)"):
            CAPTIONER.complete([picture], [""], chosen)
    decoded = DecodedPicture(PIXELS, None, None)
    calls: list[tuple[Callable[..., Any], Any]] = [(CAPTIONER.complete, PIXELS), (CAPTIONER.caption_decoded, decoded)]
    for call, picture in calls:
        with pytest.raises(ArgumentError, match=r"the argument `prompts` .*each of the 1 pictures"):
            call([picture], [], chosen)
        with pytest.raises(ArgumentError, match="the argument `pictures` "):
            call(None, [""], chosen)
        with pytest.raises(ArgumentError, match=r"the argument `settings` .*captioner.settings"):
            call([picture], [""], SHORT)


# ------------------------------------------------------------------------------------------------ any value

ANY = st.one_of(
    VALUES, st.sampled_from([PICTURE, PIXELS, tiny_pixels(1)[0], Path("x"), encoded(PICTURE), Image, CAPTIONER]),
    st.lists(st.one_of(st.none(), st.just(PICTURE), st.text(max_size=2)), max_size=3), st.sets(st.text(max_size=2)),
    st.builds(iter, st.lists(st.just(PICTURE), max_size=2)), st.builds(closed_picture), st.complex_numbers(),
)  # fmt: skip


@settings(max_examples=300)
@given(first=ANY, second=ANY, third=ANY)
def test_any_value_of_any_argument_is_used_or_refused_with_an_error_of_this_library(
    first: Any, second: Any, third: Any
) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: CAPTIONER.caption(first, second, **SHORT),
        lambda: list(CAPTIONER.stream(first, second, **SHORT)),
        lambda: CAPTIONER.attention(first, second, **SHORT),
        lambda: CAPTIONER.logprobs(first, second, third),
        lambda: CAPTIONER.complete(first, second, third),
        lambda: vlm.load(first, device=second, precision=third),
        lambda: vlm.build(first, second, seed=third),
    ]
    for call in calls:
        with contextlib.suppress(UserError, ImageError, CheckpointError):
            call()

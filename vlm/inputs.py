"""Arguments of the Python API: decoding of the pictures that a caller passes, and checks of types and ranges.

A wrong argument raises an error that names the argument, its value, and what is allowed. A picture that cannot be
decoded is an ImageError, which `Captioner.caption` turns into the error of one row.
"""

from __future__ import annotations

import hashlib
import json
import operator
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from vlm.config import GenerationConfig, ImageConfig
from vlm.config.model import check_setting_names, settings_without_effect
from vlm.errors import ArgumentError, CheckpointError, ImageError, UserError
from vlm.image import MAX_PATH, check_size, looks_like_path, open_image, picture_bytes, to_pixels, upright_rgb

Picture = Image.Image | npt.NDArray[np.uint8] | Path | bytes | bytearray | memoryview | str
"""Types in which a caller can pass a picture: a Pillow image, a NumPy array of pixels, the path of a file, or a file's
bytes, raw or as base64 text.
"""

MAX_PIXELS, MIN_SIDE, MAX_BYTES = 64_000_000, 4, 64 * 2**20
"""Default limits for pictures: the largest number of pixels (width times height), the smallest side in pixels, and the
largest size of a file in bytes."""

ALLOWED = "a Pillow image, a NumPy array of uint8, a pathlib.Path, the bytes of a picture file, or base64 text"
SEEDS = range(-(2**63), 2**64)
"""Seeds that torch accepts."""
LIMITS = range(1, 2**63)
"""Allowed limits of pictures, such as the largest number of pixels."""
TENSOR_LIBRARIES = ("jax", "jaxlib", "tensorflow", "torch")
BATCH_DIMENSIONS = 4
"""Number of dimensions of an array that contains several pictures of equal size."""
MAX_SHOWN = 80
"""Largest number of characters of a value that an error message shows."""


class DecodedPicture(NamedTuple):
    """Result of decoding a picture: the file's SHA-256 or None, and an error or the pixels (H, W, C) at model size."""

    pixels: npt.NDArray[np.uint8] | None
    sha256: str | None
    error: str | None


def decode_picture(
    image: Picture | None, config: ImageConfig, *, max_pixels: int, min_side: int, max_bytes: int
) -> DecodedPicture:
    """Decode a picture and resize it to model resolution. `Captioner.caption` describes the arguments."""
    sha256 = None
    try:
        if isinstance(image, np.ndarray):
            image = _from_array(image, min_side)
        if isinstance(image, Image.Image):
            check_size(image, max_pixels=max_pixels, min_side=min_side)
            return DecodedPicture(to_pixels(upright_rgb(image), config), None, None)
        data = picture_bytes(_file_content(image), max_bytes)
        sha256 = hashlib.sha256(data).hexdigest()
        picture, _ = open_image(data, max_pixels=max_pixels, min_side=min_side)
        return DecodedPicture(to_pixels(picture, config), sha256, None)
    except ImageError as error:
        return DecodedPicture(None, sha256, f"{error.reason}: {error.detail}{_advice(image)}")


def decode_pictures(pictures: Sequence[Picture], config: ImageConfig) -> list[npt.NDArray[np.uint8]]:
    """Decode each different picture once, and return the pixels (H, W, C) of each picture at model size.

    Raises:
        ImageError: a picture cannot be decoded.
    """
    pixels: dict[int, npt.NDArray[np.uint8]] = {}
    for index, image in enumerate(pictures):
        if id(image) in pixels:
            continue
        decoded = decode_picture(image, config, max_pixels=MAX_PIXELS, min_side=MIN_SIDE, max_bytes=MAX_BYTES)
        if decoded.pixels is None:
            reason, _, detail = str(decoded.error).partition(": ")
            raise ImageError(reason, detail, where=f"picture {index + 1} of {len(pictures)}")
        pixels[id(image)] = decoded.pixels
    return [pixels[id(image)] for image in pictures]


def _file_content(image: object) -> bytes | str | None:
    """Return the bytes of a picture file, or its base64 text.

    Raises:
        ImageError: the reason is missing_field if a file cannot be read, or not_an_image for a value of a wrong type.
    """
    if isinstance(image, Path):
        try:
            return image.read_bytes()
        except (OSError, ValueError) as error:  # ValueError: the path contains a NUL character
            raise ImageError("missing_field", f"{image}: {getattr(error, 'strerror', None) or error}") from None
    if isinstance(image, bytearray | memoryview):
        return bytes(image)
    if image is None or isinstance(image, bytes | str):
        return image
    raise ImageError("not_an_image", f"{describe_value(image)}; expected {ALLOWED}")


def _from_array(array: npt.NDArray[Any], min_side: int) -> Image.Image:
    """Return a Pillow image of the pixels in a NumPy array.

    Raises:
        ImageError: the reason is not_an_image for a wrong type or shape, or too_small if the array has no pixels.
    """
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or channels not in (1, 3, 4):
        raise ImageError(
            "not_an_image",
            f"{describe_value(array)}; expected uint8 values from 0 to 255, with the shape (height, width), "
            "(height, width, 3) or (height, width, 4)",
        )
    height, width = array.shape[:2]
    if min(height, width) < 1:  # Pillow refuses such an array
        raise ImageError("too_small", f"{width} x {height} pixels; each side needs at least {min_side}")
    return Image.fromarray(array[..., 0] if array.ndim == 3 and channels == 1 else array)


def _advice(image: object) -> str:
    """Return advice for common mistakes, or an empty text."""
    if isinstance(image, str) and looks_like_path(image):
        return "; text is base64: pass a path as pathlib.Path, download a URL first, or caption with --image-root"
    if hasattr(image, "read"):
        return "; pass the content of an open file, which its method read returns"
    if _is_tensor(image):
        return "; convert a tensor with torchvision.transforms.functional.to_pil_image"
    return ""


def is_picture(value: object) -> bool:
    """Return True if an argument is meant as one picture. The picture may have a wrong type, such as a tensor."""
    if isinstance(value, np.ndarray):
        return value.dtype != object and value.dtype.kind not in "SU" and value.ndim < BATCH_DIMENSIONS
    known = (Image.Image, Path, bytes, bytearray, memoryview, str)
    return isinstance(value, known) or _is_tensor(value) or hasattr(value, "read")


def _is_tensor(value: object) -> bool:
    return type(value).__module__.partition(".")[0] in TENSOR_LIBRARIES


def one_picture(image: Any, argument: str) -> Any:
    """Check that an argument is meant as one picture, and return the argument.

    Raises:
        ArgumentError: the argument is None or a list, or no picture for another reason.
    """
    if not is_picture(image):
        raise wrong_argument(argument, image, f"one picture, which is {ALLOWED}")
    return image


def picture_list(images: object, argument: str = "images") -> list[Any]:
    """Return pictures as a list. One picture becomes a list of one picture.

    Raises:
        ArgumentError: the argument is neither a picture nor a list of pictures.
    """
    return [images] if is_picture(images) else _as_list(images, argument, f"pictures, where a picture is {ALLOWED}")


def chosen_settings(stored: GenerationConfig, settings: Mapping[str, Any], *arguments: str) -> GenerationConfig:
    """Return the generation settings of a call, and warn of each changed setting that has no effect.

    Args:
        stored: settings that are stored with the model.
        settings: keyword arguments of the call.
        arguments: names of the other arguments of the called function. If a name in `settings` is unknown, the error
            suggests a similar name of a setting or argument.

    Raises:
        ConfigError: a setting does not exist or has an invalid value, or two settings exclude each other.
    """
    check_setting_names(settings, arguments, where="generation settings")
    chosen = stored.changed(settings)
    for sentence in settings_without_effect(chosen, stored):
        warnings.warn(sentence, stacklevel=3)
    return chosen


def text_list(texts: object, argument: str, count: int) -> list[Any]:
    """Return texts as a list. One text becomes a list in which the text occurs `count` times.

    Raises:
        ArgumentError: the argument is neither a text nor a list of texts.
    """
    return [texts] * count if isinstance(texts, str) else _as_list(texts, argument, "texts")


def _as_list(values: object, argument: str, elements: str) -> list[Any]:
    if isinstance(values, Iterable) and not isinstance(values, str | bytes | bytearray | memoryview | Mapping | Set):
        return list(values)
    raise wrong_argument(argument, values, f"a list of {elements}")


def check_texts(texts: Iterable[object], argument: str) -> Iterator[str]:
    """Check that all values are texts that a tokenizer can encode, and yield the texts.

    Raises:
        ArgumentError: a value is not a text, or is not valid Unicode.
    """
    for index, text in enumerate(texts):
        check_text(text, f"{argument}[{index}]")
        yield str(text)


def check_text(text: object, argument: str) -> None:
    """Check that an argument is a text that a tokenizer can encode.

    Raises:
        ArgumentError: the argument is not a text, or is not valid Unicode.
    """
    if not isinstance(text, str):
        hint = "; an empty text asks for a plain caption" if argument.startswith("prompt") else ""
        raise wrong_argument(argument, text, f"a text{hint}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ArgumentError(
            f"the argument `{argument}` is not valid Unicode", got=ascii(text)[:80], fix="decode the text as UTF-8"
        ) from None


def prompt_list(prompts: object, pictures: int) -> list[Any]:
    """Return one prompt for each of the given number of pictures. The elements of a list are not checked.

    Raises:
        ArgumentError: the prompts are neither a text nor a list.
        UserError: the number of prompts is not the number of pictures.
    """
    texts = text_list(prompts, "prompts", pictures)
    if len(texts) != pictures:
        raise UserError(
            "the number of prompts differs from the number of pictures",
            got=f"pictures: {pictures}, prompts: {len(texts)}",
            fix="give as many prompts as pictures, or one string for all pictures",
        )
    return texts


def answer_lists(images: object, prompts: object, answers: object, *, text_only: bool) -> tuple[list[Any], ...]:
    """Return three lists with one element for each answer: pictures, prompts and texts. If the model is text-only and
    `images` is empty, each answer has no picture.

    Raises:
        ArgumentError: an argument has a wrong type, or a text is not valid Unicode.
        UserError: the numbers of pictures, prompts and answers differ.
    """
    if isinstance(answers, str):
        raise wrong_argument("answers", answers, "a list of texts")
    texts = list(check_texts(_as_list(answers, "answers", "texts"), "answers"))
    given = picture_list(images) * (len(texts) if is_picture(images) else 1)
    asked = list(check_texts(text_list(prompts, "prompts", len(texts)), "prompts"))
    pictures = [[picture] for picture in given] if given or not text_only else [[] for _ in texts]
    if not len(pictures) == len(asked) == len(texts):
        raise UserError(
            "the lists of images, prompts and answers have different lengths",
            got=f"{len(given)} pictures, {len(asked)} prompts and {len(texts)} answers",
            fix="give one picture and one prompt for each answer; if all answers share a picture or a prompt, pass it "
            "without a list",
        )
    return pictures, asked, texts


def check_same_number(pictures: Sequence[object], prompts: Sequence[object]) -> None:
    """Check that there is one prompt for each picture.

    Raises:
        ArgumentError: an argument is neither a list, a tuple nor an array, or the numbers differ.
    """
    for name, values in (("pictures", pictures), ("prompts", prompts)):
        if not isinstance(values, list | tuple | np.ndarray):
            raise wrong_argument(name, values, "a list")
    if len(pictures) != len(prompts):
        raise wrong_argument("prompts", prompts, f"one prompt for each of the {len(pictures)} pictures")


def check_pixels(pictures: Sequence[object], prompts: Sequence[object], side: int) -> None:
    """Check that there is one prompt for each picture, and that the pictures are arrays of uint8 (side, side, 3).

    Raises:
        ArgumentError: the numbers differ, or a picture has another type or shape.
    """
    check_same_number(pictures, prompts)
    shape = (side, side, 3)
    for index, picture in enumerate(pictures):
        if not isinstance(picture, np.ndarray) or picture.dtype != np.uint8 or picture.shape != shape:
            raise wrong_argument(f"pictures[{index}]", picture, f"a NumPy array of uint8 with the shape {shape}")


def whole_number(value: object, argument: str, allowed: range) -> int:
    """Return an argument as an int. A float without a fractional part, such as 1e9, is accepted.

    Raises:
        ArgumentError: the value is not a whole number, or is out of range.
    """
    text = f"a whole number from {allowed.start} to {allowed.stop - 1}"
    if isinstance(value, bool | np.bool_):
        raise wrong_argument(argument, value, text)
    try:
        number = int(value) if isinstance(value, float) and value.is_integer() else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise wrong_argument(argument, value, text) from None
    if number not in allowed:
        raise wrong_argument(argument, value, text)
    return number


def folder_path(path: object, argument: str) -> Path:
    """Return a path that is given as a text or as an object such as `pathlib.Path`.

    Raises:
        ArgumentError: the argument is not a path.
    """
    if isinstance(path, str | os.PathLike) and path != "":
        found = os.fspath(path)
        if isinstance(found, str):
            return Path(found)
    raise wrong_argument(argument, path, "a path, as a text or as pathlib.Path")


def folder_to_write(path: object, argument: str) -> Path:
    """Return the path of a folder for a checkpoint. The folder may be missing, and may have an earlier checkpoint.

    Raises:
        ArgumentError: the argument is not a path, is the path of a file, or is a folder with a model of another
            library.
    """
    folder = folder_path(path, argument)
    if folder.exists() and not folder.is_dir():
        raise wrong_argument(argument, str(folder), "the path of a folder; a file has this path")
    published = False
    with suppress(OSError, ValueError, TypeError):  # a missing or damaged config.json is replaced
        published = "vision" not in json.loads((folder / "config.json").read_bytes())
    if published:
        raise wrong_argument(argument, str(folder), "a folder without a model of another library")
    return folder


def existing_folder(path: object, argument: str) -> Path:
    """Return the path of a folder.

    Raises:
        ArgumentError: the argument is not a path.
        CheckpointError: there is no folder at this path.
    """
    folder = folder_path(path, argument)
    try:
        if folder.is_dir():
            return folder
        got = "a file" if folder.exists() else "nothing"
    except (OSError, ValueError) as error:  # for example a path that is too long
        got = getattr(error, "strerror", None) or str(error)
    raise CheckpointError(
        "there is no folder with a model at this path",
        where=str(folder)[:MAX_PATH],
        got=got,
        fix="give the path of a folder with config.json and model.safetensors; no model is downloaded",
    )


def example_texts(texts: object, argument: str) -> Iterable[str]:
    """Return an iterator over texts that checks the type of each text when the caller reaches the text.

    Raises:
        ArgumentError: the argument is one text, or is not a list of texts.
    """
    if isinstance(texts, Iterator):
        return check_texts(texts, argument)
    return check_texts(_as_list(texts, argument, "texts"), argument)


def wrong_argument(argument: str, value: object, allowed: str) -> ArgumentError:
    """Return the error for an argument with a wrong type or value. `allowed` describes the allowed values."""
    return ArgumentError(f"the argument `{argument}` cannot be used", got=describe_value(value), fix=f"pass {allowed}")


def describe_value(value: object) -> str:
    """Describe the type and the value of an argument in a few words, without the elements of arrays and tensors."""
    kind = type(value).__name__
    if value is None:
        return "None"
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{kind} of shape {tuple(value.shape)} and type {value.dtype}"
    shown = repr(value) if isinstance(value, str | bytes | int | float | list | tuple | dict | set) else ""
    return f"{kind} {shown if len(shown) <= MAX_SHOWN else shown[:MAX_SHOWN] + '...'}".strip()

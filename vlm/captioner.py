"""Captioning of pictures. Spark executors, the served model and `lakesight ask` all use this module.

A picture is given as bytes or as base64 text. A defective picture or prompt causes an error only in its own row, and a
caption does not depend on the other rows of the batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from vlm.config import GenerationConfig, ImageConfig
from vlm.errors import ImageError, UserError
from vlm.generation.generate import Completion, Request, check_length, generate
from vlm.image import open_image, picture_bytes, to_pixels
from vlm.model import VisionLanguageModel
from vlm.text.base import Tokenizer
from vlm.text.prompt import prefix_ids

BATCH_ROWS = 64
BATCH_POSITIONS = 16_384
"""BATCH_ROWS is the largest number of rows in a batch. BATCH_POSITIONS is the largest number of positions in a batch,
summed over all rows and beams.

The two limits bound the memory of the key-value cache."""
MAX_PIXELS, MIN_SIDE, MAX_BYTES = 64_000_000, 4, 64 * 2**20
"""Default limits for pictures: the largest number of pixels (width times height), the smallest side in pixels, and the
largest size of a file in bytes."""


@dataclass(frozen=True)
class CaptionResult:
    """Result for one picture, which is either a caption or an error.

    Attributes:
        caption: generated caption; None if there is an error.
        error: error message of the form `<reason>: <detail>`; None if there is a caption.
        sha256: SHA-256 of the picture's bytes, in hex; None if the row contains no readable bytes.
        num_tokens: number of generated tokens, including the end token.
        mean_logprob: mean log-probability of the generated tokens, in nats; None if there is an error.
    """

    caption: str | None
    error: str | None
    sha256: str | None
    num_tokens: int
    mean_logprob: float | None


class DecodedPicture(NamedTuple):
    """Result of decoding a picture file: the pixels (H, W, C) at model resolution, or an error, and the file's
    SHA-256."""

    pixels: npt.NDArray[np.uint8] | None
    sha256: str | None
    error: str | None


def decode_picture(
    image: bytes | str | None, config: ImageConfig, *, max_pixels: int, min_side: int, max_bytes: int
) -> DecodedPicture:
    """Decode a picture file and resize it to model resolution. The arguments are those of `Captioner.caption`."""
    sha256 = None
    try:
        data = picture_bytes(image, max_bytes)
        sha256 = hashlib.sha256(data).hexdigest()
        picture, _ = open_image(data, max_pixels=max_pixels, min_side=min_side)
        return DecodedPicture(to_pixels(picture, config), sha256, None)
    except ImageError as error:
        return DecodedPicture(None, sha256, f"{error.reason}: {error.detail}")


class Captioner:
    """Model and tokenizer that caption pictures."""

    def __init__(self, model: VisionLanguageModel, tokenizer: Tokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer

    def caption(
        self,
        images: Sequence[bytes | str | None],
        prompts: Sequence[str],
        settings: GenerationConfig,
        *,
        max_pixels: int = MAX_PIXELS,
        min_side: int = MIN_SIDE,
        max_bytes: int = MAX_BYTES,
    ) -> list[CaptionResult]:
        """Caption pictures, and return one result for each picture, in the order of the pictures.

        A picture that exceeds a limit causes an error in its row.

        Args:
            images: picture files as bytes or as base64 text, optionally with a `data:` prefix.
            prompts: one prompt for each picture; an empty prompt asks for a plain caption.
            settings: generation settings, such as the temperature.
            max_pixels: largest allowed number of pixels (width times height).
            min_side: smallest allowed width and height, in pixels.
            max_bytes: largest allowed size of a picture file, in bytes.
        """
        limits = {"max_pixels": max_pixels, "min_side": min_side, "max_bytes": max_bytes}
        decoded = [decode_picture(image, self.model.config.image, **limits) for image in images]
        return self.caption_decoded(decoded, prompts, settings)

    def caption_decoded(
        self, pictures: Sequence[DecodedPicture], prompts: Sequence[str], settings: GenerationConfig
    ) -> list[CaptionResult]:
        """Caption decoded pictures, and return one result for each picture.

        The result for a picture that could not be decoded contains the decoding error.
        """
        valid = {index: picture.pixels for index, picture in enumerate(pictures) if picture.pixels is not None}
        results = self.complete(list(valid.values()), [prompts[index] for index in valid], settings)
        completions = dict(zip(valid, results, strict=True))
        return [
            _to_result(completions[index], picture.sha256)
            if index in completions
            else _error_result(picture.error, picture.sha256)
            for index, picture in enumerate(pictures)
        ]

    def complete(
        self, pictures: Sequence[npt.NDArray[np.uint8]], prompts: Sequence[str], settings: GenerationConfig
    ) -> list[Completion | UserError]:
        """Generate one text for each picture. The pictures must already have model resolution.

        Returns:
            For each picture, a completion, or an error if the prompt is not a text or does not fit the model's context.
        """
        results: dict[int, Completion | UserError] = {}
        requests: dict[int, Request] = {}
        for index, (picture, prompt) in enumerate(zip(pictures, prompts, strict=True)):
            try:
                if not isinstance(prompt, str):
                    raise UserError("the prompt is not a text", got=f"a {type(prompt).__name__}", fix="give a string")
                prefix = prefix_ids(self.tokenizer, self.model.config.num_slots, prompt)
                request = Request(prefix, (torch.tensor(picture),))
                check_length(self.model, request, settings)
            except UserError as error:
                results[index] = error
            else:
                requests[index] = request
        for batch in _batches(requests, settings):
            completions = generate(self.model, self.tokenizer, [requests[index] for index in batch], settings)
            results |= dict(zip(batch, completions, strict=True))
        return [results[index] for index in range(len(pictures))]


def _batches(requests: Mapping[int, Request], settings: GenerationConfig) -> Iterator[list[int]]:
    """Group requests of similar length into batches, starting with the longest requests."""
    by_length = sorted(requests, key=lambda index: -len(requests[index].prefix))
    while by_length:
        positions = (len(requests[by_length[0]].prefix) + settings.max_new_tokens) * settings.num_beams
        rows = max(1, min(BATCH_ROWS, BATCH_POSITIONS // positions))
        yield by_length[:rows]
        by_length = by_length[rows:]


def _to_result(completion: Completion | UserError, sha256: str | None) -> CaptionResult:
    if isinstance(completion, UserError):
        return _error_result(str(completion), sha256)
    return CaptionResult(completion.text, None, sha256, completion.num_tokens, completion.mean_logprob)


def _error_result(error: str | None, sha256: str | None) -> CaptionResult:
    return CaptionResult(None, error, sha256, 0, None)

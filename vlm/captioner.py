"""Captions for pictures of any origin: one model a process, errors a row each, no answer that depends on its batch.

Executors, the served model and `lakesight ask` all caption through here, so they cannot disagree. A picture is bytes,
or text that holds base64; whatever is wrong with one picture or prompt is the error of that row alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from vlm.config import GenerationConfig
from vlm.errors import ImageError, UserError
from vlm.generation.generate import Completion, Request, check_length, generate
from vlm.image import open_image, picture_bytes, to_pixels
from vlm.model import VisionLanguageModel
from vlm.text.base import Tokenizer
from vlm.text.prompt import prefix_ids

BATCH_ROWS = 64
BATCH_POSITIONS = 16_384
"""A batch has no more rows and, over its rows and beams, no more positions: what bounds the memory of the cache."""
MAX_PIXELS, MIN_SIDE = 64_000_000, 4
"""What a picture may be, where the caller does not say: width times height at most, and each at least."""


@dataclass(frozen=True)
class CaptionResult:
    """What became of one picture: a caption or an error, never both.

    Attributes:
        caption: the text; None where there is an error.
        error: `<reason>: <detail>`; None where there is a caption.
        sha256: of the picture's bytes, hex; None without bytes.
        num_tokens: generated tokens, the end token included.
        mean_logprob: mean log-probability of these tokens, in nats; None where there is an error.
    """

    caption: str | None
    error: str | None
    sha256: str | None
    num_tokens: int
    mean_logprob: float | None


class DecodedPicture(NamedTuple):
    """A picture on its way to the model: uint8 pixels (H, W, C), or its error; and the SHA-256 of its bytes."""

    pixels: npt.NDArray[np.uint8] | None
    sha256: str | None
    error: str | None


class Captioner:
    """A model and its tokenizer, ready to caption."""

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
    ) -> list[CaptionResult]:
        """One result a picture, in order.

        Args:
            images: picture files as bytes, or as base64 text (a `data:` prefix may stand before it).
            prompts: one a picture; empty for a plain caption.
            settings: how to decode.
            max_pixels: width times height at most; a larger picture is an error of its row.
            min_side: width and height at least, pixels.
        """
        decoded = self.decode(images, max_pixels=max_pixels, min_side=min_side)
        return self.caption_decoded(decoded, prompts, settings)

    def decode(
        self, images: Sequence[bytes | str | None], *, max_pixels: int = MAX_PIXELS, min_side: int = MIN_SIDE
    ) -> list[DecodedPicture]:
        """Pictures at model resolution, in order; needs no model and may run beside it."""
        return [self._decode(image, max_pixels, min_side) for image in images]

    def _decode(self, image: bytes | str | None, max_pixels: int, min_side: int) -> DecodedPicture:
        sha256 = None
        try:
            data = picture_bytes(image)
            sha256 = hashlib.sha256(data).hexdigest()
            picture, _ = open_image(data, max_pixels=max_pixels, min_side=min_side)
            return DecodedPicture(to_pixels(picture, self.model.config.image), sha256, None)
        except ImageError as error:
            return DecodedPicture(None, sha256, f"{error.reason}: {error.detail}")

    def caption_decoded(
        self, pictures: Sequence[DecodedPicture], prompts: Sequence[str], settings: GenerationConfig
    ) -> list[CaptionResult]:
        """One result a picture, in order; what could not be decoded keeps its error."""
        good = {index: picture.pixels for index, picture in enumerate(pictures) if picture.pixels is not None}
        answers = self.complete(list(good.values()), [prompts[index] for index in good], settings)
        said = dict(zip(good, answers, strict=True))
        return [
            _result(said[index], picture.sha256) if index in said else _failed(picture.error, picture.sha256)
            for index, picture in enumerate(pictures)
        ]

    def complete(
        self, pictures: Sequence[npt.NDArray[np.uint8]], prompts: Sequence[str], settings: GenerationConfig
    ) -> list[Completion | UserError]:
        """What is said about each picture at model resolution, in order; the error where its prompt does not fit."""
        answers: dict[int, Completion | UserError] = {}
        requests: dict[int, Request] = {}
        for index, (picture, prompt) in enumerate(zip(pictures, prompts, strict=True)):
            prefix = prefix_ids(self.tokenizer, self.model.config.num_slots, prompt)
            request = Request(prefix, (torch.tensor(picture),))
            try:
                check_length(self.model, request, settings)
            except UserError as error:
                answers[index] = error
            else:
                requests[index] = request
        for batch in _batches(requests, settings):
            found = generate(self.model, self.tokenizer, [requests[index] for index in batch], settings)
            answers |= dict(zip(batch, found, strict=True))
        return [answers[index] for index in range(len(pictures))]


def _batches(requests: Mapping[int, Request], settings: GenerationConfig) -> Iterator[list[int]]:
    """Which requests go together: those of about the same length, the longest first."""
    by_length = sorted(requests, key=lambda index: -len(requests[index].prefix))
    while by_length:
        positions = (len(requests[by_length[0]].prefix) + settings.max_new_tokens) * settings.num_beams
        rows = max(1, min(BATCH_ROWS, BATCH_POSITIONS // positions))
        yield by_length[:rows]
        by_length = by_length[rows:]


def _result(answer: Completion | UserError, sha256: str | None) -> CaptionResult:
    if isinstance(answer, UserError):
        return _failed(str(answer), sha256)
    return CaptionResult(answer.text, None, sha256, answer.num_tokens, answer.mean_logprob)


def _failed(error: str | None, sha256: str | None) -> CaptionResult:
    return CaptionResult(None, error, sha256, 0, None)

"""Captioning of pictures. `vlm.load`, Spark executors, the served model and `lakesight ask` all use this module.

A defective picture or prompt causes an error only in its own row, and a caption does not depend on the other rows of
the batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL.Image import Image

from vlm.checkpoint import save_model
from vlm.config import GenerationConfig, ImageConfig
from vlm.errors import ImageError, UserError
from vlm.generation.attention_maps import AttentionMaps, attention_maps
from vlm.generation.generate import Completion, Request, check_length, generate, stream
from vlm.generation.logprobs import AnswerLogprobs, answer_logprobs
from vlm.image import check_size, open_image, picture_bytes, to_pixels, upright_rgb
from vlm.model import VisionLanguageModel
from vlm.text.base import Tokenizer
from vlm.text.prompt import continuation_ids, prefix_ids
from vlm.vision import no_pictures

Picture = Image | Path | bytes | str
"""Types in which a caller can pass a picture: a Pillow image, the path of a file, or a file's bytes, raw or as base64
text.
"""

BATCH_ROWS = 64
BATCH_POSITIONS = 16_384
"""BATCH_ROWS is the largest number of rows in a batch. BATCH_POSITIONS is the largest number of positions in a batch,
summed over all rows and beams.

BATCH_ROWS and BATCH_POSITIONS bound the memory of the key-value cache."""
MAX_PIXELS, MIN_SIDE, MAX_BYTES = 64_000_000, 4, 64 * 2**20
"""Default limits for pictures: the largest number of pixels (width times height), the smallest side in pixels, and the
largest size of a file in bytes."""


@dataclass(frozen=True)
class CaptionResult:
    """Result for one picture, which is either a caption or an error.

    Attributes:
        caption: generated caption, or None if there is an error.
        error: error message of the form `<reason>: <detail>`, or None if there is a caption.
        sha256: SHA-256 of the picture's bytes, in hex, or None if the row contains no readable bytes.
        num_tokens: number of generated tokens, including the end token.
        mean_logprob: mean log-probability of the generated tokens, in nats, or None if there is an error.
    """

    caption: str | None
    error: str | None
    sha256: str | None
    num_tokens: int
    mean_logprob: float | None


class DecodedPicture(NamedTuple):
    """Result of decoding a picture: the file's SHA-256, and either an error or the pixels (H, W, C) at model size."""

    pixels: npt.NDArray[np.uint8] | None
    sha256: str | None
    error: str | None


def decode_picture(
    image: Picture | None, config: ImageConfig, *, max_pixels: int, min_side: int, max_bytes: int
) -> DecodedPicture:
    """Decode a picture and resize it to model resolution. `Captioner.caption` describes the arguments."""
    sha256 = None
    try:
        if isinstance(image, Image):
            check_size(image, max_pixels=max_pixels, min_side=min_side)
            return DecodedPicture(to_pixels(upright_rgb(image), config), None, None)
        data = picture_bytes(_read_file(image) if isinstance(image, Path) else image, max_bytes)
        sha256 = hashlib.sha256(data).hexdigest()
        picture, _ = open_image(data, max_pixels=max_pixels, min_side=min_side)
        return DecodedPicture(to_pixels(picture, config), sha256, None)
    except ImageError as error:
        return DecodedPicture(None, sha256, f"{error.reason}: {error.detail}")


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ImageError("missing_field", f"{path}: {error.strerror}") from None


class Captioner:
    """Model and tokenizer that caption pictures and answer questions about pictures.

    `vlm.load` and `vlm.build` return a captioner. A picture may be a Pillow image, a `pathlib.Path`, the bytes of a
    picture file, or base64 text. Every method takes generation settings as keyword arguments (`vlm.GenerationConfig`).
    If a caller does not pass a setting, the method uses the value that is stored with the model.

    Example:
        >>> import vlm
        >>> captioner = vlm.build("conf/model/nano_tiny.yml", ["a red square", "a blue circle"])
        >>> captioner.model.config.num_slots
        16
        >>> captioner.settings(temperature=0.7, top_p=0.9).top_p
        0.9
    """

    def __init__(self, model: VisionLanguageModel, tokenizer: Tokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer

    def save(self, folder: str | Path) -> None:
        """Write the model as a checkpoint: model.safetensors, config.json and tokenizer.json.

        Example:
            >>> import tempfile, vlm
            >>> folder = tempfile.mkdtemp()
            >>> captioner = vlm.build("conf/model/nano_tiny.yml", ["a red square"])
            >>> captioner.save(folder)
            >>> vlm.load(folder).model.config == captioner.model.config
            True
        """
        save_model(Path(folder), self.model, self.tokenizer)

    def settings(self, **changes: Any) -> GenerationConfig:
        """Return the generation settings that are stored with the model, with some values replaced.

        Raises:
            ConfigError: a setting does not exist or has an invalid value, or two settings exclude each other.

        Example:
            >>> import vlm
            >>> captioner = vlm.build("conf/model/nano_tiny.yml", ["a red square"])
            >>> captioner.settings(num_beams=3).num_beams
            3
        """
        return self.model.config.generation.changed(changes)

    def caption(
        self,
        images: Sequence[Picture | None],
        prompts: Sequence[str] | str = "",
        *,
        max_pixels: int = MAX_PIXELS,
        min_side: int = MIN_SIDE,
        max_bytes: int = MAX_BYTES,
        **settings: Any,
    ) -> list[CaptionResult]:
        """Caption pictures, and return one result for each picture, in the order of the pictures.

        If a picture cannot be decoded or exceeds a limit, the result for this picture contains an error.

        Args:
            images: pictures to caption.
            prompts: one prompt for each picture, or one prompt for all pictures; an empty prompt asks for a plain
                caption.
            max_pixels: largest allowed number of pixels (width times height) of a picture.
            min_side: smallest allowed width and height of a picture, in pixels.
            max_bytes: largest allowed size of a picture file, in bytes.
            **settings: generation settings, such as `temperature=0.7`.

        Raises:
            ConfigError: a generation setting does not exist or has an invalid value.
            UserError: the number of prompts is not the number of pictures.

        Example:
            >>> import vlm
            >>> from PIL import Image
            >>> captioner = vlm.build("conf/model/nano_tiny.yml", ["a red square"])
            >>> pictures = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
            >>> results = captioner.caption(pictures, max_new_tokens=5)
            >>> [result.num_tokens <= 5 for result in results]
            [True, True]
            >>> captioner.caption([b"no picture"])[0].error
            "not_an_image: 10 bytes starting b'no pictu'"
        """
        chosen = self.settings(**settings)
        prompts = [prompts] * len(images) if isinstance(prompts, str) else prompts
        if len(prompts) != len(images):
            raise UserError(
                "the number of prompts differs from the number of pictures",
                got=f"{len(images)} pictures and {len(prompts)} prompts",
                fix="give as many prompts as pictures, or one string for all pictures",
            )
        limits = {"max_pixels": max_pixels, "min_side": min_side, "max_bytes": max_bytes}
        decoded = [decode_picture(image, self.model.config.image, **limits) for image in images]
        return self.caption_decoded(decoded, prompts, chosen)

    def stream(self, images: Picture | Sequence[Picture], prompt: str = "", **settings: Any) -> Iterator[str]:
        """Answer one prompt about one or several pictures, and yield the answer piece by piece.

        The concatenated pieces equal the answer that `caption` returns for the same picture and prompt. With beam
        search, the whole answer is one piece.

        Args:
            images: one picture, or the pictures in the order in which the model reads them.
            prompt: question about the pictures; an empty prompt asks for a plain caption.
            **settings: generation settings, such as `temperature=0.7`.

        Raises:
            ImageError: a picture cannot be decoded.
            UserError: the prompt and the answer do not fit into the model's context.

        Example:
            >>> import vlm
            >>> from PIL import Image
            >>> captioner = vlm.build("conf/model/nano_tiny.yml", ["a red square"])
            >>> picture = Image.new("RGB", (64, 64), "red")
            >>> pieces = list(captioner.stream(picture, max_new_tokens=8))
            >>> "".join(pieces) == captioner.caption([picture], max_new_tokens=8)[0].caption
            True
        """
        pictures = [images] if isinstance(images, Picture) else images
        request, chosen = self.request(pictures, prompt), self.settings(**settings)
        check_length(self.model, request, chosen)
        return self._stream(request, chosen)

    def _stream(self, request: Request, settings: GenerationConfig) -> Iterator[str]:
        shown = ""
        for completion in stream(self.model, self.tokenizer, request, settings):
            if completion.text != shown:
                yield completion.text[len(shown) :]
            shown = completion.text

    def logprobs(
        self, images: Sequence[Picture], prompts: Sequence[str], answers: Sequence[str]
    ) -> list[AnswerLogprobs]:
        """Compute the log-probabilities of given answers, for example to choose the most likely one of several labels.

        Args:
            images: one picture for each answer.
            prompts: one prompt for each answer; an empty prompt asks for a plain caption.
            answers: texts to score. The end token after each text is scored too.

        Raises:
            ImageError: a picture cannot be decoded.
            UserError: a prompt and its answer do not fit into the model's context.

        Example:
            >>> import vlm
            >>> from PIL import Image
            >>> captioner = vlm.build("conf/model/nano_tiny.yml", ["red", "blue"])
            >>> picture = Image.new("RGB", (64, 64), "red")
            >>> scored = captioner.logprobs([picture] * 2, ["", ""], ["red", "blue"])
            >>> "".join(scored[0].tokens), scored[0].total < 0
            ('red', True)
        """
        if not len(images) == len(prompts) == len(answers):
            raise UserError(
                "the lists of images, prompts and answers have different lengths",
                got=f"{len(images)} pictures, {len(prompts)} prompts and {len(answers)} answers",
                fix="give one picture and one prompt for each answer",
            )
        requests = [self.request([image], prompt) for image, prompt in zip(images, prompts, strict=True)]
        return answer_logprobs(self.model, self.tokenizer, requests, answers)

    def attention(self, image: Picture, prompt: str = "", **settings: Any) -> AttentionMaps:
        """Answer a prompt about a picture, and return where in the picture the model looks when it generates each
        token.

        Args:
            image: picture that the prompt asks about.
            prompt: question about the picture; an empty prompt asks for a plain caption.
            **settings: generation settings, such as `num_beams=4`.

        Raises:
            ImageError: the picture cannot be decoded.
            UserError: the prompt and the answer do not fit into the model's context.

        Example:
            >>> import vlm
            >>> from PIL import Image
            >>> captioner = vlm.build("conf/model/nano_tiny.yml", ["a red square"])
            >>> maps = captioner.attention(Image.new("RGB", (64, 64), "red"), max_new_tokens=6)
            >>> maps.patches().shape == (len(maps.spans), 4, 4)
            True
        """
        request = self.request([image], prompt)
        (completion,) = generate(self.model, self.tokenizer, [request], self.settings(**settings))
        return attention_maps(self.model, self.tokenizer, request, completion)

    def request(self, images: Sequence[Picture], prompt: str = "") -> Request:
        """Decode pictures, and build a request from the pictures and a prompt, for the functions of `vlm.generation`.

        Raises:
            ImageError: a picture cannot be decoded.
            UserError: the prompt is not valid Unicode, or pictures are given to a text-only model, which has no
            encoder.

        Example:
            >>> import vlm
            >>> from PIL import Image
            >>> captioner = vlm.build("conf/model/nano_tiny.yml", ["a red square"])
            >>> request = captioner.request([Image.new("RGB", (64, 64))] * 2, "what has changed?")
            >>> len(request.pixels), request.prefix.count(-1)
            (2, 32)
        """
        pixels = []
        if images and self.model.config.text_only:
            raise no_pictures()
        for image in images:
            decoded = decode_picture(
                image, self.model.config.image, max_pixels=MAX_PIXELS, min_side=MIN_SIDE, max_bytes=MAX_BYTES
            )
            if decoded.pixels is None:
                raise ImageError(*str(decoded.error).partition(": ")[::2])
            pixels.append(torch.from_numpy(decoded.pixels))
        if self.model.config.text_only:
            return Request(continuation_ids(self.tokenizer, prompt))
        return Request(prefix_ids(self.tokenizer, self.model.config.num_slots, prompt, len(pixels)), tuple(pixels))

    def caption_decoded(
        self, pictures: Sequence[DecodedPicture], prompts: Sequence[str], settings: GenerationConfig
    ) -> list[CaptionResult]:
        """Caption decoded pictures, and return one result for each picture.

        The result for a picture that could not be decoded contains the decoding error.

        Example:
            >>> import vlm
            >>> captioner = vlm.build("conf/model/nano_tiny.yml", ["a red square"])
            >>> picture = DecodedPicture(np.zeros((32, 32, 3), np.uint8), sha256=None, error=None)
            >>> len(captioner.caption_decoded([picture], [""], captioner.settings(max_new_tokens=5)))
            1
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

        Raises:
            UserError: the model is a text-only model.

        Example:
            >>> import vlm
            >>> captioner = vlm.build("conf/model/nano_tiny.yml", ["a red square"])
            >>> pixels = np.zeros((32, 32, 3), np.uint8)
            >>> [completion] = captioner.complete([pixels], [""], captioner.settings(max_new_tokens=5))
            >>> len(completion.logprobs) == completion.num_tokens
            True
        """
        if self.model.config.text_only:
            raise no_pictures()
        results: dict[int, Completion | UserError] = {}
        requests: dict[int, Request] = {}
        for index, (picture, prompt) in enumerate(zip(pictures, prompts, strict=True)):
            try:
                if not isinstance(prompt, str):
                    raise UserError("the prompt is not a string", got=f"a {type(prompt).__name__}", fix="give a string")
                prefix = prefix_ids(self.tokenizer, self.model.config.num_slots, prompt)
                request = Request(prefix, (torch.tensor(picture, device="cpu"),))
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

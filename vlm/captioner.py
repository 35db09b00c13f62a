"""Captioning of pictures. `vlm.load`, Spark executors, the served model and `lakesight ask` all use this module.

If a picture or a prompt is defective, only the result of its own row is an error. A caption does not depend on the
other rows of the batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vlm.checkpoint import save_model
from vlm.config import GenerationConfig
from vlm.errors import UserError
from vlm.files import IMPORT_RECORD
from vlm.generation.attention_maps import AttentionMaps, attention_maps
from vlm.generation.generate import Completion, Request, check_length, generate, stream
from vlm.generation.logprobs import AnswerLogprobs, answer_logprobs
from vlm.generation.result import CaptionResult, error_result, to_result
from vlm.inputs import (
    LIMITS,
    MAX_BYTES,
    MAX_PIXELS,
    MIN_SIDE,
    DecodedPicture,
    Picture,
    answer_lists,
    check_pixels,
    check_same_number,
    check_text,
    chosen_settings,
    decode_picture,
    decode_pictures,
    folder_to_write,
    is_picture,
    one_picture,
    picture_list,
    prompt_list,
    whole_number,
    wrong_argument,
)
from vlm.model import VisionLanguageModel
from vlm.precision import check_saveable
from vlm.text.base import Tokenizer
from vlm.text.prompt import continuation_ids, prefix_ids
from vlm.vision import no_pictures

BATCH_ROWS = 64
BATCH_POSITIONS = 16_384
"""BATCH_ROWS is the largest number of rows in a batch. BATCH_POSITIONS is the largest number of positions in a batch,
summed over all rows and beams. A batch of a single row may have more positions.

BATCH_ROWS and BATCH_POSITIONS bound the memory of the key-value cache."""


class Captioner:
    """Model and tokenizer that caption pictures and answer questions about pictures.

    `vlm.load` and `vlm.build` return a captioner. A picture may be a Pillow image of any mode with at most 16 bits per
    sample, a `pathlib.Path`, the bytes of a picture file, or base64 text. A picture may also be a NumPy array of uint8
    with the shape (height, width), (height, width, 3) or (height, width, 4). A text is never read as the path of a
    file. The methods `caption`, `stream` and `attention` take generation settings as keyword arguments
    (`vlm.GenerationConfig`). If a caller does not pass a setting, the method uses the value that is stored with the
    model. A method warns of each changed setting that has no effect, for example `top_k` if `temperature` is 0.

    Example:
        >>> import vlm
        >>> captioner = vlm.build("nano_tiny", ["a red square", "a blue circle"])
        >>> captioner.model.config.num_slots
        16
        >>> captioner.settings(temperature=0.7, top_p=0.9).top_p
        0.9
    """

    def __init__(self, model: VisionLanguageModel, tokenizer: Tokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer

    def save(self, folder: str | Path) -> None:
        """Write the model as a checkpoint: model.safetensors, config.json and tokenizer.json.

        An earlier checkpoint in the folder is replaced. The record of an import (import.json) is removed, because the
        record describes the replaced weights.

        Raises:
            ArgumentError: `folder` is not a path, is the path of a file, or is a folder with a published model of
                another library.
            UserError: the weights are quantized (precision int8 or int4).

        Example:
            >>> import tempfile, vlm
            >>> folder = tempfile.mkdtemp()
            >>> captioner = vlm.build("nano_tiny", ["a red square"])
            >>> captioner.save(folder)
            >>> vlm.load(folder).model.config == captioner.model.config
            True
        """
        target = folder_to_write(folder, "folder")
        check_saveable(self.model)
        (target / IMPORT_RECORD).unlink(missing_ok=True)
        save_model(target, self.model, self.tokenizer)

    def settings(self, **changes: Any) -> GenerationConfig:
        """Return the generation settings that are stored with the model, with some values replaced.

        Raises:
            ConfigError: a setting does not exist or has an invalid value, or two settings exclude each other.

        Example:
            >>> import vlm
            >>> captioner = vlm.build("nano_tiny", ["a red square"])
            >>> captioner.settings(num_beams=3).num_beams
            3
        """
        return self.model.config.generation.changed(changes)

    def caption(
        self,
        images: Iterable[Picture | None] | Picture,
        prompts: Iterable[str] | str = "",
        *,
        max_pixels: int = MAX_PIXELS,
        min_side: int = MIN_SIDE,
        max_bytes: int = MAX_BYTES,
        **settings: Any,
    ) -> list[CaptionResult]:
        """Caption pictures, and return one result for each picture, in the order of the pictures.

        If a picture cannot be decoded or exceeds a limit, the result for this picture contains an error. If `images` is
        an iterator, all its pictures are held in memory at once. To caption many large pictures, pass their paths.

        Args:
            images: pictures to caption, or one picture. None stands for a missing picture, whose result is an error.
            prompts: one prompt for each picture, or one prompt for all pictures; an empty prompt asks for a plain
                caption.
            max_pixels: largest allowed number of pixels (width times height) of a picture.
            min_side: smallest allowed width and height of a picture, in pixels.
            max_bytes: largest allowed size of a picture file, in bytes.
            **settings: generation settings, such as `temperature=0.7`.

        Raises:
            ArgumentError: an argument has a wrong type, or a limit is not a positive whole number.
            ConfigError: a generation setting does not exist or has an invalid value.
            UserError: the number of prompts is not the number of pictures, the model is a text-only model, or the model
                computes NaN or infinite values.

        Example:
            >>> import vlm
            >>> from PIL import Image
            >>> captioner = vlm.build("nano_tiny", ["a red square"])
            >>> pictures = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
            >>> results = captioner.caption(pictures, max_new_tokens=5)
            >>> [result.num_tokens <= 5 for result in results]
            [True, True]
            >>> captioner.caption([b"no picture"])[0].error
            "not_an_image: 10 bytes starting b'no pictu'"
        """
        limits = {"max_pixels": max_pixels, "min_side": min_side, "max_bytes": max_bytes}
        chosen = chosen_settings(self.model.config.generation, settings, "images", "prompts", *limits)
        limits = {name: whole_number(limit, name, LIMITS) for name, limit in limits.items()}
        pictures = picture_list(images)
        asked = prompt_list(prompts, len(pictures))
        decoded = [decode_picture(image, self.model.config.image, **limits) for image in pictures]
        return self.caption_decoded(decoded, asked, chosen)

    def stream(self, images: Picture | Iterable[Picture], prompt: str = "", **settings: Any) -> Iterator[str]:
        """Answer one prompt about one or several pictures, and yield the answer piece by piece.

        The concatenated pieces equal the answer that `caption` returns for the same picture, prompt and settings. With
        beam search, the whole answer is one piece.

        Args:
            images: one picture, or the pictures in the order in which the model reads them. With an empty list, the
                model reads only the prompt.
            prompt: question about the pictures; an empty prompt asks for a plain caption.
            **settings: generation settings, such as `temperature=0.7`.

        Raises:
            ArgumentError: an argument has a wrong type, or the prompt is not valid Unicode.
            ConfigError: a generation setting does not exist or has an invalid value.
            ImageError: a picture cannot be decoded.
            UserError: the prompt and the answer do not fit into the model's context, pictures are given to a text-only
                model, or the model computes NaN or infinite values.

        Example:
            >>> import vlm
            >>> from PIL import Image
            >>> captioner = vlm.build("nano_tiny", ["a red square"])
            >>> picture = Image.new("RGB", (64, 64), "red")
            >>> pieces = list(captioner.stream(picture, max_new_tokens=8))
            >>> "".join(pieces) == captioner.caption([picture], max_new_tokens=8)[0].caption
            True
        """
        chosen = chosen_settings(self.model.config.generation, settings, "images", "prompt")
        request = self.request(images, prompt)
        check_length(self.model, request, chosen)
        return self._stream(request, chosen)

    def _stream(self, request: Request, settings: GenerationConfig) -> Iterator[str]:
        shown = ""
        for completion in stream(self.model, self.tokenizer, request, settings):
            if completion.text != shown:
                yield completion.text[len(shown) :]
            shown = completion.text

    def logprobs(
        self, images: Iterable[Picture] | Picture, prompts: Iterable[str] | str, answers: Iterable[str]
    ) -> list[AnswerLogprobs]:
        """Compute the log-probabilities of given answers, for example to choose the most likely one of several labels.

        Args:
            images: one picture for each answer, one picture for all answers, or [] for a text-only model.
            prompts: one prompt for each answer, or one prompt for all answers; an empty prompt asks for a plain
                caption.
            answers: texts to score. The end token after each text is scored too.

        Raises:
            ArgumentError: an argument has a wrong type, or a text is not valid Unicode.
            ImageError: a picture cannot be decoded.
            UserError: the arguments differ in length, a prompt and its answer do not fit into the model's context,
                pictures are given to a text-only model, or the model computes NaN or infinite values.

        Example:
            >>> import vlm
            >>> from PIL import Image
            >>> captioner = vlm.build("nano_tiny", ["red", "blue"])
            >>> picture = Image.new("RGB", (64, 64), "red")
            >>> scored = captioner.logprobs(picture, "", ["red", "blue"])
            >>> "".join(scored[0].tokens), scored[0].total < 0
            ('red', True)
        """
        text_only = self.model.config.text_only
        pictures, asked, texts = answer_lists(images, prompts, answers, text_only=text_only)
        listed = [picture for each in pictures for picture in each]
        given = listed[:1] if is_picture(images) else listed
        pixels = dict(zip(map(id, given), self._decode(given), strict=True))
        requests = [
            self._request([pixels[id(picture)] for picture in each], prompt)
            for each, prompt in zip(pictures, asked, strict=True)
        ]
        return answer_logprobs(self.model, self.tokenizer, requests, texts)

    def attention(self, image: Picture, prompt: str = "", **settings: Any) -> AttentionMaps:
        """Answer a prompt about a picture, and return the model's attention to the picture for each token of the
        answer.

        Args:
            image: picture that the prompt asks about.
            prompt: question about the picture; an empty prompt asks for a plain caption.
            **settings: generation settings, such as `num_beams=4`.

        Raises:
            ArgumentError: an argument has a wrong type, or the prompt is not valid Unicode.
            ConfigError: a generation setting does not exist or has an invalid value.
            ImageError: the picture cannot be decoded.
            UserError: the prompt and the answer do not fit into the model's context, the model is a text-only model, or
                the model computes NaN or infinite values.

        Example:
            >>> import vlm
            >>> from PIL import Image
            >>> captioner = vlm.build("nano_tiny", ["a red square"])
            >>> maps = captioner.attention(Image.new("RGB", (64, 64), "red"), max_new_tokens=6)
            >>> maps.patches().shape == (len(maps.spans), 4, 4)
            True
        """
        chosen = chosen_settings(self.model.config.generation, settings, "image", "prompt")
        request = self.request([one_picture(image, "image")], prompt)
        (completion,) = generate(self.model, self.tokenizer, [request], chosen)
        return attention_maps(self.model, self.tokenizer, request, completion)

    def request(self, images: Picture | Iterable[Picture], prompt: str = "") -> Request:
        """Decode pictures, and build a request from the pictures and a prompt, for the functions of `vlm.generation`.

        Raises:
            ArgumentError: an argument has a wrong type, or the prompt is not valid Unicode.
            ImageError: a picture cannot be decoded.
            UserError: pictures are given to a text-only model, which has no encoder.

        Example:
            >>> import vlm
            >>> from PIL import Image
            >>> captioner = vlm.build("nano_tiny", ["a red square"])
            >>> request = captioner.request([Image.new("RGB", (64, 64))] * 2, "what has changed?")
            >>> len(request.pixels), request.prefix.count(-1)
            (2, 32)
        """
        pictures = picture_list(images)
        check_text(prompt, "prompt")
        return self._request(self._decode(pictures), prompt)

    def _decode(self, pictures: Sequence[Picture]) -> list[torch.Tensor]:
        """Decode pictures, and return uint8 pixels (H, W, 3) of each picture at model resolution."""
        if pictures and self.model.config.text_only:
            raise no_pictures()
        return [torch.from_numpy(decoded) for decoded in decode_pictures(pictures, self.model.config.image)]

    def _request(self, pixels: Sequence[torch.Tensor], prompt: str) -> Request:
        """Build a request from decoded pictures and a prompt."""
        if self.model.config.text_only:
            return Request(continuation_ids(self.tokenizer, prompt))
        return Request(prefix_ids(self.tokenizer, self.model.config.num_slots, prompt, len(pixels)), tuple(pixels))

    def caption_decoded(
        self, pictures: Sequence[DecodedPicture], prompts: Sequence[str], settings: GenerationConfig
    ) -> list[CaptionResult]:
        """Caption decoded pictures, and return one result for each picture.

        The result for a picture that could not be decoded contains the decoding error.

        Raises:
            ArgumentError: an argument has a wrong type, or the number of prompts is not the number of pictures.
            UserError: the model is a text-only model, or computes NaN or infinite values.

        Example:
            >>> import numpy as np
            >>> import vlm
            >>> from vlm.inputs import DecodedPicture
            >>> captioner = vlm.build("nano_tiny", ["a red square"])
            >>> picture = DecodedPicture(np.zeros((32, 32, 3), np.uint8), sha256=None, error=None)
            >>> len(captioner.caption_decoded([picture], [""], captioner.settings(max_new_tokens=5)))
            1
        """
        check_same_number(pictures, prompts)
        valid = {index: picture.pixels for index, picture in enumerate(pictures) if picture.pixels is not None}
        results = self.complete(list(valid.values()), [prompts[index] for index in valid], settings)
        completions = dict(zip(valid, results, strict=True))
        return [
            to_result(completions[index], picture.sha256)
            if index in completions
            else error_result(picture.error, picture.sha256)
            for index, picture in enumerate(pictures)
        ]

    def complete(
        self, pictures: Sequence[npt.NDArray[np.uint8]], prompts: Sequence[str], settings: GenerationConfig
    ) -> list[Completion | UserError]:
        """Generate one text for each picture. The pictures must already have model resolution.

        Returns:
            For each picture, a completion, or an error if the prompt is not a valid text, or if the prompt and the
            answer do not fit the model's context.

        Raises:
            ArgumentError: an argument has a wrong type, a picture does not have model resolution, or the number of
                prompts is not the number of pictures.
            UserError: the model is a text-only model, or computes NaN or infinite values.

        Example:
            >>> import numpy as np
            >>> import vlm
            >>> captioner = vlm.build("nano_tiny", ["a red square"])
            >>> pixels = np.zeros((32, 32, 3), np.uint8)
            >>> [completion] = captioner.complete([pixels], [""], captioner.settings(max_new_tokens=5))
            >>> len(completion.logprobs) == completion.num_tokens
            True
        """
        if self.model.config.text_only:
            raise no_pictures()
        check_pixels(pictures, prompts, self.model.config.image.size)
        if not isinstance(settings, GenerationConfig):
            raise wrong_argument("settings", settings, "a vlm.GenerationConfig, such as captioner.settings()")
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

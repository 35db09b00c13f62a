"""Result of the captioning of one picture."""

from __future__ import annotations

from dataclasses import dataclass

from vlm.errors import UserError
from vlm.generation.request import Completion


@dataclass(frozen=True)
class CaptionResult:
    """Result for one picture, which is either a caption or an error.

    Attributes:
        caption: generated caption, or None if there is an error.
        error: error message, or None if there is a caption. For a picture that cannot be used, the message has the form
            `<reason>: <detail>`.
        sha256: SHA-256 of the picture file's bytes, in hex. None for a Pillow image, an array, or a file that cannot be
            read or has more than `max_bytes` bytes.
        num_tokens: number of generated tokens, including the end token; 0 if there is an error.
        mean_logprob: mean log-probability of the generated tokens, in nats, or None if there is an error.
    """

    caption: str | None
    error: str | None
    sha256: str | None
    num_tokens: int
    mean_logprob: float | None


def to_result(completion: Completion | UserError, sha256: str | None) -> CaptionResult:
    """Convert a completion, or the error that replaces a completion, to the result of a picture."""
    if isinstance(completion, UserError):
        return error_result(str(completion), sha256)
    return CaptionResult(completion.text, None, sha256, completion.num_tokens, completion.mean_logprob)


def error_result(error: str | None, sha256: str | None) -> CaptionResult:
    """Return the result of a picture that has no caption."""
    return CaptionResult(None, error, sha256, 0, None)

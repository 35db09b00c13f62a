"""Layout of a sequence, which consists of image slots, start token, prompt, answer and end token.

    SLOT x N  <bos>  prompt \\n  answer  <eos>
    '--------- prefix --------' '-- targets --'

Training and generation both build the prefix with this module, so the layout is always the same. The first answer token
is predicted at the last position of the prefix, from the pictures and the prompt only. If the prompt begins with
pictures, their image slots come before the start token. If the prompt begins with a text, the sequence begins with the
start token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from vlm.errors import UserError
from vlm.text.base import SLOT, Tokenizer


class Picture:
    """Placeholder for a picture in a prompt that mixes pictures and texts."""


PICTURE: Final = Picture()


def prefix_ids(tokenizer: Tokenizer, num_slots: int, prompt: str, num_images: int = 1) -> list[int]:
    """Return the token ids before the answer: image slots of all pictures, start token, and prompt with a line break.

    If the prompt is empty, the line break is left out, except if `tokenizer.newline_after_empty_prompt` is True.

    Args:
        tokenizer: tokenizer of the model.
        num_slots: number of image slots per picture (`ModelConfig.num_slots`).
        prompt: question or instruction for the model; empty for a plain caption.
        num_images: number of pictures, whose slots come first.

    Raises:
        UserError: the prompt contains a surrogate, which no tokenizer can encode.
    """
    has_text = prompt or tokenizer.newline_after_empty_prompt
    return interleaved_ids(tokenizer, num_slots, [PICTURE] * num_images + ([prompt + "\n"] if has_text else []))


def continuation_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Return the token ids of a prompt that a text-only model continues: the start token, then the tokens of the
    prompt.

    Raises:
        UserError: the text contains a surrogate, which no tokenizer can encode.
    """
    return interleaved_ids(tokenizer, 0, [prompt])


def interleaved_ids(tokenizer: Tokenizer, num_slots: int, parts: Sequence[str | Picture]) -> list[int]:
    """Return the ids of pictures and texts in the given order. The start token comes before the first text.

    Raises:
        UserError: a text contains a surrogate, which no tokenizer can encode.
    """
    for part in parts:
        if isinstance(part, str) and not _is_unicode(part):
            raise UserError(
                "the prompt is not valid Unicode",
                got=ascii(part)[:80],
                fix="decode the prompt as UTF-8",
            )
    leading = next((i for i, part in enumerate(parts) if isinstance(part, str)), len(parts))
    ids = [SLOT] * num_slots * leading + [tokenizer.bos_id]
    for part in parts[leading:]:
        ids += tokenizer.encode(part) if isinstance(part, str) else [SLOT] * num_slots
    return ids


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def answer_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the ids of the answer followed by the end token."""
    return [*tokenizer.encode(text), tokenizer.eos_id]

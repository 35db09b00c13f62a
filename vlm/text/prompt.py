"""The form of a sequence: image slots, start token, prompt, answer, end token.

    SLOT x N  <bos>  prompt \\n  answer  <eos>
    '--------- prefix --------' '-- targets --'

Training and generation build the prefix here, so they cannot drift apart. The first answer token is predicted from
the last token of the prefix: from the pictures and the prompt alone. Several pictures stand in front one after the
other; without one the start token comes first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from vlm.text.base import SLOT, Tokenizer


class Picture:
    """A picture's place among the texts of an interleaved prompt."""


PICTURE: Final = Picture()


def prefix_ids(tokenizer: Tokenizer, num_slots: int, prompt: str, num_images: int = 1) -> list[int]:
    """Ids before the answer: N slots a picture, the start token, and the prompt with its line break where there is one.

    Args:
        tokenizer: of the model.
        num_slots: `ModelConfig.num_slots`.
        prompt: a question or instruction; empty for a plain caption.
        num_images: pictures in front.
    """
    return interleaved_ids(tokenizer, num_slots, [PICTURE] * num_images + ([prompt + "\n"] if prompt else []))


def interleaved_ids(tokenizer: Tokenizer, num_slots: int, parts: Sequence[str | Picture]) -> list[int]:
    """Ids of pictures and texts in any order: the start token stands after the leading pictures, the rest as given."""
    leading = next((i for i, part in enumerate(parts) if isinstance(part, str)), len(parts))
    ids = [SLOT] * num_slots * leading + [tokenizer.bos_id]
    for part in parts[leading:]:
        ids += tokenizer.encode(part) if isinstance(part, str) else [SLOT] * num_slots
    return ids


def answer_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of the answer, closed by the end token."""
    return [*tokenizer.encode(text), tokenizer.eos_id]

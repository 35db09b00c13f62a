"""The form of a sequence: image slots, start token, prompt, answer, end token.

    <image> x N  <bos>  prompt \\n  answer  <eos>
    '----------- prefix ----------' '-- targets --'

Training and generation build the prefix here, so they cannot drift apart. The first answer token is predicted from
the last token of the prefix: from the picture and the prompt alone.
"""

from __future__ import annotations

from vlm.text.base import Tokenizer


def prefix_ids(tokenizer: Tokenizer, num_slots: int, prompt: str) -> list[int]:
    """Ids before the answer: N image slots, the start token, and the prompt with its line break where there is one."""
    asked = tokenizer.encode(prompt + "\n") if prompt else []
    return [tokenizer.image_id] * num_slots + [tokenizer.bos_id] + asked


def answer_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of the answer, closed by the end token."""
    return [*tokenizer.encode(text), tokenizer.eos_id]

"""Token files: all texts of a split as one sequence of token ids, from which the ranks of a run read windows.

tokens-train.bin     <start> text <end> <start> text <end> ..., as little-endian integers of 2 or 4 bytes
tokens-train.json    TokenSummary, written last

The texts are in the order of the shards, so a token file depends only on the shards and the tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipelines.errors import StageFailed
from pipelines.formats.run_folder import read_json, write_json
from vlm.config import Config
from vlm.files import atomic_write
from vlm.text.base import Tokenizer

TRAIN_TOKENS, VALIDATE_TOKENS = "tokens-train.bin", "tokens-validate.bin"
"""Names of the token files in the folder of a run."""

Ids = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]


class TokenSummary(Config):
    """Description of a token file.

    Attributes:
        tokens: number of tokens, including start and end tokens.
        texts: number of texts.
        chars: number of characters of all texts.
        item_bytes: number of bytes of a token id.
    """

    tokens: int
    texts: int
    chars: int
    item_bytes: int

    @property
    def targets(self) -> int:
        """Number of tokens that a model predicts, which are all tokens except start tokens."""
        return self.tokens - self.texts

    def windows(self, context: int) -> int:
        """Return how many windows of `context` positions are needed to cover all tokens, which is at least 1.

        In these windows, each token except start tokens is a target exactly once.
        """
        return max(1, -(-(self.tokens - 1) // context))


def write_tokens(path: Path, texts: Iterable[str], tokenizer: Tokenizer) -> TokenSummary:
    """Encode texts one after another, write their tokens to a file, and write the summary next to this file."""
    kind = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    tokens = count = chars = 0
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        for text in texts:
            ids = np.array([tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id], kind)
            file.write(ids.tobytes())
            tokens, count, chars = tokens + len(ids), count + 1, chars + len(text)
    summary = TokenSummary(tokens=tokens, texts=count, chars=chars, item_bytes=kind.itemsize)
    write_json(path.with_suffix(".json"), summary)
    return summary


def read_tokens(path: Path) -> tuple[Ids, TokenSummary]:
    """Map a token file into memory, and read its summary.

    Raises:
        StageFailed: the token file is missing, or its size differs from the summary.
        UserError: the summary is missing or damaged.
    """
    summary = read_json(path.with_suffix(".json"), TokenSummary)
    size = path.stat().st_size if path.exists() else -1
    if size != summary.tokens * summary.item_bytes:
        raise StageFailed(
            "a token file is damaged",
            where=str(path),
            got=f"{size} bytes instead of {summary.tokens * summary.item_bytes}",
            fix=f"delete {path.with_suffix('.json')} and run the same command again: the file is written again",
        )
    return np.memmap(path, f"<u{summary.item_bytes}", "r"), summary

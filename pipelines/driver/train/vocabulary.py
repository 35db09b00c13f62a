"""Warning about words or characters that the vocabulary of a run lacks."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable

from vlm.text import Tokenizer

log = logging.getLogger(__name__)

SHOWN = 8


def warn_of_unknown(tokenizer: Tokenizer, texts: Iterable[str], which: str) -> None:
    """Log how many tokens of the texts are unknown, and the words or characters that are unknown most often.

    Args:
        tokenizer: tokenizer of the run.
        texts: texts of the run's training shards or validation shards.
        which: name of the texts in the log message, such as 'validation texts'.
    """
    counts: Counter[str] = Counter()
    tokens = 0
    for text in texts:
        if unknown := tokenizer.unknown(text):
            counts.update(unknown)
        tokens += len(tokenizer.encode(text))
    if not counts:
        return
    shown = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:SHOWN]
    log.warning(
        "%d of %d tokens of the %s are unknown to the tokenizer (%.2f %%). The %d different unknown texts include: %s",
        *(counts.total(), tokens, which, 100 * counts.total() / tokens, len(counts)),
        ", ".join(f"{piece!r} ({count})" for piece, count in shown),
    )

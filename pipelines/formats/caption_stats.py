"""What is counted of captions and their pictures while they are made: sums that add up, and figures of them.

An executor counts one file of captions, the driver adds the files of a job, an evaluation counts its rows: three times
the same function, so that the figures of a night can be laid beside those of the evaluation.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

from pydantic import Field

from vlm.config import Config
from vlm.text.words import words

DRAWN = 100
"""Captions among which different words are counted: their number grows with the captions, so it is asked of as many."""


class Tally(Config):
    """Sums over rows.

    Attributes:
        captioned: rows with a caption.
        errors: rows without.
        changed: rows whose picture was another when it was captioned before.
        words: of all captions.
        saying: for each word, how many captions have it.
        logprobs: sum of the captions' mean log-probabilities a token, in nats.
        pictures: that could be decoded.
        brightness: sum of their mean levels, 0 to 255.
        contrast: sum of the standard deviations of their levels.
    """

    captioned: int = 0
    errors: int = 0
    changed: int = 0
    words: int = 0
    saying: dict[str, int] = Field(default_factory=dict)
    logprobs: float = 0.0
    pictures: int = 0
    brightness: float = 0.0
    contrast: float = 0.0

    @classmethod
    def of_caption(cls, caption: str, logprob: float) -> Tally:
        """One caption."""
        said = words(caption)
        return cls(captioned=1, words=len(said), saying=dict.fromkeys(said, 1), logprobs=logprob)

    def figures(self) -> dict[str, float]:
        """What can be told of the rows.

        words (mean number in a caption), distinct_words (different ones expected among DRAWN captions; left out where
        there are fewer), mean_logprob (mean over captions), error_share, brightness and contrast (means over pictures).
        """
        found = {}
        if rows := self.captioned + self.errors:
            found["error_share"] = self.errors / rows
        if self.captioned:
            found |= {"words": self.words / self.captioned, "mean_logprob": self.logprobs / self.captioned}
        if self.captioned >= DRAWN:
            found["distinct_words"] = self._distinct_words()
        if self.pictures:
            found |= {"brightness": self.brightness / self.pictures, "contrast": self.contrast / self.pictures}
        return found

    def _distinct_words(self) -> float:
        """Expected number of different words in DRAWN captions without replacement (rarefaction; Hurlbert, 1971)."""
        none = math.lgamma(self.captioned + 1) - math.lgamma(self.captioned - DRAWN + 1)

        def missed(having: int) -> float:
            others = self.captioned - having
            if others < DRAWN:
                return 0.0
            return math.exp(math.lgamma(others + 1) - math.lgamma(others - DRAWN + 1) - none)

        return sum(1 - missed(having) for having in self.saying.values())


def total(tallies: Iterable[Tally]) -> Tally:
    """The sums of several tallies."""
    sums: Counter[str] = Counter()
    saying: Counter[str] = Counter()
    for tally in tallies:
        sums.update(tally.model_dump(exclude={"saying"}))
        saying.update(tally.saying)
    return Tally.model_validate({**sums, "saying": saying})

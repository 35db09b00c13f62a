"""Statistics of captions and their pictures: sums over rows, which can be added, and figures computed from the sums.

A Spark task computes the sums of its rows, and the driver adds the sums of all tasks of a caption job. An
evaluation computes the sums of its rows. Caption jobs and evaluations both use `CaptionStats`, so the figures of a job
can be compared with the figures of an evaluation.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

from pydantic import Field

from vlm.config import Config
from vlm.text.words import words

SAMPLED_CAPTIONS = 100
"""Number of captions from which `distinct_words` is computed.

The number is the same for all caption jobs, so their values of `distinct_words` can be compared. If `distinct_words`
counted the words of all captions, a job with more captions would have a larger value.
"""


class CaptionStats(Config):
    """Sums over rows. A row is a picture that has either a caption or an error.

    Attributes:
        captioned: number of rows for which the model generated a caption.
        errors: number of rows without a caption.
        changed: number of rows whose picture was captioned before and has changed since.
        words: number of words in all captions.
        captions_with_word: for each word, the number of captions that contain the word.
        logprobs: sum of the captions' mean log-probabilities per token, in nats.
        pictures: number of pictures that could be decoded.
        brightness: sum of the mean pixel levels (0 to 255) of the pictures.
        contrast: sum of the standard deviations of the pixel levels of the pictures.
    """

    captioned: int = 0
    errors: int = 0
    changed: int = 0
    words: int = 0
    captions_with_word: dict[str, int] = Field(default_factory=dict)
    logprobs: float = 0.0
    pictures: int = 0
    brightness: float = 0.0
    contrast: float = 0.0

    @classmethod
    def from_caption(cls, caption: str, logprob: float) -> CaptionStats:
        """Return the sums for a single caption, whose mean log-probability per token is `logprob` (in nats)."""
        caption_words = words(caption)
        counts = dict.fromkeys(caption_words, 1)
        return cls(captioned=1, words=len(caption_words), captions_with_word=counts, logprobs=logprob)

    def figures(self) -> dict[str, float]:
        """Compute the figures, such as the share of errors, from the sums.

        A figure is left out if there are no data for it.

        `words` is the mean number of words in a caption. `distinct_words` is the expected number of distinct words in
        SAMPLED_CAPTIONS captions, and is left out if there are fewer captions. `mean_logprob` is a mean over captions.
        `error_share` is the share of rows with an error. `brightness` and `contrast` are means over pictures.
        """
        found = {}
        if rows := self.captioned + self.errors:
            found["error_share"] = self.errors / rows
        if self.captioned:
            found |= {"words": self.words / self.captioned, "mean_logprob": self.logprobs / self.captioned}
        if self.captioned >= SAMPLED_CAPTIONS:
            found["distinct_words"] = self._distinct_words()
        if self.pictures:
            found |= {"brightness": self.brightness / self.pictures, "contrast": self.contrast / self.pictures}
        return found

    def _distinct_words(self) -> float:
        """Compute the expected number of distinct words in SAMPLED_CAPTIONS captions drawn without replacement.

        The method is called rarefaction (Hurlbert, 1971).
        """
        log_samples = math.lgamma(self.captioned + 1) - math.lgamma(self.captioned - SAMPLED_CAPTIONS + 1)

        def probability_of_none(with_word: int) -> float:
            others = self.captioned - with_word
            if others < SAMPLED_CAPTIONS:
                return 0.0
            return math.exp(math.lgamma(others + 1) - math.lgamma(others - SAMPLED_CAPTIONS + 1) - log_samples)

        return sum(1 - probability_of_none(count) for count in self.captions_with_word.values())


def sum_stats(stats: Iterable[CaptionStats]) -> CaptionStats:
    """Add the statistics of several files or rows, field by field."""
    sums: Counter[str] = Counter()
    captions_with_word: Counter[str] = Counter()
    for each in stats:
        sums.update(each.model_dump(exclude={"captions_with_word"}))
        captions_with_word.update(each.captions_with_word)
    return CaptionStats.model_validate({**sums, "captions_with_word": captions_with_word})

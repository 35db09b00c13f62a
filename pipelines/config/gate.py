"""What a model version must show before it may serve, and while it does: limits of a run, with defaults for most.

They are science and not deployment: which figure counts, and how good is good enough, depends on the data.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from vlm.config import Config

Baseline = Literal["constant", "neighbour"]


class GateConfig(Config):
    """The gate of `lakesight promote`.

    Attributes:
        metric: what versions are compared by, with the baselines and with the champion. Word F1 is defined for every
            split, and moves before exact match does.
        min_blind_gap: nats per token that a model gains at least from seeing the right picture.
        max_error_share: largest share of pictures without a caption.
        baselines: what a version must beat: the best caption that ignores the picture, and the caption of the training
            picture that looks most alike. Empty for a run that only shows that things work.
        trial_pictures: pictures of the split that the version captions in a process of its own.
    """

    metric: Literal["word_f1", "cider", "exact_match", "rouge_l", "bleu_4"] = "word_f1"
    min_blind_gap: float = 0.1
    max_error_share: Annotated[float, Field(ge=0, le=1)] = 0.01
    baselines: tuple[Baseline, ...] = ("constant", "neighbour")
    trial_pictures: PositiveInt = 16


class DriftConfig(Config):
    """How far the figures of a captioning may be from those of the version's evaluation before it alerts.

    Attributes:
        words: words a caption, as a share of the evaluation's.
        distinct_words: different words among 100 captions, as a share of the evaluation's.
        mean_logprob: nats per token.
        error_share: of the pictures.
        brightness: levels of 0 to 255.
        contrast: levels of 0 to 255.
        min_rows: of fewer, on either side, nothing is said: they differ by chance.
        fail: whether the job ends with exit code 1, else with a warning. All is written either way.
    """

    words: PositiveFloat = 0.3
    distinct_words: PositiveFloat = 0.5
    mean_logprob: PositiveFloat = 0.5
    error_share: PositiveFloat = 0.05
    brightness: PositiveFloat = 32.0
    contrast: PositiveFloat = 24.0
    min_rows: PositiveInt = 100
    fail: bool = False


class Trial(Config):
    """What a fresh process made of a version.

    Attributes:
        failure: why it does not load, or holds what it should not; empty when it works.
        pictures: it was given.
        errors: of the pictures it could not caption.
    """

    failure: str
    pictures: int
    errors: tuple[str, ...]

"""What a model version must show before it may serve: limits of a run, with defaults that hold for most.

They are science and not deployment: which figure counts, and how good is good enough, depends on the data.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

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

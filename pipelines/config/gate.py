"""Thresholds of a run for promotion and for drift.

They belong to the run and not to the deployment: which metric counts, and which value suffices, depends on the data.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from vlm.config import Config

Baseline = Literal["constant", "neighbour"]


class GateConfig(Config):
    """Conditions that a model version must meet before `lakesight promote` moves the champion alias to it.

    Attributes:
        metric: the metric that compares a version with the baselines and with the champion. Word F1 is defined for
            every split and improves earlier in training than exact match.
        min_blind_gap: smallest accepted blind gap, in nats per token: the loss with pictures of other rows minus the
            loss with the right pictures.
        max_error_share: largest accepted share of pictures without a caption.
        baselines: what the version must beat. `constant`: the best single caption for all pictures. `neighbour`: the
            caption of the most similar training picture. Leave it empty for a run that only tests the pipeline.
        trial_pictures: number of pictures of the split that the version captions in a separate process.
    """

    metric: Literal["word_f1", "cider", "exact_match", "rouge_l", "bleu_4"] = "word_f1"
    min_blind_gap: float = 0.1
    max_error_share: Annotated[float, Field(ge=0, le=1)] = 0.01
    baselines: tuple[Baseline, ...] = ("constant", "neighbour")
    trial_pictures: PositiveInt = 16


class DriftConfig(Config):
    """Largest accepted differences between the statistics of a captioning job and of the version's evaluation.

    Attributes:
        words: mean words per caption, as a share of the evaluation's value.
        distinct_words: distinct words in 100 captions, as a share of the evaluation's value.
        mean_logprob: mean log-probability, nats per token.
        error_share: share of pictures without a caption.
        brightness: mean pixel level, 0 to 255.
        contrast: standard deviation of pixel levels, 0 to 255.
        min_rows: with fewer rows on either side, nothing is compared: chance alone would exceed the thresholds.
        fail: True to end the job with exit code 1 after all captions are written; False to print a warning.
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
    """Result of loading a model version and captioning with it in a separate process.

    Attributes:
        failure: why the version cannot be loaded, or which forbidden files it holds; empty if it works.
        pictures: number of pictures it was given.
        errors: one message per picture that it could not caption.
    """

    failure: str
    pictures: int
    errors: tuple[str, ...]

"""Thresholds of a run for promotion and for drift.

The thresholds are set per run and not per deployment, because the right metric and the right values depend on the data.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from vlm.config import Config

Baseline = Literal["constant", "neighbour"]


class GateConfig(Config):
    """Conditions that a model version must meet before `lakesight promote` makes the version the champion.

    Attributes:
        metric: metric by which a model version is compared with the baselines and with the champion. The default is
            word F1, because word F1 is defined for every split and improves earlier in training than exact match.
        min_blind_gap: smallest accepted blind gap, in nats per token. The blind gap is the loss if each text is paired
            with a picture of another row, minus the loss with the right pictures.
        max_error_share: largest accepted share of pictures without a caption.
        baselines: baselines that the model version must beat. The baseline `constant` gives all pictures the same
            caption, chosen so that `metric` is best. The baseline `neighbour` gives each picture a human caption of the
            most similar other picture in the training split. A run that only tests the pipeline can set an empty list
            of baselines.
        min_distinct: smallest accepted number of distinct captions, as a share of the number of distinct human captions
            (one human caption of each row is counted). If there are several distinct human captions, at least two
            distinct captions are required. The limit refuses a model that gives many pictures the same caption. The
            limit applies only if `baselines` contains `constant`.
        min_pictures: number of pictures that the split needs for the strict comparison with a baseline. With at least
            `min_pictures` pictures, the whole confidence interval of the difference from the baseline must be above
            zero. With fewer pictures, only the difference itself must be above zero.
        trial_pictures: largest number of pictures that the model version captions in a separate process, as a check
            that the version loads and works.
    """

    metric: Literal["word_f1", "cider", "exact_match", "rouge_l", "bleu_4"] = "word_f1"
    min_blind_gap: float = 0.1
    max_error_share: Annotated[float, Field(ge=0, le=1)] = 0.01
    baselines: tuple[Baseline, ...] = ("constant", "neighbour")
    min_distinct: Annotated[float, Field(ge=0, le=1)] = 0.05
    min_pictures: PositiveInt = 10
    trial_pictures: PositiveInt = 16


class DriftConfig(Config):
    """Largest accepted differences (drift) between a captioning job and the evaluation of the same model version.

    Attributes:
        words: largest difference in the mean number of words per caption, as a share of the evaluation's value.
        distinct_words: largest difference in the number of distinct words in 100 captions, as a share of the
            evaluation's value.
        mean_logprob: largest difference in the mean log-probability of the captions, in nats per token.
        error_share: largest difference in the share of pictures without a caption.
        brightness: largest difference in the mean pixel value, on the scale from 0 to 255.
        contrast: largest difference in the standard deviation of the pixel values, on the scale from 0 to 255.
        min_rows: the job and the evaluation are compared only if both have at least this many rows. With fewer than
            `min_rows` rows, random differences would exceed the thresholds.
        fail: whether drift ends the job with exit code 1, after all captions are written; with false, drift only causes
            a warning.
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
        failure: why the model version does not work, such as 'the version contains pickles: a.pkl'; empty if it works.
        pictures: number of pictures that the model version was given; 0 if the version does not work.
        errors: error messages, one per picture that the model version could not caption.
    """

    failure: str
    pictures: int
    errors: tuple[str, ...]

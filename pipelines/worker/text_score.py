"""Losses of a text-only model on the windows of a token file."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipelines.formats.run_files.token_file import read_tokens
from pipelines.worker.data.windows import Windows
from vlm.captioner import Captioner
from vlm.generation.finite import require_finite
from vlm.training.objective import row_scores


class WindowScores(NamedTuple):
    """Per window: sum of the losses of its targets (in nats), number of targets, and number of correct tokens."""

    loss: list[float]
    targets: list[int]
    correct: list[int]


def score_windows(captioner: Captioner, tokens: Path, numbers: npt.NDArray[np.int64]) -> WindowScores:
    """Score windows of a token file, given their numbers.

    Raises:
        UserError: the model computes NaN.
    """
    ids, _ = read_tokens(tokens)
    model = captioner.model
    windows = Windows.of(ids, model.config.decoder.context, captioner.tokenizer)
    scores = row_scores(model, windows.held_out_batch(numbers).to(model.mean.device))
    found = WindowScores(*(values_B.tolist() for values_B in scores))
    require_finite(model, found.loss)
    return found

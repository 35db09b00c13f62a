"""Rows of an evaluation, for tests that compute metrics without a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipelines.driver.evaluate.metrics import ScoredRow


def scored_row(row: int, references: Sequence[str], caption: str | None, **values: Any) -> ScoredRow:
    """Return an evaluated row with the given human texts and caption. The arguments `values` replace the default values
    of other fields.
    """
    defaults: dict[str, Any] = {
        "image_id": f"x/{row}",
        "prompt": "",
        "neighbour": None,
        "loss": 1.0,
        "blind_loss": 2.0,
        "blank_loss": 2.0,
        "noise_loss": 2.0,
        "num_targets": 3,
        "num_correct": 2,
        "num_tokens": 4,
        "seconds": 0.25,
        "mean_logprob": -0.5,
        "brightness": 100.0,
        "contrast": 40.0,
    }
    return ScoredRow(row=row, references=tuple(references), caption=caption, **defaults | values)

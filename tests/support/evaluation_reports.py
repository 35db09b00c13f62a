"""Helper that makes the report of an evaluation without a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.driver.evaluate.bootstrap import Interval
from pipelines.driver.evaluate.run import EvaluationReport
from vlm.text.words import TOKENISATION


def evaluation_report(folder: Path, metrics: Mapping[str, Interval], **values: Any) -> EvaluationReport:
    """Return the report of an evaluation in a folder. The arguments `values` replace the default values of fields."""
    defaults: dict[str, Any] = {
        "model_name": "m",
        "model_version": "1",
        "run_id": "r",
        "source": "s",
        "split": "test",
        "dataset_version": 0,
        "scores_hash": "0123",
        "pictures": 10,
        "left_out": 0,
        "tokenisation": TOKENISATION,
        "columns": (),
        "slices": {},
        "gallery": folder / "gallery.html",
        "gallery_png": folder / "gallery.png",
        "figures_png": folder / "figures.png",
        "reused": False,
        "seconds": 1.0,
    }
    return EvaluationReport.model_validate(defaults | values | {"folder": folder, "metrics": dict(metrics)})

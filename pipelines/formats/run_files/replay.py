"""Files of a replay: the request with the step to replay, and the loss of each row of the step."""

from __future__ import annotations

from pathlib import Path

from pipelines.formats.run_folder import RunFolder
from vlm.config import Config


class ReplayRequest(Config):
    """replay.json: number of the step to replay; the first step of a run has number 0."""

    step: int


class ReplayedRow(Config):
    """Row of a replayed training step.

    Attributes:
        image_id: id of the picture, as in the table `samples`.
        text: text on which the row is trained at this step.
        tokens: number of target tokens.
        loss: loss with the weights before the step, in nats per target token; null if the loss is NaN or infinite, or
            if there are no target tokens.
    """

    image_id: str
    text: str
    tokens: int
    loss: float | None


class ReplayedRows(Config):
    """rows/rank-N.json: the rows of a rank at the replayed step."""

    rank: int
    rows: tuple[ReplayedRow, ...]


def replay_request(run: RunFolder) -> Path:
    """Return the path of replay.json in the run folder of a replay."""
    return run.path / "replay.json"


def replayed_rows(run: RunFolder, rank: int) -> Path:
    """Return the path of the file with the replayed rows of a rank."""
    return run.path / "rows" / f"rank-{rank}.json"

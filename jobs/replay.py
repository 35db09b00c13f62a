"""`lakesight train --replay-step S`: repeat one training step, and show the loss of each picture of the step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from jobs.common import Job
from vlm.config import Config

if TYPE_CHECKING:
    from pipelines.formats.run_folder import RunFolder

SHOWN_ROWS = 20
MAX_TEXT_CHARS = 60


class ReplayedPicture(Config):
    """Picture of a replayed step. `loss` is in nats per target token, and null if the loss is NaN or infinite."""

    rank: int
    image_id: str
    text: str
    tokens: int
    loss: float | None


class ReplayReport(Config):
    """Report of `lakesight train --replay-step`.

    Attributes:
        step: the replayed step.
        from_step: step of the checkpoint from which the replay trained; 0 if there was no earlier checkpoint.
        finite: whether the loss and the gradient of the step, and the loss of a validation after the step, were finite.
        error: message of a rank that found a value that was not finite, or an empty string.
        pictures: all pictures of the step. Pictures without a finite loss come first, then all others by descending
            loss.
    """

    run_folder: str
    step: int
    from_step: int
    finite: bool
    error: str
    pictures: tuple[ReplayedPicture, ...]


def run_replay(job: Job, run: RunFolder, step: int) -> ReplayReport:
    """Replay a step of a run, and print the pictures with the largest losses. The replay does not change the run."""
    from pipelines.driver.train.replay import replay_step
    from pipelines.formats.run_owner import own_run

    with own_run(run):
        found = replay_step(run, job.platform.launch, lambda: job.spark, step)
    pictures = [ReplayedPicture(rank=each.rank, **row.model_dump()) for each in found.ranks for row in each.rows]
    pictures.sort(key=lambda picture: -math.inf if picture.loss is None else -picture.loss)
    report = ReplayReport(
        run_folder=str(run.path),
        step=step,
        from_step=found.from_step,
        finite=not found.error,
        error=found.error,
        pictures=tuple(pictures),
    )
    job.output.line(
        "replay", f"step {step} with {len(pictures)} pictures, after repeating the steps from {found.from_step}"
    )
    for picture in pictures[:SHOWN_ROWS]:
        loss = "not finite" if picture.loss is None else f"{picture.loss:10.3f}"
        text = picture.text[:MAX_TEXT_CHARS].replace("\n", " ")
        job.output.line("", f"loss {loss}  rank {picture.rank}  {picture.image_id}  {text!r}")
    job.output.line("", found.error or "the loss and the gradient of this step are finite")
    return report

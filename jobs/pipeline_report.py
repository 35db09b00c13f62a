"""Reports of `lakesight pipeline`: one for runs with pictures, and one for runs with a text-only model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vlm.config import Config

if TYPE_CHECKING:
    from jobs.common import Job
    from jobs.train import TrainReport
    from pipelines.driver.ingest.report import FullReport


class StagesReport(Config):
    """Fields that both reports of `lakesight pipeline` have.

    Attributes:
        rows_in: number of rows that ingest read: the rows that added something, plus `duplicates` and `quarantined`.
        duplicates: number of rows whose content was already in the table of the source.
        quarantined: number of rows added to table `quarantine`.
        trained: whether training ran; false if a finished run was reused.
        metrics: metrics of the evaluated split, by name.
        nothing_new: whether the command ingested no row, trained no step and captioned no picture (with a text-only
            model: evaluated no text), because earlier commands had done this work.
        seconds: duration of the whole command, in seconds.
    """

    run: str
    rows_in: int
    duplicates: int
    quarantined: int
    run_id: str
    run_folder: str
    trained: bool
    model_name: str
    model_version: str
    metrics: dict[str, float]
    nothing_new: bool
    seconds: float


class PipelineReport(StagesReport):
    """Report of `lakesight pipeline` and `lakesight demo` for a run with pictures.

    Attributes:
        samples: number of rows that added a picture or a text to table `samples`.
        exact_match: share of the evaluated pictures whose caption equals a human text.
        blind_gap: increase of the loss when each text gets a wrong picture, in nats per token; null for a single
            picture.
        captions: number of pictures captioned by this command.
        captioned_before: number of pictures for which this model version already had a caption or an error.
        errors: number of pictures that could not be captioned.
        gallery: path of the gallery of the evaluation, an HTML page.
    """

    samples: int
    exact_match: float
    blind_gap: float | None
    captions: int
    captioned_before: int
    errors: int
    gallery: str


class TextPipelineReport(StagesReport):
    """Report of `lakesight pipeline` for a run with a text-only model.

    Attributes:
        texts: number of rows that added a text to table `texts`.
        loss_per_char: loss on the evaluated split, in nats per character.
    """

    texts: int
    loss_per_char: float


def describe_stages(job: Job, ingested: FullReport, trained: TrainReport) -> dict[str, Any]:
    """Return the fields of a `StagesReport` that describe the ingest and the training."""
    return {
        "run": job.config.name,
        "rows_in": ingested.rows_in,
        "duplicates": ingested.duplicates,
        "quarantined": ingested.quarantined,
        "run_id": trained.run_id,
        "run_folder": trained.run_folder,
        "trained": trained.trained,
        "model_name": trained.model_name,
        "model_version": trained.model_version,
    }

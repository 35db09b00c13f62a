"""`lakesight lineage`: where the captions of a picture come from, without starting Spark."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any

import typer

from jobs.common import Job, JsonOption, PlatformOption, RunOption, SetOption, open_job
from jobs.show import open_table
from pipelines.errors import UserError
from vlm.config import Config

GONE = "unknown: the version is not in the registry any more"


class CaptionLineage(Config):
    """Where one caption comes from.

    Attributes:
        caption: null where there is an error.
        source_table: table of the picture, and `source_version` of it.
        trained_on: version of `samples` that the model learned from.
        manifest_hash: of the shards that it learned from: equal hashes mean equal training data.
        code_version: of Lakesight, in training.
        settings: how it was decoded, JSON.
    """

    caption: str | None
    error: str | None
    prompt: str
    model_name: str
    model_version: str
    run_id: str
    source_table: str
    source_version: int
    trained_on: str
    manifest_hash: str
    code_version: str
    settings: str
    captioned_at: datetime


def lineage(
    image_id: Annotated[str, typer.Argument(help="Picture, as table generated_captions names it.")],
    *,
    run: RunOption = "demo",
    platform: PlatformOption = "local",
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say where the captions of a picture come from.

    For each caption: model version, run, data version, code version and settings. Captions of all runs are told.

    \b
    Example:
      lakesight lineage demo/scene7
    """
    with open_job(run, platform, overrides, as_json) as job:
        found = run_lineage(job, image_id)
        for number, item in enumerate(found, 1):
            job.screen.text(f"\ncaption {number}")
            for name, value in item.model_dump().items():
                if value is not None:
                    job.screen.line(f"  {name:<16}", str(value))
        job.screen.report({"image_id": image_id, "captions": found})


def run_lineage(job: Job, image_id: str) -> list[CaptionLineage]:
    """Every caption of a picture, the newest last.

    Raises:
        UserError: the picture has no caption, or tables here are no files.
    """
    import pyarrow.compute as pc

    from pipelines.formats.tables import arrow_dataset

    table = arrow_dataset(open_table(job, "generated_captions", None))
    rows = table.to_table(filter=pc.field("image_id") == image_id).sort_by("captioned_at").to_pylist()
    if not rows:
        raise UserError(
            "this picture has no caption",
            where="table generated_captions",
            got=image_id,
            fix="`lakesight show generated_captions` shows ids; `lakesight caption` captions what has none",
        )
    versions = {(row["model_name"], row["model_version"]) for row in rows}
    tags = {version: _tags(job, *version) for version in versions}
    return [_lineage(row, tags[row["model_name"], row["model_version"]]) for row in rows]


def _lineage(row: Mapping[str, Any], tags: Mapping[str, str]) -> CaptionLineage:
    return CaptionLineage(
        **{name: row[name] for name in CaptionLineage.model_fields if name in row},
        trained_on=tags.get("table_version", GONE),
        manifest_hash=tags.get("manifest_hash", GONE),
        code_version=tags.get("code_version", GONE),
    )


def _tags(job: Job, name: str, number: str) -> dict[str, str]:
    """What a version says of itself; nothing where the registry has lost it."""
    from pipelines.tracking.registry import resolve

    try:
        return resolve(job.platform, name, number).tags
    except UserError:
        return {}

"""`lakesight lineage`: print the model, data and code that produced a picture's captions. The command
needs no Spark.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from contextlib import suppress
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.common import Job, JsonOption, PlatformOption, RunOption, SetOption, open_job
from jobs.table_files import open_table
from jobs.train import register_finished_runs
from pipelines.errors import LakesightError, UserError
from vlm.config import Config

if TYPE_CHECKING:
    from pipelines.tracking.registry import ModelVersion

logger = logging.getLogger(__name__)

VersionName = tuple[str, str, str]
"""Name of a registered model, number of the version, and id of the MLflow run that has registered the version."""
ABSENT = "unknown: the registry in use does not have the model version"
UNREAD = "unknown: the registry in use could not be read"


class CaptionLineage(Config):
    """Model, data and code that produced one caption.

    Attributes:
        caption: generated caption; null if the picture has an error instead.
        aliases: aliases that the model version has now, for example champion. The list is empty if the registry in use
            does not have the model version or could not be read. The texts in `trained_on`, `manifest_hash` and
            `code_version` then give the reason.
        model_digest: digest of the model's files; null in rows of Lakesight 0.1.0.
        source_table: table that contains the picture.
        id_column: column of `source_table` that contains the picture's id; null in rows of Lakesight 0.1.0.
        image_column: column of `source_table` that contains the picture; null in rows of Lakesight 0.1.0.
        sha256: SHA-256 of the captioned picture; null if the row of `source_table` has no picture.
        source_version: version of `source_table` when the picture was captioned.
        trained_on: version of table `samples` that the model was trained on.
        manifest_hash: hash of the training shards; equal hashes mean equal training data.
        code_version: version of Lakesight that trained the model.
        code_digest: hash of the source files that trained the model; null if Lakesight 0.1.0 trained the model.
        code_commit: git commit of the source files; null if the source files were not in a git checkout.
        settings: decoding settings, in JSON.
    """

    caption: str | None
    error: str | None
    prompt: str
    model_name: str
    model_version: str
    aliases: list[str]
    model_digest: str | None
    run_id: str
    source_table: str
    id_column: str | None
    image_column: str | None
    sha256: str | None
    source_version: int
    trained_on: str
    manifest_hash: str
    code_version: str
    code_digest: str | None
    code_commit: str | None
    settings: str
    captioned_at: datetime


def lineage(
    image_id: Annotated[
        str, typer.Argument(help="Id of the picture: its image_id in table generated_captions.", metavar="IMAGE_ID")
    ],
    *,
    run: RunOption = "demo",
    platform: PlatformOption = "local",
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show how a picture's captions were made.

    For each caption of the picture, the command prints model version, training run, data version, code version and
    decoding settings. The list contains the captions by the models of all runs.

    \b
    Example:
      lakesight lineage demo/0123456789abcdef01234567
    """
    with open_job(run, platform, overrides, as_json, needs_space=False) as job:
        found = run_lineage(job, image_id)
        for number, item in enumerate(found, 1):
            job.output.text(f"\ncaption {number}")
            for name, value in item.model_dump().items():
                if value not in (None, []):
                    job.output.line(f"  {name:<16}", ", ".join(value) if isinstance(value, list) else str(value))
        job.output.report({"image_id": image_id, "captions": found})


def run_lineage(job: Job, image_id: str) -> list[CaptionLineage]:
    """Return the lineage of every caption of a picture, newest last.

    Raises:
        UserError: the picture has no caption, or the platform's tables are not readable as files.
    """
    from pipelines.formats.delta_files import query_rows, quoted_text
    from pipelines.tracking.outage import TrackingDown

    with suppress(TrackingDown):  # the lineage is read from tables, so the server may be down
        register_finished_runs(job)
    table = open_table(job, "generated_captions", None)
    rows = query_rows(table, "*", f"image_id = {quoted_text(image_id)}", "ORDER BY captioned_at")
    if not rows:
        raise UserError(
            "this picture has no caption",
            where="table generated_captions",
            got=image_id,
            fix="list ids with `lakesight show generated_captions`, or caption new pictures with `lakesight caption`",
        )
    names = {(row["model_name"], row["model_version"], row["run_id"]) for row in rows}
    versions = _find_versions(job, names)
    return [_lineage(row, versions[row["model_name"], row["model_version"], row["run_id"]]) for row in rows]


def _lineage(row: Mapping[str, Any], version: ModelVersion | str) -> CaptionLineage:
    """Return the lineage of a row of table `generated_captions`, given the row's model version or the reason why the
    version is unknown."""
    unknown, tags, aliases = (version, {}, ()) if isinstance(version, str) else (ABSENT, version.tags, version.aliases)
    return CaptionLineage(
        **dict.fromkeys(("model_digest", "id_column", "image_column"))
        | {name: row[name] for name in CaptionLineage.model_fields if name in row},
        aliases=sorted(aliases),
        trained_on=tags.get("table_version", unknown),
        manifest_hash=tags.get("manifest_hash", unknown),
        code_version=tags.get("code_version", unknown),
        code_digest=tags.get("code_digest"),
        code_commit=tags.get("code_commit"),
    )


def _find_versions(job: Job, names: Collection[VersionName]) -> dict[VersionName, ModelVersion | str]:
    """For each version that wrote a caption, return the version from the registry, or the reason why it is unknown.

    The registry may have a different model under the same name and number. Only a version with the same MLflow run id
    is the version that wrote the caption. After a failed request, this function logs a warning and sends no more
    requests, because each request to a server that is down takes seconds.
    """
    from pipelines.tracking.registry import VersionNotFound, resolve

    found: dict[VersionName, ModelVersion | str] = dict.fromkeys(names, UNREAD)
    for name in names:
        model, number, run_id = name
        try:
            version = resolve(job.platform, model, number)
            found[name] = version if version.run_id == run_id else ABSENT
        except VersionNotFound:
            found[name] = ABSENT
        except LakesightError as error:
            logger.warning("the model versions cannot be read from the registry: %s", error)
            break
    return found

"""`lakesight shard`: write a pinned version of table `samples` or `texts` as training shards."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jobs.common import Job, JsonOption, PlatformOption, RunOption, SetOption, open_job
from jobs.progress import show_elapsed

if TYPE_CHECKING:
    from pipelines.config import Split
    from pipelines.driver.shard.run import ShardReport
    from vlm.config import ImageConfig


def shard(
    *,
    run: RunOption = "demo",
    platform: PlatformOption = "local",
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write training shards from table samples.

    Existing shards with the same content and settings are reused.

    \b
    Example:
      lakesight shard --run demo --set data.shards.encoding=jpeg
    """
    with open_job(run, platform, overrides, as_json) as job:
        data = job.config.data
        splits = dict.fromkeys(("train", data.validate_on, data.evaluate_on))
        job.finish({split: run_shard(job, split, job.config.model.image) for split in splits}, "train")


def run_shard(job: Job, split: Split, image: ImageConfig) -> ShardReport:
    """Run the shard stage for one data split, or reuse existing shards, and return the report.

    The pictures are resized for a model with the given image config. The shards of a source of kind `text` have no
    pictures.
    """
    from pipelines.driver.shard.run import find_finished, shard, shard_texts

    data = job.config.data
    is_text = data.source.kind == "text"
    report = find_finished(job.platform, job.source, data, None if is_text else image, split)
    if report is None:
        with show_elapsed(f"shard {split}"):
            if is_text:
                report = shard_texts(job.spark, job.platform, job.source, data, split)
            else:
                report = shard(job.spark, job.platform, job.source, data, image, split)
    if report.folder not in job.shown:
        job.shown.add(report.folder)
        outcome = "reused" if report.reused else "written"
        job.output.line("shard", f"{report.num_rows:,} {split} rows of version {report.dataset_version}, {outcome}")
    return report

"""Test of the promotion gate with trained models, Spark, a registry on SQLite, fresh processes and caption jobs."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import cast

import mlflow
import pytest
from browser import open_page
from mlflow import MlflowClient
from pictures import encoded
from PIL import Image, ImageOps
from pyspark.sql import SparkSession
from trained_models import corner_rows, corner_run, register, train

import vlm
from jobs.caption import TooMuchDrift, check_drift, run_caption
from jobs.common import Job
from jobs.compare import run_compare
from jobs.decisions import run_decisions
from jobs.evaluate import evaluate_version, open_model, open_split
from jobs.lineage import run_lineage
from jobs.output import CommandOutput
from jobs.promote import run_promote
from jobs.rollback import run_rollback
from jobs.shard import run_shard
from pipelines.config import DriftConfig
from pipelines.driver.caption.run import CaptionReport, CaptionRequest, caption
from pipelines.driver.delta.settings import spark_settings
from pipelines.driver.delta.spark_errors import translate_spark_errors
from pipelines.driver.delta.versions import commit_note, source_note
from pipelines.driver.evaluate.compare import Comparison
from pipelines.driver.evaluate.decisions import record_decision
from pipelines.errors import StageFailed, UserError
from pipelines.formats.shards import Shards
from pipelines.formats.tables import SAMPLES
from pipelines.platform import Platform
from pipelines.tracking import registry

NAME = "gatekept"
GOOD, BETTER, WORSE, BLIND = "1", "2", "3", "4"


@pytest.fixture(scope="module")
def job(spark: SparkSession, platform: Platform, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Register four model versions.

    Version GOOD is a good model. Version BETTER is the model of version GOOD after more training steps. Version WORSE
    was trained on wrong colour names. Version BLIND was trained with shuffled pictures.
    """
    config = corner_run(NAME).model_copy(update={"drift": DriftConfig(min_rows=10)})
    job = Job(config, platform, (), CommandOutput(io.StringIO(), as_json=False))
    job.__dict__["spark"] = spark  # the job uses the Spark session of the tests
    rows = corner_rows(NAME, "train", 200) + corner_rows(NAME, "test", 60)
    new = spark.createDataFrame(rows, SAMPLES.ddl())
    new.coalesce(1).writeTo(platform.table(SAMPLES.name)).append()
    shards = Shards.open(Path(run_shard(job, "train", config.model.image).folder))
    folder = tmp_path_factory.mktemp("runs")
    trained = {
        "seeing": train(config, shards, (300, 320)),
        "misled": train(config, shards, (300,), misnamed="red"),
        "blind": train(config, shards, (150,), blind=True),
    }
    versions = [
        register(platform, folder / f"{name}-{number}", config, shards, model).version
        for name, models in trained.items()
        for number, model in enumerate(models)
    ]
    assert versions == [GOOD, BETTER, WORSE, BLIND]
    remove_files_of_older_versions(job)
    return job


def remove_files_of_older_versions(job: Job) -> None:
    """Add a row of another source to `samples`, compact the table, and remove the files of all older versions."""
    table, other = job.platform.table(SAMPLES.name), f"{NAME}-other"
    new = job.spark.createDataFrame(corner_rows(other, "train", 1), SAMPLES.ddl())
    with commit_note(job.spark, source_note(other)):
        new.coalesce(1).writeTo(table).append()
    assert job.spark.sql(f"OPTIMIZE {table}").collect()[0]["metrics"]["numFilesRemoved"]
    with spark_settings(job.spark, {"spark.databricks.delta.retentionDurationCheck.enabled": "false"}):
        job.spark.sql(f"VACUUM {table} RETAIN 0 HOURS").collect()


def alias(job: Job, name: str) -> str:
    return registry.resolve(job.platform, NAME, name).version


@pytest.mark.matrix
def test_the_error_for_a_table_version_whose_files_a_vacuum_has_removed_names_the_vacuum(job: Job) -> None:
    request = open_split(job, open_model(job, GOOD)).manifest.request
    pinned = job.spark.read.option("versionAsOf", request.table_version).table(request.table)
    with pytest.raises(StageFailed, match="VACUUM has removed files"), translate_spark_errors("reading", where="it"):
        pinned.where(pinned.source == NAME).agg({"image": "max"}).collect()


@pytest.mark.timeout(900)
def test_model_versions_that_ignore_pictures_or_are_worse_are_refused_and_a_rollback_restores_the_champion(
    job: Job,
) -> None:
    run_promote(job, GOOD)
    assert alias(job, "champion") == GOOD

    with pytest.raises(StageFailed) as refused:
        run_promote(job, BLIND)
    said = str(refused.value)
    assert "for 4 reasons" in said
    for reason in (
        "it does not use its pictures: a blind gap of",
        "no better than the best caption that ignores the picture",
        "no better than the nearest neighbour's caption",
        "worse than the champion: word_f1 -",
    ):
        assert reason in said
    tags = registry.resolve(job.platform, NAME, BLIND).tags
    assert tags["gate"] == "refused"
    assert tags["gate_loads"] == "ok: it loads in a fresh process"
    assert tags["gate_looks"].startswith("refused: it does not use its pictures")
    assert {key for key in tags if key.startswith("gate_")} == {
        f"gate_{name}" for name in ("loads", "errors", "looks", "varied", "constant", "neighbour", "champion")
    }

    assert "on the same 60 rows" in said
    assert (alias(job, "champion"), alias(job, "challenger")) == (GOOD, BLIND)

    run_promote(job, BETTER)
    assert (alias(job, "champion"), alias(job, "previous")) == (BETTER, GOOD)
    condition = f"source = '{NAME}' AND image_id < '{NAME}/test2'"
    assert run_caption(job, "champion", where=condition).model_version == BETTER
    assert run_rollback(job) == GOOD
    assert run_promote(job, BETTER).rolled_back, "a repeated promotion does not undo a rollback"
    assert (alias(job, "champion"), alias(job, "previous")) == (GOOD, BETTER)
    captioned = run_caption(job, "champion", where=condition)
    assert (captioned.model_version, captioned.captioned) == (GOOD, captioned.considered)
    assert set(captioned.drift) == {"words", "mean_logprob", "error_share", "brightness", "contrast"}
    assert not any(drift.beyond for drift in captioned.drift.values())

    table = job.spark.table(job.platform.table("decisions"))
    trail = table.where(table.model_name == NAME).orderBy("decided_at").collect()
    assert [(row["action"], row["model_version"], row["champion"]) for row in trail] == [
        ("promote", GOOD, None),
        ("refuse", BLIND, GOOD),
        ("promote", BETTER, GOOD),
        ("rollback", GOOD, BETTER),
    ]
    assert [bool(row["reasons"]) for row in trail] == [False, True, False, False]
    assert json.loads(trail[1]["figures"])["over_champion"]["high"] < 0
    assert all(row["decided_by"] for row in trail)


def test_a_caption_job_logs_drift_of_its_pictures_and_fails_if_the_config_asks_for_failure(
    job: Job, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    evaluate_version(job, good := open_model(job, GOOD), open_split(job, good))
    rows = [
        (f"night/{row[0]}", ImageOps.invert(Image.open(io.BytesIO(row[2])))) for row in corner_rows(NAME, "test", 12)
    ]
    night = [(name, encoded(picture.point(lambda level: level // 8))) for name, picture in rows]
    source = job.spark.createDataFrame([*night, ("bad", b"no picture")], "image_id STRING, image BINARY")
    source.write.format("delta").save(str(tmp_path / "night"))
    with caplog.at_level("WARNING"):
        dark = run_caption(job, GOOD, source_table=f"delta.`{tmp_path}/night`")
    beyond = {name for name, drift in dark.drift.items() if drift.beyond}
    assert {"brightness", "contrast", "error_share"} <= beyond
    [said] = [record.getMessage() for record in caplog.records if "(drift)" in record.getMessage()]
    assert f"brightness {dark.figures['brightness']:.3g}, evaluated 1" in said
    [run] = mlflow.search_runs(
        experiment_names=["lakesight/caption"],
        filter_string=f"tags.`lakesight.source_table` = 'delta.`{tmp_path}/night`'",
        output_format="list",
    )
    client = MlflowClient(job.platform.tracking_uri)
    files = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert {"drift.json", "caption.json"} < files
    [page] = [name for name in files if name.endswith(".html")]
    mlflow.set_tracking_uri(job.platform.tracking_uri)
    text = Path(mlflow.artifacts.download_artifacts(run_id=run.info.run_id, artifact_path=page)).read_text()
    assert text.count("<figure") == 13
    drift = mlflow.artifacts.load_dict(f"runs:/{run.info.run_id}/drift.json")
    changes = {row[0]: row[drift["columns"].index("change")] for row in drift["data"]}
    assert changes["error_share"] == pytest.approx(1 / 13)
    assert not [name for name in run.data.metrics if name.startswith("drift/")]
    assert run.data.params["source_table"] == f"delta.`{tmp_path}/night`"
    [used] = run.inputs.dataset_inputs if run.inputs else []
    assert json.loads(used.dataset.source)["delta_table_version"] == 0
    columns = json.loads(str(used.dataset.schema))["mlflow_colspec"]
    assert [column["name"] for column in columns] == ["image_id", "image"]
    assert run.data.metrics["figures/words"] == dark.figures["words"]
    assert "brightness" in run.data.tags["lakesight.drifted"]
    strict = job.config.drift.model_copy(update={"fail": True})
    failing = Job(job.config.model_copy(update={"drift": strict}), job.platform, (), job.output)
    failing.__dict__["spark"] = job.spark
    with pytest.raises(StageFailed, match=r"differ too much from the version's evaluation.*brightness .*evaluated"):
        run_caption(failing, GOOD, prompt="what", source_table=f"delta.`{tmp_path}/night`")
    with pytest.raises(TooMuchDrift, match=r"brightness .*captioned by an earlier job that failed") as repeated:
        run_caption(failing, GOOD, prompt="what", source_table=f"delta.`{tmp_path}/night`")
    report = cast(CaptionReport, repeated.value.report)
    assert (report.captioned, report.drift["brightness"].beyond) == (0, True)
    assert run_caption(job, GOOD, prompt="what", source_table=f"delta.`{tmp_path}/night`").drift["brightness"].beyond
    accepted = run_caption(failing, GOOD, prompt="what", source_table=f"delta.`{tmp_path}/night`")
    assert (accepted.drift, accepted.drift_unchecked) == ({}, "")


@pytest.mark.matrix
def test_a_caption_job_says_why_its_drift_was_not_checked(job: Job, tmp_path: Path) -> None:
    rows = [(row[0], row[2]) for row in corner_rows(NAME, "test", 12)]
    for name, count in (("few", 3), ("many", 12)):
        source = job.spark.createDataFrame(rows[:count], "image_id STRING, image BINARY")
        source.write.format("delta").save(str(tmp_path / name))
    model, limit = open_model(job, GOOD), job.config.drift.min_rows
    data = job.config.data.model_copy(update={"evaluate_on": "val"})
    unevaluated = Job(job.config.model_copy(update={"data": data}), job.platform, (), job.output)
    unevaluated.__dict__["spark"] = job.spark

    def unchecked(name: str) -> str:
        request = CaptionRequest(source_table=f"delta.`{tmp_path}/{name}`")
        done = caption(job.spark, job.platform, model, request)
        return check_drift(unevaluated, done, model, request).drift_unchecked

    assert unchecked("few") == f"3 rows, and drift.min_rows is {limit}"
    assert unchecked("many").startswith(f"table evaluations has no evaluation of version {GOOD} on split val")
    assert unchecked("many") == "", "nothing was captioned"


@pytest.fixture(scope="module")
def report(job: Job) -> Comparison:
    """Compare version GOOD with version WORSE, which was trained on wrong colour names."""
    return run_compare(job, GOOD, WORSE)


def test_two_model_versions_are_compared_on_the_same_rows_and_no_model_version_is_evaluated_twice(
    job: Job, report: Comparison
) -> None:
    assert report.wins + report.losses + report.ties == report.rows == 60
    assert report.wins > report.losses
    assert report.differences["word_f1"].low > 0
    models = [open_model(job, number) for number in (GOOD, WORSE)]
    good, worse = (evaluate_version(job, model, open_split(job, model)) for model in models)
    assert good.reused
    for name in ("word_f1", "loss", "blind_gap", "bleu_2"):
        apart = good.metrics[name].value - worse.metrics[name].value
        assert report.differences[name].value == pytest.approx(apart)
    page = report.page.read_text(encoding="utf-8")
    assert page.count("Version 3") == page.count("Version 1") == page.count("<figure")
    assert f'data-groups="{GOOD}-better"' in page
    logged = MlflowClient(job.platform.tracking_uri).get_run(good.run_id).data.metrics
    assert logged["test_word_f1"] == good.metrics["word_f1"].value
    assert len([name for name in logged if "/" not in name]) <= 8


def test_the_evaluation_page_and_the_comparison_page_open_in_a_browser_without_errors(
    job: Job, report: Comparison, tmp_path: Path
) -> None:
    worse = open_model(job, WORSE)
    gallery = evaluate_version(job, worse, open_split(job, worse)).gallery
    with open_page(gallery.as_uri()) as page:
        assert page.locator("figure").count() == 48
        assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
        page.get_by_text("By slice").click()
        assert page.get_by_role("row", name="format=GIF").is_visible()
        page.screenshot(path=tmp_path / "gallery.png", full_page=True)
        page.get_by_label("Show").select_option("worst")
        page.get_by_label("Find").fill("red corner")  # version WORSE calls red corners white
        assert page.locator("figure:visible").count() == 15
        assert page.locator("figure:visible .mark").all_inner_texts() == ["DIFFERENT"] * 15
        assert page.locator("#shown").inner_text() == "15 of 48"
    with open_page(report.page.as_uri()) as page:
        assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
        page.screenshot(path=tmp_path / "compare.png", full_page=True)
        page.get_by_label("Show").select_option(f"{GOOD}-better")
        shown = page.locator("figure:visible")
        assert shown.count() == min(16, report.wins)
        first = shown.first.locator("p").all_inner_texts()
        assert [text.splitlines()[-1] for text in first] == ["a red corner", "a red corner", "a white corner"]
        page.get_by_text("All figures").click()
        gained = page.locator(".metric", has_text="exact match").locator("dd")
        assert gained.inner_text().startswith(f"+{report.differences['exact_match'].value:.3f}")


def test_the_lineage_and_the_decisions_of_a_model_are_shown_without_starting_a_jvm(job: Job) -> None:
    run_caption(job, GOOD, where=f"image_id = '{NAME}/test0'")
    version = registry.resolve(job.platform, NAME, GOOD)
    shell = Job(job.config, job.platform, (), job.output)
    samples = job.platform.table(SAMPLES.name)  # another test of this session captions a copy of the table
    (found,) = (
        item
        for item in run_lineage(shell, f"{NAME}/test0")
        if (item.model_version, item.source_table) == (GOOD, samples)
    )
    assert (found.run_id, found.code_version) == (version.run_id, version.tags["code_version"])
    assert (found.trained_on, found.manifest_hash) == (version.tags["table_version"], version.tags["manifest_hash"])
    assert found.aliases == list(version.aliases)
    assert (found.id_column, found.image_column) == ("image_id", "image")
    picture = job.spark.table(samples).where(f"image_id = '{NAME}/test0'").first()
    assert picture is not None
    assert found.sha256 == picture["sha256"]
    assert "max_new_tokens" in found.settings
    with pytest.raises(UserError, match="has no caption"):
        run_lineage(shell, "nobody/0")
    record_decision(
        lambda: job.spark,
        job.platform,
        model="other",
        version="7",
        digest="d",
        action="refuse",
        champion=None,
        reasons=["why not"],
    )
    other = Job(corner_run("other"), job.platform, (), job.output)
    (told,) = run_decisions(other)
    assert (told["action"], told["model_version"], told["reasons"]) == ("refuse", "7", ["why not"])
    assert told["model_digest"] == "d"
    assert not {"spark"} & {*shell.__dict__, *other.__dict__}


def test_the_attention_of_a_colour_word_is_highest_in_the_corner_that_has_this_colour(job: Job) -> None:
    """A picture has four corners, so random attention would be highest in the named corner in a quarter of the
    pictures.
    """
    captioner = vlm.load(open_model(job, GOOD).folder)
    first = [
        captioner.attention(row[SAMPLES.names.index("image")]).words()[1][1].flatten().argmax() == 0
        for row in corner_rows(NAME, "test", 60)
    ]
    assert sum(map(bool, first)) > 30

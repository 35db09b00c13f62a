"""Tests of evaluation on executors: the metrics equal the metrics of a plain loop, and are written only once."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from pyspark.sql import SparkSession
from spark_session import executed_queries
from tiny_runs import tiny_model_config, write_shards

from pipelines.driver.caption.drift import EvaluationFigures, read_evaluation_figures
from pipelines.driver.delta.model_rows import is_of_model
from pipelines.driver.evaluate.run import REPORT, EvaluationReport, evaluate
from pipelines.driver.evaluate.scores import ATTENTION, ATTENTION_ROWS, SCORES
from pipelines.driver.model_files import ModelFiles
from pipelines.errors import UserError
from pipelines.formats.run_folder import write_json
from pipelines.formats.shards import Shards, write_manifest
from pipelines.formats.tables import EVALUATIONS
from pipelines.platform import Platform
from pipelines.worker.attention import MAX_WORDS
from pipelines.worker.caption import load_captioner
from pipelines.worker.data.batches import Collator
from vlm import text
from vlm.checkpoint import save_model
from vlm.factory import build_model
from vlm.generation.generate import Completion
from vlm.text.words import TOKENISATION
from vlm.training.objective import row_scores

ROWS = 70


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    """Save a model with random weights and a scaled output layer, so that the blind gap is not zero."""
    folder = tmp_path_factory.mktemp("model")
    config = tiny_model_config()
    torch.manual_seed(5)
    tokenizer = text.learn(config.text, [])
    network = build_model(config, tokenizer.vocab_size)
    with torch.no_grad():
        network.decoder.head.weight.mul_(40)
    save_model(folder, network, tokenizer)
    return ModelFiles(folder=folder, name="evaluated", version="1", run_id="r")


def dataset(spark: SparkSession, folder: Path, rows: int) -> Path:
    """Write a Delta table, and a shard folder with the same pictures. The manifest of the folder contains the table's
    name."""
    shards = write_shards(folder / "shards", rows=rows, texts=1)
    pictures = []
    for index in range(rows):
        row = shards.row(index)
        Image.fromarray(row.pixels).save(folder / "picture.png")
        content, form = (folder / "picture.png").read_bytes(), "PNG" if index % 3 else "GIF"
        pictures.append((row.image_id, folder.parent.name, content, form, 16, index))
    schema = "image_id STRING, source STRING, image BINARY, format STRING, width INT, height INT"
    spark.createDataFrame(pictures, schema).write.format("delta").save(str(folder / "samples"))
    request = shards.manifest.request.model_copy(
        update={"table": f"delta.`{folder}/samples`", "source": folder.parent.name, "split": "test"}
    )
    write_manifest(shards.folder, shards.manifest.model_copy(update={"request": request}))
    return shards.folder


@pytest.fixture(scope="module")
def shards(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dataset(spark, tmp_path_factory.mktemp("seventy") / "set", ROWS)


@pytest.fixture(scope="module")
def report(spark: SparkSession, platform: Platform, model: ModelFiles, shards: Path) -> EvaluationReport:
    return evaluate(spark, platform, model, shards, shards)


def stored(spark: SparkSession, platform: Platform, report: EvaluationReport) -> dict[tuple[str | None, str], float]:
    table = spark.table(platform.table(EVALUATIONS.name))
    rows = table.where((table.model_name == report.model_name) & (table.source == report.source)).collect()
    assert len({(row["slice"], row["metric"]) for row in rows}) == len(rows)
    return {(row["slice"], row["metric"]): row["value"] for row in rows}


def test_metrics_computed_on_executors_equal_metrics_computed_in_a_plain_loop_over_the_rows(
    report: EvaluationReport, model: ModelFiles, shards: Path
) -> None:
    captioner = load_captioner(str(model.folder))
    collator = Collator(captioner.tokenizer, captioner.model.config)
    opened = Shards.open(shards)
    sums = dict.fromkeys(("right", "wrong", "grey", "tokens", "correct", "exact"), 0.0)
    for index in range(ROWS):
        row, other = opened.row(index), opened.row((index + ROWS // 2) % ROWS)
        grey = row._replace(pixels=np.full_like(row.pixels, 128))
        for name, picture in {"right": row, "wrong": other, "grey": grey}.items():
            loss, count, correct = row_scores(captioner.model, collator.collate([picture], [row.texts[0]]))
            sums[name] += loss.item()
        sums["tokens"] += int(count)
        _, _, correct = row_scores(captioner.model, collator.collate([row], [row.texts[0]]))
        sums["correct"] += int(correct)
        (answer,) = captioner.complete([row.pixels], [""], captioner.model.config.generation)
        assert isinstance(answer, Completion)
        sums["exact"] += answer.text == row.texts[0][1]
    values = report.values()
    assert values["loss"] == pytest.approx(sums["right"] / sums["tokens"], rel=1e-4)
    for name, shown in {"blind_gap": "wrong", "blank_gap": "grey"}.items():
        gap = (sums[shown] - sums["right"]) / sums["tokens"]
        assert values[name] == pytest.approx(gap, rel=1e-3, abs=1e-5)
        assert gap != 0
    assert values["noise_gap"] not in (0, values["blank_gap"])
    assert values["token_accuracy"] == pytest.approx(sums["correct"] / sums["tokens"])
    assert values["exact_match"] == sums["exact"] / ROWS
    assert values["captions_per_second"] > 0 == values["error_share"]
    assert (report.pictures, report.left_out) == (ROWS, 0)


def test_the_neighbour_of_a_picture_is_the_most_similar_training_picture(
    report: EvaluationReport, shards: Path
) -> None:
    """Use the evaluated split as training split, so that each neighbour is a different picture of the same colour."""
    assert report.values()["neighbour_exact_match"] == 1
    assert report.values()["constant_exact_match"] == pytest.approx(18 / ROWS)
    assert [row.neighbour for row in report.scores()[:4]] == ["red", "green", "blue", "white"]


def test_a_repeated_evaluation_neither_computes_nor_writes_the_metrics_again(
    spark: SparkSession, platform: Platform, model: ModelFiles, shards: Path, report: EvaluationReport
) -> None:
    whole = {(None, name): value for name, value in report.values().items()}
    parts = {(part, name): m.value for part, metrics in report.slices.items() for name, m in metrics.items()}
    assert {part.partition("=")[0] for part in report.slices} == {"format", "size"}
    assert set(report.slices) >= {"format=PNG", "format=GIF"}
    assert stored(spark, platform, report) == whole | parts
    rows = spark.table(platform.table(EVALUATIONS.name)).where(f"model_name = '{model.name}' AND slice = 'format=GIF'")
    assert {row["n"] for row in rows.collect()} == {24}, "every third of 70 pictures"
    seen = executed_queries(spark)
    again = evaluate(spark, platform, model, shards, shards)
    assert (again.metrics, again.slices, again.reused) == (report.metrics, report.slices, True)
    assert executed_queries(spark) == seen, "a second evaluation runs no query"
    report.gallery_png.unlink()
    evaluate(spark, platform, model, shards, shards)
    assert report.gallery_png.exists(), "a missing page is written again"
    scores, attention = ((report.folder / name).stat().st_mtime_ns for name in (SCORES, ATTENTION))
    further = evaluate(spark, platform, model, shards, shards, columns=["height"])
    assert {part.partition("=")[0] for part in further.slices} == {"format", "size", "height"}
    assert further.metrics == report.metrics
    assert (report.folder / "scores.parquet").stat().st_mtime_ns == scores, "another slice does not run the model"
    assert (report.folder / ATTENTION).stat().st_mtime_ns == attention, "another slice does not draw the attention"
    assert stored(spark, platform, report).items() > (whole | parts).items()
    with pytest.raises(UserError, match=r"Got: colour\. Fix: choose from these columns with --by: image_id"):
        evaluate(spark, platform, model, shards, shards, columns=["colour"])


@pytest.mark.matrix
def test_metrics_are_recomputed_from_stored_scores_if_the_rules_that_split_texts_into_words_have_changed(
    spark: SparkSession, platform: Platform, model: ModelFiles, shards: Path, report: EvaluationReport
) -> None:
    def figures() -> set[str]:
        found = read_evaluation_figures(
            spark,
            platform,
            model=model.name,
            version=model.version,
            of_model=is_of_model(model.digest, model.run_id),
            source=report.source,
            split=report.split,
            where="",
        )
        return set(found.figures)

    all_figures = figures()
    assert "words" in all_figures
    name = platform.table(EVALUATIONS.name)
    spark.sql(f"UPDATE {name} SET tokenisation = NULL WHERE model_name = '{model.name}'")
    write_json(report.folder / REPORT, report.model_copy(update={"tokenisation": ""}))
    assert figures() == all_figures - {"words", "distinct_words"}
    scores = (report.folder / SCORES).stat().st_mtime_ns
    again = evaluate(spark, platform, model, shards, shards)
    assert (again.reused, again.tokenisation, again.metrics) == (False, TOKENISATION, report.metrics)
    assert (report.folder / SCORES).stat().st_mtime_ns == scores
    assert figures() == all_figures
    rows = spark.table(name).where(f"model_name = '{model.name}'").collect()
    assert {row["metric"]: row["tokenisation"] for row in rows}.items() >= {
        "word_f1": TOKENISATION,
        "loss": None,
    }.items()


def test_the_gallery_shows_the_worst_pictures_the_best_pictures_and_a_sample_of_all_other_pictures(
    report: EvaluationReport,
) -> None:
    page = report.gallery.read_text(encoding="utf-8")
    assert page.count('<div class="frame"><img') == 48
    for group in ("worst", "best", "sample"):
        assert len(re.findall(f'data-groups="{group}["|]', page)) == 16, "the other groups are slices"
    assert "blind gap" in page
    assert "nearest neighbour" in page
    for picture in (report.gallery_png, report.figures_png):
        with Image.open(picture) as image:
            assert np.asarray(image.convert("L")).std() > 5


def test_the_worst_rows_of_the_gallery_show_where_the_model_looked_at_each_word(report: EvaluationReport) -> None:
    page = report.gallery.read_text(encoding="utf-8")
    figures = page.split("<figure ")[1:]
    shown = [number for number, figure in enumerate(figures) if 'class="attention"' in figure]
    assert shown
    assert set(shown) <= set(range(ATTENTION_ROWS)), "the worst rows come first"
    captions = {(row.row, row.prompt): row.caption or "" for row in report.scores()}
    drawn = pq.read_table(report.folder / ATTENTION).to_pylist()
    assert len(drawn) == ATTENTION_ROWS
    for item in drawn:
        words = captions[item["row"], item["prompt"]].split()[:MAX_WORDS]
        assert [title.rpartition(" ")[0] for title in item["titles"]] == words
    assert page.count("<small>") >= sum(len(item["titles"]) for item in drawn) > 0


@pytest.mark.matrix
def test_a_split_of_one_picture_has_no_blind_gap(
    spark: SparkSession, platform: Platform, model: ModelFiles, tmp_path: Path
) -> None:
    folder = dataset(spark, tmp_path / "set", 1)
    report = evaluate(spark, platform, model, folder, folder, columns=())
    assert "blind_gap" not in report.metrics
    assert not any(name.startswith("neighbour") for name in report.metrics)
    assert report.values()["loss"] > 0


def test_evaluating_an_empty_split_raises_a_user_error(
    spark: SparkSession, platform: Platform, model: ModelFiles, tmp_path: Path
) -> None:
    shards = write_shards(tmp_path / "none", rows=0)
    with pytest.raises(UserError, match="the split to evaluate on is empty"):
        evaluate(spark, platform, model, shards.folder, shards.folder)


def test_evaluating_a_folder_without_a_model_raises_a_user_error(
    spark: SparkSession, platform: Platform, model: ModelFiles, shards: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="config cannot be read"):
        evaluate(spark, platform, model.model_copy(update={"folder": tmp_path}), shards, shards)


def test_an_evaluation_with_other_generation_settings_has_a_separate_report_and_does_not_change_the_table(
    spark: SparkSession, platform: Platform, model: ModelFiles, shards: Path, report: EvaluationReport
) -> None:
    before = stored(spark, platform, report)
    settings = model.read_config().generation.changed({"max_new_tokens": 1})
    changed = model.model_copy(update={"settings": settings})
    shorter = evaluate(spark, platform, changed, shards, shards)
    assert (shorter.settings, report.settings) == (settings, None)
    assert max(row.num_tokens for row in shorter.scores()) == 1 < max(row.num_tokens for row in report.scores())
    assert shorter.values()["loss"] == pytest.approx(report.values()["loss"])
    assert "max_new_tokens 1" in shorter.gallery.read_text()
    assert stored(spark, platform, report) == before
    assert evaluate(spark, platform, changed, shards, shards).reused
    assert evaluate(spark, platform, model, shards, shards).scores_hash == report.scores_hash


# ------------------------------------------------------------------------------------------------ the table

DASHBOARD = Path(__file__).parents[2] / "dashboards" / "quality.lvdash.json"
WIDE = "width >= 512"


def split_of(spark: SparkSession, folder: Path, rows: int, **changes: object) -> Path:
    """Write shards of a split whose request has changed fields, such as another `where`."""
    manifest = Shards.open(dataset(spark, folder / "set", rows)).manifest
    request = manifest.request.model_copy(update={"source": "wide_and_small"} | changes)
    write_manifest(folder / "set" / "shards", manifest.model_copy(update={"request": request}))
    return folder / "set" / "shards"


def figures_of(spark: SparkSession, platform: Platform, model: ModelFiles, where: str = "") -> EvaluationFigures:
    of_model = is_of_model(model.digest, model.run_id)
    found = {"model": model.name, "version": model.version, "source": "wide_and_small", "split": "test"}
    return read_evaluation_figures(spark, platform, of_model=of_model, where=where, **found)


def shown_pictures(spark: SparkSession, platform: Platform, model: ModelFiles) -> list[int]:
    """For each evaluation of a model version that the dashboard shows, return the number of pictures."""
    (query,) = [each for each in json.loads(DASHBOARD.read_text())["datasets"] if each["name"] == "metrics"]
    sql = "".join(query["queryLines"]).replace("FROM evaluations", f"FROM {platform.table(EVALUATIONS.name)}")
    rows = spark.sql(sql).where(f"series LIKE '{model.name}, wide_and_small %' AND version = {model.version}").collect()
    assert len({row["series"] for row in rows}) == len(rows)
    return sorted({row["pictures"] for row in rows})


@pytest.mark.matrix
def test_an_evaluation_of_a_subset_does_not_replace_the_figures_of_the_split(
    spark: SparkSession, platform: Platform, model: ModelFiles, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = model.model_copy(update={"version": "2"})
    whole, part = split_of(spark, tmp_path / "whole", 9), split_of(spark, tmp_path / "part", 6, where=WIDE)
    evaluate(spark, platform, model, whole, whole, columns=())
    evaluate(spark, platform, model, part, whole, columns=())
    assert (figures_of(spark, platform, model).rows, figures_of(spark, platform, model, WIDE).rows) == (9, 6)
    assert shown_pictures(spark, platform, model) == [9]
    assert not caplog.records
    # An earlier release stored no condition.
    name, of_part = platform.table(EVALUATIONS.name), "model_version = '2' AND n = 6"
    spark.sql(f"UPDATE {name} SET shards_where = NULL, n = 7 WHERE {of_part}")
    spark.sql(f"DELETE FROM {name} WHERE model_version = '2' AND n = 9")
    assert figures_of(spark, platform, model, WIDE).rows == 7
    assert "no data.shards.where is stored" in caplog.text


@pytest.mark.matrix
def test_a_reused_evaluation_is_merged_into_the_table_and_becomes_the_newest_evaluation(
    spark: SparkSession, platform: Platform, model: ModelFiles, tmp_path: Path
) -> None:
    model = model.model_copy(update={"version": "3"})
    name = platform.table(EVALUATIONS.name)
    early = split_of(spark, tmp_path / "early", 9, table_version=41)
    evaluate(spark, platform, model, early, early, columns=())
    spark.sql(f"UPDATE {name} SET evaluated_at = evaluated_at + INTERVAL 1 YEAR WHERE model_version = '3'")
    # A table `samples` that was dropped and ingested again has a smaller version.
    late = split_of(spark, tmp_path / "late", 6, table_version=3)
    evaluate(spark, platform, model, late, late, columns=())
    assert figures_of(spark, platform, model).rows == 6
    assert shown_pictures(spark, platform, model) == [6]
    assert evaluate(spark, platform, model, early, early, columns=()).reused
    assert figures_of(spark, platform, model).rows == 9
    spark.sql(f"DELETE FROM {name} WHERE model_version = '3'")
    assert evaluate(spark, platform, model, late, late, columns=()).reused
    assert figures_of(spark, platform, model).rows == 6
    versions = spark.sql(f"DESCRIBE HISTORY {name}").count()
    assert evaluate(spark, platform, model, late, late, columns=()).reused
    assert spark.sql(f"DESCRIBE HISTORY {name}").count() == versions, "nothing is written without a change"

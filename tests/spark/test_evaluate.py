"""Evaluation on executors: the numbers a plain loop gives, written once, shown in a gallery."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import tiny_model, write_shards
from PIL import Image
from pyspark.sql import SparkSession

from pipelines.driver.evaluate import EvaluationReport, evaluate
from pipelines.driver.model import ModelFiles
from pipelines.errors import UserError
from pipelines.platform import Platform
from pipelines.shards import Shards, write_manifest
from pipelines.tables import EVALUATIONS
from pipelines.worker.batches import Collator
from pipelines.worker.caption import load_captioner
from vlm import text
from vlm.build import build_model
from vlm.checkpoint import save_model
from vlm.generate import Generated
from vlm.objective import row_losses

ROWS = 70


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    """A random model with a loud picture: its blind gap is small and not zero."""
    folder = tmp_path_factory.mktemp("model")
    config = tiny_model()
    torch.manual_seed(5)
    tokenizer = text.learn(config.text, [])
    network = build_model(config, tokenizer.vocab_size)
    with torch.no_grad():
        network.decoder.head.weight.mul_(40)
    save_model(folder, network, tokenizer)
    return ModelFiles(folder=folder, name="evaluated", version="1", run_id="r")


def dataset(spark: SparkSession, folder: Path, rows: int) -> Path:
    """Shards, and the Delta table with the same pictures that their manifest names."""
    shards = write_shards(folder / "shards", rows=rows, texts=1)
    pictures = []
    for index in range(rows):
        row = shards.row(index)
        Image.fromarray(row.pixels).save(folder / "picture.png")
        pictures.append((row.image_id, (folder / "picture.png").read_bytes()))
    spark.createDataFrame(pictures, "image_id STRING, image BINARY").write.format("delta").save(str(folder / "samples"))
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
    return evaluate(spark, platform, model, shards)


def stored(spark: SparkSession, platform: Platform, report: EvaluationReport) -> dict[str, float]:
    table = spark.table(platform.table(EVALUATIONS.name))
    rows = table.where((table.model_name == report.model_name) & (table.source == report.source)).collect()
    assert len({row["metric"] for row in rows}) == len(rows)
    return {row["metric"]: row["value"] for row in rows}


def test_executors_measure_what_a_plain_loop_measures(
    report: EvaluationReport, model: ModelFiles, shards: Path
) -> None:
    captioner = load_captioner(str(model.folder))
    collator = Collator(captioner.tokenizer, captioner.model.config)
    opened = Shards.open(shards)
    right, wrong, tokens, exact = 0.0, 0.0, 0, 0
    for index in range(ROWS):
        row, other = opened.row(index), opened.row((index + ROWS // 2) % ROWS)
        for picture in (row, other):
            loss, count = row_losses(captioner.model, collator.batch([picture], [row.texts[0]]))
            right, wrong = (right + loss.item(), wrong) if picture is row else (right, wrong + loss.item())
        tokens += int(count)
        (answer,) = captioner.answer([row.pixels], [""], captioner.model.config.generation)
        assert isinstance(answer, Generated)
        exact += answer.text == row.texts[0][1]
    values = report.values()
    assert values["loss"] == pytest.approx(right / tokens, rel=1e-4)
    assert values["blind_gap"] == pytest.approx((wrong - right) / tokens, rel=1e-3, abs=1e-5)
    assert values["blind_gap"] != 0
    assert values["exact_match"] == exact / ROWS
    assert (report.pictures, report.left_out) == (ROWS, 0)


def test_the_metrics_are_in_the_table_once(
    spark: SparkSession, platform: Platform, model: ModelFiles, shards: Path, report: EvaluationReport
) -> None:
    assert stored(spark, platform, report) == report.values()
    history = f"DESCRIBE HISTORY {platform.table(EVALUATIONS.name)}"
    before = spark.table(platform.table(EVALUATIONS.name)).collect()
    again = evaluate(spark, platform, model, shards)
    assert again.metrics == report.metrics
    after = spark.table(platform.table(EVALUATIONS.name)).collect()
    assert sorted(before) == sorted(after), spark.sql(history).head()


def test_the_gallery_shows_a_fair_sample_of_the_original_pictures(report: EvaluationReport) -> None:
    page = report.gallery.read_text(encoding="utf-8")
    assert page.count("data:image/jpeg;base64,") == 48
    assert page.count("tiny/0<") == 1
    assert "blind gap" in page
    with Image.open(report.gallery_png) as image:
        assert np.asarray(image.convert("L")).std() > 5


def test_one_picture_has_no_blind_gap(
    spark: SparkSession, platform: Platform, model: ModelFiles, tmp_path: Path
) -> None:
    report = evaluate(spark, platform, model, dataset(spark, tmp_path / "set", 1))
    assert "blind_gap" not in report.metrics
    assert "blind_gap" not in stored(spark, platform, report)
    assert report.values()["loss"] > 0


def test_an_empty_split_is_the_users_mistake(
    spark: SparkSession, platform: Platform, model: ModelFiles, tmp_path: Path
) -> None:
    shards = write_shards(tmp_path / "none", rows=0)
    with pytest.raises(UserError, match="nothing to evaluate on"):
        evaluate(spark, platform, model, shards.folder)


def test_a_folder_without_a_model_is_the_users_mistake(
    spark: SparkSession, platform: Platform, model: ModelFiles, shards: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="config cannot be read"):
        evaluate(spark, platform, model.model_copy(update={"folder": tmp_path}), shards)

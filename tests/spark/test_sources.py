"""Tests of ingest from every kind of source: valid and invalid rows are counted, and ingest is idempotent."""

from __future__ import annotations

import io
import json
import tarfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import write_deltalake
from pictures import IMAGE, TEXT, as_base64, encoded, picture, png, write_csv
from PIL import Image
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from pipelines.config import DataConfig
from pipelines.driver.ingest.decode import READ_ORDER, IngestRequest, decode_rows
from pipelines.driver.ingest.ledger import items_table
from pipelines.driver.ingest.plan import plan_ingest, plan_pictures
from pipelines.driver.ingest.quarantine_report import inspect_quarantine, open_quarantine, select_with_spark
from pipelines.driver.ingest.replay import replay
from pipelines.driver.ingest.report import write_report
from pipelines.driver.ingest.run import ingest
from pipelines.driver.ingest.sources.open import open_source, open_unchanged
from pipelines.driver.ingest.spill import spill_folder
from pipelines.driver.ingest.totals import TooManyRefused
from pipelines.executor.ingest.spill import NARROW
from pipelines.formats.tables import SAMPLES
from pipelines.platform import Platform

Written = tuple[dict[str, Any], dict[str, int]]
"""Source and split settings of a data config, and a dict from quarantine reason to the number of invalid rows."""


def two_texts(n: int) -> list[str]:
    return [f"picture {n}", f"the {n}th picture"]


def smooth(seed: int) -> Image.Image:
    """Draw a picture of soft shapes, which lossy encoding changes only a little."""
    return picture(seed, (5, 4)).resize((160, 120), Image.Resampling.BICUBIC)


def write_jsonl(folder: Path) -> Written:
    rows = [{"image": as_base64(png(n)), "text": two_texts(n), "of": "test" if n else "valid"} for n in range(3)]
    bad = [{"image": as_base64(png(3)), "text": "x", "of": "holdout"}, {"text": "no picture", "of": "train"}]
    lines = [json.dumps(row) for row in [*rows, rows[0], *bad]]
    (folder / "a.jsonl").write_text("\n".join([*lines, '{"image": "cut off', ""]))
    split = {"kind": "column", "column": "of"}
    return {"source": {"kind": "jsonl"}, "split": split}, {"malformed_record": 2, "missing_field": 1}


def write_parquet(folder: Path) -> Written:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pictures = [png(n) for n in (10, 11, 12, 10)] + [png(13)[:-30], None]
    rows = [{"image": {"bytes": data, "path": f"{n}.png"}, "text": two_texts(n % 3)} for n, data in enumerate(pictures)]
    schema = pa.schema([("image", kind), ("text", pa.list_(pa.string()))])
    odd = {"taken": pa.array(range(6), pa.timestamp("ns")), "IMAGE": range(6), "until": pa.array([2**60] * 6)}
    table = pa.Table.from_pylist(rows, schema)
    for name, column in odd.items():
        table = table.append_column(name, pa.array(column))
    pq.write_table(table, folder / "train-00000-of-00001-a09b74b3ef9c3b56.parquet")
    for name, image, text in (("val", png(14), "in a folder"), ("year=2024", as_base64(png(15)), 2024)):
        (folder / name).mkdir()
        file = folder / name / ("0000.parquet" if name == "val" else "test_0.parquet")
        pq.write_table(pa.table({"taken": ["another type"], "image": [image], "text": [text]}), file)
    (folder / "train-cut.parquet").write_bytes(b"PAR1 and no more")
    pq.write_table(table, folder / "captions.parquet")
    reasons = {"truncated_image": 1, "missing_field": 1, "unreadable_file": 1}
    return {"source": {"kind": "parquet"}, "split": {"kind": "file"}}, reasons


def write_table(folder: Path) -> Written:
    rows = [{"image": png(20 + n % 3), "text": f"picture {n % 3}", "sku": n % 3} for n in range(4)]
    bad = [{"image": b"words", "text": "x", "sku": 8}, {"image": png(23), "text": " ", "sku": 9}]
    write_deltalake(folder, pa.Table.from_pylist(rows + bad))
    write_deltalake(folder, pa.Table.from_pylist([{"image": png(24), "text": "later", "sku": 7}]), mode="append")
    source = {"kind": "table", "version": 0, "columns": {"id": "sku"}}
    return {"source": source}, {"not_an_image": 1, "empty_text": 1}


def write_folder(folder: Path) -> Written:
    (folder / "in").mkdir()
    for n in range(3):
        (folder / "in" / f"{n}.png").write_bytes(png(30 + n))
    (folder / "never named.png").write_bytes(png(33))
    rows = [[f"in/{n}.png", f'picture "{n}",\nin two lines'] for n in (0, 1, 2, 0)]
    bad = [["in/9.png", "not there"], ["../elsewhere.png", "outside"]]
    write_csv(folder / "captions.csv", [*rows, *bad], header=("file_name", "text"))
    return {"source": {"kind": "folder", "captions": "captions.csv"}}, {"missing_field": 2}


def write_paths(folder: Path) -> Written:
    (folder / "in" / "pictures").mkdir(parents=True)
    for n in range(3):
        (folder / "in" / "pictures" / f"{n} e\u0301.png").write_bytes(png(35 + n))
    (folder / "secret.png").write_bytes(png(38))
    rows = [[f"pictures/{n} \u00e9.png", f"picture {n}"] for n in (0, 1, 2, 0)]
    bad = [["../secret.png", "outside"], ["pictures/9.png", "not there"], ["", "no name"]]
    write_csv(folder / "in" / "rows.csv", [*rows, *bad], header=("image", "caption"))
    return {"source": {"kind": "csv", "columns": {"image": "image"}, "image_root": "."}}, {"missing_field": 3}


def write_coco(folder: Path) -> Written:
    images = [{"id": n, "file_name": f"{n}.png", "height": 16, "width": 24} for n in range(3)]
    for n in range(3):
        (folder / f"{n}.png").write_bytes(png(40 + min(n, 1)))
    said = [(0, "a"), (0, "b"), (1, "c"), (2, "c"), (7, "of a picture that is not listed")]
    annotations = [{"id": n, "image_id": image, "caption": text} for n, (image, text) in enumerate(said)]
    images.append({"id": 3, "file_name": "0.png", "height": 16, "width": 24})
    (folder / "captions.json").write_text(json.dumps({"info": {}, "images": images, "annotations": annotations}))
    return {"source": {"kind": "folder", "captions": "captions.json"}}, {"missing_field": 1, "empty_text": 1}


def write_webdataset(folder: Path) -> Written:
    members: dict[str, bytes] = {}
    for n in range(3):
        members |= {f"in/{n:04}.jpg": encoded(picture(50 + n), "JPEG"), f"in/{n:04}.txt": f"picture {n}".encode()}
    members |= {"in/0003.jpg": members["in/0000.jpg"], "in/0003.txt": b"picture 0"}
    members |= {"in/0004.txt": b"no picture", "in/0005.jpg": encoded(picture(55), "JPEG")[:300], "in/0005.txt": b"x"}
    for name, part in (("a.tar", list(members.items())[:4]), ("b.tar", list(members.items())[4:])):
        with tarfile.open(folder / name, "w") as tar:
            for member, content in part:
                info = tarfile.TarInfo(member)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    (folder / "c.tar").write_bytes((folder / "a.tar").read_bytes()[:700])
    reasons = {"missing_field": 1, "truncated_image": 1, "unreadable_file": 1}
    return {"source": {"kind": "webdataset"}}, reasons


@pytest.mark.parametrize(
    ("write", "usable", "new", "texts", "splits"),
    [
        pytest.param(write_jsonl, 4, 3, 8, {"test": 2, "val": 1}, marks=pytest.mark.matrix),
        (write_parquet, 6, 5, 10, {"train": 3, "val": 1, "test": 1}),
        pytest.param(write_table, 4, 3, 4, {"train": 3}, marks=pytest.mark.matrix),
        (write_folder, 4, 3, 4, {"train": 3}),
        (write_paths, 4, 3, 4, {"train": 3}),
        (write_coco, 3, 2, 4, {"train": 2}),
        pytest.param(write_webdataset, 4, 3, 4, {"train": 3}, marks=pytest.mark.matrix),
    ],
    ids=["jsonl", "parquet", "table", "folder", "paths", "coco", "webdataset"],
)
def test_the_ingest_report_counts_every_row_of_every_kind_of_source(
    spark: SparkSession,
    platform: Platform,
    source: str,
    tmp_path: Path,
    write: Callable[[Path], Written],
    usable: int,
    new: int,
    texts: int,
    splits: dict[str, int],
) -> None:
    data, reasons = write(tmp_path)
    data["source"]["path"] = str(tmp_path)
    config = DataConfig.model_validate({"split": {"kind": "hash", "val": 0, "test": 0}} | data)
    opened = open_source(spark, platform, source, config, items_table([]))
    assert opened.rows is not None
    again = open_source(spark, platform, source, config, opened.pending)
    assert again.rows is None, "unchanged"
    without_spark = open_unchanged(platform, source, config, opened.pending)
    assert without_spark is not None
    assert replace(without_spark, pending=again.pending) == again
    assert open_unchanged(platform, source, config, items_table([])) is None
    request = IngestRequest(source, config, opened.rows, opened.ingest_id)
    with spill_folder(platform) as spill, decode_rows(spark, platform, request, spill) as decoded:
        plan = plan_ingest(spark, platform, decoded)
        found, planned = plan.outcomes.groupBy("reason").count().collect(), plan.pictures.collect()
    totals = plan.totals
    assert {row["reason"]: row["count"] for row in found} == {None: usable} | reasons
    assert (totals.new, totals.contributing, totals.usable, totals.conflicting) == (new, new, usable, 0)
    assert totals.rows_in == totals.usable + totals.bad == usable + sum(reasons.values())
    assert sum(len(row["new_texts"]) for row in planned) == texts
    assert Counter(row["split"] for row in planned) == splits
    if data["source"]["kind"] == "table":
        assert sorted(row["image_id"] for row in planned) == [f"{source}/{n}" for n in range(3)]


def plan_texts(
    spark: SparkSession, rows: list[list[str]], known: list[str], max_texts: int | None = None
) -> tuple[list[str], int]:
    """Make the ingest plan of a picture whose rows have the given texts. Return the new texts, and the number of rows
    that contribute a new text.
    """

    def texts(said: list[str]) -> list[dict[str, str]]:
        return [{"prompt": "", "text": text} for text in said]

    narrow = {"image_id": "p", "sha256": "s", "reason": None, "split": "train", "fingerprint": None}
    place = {"file": "f", "batch": 0, "row": 0, "format": "PNG", "width": 4, "height": 4, "source_row": "a.csv#1"}
    made = [narrow | place | {"texts": texts(said), READ_ORDER: number} for number, said in enumerate(rows)]
    outcomes = pa.Table.from_pylist(made, NARROW.append(pa.field(READ_ORDER, pa.int64())))
    existing = [{"image_id": "p", "sha256": "s", "split": "train", "texts": texts(known)}]
    schema = pa.schema([SAMPLES.arrow_schema.field(name) for name in ("image_id", "sha256", "split", "texts")])
    samples = spark.createDataFrame(pa.Table.from_pylist(existing, schema))
    [row] = plan_pictures(spark.createDataFrame(outcomes), samples, max_texts).collect()
    return [pair["text"] for pair in row["new_texts"]], row["contributing"]


@pytest.mark.matrix  # the test has tens of thousands of texts
def test_the_cost_of_an_ingest_plan_grows_linearly_with_the_number_of_texts_per_picture(spark: SparkSession) -> None:
    many = 30_000
    rows = [[f"text {n}"] for n in range(many)] + [["the same"]] * many
    started = time.monotonic()
    new_texts, contributing = plan_texts(spark, rows, [f"text {n}" for n in range(0, many, 2)], 20_000)
    assert (len(new_texts), contributing) == (5_000, 5_000)
    assert time.monotonic() - started < 30, "work that is quadratic in the texts would take minutes"


@pytest.mark.matrix
def test_rows_over_the_limit_of_texts_per_picture_are_quarantined_and_accepted_after_the_limit_is_raised(
    spark: SparkSession, platform: Platform, source: str, tmp_path: Path
) -> None:
    rows = [{"image": as_base64(png(62)), "text": text} for text in ("d", "a", "b", "c", ["a", "b"], list("wxyz"))]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data: dict[str, Any] = {"source": {"kind": "jsonl", "path": str(tmp_path)}, "near_duplicates": False}
    report = ingest(spark, platform, source, DataConfig.model_validate(data | {"limits": {"max_texts": 2}}))
    assert (report.rows_in, report.new, report.merged, report.duplicates, report.quarantined) == (6, 1, 1, 1, 3)
    assert report.reasons == {"too_many_texts": 3}
    quarantine = spark.table(platform.table("quarantine")).where(f"source = '{source}'")
    assert {(row["stage"], row["detail"].rpartition(" ")[2]) for row in quarantine.collect()} == {
        ("decode", "allowed"),
        ("merge", "texts"),
    }

    mended = DataConfig.model_validate(data | {"limits": {"max_texts": 4}})
    replayed = replay(spark, platform, source, mended, ["too_many_texts"])
    assert (replayed.rows_in, replayed.new, replayed.merged, replayed.refused) == (3, 0, 2, {"too_many_texts": 1})
    [kept] = spark.table(platform.table("samples")).where(f"source = '{source}'").collect()
    assert sorted(pair["text"] for pair in kept["texts"]) == ["a", "a", "b", "b", "c", "d"]


def test_an_ingest_with_too_many_refused_rows_fails_only_after_all_rows_are_written(
    spark: SparkSession, platform: Platform, source: str, tmp_path: Path
) -> None:
    said = [["a", "b"], ["b"], ["b", "c", "y" * 30]]
    rows: list[dict[str, Any]] = [{"image": as_base64(png(60)), "text": texts} for texts in said]
    rows += [{"image": as_base64(png(61)), "text": "x" * 30}, {"image": as_base64(b"words"), "text": "<b>none</b>"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data: dict[str, Any] = {"source": {"kind": "jsonl", "path": str(tmp_path)}, "near_duplicates": False}
    data["limits"] = {"max_text_chars": 20, "max_bad_share": 0.5}
    with pytest.raises(TooManyRefused, match=r"3 of 5 rows \(60.0%.*2 text_too_long, 1 not_an_image") as failed:
        ingest(spark, platform, source, DataConfig.model_validate(data))
    assert failed.value.exit_code == 1
    report = failed.value.report
    assert (report.rows_in, report.new, report.merged, report.duplicates, report.quarantined) == (5, 1, 0, 1, 3)

    full = write_report(spark, platform, report)
    assert full.figures.formats == {"PNG": 1}
    assert full.figures.sides == {"16-31": 1}
    assert (full.figures.texts, full.figures.chars) == ({"3": 1}, {"1": 3})
    page = Path(full.page).read_text()
    assert page.count("<img") == 3
    assert [
        words for words in ("text_too_long", "not_an_image", "16-31", "Refused", "Accepted") if words not in page
    ] == []

    refusals = ["text_too_long", "not_an_image"]
    found = inspect_quarantine(select_with_spark(spark, platform), platform, refusals, 1, pictures=True)
    without_spark = open_quarantine(lambda: pytest.fail("a JVM would start"), platform)
    assert inspect_quarantine(without_spark, platform, refusals, 1, pictures=True) == found
    assert inspect_quarantine(without_spark, platform, [], 0, pictures=False).rows == ()
    counts = {count.reason: (count.rows, count.replayed) for count in found.counts if count.source == source}
    assert counts == {"text_too_long": (2, 0), "not_an_image": (1, 0)}
    assert len([row for row in found.rows if row.source == source]) == 2
    page = Path(str(found.gallery)).read_text()
    assert "data:image/jpeg;base64," in page
    assert "&lt;b&gt;none" in page
    assert "<b>" not in page

    mended = DataConfig.model_validate(data | {"limits": {"max_text_chars": 40}})
    replayed = replay(spark, platform, source, mended, ["text_too_long", "not_an_image"])
    assert (replayed.rows_in, replayed.new, replayed.merged, replayed.duplicates) == (3, 1, 1, 0)
    assert replayed.refused == {"not_an_image": 1}
    refused = spark.table(platform.table("quarantine")).where(f"source = '{source}'").collect()
    assert sorted((row["reason"], row["replayed_at"] is None) for row in refused) == [
        ("not_an_image", True),
        *[("text_too_long", False)] * 2,
    ]
    [kept] = spark.table(platform.table("samples")).where(f"source = '{source}' AND size(texts) > 1").collect()
    assert [pair["text"] for pair in kept["texts"]] == ["a", "b", "b", "c", "y" * 30]


@pytest.mark.matrix
def test_a_picture_that_was_encoded_again_gets_the_split_of_the_original_picture(
    spark: SparkSession, platform: Platform, source: str, tmp_path: Path
) -> None:
    table = platform.table("samples")
    seen = [smooth(n) for n in range(8)]
    again = [encoded(image, "JPEG", quality=80) for image in seen[:4]] + [encoded(seen[7].resize((80, 60)), "WEBP")]
    config = {"source": {"kind": "table", "path": str(tmp_path)}, "split": {"kind": "hash", "val": 0.3, "test": 0.3}}
    data = DataConfig.model_validate(config)
    first = [encoded(image) for image in seen] + again[4:]
    reports = []
    for pictures in (first, again[:4]):
        content = pa.Table.from_pylist([{"image": image, "text": "x"} for image in pictures])
        write_deltalake(tmp_path, content, mode="append")
        reports.append(ingest(spark, platform, source, data).near_duplicates)
    rows = spark.table(table).where(f"source = '{source}'").collect()
    split = {row["image_id"]: row["split"] for row in rows}
    near = {row["image_id"]: row["near_of"] for row in rows if row["near_of"]}
    assert [report.pictures for report in reports] == [2, 4]
    assert [report.across_splits for report in reports] == [0, 0]
    assert reports[1].moved > 0, "some of these pictures would otherwise be in another split"
    names = [f"{source}/{sha256(data).hexdigest()[:24]}" for data in first]
    assert len(near) == 5
    assert {split[name] == split[other] for name, other in near.items()} == {True}
    assert set(near.values()) == set(names[:4]) | {min(names[7:])}


def test_all_rows_that_name_the_same_picture_file_are_read_by_the_same_task(
    spark: SparkSession, platform: Platform, source: str, tmp_path: Path
) -> None:
    # The captions file is so large that several tasks read the pictures.
    rows = [{"file_name": f"{n % 7}.png", "text": "x" * 1000 + f" {n}"} for n in range(350)]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for n in range(7):
        (tmp_path / f"{n}.png").write_bytes(png(n))
    folder = {"kind": "folder", "path": str(tmp_path), "captions": "captions.jsonl"}
    opened = open_source(spark, platform, source, DataConfig.model_validate({"source": folder}), items_table([]))
    assert opened.rows is not None
    frame = opened.rows.frame.withColumn("task", F.spark_partition_id())
    assert frame.select("task").distinct().count() > 1
    tasks = frame.groupBy("picture").agg(F.count_distinct("task").alias("tasks"), F.count("*").alias("rows")).collect()
    assert [(row["tasks"], row["rows"]) for row in tasks] == [(1, 50)] * 7


@pytest.mark.matrix
def test_the_texts_of_a_picture_keep_their_order_even_if_the_captions_file_is_long(
    spark: SparkSession, platform: Platform, source: str, tmp_path: Path
) -> None:
    texts = {f"{n}.png": [f"text {number} of picture {n} {'x' * 200}" for number in range(600)] for n in range(2)}
    for n, name in enumerate(texts):
        (tmp_path / name).write_bytes(png(60 + n))
    rows = [[name, texts[name][number]] for number in range(600) for name in texts]  # Spark reads 260 kB in five tasks
    write_csv(tmp_path / "captions.csv", rows, header=("file_name", "text"))
    folder = {"kind": "folder", "path": str(tmp_path), "captions": "captions.csv"}
    ingest(spark, platform, source, DataConfig.model_validate({"source": folder}))
    stored = spark.table(platform.table(SAMPLES.name)).where(f"source = '{source}'").select("texts").collect()
    found = [[pair["text"] for pair in row["texts"]] for row in stored]
    assert sorted(found) == sorted(texts.values())


@pytest.mark.matrix  # four Delta commits
def test_pictures_that_are_stored_again_under_the_ids_of_a_new_id_column_are_reported(
    spark: SparkSession, platform: Platform, source: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [[f"key {n}", as_base64(png(n)), f"text {n}", "test" if n else "train"] for n in range(3)]
    write_csv(tmp_path / "a.csv", rows, header=["key", IMAGE, TEXT, "split"])
    settings: dict[str, Any] = {"kind": "csv", "path": str(tmp_path / "a.csv")}
    split = {"kind": "column"}
    ingest(spark, platform, source, DataConfig.model_validate({"source": settings, "split": split}))
    assert not [message for message in caplog.messages if "under several ids" in message]
    config = DataConfig.model_validate({"source": settings | {"columns": {"id": "key"}}, "split": split})
    report = ingest(spark, platform, source, config)
    assert (report.new, sum(report.splits.values())) == (3, 6)
    [message] = [message for message in caplog.messages if "under several ids" in message]
    assert message.startswith(f"3 pictures of {source} are in samples under several ids")
    refreshed = ingest(spark, platform, source, config, refresh=True)
    assert sum(refreshed.splits.values()) == 3

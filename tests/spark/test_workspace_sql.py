"""The SQL queries of docs/databricks.md and of the quality dashboard run on the tables.

The queries of docs/databricks.md replace the `lakesight` commands that cannot read the tables of a catalog.
"""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from delta import DeltaTable
from pyspark.sql import SparkSession
from trained_models import corner_rows

from pipelines.formats.tables import EVALUATIONS, GENERATED_CAPTIONS, SAMPLES, VERDICTS
from pipelines.platform import Platform

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs" / "databricks.md"
DASHBOARD = ROOT / "dashboards" / "quality.lvdash.json"


def queries(schema: str, **values: str) -> list[str]:
    """Return the SQL queries of section "Look at tables", with the schema and values in place of the placeholders."""
    section = DOCS.read_text().replace("<catalog>.<schema>", schema).split("## Look at tables")[1].split("\n## ")[0]
    found = re.findall(r"```sql\n(.+?)```", section, re.DOTALL)
    return [re.sub(r"\b(IMAGE_ID|CAPTION_ID|RUN)\b", lambda name: values[name[0]], query) for query in found]


def stored_caption(sample: tuple[Any, ...], model: str, table: str, **changed: Any) -> dict[str, Any]:
    """Return a row of `generated_captions` for a row of table `samples`, with `changed` in place of some values."""
    named = {name: sample[SAMPLES.names.index(name)] for name in ("image_id", "sha256")}
    fixed = {"model_name": model, "model_version": "1", "error": None, "num_tokens": 3, "mean_logprob": -1.0}
    times = {"source_version": 1, "captioned_at": datetime.now(UTC), "read_at": None}
    columns = {"id_column": "image_id", "image_column": "image", "model_digest": None, "source_table": table}
    return dict.fromkeys(GENERATED_CAPTIONS.names, "x") | named | fixed | times | columns | changed


@pytest.mark.matrix
def test_the_queries_of_the_docs_show_captions_and_decisions_and_write_a_verdict_on_one_caption(
    spark: SparkSession, platform: Platform, source: str
) -> None:
    rows = corner_rows(source, "train", 2)
    spark.createDataFrame(rows, SAMPLES.ddl()).writeTo(platform.table(SAMPLES.name)).append()
    name, table = f"{platform.namespace}.{source}", platform.table(SAMPLES.name)
    first = rows[0][0]
    judged = stored_caption(rows[0], name, table, caption="judged")
    others = [
        stored_caption(rows[0], name, table, caption="by another model", model_digest="d"),
        stored_caption(rows[0], name, table, caption="another prompt", settings_hash="h", prompt="how many circles?"),
        stored_caption(rows[0], name, table, caption="another version", model_version="2"),
        stored_caption(rows[1], name, table, caption="another picture"),
    ]
    unlisted = [
        stored_caption(rows[0], name, "shop.products", caption="another table"),
        stored_caption(rows[0], name, table, caption="a replaced picture", sha256="0" * 64, settings_hash="old"),
    ]
    captions = [tuple(row[column] for column in GENERATED_CAPTIONS.names) for row in [judged, *others, *unlisted]]
    spark.createDataFrame(captions, GENERATED_CAPTIONS.ddl()).writeTo(platform.table(GENERATED_CAPTIONS.name)).append()
    show, lineage, decisions, unjudged, _ = queries(platform.namespace, IMAGE_ID=first, RUN=source, CAPTION_ID="")

    newest = DeltaTable.forName(spark, table).history(1).collect()[0]["version"]
    # The page shows version 1, whose files another test may have removed with VACUUM.
    assert len(spark.sql(show.replace("VERSION AS OF 1 ", f"VERSION AS OF {newest} ")).collect()) == 5
    found = spark.sql(lineage).collect()
    assert [row["model_name"] for row in found] == [name] * 6
    assert {row["image_column"] for row in found} == {"image"}
    assert {row["sha256"] for row in found} == {judged["sha256"], "0" * 64}
    assert spark.sql(decisions).collect() == []
    listed = {row["caption"]: row for row in spark.sql(unjudged).collect()}
    assert {*listed} == {"judged", *(row["caption"] for row in others)}
    assert listed["another prompt"]["prompt"] == "how many circles?"
    chosen = listed["judged"]["caption_id"]
    *_, judge = queries(platform.namespace, IMAGE_ID=first, RUN=source, CAPTION_ID=chosen)
    for _ in range(2):  # the second verdict replaces the first verdict
        spark.sql(judge)
    verdicts = spark.table(platform.table(VERDICTS.name)).where(f"model_name = '{name}'").collect()
    assert [(row["image_id"], row["verdict"], row["caption"]) for row in verdicts] == [(first, "corrected", "judged")]
    assert bytes(verdicts[0]["image"]) == rows[0][2]
    assert {row["caption"] for row in spark.sql(unjudged).collect()} == {row["caption"] for row in others}


def test_every_column_that_a_dashboard_chart_queries_exists(spark: SparkSession, platform: Platform) -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    charts = [item["widget"] for page in dashboard["pages"] for item in page["layout"]]
    database = spark.catalog.currentDatabase()
    spark.catalog.setCurrentDatabase(platform.namespace)
    try:
        datasets = {each["name"]: spark.sql("".join(each["queryLines"])) for each in dashboard["datasets"]}
        for chart in charts:
            [query] = (each["query"] for each in chart["queries"])
            fields = ", ".join(f"{field['expression']} AS `{field['name']}`" for field in query["fields"])
            grouping = "" if query["disaggregated"] else "GROUP BY ALL"
            rows = spark.sql(f"SELECT {fields} FROM {{rows}} {grouping}", rows=datasets[query["datasetName"]])
            rows.collect()
            drawn = re.findall(r'"fieldName": "([^"]+)"', json.dumps(chart["spec"]["encodings"]))
            assert sorted(drawn) == sorted(rows.columns), chart["name"]
    finally:
        spark.catalog.setCurrentDatabase(database)


@pytest.mark.matrix
def test_the_dashboard_shows_the_newest_evaluation_of_each_model_and_its_own_captions(
    spark: SparkSession, platform: Platform, source: str
) -> None:
    table, names = platform.table(SAMPLES.name), (f"a.b.{source}-one", f"a.b.{source}-two")
    same = {"model_version": "1", "source": source, "split": "val", "metric": "cider", "low": 0.0, "high": 1.0, "n": 1}
    evaluations = [
        dict.fromkeys(EVALUATIONS.names)
        | same
        | {"run_id": "r", "model_name": name, "dataset_version": version, "value": value}
        | {"evaluated_at": datetime(2026, 1, day, tzinfo=UTC)}
        for name, version, value, day in ((names[0], 9, 0.9, 1), (names[0], 3, 0.5, 2), (names[1], 3, 0.1, 2))
    ]
    [sample] = corner_rows(source, "train", 1)
    captions = [
        stored_caption(sample, name, place, mean_logprob=certainty, image_id=str(number))
        for number, (name, place, certainty) in enumerate(
            [(names[0], table, -1.0), (names[0], table, -1.0), (names[0], "shop", -4.0), (names[1], table, -8.0)]
        )
    ]
    failed = {"caption": None, "mean_logprob": None, "error": f"{source}: status 503"}
    captions += [stored_caption(sample, names[1], table, image_id=str(number), **failed) for number in (8, 9)]
    for definition, rows in ((EVALUATIONS, evaluations), (GENERATED_CAPTIONS, captions)):
        values = [tuple(row[column] for column in definition.names) for row in rows]
        spark.createDataFrame(values, definition.ddl()).writeTo(platform.table(definition.name)).append()
    texts = {each["name"]: "".join(each["queryLines"]) for each in json.loads(DASHBOARD.read_text())["datasets"]}
    database = spark.catalog.currentDatabase()
    spark.catalog.setCurrentDatabase(platform.namespace)
    try:
        metrics = spark.sql(texts["metrics"]).where(f"series LIKE '{source}-%'").collect()
        certainty = spark.sql(texts["captions"]).where(f"model LIKE '{source}-%'").collect()
        errors = spark.sql(texts["errors"]).where(f"reason = '{source}'").collect()
    finally:
        spark.catalog.setCurrentDatabase(database)
    assert {row["series"]: row["value"] for row in metrics} == {
        f"{source}-one, {source} val, cider": 0.5,
        f"{source}-two, {source} val, cider": 0.1,
    }
    assert {row["model"]: (row["captioned"], row["mean_logprob"]) for row in certainty} == {
        f"{source}-one 1": (3, -2.0),
        f"{source}-two 1": (1, -8.0),
    }
    assert [row["errors"] for row in errors] == [2]

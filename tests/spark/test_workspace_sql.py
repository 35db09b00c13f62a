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
from pyspark.sql import SparkSession
from trained_models import corner_rows

from pipelines.formats.tables import GENERATED_CAPTIONS, SAMPLES, VERDICTS
from pipelines.platform import Platform

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs" / "databricks.md"
DASHBOARD = ROOT / "dashboards" / "quality.lvdash.json"


def queries(schema: str, **values: str) -> list[str]:
    """Return the SQL queries of section "Look at tables", with the schema and values in place of the placeholders."""
    section = DOCS.read_text().replace("<catalog>.<schema>", schema).split("## Look at tables")[1].split("\n## ")[0]
    found = re.findall(r"```sql\n(.+?)```", section, re.DOTALL)
    return [re.sub(r"\b(IMAGE_ID|RUN|VERSION)\b(?! AS OF)", lambda name: values[name[0]], query) for query in found]


def stored_caption(sample: tuple[Any, ...], model: str, table: str) -> tuple[Any, ...]:
    """Return a row of `generated_captions` for a row of table `samples`."""
    row: dict[str, Any] = dict.fromkeys(GENERATED_CAPTIONS.names, "x") | {
        **{name: sample[SAMPLES.names.index(name)] for name in ("image_id", "sha256")},
        "model_name": model,
        "model_version": "1",
        "error": None,
        "num_tokens": 3,
        "mean_logprob": -1.0,
        "source_table": table,
        "source_version": 1,
        "captioned_at": datetime.now(UTC),
        "read_at": None,
        "model_digest": None,
    }
    return tuple(row[column] for column in GENERATED_CAPTIONS.names)


@pytest.mark.matrix
def test_the_queries_of_the_docs_show_captions_and_decisions_and_write_a_verdict(
    spark: SparkSession, platform: Platform, source: str
) -> None:
    rows = corner_rows(source, "train", 2)
    spark.createDataFrame(rows, SAMPLES.ddl()).writeTo(platform.table(SAMPLES.name)).append()
    name = f"{platform.namespace}.{source}"
    captions = [stored_caption(row, name, platform.table(SAMPLES.name)) for row in rows]
    spark.createDataFrame(captions, GENERATED_CAPTIONS.ddl()).writeTo(platform.table(GENERATED_CAPTIONS.name)).append()
    first, second = rows[0][0], rows[1][0]
    show, lineage, decisions, unjudged, judge = queries(platform.namespace, IMAGE_ID=first, RUN=source, VERSION="1")

    spark.sql(show).collect()
    assert [row["model_name"] for row in spark.sql(lineage).collect()] == [name]
    assert spark.sql(decisions).collect() == []
    assert {row["image_id"] for row in spark.sql(unjudged).collect()} == {first, second}
    for _ in range(2):  # the second verdict replaces the first verdict
        spark.sql(judge)
    verdicts = spark.table(platform.table(VERDICTS.name)).where(f"model_name = '{name}'").collect()
    assert [(row["image_id"], row["verdict"], row["caption"]) for row in verdicts] == [(first, "corrected", "x")]
    assert bytes(verdicts[0]["image"]) == rows[0][2]
    assert [row["image_id"] for row in spark.sql(unjudged).collect()] == [second]


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

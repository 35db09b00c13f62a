"""Tests of the review page as a Databricks App: the deployed command runs with the identity of the app.

In place of a SQL warehouse, a Spark session runs the statements on real Delta tables.
"""

from __future__ import annotations

import html
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from open_sockets import free_port
from processes import TEST_PATH
from pyspark.errors import PySparkException
from pyspark.sql import SparkSession
from stand_in_apps import Rows, SqlError
from stand_in_workspace import Workspace, serve
from trained_models import corner_rows

from pipelines.formats.tables import DECISIONS, GENERATED_CAPTIONS, SAMPLES, VERDICTS
from pipelines.platform import Platform

ROOT = Path(__file__).parents[2]
USER = {"X-Forwarded-Email": "ana@example.com"}
WITHOUT_SPARK = """
import sys
sys.modules |= dict.fromkeys(("pyspark", "delta", "torch", "mlflow"))  # not installed in an app
from jobs.cli import main
main()
"""


def app_settings(namespace: str) -> dict[str, Any]:
    """Return the app of apps/review.yml as a workspace receives it."""
    catalog, schema = namespace.split(".")
    values = {
        "var.review_app": "lakesight-review-dev",
        "var.warehouse": "abc123",
        "var.run": "demo",
        "var.ranks": "2",
        "var.catalog": catalog,
        "resources.schemas.lakesight.name": schema,
        "resources.volumes.files.name": "files",
    }
    text = json.dumps(yaml.safe_load((ROOT / "apps" / "review.yml").read_text())["resources"]["apps"]["review"])
    settings: dict[str, Any] = json.loads(re.sub(r"\$\{([^}]+)\}", lambda found: values[found[1]], text))
    return settings


@pytest.fixture
def namespace(platform: Platform) -> str:
    return platform.namespace if "." in platform.namespace else f"spark_catalog.{platform.namespace}"


@pytest.fixture
def ids(spark: SparkSession, namespace: str, source: str) -> list[str]:
    """Write three pictures with captions of two versions, and promote the second version.

    Return the ids of the pictures; the picture with the least certain caption comes first.
    """
    rows = corner_rows(source, "train", 3)
    hashes = [row[SAMPLES.names.index("sha256")] for row in rows]
    spark.createDataFrame(rows, SAMPLES.ddl()).writeTo(f"{namespace}.{SAMPLES.name}").append()
    values: list[dict[str, Any]] = [
        dict.fromkeys(GENERATED_CAPTIONS.names, "x")
        | {"image_id": row[0], "model_name": f"{namespace}.demo", "model_version": "7", "caption": f"caption {n}"}
        | {"error": None, "num_tokens": 3, "mean_logprob": n - 3.0, "source_table": f"{namespace}.samples"}
        | {"source_version": 1, "captioned_at": datetime.now(UTC), "model_digest": None}
        | {"id_column": "image_id", "image_column": "image", "image_root": None}
        | {"sha256": hashes[n], "read_at": None}
        for n, row in enumerate(rows)
    ]
    earlier = [
        row | {"model_version": "6", "caption": "by an earlier champion", "mean_logprob": -9.0} for row in values
    ]
    captions = [tuple(row[name] for name in GENERATED_CAPTIONS.names) for row in [*values, *earlier]]
    spark.createDataFrame(captions, GENERATED_CAPTIONS.ddl()).writeTo(f"{namespace}.{GENERATED_CAPTIONS.name}").append()
    promoted: dict[str, Any] = dict.fromkeys(DECISIONS.names, "x")
    promoted |= {"model_name": f"{namespace}.demo", "model_version": "7"}
    promoted |= {"action": "promote", "reasons": [], "decided_at": datetime.now(UTC), "model_digest": None}
    decision = tuple(promoted[name] for name in DECISIONS.names)
    spark.createDataFrame([decision], DECISIONS.ddl()).writeTo(f"{namespace}.{DECISIONS.name}").append()
    return [row[0] for row in rows]


def literal(value: str | None) -> str:
    """Return a value as a SQL literal."""
    if value is None:
        return "NULL"
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"


@pytest.fixture
def workspace(spark: SparkSession, namespace: str) -> Workspace:
    """A workspace with a warehouse that runs SQL statements, and with the app of the bundle."""

    def run_sql(statement: str, values: Mapping[str, str | None]) -> Rows:
        try:
            # Delta Lake's SQL parser ignores the values that spark.sql(..., args=...) passes.
            found = spark.sql(re.sub(r":(\w+)", lambda name: literal(values[name[1]]), statement))
            return found.columns, [tuple(row) for row in found.collect()]
        except PySparkException as error:
            raise SqlError(str(error)) from None

    names = (SAMPLES.name, GENERATED_CAPTIONS.name, VERDICTS.name, DECISIONS.name)
    found = Workspace(user="somebody", run_sql=run_sql, tables={f"{namespace}.{name}" for name in names})
    found.create_app(app_settings(namespace))
    return found


@contextmanager
def running_app(workspace: Workspace, url: str, namespace: str, folder: Path) -> Iterator[str]:
    """Run the command of the app as Databricks Apps does, and yield the address of the page."""
    app, port = workspace.apps["lakesight-review-dev"], free_port()
    credentials = {"DATABRICKS_CLIENT_ID": app["service_principal_client_id"], "DATABRICKS_CLIENT_SECRET": "s"}
    own = {"DATABRICKS_HOST": url, "DATABRICKS_APP_PORT": str(port), "HOME": str(folder), "PYTHONPATH": TEST_PATH}
    environment = {"PATH": os.environ["PATH"]} | credentials | own
    program, *arguments = app_settings(namespace)["config"]["command"]
    assert program == "lakesight"
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-c", WITHOUT_SPARK, *arguments], stdout=log, stderr=log, env=environment, cwd=folder
        )
    try:
        address = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 120
        while answer(address)[0] == 0:
            assert server.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.2)
        yield address
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(timeout=30)


def answer(url: str, body: object = None, **headers: str) -> tuple[int, bytes]:
    """Send a request. Return the status and the content of the answer; the status is 0 if nothing listens."""
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=60) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()
    except OSError:
        return 0, b""


@pytest.mark.matrix
def test_the_review_app_of_the_bundle_shows_captions_and_stores_verdicts_with_the_permissions_of_its_resources(
    spark: SparkSession, workspace: Workspace, namespace: str, ids: list[str], tmp_path: Path
) -> None:
    said = {"image_id": ids[0], "model_version": "7", "settings_hash": "x", "verdict": "good"}
    with serve(workspace) as url, running_app(workspace, url, namespace, tmp_path) as address:
        for path in ("/", f"/picture?id={ids[0]}"):
            assert answer(address + path)[0] == 403
        status, page = answer(address, **USER)
        assert status == 200
        shown = re.findall(r'data-caption="(caption \d)"', page.decode())
        assert shown == ["caption 0", "caption 1", "caption 2"]
        sources = [html.unescape(source) for source in re.findall(r'src="(/picture[^"]+)"', page.decode())]
        status, picture = answer(address + sources[0], **USER)
        assert (status, picture[:2]) == (200, b"\xff\xd8")
        assert answer(f"{address}/picture?id={ids[0]}", **USER)[0] == 404
        hashes = re.findall(r'data-sha256="(\w+)"', page.decode())
        said |= {"sha256": hashes[0]}
        corrected = said | {"image_id": ids[1], "sha256": hashes[1], "verdict": "corrected", "text": "a green circle"}

        token = {"X-Lakesight-Token": re.findall(r'"X-Lakesight-Token": "([^"]+)"', page.decode())[0]}
        assert answer(f"{address}/verdict", said, **token)[0] == 403
        for verdict in (said, said | {"verdict": "bad"}, corrected):
            assert answer(f"{address}/verdict", verdict, **token, **USER)[0] == 200
        assert answer(f"{address}/verdict", said | {"image_id": "absent"}, **token, **USER)[0] == 404
        page = answer(address, **USER)[1]
        assert re.findall(r'data-caption="(caption \d)"', page.decode()) == ["caption 2"]
    where = f"model_name = '{namespace}.demo' AND image_id IN ('{ids[0]}', '{ids[1]}')"
    rows = spark.table(f"{namespace}.{VERDICTS.name}").where(where).orderBy("verdict").collect()
    assert [(row["verdict"], row["text"], row["reviewer"]) for row in rows] == [
        ("bad", None, "ana@example.com"),
        ("corrected", "a green circle", "ana@example.com"),
    ]
    pictures = {row["image_id"]: bytes(row["image"]) for row in spark.table(f"{namespace}.{SAMPLES.name}").collect()}
    assert all(bytes(row["image"]) == pictures[row["image_id"]] for row in rows)

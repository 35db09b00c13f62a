"""Tests of the review server as a Databricks App, without the proxy of a workspace."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake
from pictures import png
from starlette.testclient import TestClient

from pipelines.formats.table_schema import Table
from pipelines.formats.tables import GENERATED_CAPTIONS, SAMPLES
from pipelines.review import verdicts
from pipelines.review.delta_store import DeltaStore
from pipelines.review.server import ALL_HOSTS, forwarded_user, open_app
from pipelines.review.verdicts import Review

NOW = datetime(2026, 1, 1, tzinfo=UTC)
SHA256 = sha256(png(0)).hexdigest()
SAID = {"image_id": "0", "model_version": "1", "settings_hash": "h", "sha256": SHA256, "verdict": "good"}
PICTURE = f"/picture?id=0&sha256={SHA256}"


def write(folder: Path, table: Table, **values: object) -> None:
    """Append a row to a table. Columns without a value are empty."""
    row: dict[str, Any] = {field.name: None if field.nullable else empty(field.type) for field in table.arrow_schema}
    write_deltalake(folder / table.name, pa.Table.from_pylist([row | values], table.arrow_schema), mode="append")


def empty(kind: pa.DataType) -> object:
    if pa.types.is_timestamp(kind):
        return NOW
    return [] if pa.types.is_list(kind) else 0 if pa.types.is_primitive(kind) else "h"


def write_caption(folder: Path, number: int) -> None:
    given = {"image_id": str(number), "model_name": "m", "model_version": "1", "source_table": "samples"}
    write(folder, GENERATED_CAPTIONS, **given, sha256=SHA256, caption=f"caption {number}", mean_logprob=float(number))


@pytest.fixture
def client(tmp_path: Path) -> TestClient:
    write(tmp_path, SAMPLES, image_id="0", image=png(0))
    write_caption(tmp_path, 0)
    captions, pictures = (DeltaTable(tmp_path / name) for name in ("generated_captions", "samples"))
    review = Review(
        DeltaStore(captions, pictures, tmp_path / "verdicts", table="samples", model="m", has_texts=True),
        table="samples",
        model="m",
    )
    return TestClient(open_app(review, "Captions of m", forwarded_user, ALL_HOSTS), base_url="http://app.example")


def test_the_app_serves_only_requests_that_the_proxy_has_given_a_user_and_stores_this_user_as_reviewer(
    client: TestClient, tmp_path: Path
) -> None:
    user = {"X-Forwarded-Email": "ana@example.com"}
    page = client.get("/", headers=user)
    assert page.status_code == 200
    token = {"X-Lakesight-Token": re.findall(r'"X-Lakesight-Token": "([^"]+)"', page.text)[0]}
    for answer in (client.get("/"), client.get(PICTURE), client.post("/verdict", json=SAID, headers=token)):
        assert answer.status_code == 403
    assert client.get(PICTURE, headers=user).status_code == 200
    assert client.post("/verdict", json=SAID, headers=user).status_code == 403
    assert client.post("/verdict", json=SAID, headers=user | token).json() == {"judged": 1}
    (row,) = DeltaTable(tmp_path / "verdicts").to_pyarrow_table().to_pylist()
    assert row["reviewer"] == "ana@example.com"


def test_the_page_shows_captions_that_were_written_after_the_start_of_the_server(
    client: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    user = {"X-Forwarded-Email": "ana@example.com"}
    write_caption(tmp_path, 1)
    assert "caption 1" not in client.get("/", headers=user).text
    monkeypatch.setattr(verdicts, "REFRESH_SECONDS", 0)
    assert "caption 1" in client.get("/", headers=user).text

"""Tests of `lakesight review` in a browser: the review page, the filter, verdicts, and requests that are refused."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from browser import open_page
from deltalake import DeltaTable, write_deltalake
from open_sockets import free_port
from pictures import png
from playwright.sync_api import Page, expect
from processes import TEST_PATH

from pipelines.formats.table_schema import Table
from pipelines.formats.tables import GENERATED_CAPTIONS, SAMPLES

NOW = datetime(2026, 1, 1, tzinfo=UTC)
EVIL = '<img src=x onerror="document.title=1">'
HUMAN = {"prompt": "", "text": "one red square"}
SHA256 = [sha256(png(n)).hexdigest() for n in range(30)]
CAPTIONS = ["a red square", "a blue circle", EVIL, *(f"picture {n}" for n in range(3, 30))]


def write(home: Path, table: Table, rows: list[dict[str, Any]]) -> None:
    write_deltalake(home / "warehouse" / table.name, pa.Table.from_pylist(rows, table.arrow_schema))


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home folder with 30 pictures and their captions."""
    ids = [f"demo/{n:02}" for n in range(len(CAPTIONS))]
    samples = [
        {"image_id": image_id, "sha256": SHA256[n], "image": png(n), "format": "PNG", "width": 8, "height": 8}
        | {
            "texts": [HUMAN, HUMAN | {"prompt": "what colour?"}] if n == 0 else [],
            "split": "test",
            "source": "demo",
            "source_row": "r",
            "ingest_id": "i",
            "ingested_at": NOW,
        }
        for n, image_id in enumerate(ids)
    ]
    captions = [
        {"image_id": image_id, "model_name": "demo", "model_version": "1", "settings_hash": "h", "caption": caption}
        | {"sha256": SHA256[n], "prompt": "", "settings": "{}", "num_tokens": 3, "mean_logprob": n / 30 - 1.0}
        | {"source_table": "lakesight.samples", "source_version": 1, "run_id": "r", "captioned_at": NOW}
        for n, (image_id, caption) in enumerate(zip(ids, CAPTIONS, strict=True))
    ]
    write(tmp_path, SAMPLES, samples)
    write(tmp_path, GENERATED_CAPTIONS, captions)
    return tmp_path


@pytest.fixture
def address(home: Path) -> Iterator[str]:
    """Start `lakesight review` and yield the address of its web page."""
    port = free_port()
    environment = os.environ | {"LAKESIGHT_HOME": str(home), "PYTHONPATH": TEST_PATH}
    command = [sys.executable, "-c", "from jobs.cli import main; main()", "review", "--port", str(port)]
    with (home / "log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=home)
    try:
        deadline = time.monotonic() + 60
        while not listens(port):
            assert server.poll() is None, (home / "log").read_text()
            assert time.monotonic() < deadline, (home / "log").read_text()
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(timeout=30)
    assert server.returncode == 0, (home / "log").read_text()


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def verdicts(home: Path) -> dict[str, tuple[str, str | None]]:
    rows = DeltaTable(home / "warehouse" / "verdicts").to_pyarrow_table().to_pylist()
    assert all(row["image"].startswith(b"\x89PNG") and row["reviewer"] for row in rows)
    return {row["image_id"]: (row["verdict"], row["text"]) for row in rows}


@pytest.fixture
def page(address: str) -> Iterator[Page]:
    """The review page, opened in Chromium."""
    with open_page(address) as tab:
        yield tab


def test_a_person_can_review_captions_on_the_review_page(page: Page, home: Path, tmp_path: Path) -> None:
    assert page.locator("article").count() == 24  # the first page has the least certain captions
    assert page.locator("article").first.locator("textarea").input_value() == "a red square"
    assert page.locator("article").nth(2).locator("textarea").input_value() == EVIL
    assert page.title() == "Captions of demo"
    page.wait_for_load_state("networkidle")
    assert page.evaluate("document.images[0].naturalWidth") == 24

    card = page.locator("article")
    assert card.nth(0).locator(".human").all_inner_texts() == ["HUMAN\none red square"]
    assert card.nth(1).locator(".human").count() == 0
    assert card.nth(0).locator(".id").inner_text() == "demo/00, version 1, certainty 37 %"
    page.keyboard.press("g")
    expect(page.locator("#judged")).to_have_text("1")
    card.nth(1).get_by_role("button", name="Save correction").click()  # an unchanged text is not sent
    assert card.nth(1).locator(".status").inner_text() == "change the words first"
    card.nth(1).locator("textarea").fill("a green circle")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#judged")).to_have_text("2")
    page.keyboard.press("j")
    page.keyboard.press("j")
    expect(page.locator("article.current")).to_have_attribute("data-image-id", "demo/03")
    card.nth(3).get_by_role("button", name="Good").click()
    expect(page.locator("#judged")).to_have_text("3")
    page.keyboard.press("j")
    card.nth(4).locator("textarea").fill("an edited text")
    card.nth(4).locator("textarea").press("Escape")
    for key, name in (("g", "Good"), ("b", "Bad")):
        page.keyboard.press(key)
        expect(card.nth(4).locator(".status")).to_contain_text("the text was changed")
        card.nth(4).get_by_role("button", name=name).click()
        expect(card.nth(4).locator("textarea")).to_have_value("an edited text")
        card.nth(4).locator("textarea").press("Escape")
    page.keyboard.press("k")
    page.keyboard.press("b")  # a second verdict replaces the first
    expect(card.nth(3)).to_have_attribute("data-verdict", "bad")
    assert verdicts(home) == {
        "demo/00": ("good", "a red square"),
        "demo/01": ("corrected", "a green circle"),
        "demo/03": ("bad", None),
    }
    page.screenshot(path=tmp_path / "review.png", full_page=True)

    page.get_by_label("Show").select_option("all")
    page.get_by_label("with the words").fill("PICTURE 2")
    page.get_by_role("button", name="Show").click()
    page.wait_for_url("**words=PICTURE+2*")
    found = [box.input_value() for box in page.locator("article textarea").all()]
    assert found == [f"picture {n}" for n in range(20, 30)]
    page.goto(page.url.partition("?")[0] + "?show=judged")
    assert page.locator("article").count() == 3


def test_the_review_server_refuses_requests_without_the_token_of_its_page(address: str, home: Path) -> None:
    said = {"image_id": "demo/00", "model_version": "1", "settings_hash": "h", "sha256": SHA256[0], "verdict": "good"}

    def answer(path: str, body: object = None, **headers: str) -> tuple[int, str]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(address + path, data, {"Content-Type": "application/json", **headers})
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    status, page = answer("/")
    token = {"X-Lakesight-Token": page.split('"X-Lakesight-Token": "')[1].split('"')[0]}
    assert status == 200
    assert answer("/", Host="evil.example")[0] == 400
    assert answer("/verdict", said)[0] == 403
    assert answer("/verdict", said, **{"X-Lakesight-Token": "guess"})[0] == 403
    assert answer("/verdict", said | {"verdict": "corrected"}, **token)[0] == 422
    assert answer("/verdict", said | {"image_id": "demo/99"}, **token)[0] == 404
    assert answer("/picture?id=../../etc/passwd")[0] == 404
    assert answer("/?after=x")[0] == 400
    assert verdicts(home) == {}
    assert answer("/verdict", said, **token) == (200, '{"judged":1}')
    assert verdicts(home) == {"demo/00": ("good", "a red square")}

"""Tests of the review server as a Databricks App, without the proxy of a workspace."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from hashlib import sha256
from html import unescape
from pathlib import Path

import pytest
from deltalake import DeltaTable
from pictures import png
from starlette.testclient import TestClient
from written_rows import write_rows

from pipelines.formats.tables import GENERATED_CAPTIONS, SAMPLES
from pipelines.review import server, verdicts
from pipelines.review.delta_store import DeltaStore
from pipelines.review.server import ALL_HOSTS, forwarded_user, open_app
from pipelines.review.verdicts import Review

USER = {"X-Forwarded-Email": "ana@example.com"}
SHA256 = sha256(png(0)).hexdigest()
SAID = {"image_id": "0", "model_version": "1", "settings_hash": "h", "sha256": SHA256, "verdict": "good"}
PICTURE = f"/picture?id=0&sha256={SHA256}"


def write_captions(folder: Path, *numbers: int, likelihood: Callable[[int], float | None] = float) -> None:
    """Write one picture and one caption for each number. The number is the id of the picture."""
    same: dict[str, object] = {"model_name": "m", "model_version": "1", "source_table": "samples", "sha256": SHA256}
    captions: list[dict[str, object]]
    captions = [{"caption": f"caption {n}", "mean_logprob": likelihood(n), "image_id": str(n)} for n in numbers]
    write_rows(folder, SAMPLES, *({"image_id": str(number), "image": png(0)} for number in numbers))
    write_rows(folder, GENERATED_CAPTIONS, *(same | caption for caption in captions))


@pytest.fixture
def client(tmp_path: Path) -> TestClient:
    write_captions(tmp_path, 0)
    return open_client(tmp_path)


def open_client(tmp_path: Path) -> TestClient:
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
    page = client.get("/", headers=USER)
    assert page.status_code == 200
    token = token_of(page.text)
    for answer in (client.get("/"), client.get(PICTURE), client.post("/verdict", json=SAID, headers=token)):
        assert answer.status_code == 403
    assert client.get(PICTURE, headers=USER).status_code == 200
    assert client.post("/verdict", json=SAID, headers=USER).status_code == 403
    assert client.post("/verdict", json=SAID, headers=USER | token).json() == {"judged": 1}
    (row,) = DeltaTable(tmp_path / "verdicts").to_pyarrow_table().to_pylist()
    assert row["reviewer"] == "ana@example.com"


def test_the_page_shows_captions_that_were_written_after_the_start_of_the_server(
    client: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_captions(tmp_path, 1)
    assert "caption 1" not in client.get("/", headers=USER).text
    monkeypatch.setattr(verdicts, "REFRESH_SECONDS", 0)
    assert "caption 1" in client.get("/", headers=USER).text


def test_the_page_shows_the_text_of_a_correction_before_and_after_the_captions_are_read_again(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = token_of(client.get("/", headers=USER).text)
    corrected = SAID | {"verdict": "corrected", "text": "a green circle"}
    assert client.post("/verdict", json=corrected, headers=USER | token).status_code == 200
    for _ in range(2):
        page = client.get("/?show=judged", headers=USER).text
        assert re.findall(r'data-caption="([^"]*)">([^<]*)</textarea>', page) == [("caption 0", "a green circle")]
        monkeypatch.setattr(verdicts, "REFRESH_SECONDS", 0)
    assert client.post("/verdict", json=SAID, headers=USER | token).status_code == 200
    page = client.get("/?show=judged", headers=USER).text
    assert re.findall(r">([^<]*)</textarea>", page) == ["caption 0"]


@pytest.mark.parametrize("judged_numbers", [(), (0,), range(4)])
def test_next_and_previous_show_each_caption_that_was_not_judged_exactly_once(
    judged_numbers: Collection[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "PAGE_SIZE", 4)
    write_captions(tmp_path, *range(10), likelihood=lambda number: None if number > 7 else number // 2)
    client, numbers = open_client(tmp_path), list(range(10))
    page = client.get("/", headers=USER).text
    assert shown(page) == numbers[:4]
    for number in judged_numbers:
        judged = client.post("/verdict", json=SAID | {"image_id": str(number)}, headers=USER | token_of(page))
        assert judged.status_code == 200
    left = [number for number in numbers if number not in judged_numbers]
    second = client.get(links(page)["next"], headers=USER).text
    assert shown(second) == numbers[4:8]
    assert f"{left.index(4) + 1} to {left.index(7) + 1} of {len(left)}" in second
    third = client.get(links(second)["next"], headers=USER).text
    assert shown(third) == numbers[8:]
    assert "next" not in links(third)
    assert shown(client.get(links(third)["previous"], headers=USER).text) == numbers[4:8]
    assert ("previous" in links(second)) == (len(judged_numbers) < 4)
    if len(judged_numbers) < 4:
        before = client.get(links(second)["previous"], headers=USER).text
        assert shown(before) == left[: 4 - len(judged_numbers)]


def links(page: str) -> dict[str, str]:
    """Return the addresses of the links of a review page, by the text of the link."""
    return {text: unescape(address) for address, text in re.findall(r'<a href="([^"]+)">(\w+)</a>', page)}


def shown(page: str) -> list[int]:
    """Return the numbers of the captions that a review page shows."""
    return [int(number) for number in re.findall(r'data-image-id="(\d+)"', page)]


def token_of(page: str) -> dict[str, str]:
    """Return the header with which a verdict of a page is accepted."""
    return {"X-Lakesight-Token": re.findall(r'"X-Lakesight-Token": "([^"]+)"', page)[0]}

"""Tests that a page is self-contained and escapes all text that comes from data."""

from __future__ import annotations

import json
import re
from pathlib import Path

from pictures import encoded, picture

from pipelines.driver.ingest.quarantine_report import card_of
from pipelines.pages.page import Card, CardText, Chart, FormattedValue, Gallery, Page, write_page

EVIL = '<script>alert("x")</script>'


def write(path: Path, page: Page) -> str:
    write_page(path, page)
    return path.read_text(encoding="utf-8")


def test_a_page_is_self_contained_and_data_cannot_inject_html(tmp_path: Path) -> None:
    small = encoded(picture(1), "JPEG")
    cards = [Card(EVIL, small, [CardText(EVIL), CardText("two")]), Card("b", None, [], problem=EVIL)]
    page = Page(
        EVIL, EVIL, {EVIL: FormattedValue("7")}, charts=[Chart(EVIL, {EVIL: 3})], galleries=[Gallery(EVIL, cards)]
    )
    html = write(tmp_path / "deep" / "page.html", page)
    assert "<script" not in html
    assert not re.search(r"https?://|<link|<iframe", html)
    assert html.count("data:image/jpeg;base64,") == html.count("<img") == 1
    assert html.count("no picture") == 1
    assert re.findall(r'<figure class="(\w+)"', html) == ["good", "bad"]


def test_the_length_of_a_bar_on_a_page_is_proportional_to_its_value_and_may_be_zero(tmp_path: Path) -> None:
    chart = Chart("rows", {"a": 4000, "b": 1000, "c": 0})
    assert list(chart.bars) == [("a", "4,000", 100.0), ("b", "1,000", 25.0), ("c", "0", 0.0)]
    assert list(Chart("none", {}).bars) == []
    assert [percent for _, _, percent in Chart("zero", {"a": 0}).bars] == [0.0]
    html = write(tmp_path / "page.html", Page("t", "a", charts=[chart]))
    assert "width: 25.0%" in html


def test_the_card_of_a_refused_row_shows_its_texts_but_not_the_base64_of_its_picture() -> None:
    payload = json.dumps({"image": "iVBORw0KGgo" * 100, "text": "a red square"})
    row = {"source_row": "a.csv#1", "thumbnail": None, "payload": payload, "reason": "empty_text", "detail": "no text"}
    (text,) = card_of(row).texts
    assert text.text == '{"image": "iVBORw0KGgoiVBORw0KGgoiV...", "text": "a red square"}'

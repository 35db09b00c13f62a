"""Tests that the gallery page refers to no other file, escapes texts, and marks right and wrong captions."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Literal

import pytest
from browser import open_page
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipelines.config import load_model
from pipelines.driver.evaluate.bootstrap import Interval
from pipelines.driver.evaluate.gallery import (
    GalleryRow,
    ModelCaption,
    headline_bars,
    mark_differences,
    slice_tables,
    write_html,
    write_png,
)
from pipelines.driver.evaluate.scores import can_show_attention
from pipelines.driver.evaluate.verdict import verdict
from pipelines.pages.page import Gallery, Page, WordPicture, natural_key


def row(number: int, *, exact: bool, caption: str = "a red square") -> GalleryRow:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 48), (number * 40 % 256, 90, 120)).save(buffer, "JPEG")
    model = ModelCaption("Model", caption, exact, float(exact))
    return GalleryRow(f"x/{number}", buffer.getvalue(), "", "a red square", (model,), ("best" if exact else "worst",))


class Tags(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def write(path: Path, rows: list[GalleryRow]) -> str:
    metrics = {"exact_match": Interval(value=0.5, low=0.25, high=0.75)}
    page = Page(
        "tiny version 1",
        "4 pictures",
        tables=slice_tables({"format=<PNG>": metrics}, {"format=<PNG>": 4}),
        galleries=[Gallery("", [row.card() for row in rows])],
        verdict="It is <good>.",
        bars=headline_bars(metrics),
    )
    write_html(path, page, metrics)
    return path.read_text(encoding="utf-8")


def test_the_gallery_page_loads_no_other_file_and_no_url(tmp_path: Path) -> None:
    tags = Tags(write(tmp_path / "deep" / "gallery.html", [row(1, exact=True), row(2, exact=False)])).tags
    images = [attributes["src"] or "" for tag, attributes in tags if tag == "img"]
    assert len(images) == 2
    assert all(source.startswith("data:image/jpeg;base64,") for source in images)
    assert not {"link", "iframe"} & {tag for tag, _ in tags}
    assert [attributes for tag, attributes in tags if tag == "script"] == [{}]
    page = (tmp_path / "deep" / "gallery.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://", page)


def test_a_caption_cannot_inject_html_into_the_gallery_page(tmp_path: Path) -> None:
    evil = '<script>alert("x")</script><img src=x onerror=y>'
    page = write(tmp_path / "gallery.html", [row(1, exact=False, caption=evil)])
    assert evil not in page
    assert "&lt;script&gt;" in page
    assert [tag for tag, _ in Tags(page).tags if tag in ("img", "script")] == ["img", "script"]


def test_the_gallery_shows_the_attention_pictures_of_a_row_with_their_escaped_words(tmp_path: Path) -> None:
    plain = row(1, exact=False)
    assert plain.thumbnail
    looks = tuple(WordPicture(title, plain.thumbnail) for title in ("a 12%", "<b> 40%"))
    page = write(tmp_path / "gallery.html", [replace(plain, attention=looks), row(2, exact=False)])
    assert page.count('class="attention"') == 1
    assert re.findall("<small>([^<]*%)</small>", page) == ["a 12%", "&lt;b&gt; 40%"]
    assert sum(tag == "img" for tag, _ in Tags(page).tags) == 4


def test_the_gallery_of_a_model_with_too_many_attention_weights_shows_no_attention() -> None:
    model = load_model("nano")
    assert can_show_attention(model, 32)
    large = model.model_copy(update={"image": model.image.model_copy(update={"size": 64 * model.image.size})})
    assert not can_show_attention(large, 32)


def test_the_gallery_marks_right_and_wrong_captions_with_a_word_as_well_as_with_a_colour(tmp_path: Path) -> None:
    page = write(tmp_path / "gallery.html", [row(1, exact=True), row(2, exact=False, caption="a blue circle")])
    figures = [attributes["class"] for tag, attributes in Tags(page).tags if tag == "figure"]
    assert figures == ["good", "bad"]
    assert page.count("word for word") == page.count(">different<") == 1
    assert page.count("0.250 to 0.750") == 3
    assert "format=&lt;PNG&gt;" in page


def test_a_gallery_in_png_format_can_show_captions_with_any_characters(tmp_path: Path) -> None:
    rows = [row(n, exact=bool(n % 2), caption="$x^{2$ " + "long " * 40) for n in range(5)]
    write_png(tmp_path / "gallery.png", "tiny $1 version", rows)
    with Image.open(tmp_path / "gallery.png") as image:
        assert image.width == 1280
        assert image.height > 800


def test_the_filters_of_the_gallery_page_show_only_matching_pictures_in_a_browser(tmp_path: Path) -> None:
    rows = [row(n, exact=n == 0, caption="A red square" if n < 3 else "a blue circle") for n in range(5)]
    write(tmp_path / "gallery.html", rows)
    address = (tmp_path / "gallery.html").as_uri()
    with open_page(f"{address}#group=worst&find=BLUE") as page:
        assert [figure.is_visible() for figure in page.locator("figure").all()] == [False, False, False, True, True]
        assert page.locator("#shown").inner_text() == "2 of 5"
        page.get_by_label("Find").fill("red square")
        assert page.locator("figure:visible").count() == 4  # the search also finds words of the human captions
        page.get_by_label("Show").select_option("all")
        assert page.locator("figure:visible").count() == 5
        page.get_by_label("only captions that differ").check()
        assert page.locator("figure:visible").count() == 4
        assert page.url == f"{address}#find=red+square&wrong=1"


TEXTS = st.text("ab .,\n<", max_size=12)


@settings(max_examples=40)
@given(TEXTS, st.lists(TEXTS, min_size=1, max_size=3))
def test_no_word_is_marked_in_a_caption_that_equals_a_human_caption(caption: str, references: list[str]) -> None:
    assert "".join(text for text, _ in mark_differences(caption, references)) == caption
    assert not any(marked for _, marked in mark_differences(caption, [*references, caption]))


def test_the_gallery_marks_words_of_a_caption_that_the_most_similar_human_caption_lacks() -> None:
    human = ["a small red square", "a large blue circle left of a star"]
    marked = [text for text, differs in mark_differences("A large green circle, left of a star", human) if differs]
    assert marked == ["green"]
    assert mark_differences("", human) == (("", False),)
    assert [text for text, differs in mark_differences("two dogs", human) if differs] == ["two", "dogs"]


def test_bars_that_show_a_share_are_scaled_from_0_to_1_and_other_bars_to_the_largest_value() -> None:
    def exactly(value: float, reach: float = 0.0) -> Interval:
        return Interval(value=value, low=value - reach, high=value + reach)

    metrics = {"cider": exactly(4, 1), "constant_cider": exactly(1), "word_f1": exactly(0.5), "blind_gap": exactly(-1)}
    cider, f1, gap = headline_bars(metrics)
    assert [(bar.name, bar.percent, bar.low, bar.high, bar.main) for bar in cider.bars] == [
        ("model", 80.0, 60.0, 100.0, True),
        ("constant", 20.0, 20.0, 20.0, False),
    ]
    assert [bar.percent for bar in f1.bars] == [50.0]
    assert [(bar.percent, bar.value.text) for bar in gap.bars] == [(0.0, "-1.000")]


def test_the_gallery_sorts_evaluation_slices_by_the_numbers_in_their_names_and_shows_their_row_counts(
    tmp_path: Path,
) -> None:
    names = ["size=16", "size=8", "length=10 to 12", "size=100", "length=9 to 10"]
    ordered = ["length=9 to 10", "length=10 to 12", "size=8", "size=16", "size=100"]
    assert sorted(names, key=natural_key) == ordered
    cards = [row(n, exact=True).card() for n in range(len(names))]
    shown = Page(
        "t", "a", galleries=[Gallery("", [replace(c, groups=(n, "best")) for c, n in zip(cards, names, strict=True)])]
    )
    assert shown.groups == ["best", *ordered]
    page = write(tmp_path / "gallery.html", [row(1, exact=True)])
    assert re.search(r"<th>rows</th>.*format=&lt;PNG&gt;</th><td>4</td>", page, re.DOTALL)


def test_the_alternative_text_of_a_picture_is_its_human_caption(tmp_path: Path) -> None:
    tags = Tags(write(tmp_path / "gallery.html", [row(1, exact=False, caption="a blue circle")])).tags
    assert [attributes["alt"] for tag, attributes in tags if tag == "img"] == ["a red square"]


CUT_TEXTS = """cells => cells.map(cell => {
  const text = document.createRange();
  text.selectNodeContents(cell);
  return [cell.innerText, text.getBoundingClientRect().right - cell.getBoundingClientRect().right];
}).filter(([, excess]) => excess > 0.1)"""
"""JavaScript that returns each text that is wider than its cell, and the number of pixels that do not fit.

`scrollWidth` of a table cell does not show that the text is cut off."""


@pytest.mark.matrix
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_top_of_the_gallery_page_fits_on_the_screen_of_a_phone(
    tmp_path: Path, scheme: Literal["light", "dark"]
) -> None:
    names = ("cider", "word_f1", "exact_match", "rouge_l")
    metrics = {name: Interval(value=0.5, low=0.25, high=0.75) for name in (*names, "blind_gap")}
    metrics |= {f"{each}_{name}": metrics[name] for each in ("constant", "neighbour") for name in names}
    metrics["blind_gap"] = Interval(value=-0.888, low=-0.999, high=-0.777)  # these numbers have the longest texts
    page = Page(
        "birds version 12 on birds (test)",
        "about",
        galleries=[Gallery("", [row(n, exact=bool(n % 2), caption="a blue circle").card() for n in range(4)])],
        verdict=verdict(metrics, 843),
        bars=headline_bars(metrics),
    )
    write_html(tmp_path / "gallery.html", page, metrics)
    with open_page((tmp_path / "gallery.html").as_uri()) as tab:
        tab.emulate_media(color_scheme=scheme)
        tab.set_viewport_size({"width": 360, "height": 740})
        tab.screenshot(path=tmp_path / f"phone-{scheme}.png")
        assert tab.evaluate("document.documentElement.scrollWidth") == 360
        for locator in (tab.locator(".verdict"), tab.get_by_label("Show"), *tab.locator(".bars table").all()):
            box = locator.bounding_box()
            assert box is not None
            assert box["y"] + box["height"] <= 740
        for width in (360, 390, 768, 1280):
            tab.set_viewport_size({"width": width, "height": 740})
            assert tab.locator(".bars td").evaluate_all(CUT_TEXTS) == [], f"a figure is cut off at {width} pixels"

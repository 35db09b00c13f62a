"""The gallery page refers to no other file, escapes texts, and marks right and wrong captions."""

from __future__ import annotations

import io
import re
from html.parser import HTMLParser
from pathlib import Path

from browser import open_page
from PIL import Image

from pipelines.driver.evaluate.bootstrap import Interval
from pipelines.driver.evaluate.gallery import GalleryRow, ModelCaption, write_html, write_png


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
    write_html(path, "tiny version 1", "4 pictures", metrics, rows, slices={"format=<PNG>": metrics})
    return path.read_text(encoding="utf-8")


def test_the_gallery_page_refers_to_no_other_file_or_address(tmp_path: Path) -> None:
    tags = Tags(write(tmp_path / "deep" / "gallery.html", [row(1, exact=True), row(2, exact=False)])).tags
    images = [attributes["src"] or "" for tag, attributes in tags if tag == "img"]
    assert len(images) == 2
    assert all(source.startswith("data:image/jpeg;base64,") for source in images)
    assert not {"link", "iframe"} & {tag for tag, _ in tags}
    assert [attributes for tag, attributes in tags if tag == "script"] == [{}]
    page = (tmp_path / "deep" / "gallery.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://", page)


def test_captions_cannot_inject_html(tmp_path: Path) -> None:
    evil = '<script>alert("x")</script><img src=x onerror=y>'
    page = write(tmp_path / "gallery.html", [row(1, exact=False, caption=evil)])
    assert evil not in page
    assert "&lt;script&gt;" in page
    assert [tag for tag, _ in Tags(page).tags if tag in ("img", "script")] == ["img", "script"]


def test_right_and_wrong_captions_are_marked_by_text_and_by_colour(tmp_path: Path) -> None:
    page = write(tmp_path / "gallery.html", [row(1, exact=True), row(2, exact=False, caption="a blue circle")])
    figures = [attributes["class"] for tag, attributes in Tags(page).tags if tag == "figure"]
    assert figures == ["good", "bad"]
    assert page.count("word for word") == page.count(">different<") == 1
    assert page.count("0.250 to 0.750") == 2
    assert "format=&lt;PNG&gt;" in page


def test_the_png_gallery_accepts_captions_with_any_characters(tmp_path: Path) -> None:
    rows = [row(n, exact=bool(n % 2), caption="$x^{2$ " + "long " * 40) for n in range(5)]
    write_png(tmp_path / "gallery.png", "tiny $1 version", rows)
    with Image.open(tmp_path / "gallery.png") as image:
        assert image.width == 1280
        assert image.height > 800


def test_the_filters_of_the_gallery_page_work_in_a_browser(tmp_path: Path) -> None:
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

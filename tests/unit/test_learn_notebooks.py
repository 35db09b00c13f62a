"""Tests that the notebooks in notebooks/learn/ run, and that the pages in docs/learn/ show these notebooks."""

from __future__ import annotations

import itertools
import json
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

ROOT = Path(__file__).parents[2]
LEARN = runpy.run_path(str(ROOT / ".ci" / "learn.py"), run_name="learn")
SOURCES = sorted((ROOT / "notebooks" / "learn").glob("*.py"))
SHORT = ("01_patches", "02_attention")
"""Notebooks that run in a few seconds. All other notebooks train a model for up to a minute."""
MAX_PAGE_BYTES = 400_000
MAX_PRINTED = 40
"""Longest printed line, in characters. A phone breaks a longer line inside a word or a number."""
PHONE_WIDTH, MIN_TEXT_HEIGHT = 320, 8
"""Width of a figure on a phone, and the smallest font size that is readable there, in pixels."""
OBJECT_REPR = re.compile(r"<[\w.]+ (object )?at 0x|tensor\(|<[a-z]+ '")


def page_of(source: Path) -> Path:
    return ROOT / "docs" / "learn" / f"{source.stem}.ipynb"


def read_page(source: Path) -> dict[str, Any]:
    page: dict[str, Any] = json.loads(page_of(source).read_text(encoding="utf-8"))
    return page


def printed(outputs: list[dict[str, Any]]) -> list[str]:
    return [line for output in outputs if output["output_type"] == "stream" for line in output["text"]]


def labels_of_hidden_ticks(axes: Axes) -> Iterator[Text]:
    """Yield the labels that matplotlib keeps but does not draw: the labels of ticks outside the limits of an axis."""
    for axis in (axes.xaxis, axes.yaxis):
        low, high = sorted(axis.get_view_interval())
        for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
            if not axes.axison or not low <= tick.get_loc() <= high:
                yield from (tick.label1, tick.label2)


def check_labels(figure: Figure) -> None:
    """Check that the labels of a figure do not overlap, are not cut, and are large enough on a phone."""
    figure.draw_without_rendering()
    hidden = {id(label) for axes in figure.axes for label in labels_of_hidden_ticks(axes)}
    texts = [each for each in figure.findobj(Text) if each.get_visible() and id(each) not in hidden]
    boxes = [(each.get_text(), each.get_window_extent()) for each in texts if each.get_text().strip()]
    overlaps = [(a, b) for (a, one), (b, two) in itertools.combinations(boxes, 2) if one.padded(-1).overlaps(two)]
    width, height = figure.bbox.size
    cut = [text for text, box in boxes if box.x0 < -1 or box.y0 < -1 or box.x1 > width + 1 or box.y1 > height + 1]
    scale = PHONE_WIDTH / (72 * figure.get_figwidth())
    heights = [(each.get_text(), float(each.get_fontsize()) * scale) for each in texts if each.get_text().strip()]
    small = [text for text, height in heights if height < MIN_TEXT_HEIGHT]
    assert (overlaps, cut, small) == ([], [], []), figure.axes[0].get_title() if figure.axes else ""


def test_the_check_of_notebook_figures_finds_overlapping_labels_cut_labels_and_small_labels() -> None:
    figure = Figure(figsize=(2, 2), layout="constrained")
    figure.text(0.5, 0.5, "one")
    figure.subplots().set_title("a title")
    check_labels(figure)
    figure.text(0.52, 0.5, "two")
    with pytest.raises(AssertionError, match="one"):
        check_labels(figure)
    figure = Figure(figsize=(2, 2), layout="constrained")
    figure.subplots().set_title("a title that is much longer than the figure is wide")
    with pytest.raises(AssertionError, match="much longer"):
        check_labels(figure)
    figure = Figure(figsize=(8, 4), layout="constrained")
    figure.text(0.5, 0.5, "too small on a phone", fontsize=9)
    with pytest.raises(AssertionError, match="too small"):
        check_labels(figure)


@pytest.mark.parametrize(
    "source",
    [pytest.param(each, id=each.stem, marks=() if each.stem in SHORT else pytest.mark.matrix) for each in SOURCES],
)
def test_a_learning_notebook_and_its_solutions_run_without_errors_and_print_only_short_lines(source: Path) -> None:
    outputs = LEARN["run_cells"](source, check_labels)
    lines = [line for shown in outputs for line in printed(shown)]
    assert lines
    assert [line for line in lines if OBJECT_REPR.search(line) or len(line.rstrip()) > MAX_PRINTED] == []


@pytest.mark.parametrize("source", SOURCES, ids=lambda each: each.stem)
def test_the_docs_page_of_a_notebook_has_all_cells_of_the_notebook_and_prints_no_object_address(source: Path) -> None:
    page = read_page(source)
    cells = LEARN["read_cells"](source)
    empty = LEARN["to_notebook"](cells, [[] for _ in cells])
    shown = [(cell["cell_type"], cell["source"]) for cell in page["cells"]]
    assert shown == [(cell["cell_type"], cell["source"]) for cell in empty["cells"]], "run: python .ci/learn.py"
    outputs = [output for cell in page["cells"] for output in cell.get("outputs", [])]
    assert any(output["output_type"] == "display_data" for output in outputs)
    assert [line for line in printed(outputs) if OBJECT_REPR.search(line)] == []
    assert page_of(source).stat().st_size < MAX_PAGE_BYTES


@pytest.mark.parametrize("source", SOURCES, ids=lambda each: each.stem)
def test_the_notebook_ends_with_three_exercises_and_the_next_step(source: Path) -> None:
    text = "\n".join(cell.text for cell in LEARN["read_cells"](source))
    assert text.count("<details><summary>Solution</summary>") == text.count("</details>") == 3
    assert len(LEARN["solutions"](LEARN["read_cells"](source))) == 3
    assert re.search(r"^\*\*Next:\*\*", text, re.M)
    following = SOURCES[SOURCES.index(source) + 1 :][:1]
    assert [each.name for each in following if f"({each.name})" not in text] == []


def test_the_index_page_links_all_notebooks_in_their_order() -> None:
    index = (ROOT / "docs" / "learn" / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"\]\((\d\d_\w+)\.ipynb\)", index) == [source.stem for source in SOURCES]

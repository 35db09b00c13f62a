"""Run the notebooks of notebooks/learn/, and write them with their outputs to docs/learn/ as .ipynb files.

Each notebook is a Python file in the source format of Databricks. All cells of a notebook run in one namespace, in this
process. What a cell prints, and the figures that the cell draws, become the outputs of the cell. The solutions of the
exercises are code blocks inside `<details>` of a text cell. After all cells, the solutions run too, so that an error in
a solution is found.

    python .ci/learn.py             write all notebooks
    python .ci/learn.py 01_patches  write one notebook
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from PIL import Image

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "notebooks" / "learn"
PAGES = ROOT / "docs" / "learn"

HEADER = "# Databricks notebook source\n"
SEPARATOR = "\n# COMMAND ----------\n"
MAGIC = "# MAGIC "
MARKDOWN = "%md"
LINK = re.compile(r"\((\d\d_\w+)\.py\)")
"""Pattern of a link to another notebook's source. In the output, the link leads to that notebook's .ipynb file."""

OnFigure = Callable[[Figure], None]


class Cell(NamedTuple):
    """Cell of a notebook: `kind` is "markdown" or "code", and `text` is the content without the Databricks markers."""

    kind: str
    text: str


def read_cells(path: Path) -> list[Cell]:
    """Read the cells of a notebook in the source format of Databricks.

    Raises:
        ValueError: the file does not have this format.
    """
    content = path.read_text(encoding="utf-8")
    if not content.startswith(HEADER):
        raise ValueError(f"{path} does not begin with {HEADER.strip()!r}")
    return [_parse_cell(part.strip("\n")) for part in content.removeprefix(HEADER).split(SEPARATOR)]


def _parse_cell(text: str) -> Cell:
    if not text.startswith(MAGIC + MARKDOWN):
        return Cell("code", text)
    lines = [line.removeprefix(MAGIC.rstrip()).removeprefix(" ") for line in text.splitlines()[1:]]
    return Cell("markdown", "\n".join(lines).strip("\n"))


def solutions(cells: list[Cell]) -> list[str]:
    """Return the code of all solutions, which are code blocks inside `<details>`."""
    hidden = [part for cell in cells for part in re.findall(r"<details>(.*?)</details>", cell.text, re.S)]
    return [code for part in hidden for code in re.findall(r"^```python\n(.*?)^```", part, re.M | re.S)]


def run_cells(path: Path, on_figure: OnFigure = lambda figure: None) -> list[list[dict[str, Any]]]:
    """Run all cells of a notebook and then the solutions, and return the outputs of each cell.

    Args:
        path: path of the notebook's source file.
        on_figure: function that is called with each figure before the figure is closed.
    """
    cells = read_cells(path)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    outputs: list[list[dict[str, Any]]] = []
    with plt.rc_context():
        for number, cell in enumerate(cells, 1):
            name = f"{path.name}, cell {number}"
            outputs.append(_run(cell.text, name, namespace, on_figure) if cell.kind == "code" else [])
        for number, code in enumerate(solutions(cells), 1):
            _run(code, f"{path.name}, solution {number}", namespace, on_figure)
    return outputs


def _run(code: str, name: str, namespace: dict[str, Any], on_figure: OnFigure) -> list[dict[str, Any]]:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, name, "exec"), namespace)  # noqa: S102 (our own notebooks)
        outputs = [_text_output(printed.getvalue())] if printed.getvalue() else []
        for number in plt.get_fignums():
            figure = plt.figure(number)
            on_figure(figure)
            outputs.append(_image_output(figure))
            plt.close(figure)
    return outputs


def _text_output(text: str) -> dict[str, Any]:
    return {"output_type": "stream", "name": "stdout", "text": text.splitlines(keepends=True)}


def _image_output(figure: Figure) -> dict[str, Any]:
    """Draw a figure as a PNG with a palette of 256 colours, which has about a third of the size of an RGB picture."""
    drawn, packed = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=110, facecolor="white")
    Image.open(drawn).convert("RGB").quantize(256).save(packed, "PNG", optimize=True)
    png = base64.b64encode(packed.getvalue()).decode("ascii")
    return {"output_type": "display_data", "metadata": {}, "data": {"image/png": png}}


def to_notebook(cells: list[Cell], outputs: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """Return a notebook in version 4.5 of Jupyter's format."""
    made: list[dict[str, Any]] = []
    for number, (cell, shown) in enumerate(zip(cells, outputs, strict=True), 1):
        entry: dict[str, Any] = {"cell_type": cell.kind, "id": f"cell-{number}", "metadata": {}}
        entry["source"] = LINK.sub(r"(\1.ipynb)", cell.text).splitlines(keepends=True)
        if cell.kind == "code":
            entry |= {"execution_count": number, "outputs": shown}
        made.append(entry)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {
        "cells": made,
        "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def chosen_sources(names: list[str]) -> Iterator[Path]:
    """Yield the sources with the given names, or all sources if no name is given."""
    for path in sorted(SOURCES.glob("*.py")):
        if not names or path.stem in names:
            yield path


def main() -> None:
    """Run the notebooks that are given on the command line, and write their pages."""
    PAGES.mkdir(exist_ok=True)
    for path in chosen_sources(sys.argv[1:]):
        notebook = to_notebook(read_cells(path), run_cells(path))
        page = PAGES / f"{path.stem}.ipynb"
        page.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"{page.relative_to(ROOT)}  {page.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main()

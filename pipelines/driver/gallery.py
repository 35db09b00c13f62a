"""A gallery of pictures with the human and the generated caption side by side: one HTML file, and one PNG for a README.

The HTML holds everything it shows (pictures as data: URIs, no script), so it opens offline and survives being mailed.
Captions come from data and from a model, so the template escapes them.
"""

from __future__ import annotations

import base64
import io
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from pipelines.driver.metrics import Interval

MAX_CARDS = 48
PNG_CARDS = 12
PNG_COLUMNS = 4
_SHOWN = {
    "exact_match": "exact match",
    "floor_exact_match": "exact match, best constant",
    "blind_gap": "blind gap, nats/token",
    "loss": "loss, nats/token",
    "word_f1": "word F1",
    "floor_word_f1": "word F1, best constant",
    "cider": "CIDEr",
    "floor_cider": "CIDEr, best constant",
    "bleu_4": "BLEU-4",
    "rouge_l": "ROUGE-L",
    "distinct": "distinct captions",
    "words": "words a caption",
}


@dataclass(frozen=True)
class Card:
    """One picture of the gallery. `thumbnail` is a small JPEG file."""

    image_id: str
    thumbnail: bytes
    prompt: str
    human: str
    caption: str
    exact: bool

    @property
    def data_uri(self) -> str:
        """The thumbnail as a data: URI."""
        return f"data:image/jpeg;base64,{base64.b64encode(self.thumbnail).decode('ascii')}"


def write_html(path: Path, title: str, about: str, metrics: Mapping[str, Interval], cards: Sequence[Card]) -> None:
    """Write the gallery page."""
    source = resources.files("pipelines.driver").joinpath("gallery.html.j2").read_text(encoding="utf-8")
    page = Environment(autoescape=True, undefined=StrictUndefined).from_string(source)
    shown = [
        {
            "name": name,
            "value": f"{metrics[key].value:.3f}",
            "range": _range(metrics[key]),
        }
        for key, name in _SHOWN.items()
        if key in metrics
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page.render(title=title, about=about, metrics=shown, cards=cards), encoding="utf-8")


def write_png(path: Path, title: str, cards: Sequence[Card]) -> None:
    """Write the first PNG_CARDS pictures as a grid. Not by pyplot, which keeps global state and looks for a display."""
    shown = cards[:PNG_CARDS]
    rows = -(-len(shown) // PNG_COLUMNS)
    figure = Figure(figsize=(3.2 * PNG_COLUMNS, 4.1 * rows + 0.7), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(_plain(title), fontsize=14)
    for number, axes in enumerate(figure.subplots(rows, PNG_COLUMNS, squeeze=False).flat):
        axes.set_axis_off()
        if number >= len(shown):
            continue
        card = shown[number]
        axes.imshow(Image.open(io.BytesIO(card.thumbnail)).convert("RGB"), interpolation="nearest")
        axes.set_anchor("S")
        axes.set_title(_wrapped(f"human: {card.human}"), loc="left", fontsize=9)
        colour = "#1a7f45" if card.exact else "#b3341f"
        below = {"transform": axes.transAxes, "va": "top", "fontsize": 9, "color": colour}
        axes.text(0, -0.03, _wrapped(f"model: {card.caption}"), **below)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _range(metric: Interval) -> str:
    return f"{metric.low:.3f} to {metric.high:.3f}" if metric.low < metric.high else ""


def _wrapped(text: str) -> str:
    """At most four lines as wide as a picture."""
    return _plain("\n".join(textwrap.wrap(text, 40, max_lines=4, placeholder=" ...")))


def _plain(text: str) -> str:
    """Matplotlib reads dollar signs as formulas."""
    return text.replace("$", r"\$")

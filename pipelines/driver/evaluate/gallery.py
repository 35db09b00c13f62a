"""Pictures with what people wrote and what models say, side by side: one HTML file, and PNGs for a README and MLflow.

The HTML holds everything it shows (pictures as data: URIs, its few lines of script too), so it opens offline and
survives being mailed. Captions come from data and from a model, so the template escapes them.
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

from pipelines.driver.evaluate.bootstrap import Interval
from pipelines.driver.evaluate.metrics import Scored

GROUP_ROWS = 16
"""Rows of each group: worst, best, and a sample of the others."""
PNG_CARDS = 12
PNG_COLUMNS = 4
NAMES = {
    "exact_match": "exact match",
    "constant_exact_match": "exact match, best constant",
    "neighbour_exact_match": "exact match, nearest neighbour",
    "word_f1": "word F1",
    "constant_word_f1": "word F1, best constant",
    "neighbour_word_f1": "word F1, nearest neighbour",
    "cider": "CIDEr",
    "constant_cider": "CIDEr, best constant",
    "neighbour_cider": "CIDEr, nearest neighbour",
    "bleu_4": "BLEU-4",
    "rouge_l": "ROUGE-L",
    "meteor": "METEOR",
    "loss": "loss, nats/token",
    "token_accuracy": "token accuracy",
    "blind_gap": "blind gap, nats/token",
    "blank_gap": "gap to a grey picture",
    "noise_gap": "gap to noise",
    "distinct": "distinct captions",
    "distinct_2": "distinct pairs of words",
    "distinct_words": "words of 100 captions",
    "words": "words a caption",
    "mean_logprob": "log-probability, nats/token",
    "error_share": "share of errors",
    "captions_per_second": "captions a second and process",
}
PLOTTED = ("exact_match", "word_f1", "rouge_l", "bleu_4")


@dataclass(frozen=True)
class Answer:
    """What one model says. `score` is word F1."""

    label: str
    text: str
    exact: bool
    score: float


@dataclass(frozen=True)
class Card:
    """One picture of the gallery. `thumbnail` is a small JPEG file; `groups` are what the page can be filtered by."""

    image_id: str
    thumbnail: bytes
    prompt: str
    human: str
    answers: tuple[Answer, ...]
    groups: tuple[str, ...]

    @property
    def data_uri(self) -> str:
        """The thumbnail as a data: URI."""
        return f"data:image/jpeg;base64,{base64.b64encode(self.thumbnail).decode('ascii')}"

    @property
    def exact(self) -> bool:
        """Whether every answer is right word for word."""
        return all(answer.exact for answer in self.answers)

    @property
    def text(self) -> str:
        """What a search looks into."""
        return " ".join([self.image_id, self.prompt, self.human, *(a.text for a in self.answers)]).lower()


def select_rows(scored: Sequence[Scored]) -> list[tuple[Scored, tuple[str, ...]]]:
    """Rows to show, the worst first, each with its groups: worst, best, and a sample (shards are shuffled: a fair one).

    Of few rows all are shown, and one may be of several groups.
    """
    ordered = sorted(scored, key=lambda item: (item.f1, -item.loss / max(1, item.num_targets), item.row))
    groups = {"worst": ordered[:GROUP_ROWS], "best": ordered[::-1][:GROUP_ROWS]}
    ends = {item.key for group in groups.values() for item in group}
    others = [item for item in scored if item.key not in ends] or list(scored)
    groups["sample"] = others[:GROUP_ROWS]
    members = {name: {item.key for item in group} for name, group in groups.items()}
    named = [(item, tuple(name for name, keys in members.items() if item.key in keys)) for item in ordered]
    return [(item, names) for item, names in named if names]


def write_html(
    path: Path,
    title: str,
    about: str,
    metrics: Mapping[str, Interval],
    cards: Sequence[Card],
    *,
    slices: Mapping[str, Mapping[str, Interval]] | None = None,
    signed: bool = False,
) -> None:
    """Write the page: figures, figures of slices, and cards that can be searched and filtered by group.

    `signed` figures are differences, and tell a gain by its sign.
    """
    source = resources.files("pipelines.pages").joinpath("gallery.html.j2").read_text(encoding="utf-8")
    page = Environment(autoescape=True, undefined=StrictUndefined).from_string(source)
    shown = [
        {"name": name, "value": _figure(metrics[key].value, signed), "range": _range(metrics[key], signed)}
        for key, name in NAMES.items()
        if key in metrics
    ]
    columns = list(next(iter(slices.values()), {})) if slices else []
    rows = {
        name: [(_figure(part[column].value), _range(part[column])) for column in columns]
        for name, part in (slices or {}).items()
    }
    groups = list(dict.fromkeys(group for card in cards for group in card.groups))
    html = page.render(
        title=title,
        about=about,
        metrics=shown,
        cards=cards,
        groups=groups,
        columns=[NAMES.get(column, column) for column in columns],
        slices=rows,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(html, encoding="utf-8")


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
        axes.text(0, -0.03, _wrapped(f"model: {card.answers[0].text}"), **below)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def write_figures(
    path: Path, title: str, metrics: Mapping[str, Interval], slices: Mapping[str, Mapping[str, Interval]]
) -> None:
    """Write figures with their intervals beside those of the baselines, and word F1 of each slice, as one picture."""
    bars = {
        NAMES.get(f"{prefix}{name}", f"{name}, {prefix.rstrip('_')}"): metrics[f"{prefix}{name}"]
        for name in PLOTTED
        for prefix in ("", "constant_", "neighbour_")
        if f"{prefix}{name}" in metrics
    } | {f"word F1, {name}": part["word_f1"] for name, part in slices.items()}
    figure = Figure(figsize=(8, 1 + 0.26 * len(bars)), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    values = [bar.value for bar in bars.values()]
    reach = [
        [max(0.0, bar.value - bar.low) for bar in bars.values()],
        [max(0.0, bar.high - bar.value) for bar in bars.values()],
    ]
    axes.barh([_plain(name) for name in bars], values, xerr=reach, color="#9db8d6")
    axes.invert_yaxis()
    axes.set_title(_plain(title), fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _figure(value: float, signed: bool = False) -> str:
    """Three digits behind the point, none of a number in the hundreds."""
    return f"{value:{'+' if signed else ''},.{0 if abs(value) >= 100 else 3}f}"


def _range(metric: Interval, signed: bool = False) -> str:
    return f"{_figure(metric.low, signed)} to {_figure(metric.high, signed)}" if metric.low < metric.high else ""


def _wrapped(text: str) -> str:
    """At most four lines as wide as a picture."""
    return _plain("\n".join(textwrap.wrap(text, 40, max_lines=4, placeholder=" ...")))


def _plain(text: str) -> str:
    """Matplotlib reads dollar signs as formulas."""
    return text.replace("$", r"\$")

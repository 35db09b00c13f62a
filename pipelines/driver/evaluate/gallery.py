"""Gallery of an evaluation: pictures with human captions and model captions, as an HTML page and as PNG files."""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from pipelines.driver.evaluate.bootstrap import Interval
from pipelines.driver.evaluate.metrics import ScoredRow
from pipelines.pages.page import (
    Bar,
    BarGroup,
    Card,
    CardText,
    FormattedValue,
    Page,
    ValueTable,
    WordPicture,
    write_page,
)
from vlm.files import atomic_write
from vlm.text.words import words

GROUP_ROWS = 16
"""Largest number of rows in each of the groups of a page, such as `worst`, `best` and `sample`."""
PNG_ROWS = 12
PNG_COLUMNS = 4
NAMES = {  # names of the metrics on HTML pages, in the order of the page
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
    "coco_cider": "COCO CIDEr-D",
    "coco_bleu_4": "COCO BLEU-4",
    "coco_rouge_l": "COCO ROUGE-L",
    "coco_meteor": "COCO METEOR",
    "chair_i": "mentions of objects that no human text mentions (CHAIRi)",
    "chair_s": "captions that mention an object that no human text mentions (CHAIRs)",
    "object_mentions": "objects mentioned per caption",
    "loss": "loss, nats/token",
    "token_accuracy": "token accuracy",
    "blind_gap": "blind gap, nats/token",
    "blank_gap": "gap to a grey picture",
    "noise_gap": "gap to noise",
    "distinct": "distinct captions",
    "distinct_2": "distinct pairs of words",
    "distinct_words": "words of 100 captions",
    "words": "words per caption",
    "mean_logprob": "log-probability, nats/token",
    "error_share": "share of errors",
    "captions_per_second": "captions per second and process",
}
HEADLINES = ("cider", "word_f1", "exact_match", "rouge_l", "blind_gap")
"""Metrics that pages show first, next to the same metrics of the baselines."""
SHARES = ("exact_match", "word_f1", "rouge_l")
"""Metrics with values from 0 to 1, whose bars are drawn on a scale from 0 to 1."""
WORD_GAP = re.compile(r"(\s+)")
ABOUT_ATTENTION = (
    "The worst rows also show where the model looked. Each word has a small picture, in which orange patches got the "
    "most attention. The number beside a word is the share of the word's attention that goes to the picture."
)
PLOTTED = ("exact_match", "word_f1", "rouge_l", "bleu_4")


@dataclass(frozen=True)
class ModelCaption:
    """Caption that the model named `label` has generated for a picture.

    `exact` says whether `text` equals a reference. `score` is word F1 from 0 to 1.
    `parts` has the consecutive parts of the text, each with a flag that says whether the part differs from the most
    similar reference.
    """

    label: str
    text: str
    exact: bool
    score: float
    parts: tuple[tuple[str, bool], ...] = ()

    @classmethod
    def of_row(cls, label: str, row: ScoredRow) -> ModelCaption:
        """Return the caption of a scored row."""
        text = row.caption or ""
        return cls(label, text, row.exact, row.f1, mark_differences(text, row.references))


@dataclass(frozen=True)
class GalleryRow:
    """One picture of the gallery.

    Attributes:
        image_id: id of the picture, as in the table `samples`.
        thumbnail: small JPEG file, or None if the picture cannot be decoded or is no longer in the table.
        prompt: text before the caption; a plain caption has an empty prompt.
        human: human captions (references), separated by slashes.
        captions: captions by the models, one caption per model.
        groups: names of the groups by which a reader can filter the page.
        attention: for each word of the model's caption, a picture that shows where the model looked; empty to show
            none.
    """

    image_id: str
    thumbnail: bytes | None
    prompt: str
    human: str
    captions: tuple[ModelCaption, ...]
    groups: tuple[str, ...]
    attention: tuple[WordPicture, ...] = ()

    @property
    def exact(self) -> bool:
        """Whether every caption equals one of the references."""
        return all(caption.exact for caption in self.captions)

    def card(self) -> Card:
        """Return the row as a card of a page."""
        texts = [CardText(self.prompt, "Prompt")] if self.prompt else []
        texts.append(CardText(self.human, "Human"))
        texts += [CardText(each.text, each.label, each.exact, each.score, each.parts) for each in self.captions]
        return Card(self.image_id, self.thumbnail, texts, groups=self.groups, attention=self.attention)


def select_rows(scored: Sequence[ScoredRow]) -> list[tuple[ScoredRow, tuple[str, ...]]]:
    """Select the worst rows, the best rows and a sample of all other rows. Return the rows with their group names.

    The worst row comes first. The sample consists of the first rows that are neither among the worst nor among the best
    rows. The first rows are a random sample, because shards are shuffled. If the split is small, all rows are selected,
    and a row may be in several groups.
    """
    ordered = sorted(scored, key=lambda item: (item.f1, -item.loss / max(1, item.num_targets), item.row))
    groups = {"worst": ordered[:GROUP_ROWS], "best": ordered[::-1][:GROUP_ROWS]}
    ends = {item.key for group in groups.values() for item in group}
    others = [item for item in scored if item.key not in ends] or list(scored)
    groups["sample"] = others[:GROUP_ROWS]
    members = {name: {item.key for item in group} for name, group in groups.items()}
    named = [(item, tuple(name for name, keys in members.items() if item.key in keys)) for item in ordered]
    return [(item, names) for item, names in named if names]


def mark_differences(caption: str, references: Sequence[str]) -> tuple[tuple[str, bool], ...]:
    """Split a caption into parts, and mark each word that the most similar reference lacks at the same place."""
    split = [WORD_GAP.split(text) for text in (caption, *references)]
    keys = [[" ".join(words(token)) or token.strip() for token in tokens[::2]] for tokens in split]
    own, tokens = keys[0], split[0]
    matchers = [SequenceMatcher(None, other, own, autojunk=False) for other in keys[1:]]
    best = max(matchers, key=lambda matcher: matcher.ratio())
    same = {at for block in best.get_matching_blocks() for at in range(block.b, block.b + block.size)}
    parts: list[tuple[str, bool]] = []
    for number, token in enumerate(tokens):
        differs = number % 2 == 0 and bool(token) and number // 2 not in same
        if parts and parts[-1][1] == differs:
            parts[-1] = (parts[-1][0] + token, differs)
        else:
            parts.append((token, differs))
    return tuple(parts)


def write_html(path: Path, page: Page, metrics: Mapping[str, Interval], *, signed: bool = False) -> None:
    """Write an HTML page with all metrics that have a name in NAMES.

    Args:
        path: path of the HTML file to write.
        page: contents of the page, to which this function adds the metrics.
        metrics: a dict from the name of a metric to its value on the split, or to a difference of two values.
        signed: whether the metrics are differences, which are shown with a plus or minus sign.
    """
    figures = {name: _format(metrics[key], signed) for key, name in NAMES.items() if key in metrics}
    write_page(path, replace(page, figures=figures))


def bar_group(name: str, bars: Mapping[str, Interval], note: str = "") -> BarGroup:
    """Return bars of one metric on a common scale, which begins at 0. The first bar is marked as the main bar.

    Args:
        name: name of the metric.
        bars: bars to draw: a dict from the name of a bar, such as 'model', to the value and interval of the metric.
        note: text to show after the name of the metric.
    """
    largest = max(max(each.high, each.value) for each in bars.values())
    scale = 100 / max(largest, 1.0 if name in SHARES else 1e-9)

    def place(value: float) -> float:
        return round(min(100.0, max(0.0, value * scale)), 1)

    found = [
        Bar(label, _format(each), place(each.value), place(each.low), place(each.high), main=number == 0)
        for number, (label, each) in enumerate(bars.items())
    ]
    return BarGroup(f"{NAMES[name]}{note}", found)


def headline_bars(metrics: Mapping[str, Interval]) -> list[BarGroup]:
    """Return bars of the main metrics of a model, next to the same metrics of the baselines."""
    labels = {"model": "", "constant": "constant_", "neighbour": "neighbour_"}
    return [
        bar_group(
            name, {label: metrics[key] for label, prefix in labels.items() if (key := f"{prefix}{name}") in metrics}
        )
        for name in HEADLINES
        if name in metrics
    ]


def slice_tables(slices: Mapping[str, Mapping[str, Interval]], rows: Mapping[str, int]) -> list[ValueTable]:
    """Return a list with one table that shows all slices, or an empty list if there are no slices.

    Args:
        slices: a dict from the name of a slice (`column=value`) to the metrics of the slice, in the order of the page.
        rows: a dict from the name of a slice to its number of rows; empty for a report of an earlier Lakesight version.
    """
    if not slices:
        return []
    columns = list(next(iter(slices.values())))
    values = {
        name: [
            FormattedValue(f"{rows[name]:,}" if name in rows else ""),
            *(_format(part[column]) for column in columns),
        ]
        for name, part in slices.items()
    }
    return [ValueTable("By slice", ["rows", *(NAMES.get(column, column) for column in columns)], values)]


def write_png(path: Path, title: str, rows: Sequence[GalleryRow]) -> None:
    """Write a PNG file that shows at most PNG_ROWS pictures in a grid, with the human caption and the model caption.

    This function uses matplotlib without pyplot, because pyplot keeps global state and looks for a display.
    """
    shown = rows[:PNG_ROWS]
    lines = -(-len(shown) // PNG_COLUMNS)
    figure = Figure(figsize=(3.2 * PNG_COLUMNS, 4.1 * lines + 0.7), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(_escape_dollars(title), fontsize=14)
    for number, axes in enumerate(figure.subplots(lines, PNG_COLUMNS, squeeze=False).flat):
        axes.set_axis_off()
        if number >= len(shown):
            continue
        row = shown[number]
        if row.thumbnail:
            axes.imshow(Image.open(io.BytesIO(row.thumbnail)).convert("RGB"), interpolation="nearest")
        axes.set_anchor("S")
        axes.set_title(_wrap(f"human: {row.human}"), loc="left", fontsize=9)
        colour = "#1a7f45" if row.exact else "#b3341f"
        below = {"transform": axes.transAxes, "va": "top", "fontsize": 9, "color": colour}
        axes.text(0, -0.03, _wrap(f"model: {row.captions[0].text}"), **below)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png")


def write_figures(
    path: Path, title: str, metrics: Mapping[str, Interval], slices: Mapping[str, Mapping[str, Interval]]
) -> None:
    """Write a bar chart that shows the metrics of the model and the baselines, and word F1 of each slice."""
    bars = {
        f"{NAMES.get(name, name)}{label}": metrics[f"{prefix}{name}"]
        for name in PLOTTED
        for prefix, label in (("", ""), ("constant_", ", best constant"), ("neighbour_", ", nearest neighbour"))
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
    axes.barh([_escape_dollars(name) for name in bars], values, xerr=reach, color="#9db8d6")
    axes.invert_yaxis()
    axes.set_title(_escape_dollars(title), fontsize=10)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png")


def _format(metric: Interval, signed: bool = False) -> FormattedValue:
    """Format a metric and its interval. An interval of zero width is not shown."""
    interval = f"{_digits(metric.low, signed)} to {_digits(metric.high, signed)}" if metric.low < metric.high else ""
    return FormattedValue(_digits(metric.value, signed), interval)


def _digits(value: float, signed: bool) -> str:
    """Format a number with three decimals, or without decimals if the number is 100 or more."""
    return f"{value:{'+' if signed else ''}z,.{0 if abs(value) >= 100 else 3}f}"


def _wrap(text: str) -> str:
    """Wrap a text into at most four lines that are as wide as a picture."""
    return _escape_dollars("\n".join(textwrap.wrap(text, 40, max_lines=4, placeholder=" ...")))


def _escape_dollars(text: str) -> str:
    """Escape dollar signs, because matplotlib reads a text between two dollar signs as a formula."""
    return text.replace("$", r"\$")

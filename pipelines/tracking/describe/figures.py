"""Functions that draw the figures of an MLflow run: learning curve, blind gap, expert load, and lengths of captions.

No function uses pyplot, because pyplot keeps global state. matplotlib is imported inside the functions, because the
import takes half a second.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING

import numpy as np

from pipelines.formats.run_folder import Metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LEARNING_CURVE = "learning_curve.png"
EXPERT_LOAD = "expert_load.png"
MAX_LAYERS = 12
"""Largest number of layers for which each expert's share of the tokens is drawn over time.

If a model has more layers, evenly spaced layers are drawn.
"""


def training_figures(metrics: Sequence[Metrics]) -> Iterator[tuple[str, Figure]]:
    """Yield the file name and the figure of each plot for which a training run has metrics.

    Args:
        metrics: metrics of the logged steps, in step order.
    """
    losses = {name: values for name in ("train/loss", "val/loss") if (values := _points(metrics, name))}
    if losses:
        yield LEARNING_CURVE, _draw_learning_curve(losses, _points(metrics, "val/cider"))
    if gaps := _points(metrics, "val/blind_gap"):
        yield "blind_gap.png", _draw_blind_gap(gaps)
    loads = [each for each in metrics if each.expert_load]
    if loads:
        yield EXPERT_LOAD, draw_expert_load(loads[-1])
    if len(loads) > 1:
        yield "expert_load_over_time.png", _draw_expert_load_over_time(loads)


Points = list[tuple[int, float]]


def _points(metrics: Sequence[Metrics], name: str) -> Points:
    """Return (step, value) of a metric for each step at which the metric was logged."""
    return [(each.step, each.values[name]) for each in metrics if name in each.values]


def _figure(draw: Callable[[Axes], None], size: tuple[float, float] = (8, 4)) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    axes.grid(alpha=0.3)
    draw(axes)
    return figure


def _draw_learning_curve(losses: dict[str, Points], cider: Points) -> Figure:
    def draw(axes: Axes) -> None:
        for name, points in losses.items():
            axes.plot(*zip(*points, strict=True), label=name, marker="o" if name == "val/loss" else "", markersize=4)
        axes.set_xlabel("step")
        axes.set_ylabel("loss, nats per token")
        axes.set_ylim(bottom=0)
        handles, labels = axes.get_legend_handles_labels()
        if cider:
            right = axes.twinx()
            right.plot(*zip(*cider, strict=True), label="val/cider", color="tab:green", marker="s", markersize=4)
            right.set_ylabel("CIDEr")
            right.set_ylim(bottom=0)
            of_right = right.get_legend_handles_labels()
            handles, labels = handles + of_right[0], labels + of_right[1]
        axes.legend(handles, labels, loc="upper right")
        axes.set_title("Learning curve")

    return _figure(draw)


def _draw_blind_gap(gaps: Points) -> Figure:
    def draw(axes: Axes) -> None:
        axes.plot(*zip(*gaps, strict=True), marker="o", markersize=4)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_xlabel("step")
        axes.set_ylabel("nats per token")
        axes.set_title("Blind gap: loss with pictures of other rows minus loss with the right pictures")

    return _figure(draw)


def draw_lengths(lengths: Mapping[str, Sequence[int]]) -> Figure:
    """Draw one figure that shows, for each name, a histogram of the number of words per text.

    The last bar counts all texts whose length is at least the 99th percentile of all lengths.
    """
    longest = max(1, int(np.percentile(np.concatenate([np.array(each) for each in lengths.values()]), 99)))
    width = 0.9 / len(lengths)

    def draw(axes: Axes) -> None:
        for number, (name, words) in enumerate(lengths.items()):
            counts = Counter(min(each, longest) for each in words)
            shares = [counts[each] / len(words) for each in range(longest + 1)]
            axes.bar(np.arange(longest + 1) + (number - (len(lengths) - 1) / 2) * width, shares, width, label=name)
        axes.set_xlabel(f"words ({longest} or more in the last bar)")
        axes.set_ylabel("share of texts")
        axes.legend()
        axes.set_title("Lengths of captions")

    return _figure(draw)


def draw_expert_load(metrics: Metrics) -> Figure:
    """Draw a heat map of each expert's share of the tokens, with a row per layer and a column per expert.

    A white cell stands for an even share of the tokens, and a blue cell for a smaller share. A fully red cell stands
    for at least twice an even share of the tokens.
    """
    layers = list(metrics.expert_load)
    widest = max(map(len, metrics.expert_load.values()))
    even_LX = np.full((len(layers), widest), np.nan)  # a layer with fewer experts has empty cells

    def draw(axes: Axes) -> None:
        axes.grid(visible=False)
        for row, load in enumerate(metrics.expert_load.values()):
            even_LX[row, : len(load)] = np.array(load) * len(load)
            for column, share in enumerate(load):
                axes.text(column, row, f"{share:.2f}", ha="center", va="center", fontsize=8)
        axes.imshow(even_LX, cmap="bwr", vmin=0, vmax=2, aspect="auto")
        axes.set_xticks(range(widest))
        axes.set_yticks(range(len(layers)), layers)
        axes.set_xlabel("expert")
        axes.set_title(f"share of tokens, step {metrics.step}", fontsize=10)

    return _figure(draw, (2.4 + 0.7 * widest, 1.2 + 0.4 * len(layers)))


def _draw_expert_load_over_time(loads: Sequence[Metrics]) -> Figure:
    """Draw each expert's share of the tokens over the training steps, with a panel per layer and a line per expert."""
    from matplotlib.figure import Figure

    layers = list(loads[-1].expert_load)
    chosen = [layers[i] for i in sorted({round(i) for i in np.linspace(0, len(layers) - 1, MAX_LAYERS)})]
    figure = Figure(figsize=(8, 1 + 1.6 * len(chosen)), layout="constrained")
    panels = figure.subplots(len(chosen), 1, sharex=True, squeeze=False)[:, 0]
    for axes, layer in zip(panels, chosen, strict=True):
        shares_SX = [(each.step, each.expert_load[layer]) for each in loads if layer in each.expert_load]
        for expert, style in zip(range(len(shares_SX[-1][1])), cycle(("-", "--", ":")), strict=False):
            axes.plot([step for step, _ in shares_SX], [load[expert] for _, load in shares_SX], style)
        axes.set_title(layer, fontsize=9, loc="left")
        axes.set_ylim(bottom=0)
    panels[-1].set_xlabel("step")
    figure.suptitle("share of tokens of each expert")
    return figure

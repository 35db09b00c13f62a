"""The load of experts as a picture: who of a mixture does the work, layer by layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pipelines.formats.run_folder import Metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_expert_load(metrics: Metrics) -> Figure:
    """A heat map of one log step: a row a layer, a column an expert, a cell the share of the layer's assignments.

    White is an even share; blue gets less, red gets twice as much or more.
    """
    from matplotlib.figure import Figure  # half a second that a dense model need not wait

    layers = list(metrics.expert_load)
    widest = max(map(len, metrics.expert_load.values()))
    figure = Figure(figsize=(2.4 + 0.7 * widest, 1.2 + 0.4 * len(layers)), layout="constrained")
    axes = figure.add_subplot()
    even_LX = np.full((len(layers), widest), np.nan)  # a layer with fewer experts leaves the rest of its row empty
    for row, load in enumerate(metrics.expert_load.values()):
        even_LX[row, : len(load)] = np.array(load) * len(load)
        for column, share in enumerate(load):
            axes.text(column, row, f"{share:.2f}", ha="center", va="center", fontsize=8)
    axes.imshow(even_LX, cmap="bwr", vmin=0, vmax=2, aspect="auto")
    axes.set_xticks(range(widest))
    axes.set_yticks(range(len(layers)), layers)
    axes.set_xlabel("expert")
    axes.set_title(f"share of tokens, step {metrics.step}", fontsize=10)
    return figure

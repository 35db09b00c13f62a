"""Plot of the expert load: the share of tokens that each expert of each layer receives."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pipelines.formats.run_folder import Metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_expert_load(metrics: Metrics) -> Figure:
    """Draw a heat map of the fraction of tokens routed to each expert, one row per layer and one column per expert.

    A white cell has an even share of the tokens, a blue cell has less, and a fully red cell has at least twice an even
    share.
    """
    from matplotlib.figure import Figure  # the import takes half a second, and dense models never need a plot

    layers = list(metrics.expert_load)
    widest = max(map(len, metrics.expert_load.values()))
    figure = Figure(figsize=(2.4 + 0.7 * widest, 1.2 + 0.4 * len(layers)), layout="constrained")
    axes = figure.add_subplot()
    even_LX = np.full((len(layers), widest), np.nan)  # cells beyond the experts of a layer stay empty
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

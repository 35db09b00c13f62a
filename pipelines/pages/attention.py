"""Drawings of attention maps: the picture as the model sees it, and one panel for each word of the answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

    from vlm.config import ImageConfig
    from vlm.generation.attention_maps import AttentionMaps

PANEL = 224
"""Side of a panel that `ask` draws, in pixels."""
COLUMNS = 5
MARGIN = 8
HOT = (255, 64, 0)
MAX_ALPHA = 0.8
"""HOT is the colour of the patch with the most attention.

MAX_ALPHA is the weight of HOT in the blend with the grey picture.
"""
MAX_TITLE = 24


class Panel(NamedTuple):
    """A square picture with its title."""

    title: str
    picture: Image


def draw_attention(picture: Image, config: ImageConfig, maps: AttentionMaps) -> Image:
    """Draw one picture with a panel for each word.

    The title of a panel contains the word and the share of the word's attention that goes to the picture.
    """
    return join_panels(attention_panels(picture, config, maps))


def attention_panels(picture: Image, config: ImageConfig, maps: AttentionMaps, *, side: int = PANEL) -> list[Panel]:
    """Return one panel of the picture, and one panel for each word.

    The colours of a word's panel show the attention of the word to each patch of the picture.

    Args:
        picture: picture in RGB.
        config: settings with which the picture was resized for the model; a panel shows the same part of the picture.
        maps: attention maps of the answer.
        side: side of a panel, in pixels.
    """
    from PIL import Image

    from vlm.image import to_pixels

    seen = Image.fromarray(to_pixels(picture, config.model_copy(update={"size": side})))
    grey = np.asarray(seen.convert("L").convert("RGB"), np.float32)
    panels = [Panel("", seen)]
    for (word, patches), (_, share) in zip(maps.words(), maps.picture_shares(), strict=True):
        scaled = (patches - patches.min()) / (patches.max() - patches.min()).clamp(min=1e-12)
        heat = Image.fromarray(scaled.numpy().astype(np.float32))
        alpha = np.asarray(heat.resize((side, side), Image.Resampling.BILINEAR))[..., None] * MAX_ALPHA
        blended = grey * (1 - alpha) + np.array(HOT, np.float32) * alpha
        title = word if len(word) <= MAX_TITLE else f"{word[: MAX_TITLE - 3]}..."
        panels.append(Panel(f"{title} {share:.0%}", Image.fromarray(blended.round().astype(np.uint8))))
    return panels


def join_panels(panels: Sequence[Panel]) -> Image:
    """Draw all panels with their titles into one picture, with COLUMNS panels in a row."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(14)
    width, height = PANEL + MARGIN, PANEL + MARGIN + 20
    columns, rows = min(COLUMNS, len(panels)), -(-len(panels) // COLUMNS)
    canvas = Image.new("RGB", (columns * width + MARGIN, rows * height + MARGIN), "white")
    pen = ImageDraw.Draw(canvas)
    for index, panel in enumerate(panels):
        left, top = MARGIN + index % COLUMNS * width, MARGIN + index // COLUMNS * height
        pen.text((left, top), panel.title, fill="black", font=font)
        canvas.paste(panel.picture, (left, top + 20))
    return canvas

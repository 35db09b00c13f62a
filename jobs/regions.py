"""The regions that an answer names: in pixels of its picture, and drawn on it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.errors import UserError
from vlm.config import Config, ImageConfig

if TYPE_CHECKING:
    from PIL.Image import Image

COLOURS = ("#d62728", "#1f77b4", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf")


class Found(Config):
    """A region that an answer names: a box in pixels of the picture as people see it.

    Attributes:
        label: what it is, in the model's words.
        left: edge of the box, pixels; so the others.
        top: edge.
        right: edge.
        bottom: edge.
        codes: sixteen of them where the answer holds an outline too (see `vlm.text.regions`).
    """

    label: str
    left: int
    top: int
    right: int
    bottom: int
    codes: tuple[int, ...]


def regions_in(caption: str, picture: Image, config: ImageConfig) -> tuple[Found, ...]:
    """The regions that an answer names, in pixels of its picture, which became the model's as `config` says."""
    from vlm.image import compute_resize
    from vlm.text.regions import parse_regions, to_box

    placement = compute_resize(*picture.size, config)
    found = [(region, to_box(region, placement)) for region in parse_regions(caption)]
    return tuple(Found(label=region.label, codes=region.codes, **box._asdict()) for region, box in found)


def check_drawing(path: Path) -> None:
    """See that a picture can be written there, before a model is loaded for it.

    Raises:
        UserError: the folder is missing, or no picture format has that ending.
    """
    from PIL import Image

    if not path.parent.is_dir():
        raise UserError(
            "the drawing cannot be written", where=str(path), got="no such folder", fix=f"make {path.parent} first"
        )
    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise UserError(
            "the drawing cannot be written",
            where=str(path),
            got=f"no picture format ends in {path.suffix!r}",
            fix="name a .png or .jpg file",
        )


def draw_regions(picture: Image, regions: Sequence[Found]) -> Image:
    """A copy of an RGB picture with each box outlined and labelled; boxes of one label share a colour."""
    from PIL import ImageDraw, ImageFont

    drawn = picture.copy()
    pen = ImageDraw.Draw(drawn)
    side = min(picture.size)
    font = ImageFont.load_default(max(10, side // 25))
    labels = list(dict.fromkeys(region.label for region in regions))
    for region in regions:
        colour = COLOURS[labels.index(region.label) % len(COLOURS)]
        # Pillow counts the last pixel in, a box counts edges; a box of no width is still a line.
        right, bottom = max(region.left, region.right - 1), max(region.top, region.bottom - 1)
        pen.rectangle((region.left, region.top, right, bottom), outline=colour, width=max(1, side // 150))
        if region.label:
            ground = pen.textbbox((region.left, region.top), region.label, font=font)
            pen.rectangle(ground, fill=colour)
            pen.text((region.left, region.top), region.label, fill="white", font=font)
    return drawn

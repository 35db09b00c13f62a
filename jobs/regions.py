"""Find the regions in a model's answer, convert the regions to boxes in pixels, and draw the boxes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.errors import UserError
from vlm.config import Config, ImageConfig

if TYPE_CHECKING:
    from PIL.Image import Image

COLOURS = ("#d62728", "#1f77b4", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf")


class FoundRegion(Config):
    """Box of a region in an answer, in pixels of the upright picture.

    Attributes:
        label: name of the region, as the model wrote it.
        left: left edge of the box, in pixels.
        top: top edge of the box, in pixels.
        right: right edge of the box, in pixels.
        bottom: bottom edge of the box, in pixels.
        codes: sixteen codes of the region's outline; empty if the answer has no outline (see `vlm.text.regions`).
    """

    label: str
    left: int
    top: int
    right: int
    bottom: int
    codes: tuple[int, ...]


def find_regions(caption: str, picture: Image, config: ImageConfig) -> tuple[FoundRegion, ...]:
    """Find the regions in an answer, and convert their positions to pixels of the picture.

    Args:
        caption: the model's answer.
        picture: picture about which the model gave the answer.
        config: settings with which the picture was resized for the model.
    """
    from vlm.image import compute_resize
    from vlm.text.regions import parse_regions, to_box

    placement = compute_resize(*picture.size, config)
    found = [(region, to_box(region, placement)) for region in parse_regions(caption)]
    return tuple(FoundRegion(label=region.label, codes=region.codes, **box._asdict()) for region, box in found)


def check_drawing_path(path: Path) -> None:
    """Check that a picture can be written to a path, before a model is loaded.

    Raises:
        UserError: the folder does not exist, or no picture format has the path's suffix.
    """
    from PIL import Image

    if not path.parent.is_dir():
        raise UserError(
            "the drawing cannot be written", where=str(path), got="no such folder", fix=f"create {path.parent} first"
        )
    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise UserError(
            "the drawing cannot be written",
            where=str(path),
            got=f"{path.suffix!r} is not the suffix of a picture format",
            fix="choose a file name that ends in .png or .jpg",
        )


def draw_regions(picture: Image, regions: Sequence[FoundRegion]) -> Image:
    """Return a copy of an RGB picture with each box outlined and labelled. Equal labels have equal colours."""
    from PIL import ImageDraw, ImageFont

    drawn = picture.copy()
    pen = ImageDraw.Draw(drawn)
    side = min(picture.size)
    font = ImageFont.load_default(max(10, side // 25))
    labels = list(dict.fromkeys(region.label for region in regions))
    for region in regions:
        colour = COLOURS[labels.index(region.label) % len(COLOURS)]
        # In Pillow, `right` and `bottom` are the last pixels of a rectangle. In a region, `right` and `bottom` are the
        # pixels after the region's last pixels. A box of zero width is drawn as a line.
        right, bottom = max(region.left, region.right - 1), max(region.top, region.bottom - 1)
        pen.rectangle((region.left, region.top, right, bottom), outline=colour, width=max(1, side // 150))
        if region.label:
            background = pen.textbbox((region.left, region.top), region.label, font=font)
            pen.rectangle(background, fill=colour)
            pen.text((region.left, region.top), region.label, fill="white", font=font)
    return drawn

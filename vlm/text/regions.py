"""Parser of regions, which are boxes and outlines in the answers of a model to `detect` and `segment` prompts.

    <loc0102><loc0307><loc0922><loc0716> cat ; <loc0000><loc0000><loc0511><loc1023><seg045>... dog
    '-- y0, x0, y1, x1 of 1024 bins --'  label                                    '16 codes'

Four <loc> tokens are the edges of a box, in 1024 bins per side of the model's input square. Sixteen <seg> tokens
describe the outline inside the box. The numbers of <seg> tokens are indices into the codebook of a mask decoder (Ning
et al., 2023), which is not part of this library. The parser skips incomplete boxes, and accepts every text without an
error.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from vlm.image import ResizeTransform

BINS = 1024
NUM_CODES = 16

_LOC = r"<loc(?:0\d{3}|10[01]\d|102[0-3])>"
_SEG = r"<seg(?:0\d{2}|1[01]\d|12[0-7])>"
REGION_TOKEN = re.compile(f"{_LOC}|{_SEG}", re.ASCII)
_REGION = re.compile(rf"((?:{_LOC}\s*){{4}})((?:{_SEG}\s*)*)([^;<]*)", re.ASCII)


class Region(NamedTuple):
    """A labelled box in bins (0 to 1023) of the model's input square. `codes` has the 16 codes of the outline, or is
    empty if the text has no outline of 16 codes.
    """

    y0: int
    x0: int
    y1: int
    x1: int
    label: str
    codes: tuple[int, ...] = ()


class Box(NamedTuple):
    """A box in pixels of the original picture."""

    left: int
    top: int
    right: int
    bottom: int


def parse_regions(text: str) -> list[Region]:
    """Return the regions (boxes of a picture) that a text contains, in the order of the text.

    A box whose right edge is left of its left edge, or whose lower edge is above its upper edge, is skipped.
    """
    found = []
    for boxes, outline, label in _REGION.findall(text):
        y0, x0, y1, x1 = _numbers(boxes)
        codes = _numbers(outline)
        if y0 <= y1 and x0 <= x1:
            found.append(Region(y0, x0, y1, x1, label.strip(), codes if len(codes) == NUM_CODES else ()))
    return found


def to_box(region: Region, placement: ResizeTransform) -> Box:
    """Convert the box of a region to pixels of the original picture. The box is clipped to the picture.

    Args:
        region: region in the model's input square.
        placement: position and scale of the original picture in the input square (`vlm.image.compute_resize`).
    """
    scale = placement.size / BINS
    left, top = placement.to_source(region.x0 * scale, region.y0 * scale)
    right, bottom = placement.to_source(region.x1 * scale, region.y1 * scale)
    return Box(round(left), round(top), round(right), round(bottom))


def _numbers(tokens: str) -> tuple[int, ...]:
    return tuple(int(digits) for digits in re.findall(r"\d+", tokens))

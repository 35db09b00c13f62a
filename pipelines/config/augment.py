"""The `train.augment` section of a run: random changes of training pictures."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from vlm.config import ADDED_LATER, Config, Probability

SIDED_WORDS = (
    *("left", "lefthand", "leftmost", "leftward", "leftwards", "right", "righthand", "rightmost", "rightward"),
    *("rightwards", "clockwise", "counterclockwise", "anticlockwise"),
)
"""Words, such as "left", that may become false when a picture is mirrored."""
UPRIGHT_WORDS = (
    *("above", "below", "beneath", "underneath", "top", "bottom", "upper", "lower", "topmost", "upright", "upside"),
    *("north", "south", "east", "west", "northern", "southern", "eastern", "western"),
)
"""Further words, such as "above", that may become false when a picture is rotated or mirrored top to bottom."""

Share = Annotated[float, Field(ge=0, le=1)]
Words = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)]


class AugmentConfig(Config):
    """Random changes of training pictures, drawn anew in each epoch. Validation pictures are never changed.

    If the text or prompt of a picture contains coordinates of boxes, only the colours of the picture are changed.

    Attributes:
        scale: smallest and largest share of the picture's area that a random crop keeps. Each crop is then enlarged to
            the size of the picture.
        flip: share of pictures that are mirrored left to right. A picture is not mirrored if its text or prompt
            contains one of `sided_words`.
        flip_vertical: share of pictures that are mirrored top to bottom. Mirroring top to bottom is useful for pictures
            without a natural top, such as aerial pictures. A picture is not mirrored if its text or prompt contains one
            of `sided_words` or `upright_words`.
        rotate: share of pictures that are rotated by 90, 180 or 270 degrees. A picture is not rotated if its text or
            prompt contains one of `sided_words` or `upright_words`.
        erase: share of pictures in which a rectangle is filled with the picture's mean colour (random erasing, Zhong et
            al., 2017). The rectangle covers 2 to 33 percent of a picture.
        brightness: largest random change of brightness. All pixel values are multiplied by a factor between 1 -
            brightness and 1 + brightness.
        contrast: largest random change of contrast. The difference between each pixel and the picture's mean grey is
            multiplied by a factor between 1 - contrast and 1 + contrast.
        saturation: largest random change of saturation. The difference between each pixel and its grey value is
            multiplied by a factor between 1 - saturation and 1 + saturation.
        sided_words: words that prevent mirroring and rotation if the text or the prompt of the picture contains them,
            as whole words in upper or lower case.
        upright_words: further words that prevent rotation and top-to-bottom mirroring.
    """

    scale: tuple[Share, Share] = (1.0, 1.0)
    flip: Share = 0.0
    flip_vertical: Annotated[Share, ADDED_LATER] = 0.0
    rotate: Annotated[Share, ADDED_LATER] = 0.0
    erase: Annotated[Share, ADDED_LATER] = 0.0
    brightness: Probability = 0.0
    contrast: Probability = 0.0
    saturation: Probability = 0.0
    sided_words: Words = SIDED_WORDS
    upright_words: Annotated[Words, ADDED_LATER] = UPRIGHT_WORDS

    @model_validator(mode="after")
    def _changes_something(self) -> Self:
        least, most = self.scale
        if not 0 < least <= most:
            raise ValueError(
                f"scale is [{least:g}, {most:g}]: give the smallest share (above 0), then the largest share"
            )
        flips, colours = (self.flip, self.flip_vertical, self.rotate), (self.brightness, self.contrast, self.saturation)
        if least == 1 and not any((*flips, *colours, self.erase)):
            raise ValueError(
                "augment changes no picture: set scale, flip, flip_vertical, rotate, erase, brightness, contrast or "
                "saturation"
            )
        return self

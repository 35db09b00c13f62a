"""Adapters as data: which layers learn a correction, and how large it may be."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, PositiveFloat, PositiveInt

from vlm.config.base import Config


def _compiles(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from None
    return pattern


Pattern = Annotated[str, AfterValidator(_compiles)]
"""A regular expression, to be matched with the whole of a name."""


class AdapterConfig(Config):
    """Low-rank adapters (LoRA; Hu et al., 2021) on linear layers; all other weights stay as they are.

    Attributes:
        pattern: regular expression; a linear layer is adapted where it matches the whole of its name, such as
            `decoder.blocks.*` or `decoder.blocks.*(qkv|mlp.out)`.
        rank: of a layer's correction.
        alpha: the correction is multiplied by alpha / rank.
    """

    pattern: Pattern
    rank: PositiveInt = 8
    alpha: PositiveFloat = 16.0

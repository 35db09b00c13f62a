"""Config of low-rank adapters: which linear layers get an adapter, and the adapter's rank and scale."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, PositiveFloat, PositiveInt

from vlm.config.base import Config


def _check_regex(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"the pattern is not a regular expression: {error}") from None
    return pattern


Pattern = Annotated[str, AfterValidator(_check_regex)]
"""Regular expression that is matched against a whole name (`re.fullmatch`)."""


class AdapterConfig(Config):
    """Low-rank adapters (LoRA, Hu et al., 2021) on linear layers. Training changes only the adapters.

    Attributes:
        pattern: regular expression for the full names of the linear layers to adapt, such as `decoder.blocks.*` or
            `decoder.blocks.*(qkv|mlp.out)`.
        rank: rank of the correction that an adapter adds to a weight matrix.
        alpha: scale of the adapters. The output of an adapter is multiplied by alpha / rank.
    """

    pattern: Pattern
    rank: PositiveInt = 8
    alpha: PositiveFloat = 16.0

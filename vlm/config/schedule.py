"""How the learning rate goes: a factor of its peak after warmup, by `kind`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat

from vlm.config.base import Config

Floor = Annotated[float, Field(ge=0, le=1)]


class CosineScheduleConfig(Config):
    """Half a cosine from the peak down to `floor` of it (Loshchilov and Hutter, 2016)."""

    kind: Literal["cosine"] = "cosine"
    floor: Floor = 0.05


class LinearScheduleConfig(Config):
    """A straight line from the peak down to `floor` of it."""

    kind: Literal["linear"]
    floor: Floor = 0.0


class ConstantScheduleConfig(Config):
    """The peak, to the end."""

    kind: Literal["constant"]


class StableScheduleConfig(Config):
    """The peak, and a straight line down to `floor` of it over the last `decay` of the steps (Hu et al., 2024).

    Training can be gone on with from before the decay, without knowing beforehand how long it will last.
    """

    kind: Literal["warmup_stable_decay"]
    decay: Annotated[PositiveFloat, Field(le=1)] = 0.2
    floor: Floor = 0.0


ScheduleConfig = Annotated[
    CosineScheduleConfig | LinearScheduleConfig | ConstantScheduleConfig | StableScheduleConfig,
    Field(discriminator="kind"),
]

"""Learning rate schedules: the learning rate after warm-up as a fraction of its peak, selected by `kind`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat

from vlm.config.base import Config

Floor = Annotated[float, Field(ge=0, le=1)]


class CosineScheduleConfig(Config):
    """Cosine decay from the peak to `floor` * peak (Loshchilov and Hutter, 2016)."""

    kind: Literal["cosine"] = "cosine"
    floor: Floor = 0.05


class LinearScheduleConfig(Config):
    """Linear decay from the peak to `floor` * peak."""

    kind: Literal["linear"]
    floor: Floor = 0.0


class ConstantScheduleConfig(Config):
    """Constant learning rate: the peak until the last step."""

    kind: Literal["constant"]


class StableScheduleConfig(Config):
    """Constant peak, then linear decay to `floor` * peak over the last `decay` fraction of the steps (Hu et al., 2024).

    A checkpoint from before the decay can be trained further, so the number of steps need not be known in advance.
    """

    kind: Literal["warmup_stable_decay"]
    decay: Annotated[PositiveFloat, Field(le=1)] = 0.2
    floor: Floor = 0.0


ScheduleConfig = Annotated[
    CosineScheduleConfig | LinearScheduleConfig | ConstantScheduleConfig | StableScheduleConfig,
    Field(discriminator="kind"),
]

"""Learning rate schedules, selected by `kind`. A schedule defines the learning rate after the warm-up.

In a run with stages, each stage has its own warm-up and schedule. For these runs, the words "training" and "last step"
in this module refer to one stage.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat

from vlm.config.base import Config

Floor = Annotated[float, Field(ge=0, le=1)]


class CosineScheduleConfig(Config):
    """Cosine decay of the learning rate from its peak to `floor` * peak (Loshchilov and Hutter, 2016).

    Attributes:
        floor: learning rate at the last step, as a fraction of the peak.
    """

    kind: Literal["cosine"] = "cosine"
    floor: Floor = 0.05


class LinearScheduleConfig(Config):
    """Linear decay of the learning rate from its peak to `floor` * peak.

    Attributes:
        floor: learning rate at the last step, as a fraction of the peak.
    """

    kind: Literal["linear"]
    floor: Floor = 0.0


class ConstantScheduleConfig(Config):
    """Constant learning rate, which stays at its peak until the last step."""

    kind: Literal["constant"]


class StableScheduleConfig(Config):
    """Constant learning rate, then linear decay from the peak to `floor` * peak (Hu et al., 2024).

    The learning rate decays at the end of the training, during the fraction `decay` of the steps after the warm-up. A
    checkpoint that was written before the decay can be trained for more steps, so the number of steps need not be known
    in advance.

    Attributes:
        decay: length of the decay at the end of the training, as a fraction of the steps after the warm-up. In a run
            with stages, each stage has its own decay.
        floor: learning rate at the last step, as a fraction of the peak.
    """

    kind: Literal["warmup_stable_decay"]
    decay: Annotated[PositiveFloat, Field(le=1)] = 0.2
    floor: Floor = 0.0


ScheduleConfig = Annotated[
    CosineScheduleConfig | LinearScheduleConfig | ConstantScheduleConfig | StableScheduleConfig,
    Field(discriminator="kind"),
]

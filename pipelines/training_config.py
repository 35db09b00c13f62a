"""Training as data: the train section of a run."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from vlm.config import AdapterConfig, Config


class OptimizerConfig(Config):
    """AdamW (Loshchilov and Hutter, 2017) with warmup and cosine decay to `final_lr_fraction`."""

    lr: PositiveFloat = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    grad_clip: PositiveFloat = 1.0
    warmup_steps: Annotated[int, Field(ge=0)] = 50
    final_lr_fraction: Annotated[float, Field(ge=0, le=1)] = 0.05


WATCH = frozenset({"checkpoint_every", "keep_checkpoints", "timeout_seconds", "max_restarts"})
"""Settings of how a run is looked after. They change nothing that it learns, so they are no part of what it is: a run
that died of too short a timeout goes on with a longer one."""


class TrainConfig(Config):
    """One training run. `batch_size` is global: the same whatever the number of ranks.

    Attributes:
        start_from: checkpoint folder of the same model, whose weights and tokenizer the run starts from.
        adapter: train low-rank corrections of these weights and nothing else; what is registered has them merged.
        keep_checkpoints: newest ones; the one with the lowest validation loss is kept beside them.
        timeout_seconds: how long a rank may go without a sign of work before the run is ended.
        max_restarts: how often a run that has failed is started again from its last checkpoint, where that may help.
    """

    seed: int = 0
    steps: PositiveInt = 1000
    batch_size: PositiveInt = 64
    optimizer: OptimizerConfig = OptimizerConfig()
    precision: Literal["fp32", "bf16"] = "fp32"
    start_from: Annotated[str, Field(min_length=1)] | None = None
    adapter: AdapterConfig | None = None
    log_every: PositiveInt = 10
    validate_every: PositiveInt = 200
    validate_rows: PositiveInt = 256
    checkpoint_every: PositiveInt = 500
    keep_checkpoints: PositiveInt = 2
    caption_samples: PositiveInt = 8
    timeout_seconds: PositiveInt = 600
    max_restarts: Annotated[int, Field(ge=0)] = 2

    def science(self) -> dict[str, Any]:
        """The settings that determine what is learned."""
        return self.model_dump(exclude=set(WATCH))

    @model_validator(mode="after")
    def _something_to_adapt(self) -> Self:
        if self.adapter and not self.start_from:
            raise ValueError("adapter needs start_from: corrections of random weights learn nothing")
        return self

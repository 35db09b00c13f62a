"""The `train` section of a run: optimizer, schedule, stages, augmentation and checkpoints."""

from __future__ import annotations

import contextlib
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from vlm.config import AdapterConfig, Config, CosineScheduleConfig, Pattern, Probability, ScheduleConfig

SIDED_WORDS = (
    *("left", "lefthand", "leftmost", "leftward", "leftwards", "right", "righthand", "rightmost", "rightward"),
    *("rightwards", "clockwise", "counterclockwise", "anticlockwise"),
)
"""Words that may become false when a picture is mirrored."""


class OptimizerConfig(Config):
    """AdamW (Loshchilov and Hutter, 2017). The learning rate rises to `lr` in `warmup_steps`, then follows `schedule`.

    With `ema_decay`, validation and registration use an exponential moving average of the weights over steps.
    """

    lr: PositiveFloat = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    grad_clip: PositiveFloat = 1.0
    warmup_steps: Annotated[int, Field(ge=0)] = 50
    schedule: ScheduleConfig = CosineScheduleConfig()
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None


class GroupConfig(Config):
    """Learning rate of the parameters whose full names match `pattern`. The first matching group counts; 0 freezes."""

    pattern: Pattern
    lr: Annotated[float, Field(ge=0)]


class StageConfig(Config):
    """Stage of a run, in which some parameters learn. Warm-up, schedule and optimizer state start anew in each stage.

    Attributes:
        steps: length of the stage in steps.
        groups: learning rates, the first match counts. A parameter that no group matches is frozen.
    """

    steps: PositiveInt
    groups: Annotated[tuple[GroupConfig, ...], Field(min_length=1)]

    @property
    def rates(self) -> dict[str, float]:
        """Map each pattern to its learning rate, in order."""
        return {group.pattern: group.lr for group in self.groups}

    @model_validator(mode="after")
    def _something_learns(self) -> Self:
        if len(self.rates) < len(self.groups):
            raise ValueError("a pattern occurs twice; only the first would count")
        if not max(self.rates.values()):
            raise ValueError("every group has lr 0, so no parameter would learn")
        return self


Share = Annotated[float, Field(ge=0, le=1)]


class AugmentConfig(Config):
    """Random changes of training pictures, drawn anew in each epoch. Validation pictures are never changed.

    Attributes:
        scale: smallest and largest share of the picture's area that a random crop keeps. The crop is resized to the
            full size.
        flip: share of pictures that are mirrored left to right, if their text allows it.
        brightness: pixels are multiplied by a factor between 1 - brightness and 1 + brightness.
        contrast: the distance to the picture's mean grey is scaled in the same way.
        saturation: the distance of each pixel to its own grey is scaled in the same way.
        sided_words: a picture is not mirrored if its text or prompt contains one of these as a whole word, in upper or
            lower case.
    """

    scale: tuple[Share, Share] = (1.0, 1.0)
    flip: Share = 0.0
    brightness: Probability = 0.0
    contrast: Probability = 0.0
    saturation: Probability = 0.0
    sided_words: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)] = SIDED_WORDS

    @model_validator(mode="after")
    def _changes_something(self) -> Self:
        least, most = self.scale
        if not 0 < least <= most:
            raise ValueError(f"scale is [{least:g}, {most:g}]: expected the smallest share (above 0), then the largest")
        if least == 1 and not any((self.flip, self.brightness, self.contrast, self.saturation)):
            raise ValueError("augment changes no picture: set scale, flip, brightness, contrast or saturation")
        return self


EXECUTION_SETTINGS = frozenset(
    {
        "checkpoint_every",
        "compile_blocks",
        "keep_checkpoints",
        "loader_workers",
        "max_restarts",
        "parallel",
        "profile_steps",
        "recompute_blocks",
        "rows_at_once",
        "timeout_seconds",
    }
)
"""Settings of how a run is computed and supervised. They do not change what the model learns, beyond rounding, so they
are not part of the run's identity: a run that ran out of memory resumes with a smaller `rows_at_once`."""


class TrainConfig(Config):
    """Settings of a training run.

    Attributes:
        steps: length of the run; with `stages`, the sum of their steps.
        batch_size: rows per step over all ranks, whatever the number of ranks.
        stages: consecutive stages with their own learning rates. Without stages, every parameter learns at
            `optimizer.lr` for the whole run.
        rows_at_once: rows per forward pass of a rank; gradients are accumulated to the full batch. This saves memory
            and takes the same step. Null: all rows at once.
        recompute_blocks: drop the activations inside a block and recompute them in the backward pass. This saves memory
            and costs about a third more compute.
        compile_blocks: compile each block with torch.compile, for GPUs. A resumed run then equals the uninterrupted run
            up to rounding.
        parallel: `ddp` keeps the full model on each rank. `fsdp` keeps a slice of weights, gradients and optimizer
            state on each rank, for models that do not fit on one.
        precision: of matrix products: fp32, tf32 (on GPUs, with rounded inputs) or bf16 (autocast). Weights stay fp32.
        start_from: checkpoint folder of the same model; the run starts from its weights and tokenizer.
        adapter: train low-rank corrections (LoRA) of the matching weights and nothing else. They are merged into the
            weights before registration.
        augment: random changes of training pictures. Null: the pictures of the shards, unchanged.
        loader_workers: threads that prepare batches ahead of training. 0: each batch is made when it is needed.
        keep_checkpoints: number of newest checkpoints to keep. The one with the lowest validation loss is kept too.
        profile_steps: number of rank 0's first steps to record with torch's profiler. The trace is logged to MLflow.
        timeout_seconds: the run is ended if a rank gives no sign of life for this long.
        max_restarts: how often a failed run restarts from its last checkpoint, if a restart can help.
    """

    seed: int = 0
    steps: PositiveInt = 1000
    batch_size: PositiveInt = 64
    optimizer: OptimizerConfig = OptimizerConfig()
    rows_at_once: PositiveInt | None = None
    recompute_blocks: bool = False
    compile_blocks: bool = False
    parallel: Literal["ddp", "fsdp"] = "ddp"
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    start_from: Annotated[str, Field(min_length=1)] | None = None
    adapter: AdapterConfig | None = None
    stages: tuple[StageConfig, ...] = ()
    augment: AugmentConfig | None = None
    loader_workers: Annotated[int, Field(ge=0)] = 2
    log_every: PositiveInt = 10
    validate_every: PositiveInt = 200
    validate_rows: PositiveInt = 256
    checkpoint_every: PositiveInt = 500
    keep_checkpoints: PositiveInt = 2
    caption_samples: PositiveInt = 8
    profile_steps: Annotated[int, Field(ge=0)] = 0
    timeout_seconds: PositiveInt = 600
    max_restarts: Annotated[int, Field(ge=0)] = 2

    def science(self) -> dict[str, Any]:
        """Return the settings that determine what is learned.

        Settings added later are left out while unused, so that the identity of an older run stays the same.
        """
        left_out: dict[str, Any] = dict.fromkeys(EXECUTION_SETTINGS, True)
        if self.augment is None:
            left_out["augment"] = True
        if self.optimizer.ema_decay is None:
            left_out["optimizer"] = {"ema_decay"}
        return self.model_dump(exclude=left_out)

    @model_validator(mode="before")
    @classmethod
    def _steps_of_stages(cls, given: Any) -> Any:
        """Fill in `steps` from the stages. Values are not validated yet; field validation reports bad ones later."""
        stages = given.get("stages") if isinstance(given, dict) else None
        if stages and "steps" not in given:
            with contextlib.suppress(TypeError, KeyError, ValueError, AttributeError):
                return given | {"steps": sum(int(s["steps"] if isinstance(s, dict) else s.steps) for s in stages)}
        return given

    @model_validator(mode="after")
    def _stages_fit(self) -> Self:
        if self.stages and self.steps != (total := sum(stage.steps for stage in self.stages)):
            raise ValueError(f"steps is {self.steps}, but the stages have {total} in total: leave steps out")
        if self.stages and self.adapter:
            raise ValueError("stages and adapter exclude each other: with an adapter nothing else learns")
        return self

    @model_validator(mode="after")
    def _something_to_adapt(self) -> Self:
        if self.adapter and self.parallel == "fsdp":
            raise ValueError(
                "adapter and parallel fsdp exclude each other: frozen weights are half precision, fsdp needs one dtype"
            )
        if self.adapter and not self.start_from:
            raise ValueError("adapter needs start_from: corrections of untrained weights are useless")
        return self

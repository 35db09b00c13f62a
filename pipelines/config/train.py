"""Training as data: the train section of a run."""

from __future__ import annotations

import contextlib
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from vlm.config import AdapterConfig, Config, CosineScheduleConfig, Pattern, Probability, ScheduleConfig

SIDED_WORDS = (
    *("left", "lefthand", "leftmost", "leftward", "leftwards", "right", "righthand", "rightmost", "rightward"),
    *("rightwards", "clockwise", "counterclockwise", "anticlockwise"),
)
"""Words that are no longer true of a mirrored picture."""


class OptimizerConfig(Config):
    """AdamW (Loshchilov and Hutter, 2017): `lr` is reached after `warmup_steps`, then it goes as `schedule` says.

    With `ema_decay`, what is validated and registered is an exponential moving average of the weights over steps.
    """

    lr: PositiveFloat = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    grad_clip: PositiveFloat = 1.0
    warmup_steps: Annotated[int, Field(ge=0)] = 50
    schedule: ScheduleConfig = CosineScheduleConfig()
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None


class GroupConfig(Config):
    """Parameters whose whole names match `pattern`, and no pattern before it: they learn at `lr`; 0 freezes them."""

    pattern: Pattern
    lr: Annotated[float, Field(ge=0)]


class StageConfig(Config):
    """A part of a run in which some parameters learn. Warmup, schedule and optimizer begin anew with it.

    Attributes:
        steps: how long it lasts.
        groups: in order; a parameter that none matches is frozen.
    """

    steps: PositiveInt
    groups: Annotated[tuple[GroupConfig, ...], Field(min_length=1)]

    @property
    def rates(self) -> dict[str, float]:
        """Learning rate by pattern, in order."""
        return {group.pattern: group.lr for group in self.groups}

    @model_validator(mode="after")
    def _something_learns(self) -> Self:
        if len(self.rates) < len(self.groups):
            raise ValueError("a pattern comes twice; its first place counts")
        if not max(self.rates.values()):
            raise ValueError("every group has lr 0: nothing would learn")
        return self


Share = Annotated[float, Field(ge=0, le=1)]


class AugmentConfig(Config):
    """What is done to pictures while they are learned from, another way each epoch; never to those of a validation.

    Attributes:
        scale: a random crop keeps a share of the picture's area between these, and is enlarged to the whole.
        flip: share of the pictures that are mirrored left to right, where their text allows it.
        brightness: pixels are multiplied by up to 1 +- this.
        contrast: their distance to the picture's mean grey likewise.
        saturation: their distance to their own grey likewise.
        sided_words: a picture whose text or prompt has one of these as a whole word, in capitals or not, is not
            mirrored.
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
            raise ValueError(f"scale is [{least:g}, {most:g}]: the least share of a picture, above 0, then the most")
        if least == 1 and not any((self.flip, self.brightness, self.contrast, self.saturation)):
            raise ValueError("augment changes no picture: set scale, flip, brightness, contrast or saturation")
        return self


HOW = frozenset(
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
"""Settings of how a run is computed and looked after. They change what it learns no more than the number of ranks does
(rounding, and which activations are dropped), so they are no part of what it is: a run that did not fit into memory
goes on with fewer rows at once."""


class TrainConfig(Config):
    """One training run. `batch_size` is global: the same whatever the number of ranks.

    Attributes:
        steps: of the whole run; where there are stages, theirs together.
        stages: what learns when, one after another; without any, everything learns at `optimizer.lr` all the time.
        rows_at_once: a rank computes as many rows of its slice at once, and adds up their gradients: the same step in
            less memory. All of them without.
        recompute_blocks: keep no activations inside a block: less memory, a third more compute.
        compile_blocks: compute with kernels that torch.compile makes for the blocks, for a GPU. A resumed run then
            equals the uninterrupted one up to rounding.
        parallel: `fsdp` leaves each rank a slice of weights, gradients and moments, where a model is too large for all.
        precision: of matrix products: fp32, tf32 (a GPU's, rounded inputs), or bf16 autocast; weights stay fp32.
        start_from: checkpoint folder of the same model, whose weights and tokenizer the run starts from.
        adapter: train low-rank corrections of these weights and nothing else; what is registered has them merged.
        augment: what is done to its pictures; they are as the shards have them without.
        loader_workers: threads that make batches ahead of the training; 0 makes each when it is due.
        keep_checkpoints: newest ones; the one with the lowest validation loss is kept beside them.
        profile_steps: record as many of rank 0's first steps with torch's profiler, and log the trace.
        timeout_seconds: how long a rank may go without a sign of work before the run is ended.
        max_restarts: how often a run that has failed is started again from its last checkpoint, where that may help.
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
        """The settings that determine what is learned; newer ones only where they are used: a run keeps its name."""
        left_out: dict[str, Any] = dict.fromkeys(HOW, True)
        if self.augment is None:
            left_out["augment"] = True
        if self.optimizer.ema_decay is None:
            left_out["optimizer"] = {"ema_decay"}
        return self.model_dump(exclude=left_out)

    @model_validator(mode="before")
    @classmethod
    def _steps_of_stages(cls, given: Any) -> Any:
        """`steps` may be left out where there are stages. Values are not checked yet: what is wrong is told later."""
        stages = given.get("stages") if isinstance(given, dict) else None
        if stages and "steps" not in given:
            with contextlib.suppress(TypeError, KeyError, ValueError, AttributeError):
                return given | {"steps": sum(int(s["steps"] if isinstance(s, dict) else s.steps) for s in stages)}
        return given

    @model_validator(mode="after")
    def _stages_fit(self) -> Self:
        if self.stages and self.steps != (total := sum(stage.steps for stage in self.stages)):
            raise ValueError(f"steps is {self.steps}, the stages have {total} together: leave steps out")
        if self.stages and self.adapter:
            raise ValueError("stages and adapter: an adapter is all that learns, from beginning to end")
        return self

    @model_validator(mode="after")
    def _something_to_adapt(self) -> Self:
        if self.adapter and self.parallel == "fsdp":
            raise ValueError(
                "adapter and parallel fsdp: frozen weights are in half precision, and slices are of one kind"
            )
        if self.adapter and not self.start_from:
            raise ValueError("adapter needs start_from: corrections of random weights learn nothing")
        return self

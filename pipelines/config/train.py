"""The `train` section of a run: optimizer, schedule, stages and checkpoints."""

from __future__ import annotations

import contextlib
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, PositiveFloat, PositiveInt, model_validator

from pipelines.config.augment import AugmentConfig
from vlm.config import ADDED_LATER, AdapterConfig, Config, CosineScheduleConfig, Pattern, Probability, ScheduleConfig


class OptimizerConfig(Config):
    """AdamW optimizer (Loshchilov and Hutter, 2017) with a learning rate that changes during training.

    Attributes:
        lr: highest learning rate, which is reached at the end of the warm-up.
        betas: decay rates of AdamW's two moving averages.
        weight_decay: weight decay of weight matrices. Embedding tables, position embeddings, class tokens and
            parameters with one dimension, such as biases, have no weight decay.
        grad_clip: largest norm of the gradient. A larger gradient is scaled down to this norm.
        warmup_steps: number of steps at the start of training in which the learning rate rises to `lr`.
        schedule: how the learning rate changes after the warm-up.
        ema_decay: decay per step of a moving average of the weights, or null for no average. If the weights are
            averaged, validation and the registered model use the average.
    """

    lr: PositiveFloat = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    grad_clip: PositiveFloat = 1.0
    warmup_steps: Annotated[int, Field(ge=0)] = 50
    schedule: ScheduleConfig = CosineScheduleConfig()
    ema_decay: Annotated[Annotated[float, Field(gt=0, lt=1)] | None, ADDED_LATER] = None


class GroupConfig(Config):
    """Learning rate of the parameters whose full names match `pattern`.

    Attributes:
        pattern: regular expression that must match the whole full name of a parameter, such as `encoder.*`.
        lr: highest learning rate of the matching parameters. A learning rate of 0 freezes the parameters.
    """

    pattern: Pattern
    lr: Annotated[float, Field(ge=0)]


class TextsObjectiveConfig(Config):
    """Objective of a stage: the cross entropy of the texts of the training rows."""

    kind: Literal["texts"] = "texts"


class CiderObjectiveConfig(Config):
    """Objective of a stage: the CIDEr of captions that the model samples (self-critical training, Rennie et al., 2016).

    The model samples several captions of each training picture. A caption becomes more likely if its CIDEr-D is above
    the mean CIDEr-D of the picture's other captions, and less likely if its CIDEr-D is below this mean (Luo, 2020).

    Attributes:
        samples: number of captions that the model samples for each picture in a step.
        temperature: number by which logits are divided before sampling.
    """

    kind: Literal["cider"]
    samples: Annotated[int, Field(ge=2)] = 5
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0


ObjectiveConfig = Annotated[TextsObjectiveConfig | CiderObjectiveConfig, Field(discriminator="kind")]


class StageConfig(Config):
    """Stage of a training run. A stage trains the parameters in its groups, and freezes all other parameters.

    Warm-up, schedule and optimizer state start anew in each stage.

    Attributes:
        steps: length of the stage, in training steps.
        warmup_steps: length of the stage's warm-up, in training steps, or null for `train.optimizer.warmup_steps`.
        objective: `texts` to lower the loss on the texts of the training rows, or `cider` to raise the CIDEr of sampled
            captions.
        groups: groups of parameters, each with a learning rate. A parameter belongs to the first group whose pattern
            matches the name of the parameter. A parameter is frozen if no pattern matches.
    """

    steps: PositiveInt
    groups: Annotated[tuple[GroupConfig, ...], Field(min_length=1)]
    warmup_steps: Annotated[Annotated[int, Field(ge=0)] | None, ADDED_LATER] = None
    objective: Annotated[ObjectiveConfig, ADDED_LATER] = TextsObjectiveConfig()

    @property
    def rates(self) -> dict[str, float]:
        """Map the pattern of each group to the learning rate of the group, in the order of the groups."""
        return {group.pattern: group.lr for group in self.groups}

    @model_validator(mode="after")
    def _something_learns(self) -> Self:
        if len(self.rates) < len(self.groups):
            raise ValueError(
                "two groups have the same pattern, so the second group would have no effect: remove a group"
            )
        if not max(self.rates.values()):
            raise ValueError("every group has lr 0, so no parameter would learn: give a group an lr above 0")
        return self


BestBy = Literal["loss", "cider"]


def _read_register(value: object) -> object:
    if str(value) in {"last", "best"}:
        return value
    if str(value).isdecimal() and int(str(value)):
        return int(str(value))
    raise ValueError("expected last, best, or the step of a checkpoint, such as 500")


Register = Annotated[Literal["last", "best"] | int, BeforeValidator(_read_register)]
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
        "register_",
        "resume_changed_code",
        "rows_at_once",
        "timeout_seconds",
    }
)
"""Settings that decide how a run is computed, supervised and registered. These settings are not part of the run's
identity. For example, a run that ran out of memory can resume with a smaller `rows_at_once`. If the model has neither
dropout nor a mixture of experts, and if `contrastive` is 0, these settings change the learned weights only by rounding
errors. The setting `resume_changed_code` is an exception."""


class TrainConfig(Config):
    """Settings of a training run.

    Attributes:
        seed: random seed of the run.
        steps: number of training steps. If `stages` is set, the default is the sum of the steps of all stages.
        batch_size: number of rows per step, over all ranks together.
        optimizer: settings of the optimizer.
        stages: consecutive stages of the training, each with its own learning rates. Without stages, all trained
            parameters have the learning rate of `optimizer`.
        rows_at_once: largest number of rows in one forward pass of a rank, or null for all rows of the rank. A smaller
            number of rows saves memory. Gradients are accumulated over the full batch. If the model has neither dropout
            nor a mixture of experts, and `contrastive` is 0, the result of a step therefore changes only by rounding.
        recompute_blocks: whether the backward pass recomputes the activations inside each block, so that the forward
            pass need not store them. Recomputation saves memory, but a step takes about a third more compute.
        compile_blocks: whether to compile each block with torch.compile, which is useful on GPUs. With compiled blocks,
            the weights of a resumed run equal the weights of an uninterrupted run only up to rounding.
        parallel: how ranks share the model. With `ddp`, each rank holds the full model. With `fsdp`, each rank holds a
            part of the weights, gradients and optimizer state, so the model may be larger than the memory of one GPU.
        precision: number format of matrix products, which is fp32, tf32 (GPUs round the inputs), bf16 (autocast) or
            auto. With `auto`, the driver measures a small training step, and chooses bf16 if bf16 is at least 1.2 times
            as fast as fp32, else fp32. An existing run keeps its format if all other settings are equal. The weights
            stay fp32.
        start_from: checkpoint folder from which the run takes its initial weights and the tokenizer, or null. The model
            in the folder must have the same config, except for generation settings. A run with pictures may also start
            from a text-only model with the same decoder and tokenizer.
        start_state: `weights` to take only the weights from the folder `start_from`, or `training` to continue the
            training of a checkpoint. With `training`, `start_from` must be a checkpoint of a run with the same settings
            and fewer steps. The new run then starts at the checkpoint's step, with its optimizer state and its position
            in the training rows.
        adapter: low-rank corrections (LoRA) of some weights, or null to train the weights themselves. If an adapter is
            set, only the corrections are trained. Before registration, the corrections are merged into the weights.
        augment: random changes of training pictures, or null for unchanged pictures.
        label_smoothing: share of each target token's probability that training spreads over all tokens of the
            vocabulary (Szegedy et al., 2015). The metrics `train/loss` and `val/loss` are computed without label
            smoothing.
        contrastive: weight of a contrastive loss that is added to the caption loss (SigLIP, Zhai et al., 2023), or 0
            for no contrastive loss. The contrastive loss compares each picture with the texts of all rows in one
            forward pass of one rank (`rows_at_once`). The metrics `train/loss` and `val/loss` do not contain the
            contrastive loss.
        loader_workers: number of threads of each rank that prepare batches in advance. With 0 threads, each batch is
            prepared when a step needs the batch.
        log_every: number of steps between two logs of the training metrics.
        validate_every: number of steps between two computations of the validation loss. The loss is also computed every
            `score_every` steps and after the last step.
        validate_rows: largest number of pictures on which the model is validated. For a text-only model, the number
            counts windows of tokens.
        score_every: number of steps between two computations of the metric `val/cider`, or null to never compute the
            metric. `val/cider` is the CIDEr of the captions that the model generates for the `validate_rows` validation
            pictures. The metric is also computed after the last step.
        best_by: metric that decides which checkpoint is the best. `loss` stands for the validation loss, and `cider`
            for the metric `val/cider`, which needs `score_every`.
        stop: training ends early after this number of consecutive values of the metric `best_by` without a new best
            value; null to take all steps.
        checkpoint_every: number of steps between two checkpoints. A checkpoint is also written after the last step, and
            at the step in `register`. If `register` is `best` or `stop` is set, a checkpoint is also written at each
            validation with a new best value of `best_by`, except in an adapter run.
        keep_checkpoints: number of newest checkpoints to keep. The best checkpoint and the checkpoint of the step in
            `register` are always kept in addition.
        caption_samples: number of validation pictures for which the model writes sample captions at each validation,
            for people to read.
        register_: checkpoint that is registered as a model version. The value is `last`, `best` (by the metric
            `best_by`), or the step of a checkpoint, such as 1200. If `register` is changed after the run has finished,
            the newly selected checkpoint is registered as a further model version.
        profile_steps: number of steps that PyTorch's profiler records on rank 0, after five unrecorded steps. The
            profiler trace is logged to MLflow.
        timeout_seconds: all ranks are stopped if a rank makes no progress for this number of seconds.
        max_restarts: largest number of times that a failed run is restarted from its last checkpoint. A run is
            restarted only if a restart can help.
        resume_changed_code: whether an unfinished run may be resumed although the training code has changed since the
            start of the run.
    """

    seed: int = 0
    steps: PositiveInt = 1000
    batch_size: PositiveInt = 64
    optimizer: OptimizerConfig = OptimizerConfig()
    rows_at_once: PositiveInt | None = None
    recompute_blocks: bool = False
    compile_blocks: bool = False
    parallel: Literal["ddp", "fsdp"] = "ddp"
    precision: Literal["auto", "fp32", "tf32", "bf16"] = "fp32"
    start_from: Annotated[str, Field(min_length=1)] | None = None
    start_state: Annotated[Literal["weights", "training"], ADDED_LATER] = "weights"
    adapter: AdapterConfig | None = None
    stages: tuple[StageConfig, ...] = ()
    augment: Annotated[AugmentConfig | None, ADDED_LATER] = None
    label_smoothing: Annotated[Probability, ADDED_LATER] = 0.0
    contrastive: Annotated[float, Field(ge=0), ADDED_LATER] = 0.0
    loader_workers: Annotated[int, Field(ge=0)] = 2
    log_every: PositiveInt = 10
    validate_every: PositiveInt = 200
    validate_rows: PositiveInt = 256
    score_every: Annotated[PositiveInt | None, ADDED_LATER] = None
    best_by: Annotated[BestBy, ADDED_LATER] = "loss"
    stop: Annotated[PositiveInt | None, ADDED_LATER] = None
    checkpoint_every: PositiveInt = 500
    keep_checkpoints: PositiveInt = 2
    caption_samples: PositiveInt = 8
    register_: Annotated[Register, Field(alias="register"), ADDED_LATER] = "last"
    profile_steps: Annotated[int, Field(ge=0)] = 0
    timeout_seconds: PositiveInt = 600
    max_restarts: Annotated[int, Field(ge=0)] = 2
    resume_changed_code: bool = False

    def find_unused(self, given: object) -> list[str]:
        """List the given settings of the optimizer that have no effect, because each stage has its own values.

        Args:
            given: value that the user has given for this section with --set. If the value is not a mapping, the list is
                empty.
        """
        optimizer = given.get("optimizer") if isinstance(given, dict) else None
        if not self.stages or not isinstance(optimizer, dict):
            return []
        unused = []
        if "lr" in optimizer:
            unused.append(
                "train.optimizer.lr has no effect, because the groups of train.stages have their own lr: change the lr "
                "of these groups (to find a run that an earlier release started with this option, write the value into "
                "the YAML file of the train config)"
            )
        if "warmup_steps" in optimizer and all(stage.warmup_steps is not None for stage in self.stages):
            unused.append(
                "train.optimizer.warmup_steps has no effect, because each stage of train.stages has its own "
                "warmup_steps: change the warmup_steps of the stages"
            )
        return unused

    def science(self) -> dict[str, Any]:
        """Return the settings that determine what the model learns."""
        return self.hashed_settings(exclude=EXECUTION_SETTINGS)

    @property
    def rewards_cider(self) -> bool:
        """Whether a stage rewards the CIDEr of sampled captions."""
        return any(stage.objective.kind == "cider" for stage in self.stages)

    @property
    def saves_best(self) -> bool:
        """Whether a checkpoint is written at each validated step that is better than all earlier validated steps.

        An adapter run has no such checkpoints, because only its last checkpoint can be registered.
        """
        return not self.adapter and (self.stop is not None or self.register_ == "best")

    def next_validated_step(self, step: int) -> int:
        """Return the first step after `step` at which the model is validated. The last step is validated too."""
        return self._next_multiple(step, self.validate_every, self.score_every or self.steps)

    def next_logged_step(self, step: int) -> int:
        """Return the first step after `step` whose metrics are logged."""
        return self._next_multiple(step, self.log_every, self.validate_every, self.score_every or self.steps)

    def _next_multiple(self, step: int, *intervals: int) -> int:
        return min(self.steps, *((max(step, 0) // interval + 1) * interval for interval in intervals))

    @model_validator(mode="before")
    @classmethod
    def _steps_of_stages(cls, given: Any) -> Any:
        """Set a missing `steps` to the total number of steps of the stages.

        Invalid values are ignored here, because the validation of the fields reports them.
        """
        stages = given.get("stages") if isinstance(given, dict) else None
        if stages and "steps" not in given:
            with contextlib.suppress(TypeError, KeyError, ValueError, AttributeError):
                return given | {"steps": sum(int(s["steps"] if isinstance(s, dict) else s.steps) for s in stages)}
        return given

    @model_validator(mode="after")
    def _stages_fit(self) -> Self:
        if self.stages and self.steps != (total := sum(stage.steps for stage in self.stages)):
            raise ValueError(
                f"steps is {self.steps}, but the stages together have {total} steps: remove the key steps, or "
                "change the steps of a stage"
            )
        if self.stages and self.adapter:
            raise ValueError(
                "stages and adapter exclude each other, because only the adapter learns: remove one of the two"
            )
        if self.rewards_cider and self.parallel == "fsdp":
            raise ValueError(
                "objective cider and parallel fsdp exclude each other: each rank needs all weights, so use parallel ddp"
            )
        return self

    @model_validator(mode="after")
    def _contrast_needs_whole_weights(self) -> Self:
        if self.contrastive and self.parallel == "fsdp":
            raise ValueError(
                "contrastive and parallel fsdp exclude each other: each rank needs all weights, so use parallel ddp"
            )
        return self

    @model_validator(mode="after")
    def _state_to_start_from(self) -> Self:
        if self.start_state == "training" and (not self.start_from or self.adapter):
            raise ValueError(
                "start_state training needs start_from without an adapter: set start_from to a run's checkpoint"
            )
        return self

    @model_validator(mode="after")
    def _best_is_measured(self) -> Self:
        if self.best_by == "cider" and not self.score_every:
            raise ValueError("best_by cider needs score_every: set score_every, or use best_by loss")
        return self

    @model_validator(mode="after")
    def _something_to_adapt(self) -> Self:
        if self.adapter and self.parallel == "fsdp":
            raise ValueError(
                "adapter and parallel fsdp exclude each other: fsdp needs one dtype for all weights; use parallel ddp"
            )
        if self.adapter and self.register_ != "last":
            raise ValueError(
                f"adapter and register {self.register_} exclude each other: only the last checkpoint contains the "
                "adapter in its weights, so use register last"
            )
        if self.adapter and not self.start_from:
            raise ValueError("adapter needs start_from: set start_from to the folder of the trained weights to adapt")
        return self

"""Stages of a training run: the steps, the trainable parameters and the learning rates of each stage.

Each stage starts with a new optimizer for its trainable parameters. Therefore frozen parameters have neither gradients
nor optimizer state, and a run that resumes at the first step of a stage needs only the weights.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from pipelines.config import TrainConfig
from pipelines.config.train import ObjectiveConfig, TextsObjectiveConfig
from vlm.model import VisionLanguageModel
from vlm.training.loop import SLOWER
from vlm.training.optim import build_adamw, match_patterns, schedule, set_trainable

TEXTS = TextsObjectiveConfig()


@dataclass(frozen=True)
class Stage:
    """Stage of a run. The stage consists of the steps [first, end).

    Attributes:
        first: first step of the stage.
        end: first step after the stage.
        lr: largest learning rate of any parameter.
        rates: learning rate for each pattern of parameter names, or None to train all trainable parameters at `lr`.
        objective: training objective of the stage.
        warmup_steps: number of warm-up steps of the learning rate, or None for the number in the run's settings.
    """

    first: int
    end: int
    lr: float
    rates: Mapping[str, float] | None
    objective: ObjectiveConfig = TEXTS
    warmup_steps: int | None = None

    def start(self, model: VisionLanguageModel, settings: TrainConfig) -> torch.optim.Optimizer:
        """Freeze the parameters that this stage does not train. Return a new optimizer for the trainable parameters.

        Raises:
            ConfigError: a pattern matches no parameter, or matches only parameters that an earlier pattern matches too.
        """
        if self.rates is not None:
            set_trainable(model, self.rates)
        config = settings.optimizer
        return build_adamw(model, lr=self.lr, betas=config.betas, weight_decay=config.weight_decay, rates=self.rates)

    def lr_of(self, step: int, settings: TrainConfig) -> float:
        """Return the largest learning rate at a step of the run."""
        config = settings.optimizer
        warmup = config.warmup_steps if self.warmup_steps is None else self.warmup_steps
        length = self.end - self.first
        return self.lr * schedule(config.schedule, step - self.first, steps=length, warmup_steps=warmup)


def plan_stages(settings: TrainConfig) -> list[Stage]:
    """Return the stages of a run, first stage first. A run without configured stages has a single stage."""
    if not settings.stages:
        return [Stage(0, settings.steps, settings.optimizer.lr, None)]
    ends = list(itertools.accumulate(stage.steps for stage in settings.stages))
    return [
        Stage(first, end, max(stage.rates.values()), stage.rates, stage.objective, stage.warmup_steps)
        for first, end, stage in zip([0, *ends], ends, settings.stages, strict=False)
    ]


def check_patterns(stages: Sequence[Stage], names: Sequence[str]) -> None:
    """Check the patterns of all stages before the first step, so that a late stage cannot fail after hours of training.

    Args:
        stages: stages of the run.
        names: names of all parameters of the model.

    Raises:
        ConfigError: a pattern of a stage matches no name, or only names that an earlier pattern of the stage matches.
    """
    for stage in stages:
        if stage.rates is not None:
            match_patterns(names, stage.rates)


def stage_at(stages: list[Stage], step: int) -> Stage:
    """Return the stage that contains a step, or the last stage if the step is after the last stage."""
    return next((stage for stage in stages if step < stage.end), stages[-1])


def advise_on_rates(fix: str, settings: TrainConfig) -> str:
    """Return the text `fix` of an error. In a run with stages, the text names the settings of the stages."""
    if not settings.stages:
        return fix
    slower = (
        "lower the lr of the groups in train.stages or raise the warmup_steps of the stage (this creates a new run)"
    )
    return fix.replace(SLOWER, slower)

"""The stages of a run: from which step to which what learns, and at which rate.

A stage begins with a fresh optimizer over what learns in it, so a frozen parameter has neither a gradient nor moments,
and a run that is resumed at the first step of a stage needs nothing but weights.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from pipelines.config import TrainConfig
from vlm.model import VisionLanguageModel
from vlm.training.optim import build_adamw, schedule, set_trainable


@dataclass(frozen=True)
class Stage:
    """Steps [first, end) of a run.

    Attributes:
        first: number of its first step.
        end: number of the first step after it.
        lr: the largest learning rate.
        rates: by pattern of parameters' names; None where all that may learn does so at `lr`.
    """

    first: int
    end: int
    lr: float
    rates: Mapping[str, float] | None

    def begin(self, model: VisionLanguageModel, settings: TrainConfig) -> torch.optim.Optimizer:
        """Freeze what does not learn in this stage; returns a fresh optimizer over what does.

        Raises:
            ConfigError: a pattern matches no parameter that no pattern before it matches.
        """
        if self.rates is not None:
            set_trainable(model, self.rates)
        chosen = settings.optimizer
        return build_adamw(model, lr=self.lr, betas=chosen.betas, weight_decay=chosen.weight_decay, rates=self.rates)

    def lr_of(self, step: int, settings: TrainConfig) -> float:
        """The largest learning rate at a step of the run."""
        chosen = settings.optimizer
        length = self.end - self.first
        return self.lr * schedule(chosen.schedule, step - self.first, steps=length, warmup_steps=chosen.warmup_steps)


def plan(settings: TrainConfig) -> list[Stage]:
    """The stages of a run, one after another; a run without any is one."""
    if not settings.stages:
        return [Stage(0, settings.steps, settings.optimizer.lr, None)]
    ends = list(itertools.accumulate(stage.steps for stage in settings.stages))
    return [
        Stage(first, end, max(stage.rates.values()), stage.rates)
        for first, end, stage in zip([0, *ends], ends, settings.stages, strict=False)
    ]


def stage_at(stages: list[Stage], step: int) -> Stage:
    """The stage that takes a step; the last one, where none is left."""
    return next((stage for stage in stages if step < stage.end), stages[-1])

"""Where a run's weights come from, and what its checkpoints hold of them.

Without an adapter a checkpoint holds the whole model. With one it holds the adapter alone, a few hundredths of the
size, because the rest lies in `train.start_from`; the last one holds the merged model beside it, so whoever evaluates,
captions or serves the run finds a plain model and need not know.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from pipelines.config import TrainConfig
from vlm.build import build_model
from vlm.checkpoint import WEIGHTS, load_weights, model_weights, save_model, save_weights
from vlm.config import ModelConfig
from vlm.files import file_digest
from vlm.model import VisionLanguageModel
from vlm.text.base import Tokenizer
from vlm.training.adapters import (
    adapter_weights,
    add_adapter,
    cast_frozen_to_bf16,
    load_adapter,
    load_adapter_weights,
    merge_adapter,
    save_adapter_weights,
)
from vlm.training.state import TrainingSnapshot, save_state, snapshot_training


class Start:
    """Makes the model that a run begins with, and reads and writes the run's checkpoints."""

    def __init__(self, config: ModelConfig, settings: TrainConfig, tokenizer: Tokenizer) -> None:
        self.config, self.settings, self.tokenizer = config, settings, tokenizer
        self.weights = Path(settings.start_from) / WEIGHTS if settings.start_from else None

    def model(self, device: torch.device) -> VisionLanguageModel:
        """Fresh or given weights, and a fresh adapter where there is to be one; torch's generator draws.

        Raises:
            CheckpointError: the weights to start from cannot be read or are of another model.
            ConfigError: the adapter's pattern matches nothing that can be adapted.
        """
        model = self._base()
        if self.settings.adapter:
            add_adapter(model, self.settings.adapter)
            if self.settings.precision == "bf16":
                cast_frozen_to_bf16(model)
        return model.to(device)

    def plain(self, weights: Mapping[str, Tensor], device: torch.device) -> VisionLanguageModel:
        """A whole model with these weights, by name."""
        with torch.random.fork_rng(devices=[]):  # its fresh weights are overwritten: leave the caller's generator alone
            model = build_model(self.config, self.tokenizer.vocab_size).to(device)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(weights[name])
        return model

    def fill(self, folder: Path, model: VisionLanguageModel) -> None:
        """Give a model the weights that a checkpoint of the run holds.

        Raises:
            CheckpointError: it is damaged, or of another model or base.
        """
        if self.settings.adapter:
            load_adapter_weights(folder, model, self._digest)
        else:
            load_weights(model, folder / WEIGHTS)

    def copy(
        self, model: VisionLanguageModel, optimizer: torch.optim.Optimizer, step: int, *, last: bool
    ) -> Callable[[Path], None]:
        """Copy all that a checkpoint holds; returns what writes it into an empty folder, at any later time."""
        adapted = self.settings.adapter is not None
        copy = snapshot_training(adapter_weights(model) if adapted else model_weights(model), model, optimizer, step)
        return lambda folder: self._write(folder, copy, last=last)

    def _write(self, folder: Path, copy: TrainingSnapshot, *, last: bool) -> None:
        save_state(folder, copy)
        if not self.settings.adapter:
            save_weights(folder, copy.weights, self.config, self.tokenizer)
            return
        save_adapter_weights(folder, copy.weights, self.settings.adapter, self._digest)
        if last:
            # From the files, as anybody would: the model that has learned may hold its base in half precision.
            merged = self._base()
            load_adapter(folder, merged, self._digest)
            merge_adapter(merged)
            save_model(folder, merged, self.tokenizer)

    def _base(self) -> VisionLanguageModel:
        model = build_model(self.config, self.tokenizer.vocab_size)
        if self.weights:
            load_weights(model, self.weights)
        return model

    @cached_property
    def _digest(self) -> str:
        assert self.weights, "TrainConfig allows no adapter without start_from"
        return file_digest(self.weights)

"""Initial weights of a run, and the weights in the run's checkpoints.

Without an adapter, a checkpoint contains the weights of the whole model. With an adapter, a checkpoint contains only
the adapter, a few percent of the model's size, because the base weights are in `train.start_from`. The last checkpoint
of an adapter run also contains the merged model, so evaluation, captioning and serving can load the checkpoint like any
other model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from pipelines.config import TrainConfig
from vlm.checkpoint import WEIGHTS, load_weights, model_weights, save_model, save_weights
from vlm.config import ModelConfig
from vlm.factory import build_model
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


class ModelBuilder:
    """Builds the model of a run with its initial weights, and loads and saves the weights in checkpoints."""

    def __init__(self, config: ModelConfig, settings: TrainConfig, tokenizer: Tokenizer) -> None:
        self.config, self.settings, self.tokenizer = config, settings, tokenizer
        self.weights = Path(settings.start_from) / WEIGHTS if settings.start_from else None

    def model(self, device: torch.device) -> VisionLanguageModel:
        """Build the model with new or loaded weights, and with a new adapter if one is configured.

        New weights are drawn from torch's global generator.

        Raises:
            CheckpointError: the weights in `train.start_from` cannot be read or belong to another model.
            ConfigError: the adapter's pattern matches no layer that can be adapted.
        """
        model = self._base_model()
        if self.settings.adapter:
            add_adapter(model, self.settings.adapter)
            if self.settings.precision == "bf16":
                cast_frozen_to_bf16(model)
        return model.to(device)

    def plain(self, weights: Mapping[str, Tensor], device: torch.device) -> VisionLanguageModel:
        """Build an unsharded model from a dict of weights, without changing the state of torch's random generator."""
        with torch.random.fork_rng(devices=[]):
            model = build_model(self.config, self.tokenizer.vocab_size).to(device)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(weights[name])
        return model

    def load(self, folder: Path, model: VisionLanguageModel) -> None:
        """Load the weights of a checkpoint into the model.

        Raises:
            CheckpointError: the checkpoint is damaged, or belongs to another model or other base weights.
        """
        if self.settings.adapter:
            load_adapter_weights(folder, model, self._digest)
        else:
            load_weights(model, folder / WEIGHTS)

    def copy(
        self, model: VisionLanguageModel, optimizer: torch.optim.Optimizer, step: int, *, last: bool
    ) -> Callable[[Path], None]:
        """Copy the training state. Return a function that writes the copy as a checkpoint into an empty folder.

        The returned function may be called later, while training continues.
        """
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
            # Merge from the files, because the trained model may hold its base weights in half precision.
            merged = self._base_model()
            load_adapter(folder, merged, self._digest)
            merge_adapter(merged)
            save_model(folder, merged, self.tokenizer)

    def _base_model(self) -> VisionLanguageModel:
        model = build_model(self.config, self.tokenizer.vocab_size)
        if self.weights:
            load_weights(model, self.weights)
        return model

    @cached_property
    def _digest(self) -> str:
        assert self.weights, "TrainConfig allows no adapter without start_from"
        return file_digest(self.weights)

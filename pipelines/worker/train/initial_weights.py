"""Initial weights of a run, and the weights in the run's checkpoints.

Without an adapter, a checkpoint contains the weights of the whole model. With an adapter, a checkpoint contains only
the adapter, because the base weights are in `train.start_from`. An adapter has only a few percent of the model's size.
The last checkpoint of an adapter run also contains the merged model, so evaluation, captioning and serving can load the
checkpoint like any other model.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import torch

from pipelines.config import TrainConfig
from pipelines.worker.train.slices import CheckpointSlices
from vlm.checkpoint import WEIGHTS, fill_weights, load_config, save_config, save_model, save_weights
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
from vlm.training.parallel import world_size
from vlm.training.sharded import build_sharded, rows_of
from vlm.training.state import TrainingSnapshot, save_state, snapshot_training


class ModelBuilder:
    """Builder that makes the model of a run with its initial weights, and loads and saves the weights."""

    def __init__(self, config: ModelConfig, settings: TrainConfig, tokenizer: Tokenizer) -> None:
        self.config, self.settings, self.tokenizer = config, settings, tokenizer
        self.weights = Path(settings.start_from) / WEIGHTS if settings.start_from else None

    def model(self, device: torch.device) -> VisionLanguageModel:
        """Build the model with new or loaded weights, and with a new adapter if one is configured.

        New weights are drawn from torch's global generator. With `train.parallel: fsdp` and several ranks, the model is
        sharded over the ranks, which must call this method together.

        Raises:
            CheckpointError: the weights in `train.start_from` cannot be read or belong to another model.
            ConfigError: the adapter's pattern matches no layer that can be adapted.
        """
        if self.settings.parallel == "fsdp" and world_size() > 1:
            return self._sharded_model(device)
        model = self._base_model()
        if self.settings.adapter:
            add_adapter(model, self.settings.adapter)
            if self.settings.precision == "bf16":
                cast_frozen_to_bf16(model)
        return model.to(device)

    def load(self, folder: Path, model: VisionLanguageModel) -> None:
        """Load the weights of a checkpoint into the model.

        Raises:
            CheckpointError: the checkpoint is damaged, or does not belong to this model and these base weights.
        """
        if self.settings.adapter:
            load_adapter_weights(folder, model, self._digest)
        else:
            self._fill(model, folder / WEIGHTS)

    def copy(self, model: VisionLanguageModel, optimizer: torch.optim.Optimizer, step: int) -> TrainingSnapshot:
        """Copy the training state. If the model is sharded, copy only the part of the state that this rank writes."""
        weights = adapter_weights(model) if self.settings.adapter else dict(model.named_parameters())
        return snapshot_training(weights, model, optimizer, step)

    def write_joined(self, folder: Path, slices: CheckpointSlices, step: int) -> None:
        """Write the checkpoint of a sharded model into an empty folder, from the slices of all ranks."""
        save_config(folder, self.config, self.tokenizer)
        slices.join(folder, step)

    def write(self, folder: Path, copy: TrainingSnapshot, *, last: bool) -> None:
        """Write a checkpoint into an empty folder, from a copy of the training state.

        Args:
            folder: folder of the checkpoint.
            copy: copy of the training state of a model that is not sharded.
            last: whether the checkpoint is the last checkpoint of the run. In an adapter run, the last checkpoint also
                contains the merged model.
        """
        save_state(folder, copy)
        if not self.settings.adapter:
            save_weights(folder, copy.weights, self.config, self.tokenizer)
            return
        save_adapter_weights(folder, copy.weights, self.settings.adapter, self._digest)
        if last:
            # Read the base weights from their files again, and merge the adapter into these weights. The trained model
            # may have its base weights in half precision.
            merged = self._base_model()
            load_adapter(folder, merged, self._digest)
            merge_adapter(merged)
            save_model(folder, merged, self.tokenizer)

    def _base_model(self) -> VisionLanguageModel:
        model = build_model(self.config, self.tokenizer.vocab_size)
        if self.weights:
            self._fill(model, self.weights, decoder_alone=self._starts_from_decoder)
        return model

    def _sharded_model(self, device: torch.device) -> VisionLanguageModel:
        draw = self.weights is None or self._starts_from_decoder
        model = build_sharded(self.config, self.tokenizer.vocab_size, device, draw=draw)
        if self.weights:
            self._fill(model, self.weights, decoder_alone=self._starts_from_decoder)
        return model

    def _fill(self, model: VisionLanguageModel, path: Path, *, decoder_alone: bool = False) -> None:
        """Read weights from a file into the model. If the model is sharded, read only this rank's rows of each tensor.

        With `decoder_alone`, the file holds the decoder of a text-only model, and no other weights are read.
        """
        rows = {
            name: rows_of(p.detach())
            for name, p in model.named_parameters()
            if not decoder_alone or (name.startswith("decoder.") and not name.startswith("decoder.cross_blocks."))
        }
        fill_weights(self.config, rows, path)

    @cached_property
    def _starts_from_decoder(self) -> bool:
        """Whether a captioner starts from a text-only model."""
        if self.weights is None or self.config.text_only:
            return False
        return load_config(self.weights.parent).text_only

    @cached_property
    def _digest(self) -> str:
        assert self.weights, "TrainConfig requires start_from if there is an adapter"
        return file_digest(self.weights)

"""Low-rank adapters (LoRA, Hu et al., 2021), which are small trained updates to the linear layers of a frozen model.

An adapted layer computes x W' + (alpha / rank) x A' B', where the prime marks a transposed matrix. The matrix A
(`down`) starts at random values and the matrix B (`up`) starts at zero, so a fresh adapter leaves the output exactly
unchanged. `merge_adapter` adds the update to W and restores a plain model.

adapter.safetensors   the matrices A and B of each adapted layer
adapter.json          the AdapterConfig, and the SHA-256 of the weights file that the adapter was trained on

The SHA-256 identifies the base weights. The shapes of the tensors cannot identify the base weights, because a different
model with the same shapes would load the adapter without an error and generate nonsense.

Letters in tensor names: rank of the adapter (R).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from vlm.checkpoint import ADAPTER, fill_tensors
from vlm.config import AdapterConfig, Config, read_error_message
from vlm.errors import CheckpointError, ConfigError, nearest
from vlm.layers.linear import linear_layers
from vlm.layers.moe import GroupedLinear
from vlm.training.optim import collapse_names

ADAPTER_CONFIG = "adapter.json"


class AdapterFile(Config):
    """Content of adapter.json.

    Attributes:
        adapter: config of the adapter.
        base: SHA-256 of the weights file that the adapter was trained on.
    """

    adapter: AdapterConfig
    base: str


class LoraLinear(nn.Linear):
    """Linear layer with a low-rank update. The frozen weight and bias keep their parameter names and their storage."""

    def __init__(self, base: nn.Linear, config: AdapterConfig) -> None:
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.scale = config.alpha / config.rank
        device = base.weight.device
        down_RI = torch.randn(config.rank, base.in_features, device=device) * base.in_features**-0.5
        self.down = nn.Parameter(down_RI)
        self.up = nn.Parameter(torch.zeros(base.out_features, config.rank, device=device))

    def forward(self, input: Tensor) -> Tensor:
        """Compute the output of the linear layer, including the low-rank update."""
        return super().forward(input) + self.scale * F.linear(F.linear(input, self.down), self.up)

    def merged(self) -> nn.Linear:
        """Return a plain linear layer whose weight includes the low-rank update."""
        plain = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        update = self.scale * (self.up.detach().float() @ self.down.detach().float())
        plain.weight = nn.Parameter((self.weight.detach().float() + update).to(self.weight.dtype))
        plain.bias = self.bias
        return plain


def add_adapter(model: nn.Module, config: AdapterConfig) -> None:
    """In place, freeze a model and add a fresh low-rank update to each linear layer whose name matches the pattern.

    The routers of mixtures of experts never get an update. The values of the matrices A come from torch's global random
    generator, which the caller seeds first.

    Raises:
        ConfigError: the pattern matches no linear layer, or matches a layer that shares its weight with another layer.
    """
    linears = linear_layers(model)
    chosen = {name: layer for name, layer in linears.items() if re.fullmatch(config.pattern, name)}
    if not chosen:
        raise _no_match_error(config.pattern, linears)
    _reject_shared_weight(model, config.pattern, chosen)
    model.requires_grad_(False)
    for name, layer in chosen.items():
        model.set_submodule(name, LoraLinear(layer, config))


def cast_frozen_to_bf16(model: nn.Module) -> None:
    """Convert frozen weights of linear layers and experts to bf16, in place, to save memory under bf16 autocast.

    The conversion does not change results, because autocast would round these weights in the same way at every use.
    Autocast does not round embedding tables and routers, so the weights of embedding tables and routers stay in fp32.
    An output head that shares the weight of an embedding table also stays in fp32.
    """
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    experts = [module for module in model.modules() if isinstance(module, GroupedLinear)]
    for weight in (layer.weight for layer in (*linear_layers(model).values(), *experts)):
        if not weight.requires_grad and id(weight) not in tables:
            weight.data = weight.data.bfloat16()


def merge_adapter(model: nn.Module) -> None:
    """Add each low-rank update to the weight of its layer, and remove the adapter, in place. All parameters of the
    model become trainable.
    """
    for name, layer in linear_layers(model).items():
        if isinstance(layer, LoraLinear):
            model.set_submodule(name, layer.merged())
    model.requires_grad_(True)


def save_adapter(folder: Path, model: nn.Module, config: AdapterConfig, base_sha256: str) -> None:
    """Write the adapter of a model into a folder. Create the folder if it is missing.

    Args:
        folder: folder for adapter.safetensors and adapter.json.
        model: model with an adapter.
        config: config of the adapter.
        base_sha256: SHA-256 of the weights file that the model was loaded from (`vlm.files.file_digest`).
    """
    save_adapter_weights(folder, adapter_weights(model), config, base_sha256)


def save_adapter_weights(folder: Path, weights: Mapping[str, Tensor], config: AdapterConfig, base_sha256: str) -> None:
    """Write the same files as `save_adapter`, from a dict of the adapter's weights by name."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / ADAPTER)
    file = AdapterFile(adapter=config, base=base_sha256)
    (folder / ADAPTER_CONFIG).write_text(file.model_dump_json(indent=2), encoding="utf-8")


def load_adapter(folder: Path, model: nn.Module, base_sha256: str) -> None:
    """Add the adapter of a folder to a plain model, in place.

    Args:
        folder: folder that `save_adapter` wrote.
        model: plain model, loaded from the weights file on which the adapter was trained.
        base_sha256: SHA-256 of the weights file that `model` was loaded from.

    Raises:
        CheckpointError: a file is missing or damaged, or the adapter was trained on different weights, or the adapter's
            tensors do not match the model.
        ConfigError: the adapter's pattern matches no linear layer of the model, or matches a layer that shares its
            weight with another layer.
    """
    gpus = range(torch.cuda.device_count())
    with torch.random.fork_rng(devices=gpus):  # building an adapter must not change the caller's random state
        add_adapter(model, _read(folder, base_sha256).adapter)
    load_adapter_weights(folder, model, base_sha256)


def load_adapter_weights(folder: Path, model: nn.Module, base_sha256: str) -> None:
    """Load the weights of a saved adapter into a model to which an adapter with the same config has been added.

    The arguments, and the causes of a CheckpointError, are the same as in `load_adapter`."""
    _read(folder, base_sha256)
    fill_tensors(adapter_weights(model), folder / ADAPTER)


def _read(folder: Path, base_sha256: str) -> AdapterFile:
    path = folder / ADAPTER_CONFIG
    try:
        file = AdapterFile.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValidationError) as error:
        raise CheckpointError(
            "the adapter's config cannot be read",
            where=str(path),
            got=read_error_message(error, AdapterFile),
            fix=f"choose the folder of an adapter, which contains {ADAPTER} and {ADAPTER_CONFIG}",
        ) from None
    if file.base != base_sha256:
        raise CheckpointError(
            "the adapter was trained on other weights",
            where=str(path),
            got=f"weights with SHA-256 {base_sha256[:12]}, the adapter needs {file.base[:12]}",
            fix="load the weights that the adapter was trained on, from the folder in train.start_from of its run",
        )
    return file


def adapter_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return a dict from full parameter name to weight, for the weights `down` and `up` of each adapted layer."""
    return {
        f"{name}.{part}": getattr(layer, part).detach()
        for name, layer in linear_layers(model).items()
        if isinstance(layer, LoraLinear)
        for part in ("down", "up")
    }


def _no_match_error(pattern: str, names: Iterable[str]) -> ConfigError:
    kinds = collapse_names(names)
    near = nearest(pattern, kinds, count=3)
    return ConfigError(
        "the adapter's pattern matches no linear layer",
        where="train.adapter.pattern",
        got=pattern,
        fix=(f"nearest: {', '.join(near)}; " if near else "")
        + f"the pattern must match the whole of one of these names: {', '.join(kinds)}",
    )


def _reject_shared_weight(model: nn.Module, pattern: str, chosen: dict[str, nn.Linear]) -> None:
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for name, layer in chosen.items():
        others = [owner for owner in owners[id(layer.weight)] if owner != f"{name}.weight"]
        if others:
            raise ConfigError(
                "the adapter's pattern matches a layer that shares its weight with another layer",
                where="train.adapter.pattern",
                got=f"{pattern} matches {name}, which shares its weight with {others[0]}: merging would change both",
                fix="narrow the pattern, for example decoder.blocks.*",
            )

"""Low-rank adapters (LoRA; Hu et al., 2021): a frozen model learns through small corrections of its linear layers.

An adapted layer computes x W' + (alpha / rank) x A' B', with A (`down`) random and B (`up`) zero at first: an adapter
that has learned nothing changes nothing, not a bit. `merge_adapter` adds the correction to W and leaves a plain model.

adapter.safetensors   A and B of each adapted layer
adapter.json          the AdapterConfig, and the SHA-256 of the weights file that the adapter corrects

The file's digest, not the shapes of its weights: another training of the same shapes would take the adapter without a
complaint and say nonsense.

Letters: R rank.
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

from vlm.checkpoint import fill_tensors
from vlm.config import AdapterConfig, Config, read_error_message
from vlm.errors import CheckpointError, ConfigError, nearest
from vlm.layers.linear import linear_layers
from vlm.layers.moe import GroupedLinear

ADAPTER, ADAPTER_CONFIG = "adapter.safetensors", "adapter.json"


class AdapterFile(Config):
    """adapter.json.

    Attributes:
        adapter: which layers, and how.
        base: SHA-256 of the weights file the adapter was trained on.
    """

    adapter: AdapterConfig
    base: str


class LoraLinear(nn.Linear):
    """A frozen linear layer and its correction; weight and bias keep their names and their storage."""

    def __init__(self, base: nn.Linear, config: AdapterConfig) -> None:
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.scale = config.alpha / config.rank
        device = base.weight.device
        down_RI = torch.randn(config.rank, base.in_features, device=device) * base.in_features**-0.5
        self.down = nn.Parameter(down_RI)
        self.up = nn.Parameter(torch.zeros(base.out_features, config.rank, device=device))

    def forward(self, input: Tensor) -> Tensor:
        """The layer's output, corrected."""
        return super().forward(input) + self.scale * F.linear(F.linear(input, self.down), self.up)

    def merged(self) -> nn.Linear:
        """A plain linear layer that computes the same."""
        plain = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        correction = self.scale * (self.up.detach().float() @ self.down.detach().float())
        plain.weight = nn.Parameter((self.weight.detach().float() + correction).to(self.weight.dtype))
        plain.bias = self.bias
        return plain


def add_adapter(model: nn.Module, config: AdapterConfig) -> None:
    """Freeze a model and give each linear layer that the pattern matches a fresh correction, in place.

    A is drawn from torch's global generator: seed it first.

    Raises:
        ConfigError: the pattern matches no linear layer, or one that shares its weight with another part of the model.
    """
    linears = linear_layers(model)
    chosen = {name: layer for name, layer in linears.items() if re.fullmatch(config.pattern, name)}
    if not chosen:
        raise _no_match(config.pattern, linears)
    _refuse_shared(model, config.pattern, chosen)
    model.requires_grad_(False)
    for name, layer in chosen.items():
        model.set_submodule(name, LoraLinear(layer, config))


def cast_frozen_to_bf16(model: nn.Module) -> None:
    """Keep frozen linear weights and experts in bf16, in place: for a model that runs under bf16 autocast.

    Autocast makes these very numbers of them at every use, so nothing changes but the memory. A weight that is a token
    table too stays: autocast leaves tables alone. So do routers, which work in fp32.
    """
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    experts = [module for module in model.modules() if isinstance(module, GroupedLinear)]
    for weight in (layer.weight for layer in (*linear_layers(model).values(), *experts)):
        if not weight.requires_grad and id(weight) not in tables:
            weight.data = weight.data.bfloat16()


def merge_adapter(model: nn.Module) -> None:
    """Add each correction to its weight, in place; what is left is a plain model, trainable as a whole."""
    for name, layer in linear_layers(model).items():
        if isinstance(layer, LoraLinear):
            model.set_submodule(name, layer.merged())
    model.requires_grad_(True)


def save_adapter(folder: Path, model: nn.Module, config: AdapterConfig, base: str) -> None:
    """Write the adapter of a model that has one; the folder is created.

    Args:
        folder: of the two files.
        model: adapted by `config`.
        config: which layers, and how.
        base: SHA-256 of the weights file that the model was filled from (`vlm.files.file_digest`).
    """
    save_adapter_weights(folder, adapter_weights(model), config, base)


def save_adapter_weights(folder: Path, corrections: Mapping[str, Tensor], config: AdapterConfig, base: str) -> None:
    """`save_adapter` of corrections that have left their model, by name."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in corrections.items()}, folder / ADAPTER)
    file = AdapterFile(adapter=config, base=base)
    (folder / ADAPTER_CONFIG).write_text(file.model_dump_json(indent=2), encoding="utf-8")


def load_adapter(folder: Path, model: nn.Module, base: str) -> None:
    """Give a plain model the adapter of a folder, in place.

    Args:
        folder: written by `save_adapter`.
        model: filled from the weights file that the adapter was trained on.
        base: SHA-256 of that file.

    Raises:
        CheckpointError: a file is missing or damaged, or the adapter is of another base or of other layers.
    """
    with torch.random.fork_rng(devices=[]):  # fresh corrections are overwritten: leave the caller's generator alone
        add_adapter(model, _read(folder, base).adapter)
    load_adapter_weights(folder, model, base)


def load_adapter_weights(folder: Path, model: nn.Module, base: str) -> None:
    """Fill the adapter that a model has from a folder; arguments and errors as in `load_adapter`."""
    _read(folder, base)
    fill_tensors(adapter_weights(model), folder / ADAPTER)


def _read(folder: Path, base: str) -> AdapterFile:
    path = folder / ADAPTER_CONFIG
    try:
        file = AdapterFile.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValidationError) as error:
        raise CheckpointError(
            "the adapter's config cannot be read",
            where=str(path),
            got=read_error_message(error),
            fix=f"an adapter's folder holds {ADAPTER} and {ADAPTER_CONFIG}",
        ) from None
    if file.base != base:
        raise CheckpointError(
            "the adapter was trained on other weights",
            where=str(path),
            got=f"weights with SHA-256 {base[:12]}, the adapter's have {file.base[:12]}",
            fix="load the weights it was trained on: the run's train.start_from names their folder",
        )
    return file


def adapter_weights(model: nn.Module) -> dict[str, Tensor]:
    """`down` and `up` of each adapted layer, by full name; no copies."""
    return {
        f"{name}.{part}": getattr(layer, part).detach()
        for name, layer in linear_layers(model).items()
        if isinstance(layer, LoraLinear)
        for part in ("down", "up")
    }


def _no_match(pattern: str, names: Iterable[str]) -> ConfigError:
    """Names with their block numbers as N: a few lines however deep the model is."""
    kinds = list(dict.fromkeys(re.sub(r"\.\d+\.", ".N.", name) for name in names))
    near = nearest(pattern, kinds, count=3)
    return ConfigError(
        "the adapter's pattern matches no linear layer",
        where="train.adapter.pattern",
        got=pattern,
        fix=(f"nearest: {', '.join(near)}; " if near else "")
        + f"it must match a whole name; there are: {', '.join(kinds)}",
    )


def _refuse_shared(model: nn.Module, pattern: str, chosen: dict[str, nn.Linear]) -> None:
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for name, layer in chosen.items():
        others = [owner for owner in owners[id(layer.weight)] if owner != f"{name}.weight"]
        if others:
            raise ConfigError(
                "the adapter's pattern matches a layer that shares its weight",
                where="train.adapter.pattern",
                got=f"{pattern} matches {name}, whose weight is {others[0]} too: merging would change both",
                fix="narrow the pattern, for example decoder.blocks.*",
            )

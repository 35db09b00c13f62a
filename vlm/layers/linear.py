"""Lookup of the linear layers of a model, for adapters and quantization."""

from __future__ import annotations

from torch import nn

from vlm.layers.moe import MoeMlp


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Return a dict from name to linear layer. The routers of experts are left out, because router weights must stay in
    fp32.
    """
    routers = router_layers(model)
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module not in routers
    }


def router_layers(model: nn.Module) -> list[nn.Linear]:
    """Return the router layers and the noise layers of all mixtures of experts."""
    mixtures = [module for module in model.modules() if isinstance(module, MoeMlp)]
    return [layer for mixture in mixtures for layer in (mixture.router, mixture.noise) if layer is not None]

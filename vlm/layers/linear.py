"""Which layers of a model are linear layers, for whoever replaces or stores them."""

from __future__ import annotations

from torch import nn

from vlm.layers.moe import MoeMlp


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Linear layers by name, without routers: a mixture uses their weights itself, and in fp32."""
    routers = router_layers(model)
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module not in routers
    }


def router_layers(model: nn.Module) -> list[nn.Linear]:
    """What a mixture's routing is made of."""
    mixtures = [module for module in model.modules() if isinstance(module, MoeMlp)]
    return [layer for mixture in mixtures for layer in (mixture.router, mixture.noise) if layer is not None]

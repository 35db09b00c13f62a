"""Construction of a model whose weights are on the meta device, where they take no memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

RANDOM_INIT = (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_, Tensor.normal_, Tensor.uniform_)
"""Functions of torch that initialise a tensor with random numbers."""


def initialized_tensor(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """Return the tensor that a function of RANDOM_INIT initialises if it is called with these arguments."""
    tensor: Tensor = kwargs["tensor"] if "tensor" in kwargs else args[0]
    return tensor


def draw_like(tensor: Tensor, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """Return a new CPU tensor with the shape of `tensor`, initialised by `func`, which is a function of RANDOM_INIT."""
    drawn = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    others = {name: value for name, value in kwargs.items() if name != "tensor"}
    func(drawn, *(args if "tensor" in kwargs else args[1:]), **others)
    return drawn


def replace_parameters(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Replace parameters of a model with tensors of the same shapes, without copying the tensors.

    A parameter that several modules share (a tied weight) is replaced in all these modules.

    Args:
        model: model whose parameters may be on the meta device.
        tensors: dict from the name of a parameter, as in `named_parameters`, to its new value.
    """
    new: dict[nn.Parameter, nn.Parameter] = {}
    for name, tensor in tensors.items():
        old = model.get_parameter(name)
        assert old.shape == tensor.shape
        new[old] = nn.Parameter(tensor, requires_grad=old.requires_grad)
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter in new:
                module._parameters[key] = new[parameter]


FACTORIES = (torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn)


class Fp32(TorchFunctionMode):
    """Context in which the functions of FACTORIES create fp32 tensors if the caller does not state a type.

    Layers of torch create their weights with these functions and without a type. Outside this context, the default type
    of the process would decide how the weights are stored.
    """

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Add the missing type to the call."""
        kwargs = dict(kwargs or {})
        if func in FACTORIES and kwargs.get("dtype") is None:
            kwargs["dtype"] = torch.float32
        return func(*args, **kwargs)


class EmptyOnMeta(TorchFunctionMode):
    """Context in which `torch.empty` returns meta tensors, which take no memory.

    Layers of torch create their weights with `torch.empty`, so these weights are meta tensors. Tensors that a
    constructor creates in another way, such as zeros or rotary angles, are real tensors. Random initialisation of meta
    tensors is skipped, because torch would first load its compiler, which takes 150 MB and several seconds.

    Args:
        draw: whether to draw and discard the random numbers of each skipped initialisation. If true, torch's random
            generator ends in the same state as after the construction of a real model.
    """

    def __init__(self, *, draw: bool = False) -> None:
        super().__init__()
        self._draw = draw

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Create meta tensors, and skip the random initialisation of meta tensors."""
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        if func in RANDOM_INIT and (tensor := initialized_tensor(args, kwargs)).is_meta:
            if self._draw:
                draw_like(tensor, func, args, kwargs)
            return tensor
        return func(*args, **kwargs)

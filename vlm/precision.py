"""Lower precision for inference, with 16-bit weights or with linear layers that torchao quantizes to 8 or 4 bits.

The conversion changes a model in memory. Checkpoint files keep the trained weights. The output head is not quantized
for two reasons. Rounding errors of the head would directly change the logits, and the weight of a tied head would be
stored twice.

A safetensors file can hold the converted weights (`vlm.checkpoint.save_converted`). Safetensors files hold only plain
tensors, and a quantized weight of torchao consists of several plain tensors (integers, scales). Each plain tensor is
stored under the name `NAME:PART`, for example `decoder.blocks.0.mlp.up.weight:qdata`.

`find_precision` and `find_device` check the arguments of `vlm.load`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vlm.config import Precision
from vlm.errors import ArgumentError, ConfigError, UserError, did_you_mean
from vlm.layers.linear import linear_layers, router_layers
from vlm.model import VisionLanguageModel

log = logging.getLogger(__name__)

INT4_GROUP_SIZE = 32
"""Number of input channels that share an int4 scale and zero point.

The scale and the zero point of 32 weights together take 32 bits, so each weight takes 4 + 32 / 32 = 5 bits in all.
"""
INT4_OUTPUT_MULTIPLE = 16
"""On a CPU, the int4 kernel can run a layer only if its number of output channels is a multiple of this number."""


def find_precision(name: object) -> Precision:
    """Return the precision with this name.

    Raises:
        ConfigError: there is no precision of this name.
    """
    if isinstance(name, str) and name in set(Precision):
        return Precision(name)
    raise ConfigError(
        "there is no such precision",
        where="precision",
        got=f"{name!r}{did_you_mean(str(name), [each.value for each in Precision])}",
        fix=f"choose from: {', '.join(Precision)}",
    )


def find_device(device: object) -> torch.device:
    """Return a torch device that this machine has.

    Raises:
        ArgumentError: the device does not exist, or torch cannot use the device on this machine.
    """
    try:
        if isinstance(device, bool) or not isinstance(device, str | int | torch.device):
            raise TypeError(f"a {type(device).__name__} is not a device")
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, TypeError, AssertionError, NotImplementedError) as error:
        usable = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        raise ArgumentError(
            "the argument `device` cannot be used",
            got=f"{device!r}: {str(error).splitlines()[0][:200]}",
            fix=f"choose one of the devices of this machine: {', '.join(usable)}",
        ) from None
    return found


def set_precision(model: VisionLanguageModel, precision: Precision, device: torch.device | None = None) -> None:
    """Convert the weights of a model in place, for inference only. Rotary tables and routers stay in fp32.

    Args:
        model: model with fp32 weights.
        precision: number format of the converted weights.
        device: device to which the model is moved, or None for the model's current device. The weights are moved after
            their conversion to 16 bits and before they are quantized, so that a GPU never holds all weights in fp32.

    Raises:
        UserError: the precision needs torchao, and torchao is not installed; or a weight is too large for the format.
    """
    if precision is not Precision.FP32:
        _convert_plain(model, precision)
    if device is not None:
        model.to(device)
    if precision.quantized:
        model.requires_grad_(False)
        _quantize(model, precision, _quantized_layers(model, precision))


def _convert_plain(model: VisionLanguageModel, precision: Precision) -> None:
    """Convert the weights of a model in place to the number format that they have before quantization."""
    precision.require()
    dtypes = _plain_dtypes(model, precision)
    _check_range(model, dtypes)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtypes[name])
    set_compute_dtype(model, precision)


def _check_range(model: VisionLanguageModel, dtypes: Mapping[str, torch.dtype]) -> None:
    """Check that no finite weight becomes infinite, because fp16 has no numbers above 65504."""
    limit, large = torch.finfo(torch.float16).max, []
    for name, weight in model.named_parameters():
        if dtypes[name] is torch.float16:
            lowest, highest = torch.aminmax(weight.detach())
            if limit < max(-float(lowest), float(highest)) < math.inf:
                large.append(name)
    if large:
        raise UserError(
            "the weights do not fit the number format",
            where="precision fp16",
            got=f"numbers above {limit:.0f} in {', '.join(large[:3])}" + (" and others" if len(large) > 3 else ""),
            fix="use precision bf16 or fp32",
        )


def check_saveable(model: VisionLanguageModel) -> None:
    """Check that a checkpoint can store the weights of a model. Log a warning if the weights have only 16 bits.

    Raises:
        UserError: the weights are quantized.
    """
    quantized = [name for name, weight in model.named_parameters() if hasattr(weight, "__tensor_flatten__")]
    if quantized:
        raise UserError(
            "a checkpoint cannot store quantized weights",
            where="precision int8 or int4",
            got=f"{len(quantized)} quantized weights, such as {quantized[0]}",
            fix="load the model with precision fp32, and save this model",
        )
    if (dtype := model.mean.dtype) is not torch.float32:
        log.warning(
            "The checkpoint stores weights that were rounded to %s. To keep all digits, save a model that was loaded "
            "with precision fp32.",
            str(dtype).removeprefix("torch."),
        )


def set_compute_dtype(model: VisionLanguageModel, precision: Precision) -> None:
    """Convert only the buffers that determine the number format of the computation. The weights do not change."""
    dtype = _compute_dtype(precision)
    model.mean, model.std = model.mean.to(dtype), model.std.to(dtype)


def weight_templates(model: VisionLanguageModel, precision: Precision) -> dict[str, Tensor]:
    """Return a dict from the name of each parameter to a template: a tensor of the type that the parameter has in the
    given precision.

    The templates have no meaningful values. The template of a quantized weight is a torchao tensor, which all layers of
    the same shape share, so the templates take little memory. All other templates are on the meta device.

    Args:
        model: model before any conversion, on the CPU or the meta device.
        precision: precision of the weights. A quantized template has the number format that torchao uses on a CPU.

    Raises:
        UserError: the precision needs torchao, and torchao is not installed.
    """
    precision.require()
    dtypes = _plain_dtypes(model, precision)
    templates = {
        name: torch.empty(parameter.shape, dtype=dtypes[name], device="meta")
        for name, parameter in model.named_parameters()
    }
    quantized: dict[torch.Size, Tensor] = {}
    for layer in _quantized_layers(model, precision):
        name = f"{layer}.weight"
        shape = templates[name].shape
        if shape not in quantized:
            stand_in = nn.Linear(shape[1], shape[0], bias=False, device="meta")
            stand_in.weight = nn.Parameter(torch.zeros(shape, dtype=dtypes[name]), requires_grad=False)
            _quantize(stand_in, precision, [""])
            quantized[shape] = stand_in.weight
        templates[name] = quantized[shape]
    return templates


def split_weight(name: str, weight: Tensor) -> dict[str, Tensor]:
    """Return the plain tensors of a weight, as a dict from the name of each tensor in a file to the tensor."""
    if not hasattr(weight, "__tensor_flatten__"):
        return {name: weight}
    return {f"{name}:{part}": getattr(weight, part) for part in weight.__tensor_flatten__()[0]}


def join_weight(name: str, template: Tensor, stored: Mapping[str, Tensor]) -> Tensor:
    """Build a weight from the plain tensors that `split_weight` has returned, without copying the plain tensors."""
    if not hasattr(template, "__tensor_flatten__"):
        return stored[name]
    parts, attributes = template.__tensor_flatten__()
    tensors = {part: stored[f"{name}:{part}"] for part in parts}
    kind: Any = type(template)
    joined: Tensor = kind.__tensor_unflatten__(tensors, attributes, template.size(), template.stride())
    return joined


def _compute_dtype(precision: Precision) -> torch.dtype:
    match precision:
        case Precision.FP32:
            return torch.float32
        case Precision.FP16:
            return torch.float16
        case _:
            return torch.bfloat16


def _plain_dtypes(model: VisionLanguageModel, precision: Precision) -> dict[str, torch.dtype]:
    """Return the number format of each parameter before quantization."""
    fp32 = {parameter for router in router_layers(model) for parameter in router.parameters()}
    dtype = _compute_dtype(precision)
    return {name: torch.float32 if parameter in fp32 else dtype for name, parameter in model.named_parameters()}


def _quantized_layers(model: VisionLanguageModel, precision: Precision) -> list[str]:
    """Return the names of the linear layers that a precision quantizes. Log a warning if int4 leaves out layers."""
    if not precision.quantized:
        return []
    layers = linear_layers(model)
    del layers["decoder.head"]
    skipped = [name for name, layer in layers.items() if precision is Precision.INT4 and not _supports_int4(layer)]
    if skipped:
        log.warning(
            "%d linear layers (%s ...) stay bf16: int4 needs an input width divisible by %d and an output width by %d",
            len(skipped),
            skipped[0],
            INT4_GROUP_SIZE,
            INT4_OUTPUT_MULTIPLE,
        )
    return [name for name in layers if name not in skipped]


def _quantize(model: nn.Module, precision: Precision, layers: Collection[str]) -> None:
    """Quantize the layers with these names in place."""
    # torch warns about the way in which torchao registers types. Users cannot act on this warning, so hide the warning.
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    from torchao.quantization import quantize_

    device = next(model.parameters()).device
    quantize_(model, _torchao_config(precision, device), lambda module, name: name in layers)


def _supports_int4(layer: nn.Linear) -> bool:
    return layer.in_features % INT4_GROUP_SIZE == 0 and layer.out_features % INT4_OUTPUT_MULTIPLE == 0


def _torchao_config(precision: Precision, device: torch.device) -> Any:
    """Return torchao's weight-only config for a device. The config leaves global compiler settings unchanged."""
    from torchao.prototype.quantization.int4.inference_workflow import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig

    if precision is Precision.INT8:
        return Int8WeightOnlyConfig(set_inductor_config=False)
    if device.type == "cpu":
        return PrototypeInt4WeightOnlyConfig(group_size=INT4_GROUP_SIZE, set_inductor_config=False)
    return Int4WeightOnlyConfig(
        group_size=INT4_GROUP_SIZE, int4_packing_format="tile_packed_to_4d", set_inductor_config=False
    )

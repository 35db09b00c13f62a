"""Lower precision for inference, with 16-bit weights or with linear layers that torchao quantizes to 8 or 4 bits.

The conversion changes a model in memory. Checkpoint files keep the trained weights. The output head is not quantized
for two reasons. Rounding errors of the head would directly change the logits, and the weight of a tied head would be
stored twice.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from vlm.config import Precision
from vlm.layers.linear import linear_layers, router_layers
from vlm.model import VisionLanguageModel

log = logging.getLogger(__name__)

INT4_GROUP_SIZE = 32
"""Number of input channels that share an int4 scale and zero point.

The scale and the zero point of 32 weights together take 32 bits, so each weight takes 4 + 32 / 32 = 5 bits in all.
"""
INT4_OUTPUT_MULTIPLE = 16
"""On a CPU, the int4 kernel can run a layer only if its number of output channels is a multiple of this number."""


def set_precision(model: VisionLanguageModel, precision: Precision) -> None:
    """Convert the weights of a model in place, for inference only. Rotary tables and routers stay in fp32.

    Raises:
        UserError: the precision needs torchao, and torchao is not installed.
    """
    if precision is Precision.FP32:
        return
    precision.require()
    dtype = torch.float16 if precision is Precision.FP16 else torch.bfloat16
    fp32 = {parameter for router in router_layers(model) for parameter in router.parameters()}
    for parameter in set(model.parameters()) - fp32:
        parameter.data = parameter.data.to(dtype)
    model.mean, model.std = model.mean.to(dtype), model.std.to(dtype)
    if precision.quantized:
        model.requires_grad_(False)
        _quantize(model, precision)


def _quantize(model: VisionLanguageModel, precision: Precision) -> None:
    # torch warns about how torchao registers its types. Users cannot act on this warning, so hide the warning.
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    from torchao.quantization import quantize_

    layers = linear_layers(model)
    del layers["decoder.head"]
    skipped = [name for name, layer in layers.items() if precision is Precision.INT4 and not _supports_int4(layer)]

    def is_quantized(module: nn.Module, name: str) -> bool:
        return name in layers and name not in skipped

    quantize_(model, _torchao_config(precision, model.mean.device), is_quantized)
    if skipped:
        log.warning(
            "%d linear layers (%s ...) stay bf16: int4 needs an input width divisible by %d and an output width by %d",
            len(skipped),
            skipped[0],
            INT4_GROUP_SIZE,
            INT4_OUTPUT_MULTIPLE,
        )


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

"""Make a trained model smaller: half-precision weights, or linear layers as 8- or 4-bit integers (torchao).

Applied to a model in memory after it is loaded; files stay as they were trained. The output head is not quantized: its
error would land on the logits as it is, and where it is the token table it would have to be stored twice.
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

GROUP = 32
"""Input channels that share an int4 scale and zero point, which cost 32 bits: 5 bits a weight in all."""
ROWS = 16
"""What the int4 kernel of a CPU wants the output channels to be a multiple of."""


def set_precision(model: VisionLanguageModel, precision: Precision) -> None:
    """Convert a model for inference, in place, on the device it is on. Rotary tables and routers stay fp32.

    Raises:
        UserError: torchao is needed and not installed.
    """
    if precision is Precision.FP32:
        return
    precision.require()
    dtype = torch.float16 if precision is Precision.FP16 else torch.bfloat16
    exact = {parameter for router in router_layers(model) for parameter in router.parameters()}
    for parameter in set(model.parameters()) - exact:
        parameter.data = parameter.data.to(dtype)
    model.mean, model.std = model.mean.to(dtype), model.std.to(dtype)
    if precision.quantized:
        model.requires_grad_(False)
        _quantize(model, precision)


def _quantize(model: VisionLanguageModel, precision: Precision) -> None:
    # torch warns of how torchao registers its types; no user of ours can do anything about it.
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    from torchao.quantization import quantize_

    layers = linear_layers(model)
    del layers["decoder.head"]
    left = [name for name, layer in layers.items() if precision is Precision.INT4 and not _fits_int4(layer)]

    def is_chosen(module: nn.Module, name: str) -> bool:
        return name in layers and name not in left

    quantize_(model, _torchao_config(precision, model.mean.device), is_chosen)
    if left:
        log.warning(
            "%d linear layers stay bf16 (%s ...): int4 needs inputs in multiples of %d and outputs in multiples of %d",
            len(left),
            left[0],
            GROUP,
            ROWS,
        )


def _fits_int4(layer: nn.Linear) -> bool:
    return layer.in_features % GROUP == 0 and layer.out_features % ROWS == 0


def _torchao_config(precision: Precision, device: torch.device) -> Any:
    """Weight-only in the layout that the device's kernel reads. torchao's global compiler settings are left alone."""
    from torchao.prototype.quantization.int4.inference_workflow import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig

    if precision is Precision.INT8:
        return Int8WeightOnlyConfig(set_inductor_config=False)
    if device.type == "cpu":
        return PrototypeInt4WeightOnlyConfig(group_size=GROUP, set_inductor_config=False)
    return Int4WeightOnlyConfig(group_size=GROUP, int4_packing_format="tile_packed_to_4d", set_inductor_config=False)

"""Number formats of a trained model's weights and computation."""

from __future__ import annotations

import importlib.util
from enum import StrEnum

from vlm.errors import UserError


class Precision(StrEnum):
    """Number format of weights and computation.

    `int8` and `int4` are weight-only quantization: linear layers store integers and compute in bf16. Some layers keep
    their weights in bf16 and compute in bf16: the output head, layers that are not linear, and linear layers whose
    sizes do not fit the kernel of `int4`. With every precision, the routers of mixtures of experts keep their weights
    in fp32 and compute in fp32.
    """

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"
    INT8 = "int8"
    INT4 = "int4"

    @property
    def quantized(self) -> bool:
        """True if the weights of linear layers are stored as integers."""
        return self in (Precision.INT8, Precision.INT4)

    def require(self) -> None:
        """Check that the libraries of this precision are installed.

        Raises:
            UserError: the precision needs torchao, and torchao is not installed.
        """
        if self.quantized and importlib.util.find_spec("torchao") is None:
            raise UserError(
                f"precision {self} needs torchao",
                where="--precision",
                got="torchao is not installed",
                fix="pip install 'lakesight[quantize]'",
            )

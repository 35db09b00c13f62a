"""In what numbers a trained model computes."""

from __future__ import annotations

import importlib.util
from enum import StrEnum

from vlm.errors import UserError


class Precision(StrEnum):
    """Numbers of weights and of what is computed with them.

    `int8` and `int4` are weight-only: linear layers are stored so and compute in bf16, everything else is bf16.
    """

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"
    INT8 = "int8"
    INT4 = "int4"

    @property
    def quantized(self) -> bool:
        """Whether linear layers are stored as integers."""
        return self in (Precision.INT8, Precision.INT4)

    def require(self) -> None:
        """Refuse before any work what this environment cannot do.

        Raises:
            UserError: it needs a library that is not installed.
        """
        if self.quantized and importlib.util.find_spec("torchao") is None:
            raise UserError(
                f"precision {self} needs torchao",
                where="--precision",
                got="it is not installed",
                fix="pip install 'lakesight[quantize]'",
            )

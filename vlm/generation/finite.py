"""Check that a model computes no NaN and no infinite values.

`require_finite` checks log-probabilities and losses that were already copied from the device to Python, so the check
needs no further computation on the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from vlm.errors import UserError


def log_probabilities(logits_NV: Tensor, tokens_N: Tensor) -> Tensor:
    """Return the log-probability of one token in each row of logits, or NaN if a logit of the row is NaN or plus
    infinity.

    Without the check for plus infinity, all tokens except the token with the infinite logit would get the
    log-probability minus infinity. `require_finite` allows minus infinity.
    """
    sums_N = logits_NV.logsumexp(dim=-1)
    return logits_NV.gather(1, tokens_N[:, None])[:, 0] - sums_N.masked_fill(sums_N == torch.inf, torch.nan)


def require_finite(model: nn.Module, values: Iterable[float]) -> None:
    """Check that no log-probability or loss of a model is NaN.

    If a logit is NaN or plus infinity, the log-probabilities of all tokens at its position are NaN
    (`log_probabilities`). A logit of minus infinity is allowed: the model then never chooses the token of this logit.

    Raises:
        UserError: a value is NaN.
    """
    if any(map(math.isnan, values)):
        raise not_finite(model)


def not_finite(model: nn.Module) -> UserError:
    """Return the error for values that are NaN or infinite. The error lists the weights that contain such values."""
    # torchao's classes of quantized weights have no `isfinite`.
    plain = ((name, weight) for name, weight in model.named_parameters() if type(weight.data) is Tensor)
    bad = [name for name, weight in plain if not weight.isfinite().all()]
    named = f"{', '.join(bad[:3])}{' and others' if len(bad) > 3 else ''}"
    return UserError(
        "the model computes NaN or infinite values",
        where="generation",
        got=f"NaN or infinity in the weights {named}" if bad else "an overflow in the computation",
        fix="use another checkpoint or model version, or copy the weights again" if bad else "use precision fp32",
    )

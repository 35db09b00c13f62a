"""May a model version serve? The gate that a version passes before it becomes the champion.

A small captioning model easily learns to write a plausible caption without looking: its loss is beautiful and its blind
gap (loss with the pictures of other rows, minus loss with the right ones) is zero. Such a version is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from pipelines.errors import StageFailed

MIN_BLIND_GAP = 0.1
"""Nats per token: what a model gains at least from seeing the right picture."""

BLIND_GAP_TAG = "blind_gap"
"""Tag of a version that holds the blind gap, set by evaluation."""


def require_sighted(name: str, version: str, tags: Mapping[str, str], min_blind_gap: float = MIN_BLIND_GAP) -> float:
    """The blind gap of a version, in nats per token, when it is good enough.

    Raises:
        StageFailed: the gap was never measured, is not a number, or is too small.
    """
    measured = tags.get(BLIND_GAP_TAG)
    if measured is None:
        raise StageFailed(
            "the version is not promoted: nobody knows whether it looks at its pictures",
            where=f"model {name} version {version}",
            got="no blind gap",
            fix="run `lakesight evaluate` on a split of at least two pictures first",
        )
    gap = float(measured)
    if math.isnan(gap) or gap < min_blind_gap:
        raise StageFailed(
            "the version is not promoted: it does not look at its pictures",
            where=f"model {name} version {version}",
            got=f"a blind gap of {gap:.3f} nats per token, less than {min_blind_gap:g}",
            fix="train longer or with another seed, or give the decoder more of the picture (vision.select: patches)",
        )
    return gap

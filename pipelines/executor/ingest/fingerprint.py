"""Near duplicates: a picture saved again, in another quality, format or size. Plain functions, run by executors.

A fingerprint has two parts. The steps are a difference hash of 64 bits (which of 9 x 8 grey cells is brighter than the
one to its left): few bits change when a picture is saved again, so it finds candidates without comparing all with all.
The colours are the means of 8 x 8 cells: they tell apart pictures that merely have the same shapes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

STEP_BYTES = 8
GRID = 8
FINGERPRINT_BYTES = STEP_BYTES + 3 * GRID * GRID
MARGIN = 2
"""Grey levels that make a step: less is the noise of an encoder."""
MAX_STEPS = 3
"""Steps in which near duplicates differ at most. The driver's blocks of bits count on it."""
MAX_COLOUR = 12
"""Levels of 255 in which a cell's mean differs at most."""

SMOOTH = Image.Resampling.BILINEAR
PAIRS = pa.schema(
    [
        ("image_id", pa.string()),  # a new picture
        ("split", pa.string()),  # as its own bytes or its source say
        ("other_id", pa.string()),  # the one that it looks like
        ("other_split", pa.string()),
        ("other_known", pa.bool_()),  # whether that was there before
    ]
)


def fingerprint(image: Image.Image) -> bytes:
    """The fingerprint of an RGB picture: FINGERPRINT_BYTES, steps first."""
    small = image.resize(((GRID + 1) * GRID, GRID * GRID), SMOOTH, reducing_gap=1.0)
    grey = np.asarray(small.convert("L").resize((GRID + 1, GRID), SMOOTH), dtype=np.int16)
    steps = np.packbits(grey[:, 1:] > grey[:, :-1] + MARGIN)
    return steps.tobytes() + small.resize((GRID, GRID), SMOOTH).tobytes()


def alike(left: Sequence[bytes], right: Sequence[bytes]) -> npt.NDArray[np.bool_]:
    """Which fingerprints, place by place, are of near duplicates."""
    a, b = (np.frombuffer(b"".join(side), np.uint8).reshape(-1, FINGERPRINT_BYTES) for side in (left, right))
    steps = np.unpackbits(a[:, :STEP_BYTES] ^ b[:, :STEP_BYTES], axis=1).sum(axis=1)
    colours = np.abs(a[:, STEP_BYTES:].astype(np.int16) - b[:, STEP_BYTES:]).max(axis=1)
    near: npt.NDArray[np.bool_] = (steps <= MAX_STEPS) & (colours <= MAX_COLOUR)
    return near


def near_pairs(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Those of the candidates that are near duplicates, as PAIRS.

    Args:
        batches: columns of PAIRS, and fingerprint and other_fingerprint.
    """
    for batch in batches:
        near = alike(batch.column("fingerprint").to_pylist(), batch.column("other_fingerprint").to_pylist())
        yield batch.select(PAIRS.names).filter(pa.array(near))

"""Fingerprints that identify near duplicates: pictures that were saved again in another quality, format or size.

A fingerprint has two parts. The first part of a fingerprint is a difference hash of 64 bits. Each bit says whether one
of 8 x 8 grey cells is brighter than its left neighbour. When a picture is saved again, few bits of its difference hash
change, so candidate pairs are found without comparing all pairs. The second part of a fingerprint contains the mean
colours of 8 x 8 cells, which distinguish pictures with equal shapes but different colours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

HASH_BYTES = 8
GRID = 8
FINGERPRINT_BYTES = HASH_BYTES + 3 * GRID * GRID
MARGIN = 2
"""A hash bit is set if a cell is brighter than its left neighbour by more than MARGIN grey levels.

A picture encoder adds noise to cells of equal brightness, but the noise causes differences below MARGIN.
"""
MAX_DIFFERING_BITS = 3
"""Largest number of hash bits in which near duplicates differ.

The driver's search for candidate pairs finds all pairs within this limit, except pairs of pictures that resemble very
many other pictures (see `driver/delta/near_pairs.py`). If you raise this limit, change the search too.
"""
MAX_COLOUR_DIFFERENCE = 12
"""Largest difference between the mean colours of a cell in two near duplicates, in levels of 0 to 255."""

RESAMPLING = Image.Resampling.BILINEAR
PAIRS = pa.schema(
    [
        ("image_id", pa.string()),  # a new picture
        ("split", pa.string()),  # split of the new picture, derived from its own hash or from its source
        ("other_id", pa.string()),  # id of the picture that the new picture resembles
        ("other_split", pa.string()),
        ("other_existing", pa.bool_()),  # whether the other picture was in `samples` before this ingest
    ]
)


def fingerprint(image: Image.Image) -> bytes:
    """Return the fingerprint of an RGB picture.

    The fingerprint has FINGERPRINT_BYTES bytes and begins with the difference hash.
    """
    small = image.resize(((GRID + 1) * GRID, GRID * GRID), RESAMPLING, reducing_gap=1.0)
    grey = np.asarray(small.convert("L").resize((GRID + 1, GRID), RESAMPLING), dtype=np.int16)
    bits = np.packbits(grey[:, 1:] > grey[:, :-1] + MARGIN)
    return bits.tobytes() + small.resize((GRID, GRID), RESAMPLING).tobytes()


def are_near_duplicates(left: Sequence[bytes], right: Sequence[bytes]) -> npt.NDArray[np.bool_]:
    """Return an array whose element i says whether left[i] and right[i] are the fingerprints of near duplicates."""
    a, b = (np.frombuffer(b"".join(side), np.uint8).reshape(-1, FINGERPRINT_BYTES) for side in (left, right))
    differing = np.unpackbits(a[:, :HASH_BYTES] ^ b[:, :HASH_BYTES], axis=1).sum(axis=1)
    colours = np.abs(a[:, HASH_BYTES:].astype(np.int16) - b[:, HASH_BYTES:]).max(axis=1)
    near: npt.NDArray[np.bool_] = (differing <= MAX_DIFFERING_BITS) & (colours <= MAX_COLOUR_DIFFERENCE)
    return near


def keep_near_duplicates(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Keep the candidate pairs that are near duplicates. Yield batches of the schema PAIRS.

    Args:
        batches: batches with the columns of PAIRS and the columns `fingerprint` and `other_fingerprint`.
    """
    for batch in batches:
        near = are_near_duplicates(
            batch.column("fingerprint").to_pylist(), batch.column("other_fingerprint").to_pylist()
        )
        yield batch.select(PAIRS.names).filter(pa.array(near))

"""Tests of fingerprints: a picture that was saved again is a near duplicate, and candidate keys find each near
duplicate.
"""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pictures import encoded, picture
from PIL import Image

from pipelines.driver.delta.near_pairs import KEY_MASKS
from pipelines.executor.ingest.fingerprint import (
    FINGERPRINT_BYTES,
    HASH_BYTES,
    MAX_DIFFERING_BITS,
    are_near_duplicates,
    fingerprint,
    keep_near_duplicates,
)

MASK = (1 << 64) - 1


def smooth(seed: int, size: tuple[int, int] = (320, 240)) -> Image.Image:
    """Return a picture of soft shapes."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)


SAVED = {
    "jpeg 60": lambda image: encoded(image, "JPEG", quality=60),
    "webp": lambda image: encoded(image, "WEBP", quality=80),
    "smaller": lambda image: encoded(image.resize((image.width // 2, image.height // 2)), "JPEG", quality=85),
    "wider": lambda image: encoded(image.resize((image.width + 7, image.height)), "PNG"),
}


@pytest.mark.parametrize("how", SAVED)
def test_a_picture_that_was_saved_again_is_a_near_duplicate(how: str) -> None:
    prints = [fingerprint(smooth(seed)) for seed in range(20)]
    again = [fingerprint(Image.open(io.BytesIO(SAVED[how](smooth(seed)))).convert("RGB")) for seed in range(20)]
    assert {len(one) for one in prints} == {FINGERPRINT_BYTES}
    assert are_near_duplicates(prints, again).all()
    assert not are_near_duplicates(prints, again[1:] + again[:1]).any()


def test_pictures_with_equal_shapes_but_different_colours_are_not_near_duplicates() -> None:
    image = smooth(1)
    other = Image.merge("RGB", [image.getchannel("R").point(lambda level: min(level + 20, 255)), *image.split()[1:]])
    assert fingerprint(image)[:HASH_BYTES] == fingerprint(other)[:HASH_BYTES]
    assert not are_near_duplicates([fingerprint(image)], [fingerprint(other)]).any()


@pytest.mark.parametrize("size", [(1, 1), (3, 2000), (5000, 4)])
def test_a_picture_of_any_size_has_a_fingerprint(size: tuple[int, int]) -> None:
    assert len(fingerprint(picture(1, size))) == FINGERPRINT_BYTES


@given(st.integers(0, MASK), st.sets(st.integers(0, 63), max_size=MAX_DIFFERING_BITS))
def test_near_duplicates_share_at_least_one_key_by_which_candidate_pairs_are_found(
    bits: int, differing: set[int]
) -> None:
    other = bits ^ sum(1 << bit for bit in differing)
    assert any((bits ^ other) & mask & MASK == 0 for mask in KEY_MASKS)
    assert {(mask & MASK).bit_count() for mask in KEY_MASKS} <= {25, 26}


def test_candidate_pairs_that_are_not_near_duplicates_are_dropped() -> None:
    a, b = fingerprint(smooth(1)), fingerprint(smooth(2))
    new = {"image_id": "1", "split": "val", "other_split": "test"}
    pairs = [new | {"other_id": n, "other_existing": n == "3"} for n in "23"]
    prints = [{"fingerprint": a, "other_fingerprint": other} for other in (b, a)]
    rows = [pair | both for pair, both in zip(pairs, prints, strict=True)]
    [out] = keep_near_duplicates(iter([pa.RecordBatch.from_pylist(rows)]))
    assert out.to_pylist() == pairs[1:]

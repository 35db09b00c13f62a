"""Tests that spill files restore the wide columns of a row, for any selection of rows in any order."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.config import LocalPlatformConfig
from pipelines.driver.ingest.spill import PREFIX, STALE, spill_folder
from pipelines.executor.ingest.outcome import OUTCOME
from pipelines.executor.ingest.spill import NARROW, POSITION, decode_and_spill, restore_wide
from pipelines.platform import local

Batches = list[list[bytes | None]]
PICTURES = st.lists(st.lists(st.none() | st.binary(max_size=20), max_size=6), max_size=6)


def outcomes(images: Batches) -> Iterator[pa.RecordBatch]:
    """Yield outcomes whose `source_row` is made of the batch number and the row number. An outcome without a picture is
    a refusal."""
    for number, batch in enumerate(images):
        names = [f"{number}.{row}" for row in range(len(batch))]
        rows = zip(names, batch, strict=True)
        yield pa.RecordBatch.from_pylist(
            [{"source_row": name, "image": image, "payload": f"of {name}"} for name, image in rows], OUTCOME
        )


def spill(images: Batches, folder: Path) -> pa.Table:
    return pa.Table.from_batches(decode_and_spill(outcomes(images), iter, str(folder)), NARROW)


@given(PICTURES, st.randoms(use_true_random=False), st.integers(1, 4))
def test_every_row_read_from_the_spill_folder_gets_its_own_picture_and_its_own_stored_text(
    tmp_path_factory: pytest.TempPathFactory, images: Batches, random: Random, size: int
) -> None:
    folder = tmp_path_factory.mktemp("spill")
    rows = pa.concat_tables([spill(images, folder), spill(images[::-1], folder)])
    names = rows["source_row"].to_pylist()
    expected = [image for batch in [*images, *images[::-1]] for image in batch]
    chosen = random.sample(range(len(expected)), random.randint(0, len(expected)))
    selected = rows.select(["source_row", *POSITION.names]).take(pa.array(chosen, pa.int64()))
    batches = restore_wide(iter(selected.to_batches(max_chunksize=size)), str(folder), ("payload", "image"))
    back = [tuple(row.values()) for batch in batches for row in batch.to_pylist()]
    assert back == [(names[n], f"of {names[n]}", expected[n]) for n in chosen]


def test_a_spill_folder_is_removed_at_the_end_of_its_ingest_or_else_at_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAKESIGHT_HOME", str(tmp_path))
    platform = local(LocalPlatformConfig())
    old, young, other = (
        platform.folder("staged") / name for name in (f"{PREFIX}old", f"{PREFIX}young", "captions-old")
    )
    for folder in (old, young, other):
        folder.mkdir(parents=True)
        (folder / "a.arrow").touch()
    long_ago = time.time() - STALE.total_seconds() - 60
    for folder in (old, other):
        os.utime(folder, (long_ago, long_ago))
    with spill_folder(platform) as own:
        assert sorted(platform.folder("staged").iterdir()) == sorted([other, young, own.folder])
        (own.folder / "a.arrow").touch()
    assert sorted(platform.folder("staged").iterdir()) == sorted([other, young])

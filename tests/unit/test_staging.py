"""Pictures that wait in files come back to their own rows, whichever rows ask for them and in whatever order."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.config import LocalPlatformConfig
from pipelines.driver.ingest.spill import PREFIX, STALE, waiting_rows
from pipelines.executor.ingest.decode import OUTCOME
from pipelines.executor.ingest.spill import NARROW, PLACE, staged, with_wide
from pipelines.platform import local

Batches = list[list[bytes | None]]
PICTURES = st.lists(st.lists(st.none() | st.binary(max_size=20), max_size=6), max_size=6)


def outcomes(images: Batches) -> Iterator[pa.RecordBatch]:
    """Rows named by where they are; those without a picture are refused."""
    for number, batch in enumerate(images):
        names = [f"{number}.{row}" for row in range(len(batch))]
        rows = zip(names, batch, strict=True)
        yield pa.RecordBatch.from_pylist(
            [{"source_row": name, "image": image, "payload": f"of {name}"} for name, image in rows], OUTCOME
        )


def rows_staged(images: Batches, folder: Path) -> pa.Table:
    return pa.Table.from_batches(staged(outcomes(images), iter, str(folder)), NARROW)


@settings(deadline=None)  # the first example loads libraries
@given(PICTURES, st.randoms(use_true_random=False), st.integers(1, 4))
def test_every_row_gets_its_own_picture_and_payload_back(
    tmp_path_factory: pytest.TempPathFactory, images: Batches, random: Random, size: int
) -> None:
    folder = tmp_path_factory.mktemp("staging")
    rows = pa.concat_tables([rows_staged(images, folder), rows_staged(images[::-1], folder)])
    names = rows["source_row"].to_pylist()
    expected = [image for batch in [*images, *images[::-1]] for image in batch]
    chosen = random.sample(range(len(expected)), random.randint(0, len(expected)))
    asked = rows.select(["source_row", *PLACE.names]).take(pa.array(chosen, pa.int64()))
    batches = with_wide(iter(asked.to_batches(max_chunksize=size)), str(folder), ("payload", "image"))
    back = [tuple(row.values()) for batch in batches for row in batch.to_pylist()]
    assert back == [(names[n], f"of {names[n]}", expected[n]) for n in chosen]


def test_the_folder_goes_with_its_ingest_and_old_ones_of_killed_ingests_with_the_next(
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
    with waiting_rows(platform) as waiting:
        assert sorted(platform.folder("staged").iterdir()) == sorted([other, young, waiting.folder])
        (waiting.folder / "a.arrow").touch()
    assert sorted(platform.folder("staged").iterdir()) == sorted([other, young])

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
from pipelines.driver.waiting import PREFIX, STALE, waiting_pictures
from pipelines.executor.decode import OUTCOME
from pipelines.executor.staging import NARROW, PLACE, staged, with_pictures
from pipelines.platform import local

Batches = list[list[bytes | None]]
PICTURES = st.lists(st.lists(st.none() | st.binary(max_size=20), max_size=6), max_size=6)


def outcomes(images: Batches) -> Iterator[pa.RecordBatch]:
    """Rows named by where they are; those without a picture are refused."""
    for number, batch in enumerate(images):
        names = [f"{number}.{row}" for row in range(len(batch))]
        yield pa.RecordBatch.from_pylist(
            [{"source_row": name, "image": image} for name, image in zip(names, batch, strict=True)], OUTCOME
        )


def rows_staged(images: Batches, folder: Path) -> pa.Table:
    return pa.Table.from_batches(staged(outcomes(images), iter, str(folder)), NARROW)


@settings(deadline=None)  # the first example loads libraries
@given(PICTURES, st.randoms(use_true_random=False), st.integers(1, 4))
def test_every_row_gets_its_own_picture_back(
    tmp_path_factory: pytest.TempPathFactory, images: Batches, random: Random, size: int
) -> None:
    folder = tmp_path_factory.mktemp("staging")
    rows = pa.concat_tables([rows_staged(images, folder), rows_staged(images[::-1], folder)])
    expected = [image for batch in [*images, *images[::-1]] for image in batch]
    assert rows.num_rows == len(expected)
    assert [name is not None for name in rows["file"].to_pylist()] == [image is not None for image in expected]
    there = [n for n, image in enumerate(expected) if image is not None]
    random.shuffle(there)
    asked = rows.select(["source_row", *PLACE.names]).take(pa.array(there, pa.int64()))
    back = [
        (name, image)
        for batch in with_pictures(iter(asked.to_batches(max_chunksize=size)), str(folder))
        for name, image in zip(batch.column("source_row").to_pylist(), batch.column("image").to_pylist(), strict=True)
    ]
    names = rows["source_row"].to_pylist()
    assert back == [(names[n], expected[n]) for n in there]


def test_rows_without_a_picture_leave_no_file(tmp_path: Path) -> None:
    assert rows_staged([[None, None], []], tmp_path).num_rows == 2
    assert list(tmp_path.iterdir()) == []


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
    with waiting_pictures(platform) as waiting:
        assert sorted(platform.folder("staged").iterdir()) == sorted([other, young, waiting.folder])
        (waiting.folder / "a.arrow").touch()
    assert sorted(platform.folder("staged").iterdir()) == sorted([other, young])

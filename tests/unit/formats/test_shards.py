"""Tests of the shard format: reading single rows, writing atomically, damaged files, and content hashes."""

from __future__ import annotations

import ctypes
import mmap
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.errors import StageFailed, UserError
from pipelines.formats.mixes import ShardFolder, write_mix
from pipelines.formats.shards import (
    BATCH_ROWS,
    Manifest,
    ShardRequest,
    Shards,
    encode_pixels,
    read_manifest,
    shard_schema,
    write_manifest,
    write_shard_file,
)
from vlm.config import ImageConfig

SIDE = 4


def request(**changes: object) -> ShardRequest:
    fields = {
        "table": "lakesight.samples",
        "table_id": "t",
        "table_version": 3,
        "source": "demo",
        "split": "train",
        "image": ImageConfig(size=SIDE),
        "encoding": "raw",
        "rows": 150,
        "seed": 0,
    }
    return ShardRequest.model_validate(fields | changes)


def pixels(index: int) -> npt.NDArray[np.uint8]:
    return np.full((SIDE, SIDE, 3), index % 251, np.uint8)


def batches(template: ShardRequest, first: int, count: int, size: int = 17) -> Iterator[pa.RecordBatch]:
    for start in range(first, first + count, size):
        numbers = range(start, min(start + size, first + count))
        rows = [
            {
                "image_id": f"demo/{n}",
                "pixels": encode_pixels(pixels(n), template.encoding),
                "texts": [{"prompt": "", "text": f"number {n}"}, {"prompt": "odd?", "text": "yes" if n % 2 else "no"}],
            }
            for n in numbers
        ]
        yield pa.RecordBatch.from_pylist(rows, shard_schema(template))


def write(folder: Path, template: ShardRequest, total: int, size: int = 17) -> Shards:
    folder.mkdir(parents=True, exist_ok=True)
    starts = range(0, total, template.rows)
    files = [
        write_shard_file(folder, i, template, batches(template, start, min(template.rows, total - start), size))
        for i, start in enumerate(starts)
    ]
    write_manifest(folder, Manifest(request=template, files=tuple(files)))
    return Shards.open(folder)


@settings(max_examples=15)
@given(total=st.integers(1, 400), rows=st.sampled_from([1, 63, BATCH_ROWS, 65, 150]), size=st.integers(1, 90))
def test_every_row_of_the_shards_is_found_for_any_file_size_and_batch_size(
    tmp_path_factory: pytest.TempPathFactory, total: int, rows: int, size: int
) -> None:
    shards = write(tmp_path_factory.mktemp("shards"), request(rows=rows), total, size)
    assert len(shards) == total
    for index in {0, total // 2, total - 1, min(BATCH_ROWS, total - 1), min(rows, total - 1)}:
        row = shards.row(index)
        assert row.image_id == f"demo/{index}"
        assert np.array_equal(row.pixels, pixels(index))
        assert row.texts == [("", f"number {index}"), ("odd?", "yes" if index % 2 else "no")]
    with pytest.raises(IndexError):
        shards.row(total)


@settings(max_examples=15)
@given(
    encoding=st.sampled_from(["raw", "jpeg"]),
    total=st.integers(1, 300),
    more=st.integers(0, 9),
    size=st.integers(1, 310),
)
def test_equal_rows_give_equal_shard_files_for_all_batch_sizes_and_rows_of_other_files(
    tmp_path_factory: pytest.TempPathFactory, encoding: str, total: int, more: int, size: int
) -> None:
    folder, template = tmp_path_factory.mktemp("shards"), request(encoding=encoding)
    small_batches = write_shard_file(folder, 0, template, batches(template, 0, total, size=7))
    of_spark = batches(template, 0, total + more, size)  # Spark's last batch may also have rows of another shard file
    parts = [batch.slice(0, total - n * size) for n, batch in enumerate(of_spark) if n * size < total]
    assert write_shard_file(folder, 1, template, parts).sha256 == small_batches.sha256


def test_reading_one_row_of_a_shard_does_not_read_the_complete_record_batch(tmp_path: Path) -> None:
    """Rows are read in random order, so reading a whole record batch for each row would multiply the bytes read."""
    side, count = 224, 2 * BATCH_ROWS
    template = request(image=ImageConfig(size=side), rows=count)
    shown = np.zeros((side, side, 3), np.uint8).tobytes()
    rows = [{"image_id": str(n), "pixels": shown, "texts": [{"prompt": "", "text": ""}]} for n in range(count)]
    batch = pa.RecordBatch.from_pylist(rows, shard_schema(template))
    file = write_shard_file(tmp_path, 0, template, [batch])
    write_manifest(tmp_path, Manifest(request=template, files=(file,)))
    path = tmp_path / file.file
    with path.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if in_memory(path) > 2**20:
        pytest.skip("this file system ignores POSIX_FADV_DONTNEED")
    row = Shards.open(tmp_path).row(70)
    assert not row.pixels.any()
    assert len(shown) <= in_memory(path) < 2**21 < file.bytes / 8


def in_memory(path: Path) -> int:
    """Return the number of bytes of a file that are in the page cache."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as memory:
        pages = ctypes.create_string_buffer(-(-len(memory) // mmap.PAGESIZE))
        start = ctypes.c_char.from_buffer(memory)
        assert not ctypes.CDLL(None).mincore(ctypes.byref(start), ctypes.c_size_t(len(memory)), pages)
        del start
    return sum(page & 1 for page in pages.raw) * mmap.PAGESIZE


@pytest.mark.parametrize("offsets", [(0, 2**31 - 1), (0, 10**6), (-5, 0), (400, 300)])
def test_a_shard_with_impossible_offsets_of_a_picture_is_reported_as_damaged(
    tmp_path: Path, offsets: tuple[int, int]
) -> None:
    shards = write(tmp_path, request(encoding="jpeg"), 10)
    path, length = tmp_path / shards.manifest.files[0].file, len(encode_pixels(pixels(0), "jpeg"))
    content = path.read_bytes()
    stored = np.array([0, length], np.int32).tobytes()
    assert content.count(stored) == 1
    path.write_bytes(content.replace(stored, np.array(offsets, np.int32).tobytes()))
    with pytest.raises(StageFailed, match=r"damaged.*shard-000000\.arrow, row 0"):
        Shards.open(tmp_path).row(0)


READ_ALL = """
import resource, sys
from pathlib import Path
from pipelines.formats.shards import Shards
resource.setrlimit(resource.RLIMIT_NOFILE, (64, int(sys.argv[2])))
shards = Shards.open(Path(sys.argv[1]))
print(len({shards.row(index).image_id for index in range(len(shards))}))
"""


@pytest.mark.parametrize(
    ("hard", "expected"),
    [(4096, "^150\n$"), (100, "more files than a process may open on this host.*limit of 100 open")],
)
def test_opening_many_shard_files_raises_the_open_file_limit_or_fails_with_an_error_that_states_the_limit(
    tmp_path: Path, hard: int, expected: str
) -> None:
    write(tmp_path, request(rows=1), 150)
    command = [sys.executable, "-c", READ_ALL, str(tmp_path), str(hard)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert re.search(expected, ended.stdout + ended.stderr), ended.stderr


def test_the_manifest_of_a_mix_names_files_in_other_shard_folders_and_has_its_own_content_hash(tmp_path: Path) -> None:
    parts = [
        ShardFolder(tmp_path / name, write(tmp_path / name, request(source=name, rows=rows), total).manifest, False)
        for name, rows, total in (("own", 60, 150), ("other", 7, 15))
    ]
    first, again = (write_mix(parts, [0.4], tmp_path) for _ in range(2))
    assert (first.reused, again.reused, again.folder) == (False, True, first.folder)
    assert [path.name for path in first.folder.iterdir()] == ["manifest.json"]
    assert [tuple(part.model_dump().values()) for part in first.manifest.parts] == [("own", 150, 99), ("other", 15, 66)]
    mixed = Shards.open(first.folder)
    ids = [f"demo/{n}" for n in [*range(150), *range(15)]]
    assert [mixed.row(index).image_id for index in range(len(mixed))] == ids
    heavier = write_mix(parts, [0.5], tmp_path)
    assert len({shards.manifest.content_hash for shards in (first, heavier, parts[0])}) == 3
    assert heavier.folder != first.folder
    (tmp_path / "other" / "shard-000001.arrow").unlink()
    with pytest.raises(StageFailed, match=r"shard-000001\.arrow"):
        Shards.open(first.folder)


def test_pixels_of_jpeg_shards_differ_from_the_originals_by_two_levels_at_most(tmp_path: Path) -> None:
    shards = write(tmp_path, request(encoding="jpeg"), 70)
    assert np.abs(shards.row(69).pixels.astype(int) - pixels(69)).max() <= 2


def test_texts_are_read_in_row_order_with_their_prompts(tmp_path: Path) -> None:
    assert list(write(tmp_path, request(rows=2), 3).texts()) == [
        *("number 0", "odd?", "no"),
        *("number 1", "odd?", "yes"),
        *("number 2", "odd?", "no"),
    ]


def test_pickling_a_shards_object_stores_only_the_path_of_the_shard_folder(tmp_path: Path) -> None:
    shards = write(tmp_path, request(), 10)
    shards.row(0)
    pickled = pickle.dumps(shards)
    assert len(pickled) < 500
    assert np.array_equal(pickle.loads(pickled).row(7).pixels, pixels(7))


def test_a_failed_write_of_a_shard_file_leaves_no_file(tmp_path: Path) -> None:
    def broken() -> Iterator[pa.RecordBatch]:
        yield from batches(request(), 0, 100)
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        write_shard_file(tmp_path, 0, request(), broken())
    assert list(tmp_path.iterdir()) == []


def test_a_shard_folder_without_a_manifest_is_refused(tmp_path: Path) -> None:
    write_shard_file(tmp_path, 0, request(), batches(request(), 0, 5))
    with pytest.raises(UserError, match="no training shards"):
        Shards.open(tmp_path)


@pytest.mark.parametrize("damage", ["shortened", "missing"])
def test_a_damaged_shard_folder_is_refused_when_it_is_opened(tmp_path: Path, damage: str) -> None:
    write(tmp_path, request(), 200)
    victim = tmp_path / "shard-000001.arrow"
    if damage == "shortened":
        victim.write_bytes(victim.read_bytes()[:-8])
    else:
        victim.unlink()
    with pytest.raises(StageFailed, match=r"shard-000001\.arrow"):
        Shards.open(tmp_path)


def test_a_shard_manifest_in_another_format_version_is_refused(tmp_path: Path) -> None:
    write(tmp_path, request(), 5)
    path = tmp_path / "manifest.json"
    path.write_text(path.read_text().replace('"format": 2', '"format": 1'))
    with pytest.raises(UserError, match="manifest of the shards cannot be read"):
        read_manifest(tmp_path)


def test_the_name_of_a_shard_folder_depends_on_every_field_of_the_shard_request() -> None:
    changes: list[dict[str, object]] = [
        {"table": "other.samples"},
        {"table_id": "recreated"},
        {"table_version": 4},
        {"source": "other"},
        {"split": "val"},
        {"image": ImageConfig(size=SIDE, resize="crop")},
        {"encoding": "jpeg"},
        {"rows": 151},
        {"seed": 1},
        {"where": "width > 64"},
        {"draft": True},
        {"text_weights": "uniform"},
        {"left_out": ("demo/1",)},
        {"table_commit": "0123456789abcdef"},
    ]
    assert {name for change in changes for name in change} == set(ShardRequest.model_fields)
    names = [request(**change).folder_name for change in [{}, *changes]]
    assert len(set(names)) == len(names)
    assert request().folder_name == names[0]
    assert names[0].startswith("demo-train-")

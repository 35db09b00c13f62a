"""Tests of damaged Parquet files and decompression bombs: only damaged rows are lost, and the memory is limited by the
size of the file.
"""

from __future__ import annotations

import errno
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import parquet_ranges
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from parquet_ranges import BYTES, others, read, read_path, stream, written

from pipelines.executor.ingest.records.record import Record


def details(records: list[Record]) -> list[str]:
    """Return the details of all problems, and check that every problem has the reason `unreadable_file`."""
    problems = [record.problem for record in records if record.problem]
    assert {problem.reason for problem in problems} <= {"unreadable_file"}
    return [problem.detail for problem in problems]


# ------------------------------------------------------------------------------------------------ damage


def three_groups(folder: Path) -> Path:
    columns = {"image": [bytes([row]) * 50 for row in range(30)], "text": [f"t{row}" for row in range(30)]}
    columns["n"] = [*range(30)]
    return written(folder, columns, row_group_size=10, compression="none", use_dictionary=False)


def overwrite(path: Path, group: int, column: int) -> None:
    """Overwrite the bytes of one column in one row group of a Parquet file."""
    chunk = pq.ParquetFile(path).metadata.row_group(group).column(column)
    content = bytearray(path.read_bytes())
    start = chunk.data_page_offset
    content[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    path.write_bytes(content)


@pytest.mark.parametrize("content", [b"PAR1", bytes(1000), b"a,b\n1,2\n" * 9, None], ids=["short", "0", "csv", "cut"])
def test_a_file_that_is_not_in_parquet_format_gives_one_record_that_describes_the_problem(
    tmp_path: Path, content: bytes | None
) -> None:
    path = three_groups(tmp_path)
    path.write_bytes(path.read_bytes()[:-200] if content is None else content)
    [detail] = details(read(path, step=100))
    assert "not a readable Parquet file" in detail


def test_a_file_that_vanishes_after_its_first_range_was_read_fails_the_task_and_no_range_is_left_out(
    tmp_path: Path,
) -> None:
    path = three_groups(tmp_path)
    (tmp_path / "other.parquet").touch()  # an empty folder would mean that its drive is not mounted
    records = stream(path, 100, ("image", "text"), {})
    assert next(records).fields["text"] == "t0"
    path.unlink()
    with pytest.raises(FileNotFoundError):
        list(records)


@pytest.mark.parametrize("column", [0, 1])
def test_a_damaged_parquet_row_group_loses_only_its_own_rows_and_gives_one_record_with_the_problem(
    tmp_path: Path, column: int
) -> None:
    path = three_groups(tmp_path)
    overwrite(path, 1, column)
    records = read(path)
    [detail] = details(records)
    assert "10 of 10 rows of row group 1 are lost" in detail
    texts = [record.fields["text"] for record in records if not record.problem]
    assert texts == [f"t{row}" for row in (*range(10), *range(20, 30))]


def test_damage_in_an_unused_column_loses_no_row_and_a_refused_row_describes_the_damage(tmp_path: Path) -> None:
    path = three_groups(tmp_path)
    overwrite(path, 1, 2)
    records = read(path)
    assert len(records) == 30
    assert "not stored" in others(records[10])["n"]
    assert others(records[20])["n"] == 20


@pytest.mark.parametrize("seed", range(20))
def test_a_damaged_byte_in_a_parquet_file_never_makes_rows_disappear_without_a_report(
    tmp_path: Path, seed: int
) -> None:
    path, chance = three_groups(tmp_path), random.Random(seed)
    content = bytearray(path.read_bytes())
    for _ in range(chance.choice([1, 5, 50])):
        content[chance.randrange(len(content))] = chance.randrange(256)
    path.write_bytes(content)
    records = read(path)
    good = [record for record in records if not record.problem]
    assert all(isinstance(others(record), dict) for record in good)
    assert len(good) == 30 or details(records)


@pytest.mark.parametrize(
    ("names", "what"),
    [
        (["image", "caption"], "no column text"),
        (["image", "text", "text"], "2 columns text"),
        (["text"], "no column image"),
    ],
)
def test_a_file_that_lacks_a_needed_column_gives_one_record_that_lists_the_columns_of_the_file(
    tmp_path: Path, names: list[str], what: str
) -> None:
    path = written(tmp_path, pa.Table.from_arrays([pa.array(["a"])] * len(names), names=names))
    [detail] = details(read(path, step=100))
    assert what in detail
    assert names[-1] in detail


@pytest.mark.parametrize("plain", [True, False])
def test_a_parquet_file_with_encrypted_columns_gives_one_record_that_describes_the_problem(
    tmp_path: Path, plain: bool
) -> None:
    encryption = pytest.importorskip("pyarrow.parquet.encryption")

    class Keys(encryption.KmsClient):  # type: ignore[misc, name-defined]
        def wrap_key(self, key_bytes: bytes, master_key_identifier: str) -> str:
            return key_bytes.hex()

        def unwrap_key(self, wrapped_key: str, master_key_identifier: str) -> bytes:
            return bytes.fromhex(wrapped_key)

    how = encryption.EncryptionConfiguration(footer_key="f", plaintext_footer=plain, column_keys={"i": ["image"]})
    factory = encryption.CryptoFactory(lambda _: Keys())
    properties = factory.file_encryption_properties(encryption.KmsConnectionConfig(), how)
    path = written(tmp_path, {"image": [BYTES], "text": ["a"]}, encryption_properties=properties)
    [detail] = details(read(path))
    assert "crypt" in detail


def test_a_vanished_parquet_file_gives_one_record_that_describes_the_problem(tmp_path: Path) -> None:
    (tmp_path / "other.parquet").touch()  # an empty folder would mean that its drive is not mounted
    [detail] = details(read_path(str(tmp_path / "gone.parquet"), size=9))
    assert "No such file" in detail


class BrokenDrive(MemoryFileSystem):  # type: ignore[misc]
    """Storage whose reads fail after a file has been opened."""

    protocol = "broken"

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(MemoryFileSystem._strip_protocol(path.replace("broken://", "memory://")))

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        opened = super()._open(path, mode, **options)
        opened.read = opened.readinto = self._fail
        return opened

    def _fail(self, *_: Any) -> bytes:
        raise OSError(errno.EIO, "Input/output error")


def test_parquet_files_are_read_from_urls_and_an_error_of_the_storage_is_raised(tmp_path: Path) -> None:
    content = three_groups(tmp_path).read_bytes()
    MemoryFileSystem().pipe("/folder/x.parquet", content)
    records = read_path("memory://folder/x.parquet", size=len(content))
    assert [others(record)["n"] for record in records] == [*range(30)]
    fsspec.register_implementation("broken", BrokenDrive, clobber=True)
    with pytest.raises(OSError, match="Input/output"):
        read_path("broken://folder/x.parquet", size=len(content))


# ------------------------------------------------------------------------------------------------ bombs


def repeated(value: Any, times: int) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array([0] * times, pa.int32()), pa.array([value]))


def test_a_value_that_is_too_large_is_replaced_by_a_description_and_all_other_values_are_read(tmp_path: Path) -> None:
    large = "x" * (17 * 2**20)
    texts = pa.array(["a", large, large[:-1] + "y", "b"])
    records = read(written(tmp_path, {"image": [BYTES] * 4, "text": texts, "n": range(4)}))
    assert [record.problem and record.problem.reason for record in records] == [None, *["text_too_long"] * 2, None]
    assert records[1].fields != records[2].fields, "values that differ are described differently"
    assert [record.fields["text"] for record in records[::3]] == ["a", "b"]
    pictures = pa.array([b"x" * (65 * 2**20), BYTES])
    records = read(written(tmp_path, {"image": pictures, "text": ["a", "b"]}))
    assert [record.problem and record.problem.reason for record in records] == ["too_large", None]
    other = repeated("x" * (40 * 2**20), 2)
    records = read(written(tmp_path, {"image": [BYTES] * 2, "text": ["a", "b"], "o": other}))
    assert "not stored" in others(records[0])["o"]


BOMBS = {
    "a text repeated in a dictionary": {"text": repeated("x" * 60_000_000, 40)},
    "a picture repeated in a dictionary": {"image": repeated(b"x" * 60_000_000, 40)},
    "an other column repeated in a dictionary": {"o": repeated("x" * 60_000_000, 40)},
    "a list that repeats a text": {
        "text": pa.ListArray.from_arrays(pa.array(range(0, 20_001, 500), pa.int32()), repeated("y" * 10**6, 20_000))
    },
    "a page of 300 MB": {"image": pa.array([bytes(30 * 10**6)] * 10 + [b""] * 30)},
    "a list of twenty million numbers": {
        "image": pa.array([np.zeros(2 * 10**7, np.uint8), *[np.zeros(1, np.uint8)] * 39], pa.list_(pa.uint8()))
    },
}


QUICK_BOMBS = ("a picture repeated in a dictionary", "a page of 300 MB")
"""Bombs that every test run reads: one that is small in the file and in its pages, and one whose page is large."""


@pytest.mark.faults
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK_BOMBS else pytest.mark.matrix) for name in BOMBS]
)
def test_memory_depends_on_the_real_size_of_a_parquet_file_and_not_on_sizes_stated_in_the_file(
    tmp_path: Path, name: str
) -> None:
    columns = {"image": [BYTES] * 40, "text": [f"t{row}" for row in range(40)]} | BOMBS[name]
    path = written(tmp_path, columns, compression="zstd", use_dictionary="page" not in name)
    program = f"""
import re, sys
sys.path.insert(0, {str(Path(parquet_ranges.__file__).parent)!r})
from pathlib import Path
from parquet_ranges import count_each
rows = count_each(Path({str(path)!r}))
print(rows, int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    rows, megabytes = map(int, done.stdout.split())
    assert rows in (1, 40)
    assert megabytes < 900

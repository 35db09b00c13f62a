"""Tests of reading text files line by line. Each line is read once, for any byte ranges and compression. A damaged file
gives one record that describes the damage.
"""

from __future__ import annotations

import bz2
import errno
import gzip
import io
import lzma
import os
import tracemalloc
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.executor.ingest.records.csv import csv_records
from pipelines.executor.ingest.records.jsonl import jsonl_records
from pipelines.executor.ingest.records.lines import (
    RANGE,
    WHOLE,
    Layout,
    LongLine,
    Range,
    range_lines,
    range_records,
    split_stream,
)
from pipelines.executor.ingest.records.record import Record
from pipelines.executor.ingest.text_stream import is_plain, open_text

LIMIT = 10**6


def zstd(content: bytes) -> bytes:
    """Compress bytes with zstd."""
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return bytes(sink.getvalue())


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "bzip2": partial(bz2.compress, compresslevel=1),
    "xz": lzma.compress,
    "zstd": zstd,
}


def lines_of(path: Path, start: int, end: int, separator: bytes = b"\n", limit: int = LIMIT) -> list[bytes]:
    part = Range(str(path), path.name, start, end, Layout(separator), {})
    return [line[0] for line in range_lines(part, limit) if not isinstance(line, LongLine)]


def raw_rows(path: Path, end: int = WHOLE, layout: int = 0, partition: str = "{}") -> Iterator[pa.RecordBatch]:
    row = {"path": os.fsencode(path), "file": path.name, "start": 0, "end": end}
    yield pa.RecordBatch.from_pylist([row | {"layout": layout, "partition": partition}], RANGE)


def json_records(path: Path, limit: int = LIMIT) -> list[Record]:
    return list(jsonl_records(raw_rows(path), [Layout()], limit))


def test_a_column_value_in_the_row_takes_precedence_over_the_value_in_the_partition_folder_name(tmp_path: Path) -> None:
    partition = '{"split": "val", "n": null, "year": "2024"}'
    (tmp_path / "a.csv").write_text("split,n\ntrain,1\n,2\n \t,\n")
    (tmp_path / "a.jsonl").write_text('{"split": "train", "n": "1"}\n{"split": null, "n": "2"}\n{"split": " \\t"}\n')
    layout = Layout(skip=1, names=("split", "n"))
    rows = list(csv_records(raw_rows(tmp_path / "a.csv", partition=partition), [layout], multiline=False, limit=LIMIT))
    lines = list(jsonl_records(raw_rows(tmp_path / "a.jsonl", partition=partition), [Layout()], LIMIT))
    expected = [{"split": s, "n": n, "year": "2024"} for s, n in (("train", "1"), ("val", "2"), ("val", None))]
    assert [record.fields for record in rows] == [record.fields for record in lines] == expected


@settings(max_examples=200)
@given(
    st.lists(st.binary(max_size=9).map(lambda line: line.replace(b"\n", b"").replace(b"\r", b"")), max_size=9),
    st.lists(st.sampled_from([b"\n", b"\r\n", b"\r"]), min_size=9, max_size=9),
    st.booleans(),
    st.sampled_from([b"\n", b"\r"]),
    st.integers(1, 12),
)
def test_every_line_is_read_exactly_once_for_any_line_ends_and_any_size_of_the_byte_ranges(
    lines: list[bytes], ends: list[bytes], ended: bool, separator: bytes, size: int
) -> None:
    pairs = list(zip(lines, ends, strict=False))
    content = b"".join(line + end for line, end in pairs)
    content = content if ended or not pairs else content.removesuffix(pairs[-1][1])
    with TemporaryDirectory() as folder:
        path = Path(folder, "a.csv")
        path.write_bytes(content)
        starts = range(0, len(content), size)
        found = [line for start in starts for line in lines_of(path, start, min(start + size, len(content)), separator)]
    written = [line for line in lines if line]
    assert [line for one in found if (line := one.strip(b"\r\n"))] == written


def test_only_the_beginning_of_a_line_over_the_size_limit_is_kept() -> None:
    content = b"first\n" + b"x" * (5 * 2**20) + b"\nlast"
    first, long, last = split_stream(io.BytesIO(content), b"\n", limit=1000)
    assert (first, last) == (b"first", b"last")
    assert isinstance(long, LongLine)
    assert (long.size, len(long.head)) == (5 * 2**20, 64 * 2**10)


def test_a_file_that_mixes_two_kinds_of_line_ends_is_split_at_both() -> None:
    rows = [b"%d" % number + b"x" * 1000 for number in range(4000)]
    pieces = list(split_stream(io.BytesIO(b"head\n" + b"\r".join(rows)), b"\n", limit=10**5))
    assert all(isinstance(piece, bytes) for piece in pieces)
    assert b"\r".join(piece for piece in pieces if isinstance(piece, bytes)).split(b"\r") == [b"head", *rows]


@pytest.mark.parametrize("kind", COMPRESSIONS)
def test_a_compressed_file_is_recognised_by_its_content_and_may_have_several_compressed_parts(
    tmp_path: Path, kind: str
) -> None:
    compress = COMPRESSIONS[kind]
    path = tmp_path / "wrong.csv.suffix"
    path.write_bytes(compress(b"a,b\n") + compress(b"c,d\n"))
    assert not is_plain(path.read_bytes()[:1024])
    assert lines_of(path, 0, WHOLE) == [b"a,b", b"c,d"]
    path.write_bytes(gzip.compress(compress(b"twice\n")))
    assert lines_of(path, 0, WHOLE) == [b"twice"]


@pytest.mark.parametrize("kind", COMPRESSIONS)
def test_rows_before_the_damaged_part_of_a_file_are_read_and_one_record_reports_the_damage(
    tmp_path: Path, kind: str
) -> None:
    rows = [b'{"row": %d, "noise": "%s"}\n' % (number, os.urandom(40).hex().encode()) for number in range(5_000)]
    whole = COMPRESSIONS[kind](b"".join(rows))
    path = tmp_path / "cut.jsonl"
    path.write_bytes(whole[: len(whole) * 3 // 4])
    *good, damaged = json_records(path)
    assert damaged.problem is not None
    assert damaged.problem.reason == "unreadable_file"
    assert f"after {len(good)} rows" in damaged.problem.detail
    assert damaged.raw is not None
    assert str(path) in damaged.raw
    assert [record.fields["row"] for record in good] == list(range(len(good)))
    assert len(good) > len(rows) // 3


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_text_with_a_byte_order_mark_or_in_utf_16_is_decoded_to_the_original_text(
    tmp_path: Path, encoding: str
) -> None:
    path = tmp_path / "a.jsonl"
    text = '{"text": "caf\u00e9 \U0001f600"}\r\n' * 3
    path.write_bytes(text.encode(encoding))
    assert [record.fields for record in json_records(path)] == [{"text": "caf\u00e9 \U0001f600"}] * 3
    path.write_bytes(gzip.compress(text.encode(encoding)))
    assert [record.fields for record in json_records(path)] == [{"text": "caf\u00e9 \U0001f600"}] * 3


def test_an_archive_and_a_file_that_ends_inside_a_character_are_reported_as_damaged(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"a": 1}\n{"a": 2}\n'.encode("utf-16")[:-1])
    assert [record.fields for record in json_records(path)] == [{"a": 1}, {}]
    for content, name in ((b"PK\x03\x04" + bytes(100), "ZIP"), (gzip.compress(bytes(257) + b"ustar"), "tar")):
        path.write_bytes(content)
        [record] = json_records(path)
        assert name in str(record.problem)


def test_a_vanished_file_gives_one_record_with_a_problem_but_an_input_output_error_is_raised(tmp_path: Path) -> None:
    (tmp_path / "other.jsonl").touch()  # an empty folder would mean that its drive is not mounted
    [record] = json_records(tmp_path / "gone.jsonl")
    assert record.problem is not None
    assert record.problem.reason == "unreadable_file"

    def offline(_: Range) -> Iterator[Record]:
        yield Record("a", {})
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(OSError, match="Input/output"):
        list(range_records(raw_rows(tmp_path), [Layout()], offline))
    with pytest.raises(FileNotFoundError):
        json_records(tmp_path / "drive that was disconnected" / "a.jsonl")


def test_a_file_with_a_problem_in_its_layout_gives_a_single_record_that_describes_the_problem(tmp_path: Path) -> None:
    [record] = jsonl_records(raw_rows(tmp_path / "a"), [Layout(problem="the file has no column image")], LIMIT)
    assert record.problem is not None
    assert record.problem.detail == "the file has no column image"


def test_a_compressed_text_file_is_read_and_then_closed(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(gzip.compress(b"x"))
    stream = open_text(str(tmp_path / "a"))
    assert stream.read() == b"x"
    stream.close()
    assert stream.closed


@pytest.mark.parametrize("content", [b"x", b'"', b'a,"'], ids=repr)
def test_memory_stays_bounded_for_a_small_file_that_decompresses_to_one_endless_line(
    tmp_path: Path, content: bytes
) -> None:
    unpacked, limit = 32 * 2**20, 2**20
    path = tmp_path / "bomb.csv.gz"
    path.write_bytes(gzip.compress(content * (unpacked // len(content)), 1))
    layouts = [Layout(names=("a", "b"))]
    read = [partial(csv_records, multiline=multiline, limit=limit) for multiline in (False, True)]
    for records in (*read, partial(jsonl_records, limit=limit)):
        tracemalloc.start()
        found = [record.problem and record.problem.reason for record in records(raw_rows(path), layouts)]
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert found == ["too_large"]
        assert peak < unpacked // 2

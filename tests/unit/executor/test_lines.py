"""Tests that every line of a file is read once when the file is read in byte ranges."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.executor.ingest.records.lines import file_lines


@settings(deadline=None)
@given(
    st.lists(st.binary(max_size=9).map(lambda line: line.replace(b"\n", b"").replace(b"\r", b"")), max_size=9),
    st.sampled_from([b"\n", b"\r\n"]),
    st.booleans(),
    st.integers(1, 12),
)
def test_every_line_of_a_file_is_read_once_whatever_the_size_of_the_ranges(
    lines: list[bytes], end: bytes, ended: bool, size: int
) -> None:
    content = end.join(lines) + (end if ended and lines else b"")
    with TemporaryDirectory() as folder:
        path = Path(folder, "a.csv")
        path.write_bytes(content)
        ranges = [
            {"path": str(path), "file": path.name, "start": start, "header": 3, "end": min(start + size, len(content))}
            for start in range(0, len(content), size)
        ]
        batches = (pa.RecordBatch.from_pylist([row]) for row in ranges)
        found = list(file_lines(batches))
    expected = content.replace(b"\r\n", b"\n").split(b"\n")
    assert [line.content for line in found] == (expected if expected[-1] else expected[:-1])
    assert {(line.path, line.file, line.header) for line in found} <= {(str(path), "a.csv", 3)}
    starts = [line.start for line in found]
    assert starts == sorted(starts)

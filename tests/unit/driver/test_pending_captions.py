"""Tests that the work of a captioning job does not grow with the number of files."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.driver.caption.pending_files import PendingFiles


@pytest.mark.parametrize("files", [3, 12])
def test_counting_the_progress_of_a_caption_job_reads_the_footer_of_each_parquet_file_only_once(
    tmp_path: Path, files: int
) -> None:
    pending = PendingFiles(tmp_path, {}, ("image_id", "image"))
    for number in range(files):
        pq.write_table(pa.table({"image_id": ["a", "b"]}), tmp_path / f"{number}.parquet")
    assert pending.num_rows() == 2 * files
    for number in range(files):
        (tmp_path / f"{number}.parquet").write_bytes(b"no footer")
    pq.write_table(pa.table({"image_id": ["c"]}), tmp_path / "new.parquet")
    assert pending.num_rows() == 2 * files + 1
    (tmp_path / "new.parquet").unlink()
    assert pending.num_rows() == 2 * files

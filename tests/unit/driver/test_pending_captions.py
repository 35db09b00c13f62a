"""Tests that the work of a captioning job does not grow with the number of earlier jobs or the number of files."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.driver.caption.pending_files import PendingFiles
from pipelines.driver.caption.source_table import MAX_COMPARED_VERSIONS, compared_versions


@pytest.mark.parametrize("nights", [40, 160])
def test_the_number_of_compared_table_versions_does_not_grow_with_the_number_of_captioned_versions(nights: int) -> None:
    rows = dict.fromkeys(range(nights), 10) | {7: 1000, nights: 500}
    compared = compared_versions(rows, nights)
    assert len(compared) == MAX_COMPARED_VERSIONS
    assert compared[0] == 7
    assert nights not in compared


def test_a_caption_job_compares_all_earlier_captioned_table_versions_if_there_are_only_a_few() -> None:
    assert set(compared_versions({1: 5, 2: 5, 9: 1}, 9)) == {1, 2}


@pytest.mark.parametrize("files", [3, 12])
def test_counting_the_progress_of_a_caption_job_reads_the_footer_of_each_parquet_file_only_once(
    tmp_path: Path, files: int
) -> None:
    pending = PendingFiles(tmp_path, {})
    for number in range(files):
        pq.write_table(pa.table({"image_id": ["a", "b"]}), tmp_path / f"{number}.parquet")
    assert pending.num_rows() == 2 * files
    for number in range(files):
        (tmp_path / f"{number}.parquet").write_bytes(b"no footer")
    pq.write_table(pa.table({"image_id": ["c"]}), tmp_path / "new.parquet")
    assert pending.num_rows() == 2 * files + 1
    (tmp_path / "new.parquet").unlink()
    assert pending.num_rows() == 2 * files

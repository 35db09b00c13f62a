"""Tests of folder sources on the driver: every entry of the folder is read, or reported with a reason."""

from __future__ import annotations

import gzip
import tracemalloc
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from without_permission import without_permission

from pipelines.config import DataConfig
from pipelines.driver.ingest.sources import folder as folder_source
from pipelines.driver.ingest.sources import walk
from pipelines.driver.ingest.sources.folder import check_captions, has_small_captions
from pipelines.driver.ingest.sources.walk import passed_over
from pipelines.errors import UserError


def test_a_picture_file_that_no_row_names_is_reported_as_passed_over(tmp_path: Path) -> None:
    folder = (tmp_path / "offered").resolve()
    (folder / "in").mkdir(parents=True)
    for name in ("named.png", "in/named.png", "in/UNNAMED.JPG", "captions.csv", "README.md", ".hidden.png"):
        (folder / name).write_bytes(b"x")
    (folder / "__MACOSX").mkdir()
    (folder / "__MACOSX" / "named.png").write_bytes(b"x")
    (tmp_path / "private.png").write_bytes(b"secret")
    (folder / "all").symlink_to("/")
    (folder / "again").symlink_to("in")
    (folder / "out.png").symlink_to("../private.png")
    (folder / "link.png").symlink_to("named.png")
    (folder / "in" / "lost.png").symlink_to("nowhere.png")
    used = {str(folder / name) for name in ("named.png", "in/named.png", "captions.csv")} | {None}
    found, counts = passed_over(str(folder), used)
    assert counts == {"hidden": 2, "link_outside": 2, "not_named": 1, "not_regular": 1, "other_kind": 1}
    assert {entry.relative: entry.reason for entry in found} == {
        "in/UNNAMED.JPG": "not_named",
        "in/lost.png": "not_regular",
        "README.md": "other_kind",
        ".hidden.png": "hidden",
        "__MACOSX/": "hidden",
        "all/": "link_outside",
        "out.png": "link_outside",
    }


def test_the_memory_for_files_that_no_row_names_does_not_grow_with_their_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(walk, "NAMED_FILES", 5)
    peaks = []
    for count in (200, 1_600):
        folder = (tmp_path / str(count)).resolve()
        folder.mkdir()
        for number in range(count):
            (folder / f"{number:04}.png").touch()
        tracemalloc.start()
        try:
            named, counts = passed_over(str(folder), set())
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
        assert [entry.relative for entry in named] == [f"{number:04}.png" for number in range(5)]
        assert counts == {"not_named": count}
    assert peaks[1] < 2 * peaks[0]


@pytest.mark.parametrize("name", ["captions.csv", "captions.csv.gz"])
def test_a_captions_file_is_small_only_if_its_uncompressed_content_is_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(folder_source, "SMALL_CAPTIONS_BYTES", 1_000)
    source = {"kind": "folder", "path": str(tmp_path), "captions": name}
    config = DataConfig.model_validate({"source": source})
    for size, is_small in ((1_000, True), (1_001, False)):
        content = b"a" * size
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        assert has_small_captions(config.source, config) is is_small  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["captions.csv", "captions.json"])
def test_a_captions_file_that_the_driver_may_not_read_fails_the_ingest_and_is_no_damaged_file(
    name: str,
) -> None:
    with TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)  # the file can be found, but not opened
        captions = Path(folder) / name
        captions.write_text("file_name,text\n")
        config = DataConfig.model_validate({"source": {"kind": "folder", "path": folder, "captions": name}})
        assert config.source.kind == "folder"
        check_captions(config.source, config)
        with (
            without_permission(captions),
            pytest.raises(UserError, match=rf"the captions file cannot be read.*{name}.*Permission denied"),
        ):
            check_captions(config.source, config)

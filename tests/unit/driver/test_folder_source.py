"""Tests of folder sources on the driver: every entry of the folder is read, or reported with a reason."""

from __future__ import annotations

from pathlib import Path

from pipelines.driver.ingest.sources.folder import passed_over


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
    found = passed_over(str(folder), used)
    assert {entry.relative: entry.reason for entry in found} == {
        "in/UNNAMED.JPG": "not_named",
        "in/lost.png": "not_regular",
        "README.md": "other_kind",
        ".hidden.png": "hidden",
        "__MACOSX/": "hidden",
        "all/": "link_outside",
        "out.png": "link_outside",
    }

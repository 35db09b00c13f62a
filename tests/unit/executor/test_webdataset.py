"""Tests of WebDataset tars: members with the same key form a row, and a damaged tar keeps its complete rows.

Public bug reports (GitHub issues) that these tests repeat, grouped by what an earlier version of our parser did:

- Rows were lost or mixed without an error: a damaged header ends the tar (python/cpython#84934), a tar that was not
  closed (webdataset/webdataset#32), hard and symbolic links (flapdoodle-oss/de.flapdoodle.embed.process#70,
  mxmlnkn/ratarmount#28, python/cpython#73798 and #122736), concatenated tars (libarchive/libarchive#1620), line breaks
  in names of folders (JD-P/simulacra-aesthetic-captions#1), keys of bytes that are not UTF-8
  (webdataset/webdataset#330).
- Rows were refused, and the error now names the cause: members of a row that are not neighbours
  (webdataset/webdataset#140, #258 and #407, ray-project/ray#44068), dots in names (webdataset/webdataset#237,
  huggingface/datasets#6880 and #7144, mlfoundations/open_clip#480, huggingface/datasets#7055).
- The parser was already right: truncated tars (webdataset/webdataset#142, JoeLeelyf/OVO-Bench#18), dots in folders
  (macrodata-labs/refiner#124), one name twice (webdataset/webdataset#157 and #173), `._` files (alexa/massive#8), gaps
  in the numbers of shards (rom1504/img2dataset#174), several extensions (webdataset/webdataset#288).
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import json
import lzma
import os
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pipelines.config import PICTURE
from pipelines.executor.ingest.encoding import decode_text
from pipelines.executor.ingest.records import webdataset
from pipelines.executor.ingest.records.record import Problem, Record
from pipelines.executor.ingest.records.webdataset import tar_records

IMAGES = ("jpg", "png")
COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "none": bytes,
    "gzip": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zstd": lambda content: pa.compress(content, "zstd", asbytes=True),
}


def write_tar(path: Path, members: Mapping[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def add(tar: tarfile.TarFile, name: str, content: bytes = b"", **attributes: object) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for attribute, value in attributes.items():
        setattr(info, attribute, value)
    tar.addfile(info, io.BytesIO(content))


def rows_of(*paths: Path, named: tuple[str, ...] = ("json.n",), most: int = 2_000) -> list[Record]:
    columns = {"path": [os.fsencode(path) for path in paths], "file": [path.name for path in paths]}
    batch = pa.RecordBatch.from_pydict(columns)
    return list(tar_records(iter([batch]), IMAGES, named, max_bytes=most))


ROWS = {
    "in/a.1.png": b"p",
    "in/b.jpg": b"j",
    "in/b.txt": b"caf\xc3\xa9",
    "in/b.png": b"other",
    "in/c.json": b'{"n": [1]}',
}


def test_tar_members_with_the_same_key_form_one_row(tmp_path: Path) -> None:
    junk = {"README": b"no extension", "in/.DS_Store": b"hidden"}
    first, second, third = rows_of(write_tar(tmp_path / "x.tar", junk | ROWS))
    assert first.fields == {"__key__": "in/a", "__member__": None, PICTURE: None, "1.png": "p"}
    picture = {"__member__": "in/b.jpg", PICTURE: b"j"}
    assert second.fields == {"__key__": "in/b", **picture, "txt": "caf\u00e9", "png": b"other"}
    assert third.fields == {"__key__": "in/c", "__member__": None, PICTURE: None, "json.n": [1]}
    assert {record.file for record in (first, second, third)} == {"x.tar"}
    assert second.problem is None
    assert third.problem is not None
    assert third.problem.reason == "missing_field"
    assert first.problem == Problem(
        "missing_field", "no picture, but 1.png: an extension begins at the first dot of a name"
    )


def test_one_task_can_read_several_tars_and_each_tar_may_be_compressed(tmp_path: Path) -> None:
    paths = write_tar(tmp_path / "x.tar.gz", ROWS, "w:gz"), write_tar(tmp_path / "y.tar", ROWS)
    assert [record.fields["__key__"] for record in rows_of(*paths)] == ["in/a", "in/b", "in/c"] * 2


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"a.png": bytes(2_001), "a.txt": b"x"}, "too_large"),
        ({"a.png": b"p", "a.PNG": b"q"}, "malformed_record"),
        ({"a.png": b"p", "a.json": b"{cut"}, "malformed_record"),
        ({"a.png": b"p", "a.json": b"[1]"}, "malformed_record"),
    ],
    ids=["large", "twice", "not-json", "no-object"],
)
def test_a_problem_of_a_tar_member_affects_only_the_row_of_this_member(
    tmp_path: Path, members: dict[str, bytes], reason: str
) -> None:
    bad, good = rows_of(write_tar(tmp_path / "x.tar", members | {"b.png": b"p"}))
    assert bad.problem is not None
    assert bad.problem.reason == reason
    assert good == Record("x.tar", {"__key__": "b", "__member__": "b.png", PICTURE: b"p"})


def test_the_problem_of_a_row_without_a_picture_names_the_members_of_the_row(tmp_path: Path) -> None:
    [record] = rows_of(write_tar(tmp_path / "x.tar", {"a.jfif": b"p", "a.txt": b"x"}))
    assert record.problem is not None
    assert record.problem.reason == "missing_field"
    assert record.problem.detail.endswith("jfif, txt, and none is in data.source.columns.image")


def test_the_problem_of_a_tar_that_is_a_zip_archive_or_was_compressed_twice_names_the_cause(
    tmp_path: Path,
) -> None:
    with zipfile.ZipFile(tmp_path / "zip.tar", "w") as archive:
        archive.writestr("a.png", b"p")
    write_tar(tmp_path / "once.tar.gz", ROWS, "w:gz")
    (tmp_path / "twice.tar").write_bytes(gzip.compress((tmp_path / "once.tar.gz").read_bytes()))
    details = []
    for name in ("zip.tar", "twice.tar"):
        [record] = rows_of(tmp_path / name)
        assert record.problem is not None
        details.append(record.problem.detail)
    assert "the file is a ZIP archive: unpack it" in details[0]
    assert "the content is compressed a second time (gzip)" in details[1]


@pytest.mark.parametrize("content", [b"[1]", b"null", b"", b"{cut", b"7", b"\xff"])
def test_a_json_member_that_is_not_an_object_is_a_problem_only_if_the_config_names_one_of_its_columns(
    tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_tar(tmp_path / "x.tar", {"a.png": b"p", "a.txt": b"x", "a.json": content})
    [record] = rows_of(path, named=("png", "txt", "__key__", "jsonl"), most=9_000)
    assert record.problem is None
    assert record.fields["json"] == decode_text(content)
    [record] = rows_of(path, named=("png", "txt", "json.n"), most=9_000)
    assert record.problem is not None
    assert record.problem.reason == "malformed_record"
    monkeypatch.setattr(webdataset, "SIDE_BYTES", 0)
    large = write_tar(tmp_path / "y.tar", {"a.png": b"p", "a.json": b'{"n": 1}'})
    assert [record.problem for record in rows_of(large, named=("png", "txt"))] == [None]
    assert [record.problem is None for record in rows_of(large)] == [False]


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_complete_rows_of_a_truncated_tar_are_kept_and_one_refused_row_reports_the_damage(
    tmp_path: Path, mode: str
) -> None:
    members = {f"{n}.{extension}": bytes([n]) * 700 for n in range(4) for extension in IMAGES}
    path = write_tar(tmp_path / "x.tar", members, mode)
    content, rows = path.read_bytes(), rows_of(path)
    assert len(rows) == 4
    for cut in range(1, len(content), max(1, len(content) // 40)):
        path.write_bytes(content[:cut])
        found = rows_of(path)
        before = [record for record in found if not record.problem]
        assert before == rows[: len(before)]
        if len(found) > len(before):
            assert [record.problem.reason for record in found if record.problem] == ["unreadable_file"]
            assert found[-1].raw == f"x.tar from row {len(before) + 1} on"
        else:
            assert before == rows, "only the padding behind the end mark is cut"


def test_a_file_that_is_not_a_tar_becomes_one_refused_row(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(b"hello " * 200)
    [record] = rows_of(tmp_path / "x.tar")
    assert record.problem is not None
    assert record.problem.reason == "unreadable_file"
    assert record.raw == "x.tar from row 1 on"


def test_a_tar_that_cannot_be_opened_becomes_one_refused_row(tmp_path: Path) -> None:
    (tmp_path / "other.tar").touch()  # an empty folder would mean that its drive is not mounted
    [record] = rows_of(tmp_path / "gone.tar")
    assert record.problem == Problem(
        "unreadable_file", "the tar ends or is damaged after 0 rows: No such file or directory"
    )


@pytest.mark.parametrize("compress", COMPRESSIONS.values(), ids=COMPRESSIONS)
def test_compression_of_a_tar_is_detected_from_its_content_and_not_from_its_name(
    tmp_path: Path, compress: Callable[[bytes], bytes]
) -> None:
    plain = write_tar(tmp_path / "x.tar", ROWS).read_bytes()
    (tmp_path / "y.tgz").write_bytes(compress(plain[:3_000]) + compress(plain[3_000:]))
    assert [record.fields["__key__"] for record in rows_of(tmp_path / "y.tgz")] == ["in/a", "in/b", "in/c"]
    (tmp_path / "z.tar").write_bytes(compress(plain)[:-9])
    assert len(rows_of(tmp_path / "z.tar")) >= 1 - (compress is bytes)


def test_concatenated_tars_are_read_to_the_end(tmp_path: Path) -> None:
    first, second = (write_tar(tmp_path / f"{key}.tar", {f"{key}.png": b"p"}) for key in "ab")
    first.write_bytes(first.read_bytes() + second.read_bytes() + b"no tar".ljust(512, b"!"))
    one, two, rest = rows_of(first)
    assert [one.fields["__key__"], two.fields["__key__"]] == ["a", "b"]
    assert rest.problem is not None
    assert "the tar has other bytes after its end mark" in rest.problem.detail


def test_a_tar_that_was_cut_between_two_rows_is_reported(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", {"a.png": b"p", "a.txt": b"x", "b.png": b"p"})
    path.write_bytes(path.read_bytes()[:2_048])
    *_, last = rows_of(path)
    assert last.problem is not None
    assert "no end mark" in last.problem.detail


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"\xef\xbb\xbfa cat", "a cat"),
        ("a dog".encode("utf-16"), "a dog"),
        ("a dog".encode("utf-16-be"), "a dog"),
        ("a dog".encode("utf-32"), "a dog"),
        ("a caf\u00e9".encode("utf-16-le"), "a caf\u00e9"),
        ("caf\u00e9".encode("latin-1"), "caf\ufffd"),
        (b"7\n", "7\n"),
        (b"", ""),
        ("\u732b".encode(), "\u732b"),
    ],
)
def test_the_first_bytes_of_a_text_or_json_member_determine_its_encoding(
    tmp_path: Path, content: bytes, text: str
) -> None:
    document = b'{"t": "' + content + b'"}' if content.isascii() and b"\0" not in content else None
    members = {"a.jpg": b"j", "a.TXT": content, "a.json": json.dumps({"n": 1}).encode("utf-16")}
    [record] = rows_of(write_tar(tmp_path / "x.tar", members))
    assert (record.fields["txt"], record.fields["json.n"], record.problem) == (text, 1, None)
    assert document is None or b"t" in document


@given(st.text(st.characters(exclude_categories=["Cs"])), st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"]))
def test_a_text_member_in_any_encoding_is_decoded_to_the_original_text(text: str, encoding: str) -> None:
    assume(not text.startswith("\ufeff") and "\0" not in text)
    assert decode_text(text.encode(encoding)) == text


def test_tar_members_that_belong_to_no_row_are_ignored_and_members_with_odd_names_form_rows(tmp_path: Path) -> None:
    members = {
        "__MACOSX/._a.jpg": b"resource fork",
        "__MACOSX/b.jpg": b"resource fork",
        "./a.JPG": b"j",
        "__MACOSX/c.jpg": b"resource fork",
        "a.txt": b"a cat",
        "/abs/c.jpg": b"j",
        "../up/d.jpg": b"j",
    }
    records = rows_of(write_tar(tmp_path / "x.tar", members))
    assert [(record.fields["__key__"], record.fields[PICTURE]) for record in records] == [
        ("./a", b"j"),
        ("/abs/c", b"j"),
        ("../up/d", b"j"),
    ]
    assert records[0].fields["txt"] == "a cat"
    assert not (tmp_path.parent / "up").exists()


def test_tar_members_with_line_breaks_or_invalid_utf_8_in_their_names_form_separate_rows(tmp_path: Path) -> None:
    """GitHub issues: macrodata-labs/refiner#124, JD-P/simulacra-aesthetic-captions#1, webdataset/webdataset#330."""
    names = ["train.v1/0001.jpg", "new\nline/a\nb.jpg", "back\\slash.jpg", "\udce8.jpg", "\udce9.jpg", "22.05.jpg"]
    names.insert(0, "BZh9.jpg")  # the first bytes are those of a bz2 file
    records = rows_of(write_tar(tmp_path / "x.tar", dict.fromkeys(names, b"j")))
    assert [record.fields["__key__"] for record in records] == [
        "BZh9",
        "train.v1/0001",
        "new\nline/a\nb",
        "back\\slash",
        "\ufffd",
        "\ufffd",
        "22",
    ]
    assert [record.fields[PICTURE] for record in records] == [*[b"j"] * 6, None]
    assert "an extension begins at the first dot" in str(records[-1].problem)


def test_a_row_whose_tar_members_are_not_next_to_each_other_is_refused(tmp_path: Path) -> None:
    members = {"a.jpg": b"a", "b.jpg": b"b", "a.txt": b"a", "b.txt": b"b"}
    records = rows_of(write_tar(tmp_path / "x.tar", members))
    assert [(record.fields["__key__"], record.fields.get("txt")) for record in records] == [
        ("a", None),
        ("b", None),
        ("a", "a"),
        ("b", "b"),
    ]
    reason = Problem("malformed_record", "row a: its members are in several places of the tar: sort the tar by name")
    assert records[2].problem == reason


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_link_in_a_tar_is_read_as_the_member_that_the_link_names(tmp_path: Path, mode: str) -> None:
    with tarfile.open(tmp_path / "x.tar", mode) as tar:  # type: ignore[call-overload]
        add(tar, "before.jpg", linkname="in/a.jpg", type=tarfile.LNKTYPE)
        add(tar, "before.txt", b"before")
        add(tar, "in/a.jpg", b"cat")
        add(tar, "in/a.txt", b"a cat")
        add(tar, "in/b.jpg", linkname="./a.jpg", type=tarfile.SYMTYPE)
        add(tar, "in/b.txt", linkname="in/a.txt", type=tarfile.LNKTYPE)
        add(tar, "in/c.jpg", linkname="b.jpg", type=tarfile.SYMTYPE)
        add(tar, "in/d.jpg", linkname="../../etc/hostname", type=tarfile.SYMTYPE)
        add(tar, "in/e.jpg", linkname="e.jpg", type=tarfile.SYMTYPE)
        add(tar, "in/f.jpg", linkname="in/big.bin", type=tarfile.LNKTYPE)
        add(tar, "in/big.bin", bytes(2_001))
    records = {record.fields["__key__"]: record for record in rows_of(tmp_path / "x.tar")}
    assert {key: record.fields[PICTURE] for key, record in records.items() if not record.problem} == {
        "before": b"cat",
        "in/a": b"cat",
        "in/b": b"cat",
        "in/c": b"cat",
    }
    assert records["in/b"].fields["txt"] == "a cat"
    refused = {key: record.problem for key, record in records.items() if record.problem}
    assert refused == {
        "in/d": Problem("malformed_record", "in/d.jpg is a link to in/../../etc/hostname: the tar has no such member"),
        "in/e": Problem("malformed_record", "in/e.jpg is a link to in/e.jpg: the tar has no such member"),
        "in/f": Problem("too_large", "in/f.jpg is a link to in/big.bin: 2001 bytes; at most 2000 are allowed"),
        "in/big": Problem("too_large", "in/big.bin: 2001 bytes; at most 2000 are allowed"),
    }


def test_rows_with_links_of_a_tar_that_vanishes_after_its_first_pass_are_lost_with_a_record(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        add(tar, "a.jpg", b"cat")
        add(tar, "b.jpg", linkname="a.jpg", type=tarfile.LNKTYPE)
    (tmp_path / "other.tar").touch()
    batch = pa.RecordBatch.from_pydict({"path": [os.fsencode(tmp_path / "x.tar")], "file": ["x.tar"]})
    records = tar_records(iter([batch]), IMAGES, (), max_bytes=2_000)
    assert next(records).fields[PICTURE] == b"cat"
    (tmp_path / "x.tar").unlink()
    [record] = records
    assert record.problem is not None
    assert record.problem.reason == "unreadable_file"
    assert "rows with links: No such file" in record.problem.detail


def test_a_tar_member_that_is_not_a_plain_file_gives_a_problem_in_its_row(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        add(tar, "a.jpg", type=tarfile.CHRTYPE)
        add(tar, "b.jpg", b"ignored", type=b"Z")
        add(tar, "folder.jpg", type=tarfile.DIRTYPE)
        add(tar, "c.jpg", b"j")
    [device, unknown, good] = rows_of(tmp_path / "x.tar")
    assert device.problem == Problem("malformed_record", "a.jpg is a device, not a plain file")
    assert unknown.problem == Problem(
        "malformed_record", "b.jpg is a member of the unknown type b'Z', not a plain file"
    )
    assert (good.problem, good.fields[PICTURE]) == (None, b"j")


def test_a_row_in_a_tar_has_a_limited_number_of_members_and_of_bytes(tmp_path: Path) -> None:
    many = {f"b.{n}": b"" for n in range(1_100)}
    large = {f"c.e{n}": bytes(900) for n in range(40)}
    *_, last = records = rows_of(write_tar(tmp_path / "x.tar", {"a.jpg": b"j"} | many | large | {"d.jpg": b"j"}))
    assert [record.problem and record.problem.detail for record in records] == [
        None,
        "the row has more than 1000 members",
        "the members of the row have more than 2500 bytes",
        None,
    ]
    assert last.fields[PICTURE] == b"j"


def test_only_the_size_and_the_hash_of_a_tar_member_over_the_size_limit_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webdataset, "SIDE_BYTES", 10)
    [record] = rows_of(write_tar(tmp_path / "x.tar", {"a.jpg": b"j" * 99, "a.txt": b"a cat", "a.npy": bytes(6)}))
    digest = hashlib.sha256(bytes(6)).hexdigest()
    assert (record.fields["txt"], record.fields["npy"]) == ("a cat", {"bytes": 6, "sha256": digest})

"""Tests of rows with paths of pictures: any spelling of a path finds the picture, and no path leads out of the folder.

Public bug reports (GitHub issues) that these tests and those of folder sources repeat: the metadata.csv of Hugging
Face's imagefolder in a subfolder, or with another name (huggingface/datasets#4069, #6442 and #7663), captions without
their pictures (huggingface/datasets#5761 and #7337, AIChallenger/AI_Challenger_2017#26), names in the other Unicode
form (mucommander/mucommander#900, cryptomator/fuse-nio-adapter#27), blanks and non-ASCII in paths (apache/spark#24855,
broadinstitute/gatk#4337).
"""

from __future__ import annotations

import json
import os
import unicodedata
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.config import PICTURE
from pipelines.driver.ingest.sources.files import absolute_path
from pipelines.errors import UserError
from pipelines.executor.ingest.records.csv import csv_records
from pipelines.executor.ingest.records.jsonl import jsonl_records
from pipelines.executor.ingest.records.lines import Layout
from pipelines.executor.ingest.records.parquet import parquet_records
from pipelines.executor.ingest.records.pictures import root
from pipelines.executor.ingest.records.pictures.root import (
    PictureRoot,
    absolute_location,
    picture_records,
    read_picture_column,
    require_root,
)
from pipelines.executor.ingest.records.record import Problem, Record
from pipelines.review.source_pictures import PictureColumns

SECRET = b"secret"


def read(folder: Path, name: object) -> bytes | str:
    """Return the bytes of the picture, or the problem as text."""
    found = PictureRoot(str(folder), max_bytes=100).read(name)
    return found if isinstance(found, bytes) else f"{found.reason}: {found.detail}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a picture folder. Beside the folder lie a file and another folder that no picture name may reach."""
    (tmp_path / "secret.png").write_bytes(SECRET)
    (tmp_path / "offered-private").mkdir()
    (tmp_path / "offered-private" / "a.png").write_bytes(SECRET)
    (tmp_path / "offered" / "in").mkdir(parents=True)
    return tmp_path / "offered"


@pytest.mark.parametrize(
    ("on_disk", "named"),
    [
        ("a.png", "a.png"),
        ("a.png", "./a.png"),
        ("a.png", ".//a.png"),
        ("a.png", "in/../a.png"),
        ("a.png", " a.png\n"),
        ("in/a.png", "in/a.png"),
        ("in/a.png", "in\\a.png"),
        ("in/a.png", ".\\in\\a.png"),
        ("in/a b.png", "in/a%20b.png"),
        ("in/a b.png", "in\\a%20b.png"),
        ("a%20b.png", "a%20b.png"),
        ("a\\b.png", "a\\b.png"),
        (" a.png", " a.png"),
        ("a#1?.png", "a#1?.png"),
        ("100%.png", "100%.png"),
        ("[1]{a,b}*.png", "[1]{a,b}*.png"),
        ("a:b.png", "a:b.png"),
        ("caf\u00e9.png", "caf\u00e9.png"),
        ("caf\u00e9.png", "cafe\u0301.png"),
        ("cafe\u0301.png", "caf\u00e9.png"),
        ("cafe\u0301/a.png", "caf\u00e9/a.png"),
        ("caf\u00e9 e\u0301.png", "caf\u00e9 \u00e9.png"),
        ("\u1112\u1161\u11ab.png", "\ud55c.png"),
        ("caf\u00e9.png", "caf%C3%A9.png"),
    ],
)
def test_a_picture_file_is_found_by_every_spelling_of_its_name(folder: Path, on_disk: str, named: str) -> None:
    (folder / on_disk).parent.mkdir(exist_ok=True)
    (folder / on_disk).write_bytes(b"picture")
    assert read(folder, named) == b"picture"


def test_a_picture_name_is_tried_unchanged_before_its_percent_escapes_are_decoded(folder: Path) -> None:
    (folder / "a%20b.png").write_bytes(b"literal")
    (folder / "a b.png").write_bytes(b"unquoted")
    assert (read(folder, "a%20b.png"), read(folder, "a b.png")) == (b"literal", b"unquoted")


def test_a_picture_file_may_be_named_by_its_absolute_path_or_by_its_uri(folder: Path) -> None:
    (folder / "a b.png").write_bytes(b"picture")
    for name in (f"{folder}/a b.png", f"file://{folder}/a%20b.png", f"file:{folder}/a b.png"):
        assert read(folder, name) == b"picture"
    link = folder.parent / "link"
    link.symlink_to(folder)
    assert read(link, f"{link}/a b.png") == read(link, f"{folder}/a b.png") == b"picture"


@pytest.mark.parametrize(
    "name",
    [
        "../secret.png",
        "in/../../secret.png",
        "..\\secret.png",
        "%2e%2e/secret.png",
        "..%5csecret.png",
        "{top}/secret.png",
        "file://{top}/secret.png",
        "file://{top}/offered/../secret.png",
        "{top}/offered-private/a.png",
        "../offered-private/a.png",
        "out.png",
        "in/up/secret.png",
        "chain.png",
        "s3://bucket/a.png",
        "http://127.0.0.1/a.png",
        "file://elsewhere/a.png",
    ],
)
def test_no_picture_name_reads_a_file_outside_the_folder(folder: Path, name: str) -> None:
    (folder / "out.png").symlink_to("../secret.png")
    (folder / "in" / "up").symlink_to(folder.parent)
    (folder / "chain.png").symlink_to("out.png")
    found = read(folder, name.replace("{top}", str(folder.parent)))
    assert isinstance(found, str), found
    assert found.startswith("missing_field: ")


def test_links_inside_the_folder_are_followed(folder: Path) -> None:
    (folder / "a.png").write_bytes(b"picture")
    (folder / "in" / "link.png").symlink_to("../a.png")
    (folder / "also").symlink_to("in")
    (folder / "absolute.png").symlink_to(folder / "a.png")
    assert [read(folder, name) for name in ("in/link.png", "also/link.png", "absolute.png")] == [b"picture"] * 3
    (folder / "loop.png").symlink_to("loop.png")
    assert read(folder, "loop.png") == "missing_field: the folder has no file 'loop.png': the link leads nowhere"


def test_a_picture_name_with_wrong_letter_case_is_refused_and_the_error_message_gives_the_right_name(
    folder: Path,
) -> None:
    (folder / "in" / "IMG_1.JPG").write_bytes(b"picture")
    detail = "the folder has no file 'in/img_1.jpg', did you mean 'IMG_1.JPG'?"
    assert read(folder, "in/img_1.jpg") == f"missing_field: {detail}"
    (folder / "in" / "img_1.jpg").write_bytes(b"another")
    assert read(folder, "in/img_1.jpg") == b"another", "a changed folder is read again"


def test_a_picture_name_that_leads_to_no_regular_file_is_refused(folder: Path) -> None:
    os.mkfifo(folder / "pipe.png")
    assert read(folder, "pipe.png") == "missing_field: 'pipe.png' is not a regular file"
    assert read(folder, "in") == "missing_field: 'in' is not a regular file"
    (folder / "large.png").write_bytes(bytes(101))
    assert read(folder, "large.png") == "too_large: 101 bytes; at most 100 are allowed"


@settings(max_examples=150)
@given(
    st.text(max_size=30)
    | st.lists(st.sampled_from(["..", ".", "in", "up", "/", "\\", "%2e%2e", "secret.png"])).map("/".join)
)
def test_any_text_in_a_picture_cell_either_names_a_picture_in_the_folder_or_gives_a_problem(
    tmp_path_factory: pytest.TempPathFactory, name: str
) -> None:
    top = tmp_path_factory.getbasetemp() / "any"
    if not top.exists():
        (top / "offered" / "in").mkdir(parents=True)
        (top / "secret.png").write_bytes(SECRET)
        (top / "offered" / "in" / "up").symlink_to("../..")
    assert isinstance(PictureRoot(str(top / "offered"), 100).read(name), Problem)


@settings(max_examples=60)
@given(
    st.text(st.characters(exclude_characters="/\\%\0", exclude_categories=["Cs", "Cc", "Zs"]), min_size=1, max_size=30)
)
def test_a_picture_is_found_if_its_name_and_its_file_use_different_unicode_normal_forms(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    folder = tmp_path_factory.mktemp("forms")
    name = f"a{text}.png"
    (folder / unicodedata.normalize("NFD", name)).write_bytes(b"picture")
    assert read(folder, unicodedata.normalize("NFC", name)) == b"picture"


# ------------------------------------------------------------------------------------------------ records


def records(batches: list[pa.RecordBatch], location: str) -> list[Record]:
    def parse(parts: Iterator[pa.RecordBatch]) -> Iterator[Record]:
        for part in parts:
            for row in part.to_pylist():
                yield Record("x.csv", {key: row[key] for key in row if key != "path"})

    return list(picture_records(iter(batches), parse, location, "image", 100))


def test_a_relative_image_root_is_resolved_from_the_folder_of_the_file_of_each_row(folder: Path) -> None:
    for place in ("in", "."):
        (folder / place / "a.png").write_bytes(place.encode())
    (folder / "pictures").mkdir()
    (folder / "pictures" / "a.png").write_bytes(b"pictures")
    rows = [{"path": f"{folder}/in/x.csv", "image": "a.png"}, {"path": f"{folder}/y.csv", "image": "a.png"}]
    batches = [pa.RecordBatch.from_pylist(rows), pa.RecordBatch.from_pylist(rows[1:])]
    assert [record.fields[PICTURE] for record in records(batches, ".")] == [b"in", b".", b"."]
    assert [record.fields[PICTURE] for record in records(batches, "../pictures")] == [b"pictures", None, None]
    assert [record.fields[PICTURE] for record in records(batches, str(folder))] == [b"."] * 3


def test_a_row_of_a_csv_json_lines_or_parquet_file_may_name_its_picture_by_path(folder: Path) -> None:
    (folder / "in" / "a.png").write_bytes(b"picture")
    rows = [{"image": "a.png", "text": "a"}, {"image": "b.png", "text": "b"}]
    (folder / "in" / "x.csv").write_text("image,text\na.png,a\nb.png,b\n")
    (folder / "in" / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), folder / "in" / "x.parquet")

    def load(name: str, **columns: object) -> list[pa.RecordBatch]:
        return [pa.RecordBatch.from_pylist([{"file": name, "start": 0, "end": 10**9} | columns])]

    csv, jsonl, parquet = (str(folder / "in" / f"x.{kind}") for kind in ("csv", "jsonl", "parquet"))
    read_csv = partial(csv_records, layouts=[Layout(skip=1, names=("image", "text"))], multiline=False, limit=1000)
    read_parquet = partial(parquet_records, image="image", named=("image", "text"), max_bytes=1000)
    for batches, read in (
        (load("x.csv", path=os.fsencode(csv), layout=0, partition="{}"), read_csv),
        (
            load("x.jsonl", path=os.fsencode(jsonl), layout=0, partition="{}"),
            partial(jsonl_records, layouts=[Layout()], limit=1000),
        ),
        (load("x.parquet", path=parquet, partition=[]), read_parquet),
    ):
        good, missing = picture_records(iter(batches), read, ".", "image", 100)
        assert (good.fields["text"], good.fields[PICTURE], good.problem) == ("a", b"picture", None)
        assert (missing.fields["text"], missing.fields[PICTURE]) == ("b", None)
        assert missing.problem == Problem("missing_field", "the folder has no file 'b.png'")


def test_an_unreadable_picture_gives_a_problem_only_in_its_row(folder: Path) -> None:
    (folder / "a.png").write_bytes(b"picture")
    batch = pa.RecordBatch.from_pydict({"image": ["a.png", None, "b.png", " ", "../secret.png", "a.png"]})
    found = records([batch], str(folder))
    assert [record.problem and record.problem.reason for record in found] == [None, *["missing_field"] * 4, None]
    assert [record.fields["image"] for record in found] == ["a.png", None, "b.png", " ", "../secret.png", "a.png"]
    assert SECRET not in [record.fields[PICTURE] for record in found]


@pytest.mark.parametrize(
    ("named", "problem"),
    [
        (" ", "missing_field: the row names no file"),
        (7, "malformed_record: a value of type int instead of the path or URL that image_root requires"),
        (["a.png"], "malformed_record: a value of type list instead of the path or URL that image_root requires"),
        (
            {"path": "a.png"},
            "malformed_record: a value of type dict instead of the path or URL that image_root requires",
        ),
        (
            "data:image/png;base64," + "A" * 9_000,
            "malformed_record: a data URI instead of the path or URL that image_root requires",
        ),
        ("a" * 9_000, "malformed_record: a path or URL of 9000 characters; at most 8192 are allowed"),
    ],
    ids=["blank", "number", "list", "struct", "data URI", "long"],
)
def test_the_problem_names_the_type_of_the_value_if_a_picture_cell_holds_no_path(
    folder: Path, named: object, problem: str
) -> None:
    found = PictureRoot(str(folder), 100).read(named)
    assert isinstance(found, Problem)
    assert f"{found.reason}: {found.detail}" == problem


def test_the_problem_of_each_row_names_the_image_root_if_a_relative_image_root_does_not_exist(folder: Path) -> None:
    batch = pa.RecordBatch.from_pylist([{"path": f"{folder}/x.csv", "image": "a.png"}])
    [record] = records([batch], "absent")
    assert record.problem == Problem("missing_field", f"image_root: there is no folder '{folder}/absent'")


@pytest.mark.parametrize("mount", ["absent", "empty"])
def test_an_image_root_that_this_machine_lacks_is_a_fault_of_the_machine_and_of_no_row(
    folder: Path, mount: str
) -> None:
    (folder / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="image_root is empty or missing on this machine"):
        PictureRoot(f"{folder}/{mount}", 100).read("a.png")
    assert PictureColumns("id", "image", f"{folder}/{mount}").picture("a.png") is None
    with pytest.raises(UserError, match=rf"{mount}.*mount the drive"):
        require_root(f"{folder}/{mount}")
    (folder / "empty" / "b.png").write_bytes(b"picture")
    found = PictureRoot(f"{folder}/empty", 100).read("a.png")
    assert found == Problem("missing_field", "the folder has no file 'a.png'")


def test_a_picture_struct_without_bytes_gives_the_picture_at_its_path(folder: Path) -> None:
    (folder / "a.png").write_bytes(b"picture")
    batch = pa.RecordBatch.from_pydict({"image": [b"inside", None, None], "image.path": ["a.png", "a.png", None]})
    assert [record.fields[PICTURE] for record in records([batch], str(folder))] == [b"inside", b"picture", None]


def test_a_batch_of_picture_paths_is_split_into_smaller_batches_when_the_pictures_are_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(root, "CHUNK_BYTES", 20)
    (folder / "a.png").write_bytes(b"picture 10")
    batch = pa.RecordBatch.from_pydict({"image_id": list("abcde"), "image": ["a.png", "a.png", "b.png", "a.png", None]})
    chunks = list(read_picture_column(iter([batch]), PictureRoot(str(folder), 100)))
    assert [chunk.num_rows for chunk in chunks] == [2, 3]
    rows = [row for chunk in chunks for row in chunk.to_pylist()]
    assert [row["image_id"] for row in rows] == list("abcde")
    assert [row["image"] for row in rows] == [b"picture 10", b"picture 10", None, b"picture 10", None]
    missing = "missing_field: the folder has no file 'b.png'"
    assert [row["problem"] for row in rows] == [None, None, missing, None, "missing_field: the row names no file"]


@pytest.mark.parametrize(
    ("location", "words"),
    [
        ("/no/such/folder", "no folder /no/such/folder"),
        ("ftp://host/pictures", "ftp://host/pictures"),
        ("https://", "https://"),
        ("zip://a.zip::s3://bucket/x", "zip://"),
        ("s3://bucket/zip://a::b", "s3://"),
        ("abfs://c@account/pictures", "adlfs"),
    ],
)
def test_an_image_root_that_cannot_be_read_is_refused_before_the_ingest(location: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        require_root(location)


@pytest.mark.parametrize("check", [require_root, absolute_location, absolute_path])
@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("https://host/photos?sig=SECRET", "a query or a fragment"),
        ("HTTP://host/photos?SECRET", "a query or a fragment"),
        ("https://host/photos#SECRET", "a query or a fragment"),
        ("abfss://c@account/photos?sv=1&sig=SECRET", "a query or a fragment"),
        ("s3://bucket/photos#sig=SECRET", "a query or a fragment"),
        ("https://bob:SECRET@host/photos", "contains a password"),
        ("s3://AK:SECRET@bucket/photos", "contains a password"),
        ("s3a://AK:SEC@RET@bucket/photos", "contains a password"),
        ("hdfs://bob:SECRET@node:8020/photos?sig=SECRET", "contains a password"),
        ("s3://AK:SEC/RET@bucket/photos", "contains a password"),
        ("zip://a.csv::https://bob:SECRET@host/photos.zip", "contains a password"),
        ("https://SECRET@host/photos", "contains a user name"),
        ("HTTPS://SECRET@[::1]:80/photos@2", "contains a user name"),
        ("zip://a.csv::https://SECRET@host/photos.zip", "contains a user name"),
        ("zip://photos.csv::https://host/b.zip?SECRET", "a query or a fragment"),
    ],
)
def test_a_url_with_a_query_a_password_or_a_token_as_user_name_is_refused_and_the_error_does_not_contain_the_secret(
    location: str, message: str, check: Callable[[str], object]
) -> None:
    with pytest.raises(UserError, match=message) as raised:
        check(location)
    assert "SEC" not in repr(vars(raised.value))
    assert "photos" in str(raised.value)


def test_a_url_may_name_a_user_or_a_container_without_a_password() -> None:
    for location in (
        "hdfs://bob@node:8020/photos",
        "hdfs://node:8020,other:8020/photos@2",
        "abfss://c@account.dfs.core.windows.net/photos",
        "https://host:8080/photos@2",
        "https://[::1]:8080/photos@2",
        "s3://arn:aws:s3:eu-west-1:123456789012:accesspoint/photos/a@2",
    ):
        assert absolute_location(location) == location


def test_an_object_store_may_have_a_question_mark_or_a_hash_in_a_name(tmp_path: Path) -> None:
    for location in ("s3://bucket/photos#1", "s3://bucket/what?", str(tmp_path / "a?b=c#d")):
        assert absolute_location(location) == location

"""Tests of CSV and JSON lines sources, from the listing to the records, in this process instead of executors."""

from __future__ import annotations

import csv
import gzip
import io
import json
import lzma
import random
import tarfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.config import PICTURE, ColumnNames, DataConfig
from pipelines.driver.ingest.sources.csv import SUFFIXES, csv_layouts
from pipelines.driver.ingest.sources.files import list_files
from pipelines.driver.ingest.sources.jsonl import first_keys
from pipelines.driver.ingest.sources.lines import read_layouts, split_files
from pipelines.errors import UserError
from pipelines.executor.ingest.records.coco import coco_records
from pipelines.executor.ingest.records.csv import csv_records
from pipelines.executor.ingest.records.jsonl import find_keys, jsonl_records
from pipelines.executor.ingest.records.lines import RANGE, Layout
from pipelines.executor.ingest.records.pictures.root import picture_records
from pipelines.executor.ingest.records.record import Fields, Problem, Record, replace_lone_surrogates

LIMIT = 10**6


def config_of(path: Path | str, **source: Any) -> DataConfig:
    columns = {"image": "image", "text": "text"} | source.pop("columns", {})
    return DataConfig.model_validate({"source": {"path": str(path), "columns": columns} | source})


def read_csv(path: Path | str, range_bytes: int = 50, **source: Any) -> list[Record]:
    """Read the CSV files at a path in ranges of a few bytes."""
    config = config_of(path, kind="csv", **source)
    files = list_files(config, SUFFIXES).files
    dialect = config.source
    assert dialect.kind == "csv"
    layouts = csv_layouts(config, files, str(path), dialect)
    distinct = list(dict.fromkeys(layouts))
    rows = split_files(files, layouts, distinct, range_bytes)
    batch = pa.RecordBatch.from_pylist([dict(zip(RANGE.names, row, strict=True)) for row in rows], RANGE)
    return list(csv_records(iter([batch]), distinct, multiline=dialect.multiline, limit=LIMIT))


def zstd(content: bytes) -> bytes:
    """Compress bytes with zstd."""
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return bytes(sink.getvalue())


def write(folder: Path, files: Mapping[str, str | bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def texts(records: list[Record], field: str = "text") -> list[Any]:
    return [record.fields.get(field) for record in records if record.problem is None]


def problems(records: list[Record]) -> dict[str, str]:
    """Return the problems of files that cannot be read, as a dict from file name to details."""
    found = {record.file: record.problem for record in records if record.problem}
    assert {problem.reason for problem in found.values()} <= {"unreadable_file"}
    return {file: problem.detail for file, problem in found.items()}


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("multiline", [False, True])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_the_format_of_a_csv_file_is_detected_from_its_first_bytes(
    tmp_path: Path, end: str, encoding: str, multiline: bool, delimiter: str
) -> None:
    rows = [["id", "image", "text"], *(["1", "p", f'"{n}{delimiter} caf\u00e9"'] for n in range(20))]
    content = end.join(delimiter.join(row) for row in rows).encode(encoding)
    write(tmp_path, {"a.csv": content, "b.csv.gz": gzip.compress(content)})
    assert texts(read_csv(tmp_path, multiline=multiline)) == 2 * [f"{n}{delimiter} caf\u00e9" for n in range(20)]


@settings(max_examples=60)
@given(st.randoms(use_true_random=False))
def test_a_csv_file_of_random_rows_gives_the_same_rows_as_the_csv_module_of_python(rng: random.Random) -> None:
    delimiter, end, multiline = rng.choice(",;\t|"), rng.choice(["\n", "\r\n", "\r"]), rng.random() < 0.5
    quoting: Any = rng.choice([csv.QUOTE_ALL, csv.QUOTE_MINIMAL])
    letters = f"ab\u00e9\u6f22\U0001f600 \"{delimiter},'#\\" + (
        "\n\r" if multiline and quoting == csv.QUOTE_ALL else ""
    )
    header = ["image", "text", *rng.sample(["id", "Text", "IMAGE", "a.b", "", "text "], rng.randrange(5))]
    rng.shuffle(header)
    rows = [
        ["".join(rng.choices(letters, k=rng.randrange(9))) or "x" for _ in header] for _ in range(rng.randrange(30))
    ]
    file = io.StringIO(newline="")
    csv.writer(file, delimiter=delimiter, lineterminator=end, quoting=quoting).writerows([header, *rows])
    content = file.getvalue().encode(rng.choice(["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"]))
    compressions: list[Callable[[bytes], bytes]] = [bytes, gzip.compress, lzma.compress]
    with TemporaryDirectory() as folder:
        write(Path(folder), {"a.csv": rng.choice(compressions)(content)})
        records = read_csv(Path(folder), range_bytes=rng.choice([1, 7, 50, 1000]), multiline=multiline)
    at = header.index("image"), header.index("text")
    assert [(r.fields["image"], r.fields["text"]) for r in records] == [tuple(row[i] for i in at) for row in rows]


@pytest.mark.parametrize("first", ["sep=;\n", "\n \nsep=;\r\n\n", '"sep=;"\n'])
def test_a_first_line_that_only_declares_the_csv_delimiter_is_not_read_as_the_header(
    tmp_path: Path, first: str
) -> None:
    write(tmp_path, {"a.csv": f"{first}image;text\np;a,b\n"})
    assert texts(read_csv(tmp_path)) == ["a,b"]


def test_the_csv_delimiter_can_be_set_in_the_config(tmp_path: Path) -> None:
    write(tmp_path, {"a.csv": "image#text\np#a,b\n"})
    assert texts(read_csv(tmp_path, delimiter="#")) == ["a,b"]
    with pytest.raises(UserError, match="no column image, text"):
        read_csv(tmp_path)


def test_the_column_with_exactly_the_configured_name_is_read_if_several_columns_have_similar_names(
    tmp_path: Path,
) -> None:
    write(tmp_path, {"a.csv": ",image,text,Text,TEXT,text ,a.b,`c`,,,x,x\n0,p,right,1,2,3,4,5,6,7,8,9\n"})
    [record] = read_csv(tmp_path)
    assert (record.fields["text"], record.fields["_c0"], record.fields["a.b"]) == ("right", "0", "4")
    assert sorted(map(str, record.fields.values())) == sorted(["p", "right", *"0123456789"])


def test_the_first_column_is_read_and_a_warning_is_logged_if_several_columns_have_the_same_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, {"a.csv": "text,image,text,text\nfirst,p,second,third\n"})
    [record] = read_csv(tmp_path)
    assert record.fields == {"text": "first", "image": "p", "text2": "second", "text3": "third"}
    assert any("several columns named text" in message for message in caplog.messages)


def test_a_column_is_found_even_if_its_name_in_the_header_has_blanks_around_it(tmp_path: Path) -> None:
    write(tmp_path, {"a.csv": "image , text\np, one\n"})
    assert texts(read_csv(tmp_path)) == [" one"]
    write(tmp_path, {"a.csv": "image, text\np, one\n"})
    assert texts(read_csv(tmp_path, columns={"text": " text"}), " text") == [" one"]


def test_a_file_without_a_required_column_is_refused_and_the_other_files_of_the_source_are_read(tmp_path: Path) -> None:
    whole = gzip.compress(b"image,text\n" + b"p,lost\n" * 1000)
    files: dict[str, str | bytes] = {"a.csv": "image,text\np,one\n", "b.csv": "picture,text\np,two\n"}
    files |= {
        "cut.csv.gz": whole[:15],
        "open.csv": '"image,text\np,x\n',
        "c.csv": "text,image,question\nthree,p,why?\n",
    }
    files |= {"zip.csv": b"PK\x03\x04" + bytes(50), "blank.csv": "\n \n", "header only.csv": "text,image"}
    records = read_csv(write(tmp_path, files), columns={"prompt": "question"})
    assert texts(records) == ["one", "three"]
    assert texts(records, "question") == [None, "why?"]
    found = problems(records)
    assert found.keys() == {"b.csv", "cut.csv.gz", "open.csv", "zip.csv"}
    assert "no column image" in found["b.csv"]
    assert "ZIP" in found["zip.csv"]


def test_a_needed_column_that_no_file_has_raises_one_error_instead_of_a_refusal_per_file(tmp_path: Path) -> None:
    write(tmp_path, {"a.csv": "image,caption\np,x\n", "b.csv": "caption,image\n"})
    with pytest.raises(UserError, match=r"no column text.*columns\.text=caption"):
        read_csv(tmp_path)
    with pytest.raises(UserError, match="no column why"):
        read_csv(tmp_path, columns={"text": "caption", "prompt": "why"})


def test_a_picture_that_is_given_as_a_csv_file_is_refused_because_its_bytes_are_not_text(tmp_path: Path) -> None:
    write(tmp_path, {"a.csv": b"\x89PNG\r\n\x1a\n" + bytes(20)})
    with pytest.raises(UserError, match="contains bytes that are not text"):
        read_csv(tmp_path)


def test_partition_folders_become_columns_of_csv_and_json_lines_rows(tmp_path: Path) -> None:
    write(
        tmp_path,
        {"k=a b/text=from folder/a.csv": "image\np\n", "k=__HIVE_DEFAULT_PARTITION__/b.csv": "image,text\np,x\n"},
    )
    records = read_csv(tmp_path)
    assert [record.fields for record in records] == [
        {"k": None, "image": "p", "text": "x"},
        {"k": "a b", "text": "from folder", "image": "p"},
    ]
    write(tmp_path, {"k=1/c.jsonl": json.dumps({"image": "p", "k": 2}) + "\n" + json.dumps({"image": "q"})})
    assert [record.fields["k"] for record in read_jsonl(tmp_path)] == [2, "1"]


REPORTED = {
    # each pytest id contains the path of the bug report on github.com
    "NUL in a field (simonw/sqlite-utils/pull/804)": {"a.csv": b"image,text\np\0,one\np,two\n"},
    "long field (simonw/datasette-lite/issues/84)": {"a.csv": b"image,text\n" + b"p" * 200_000 + b",one\np,two\n"},
    "BOM of Excel (UKGovernmentBEIS/inspect_ai/issues/5353)": {"a.csv": b"\xef\xbb\xbfimage,text\np,one\np,two\n"},
    "carriage return (databricks/spark-csv/issues/465)": {"a.csv": b"image,text\r\np,one\r\np,two\r\n"},
    "name like a pattern (apache/spark/pull/41022)": {"in/abc[123]": b"", "a[1].csv": b"image,text\np,one\np,two\n"},
    "underscore (apache/parquet-java/issues/2055)": {"_a.csv": b"image,text\np,one\np,two\n"},
    "underscore in a folder (apache/arrow/issues/7857)": {"_in/_a.csv": b"image,text\np,one\np,two\n"},
    "partition _year (apache/arrow/issues/42160)": {"_year=1/a.csv": b"image,text\np,one\np,two\n"},
    "zstd frames (indygreg/python-zstandard/issues/59)": {
        "a.csv.zst": zstd(b"image,text\n") + b"\x50\x2a\x4d\x18\x02\0\0\0xx" + zstd(b"p,one\np,two\n")
    },
    "frame without content first (apache/datafusion/issues/10435)": {
        "a.csv.zst": b"\x50\x2a\x4d\x18\x02\0\0\0xx" + zstd(b"image,text\np,one\np,two\n")
    },
}


@pytest.mark.parametrize("files", REPORTED.values(), ids=REPORTED)
def test_csv_files_from_public_bug_reports_about_other_readers_are_read(
    tmp_path: Path, files: dict[str, str | bytes]
) -> None:
    assert texts(read_csv(write(tmp_path, files))) == ["one", "two"]


def test_the_rows_of_a_gzip_file_are_read_even_if_garbage_follows_the_compressed_data(tmp_path: Path) -> None:
    """Reported as lhotse-speech/lhotse/pull/564."""
    records = read_csv(write(tmp_path, {"a.csv.gz": gzip.compress(b"image,text\np,one\n") + b"garbage"}))
    assert texts(records) == ["one"]
    assert problems(records).keys() == {"a.csv.gz"}


def test_a_tar_that_contains_a_csv_file_is_refused_as_a_tar(tmp_path: Path) -> None:
    """Reported as pandas-dev/pandas/issues/12005."""
    write(tmp_path, {"a.csv": "image,text\np,one\n"})
    with tarfile.open(tmp_path / "b.csv.gz", "w:gz") as tar:
        tar.add(tmp_path / "a.csv", "a.csv")
    records = read_csv(tmp_path)
    assert (texts(records), "tar" in problems(records)["b.csv.gz"]) == (["one"], True)


def test_a_plus_sign_in_the_name_of_a_partition_is_not_read_as_a_blank(tmp_path: Path) -> None:
    """Reported as elastic/elasticsearch/pull/153908."""
    write(tmp_path, {"tag=a+b%20c/a.csv": "image,text\np,one\n"})
    assert texts(read_csv(tmp_path), "tag") == ["a+b c"]


def test_files_of_an_object_store_are_read_through_fsspec() -> None:
    store = pytest.importorskip("fsspec").filesystem("memory")
    store.pipe("/shop/k=1/a.csv", b"image,text\n" + b"p,one\n" * 20)
    store.pipe("/shop/b.csv", gzip.compress(b"image,text\np,two\n"))
    records = read_csv("memory://shop")
    assert texts(records) == ["two", *["one"] * 20]
    assert [record.fields.get("k") for record in records] == [None, *["1"] * 20]


def test_a_picture_that_a_row_names_is_searched_beside_the_file_that_contains_the_row(tmp_path: Path) -> None:
    write(tmp_path, {"a/x.csv": "image,text\n1.png,a\n", "b/x.csv": "image,text\n1.png,b\n"})
    write(tmp_path, {"a/1.png": "A", "b/1.png": "B"})
    files = list_files(config_of(tmp_path, kind="csv"), SUFFIXES).files
    layout = Layout(names=("image", "text"), skip=1)
    rows = split_files(files, [layout, layout], [layout], 1000)
    batch = pa.RecordBatch.from_pylist([dict(zip(RANGE.names, row, strict=True)) for row in rows], RANGE)
    read = partial(csv_records, layouts=[layout], multiline=False, limit=LIMIT)
    records = picture_records(iter([batch]), read, ".", "image", LIMIT)
    assert [record.fields[PICTURE] for record in records] == [b"A", b"B"]


def read_jsonl(path: Path) -> list[Record]:
    files = list_files(config_of(path, kind="jsonl"), (".jsonl",)).files
    layouts = read_layouts(files, lambda _, layout: layout)
    distinct = list(dict.fromkeys(layouts))
    rows = split_files(files, layouts, distinct, 10)
    batch = pa.RecordBatch.from_pylist([dict(zip(RANGE.names, row, strict=True)) for row in rows], RANGE)
    return list(jsonl_records(iter([batch]), distinct, LIMIT))


def test_a_json_key_is_found_even_if_only_late_lines_have_this_key(tmp_path: Path) -> None:
    lines = [json.dumps({"image": "p"} | ({"late": 1} if n == 900 else {})) for n in range(1000)]
    write(tmp_path, {"a.jsonl": "\r".join([*lines, "{", "[1]"])})
    [file] = list_files(config_of(tmp_path, kind="jsonl"), (".jsonl",)).files
    [layout] = layouts = read_layouts([file], lambda _, layout: layout)
    assert layout.separator == b"\r"
    assert first_keys([file], layouts, LIMIT) == ["image"]
    rows = split_files([file], layouts, layouts, 1000)
    batch = pa.RecordBatch.from_pylist([dict(zip(RANGE.names, row, strict=True)) for row in rows], RANGE)
    found = find_keys(iter([batch]), layouts, LIMIT, ["late", "never"])
    assert [row["key"] for one in found for row in one.to_pylist()] == ["late"]


# ------------------------------------------------------------------------------------------------ COCO


def coco(folder: Path, document: object, encoding: str = "utf-8") -> list[Record]:
    path = folder / "_annotations.coco.json"
    path.write_bytes(json.dumps(document).encode(encoding))
    return list(coco_records(str(path), path.name, ColumnNames(image="file_name", text="said")))


def test_a_coco_id_that_is_a_number_equals_the_same_id_as_a_text(tmp_path: Path) -> None:
    images = [{"id": 1, "file_name": "1.png", "height": 4.0, "width": 5}, {"id": "2", "file_name": "2.png"}]
    images += [{"id": 3.0, "file_name": "3.png"}, {"id": "a", "file_name": "a.png"}, {"id": None, "file_name": "n.png"}]
    said = [(1.0, "b"), ("1", "a"), (2, "c"), ("3.0", "d"), ("a", "e"), (9, "lost"), (None, "none"), (1, None)]
    annotations = [{"image_id": image, "caption": text, "segmentation": [[1, 2]]} for image, text in said]
    records = coco(tmp_path, {"images": images, "annotations": annotations, "licenses": []}, "utf-8-sig")
    found = {(record.fields["id"], record.fields["file_name"]): record.fields["said"] for record in records}
    expected: dict[tuple[str | None, str | None], list[str] | None] = {
        ("1", "1.png"): ["a", "b"],
        ("2", "2.png"): ["c"],
        ("3", "3.png"): ["d"],
        ("a", "a.png"): ["e"],
        (None, "n.png"): None,
        ("9", None): ["lost"],
        (None, None): ["none"],
    }
    assert found == expected
    assert len(records) == len(found)
    assert (records[0].fields["height"], records[0].fields["width"]) == (4, 5)


def test_coco_images_that_share_an_id_are_refused_because_their_captions_are_ambiguous(tmp_path: Path) -> None:
    images = [{"id": 1, "file_name": "a"}, {"id": "1.0", "file_name": "b"}, *[{"id": 2, "file_name": "c"}] * 2]
    annotations = [{"image_id": number, "caption": "said"} for number in (1, 2)]
    records = coco(tmp_path, {"images": images, "annotations": annotations})
    refused = Problem("malformed_record", "several images have id 1")
    assert [record.problem for record in records] == [refused, refused, None, None]
    assert [record.fields["said"] for record in records] == [["said"]] * 4


def test_missing_and_repeated_coco_captions_are_handled_like_the_texts_of_other_sources(tmp_path: Path) -> None:
    images: list[Fields] = [{"id": number, "file_name": f"{number}.png"} for number in (1, 2)]
    images.append({"id": 3, "file_name": float("nan")})
    said = [float("nan"), None, " ", ["l2", None, "l1", float("nan")], 7, []]
    annotations = [{"image_id": 1, "caption": text} for text in said] + [{"image_id": 2, "caption": float("nan")}]
    records = coco(tmp_path, {"images": images, "annotations": annotations})
    assert [record.fields["said"] for record in records] == [[7, "l1", "l2"], [], None]
    assert records[2].fields["file_name"] is None


def test_an_integer_of_any_length_in_a_coco_document_does_not_stop_the_reader(tmp_path: Path) -> None:
    path = tmp_path / "a.coco.json"
    path.write_text('{"images": [{"id": 1, "file_name": "a", "n": %s}], "annotations": []}' % ("7" * 5_000))
    [record] = coco_records(str(path), path.name, ColumnNames(image="file_name", text="said"))
    assert record.fields["id"] == "1"


def test_half_an_emoji_in_a_coco_document_becomes_the_replacement_character(tmp_path: Path) -> None:
    path = tmp_path / "a.coco.json"
    path.write_text(
        '{"images": [{"id": 1, "file_name": "a.png"}], "annotations": [{"image_id": 1, "caption": '
        r'"half \ud83d, whole \ud83d\ude00, written \\ud83d"}]}'
    )
    [record] = coco_records(str(path), path.name, ColumnNames(image="file_name", text="said"))
    assert record.fields["said"] == ["half \ufffd, whole \U0001f600, written \\ud83d"]


@given(st.text(st.characters(exclude_categories=()), max_size=8))
def test_lone_surrogates_of_any_json_text_are_replaced_as_utf_16_replaces_them(text: str) -> None:
    expected = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert json.loads(replace_lone_surrogates(json.dumps(text))) == expected


@pytest.mark.parametrize("document", [[], {}, {"images": [], "annotations": None}, {"images": {}, "annotations": []}])
def test_a_coco_document_must_contain_the_lists_images_and_annotations(tmp_path: Path, document: object) -> None:
    with pytest.raises(ValueError, match="without the lists"):
        coco(tmp_path, document)


def test_an_image_or_annotation_of_a_coco_document_that_is_no_object_becomes_a_refused_row(tmp_path: Path) -> None:
    image = {"id": 1, "file_name": "a.png"}
    annotation = {"image_id": 1, "caption": "one"}
    records = coco(tmp_path, {"images": [image, 7], "annotations": [annotation, "text", None]})
    refused = [(record.raw, record.problem) for record in records if record.problem]
    assert refused == [
        (raw, Problem("malformed_record", f"an {raw.partition(':')[0]} that is not a JSON object"))
        for raw in ("image: 7", "annotation: text", "annotation: null")
    ]
    [read] = [record for record in records if not record.problem]
    assert (read.fields["id"], read.fields["said"]) == ("1", ["one"])

"""Tests of the Parquet parser: every row is read once, whatever the unused columns contain."""

from __future__ import annotations

import datetime as dt
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from parquet_ranges import BYTES, others, read, written

from pipelines.executor.ingest.records import parquet
from pipelines.executor.ingest.records.arrow_values import to_python

NOT_UTF_8 = pa.array([b"caf\xe9", b"a cat"]).view(pa.string())


# ------------------------------------------------------------------------------------------------ types


@pytest.mark.parametrize(
    ("pictures", "expected"),
    [
        *(
            (pa.array([BYTES, None], kind), [BYTES, None])
            for kind in (pa.binary(), pa.large_binary(), pa.binary_view(), pa.binary(4))
        ),
        *(
            (pa.array(["aGk=", None], kind), ["aGk=", None])
            for kind in (pa.string(), pa.large_string(), pa.string_view())
        ),
        (pa.array([BYTES, None]).dictionary_encode(), [BYTES, None]),
        (pa.array(["aGk=", None]).dictionary_encode(), ["aGk=", None]),
        (pa.array([BYTES, b"\xff"]).view(pa.string()), [BYTES, b"\xff"]),
        *((pa.array([[0, 80], None], pa.list_(kind)), [b"\0P", None]) for kind in (pa.uint8(), pa.int32(), pa.int64())),
        (pa.array([[-1, 80], []], pa.list_(pa.int8())), [b"\xffP", b""]),
        (pa.array([[0, 80], [1, 2]], pa.list_(pa.uint8(), 2)), [b"\0P", b"\1\2"]),
        (pa.array([[256], [1, None]], pa.list_(pa.int64())), [[256], [1, None]]),
        (pa.array([[BYTES], [BYTES, BYTES]], pa.list_(pa.binary())), [BYTES, [BYTES, BYTES]]),
        (pa.nulls(2), [None, None]),
        (pa.array([1, None]), [1, None]),
    ],
    ids=lambda value: str(value.type)[:60] if isinstance(value, pa.Array) else "",
)
def test_pictures_of_every_type_that_holds_bytes_are_read(tmp_path: Path, pictures: pa.Array, expected: Any) -> None:
    records = read(written(tmp_path, {"image": pictures, "text": ["a", "b"]}))
    assert [record.fields for record in records] == [
        {"image": picture, "text": text} for picture, text in zip(expected, ["a", "b"], strict=True)
    ]


@pytest.mark.parametrize(("binary", "text"), [(pa.binary(), pa.string()), (pa.large_binary(), pa.large_string())])
def test_an_image_struct_of_hugging_face_gives_one_field_with_the_bytes_and_one_with_the_path(
    tmp_path: Path, binary: pa.DataType, text: pa.DataType
) -> None:
    kind = pa.struct([("path", text), ("bytes", binary), ("size", pa.int64())])
    rows = [{"bytes": BYTES, "path": "a.png", "size": 1}, {"bytes": None, "path": "b.png"}, {"bytes": BYTES}, None]
    records = read(written(tmp_path, {"image": pa.array(rows, kind), "text": ["x"] * 4}))
    assert [record.fields for record in records] == [
        {"image": BYTES, "image.path": "a.png", "text": "x"},
        {"image": None, "image.path": "b.png", "text": "x"},
        {"image": BYTES, "image.path": None, "text": "x"},
        {"image": None, "text": "x"},
    ]


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        *(
            (pa.array(["a", None], kind), ["a", None])
            for kind in (pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string()))
        ),
        *(
            (pa.array([["a", None], []], kind), [["a", None], []])
            for kind in (
                pa.list_(pa.string()),
                pa.large_list(pa.large_string()),
                pa.list_view(pa.string_view()),
                pa.list_(pa.dictionary(pa.int32(), pa.string())),
            )
        ),
        (pa.array([["a", "b"], ["c", None]], pa.list_(pa.string(), 2)), [["a", "b"], ["c", None]]),
        (pa.array([[None], []], pa.list_(pa.null())), [[None], []]),
        (pa.nulls(2), [None, None]),
        (pa.array([1, None]), [1, None]),
        (pa.array([True, None]), [True, None]),
        (pa.array([np.float16(1), np.float16(2)]), [1.0, 2.0]),
        (pa.array([Decimal("1.50"), None]), [Decimal("1.50"), None]),
        (pa.array([dt.date(2024, 1, 2), None]), [dt.date(2024, 1, 2), None]),
        (pa.array([b"a", b"\xff"]), [b"a", b"\xff"]),
        (pa.array(["{}", "1"], pa.json_()), ["{}", "1"]),
        (NOT_UTF_8, ["caf\ufffd", "a cat"]),
        (pa.ListArray.from_arrays([0, 1, 2], NOT_UTF_8), [["caf\ufffd"], ["a cat"]]),
    ],
    ids=lambda value: str(value.type)[:60] if isinstance(value, pa.Array) else "",
)
def test_texts_of_every_type_are_read_and_invalid_utf_8_changes_only_its_own_row(
    tmp_path: Path, texts: pa.Array, expected: Any
) -> None:
    assert [r.fields["text"] for r in read(written(tmp_path, {"image": [BYTES] * 2, "text": texts}))] == expected


def as_type(kind: pa.DataType, *numbers: int) -> pa.Array:
    return pa.array(numbers, pa.int32() if kind.bit_width == 32 else pa.int64()).view(kind)


@pytest.mark.parametrize(
    "kind",
    [
        *(pa.timestamp(unit) for unit in ("ms", "us")),
        *(pa.timestamp(unit, "UTC") for unit in ("ms", "us")),
        *(pa.time64(unit) for unit in ("us", "ns")),
        pa.time32("ms"),
        pa.date32(),
        pa.date64(),
    ],
    ids=str,
)
def test_a_text_that_cannot_be_represented_causes_the_refusal_of_its_own_row_only(
    tmp_path: Path, kind: pa.DataType
) -> None:
    far = as_type(kind, 2**30 if kind.bit_width == 32 else 2**62, 0)
    bad, good = read(written(tmp_path, {"image": [BYTES] * 2, "text": far}, store_schema=True))
    assert bad.problem is not None
    assert bad.problem.reason == "malformed_record"
    assert "out of range" in bad.problem.detail
    assert isinstance(bad.fields["text"], dict)
    assert (good.problem, good.fields["text"]) == (None, to_python(far.slice(1))[0])
    lists = pa.ListArray.from_arrays([0, 1, 2], far)
    assert isinstance(read(written(tmp_path, {"image": [BYTES] * 2, "text": lists}))[0].fields["text"][0], dict)


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (as_type(pa.time64("ns"), 1, 2, 12 * 3600 * 10**9), ["00:00:00.000000001", "00:00:00.000000002", "12:00:00"]),
        (as_type(pa.timestamp("ms"), 400000000000000), ["14645-06-30 15:06:40.000"]),
        (as_type(pa.date32(), 3000000), ["10183-09-21"]),
        (pa.array([np.float32(0.1), None, np.float32(1e20)], pa.float32()), ["0.1", "None", "1e+20"]),
        (pa.array(np.array([0.1, 2049, 1 / 3], np.float16)), ["0.1", "2048.0", "0.3333"]),
        (pa.array(np.array([123456792, 7, np.nan, -np.inf], np.float32)), ["123456792.0", "7.0", "nan", "-inf"]),
    ],
    ids=lambda value: str(value.type) if isinstance(value, pa.Array) else "",
)
def test_times_and_floats_of_16_and_32_bits_are_read_exactly(
    tmp_path: Path, array: pa.Array, expected: list[str]
) -> None:
    records = read(written(tmp_path, {"image": [BYTES] * len(array), "text": array}))
    assert [str(record.fields["text"]) for record in records] == expected
    offsets = range(len(array) + 1)
    structs = pa.StructArray.from_arrays([array], ["x"])
    assert [str(x) for [x] in to_python(pa.ListArray.from_arrays(offsets, array))] == expected
    assert [str(x["x"]) for x in to_python(structs)] == expected


UNNEEDED = {
    "nanoseconds": (pa.array([1, None], pa.timestamp("ns")), "1970-01-01 00:00:00.000000001"),
    "year 36535": (
        pa.array([2**60, 1], pa.timestamp("us")),
        {"not stored": "a value of type timestamp[us]: <value out of range: 1152921504606846976>"},
    ),
    "no such zone": (
        pa.array([1, 2], pa.timestamp("us", "Mars/Olympus")),
        {"not stored": "a value of type timestamp[us, tz=Mars/Olympus]"},
    ),
    "days": (
        pa.array([2**30, 1], pa.date32()),
        {"not stored": "a value of type date32[day]: <value out of range: 1073741824>"},
    ),
    "half": (pa.array([[np.float16(1)], None], pa.list_(pa.float16())), [1.0]),
    "uuid": (pa.array([bytes(16), None], pa.uuid()), "00000000-0000-0000-0000-000000000000"),
    "decimal": (pa.array([Decimal(10) ** 60, None], pa.decimal256(70, 2)), "1" + "0" * 60 + ".00"),
    "latin": (NOT_UTF_8, "caf\ufffd"),
    "latin struct": (pa.StructArray.from_arrays([NOT_UTF_8], ["x"]), {"x": "caf\ufffd"}),
    "map": (pa.array([[("a", 1)], []], pa.map_(pa.string(), pa.int64())), [("a", 1)]),
    "meta.url": (pa.array(["u", "v"]), "u"),
    "we`ird\n": (pa.array([1, 2]), 1),
    "": (pa.array([1, 2]), 1),
    "IMAGE": (pa.array([1, 2]), 1),
    "image.bytes": (pa.array([1, 2]), 1),
    "text.list": (pa.array([[1], [2]]), [1]),
}


def test_columns_that_the_config_does_not_name_are_read_only_for_refused_rows(tmp_path: Path) -> None:
    unneeded = {name: array for name, (array, _) in UNNEEDED.items()}
    table = pa.table({"image": [BYTES] * 2, "text": ["a", "b"]} | unneeded)
    records = read(written(tmp_path, table.append_column("IMAGE", pa.array([3, 4]))), partition={"year": "2024"})
    assert [record.fields for record in records] == [{"image": BYTES, "text": "a"}, {"image": BYTES, "text": "b"}]
    found = others(records[0])
    assert found.pop("IMAGE (another)") == 3
    assert found.pop("year") == "2024"
    expected = {name: value for name, (_, value) in UNNEEDED.items()}
    assert {name: str(v) for name, v in found.items()} == {name: str(v) for name, v in expected.items()}


def test_the_unused_columns_of_a_row_are_kept_up_to_a_total_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, "MAX_OTHERS_BYTES", 1_000)
    columns = {name: ["x" * 400] for name in "abcd"}
    (record,) = read(written(tmp_path, {"image": [BYTES], "text": ["a"]} | columns))
    found = others(record)
    assert [found[name] for name in "ab"] == ["x" * 400] * 2
    assert all("at most" in str(found[name]) for name in "cd"), found


def test_unused_columns_of_parquet_rows_can_be_read_in_any_order_of_the_rows(tmp_path: Path) -> None:
    table = {"image": [BYTES] * 5000, "text": ["a"] * 5000, "n": range(5000)}
    records = read(written(tmp_path, table, row_group_size=3000))
    order = [0, 2999, 1, 3000, 4999, 1500]
    assert [others(records[row])["n"] for row in order] == order


@pytest.mark.parametrize("compression", ["snappy", "gzip", "zstd", "brotli", "lz4", "none"])
def test_parquet_files_from_other_writers_are_read(tmp_path: Path, compression: str) -> None:
    columns = {"image": [BYTES], "text": ["a"], "t": pa.array([dt.datetime(2024, 1, 2)], pa.timestamp("us"))}
    spark = written(tmp_path, columns, compression=compression, use_deprecated_int96_timestamps=True)
    assert [others(record) for record in read(spark)] == [{"t": dt.datetime(2024, 1, 2)}]
    encodings = {"text": "DELTA_BYTE_ARRAY", "image": "DELTA_LENGTH_BYTE_ARRAY", "t": "DELTA_BINARY_PACKED"}
    new = written(tmp_path, columns, use_dictionary=False, column_encoding=encodings, data_page_version="2.0")
    assert [record.fields for record in read(new)] == [{"image": BYTES, "text": "a"}]


# ------------------------------------------------------------------------------------------------ rows


@given(
    rows=st.integers(0, 40),
    group=st.integers(1, 20),
    step=st.integers(50, 4000),
    page=st.sampled_from([100, 2**20]),
    dictionary=st.booleans(),
)
@settings(max_examples=15)
def test_every_row_of_a_parquet_file_belongs_to_exactly_one_range(
    tmp_path_factory: pytest.TempPathFactory, rows: int, group: int, step: int, page: int, dictionary: bool
) -> None:
    pictures = [bytes([row]) * (row * 7) for row in range(rows)]
    columns = {"image": pa.array(pictures, pa.binary()), "text": pa.array([["x", str(row)] for row in range(rows)])}
    options = {"row_group_size": group, "data_page_size": page, "use_dictionary": dictionary, "write_batch_size": 3}
    records = read(written(tmp_path_factory.mktemp("rows"), columns, **options), step=step)
    expected = [(bytes([row]) * (row * 7), ["x", str(row)]) for row in range(rows)]
    assert [(record.fields["image"], record.fields["text"]) for record in records] == expected


def test_a_missing_column_is_read_from_the_partition_folder_but_a_value_in_the_row_takes_precedence(
    tmp_path: Path,
) -> None:
    own = {"split": ["of the file", None, " "], "n": [1, None, 2]}
    path = written(tmp_path, {"image": [BYTES] * 3, "text": ["a", "b", "c"], **own})
    partition = {"split": "val", "n": "7", "year": None}
    records = read(path, named=("image", "text", "split"), partition=partition)
    assert [record.fields["split"] for record in records] == ["of the file", "val", "val"]
    expected = [{"n": n, "year": None} for n in (1, "7", 2)]
    assert [others(record) for record in records] == expected
    path = written(tmp_path, {"image": [BYTES], "text": ["a"]})
    [record] = read(path, named=("image", "text", "split"), partition=partition)
    assert record.fields == {"image": BYTES, "text": "a", "split": "val"}

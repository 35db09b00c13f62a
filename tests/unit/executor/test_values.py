"""Tests that a missing value never becomes a text or an id, and that ids are clean and bounded.

The values include those of public reports: bijay-odyssey/edaprep#45 and has2k1/plotnine#651 (NaN becomes the word nan),
huggingface/datasets#4467 (the word null is a text), mie-lab/trackintel#131 and astronomy-commons/lsdb#27
(integer ids as floats), mholt/PapaParse#917 (zero-width spaces alone), ICIJ/datashare#2379 (byte-order marks around
ids), nomic-ai/nomic#131 and ultrajson/ultrajson#447 (lone surrogates).
"""

from __future__ import annotations

import datetime as dt
import unicodedata
import uuid
from decimal import Decimal
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import IMAGE, TEXT, as_base64, png

from pipelines.config import ColumnNames, ColumnSplitConfig, LimitsConfig
from pipelines.executor.ingest.decode import DecodeRules, decode_record
from pipelines.executor.ingest.outcome import Refused, outcome_batch
from pipelines.executor.ingest.records.record import Fields, Record, parse_json_object
from pipelines.executor.ingest.values import MAX_ID_CHARS, SPACES, is_missing, normalize_id, to_text, trim

NAN = float("nan")
MISSING: list[Any] = [
    *(None, NAN, np.float32(NAN), np.float64(NAN), np.datetime64("NaT"), np.timedelta64("NaT"), Decimal("NaN")),
    *(pd.NA, pd.NaT, Decimal("sNaN"), np.str_(" "), b"", b" \n", [], [None, NAN], [[], [pd.NA]]),
    *("", " ", "\t\r\n", "\u200b", "\ufeff", "\u200b \ufeff", "\u00a0", "\u3000", "\u2060", "\u00ad", "\u3164", "\0"),
]
PRESENT: list[Any] = [
    *(0, 0.0, False, "nan", "NaN", "None", "null", "<NA>", "-", "\u0600", "\ufffd", [0], [None, "x"], {}),
]
RULES = DecodeRules(
    "birds",
    ColumnNames(id="key", prompt="asked"),
    LimitsConfig(max_text_chars=40),
    ColumnSplitConfig(kind="column", column="of"),
)


def outcome(**fields: Any) -> dict[str, Any]:
    good: Fields = {IMAGE: as_base64(png(1)), TEXT: "a bird", "key": "1", "asked": "what?", "of": "train"}
    row = decode_record(Record("a.csv", good | fields), RULES)
    [stored] = outcome_batch([row]).to_pylist()
    return dict(stored)


@pytest.mark.parametrize("value", MISSING, ids=ascii)
def test_the_missing_values_of_all_libraries_are_recognised(value: Any) -> None:
    assert is_missing(value) is True
    assert normalize_id(value) is None
    assert to_text(value, "column x") == ""


@pytest.mark.parametrize("value", PRESENT, ids=ascii)
def test_zero_and_false_and_words_such_as_null_do_not_count_as_missing_values(value: Any) -> None:
    assert is_missing(value) is False


@pytest.mark.parametrize("missing", MISSING, ids=ascii)
def test_every_kind_of_missing_value_is_recognised_in_every_column(missing: Any) -> None:
    assert outcome(**{IMAGE: missing})["reason"] == "missing_field"
    assert outcome(**{TEXT: missing})["reason"] == "empty_text"
    assert outcome(key=missing)["reason"] == "missing_field"
    assert outcome(of=missing)["reason"] == "missing_field"
    assert outcome(asked=missing)["texts"] == [{"prompt": "", "text": "a bird"}]
    if not isinstance(missing, list):
        found = outcome(**{TEXT: ["one", missing, "two"]})["texts"]
        assert [pair["text"] for pair in found] == ["one", "two"]
        assert outcome(**{TEXT: ["one", "two"], "asked": ["a", missing]})["texts"][1] == {"prompt": "", "text": "two"}


def test_the_word_nan_in_a_csv_file_is_a_valid_text_and_a_valid_id() -> None:
    found = outcome(key="NaN", **{TEXT: "nan"})
    assert (found["image_id"], found["texts"][0]["text"]) == ("birds/NaN", "nan")


UUID = uuid.UUID(int=7)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        *((1, "1"), (1.0, "1"), (-0.0, "0"), (1e15, "1000000000000000"), (1.5, "1.5"), (np.float32(2), "2")),
        *((np.int64(3), "3"), (np.float64(1e6), "1000000"), (Decimal("4.00"), "4"), (Decimal("4.50"), "4.50")),
        *(("1.0", "1.0"), ("007", "007"), (" a b ", "a b"), ("\ufeffa\u200b", "a"), ("cafe\u0301", "caf\u00e9")),
        *((b"key", "key"), (True, "True"), (dt.date(2026, 1, 2), "2026-01-02"), (UUID, str(UUID)), ("a\r\n", "a")),
        *(("x" * MAX_ID_CHARS, "x" * MAX_ID_CHARS), ("\ud83d\ude00", "\U0001f600"), ("a\ud800", "a\ufffd")),
        *(("\u202eabc", "\u202eabc"), (b"\xff\xfe", "fffe"), (UUID.bytes, UUID.hex), (b" caf\xc3\xa9 ", "caf\u00e9")),
    ],
)
def test_an_id_becomes_a_clean_text_and_integral_numbers_are_written_as_integers(value: Any, expected: str) -> None:
    assert normalize_id(value) == expected


@pytest.mark.parametrize(
    "value",
    [
        *("x" * (MAX_ID_CHARS + 1), "e\u0301" * (MAX_ID_CHARS + 1), "a\nb", "a\tb", "a\0b", "a\x85b", "a\u2028b"),
        *(float("inf"), float("-inf"), Decimal("Infinity"), np.float32("inf"), 1e300, 10**300, b"x" * 257),
        *(["a"], [["a"]], {"a": 1}, {}, np.array(["a"]), np.array([NAN, 1.0]), object()),
    ],
    ids=lambda value: ascii(value)[:20],
)
def test_a_value_that_cannot_be_an_id_is_refused(value: Any) -> None:
    with pytest.raises(Refused) as refused:
        normalize_id(value)
    assert refused.value.reason == "malformed_record"
    assert outcome(key=value)["reason"] == "malformed_record"


@pytest.mark.parametrize("value", [{"en": "a"}, {}, [["a"]], [{"en": "a"}], np.array(["a"]), np.array([NAN]), object()])
def test_a_text_cell_that_holds_an_array_or_dict_or_nested_list_is_refused(value: Any) -> None:
    for column in (TEXT, "asked", "of"):
        found = outcome(**{column: value})
        assert found["reason"] == "malformed_record"
        assert not found["detail"].startswith("unexpected")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a \ud83d cat", "a \ufffd cat"),
        ("a \ud83d\ude00 cat", "a \U0001f600 cat"),
        ("\u202eright\u202c to left", "\u202eright\u202c to left"),
        ("\ufeffa cat\u200b", "a cat"),
        (b"a cat", "a cat"),
        (b"caf\xc3\xa9", "caf\u00e9"),
        (np.str_("a cat"), "a cat"),
        (np.float32(1.5), "1.5"),
        ('["a", "b"]', '["a", "b"]'),
    ],
)
def test_texts_bytes_and_numbers_are_stored_as_clean_text(text: Any, expected: str) -> None:
    assert outcome(**{TEXT: text})["texts"] == [{"prompt": "what?", "text": expected}]


def test_texts_and_ids_that_were_stored_as_bytes_are_the_same_after_a_replay_of_their_row() -> None:
    fields = {"key": UUID.bytes, "asked": [b"what?", None], "of": b"val", TEXT: [b"caf\xc3\xa9", b"\xff"]}
    refused = outcome(**{IMAGE: "?"}, **fields)
    again = parse_json_object(refused["payload"])
    assert isinstance(again, dict)
    first, second = outcome(**fields), outcome(**again | {IMAGE: as_base64(png(1))})
    for name in ("image_id", "texts", "split"):
        assert first[name] == second[name]
    assert (first["image_id"], first["split"]) == (f"birds/{UUID.hex}", "val")
    assert first["texts"] == [{"prompt": "what?", "text": "caf\u00e9"}, {"prompt": "", "text": "\ufffd"}]


def test_bytes_that_hold_only_a_byte_order_mark_count_as_a_missing_value() -> None:
    mark = b"\xef\xbb\xbf"
    assert normalize_id(mark) is None
    assert outcome(key=mark)["reason"] == outcome(of=mark)["reason"] == "missing_field"
    assert outcome(**{TEXT: mark})["reason"] == "empty_text"


def test_a_lone_surrogate_in_any_field_of_a_row_is_stored_as_a_replacement_character() -> None:
    found = outcome(**{"further \ud800": "\udfff", TEXT: " "})
    assert found["reason"] == "empty_text"
    assert '"further \ufffd": "\ufffd"' in found["payload"]


def test_lists_that_are_nested_too_deeply_for_python_affect_only_their_row() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    assert outcome(further=deep)["reason"] is None
    found = outcome(**{TEXT: deep})
    assert found["reason"] == "malformed_record"
    assert '"caption": "nested too deeply"' in found["payload"]


def test_a_long_text_of_combining_marks_is_refused_quickly() -> None:
    found = outcome(**{TEXT: "a" + "\u0301\u0316" * 500_000})
    assert (found["reason"], found["detail"]) == ("text_too_long", "1000001 characters, at most 40")


def test_all_white_space_of_unicode_is_trimmed() -> None:
    spaces = {chr(code) for code in range(0x110000) if chr(code).isspace()}
    assert set(SPACES) == spaces | {"\u200b", "\ufeff"}


ANY = st.one_of(
    st.none(),
    st.text(max_size=9),
    st.text(st.characters(categories=["Cc", "Cf", "Cs", "Zs", "Mn", "Lo"]), max_size=300),
    st.floats(),
    st.integers(),
    st.decimals(),
    st.booleans(),
    st.binary(max_size=9),
    st.dates(),
    st.uuids(),
    st.sampled_from([pd.NA, pd.NaT, np.float32("nan"), np.array([1]), {}]),
)
VALUES = st.one_of(ANY, st.lists(st.one_of(ANY, st.lists(ANY, max_size=2)), max_size=3))


@settings(max_examples=60)
@given(key=VALUES, text=VALUES, asked=VALUES, of=VALUES)
def test_a_row_with_arbitrary_values_gives_exactly_one_outcome_and_the_outcome_can_be_stored(
    key: Any, text: Any, asked: Any, of: Any
) -> None:
    found = outcome(key=key, asked=asked, of=of, **{TEXT: text})
    assert (found["image_id"] is None) == (found["reason"] is not None)
    assert not (found["detail"] or "").startswith("unexpected")
    assert "nan" not in [pair["text"] for pair in found["texts"] or ()]


@settings(max_examples=60)
@given(VALUES)
def test_stored_ids_are_normalised_and_have_a_limited_length_and_no_control_character(value: Any) -> None:
    try:
        found = normalize_id(value)
    except Refused:
        return
    if found is not None:
        assert 0 < len(found) <= MAX_ID_CHARS
        assert found == trim(unicodedata.normalize("NFC", found))
        assert not {"Cc", "Cs", "Zl", "Zp"} & set(map(unicodedata.category, found))
        assert normalize_id(found) == found


def test_dates_and_uuids_are_converted_to_text() -> None:
    values = (dt.date(2024, 1, 2), dt.datetime(2024, 1, 2, 3), uuid.UUID(int=1))
    assert [to_text(value, "column x") for value in values] == [str(value) for value in values]


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), np.float32("inf"), Decimal("Infinity")])
def test_an_infinite_number_is_neither_a_text_nor_an_id(value: object) -> None:
    with pytest.raises(Refused, match="column x is an infinite number"):
        to_text(value, "column x")
    with pytest.raises(Refused, match="the id is an infinite number"):
        normalize_id(value)

"""A row becomes one sample or one refusal with a reason, whatever is in it, and its ids come from its content."""

from __future__ import annotations

import hashlib
import json
import signal
from collections import Counter
from datetime import UTC, datetime
from typing import Any, cast

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import IMAGE, TEXT, as_base64, encoded, picture, png

from pipelines.config import ColumnNames, ColumnSplitConfig, FileSplitConfig, HashSplitConfig, LimitsConfig
from pipelines.executor.ingest.decode import (
    FLUSH_BYTES,
    Rules,
    decode_batches,
    split_of,
    split_of_file,
)
from pipelines.executor.ingest.records import Fields, Record, Trouble
from pipelines.formats.tables import REASONS

LIMITS = LimitsConfig(max_bytes=50_000, max_pixels=10_000, min_side=4, max_text_chars=40)
RULES = Rules("birds", ColumnNames(), LIMITS, HashSplitConfig(val=0.2, test=0.2))
GOOD = as_base64(png(1))


def decoded(records: list[Record], rules: Rules = RULES) -> list[pa.RecordBatch]:
    return list(decode_batches(iter(()), lambda _: iter(records), rules))


def decode(rows: list[Fields], rules: Rules = RULES, file: str = "a.csv") -> list[dict[str, Any]]:
    return [row for out in decoded([Record(file, fields) for fields in rows], rules) for row in out.to_pylist()]


def one(fields: Fields | None = None, rules: Rules = RULES) -> dict[str, Any]:
    good: Fields = {IMAGE: GOOD, TEXT: "a bird"}
    [outcome] = decode([good | (fields or {})], rules)
    return outcome


def test_a_good_row_keeps_its_bytes_and_is_named_by_them() -> None:
    outcome = one()
    sha256 = hashlib.sha256(png(1)).hexdigest()
    assert outcome["image"] == png(1)
    assert outcome["sha256"] == sha256
    assert outcome["image_id"] == f"birds/{sha256[:24]}"
    assert (outcome["format"], outcome["width"], outcome["height"]) == ("PNG", 24, 16)
    assert outcome["texts"] == [{"prompt": "", "text": "a bird"}]
    assert outcome["reason"] is None


def test_an_id_column_names_the_picture_and_a_prompt_column_asks() -> None:
    rules = Rules("birds", ColumnNames(id="key", prompt="question"), LIMITS, HashSplitConfig())
    outcome = one({"key": " 17 ", "question": " which bird? "}, rules)
    assert outcome["image_id"] == "birds/17"
    assert outcome["texts"] == [{"prompt": "which bird?", "text": "a bird"}]
    assert one({"key": " ", "question": None}, rules)["reason"] == "missing_field"


BAD: dict[str, Fields] = {
    "missing_field": {IMAGE: " "},
    "bad_base64": {IMAGE: GOOD[:20] + "!" + GOOD[21:]},
    "not_an_image": {IMAGE: as_base64(b"just words")},
    "truncated_image": {IMAGE: as_base64(png(1)[:-40])},
    "unsupported_format": {IMAGE: as_base64(encoded(picture(1), "PPM"))},
    "too_large": {IMAGE: as_base64(png(1, (101, 100)))},
    "too_small": {IMAGE: as_base64(png(1, (3, 60)))},
    "empty_text": {TEXT: " \t "},
    "text_too_long": {TEXT: "x" * 41},
}


@pytest.mark.parametrize("reason", BAD)
def test_a_bad_row_has_its_reason_and_keeps_all_it_had(reason: str) -> None:
    fields: Fields = {"index": "7", IMAGE: GOOD, TEXT: "a bird", **BAD[reason]}
    [outcome] = decode([fields])
    assert outcome["reason"] == reason
    assert outcome["reason"] in REASONS
    assert outcome["stage"] == "decode"
    assert outcome["detail"]
    assert json.loads(outcome["payload"]) == fields
    assert outcome["image_id"] is None


def test_what_a_reader_could_not_read_is_kept_as_it_was() -> None:
    [out] = decoded([Record("a.csv", {IMAGE: None}, "one,two,three", Trouble("malformed_record", "three"))])
    [outcome] = out.to_pylist()
    assert (outcome["stage"], outcome["reason"], outcome["detail"]) == ("read", "malformed_record", "three")
    assert outcome["payload"] == "one,two,three"


def test_a_row_that_has_a_name_keeps_it_whatever_becomes_of_it() -> None:
    rows: list[Fields] = [{IMAGE: GOOD, TEXT: "a bird"}, {IMAGE: "?", TEXT: "a bird"}]
    [out] = decoded([Record("a.csv", fields, source_row=f"a.csv#{n}") for n, fields in enumerate(rows)])
    assert out.column("source_row").to_pylist() == ["a.csv#0", "a.csv#1"]


def test_what_nobody_foresaw_is_refused_with_its_cause_and_spares_the_rows_beside_it() -> None:
    rules = Rules("birds", ColumnNames(), cast(LimitsConfig, None), HashSplitConfig())
    outcome = one(rules=rules)
    assert outcome["reason"] == "malformed_record"
    assert "unforeseen AttributeError: " in outcome["detail"]


def texts(outcome: dict[str, Any]) -> list[tuple[str, str]]:
    return [(pair["prompt"], pair["text"]) for pair in outcome["texts"]]


def test_a_row_may_have_many_texts_each_with_a_prompt_of_its_own_or_all_with_one() -> None:
    assert texts(one({TEXT: ["a", " b ", None, "", "a", 3]})) == [("", "a"), ("", "b"), ("", "3")]
    asked = Rules("birds", ColumnNames(prompt="question"), LIMITS, HashSplitConfig())
    answers: Fields = {TEXT: ["yes", "two"]}
    assert texts(one(answers | {"question": ["a bird?", "how many?"]}, asked)) == [
        ("a bird?", "yes"),
        ("how many?", "two"),
    ]
    assert texts(one(answers | {"question": "what?"}, asked)) == [("what?", "yes"), ("what?", "two")]
    assert one(answers | {"question": ["a", "b", "c"]}, asked)["detail"] == "3 prompts for 2 texts"


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({TEXT: []}, "empty_text"),
        ({TEXT: [None, " "]}, "empty_text"),
        ({TEXT: ["good", "x" * 41]}, "text_too_long"),
        ({TEXT: {"en": "a bird"}}, "malformed_record"),
        ({TEXT: [["a bird"]]}, "malformed_record"),
        ({IMAGE: 7}, "malformed_record"),
        ({IMAGE: b""}, "not_an_image"),
        ({IMAGE: bytes(50_001)}, "too_large"),
    ],
)
def test_values_of_other_kinds_have_reasons_too(fields: Fields, reason: str) -> None:
    outcome = one(fields)
    assert outcome["reason"] == reason
    assert "unforeseen" not in outcome["detail"]


def test_a_picture_that_takes_too_long_is_refused_and_the_next_one_has_all_the_time() -> None:
    rules = Rules("birds", ColumnNames(), LimitsConfig(max_decode_seconds=0.002), HashSplitConfig())
    late = one({IMAGE: encoded(picture(1, (1500, 1500)), "PNG")}, rules)
    assert (late["reason"], late["detail"]) == ("decode_timeout", "more than 0.002 seconds")
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    assert one()["reason"] is None


def test_a_picture_that_comes_as_bytes_is_the_one_that_came_as_base64() -> None:
    coded, plain = one(), one({IMAGE: png(1)})
    assert coded == plain


def test_the_payload_of_a_refused_row_has_bytes_as_base64_and_can_be_read_again() -> None:
    outcome = one({IMAGE: b"words", "when": datetime(2026, 1, 2, tzinfo=UTC), "n": 1.5})
    again = json.loads(outcome["payload"])
    assert again == {IMAGE: as_base64(b"words"), TEXT: "a bird", "when": "2026-01-02 00:00:00+00:00", "n": 1.5}
    assert one(again)["reason"] == outcome["reason"]


@pytest.mark.parametrize(
    "text", ["caf\u00e9", "cafe\u0301", "  caf\u00e9 \n", "\0caf\u00e9\x07\x9f", "\rcafe\u0301\r\n"]
)
def test_texts_that_look_the_same_are_the_same(text: str) -> None:
    assert one({TEXT: text})["texts"] == [{"prompt": "", "text": "caf\u00e9"}]


ROWS = st.fixed_dictionaries(
    {
        IMAGE: st.one_of(st.none(), st.text(max_size=30), st.binary(max_size=40).map(as_base64), st.just(GOOD)),
        TEXT: st.one_of(st.none(), st.text(max_size=50), st.just("a bird")),
    }
)


@settings(deadline=None)
@given(st.lists(ROWS, min_size=1, max_size=20))
def test_every_row_comes_out_once_as_sample_or_refusal(rows: list[Fields]) -> None:
    outcomes = decode(rows)
    assert len(outcomes) == len(rows)
    for outcome in outcomes:
        assert (outcome["image_id"] is None) == (outcome["reason"] is not None)
        assert outcome["reason"] is None or outcome["reason"] in REASONS


def test_a_row_has_the_same_id_wherever_it_stands_and_however_its_columns_are_ordered() -> None:
    first, second = decode([{IMAGE: "?", TEXT: "a"}, {IMAGE: "?", TEXT: "b"}])
    again, _ = decode([{TEXT: "b", IMAGE: "?"}, {TEXT: "c", IMAGE: "?"}])
    assert first["source_row"] != second["source_row"]
    assert again["source_row"] == second["source_row"]
    assert second["source_row"].startswith("a.csv#")


def test_splits_have_the_shares_asked_for_and_depend_on_the_picture_alone() -> None:
    hashes = [hashlib.sha256(str(n).encode()).hexdigest() for n in range(20_000)]
    counts = Counter(split_of(sha256, HashSplitConfig(val=0.1, test=0.2)) for sha256 in hashes)
    assert counts["test"] == pytest.approx(4000, rel=0.05)
    assert counts["val"] == pytest.approx(2000, rel=0.07)
    assert {split_of(sha256, HashSplitConfig(val=0, test=0)) for sha256 in hashes} == {"train"}


def test_a_file_may_say_the_split() -> None:
    rules = Rules("birds", ColumnNames(), LIMITS, FileSplitConfig(kind="file"))
    [outcome] = decode([{IMAGE: GOOD, TEXT: "a bird"}], rules, file="val.csv.gz")
    assert outcome["split"] == "val"


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.csv", "train"),
        ("validation-00000-of-00005.parquet", "val"),
        ("test-000012.tar", "test"),
        ("trains.csv", None),
        ("a-train.csv", None),
        ("captions.csv", None),
    ],
)
def test_a_part_of_a_split_is_called_after_it(name: str, split: str | None) -> None:
    assert split_of_file(name) == split


def test_a_column_may_say_the_split_and_one_that_says_nonsense_is_refused() -> None:
    rules = Rules("birds", ColumnNames(), LIMITS, ColumnSplitConfig(kind="column", column="of"))
    said = {given: one({"of": given}, rules) for given in ("train", " Validation", "dev", "test", "holdout", "", None)}
    assert {given: outcome.get("split") or outcome["reason"] for given, outcome in said.items()} == {
        "train": "train",
        " Validation": "val",
        "dev": "val",
        "test": "test",
        "holdout": "malformed_record",
        "": "missing_field",
        None: "missing_field",
    }


def test_line_breaks_inside_a_text_stay_and_are_all_of_one_kind() -> None:
    assert texts(one({TEXT: "a\r\nb\rc\td\x0be"})) == [("", "a\nb\nc\td e")]


def test_batches_that_leave_are_bounded_in_bytes_whatever_comes() -> None:
    big = LimitsConfig(max_bytes=2**25, max_pixels=2**22)
    rules = Rules("birds", ColumnNames(), big, HashSplitConfig())
    row: Fields = {IMAGE: as_base64(encoded(picture(3, (1200, 1000)), "BMP")), TEXT: "a bird"}
    sizes = [out.nbytes for out in decoded([Record("a.csv", row)] * 12, rules)]
    assert len(sizes) > 1
    assert max(sizes) < FLUSH_BYTES + 4 * 2**20

"""Tests that every row becomes one sample or one refusal, and that a row's ids depend only on the row's content."""

from __future__ import annotations

import hashlib
import json
import signal
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, cast

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pictures import IMAGE, TEXT, as_base64, encoded, picture, png

from pipelines.config import ColumnNames, ColumnSplitConfig, FileSplitConfig, HashSplitConfig, LimitsConfig
from pipelines.executor.ingest.decode import FLUSH_BYTES, DecodeRules, _decode_picture, decode_batches
from pipelines.executor.ingest.records.record import Fields, Problem, Record
from pipelines.executor.ingest.splits import split_of_file, split_of_hash
from pipelines.formats.tables import REASONS

LIMITS = LimitsConfig(max_bytes=50_000, max_pixels=10_000, min_side=4, max_text_chars=40)
RULES = DecodeRules("birds", ColumnNames(), LIMITS, HashSplitConfig(val=0.2, test=0.2))
GOOD = as_base64(png(1))


def decoded(records: list[Record], rules: DecodeRules = RULES) -> list[pa.RecordBatch]:
    return list(decode_batches(iter(()), lambda _: iter(records), rules))


def decode(rows: list[Fields], rules: DecodeRules = RULES, file: str = "a.csv") -> list[dict[str, Any]]:
    return [row for out in decoded([Record(file, fields) for fields in rows], rules) for row in out.to_pylist()]


def one(fields: Fields | None = None, rules: DecodeRules = RULES) -> dict[str, Any]:
    good: Fields = {IMAGE: GOOD, TEXT: "a bird"}
    [outcome] = decode([good | (fields or {})], rules)
    return outcome


def test_a_good_row_keeps_its_picture_bytes_and_its_image_id_is_computed_from_their_hash() -> None:
    outcome = one()
    sha256 = hashlib.sha256(png(1)).hexdigest()
    assert outcome["image"] == png(1)
    assert outcome["sha256"] == sha256
    assert outcome["image_id"] == f"birds/{sha256[:24]}"
    assert (outcome["format"], outcome["width"], outcome["height"]) == ("PNG", 24, 16)
    assert outcome["texts"] == [{"prompt": "", "text": "a bird"}]
    assert outcome["reason"] is None


def test_the_image_id_is_read_from_the_id_column_and_the_prompt_from_the_prompt_column() -> None:
    rules = DecodeRules("birds", ColumnNames(id="key", prompt="question"), LIMITS, HashSplitConfig())
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
def test_a_refused_row_has_a_reason_and_keeps_all_its_fields(reason: str) -> None:
    fields: Fields = {"index": "7", IMAGE: GOOD, TEXT: "a bird", **BAD[reason]}
    [outcome] = decode([fields])
    assert outcome["reason"] == reason
    assert outcome["reason"] in REASONS
    assert outcome["stage"] == "decode"
    assert outcome["detail"]
    assert json.loads(outcome["payload"]) == fields
    assert outcome["image_id"] is None


def test_a_refused_row_records_the_image_id_that_its_picture_would_have() -> None:
    by_content = f"birds/{hashlib.sha256(png(1)).hexdigest()[:24]}"
    assert one({TEXT: " "})["claimed_id"] == by_content
    assert one({IMAGE: "!"})["claimed_id"] is None
    assert one()["claimed_id"] is None, "the row is not refused"
    rules = DecodeRules("birds", ColumnNames(id="key"), LIMITS, HashSplitConfig())
    assert one({"key": 7.0, IMAGE: None}, rules)["claimed_id"] == "birds/7"
    assert one({"key": float("nan"), IMAGE: None}, rules)["claimed_id"] is None


def test_a_row_with_more_texts_than_the_limit_is_refused() -> None:
    rules = DecodeRules("birds", ColumnNames(), LimitsConfig(max_texts=2), HashSplitConfig())
    assert one({TEXT: ["a", "b", "a", " "]}, rules)["reason"] is None
    refused = one({TEXT: ["a", "b", "c"]}, rules)
    assert (refused["reason"], refused["detail"]) == ("too_many_texts", "3 texts; at most 2 are allowed")


def test_a_row_that_could_not_be_parsed_keeps_its_raw_text() -> None:
    [out] = decoded([Record("a.csv", {IMAGE: None}, "one,two,three", Problem("malformed_record", "three"))])
    [outcome] = out.to_pylist()
    assert (outcome["stage"], outcome["reason"], outcome["detail"]) == ("read", "malformed_record", "three")
    assert outcome["payload"] == "one,two,three"


def test_a_sample_or_a_refused_row_keeps_a_source_row_identifier_that_it_already_has() -> None:
    rows: list[Fields] = [{IMAGE: GOOD, TEXT: "a bird"}, {IMAGE: "?", TEXT: "a bird"}]
    [out] = decoded([Record("a.csv", fields, source_row=f"a.csv#{n}") for n, fields in enumerate(rows)])
    assert out.column("source_row").to_pylist() == ["a.csv#0", "a.csv#1"]


def test_a_row_that_causes_an_unexpected_error_is_refused_and_its_refusal_contains_the_error() -> None:
    rules = DecodeRules("birds", ColumnNames(), cast(LimitsConfig, None), HashSplitConfig())
    outcome = one(rules=rules)
    assert outcome["reason"] == "malformed_record"
    assert "unexpected AttributeError: " in outcome["detail"]


def texts(outcome: dict[str, Any]) -> list[tuple[str, str]]:
    return [(pair["prompt"], pair["text"]) for pair in outcome["texts"]]


def test_a_row_with_many_texts_may_have_one_prompt_per_text_or_one_prompt_for_all_texts() -> None:
    assert texts(one({TEXT: ["a", " b ", None, "", "a", 3]})) == [("", "a"), ("", "b"), ("", "a"), ("", "3")]
    asked = DecodeRules("birds", ColumnNames(prompt="question"), LIMITS, HashSplitConfig())
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
        ({IMAGE: b""}, "missing_field"),
        ({IMAGE: bytes(50_001)}, "too_large"),
    ],
)
def test_a_row_with_a_value_of_a_wrong_type_is_refused_and_its_refusal_contains_the_reason(
    fields: Fields, reason: str
) -> None:
    outcome = one(fields)
    assert outcome["reason"] == reason
    assert "unexpected" not in outcome["detail"]


def test_a_picture_that_takes_too_long_is_refused_and_the_next_picture_has_the_full_time_limit() -> None:
    rules = DecodeRules("birds", ColumnNames(), LimitsConfig(max_decode_seconds=0.002), HashSplitConfig())
    late = one({IMAGE: encoded(picture(1, (1500, 1500)), "PNG")}, rules)
    assert (late["reason"], late["detail"]) == ("decode_timeout", "more than 0.002 seconds")
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    assert one()["reason"] is None


def test_a_picture_as_bytes_gives_the_same_row_as_the_picture_as_base64() -> None:
    coded, plain = one(), one({IMAGE: png(1)})
    assert coded == plain


def test_a_refused_row_is_stored_with_its_bytes_as_base64_and_can_be_decoded_again() -> None:
    outcome = one({IMAGE: b"words", "when": datetime(2026, 1, 2, tzinfo=UTC), "n": 1.5})
    again = json.loads(outcome["payload"])
    assert again == {IMAGE: as_base64(b"words"), TEXT: "a bird", "when": "2026-01-02 00:00:00+00:00", "n": 1.5}
    assert one(again)["reason"] == outcome["reason"]


@pytest.mark.parametrize(
    "text", ["caf\u00e9", "cafe\u0301", "  caf\u00e9 \n", "\0caf\u00e9\x07\x9f", "\rcafe\u0301\r\n"]
)
def test_texts_that_look_the_same_are_stored_as_equal_texts(text: str) -> None:
    assert one({TEXT: text})["texts"] == [{"prompt": "", "text": "caf\u00e9"}]


ROWS = st.fixed_dictionaries(
    {
        IMAGE: st.one_of(st.none(), st.text(max_size=30), st.binary(max_size=40).map(as_base64), st.just(GOOD)),
        TEXT: st.one_of(st.none(), st.text(max_size=50), st.just("a bird")),
    }
)


@given(st.lists(ROWS, min_size=1, max_size=20))
def test_every_input_row_is_returned_exactly_once_either_as_a_sample_or_as_a_refused_row(rows: list[Fields]) -> None:
    outcomes = decode(rows)
    assert len(outcomes) == len(rows)
    for outcome in outcomes:
        assert (outcome["image_id"] is None) == (outcome["reason"] is not None)
        assert outcome["reason"] is None or outcome["reason"] in REASONS


def test_the_source_row_identifier_depends_neither_on_the_row_position_nor_on_the_column_order() -> None:
    first, second = decode([{IMAGE: "?", TEXT: "a"}, {IMAGE: "?", TEXT: "b"}])
    again, _ = decode([{TEXT: "b", IMAGE: "?"}, {TEXT: "c", IMAGE: "?"}])
    assert first["source_row"] != second["source_row"]
    assert again["source_row"] == second["source_row"]
    assert second["source_row"].startswith("a.csv#")


def test_splits_that_are_chosen_by_hash_have_the_configured_shares_of_the_pictures() -> None:
    hashes = [hashlib.sha256(str(n).encode()).hexdigest() for n in range(20_000)]
    counts = Counter(split_of_hash(sha256, HashSplitConfig(val=0.1, test=0.2)) for sha256 in hashes)
    assert counts["test"] == pytest.approx(4000, rel=0.05)
    assert counts["val"] == pytest.approx(2000, rel=0.07)
    assert {split_of_hash(sha256, HashSplitConfig(val=0, test=0)) for sha256 in hashes} == {"train"}


@pytest.mark.parametrize("prefix", ["", "data:image/png;base64,", "\n "])
def test_base64_text_may_be_stored_in_a_column_of_bytes(prefix: str) -> None:
    outcomes = decode(
        [{IMAGE: prefix + GOOD, TEXT: "a bird"}, {IMAGE: (prefix + GOOD).encode(), TEXT: "a bird"}], RULES
    )
    assert outcomes[0]["sha256"] == outcomes[1]["sha256"] is not None


def test_base64_text_in_a_column_of_bytes_is_accepted_by_a_replay_of_its_row() -> None:
    stored = as_base64(png(3)).encode()
    refused = one({IMAGE: stored, TEXT: " "})
    assert refused["reason"] == "empty_text"
    fields = json.loads(refused["payload"]) | {TEXT: "a cat"}
    accepted = one(fields)
    assert accepted["image"] == png(3)
    assert accepted["sha256"] == one({IMAGE: stored, TEXT: "a cat"})["sha256"]
    size = len(png(3))
    limits = [LimitsConfig(max_bytes=limit) for limit in (size, size - 1)]
    found = [one(fields, replace(RULES, limits=each))["reason"] for each in limits]
    assert found == [None, "too_large"]


def test_the_split_of_a_row_may_come_from_the_file_name() -> None:
    rules = DecodeRules("birds", ColumnNames(), LIMITS, FileSplitConfig(kind="file"))
    [outcome] = decode([{IMAGE: GOOD, TEXT: "a bird"}], rules, file="val.csv.gz")
    assert outcome["split"] == "val"


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.csv", "train"),
        ("validation-00000-of-00005.parquet", "val"),
        ("test-000012.tar", "test"),
        ("train.test.csv", "train"),
        ("Train-00000-of-00001-a09b74b3ef9c3b56.parquet", "train"),
        ("train_0.parquet", "train"),
        ("cats-val2.csv", "val"),
        ("evaluation.jsonl", "test"),
        ("data/train/0000.parquet", "train"),
        ("images-dev/2024/0000.parquet", "val"),
        ("split=test/part-00000.snappy.parquet", "test"),
        ("train/val-00000-of-00001.parquet", "val"),
        ("test/train/0000.parquet", "train"),
        ("test/train_and_val.csv", "test"),
        ("train_and_val.csv", None),
        ("trains.csv", None),
        ("pretrained/captions.csv", None),
        ("captions.csv", None),
    ],
)
def test_the_split_of_a_file_is_a_word_in_its_name_or_in_the_name_of_its_nearest_folder(
    name: str, split: str | None
) -> None:
    assert split_of_file(name) == split


def test_the_split_of_a_row_may_come_from_a_column_and_an_unknown_split_is_refused() -> None:
    rules = DecodeRules("birds", ColumnNames(), LIMITS, ColumnSplitConfig(kind="column", column="of"))
    outcomes = {
        given: one({"of": given}, rules)
        for given in ("train", " Validation", "dev", "test", "Testing", "eval", "holdout", "", None)
    }
    assert {given: outcome.get("split") or outcome["reason"] for given, outcome in outcomes.items()} == {
        "train": "train",
        " Validation": "val",
        "dev": "val",
        "test": "test",
        "Testing": "test",
        "eval": "test",
        "holdout": "malformed_record",
        "": "missing_field",
        None: "missing_field",
    }


def test_line_breaks_inside_a_text_are_kept_as_line_feeds() -> None:
    assert texts(one({TEXT: "a\r\nb\rc\td\x0be"})) == [("", "a\nb\nc\td e")]


def test_batches_of_decoded_rows_have_a_limited_size_in_bytes() -> None:
    big = LimitsConfig(max_bytes=2**25, max_pixels=2**22)
    rules = DecodeRules("birds", ColumnNames(), big, HashSplitConfig())
    row: Fields = {IMAGE: as_base64(encoded(picture(3, (1200, 1000)), "BMP")), TEXT: "a bird"}
    sizes = [out.nbytes for out in decoded([Record("a.csv", row)] * 12, rules)]
    assert len(sizes) > 1
    assert max(sizes) < FLUSH_BYTES + 4 * 2**20


@pytest.mark.parametrize("captions", [5, 20])
def test_a_picture_is_decoded_only_once_for_any_number_of_consecutive_rows_with_this_picture(captions: int) -> None:
    _decode_picture.cache_clear()
    pictures = [png(1), png(2)]
    outcomes = decode([{IMAGE: image, TEXT: f"{n}"} for image in pictures for n in range(captions)])
    assert _decode_picture.cache_info().misses == 2
    assert [outcomes[0], outcomes[captions]] == [one({IMAGE: png(n), TEXT: "0"}) for n in (1, 2)]

"""A row becomes one sample or one refusal with a reason, whatever is in it, and its ids come from its content."""

from __future__ import annotations

import base64
import hashlib
import json
from collections import Counter
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import IMAGE, TEXT, as_base64, encoded, picture, png

from pipelines.config import ColumnNames, FileSplitConfig, HashSplitConfig, LimitsConfig
from pipelines.executor.decode import FLUSH_BYTES, Refused, Rules, decode_base64, decode_batches, split_of
from pipelines.executor.records import Fields, parsed_records
from pipelines.tables import REASONS

LIMITS = LimitsConfig(max_bytes=50_000, max_pixels=10_000, min_side=4, max_text_chars=40)
RULES = Rules("birds", ColumnNames(), LIMITS, HashSplitConfig(val=0.2, test=0.2))
GOOD = as_base64(png(1))


def batch_of(rows: list[Fields], file: str = "a.csv", raw: str | None = None) -> pa.RecordBatch:
    schema = pa.schema([("file", pa.string()), ("raw", pa.string()), ("row", pa.map_(pa.string(), pa.string()))])
    return pa.RecordBatch.from_pylist([{"file": file, "raw": raw, "row": list(row.items())} for row in rows], schema)


def decode(rows: list[Fields], rules: Rules = RULES, file: str = "a.csv") -> list[dict[str, Any]]:
    return [
        row for out in decode_batches(iter([batch_of(rows, file)]), parsed_records, rules) for row in out.to_pylist()
    ]


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
    assert (outcome["prompt"], outcome["text"], outcome["reason"]) == ("", "a bird", None)


def test_an_id_column_names_the_picture_and_a_prompt_column_asks() -> None:
    rules = Rules("birds", ColumnNames(id="key", prompt="question"), LIMITS, HashSplitConfig())
    outcome = one({"key": " 17 ", "question": " which bird? "}, rules)
    assert (outcome["image_id"], outcome["prompt"]) == ("birds/17", "which bird?")
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


def test_a_line_that_is_no_record_is_kept_as_it_was() -> None:
    batch = batch_of([{IMAGE: "one", TEXT: "two"}], raw="one,two,three")
    [outcome] = next(decode_batches(iter([batch]), parsed_records, RULES)).to_pylist()
    assert (outcome["stage"], outcome["reason"]) == ("read", "malformed_record")
    assert outcome["payload"] == "one,two,three"


def test_what_nobody_foresaw_is_refused_with_its_cause_and_spares_the_rows_beside_it() -> None:
    rules = Rules("birds", ColumnNames(prompt="question"), LIMITS, HashSplitConfig())
    rows: list[Fields] = [{IMAGE: GOOD, TEXT: "a bird"}]  # no column called question
    [outcome] = decode(rows, rules)
    assert outcome["reason"] == "malformed_record"
    assert "unforeseen KeyError: 'question'" in outcome["detail"]


def test_more_bytes_than_allowed_are_refused_before_they_are_decoded() -> None:
    with pytest.raises(Refused) as caught:
        decode_base64("!" * 80_000, max_bytes=50_000)
    assert caught.value.reason == "too_large"


@pytest.mark.parametrize("text", ["caf\u00e9", "cafe\u0301", "  caf\u00e9 \n"])
def test_texts_that_look_the_same_are_the_same(text: str) -> None:
    assert one({TEXT: text})["text"] == "caf\u00e9"


@given(st.binary(max_size=60), st.sampled_from(["", " ", "\r\n"]), st.booleans(), st.booleans())
def test_base64_forgives_what_people_do_to_it(data: bytes, around: str, url: bool, padded: bool) -> None:
    body = as_base64(data) if padded else as_base64(data).rstrip("=")
    prefix = "data:image/png;base64," if url else ""
    assert decode_base64(f"{around}{prefix}{body}{around}", max_bytes=100) == data


@given(st.text(st.characters(codec="utf-8"), max_size=40))
def test_base64_is_right_or_refused_never_half_read(text: str) -> None:
    try:
        data = decode_base64(text, max_bytes=100)
    except Refused as refused:
        reason = refused.reason
    else:
        reason = ""
        body = text.strip().rpartition(",")[2].rstrip("=")
        assert len(data) == len(body) * 3 // 4
        assert base64.b64decode(body + "=" * (-len(body) % 4), validate=True) == data
    assert reason in ("", "bad_base64")


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


def test_batches_that_leave_are_bounded_in_bytes_whatever_comes() -> None:
    big = LimitsConfig(max_bytes=2**25, max_pixels=2**22)
    rules = Rules("birds", ColumnNames(), big, HashSplitConfig())
    row: Fields = {IMAGE: as_base64(encoded(picture(3, (1200, 1000)), "BMP")), TEXT: "a bird"}
    batch = batch_of([row] * 12)
    sizes = [out.nbytes for out in decode_batches(iter([batch]), parsed_records, rules)]
    assert len(sizes) > 1
    assert max(sizes) < FLUSH_BYTES + 4 * 2**20

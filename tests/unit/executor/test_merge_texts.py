"""Tests of merging the texts of a picture: order, repeats, and the largest number of texts."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.config import ColumnNames
from pipelines.executor.ingest.merge_texts import MergedTexts, Text, merge_texts
from pipelines.executor.ingest.texts import extract_texts

Rows = list[list[Text]]
TEXTS = st.lists(st.sampled_from([("", letter) for letter in "abcdef"]), min_size=1, max_size=4)
ROWS = st.lists(TEXTS, min_size=1, max_size=6)


def flat(rows: Rows) -> list[Text]:
    return [text for row in rows for text in row]


@settings(max_examples=60)
@given(ROWS, ROWS)
def test_the_larger_number_of_repeats_is_kept_if_two_ingests_repeat_a_text(first: Rows, second: Rows) -> None:
    known = merge_texts([], first, None).new_texts
    assert known == flat(first)
    both = [*known, *merge_texts(known, second, None).new_texts]
    assert Counter(both) == Counter(flat(first)) | Counter(flat(second))
    assert merge_texts(both, first, None).new_texts == merge_texts(both, second, None).new_texts == []


@settings(max_examples=60)
@given(ROWS, ROWS, st.integers(1, 4))
def test_rows_of_a_picture_are_accepted_in_text_order_up_to_the_limit_of_different_texts(
    rows: Rows, earlier: Rows, max_texts: int
) -> None:
    """Merge the rows one after another, as in the definition of the merge."""
    known = flat(earlier)
    seen, contributing, exceeded = set(known), 0, False
    for row in sorted({tuple(dict.fromkeys(row)) for row in rows}):
        further = set(row) - seen
        exceeded = exceeded or bool(further and len(seen | further) > max_texts)
        if further and not exceeded:
            seen |= further
            contributing += 1
    merged = merge_texts(known, rows, max_texts)
    assert (set(known) | set(merged.new_texts), merged.contributing) == (seen, contributing)
    assert merged.full == (sorted(seen) if exceeded else None)
    shuffled = merge_texts(known, rows[::-1], max_texts)
    assert Counter(shuffled.new_texts) == Counter(merged.new_texts)


def test_a_list_of_texts_keeps_its_order_and_its_repeats() -> None:
    texts = extract_texts({"caption": ["b", "a", " b ", ""]}, ColumnNames(), 100)
    assert [text["text"] for text in texts] == ["b", "a", "b"]
    known = [("", "a")]
    assert merge_texts(known, [[("", text["text"]) for text in texts]], None) == MergedTexts(
        [("", "b"), ("", "b")], 1, None
    )

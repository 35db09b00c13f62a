"""Tests that texts are split into Unicode words, and that ASCII texts have the same words as in earlier versions.

The texts include those of public reports about other tokenizers: openai/tiktoken#292 and karpathy/minbpe#71 (Hindi),
hplt-project/sacremoses#73 (Tamil), rspeer/wordfreq#32 and #37 (Thai, Khmer, Sundanese), haydenbleasel/blume#178 (Thai
marks and decomposed kana), mjpost/sacrebleu#14 (typographic quotes), alteryx/evalml#1042 (a text of symbols).
"""

from __future__ import annotations

import re
import string
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm.text.words import words

SPACED = {
    "hindi": "\u092c\u093f\u0932\u094d\u0932\u0940 \u091a\u091f\u093e\u0908 \u092a\u0930",
    "arabic with vowels": "\u0642\u0650\u0637\u0651\u064e\u0629 \u0635\u064e\u063a\u0650\u064a\u0631\u064e\u0629",
    "hebrew with points": "\u05e9\u05c1\u05b8\u05dc\u05d5\u05b9\u05dd \u05e2\u05d5\u05b9\u05dc\u05b8\u05dd",
    "tamil": "\u0bb5\u0bc0\u0b9f\u0bcd\u0b9f\u0bbf\u0bb2\u0bcd \u0baa\u0bc2\u0ba9\u0bc8",
    "sundanese": "\u1b9e\u1ba5\u1b94\u1baa\u1b93 \u1b98\u1b9e",
    "telugu": "\u0c24\u0c46\u0c32\u0c41\u0c17\u0c41 \u0c2d\u0c3e\u0c37",
    "punjabi": "\u0a2a\u0a70\u0a1c\u0a3e\u0a2c\u0a40 \u0a2d\u0a3e\u0a38\u0a3c\u0a3e",
    "bengali": "\u09ac\u09bf\u09a1\u09bc\u09be\u09b2 \u09ae\u09be\u09a6\u09c1\u09b0",
    "persian with a joiner": "\u0645\u06cc\u200c\u0631\u0648\u0645 \u062e\u0627\u0646\u0647",
    "korean": "\ud55c\uad6d\uc5b4 \ub2e8\uc5b4",
    "vietnamese": "ti\u1ebfng vi\u1ec7t",
    "french": "l'\u00e9t\u00e9 \u00e0 no\u00ebl",
    "catalan": "col\u00b7lecci\u00f3 petita",
    "russian": "\u0451\u043b\u043a\u0430 \u0439\u043e\u0434",
    "curly apostrophe": "don\u2019t go",
    "hawaiian": "\u02bbokina hawai\u02bbi",
}
UNSPACED = {
    "chinese": ("\u732b\u5750\u5728\u57ab\u5b50\u4e0a", 6),
    "japanese": ("\u732b\u304c\u30de\u30c3\u30c8\u306e\u4e0a", 5),  # Katakana letters in a row are one word
    "thai": ("\u0e41\u0e21\u0e27\u0e19\u0e31\u0e48\u0e07", 5),  # a letter and its marks are one word
    "date": ("2026\u5e7411\u6708", 4),
}


@pytest.mark.parametrize("text", SPACED.values(), ids=SPACED)
def test_words_between_spaces_keep_their_combining_marks(text: str) -> None:
    wanted = unicodedata.normalize("NFC", text).split()
    assert words(text) == words(unicodedata.normalize("NFD", text)) == wanted
    assert words(f"\u201c{text}\u201d \u2014 {text}!") == 2 * wanted


@pytest.mark.parametrize(("text", "count"), UNSPACED.values(), ids=UNSPACED)
def test_each_character_with_its_marks_is_a_word_in_scripts_without_spaces(text: str, count: int) -> None:
    assert len(words(text)) == count
    assert "".join(words(text)) == text


def test_a_text_that_consists_only_of_symbols_is_split_into_single_symbols() -> None:
    family = "\U0001f469\u200d\U0001f469\u200d\U0001f467"
    assert words(f"\U0001f431 {family}") == ["\U0001f431", family]
    assert words("a \U0001f431") == ["a"]
    assert words(":)") == [":", ")"]


@settings(max_examples=200)
@given(st.text(st.sampled_from(string.ascii_letters + string.digits + string.punctuation + string.whitespace + "\x1c")))
def test_an_ascii_text_is_split_into_the_same_words_as_in_earlier_versions_of_lakesight(text: str) -> None:
    lowered = text.lower()
    assert words(text) == (re.findall(r"\w+(?:'\w+)?", lowered) or re.findall(r"\S", lowered))


@settings(max_examples=200)
@given(st.text(st.characters(categories=["L", "M", "N", "P", "Zs", "Cf"]), max_size=20))
def test_the_words_of_a_text_contain_all_its_letters_and_no_white_space(text: str) -> None:
    """Metrics join words by spaces and later split the joined text at white space, so no word may contain white
    space.
    """
    found = words(text)
    assert " ".join(found).split() == found
    letters = [char for char in unicodedata.normalize("NFC", text.lower()) if char.isalnum()]
    assert not letters or letters == [char for word in found for char in word if char.isalnum()]

"""Tests of the word tokenizer: how a text is split into words, which spaces need a token, and unknown words."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm import text
from vlm.config import WordsConfig
from vlm.errors import ConfigError
from vlm.text.chars import UNKNOWN
from vlm.text.word_pieces import JOIN, join_pieces, split_pieces
from vlm.text.word_tokenizer import WordTokenizer

CORPUS = ["A red car, and a bus", "a red car", "the bus (a red one)"]


def learn(**settings: object) -> WordTokenizer:
    learned = text.learn(WordsConfig.model_validate({"kind": "words", **settings}), CORPUS)
    assert isinstance(learned, WordTokenizer)
    return learned


@settings(max_examples=50)
@given(st.text() | st.text(" \n\t,.('an1\u00e9\u732b\u0e44\u0e17\u0e31\x1c\x85", max_size=12))
def test_joining_the_pieces_of_any_text_restores_the_text(caption: str) -> None:
    assert join_pieces(list(split_pieces(caption))) == caption


@pytest.mark.parametrize(
    ("caption", "pieces"),
    [
        ("a red car, isn't it?", ["a", "red", "car", ",", "isn't", "it", "?"]),
        ("see (here)", ["see", " ", "(", JOIN, "here", ")"]),
        ("\u732b\u304c\u3044\u308b cat", ["\u732b", "\u304c", "\u3044", "\u308b", "cat"]),
        ("cafe\u0301 two  spaces\n", ["cafe\u0301", "two", "  ", "spaces", "\n"]),
    ],
)
def test_a_text_is_split_into_unicode_words_and_usual_spaces_need_no_token(caption: str, pieces: list[str]) -> None:
    assert list(split_pieces(caption)) == pieces


def test_the_vocabulary_has_the_most_frequent_words_and_does_not_depend_on_the_order_of_texts() -> None:
    tokenizer = learn(vocab_size=8)
    assert tokenizer.pieces == (JOIN, "a", "red", "bus")
    again = text.learn(WordsConfig(kind="words", vocab_size=8), CORPUS[::-1])
    assert again.to_json() == tokenizer.to_json()
    assert tokenizer.vocab_size == 8


def test_a_rare_word_becomes_the_unknown_token_and_generation_never_produces_this_token() -> None:
    tokenizer = learn()
    assert tokenizer.encode("a the bus")[1] == UNKNOWN
    assert tokenizer.unknown("the bus, the taxi") == ["the", ",", "the", "taxi"]
    assert UNKNOWN in tokenizer.suppressed_ids


def test_setting_lowercase_encodes_words_without_regard_to_case() -> None:
    assert learn(lowercase=True).decode(learn(lowercase=True).encode("A RED bus")) == "a red bus"
    assert learn().unknown("A RED bus") == ["A", "RED"]


def test_learning_a_vocabulary_from_texts_without_a_frequent_word_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"no word is frequent enough.*min_count.*occurs 3 times"):
        learn(min_count=9)


def test_loading_a_saved_word_tokenizer_gives_an_equal_tokenizer(tmp_path: Path) -> None:
    text.save(learn(lowercase=True), tmp_path / "tokenizer.json")
    assert text.load(tmp_path / "tokenizer.json").to_json() == learn(lowercase=True).to_json()

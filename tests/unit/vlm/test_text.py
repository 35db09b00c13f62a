"""Tests that decoding restores an encoded text, and that no text encodes to a special token."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm import text
from vlm.config import BpeConfig, CharsConfig
from vlm.errors import CheckpointError
from vlm.text.base import NUM_SPECIAL, SLOT, Tokenizer
from vlm.text.chars import UNKNOWN
from vlm.text.prompt import answer_ids, prefix_ids

CORPUS = ["a red car", "a blue car", "a red bus on a road"] * 5
BPE = text.learn(BpeConfig(kind="bpe", vocab_size=300), CORPUS)
CHARS = text.learn(CharsConfig(kind="chars", alphabet="abcdr e"), [])


@given(st.text())
def test_bpe_decoding_restores_any_encoded_text(caption: str) -> None:
    caption = caption.encode("utf-8", "ignore").decode()
    assert BPE.decode(BPE.encode(caption)) == caption


@pytest.mark.parametrize("tokenizer", [BPE, CHARS])
def test_no_text_is_encoded_to_a_special_token(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<image><bos><eos><pad> a \x00\x01")
    assert min(ids) >= NUM_SPECIAL
    assert max(ids) < tokenizer.vocab_size


def test_bpe_training_is_deterministic_and_shortens_frequent_words() -> None:
    again = text.learn(BpeConfig(kind="bpe", vocab_size=300), CORPUS)
    assert again.to_json() == BPE.to_json()
    assert len(BPE.encode("a red car")) < len("a red car") / 2


def test_a_character_outside_the_alphabet_becomes_the_unknown_token() -> None:
    assert CHARS.encode("ax") == [CHARS.encode("a")[0], UNKNOWN]
    assert CHARS.decode(CHARS.encode("ax")) == "a\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("tokenizer", [BPE, CHARS])
def test_loading_a_saved_tokenizer_gives_an_equal_tokenizer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    text.save(tokenizer, tmp_path / "tokenizer.json")
    loaded = text.load(tmp_path / "tokenizer.json")
    assert loaded.encode("a red car") == tokenizer.encode("a red car")
    assert loaded.vocab_size == tokenizer.vocab_size


def test_the_error_for_a_damaged_tokenizer_file_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"kind": "bpe"}')
    with pytest.raises(CheckpointError, match=r"tokenizer cannot be read.*tokenizer\.json"):
        text.load(tmp_path / "tokenizer.json")


def test_a_sequence_consists_of_image_slots_then_start_token_then_prompt_then_answer_then_end_token() -> None:
    prefix = prefix_ids(CHARS, 3, "red")
    assert prefix == [SLOT] * 3 + [CHARS.bos_id] + CHARS.encode("red\n")
    assert prefix_ids(CHARS, 2, "") == [SLOT] * 2 + [CHARS.bos_id]
    assert answer_ids(CHARS, "car") == [*CHARS.encode("car"), CHARS.eos_id]

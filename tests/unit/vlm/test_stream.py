"""Tests that each streamed text is a beginning of the next and of the whole text, for any tokenizer and stop string."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from published_tokenizers import published

from vlm import text
from vlm.config import BpeConfig
from vlm.text.base import Tokenizer
from vlm.text.prompt import prefix_ids
from vlm.text.stop import find_stop, safe_text


def make(which: str) -> Tokenizer:
    if which == "bpe":
        return text.learn(BpeConfig(kind="bpe", vocab_size=300), ["a red cat", "a cat on a road"])
    with tempfile.TemporaryDirectory() as folder:
        return text.learn(published(Path(folder), which), ())


TOKENIZERS = {which: make(which) for which in ("bpe", "byte_level", "byte_fallback", "word_ends")}
ANSWERS = st.text(st.characters(codec="utf-8"), max_size=8) | st.text("ab c\u00e9\u20ac\U0001f600\n", max_size=12)
STOPS = st.lists(st.text("ab c\u00e9\u20ac\U0001f600\N{REPLACEMENT CHARACTER}", min_size=1, max_size=3), max_size=2)


def streamed(tokenizer: Tokenizer, tokens: list[int], stop: list[str]) -> tuple[list[str], str]:
    """Return the streamed texts and the whole text, as `stream` and `generate` compute them from the same tokens."""
    texts = []
    for count in range(1, len(tokens) + 1):
        if find_stop(tokenizer.decode(tokens[:count]), stop) is not None:
            tokens = tokens[:count]
            break
        texts.append(safe_text(tokenizer, tokens[:count], stop))
    whole = tokenizer.decode(tokens)
    return texts, whole[: find_stop(whole, stop)]


@settings(max_examples=150)
@given(st.sampled_from(sorted(TOKENIZERS)), ANSWERS, STOPS, st.lists(st.integers(0, 10**6), max_size=6))
def test_every_streamed_text_is_a_beginning_of_the_next_text_and_of_the_whole_text(
    which: str, answer: str, stop: list[str], other: list[int]
) -> None:
    tokenizer = TOKENIZERS[which]
    byte_ids = sorted(tokenizer.byte_ids)
    loose = [byte_ids[i % len(byte_ids)] if byte_ids else 3 + i % 200 for i in other]  # bytes that may not be UTF-8
    for tokens in (tokenizer.encode(answer), loose + tokenizer.encode(answer), tokenizer.encode(answer) + loose):
        texts, whole = streamed(tokenizer, tokens, stop)
        for before, after in zip(texts, [*texts[1:], whole], strict=True) if texts else ():
            assert after.startswith(before)


@pytest.mark.parametrize("which", sorted(TOKENIZERS))
def test_the_words_of_an_answer_are_streamed_as_soon_as_they_are_complete(which: str) -> None:
    tokenizer = TOKENIZERS[which]
    texts, whole = streamed(tokenizer, tokenizer.encode("a cat"), ["never"])
    assert whole == "a cat"
    assert next(shown for shown in texts if shown) != whole


def test_an_empty_prompt_for_paligemma_is_encoded_as_a_line_break(tmp_path: Path) -> None:
    plain = text.learn(published(tmp_path, "byte_fallback"), ())
    paligemma = text.learn(published(tmp_path, "byte_fallback", newline_after_empty_prompt=True), ())
    assert prefix_ids(plain, 2, "") == [-1, -1, plain.bos_id]
    assert prefix_ids(paligemma, 2, "") == [-1, -1, plain.bos_id, *plain.encode("\n")]
    assert prefix_ids(paligemma, 2, "detect cat") == prefix_ids(plain, 2, "detect cat")
    text.save(paligemma, tmp_path / "saved.json")
    assert text.load(tmp_path / "saved.json").newline_after_empty_prompt
    text.save(plain, tmp_path / "saved.json")
    assert "newline" not in (tmp_path / "saved.json").read_text().split('"tokenizer"')[0]

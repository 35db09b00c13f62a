"""Tests of published tokenizers: text never encodes to control tokens, and region tokens are ordinary text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from published_tokenizers import ENDOFTEXT, LOC, MAKE, SEG, STARTOFTEXT, byte_fallback, published
from tokenizers import Tokenizer as Backend
from tokenizers import models

from vlm import text
from vlm.errors import CheckpointError, ConfigError
from vlm.text.base import Tokenizer


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("published")
    return {which: text.learn(published(folder, which), ()) for which in MAKE}


def control_ids(tokenizer: Tokenizer) -> set[int]:
    return {tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id}


pieces = st.sampled_from(
    [
        "<bos>",
        "<eos>",
        "<pad>",
        "<image>",
        ENDOFTEXT,
        STARTOFTEXT,
        "<bo",
        "s>",
        " ",
        "cat",
        "\n",
        *LOC[:2],
        SEG[0],
    ]
)
texts = st.lists(pieces | st.text(max_size=4)).map("".join)


@pytest.mark.parametrize("which", MAKE)
@given(caption=texts)
def test_no_text_is_encoded_to_a_control_token(tokenizers: dict[str, Tokenizer], which: str, caption: str) -> None:
    tokenizer = tokenizers[which]
    ids = tokenizer.encode(caption.encode("utf-8", "ignore").decode())
    assert not control_ids(tokenizer) & set(ids)
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


@pytest.mark.parametrize("which", ["byte_level", "byte_fallback"])
@given(caption=texts)
def test_decoding_restores_any_text_even_if_the_text_contains_control_tokens(
    tokenizers: dict[str, Tokenizer], which: str, caption: str
) -> None:
    """Decode encoded texts with every tokenizer except CLIP's, because CLIP's tokenizer changes case and spaces."""
    caption = caption.encode("utf-8", "ignore").decode().replace("\N{LOWER ONE EIGHTH BLOCK}", "")
    tokenizer = tokenizers[which]
    assert tokenizer.decode(tokenizer.encode(caption)) == caption


@pytest.mark.parametrize("which", MAKE)
def test_an_empty_text_encodes_to_an_empty_list_and_an_empty_list_decodes_to_an_empty_text(
    tokenizers: dict[str, Tokenizer], which: str
) -> None:
    tokenizer = tokenizers[which]
    assert tokenizer.encode("") == []
    assert tokenizer.decode([]) == tokenizer.decode([tokenizer.bos_id, tokenizer.eos_id]) == ""


def test_suffixes_that_mark_the_end_of_a_word_are_decoded_to_spaces(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["word_ends"]
    assert tokenizer.decode([tokenizer.bos_id, *tokenizer.encode("a  Cat\nsat"), tokenizer.eos_id]) == "a cat sat"


@pytest.mark.parametrize("special", [False, True], ids=["plain", "flagged-special"])
def test_each_region_token_in_a_text_is_encoded_to_one_id_and_decoded_to_the_same_token(
    tmp_path: Path, special: bool
) -> None:
    config = published(tmp_path, "byte_fallback")
    byte_fallback(special_regions=special).save(config.path)
    tokenizer = text.learn(config, ())
    answer = "".join(LOC[100:104]) + "".join(SEG[:16]) + " cat ; " + "".join(LOC[:4]) + " dog"
    ids = tokenizer.encode(answer)
    assert ids[:20] == [*range(ids[0], ids[0] + 4), *range(ids[4], ids[4] + 16)]
    assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id, tokenizer.pad_id]) == answer


def test_special_tokens_in_a_text_are_encoded_as_plain_text_and_special_token_ids_are_skipped_in_decoding(
    tokenizers: dict[str, Tokenizer],
) -> None:
    tokenizer = tokenizers["byte_fallback"]
    image_id = len(byte_fallback().get_vocab()) - 1
    assert image_id not in tokenizer.encode("<image>")
    assert tokenizer.decode([image_id, *tokenizer.encode("a cat"), tokenizer.vocab_size - 1]) == "a cat"


def test_truncation_padding_and_start_token_settings_of_the_tokenizer_file_are_not_used(
    tokenizers: dict[str, Tokenizer],
) -> None:
    tokenizer = tokenizers["byte_fallback"]
    assert len(tokenizer.encode("a b c d e f g h")) > 7
    assert tokenizer.bos_id not in tokenizer.encode("a")


@pytest.mark.parametrize("added", [False, True])
def test_a_control_token_without_special_flag_in_the_file_is_still_a_control_token(tmp_path: Path, added: bool) -> None:
    config = published(tmp_path, "byte_fallback", pad="<mask>")
    if added:
        backend = byte_fallback()
        backend.add_tokens(["<mask>"])
        backend.save(config.path)
    tokenizer = text.learn(config, ())
    assert tokenizer.pad_id == 4
    assert 4 not in tokenizer.encode("<mask>")
    assert tokenizer.decode([4, *tokenizer.encode("cat"), 4]) == "cat"


def test_a_character_that_the_tokenizer_file_maps_to_the_end_token_is_omitted(tmp_path: Path) -> None:
    config = published(tmp_path, "word_ends")
    vocab = {"a": 0, "b": 1, STARTOFTEXT: 2, ENDOFTEXT: 3}
    Backend(models.BPE(vocab=vocab, merges=[], unk_token=ENDOFTEXT)).save(config.path)
    assert text.learn(config, ()).encode("a\u00e9b") == [0, 1]


@pytest.mark.parametrize(("which", "count"), [("byte_level", 0), ("byte_fallback", 2), ("word_ends", 1)], ids=str)
def test_suppressed_ids_are_the_padding_and_start_tokens_but_never_the_end_token(
    tokenizers: dict[str, Tokenizer], which: str, count: int
) -> None:
    tokenizer = tokenizers[which]
    assert set(tokenizer.suppressed_ids) == {tokenizer.pad_id, tokenizer.bos_id} - {tokenizer.eos_id}
    assert len(tokenizer.suppressed_ids) == count


@pytest.mark.parametrize("which", MAKE)
def test_a_saved_tokenizer_does_not_need_the_published_file(which: str, tmp_path: Path) -> None:
    config = published(tmp_path, which)
    tokenizer = text.learn(config, ())
    text.save(tokenizer, tmp_path / "tokenizer.json")
    Path(config.path).unlink()
    loaded = text.load(tmp_path / "tokenizer.json")
    caption = "a cat " + LOC[7] + " <bos>" + ENDOFTEXT
    assert loaded.encode(caption) == tokenizer.encode(caption)
    assert loaded.decode(loaded.encode(caption)) == tokenizer.decode(tokenizer.encode(caption))
    assert [loaded.vocab_size, loaded.pad_id, loaded.bos_id, loaded.eos_id, loaded.suppressed_ids] == [
        *[tokenizer.vocab_size, tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.suppressed_ids]
    ]
    assert loaded.to_json() == tokenizer.to_json()
    assert str(tmp_path) not in tokenizer.to_json()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"path": ""}, "model.text.path = ''"),
        ({"path": "nowhere/tokenizer.json"}, "No such file"),
        ({"bos": "<start>"}, "the tokenizer has no token '<start>'"),
        ({"bos": "<start>", "eos": "</s>"}, "the tokenizer has no token '<start>' or '</s>'"),
        ({"vocab_size": 1000}, "the tokenizer has 1453 tokens, more than vocab_size 1000"),
    ],
    ids=["empty", "missing", "no-bos", "no-bos-no-eos", "table-too-small"],
)
def test_the_error_for_an_unsuitable_tokenizer_file_names_the_config_path(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    config = published(tmp_path, "byte_fallback", **change)
    with pytest.raises(ConfigError) as caught:
        text.learn(config, ())
    assert message in str(caught.value)
    assert "model.text.path" in caught.value.where
    assert "--set model.text.path=FILE" in caught.value.fix


@pytest.mark.parametrize("content", ["", "[1, 2]", '{"model": null}', "\x00\x01"])
def test_a_file_that_contains_no_tokenizer_raises_a_config_error(content: str, tmp_path: Path) -> None:
    config = published(tmp_path, "byte_level")
    Path(config.path).write_text(content)
    with pytest.raises(ConfigError, match="the model's tokenizer cannot be used"):
        text.learn(config, ())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dropout": 0.5}, "the key model.dropout is 0.5"),
        ({"continuing_subword_prefix": "##"}, "the file is not a tokenizer"),  # the library ends with a Rust panic
    ],
)
def test_a_tokenizer_that_splits_texts_at_random_or_makes_the_library_panic_raises_a_config_error(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    config = published(tmp_path, "byte_fallback")
    content = json.loads(Path(config.path).read_text())
    content["model"] |= change
    Path(config.path).write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=message):
        text.learn(config, ())


def test_a_damaged_tokenizer_file_in_a_checkpoint_raises_a_checkpoint_error(tmp_path: Path) -> None:
    content = json.loads(text.learn(published(tmp_path, "byte_level"), ()).to_json())
    damages: list[dict[str, object]] = [{"tokenizer": {}}, {"eos": "</s>"}, {"vocab_size": 3}, {"surprise": 1}]
    for damage in damages:
        (tmp_path / "tokenizer.json").write_text(json.dumps({**content, **damage}))
        with pytest.raises(CheckpointError, match="the tokenizer cannot be read"):
            text.load(tmp_path / "tokenizer.json")

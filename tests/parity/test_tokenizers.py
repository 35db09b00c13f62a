"""Published tokenizers give the same ids and the same text as transformers.

The tokenizers are transformers' own classes with tiny vocabularies, saved by `save_pretrained`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from published_tokenizers import CORPUS, LOC, SEG, byte_fallback, byte_level, word_ends
from transformers import PreTrainedTokenizerFast
from transformers.models.clip.tokenization_clip import CLIPTokenizer
from transformers.models.gemma.tokenization_gemma import GemmaTokenizer
from transformers.models.gpt2.tokenization_gpt2 import GPT2Tokenizer

from vlm import text
from vlm.config import JsonTextConfig
from vlm.text.base import Tokenizer

TEXTS = [*CORPUS[:5], "", " two  spaces ", "line\nbreak", "\u00e9\u4e2d\U0001f600", "A Cat!", "it's 3 cats, isn't it"]
TEXTS += [LOC[5] + LOC[6] + LOC[7] + LOC[1023] + " cat ; " + SEG[0] + "dog", "the x of <x>"]
SPECIAL_TEXTS = ["<eos>", "the <unk> of", "a <pad> cat", "<image><image>", "<|endoftext|> cat", "<|startoftext|>"]
"""Texts in which transformers finds special tokens unless `split_special_tokens` is set."""


def vocabulary(tokenizer: Any) -> dict[str, Any]:
    model = json.loads(tokenizer.to_str())["model"]
    return {"vocab": model["vocab"], "merges": [tuple(pair) for pair in model["merges"]]}


def gpt2() -> Any:
    inner = vocabulary(byte_level())
    return GPT2Tokenizer(**{**inner, "vocab": inner["vocab"] | {"<|endoftext|>": len(inner["vocab"])}})


def gemma_with_regions() -> Any:
    tokenizer = GemmaTokenizer(**vocabulary(byte_fallback()))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.add_tokens(LOC + SEG)
    return tokenizer


def clip() -> Any:
    return CLIPTokenizer(**vocabulary(word_ends()))


@pytest.fixture(scope="module", params=[gpt2, gemma_with_regions, clip])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Tokenizer]:
    """Return a tokenizer of transformers, and our tokenizer read from the file that transformers saves."""
    make: Callable[[], Any] = request.param
    theirs, folder = make(), tmp_path_factory.mktemp(make.__name__)
    theirs.save_pretrained(folder)
    config = JsonTextConfig(
        kind="json",
        path=str(folder / "tokenizer.json"),
        vocab_size=2000,
        bos=theirs.bos_token,
        eos=theirs.eos_token,
        pad=theirs.pad_token or theirs.eos_token,
    )
    return theirs, text.learn(config, ())


def test_token_ids_and_decoded_text_are_the_same_as_in_transformers(both: tuple[Any, Tokenizer]) -> None:
    theirs, ours = both
    for written in TEXTS:
        ids = theirs.encode(written, add_special_tokens=False)
        assert ours.encode(written) == ids, written
        ids = [ours.bos_id, *ids, ours.eos_id]
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def test_special_tokens_in_a_text_are_split_into_the_same_ids_as_in_transformers(both: tuple[Any, Tokenizer]) -> None:
    theirs, ours = both
    for written in SPECIAL_TEXTS:
        assert ours.encode(written) == theirs.encode(written, add_special_tokens=False, split_special_tokens=True)


def test_ids_of_control_tokens_are_the_same_as_in_transformers(both: tuple[Any, Tokenizer]) -> None:
    theirs, ours = both
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.pad_id == (theirs.pad_token_id if theirs.pad_token else theirs.eos_token_id)


def test_transformers_can_read_the_tokenizer_of_a_checkpoint(both: tuple[Any, Tokenizer], tmp_path: Path) -> None:
    theirs, ours = both
    (tmp_path / "tokenizer.json").write_text(json.dumps(json.loads(ours.to_json())["tokenizer"]), encoding="utf-8")
    again = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    for written in TEXTS:
        assert again.encode(written, add_special_tokens=False) == theirs.encode(written, add_special_tokens=False)

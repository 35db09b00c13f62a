"""Tiny tokenizers that have the same models, normalizers, decoders and special tokens as published tokenizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from vlm.config import JsonTextConfig

CORPUS = ["a red car", "a blue car and a cat", "two cats on a red road", "detect cat ; dog", "caption en"] * 4
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
ENDOFTEXT, STARTOFTEXT = "<|endoftext|>", "<|startoftext|>"
LOC, SEG = [f"<loc{i:04d}>" for i in range(1024)], [f"<seg{i:03d}>" for i in range(128)]


def byte_level() -> Tokenizer:
    """Train a byte-level BPE tokenizer like GPT-2's. One special token marks start, end and padding of a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([ENDOFTEXT])
    return tokenizer


def byte_fallback(*, special_regions: bool = False) -> Tokenizer:
    """Build a tokenizer like PaliGemma's: BPE with byte fallback. Some of its merges spell <bos>."""
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{i:02X}>" for i in range(256))]
    words += [*"<>abcdefghijklmnopqrstuvwxyz;.,\n", SPACE, "bo", "<bo", "s>", "ca", "cat", SPACE + "cat"]
    merges = [("b", "o"), ("<", "bo"), ("s", ">"), ("<bo", "s>"), ("c", "a"), ("ca", "t"), (SPACE, "cat")]
    vocab = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    tokenizer.add_special_tokens(["<pad>", "<eos>", "<bos>", "<unk>"])
    tokenizer.add_tokens([AddedToken(token, special=special_regions, normalized=False) for token in LOC + SEG])
    tokenizer.add_special_tokens(["<image>"])
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=7)
    return tokenizer


def word_ends() -> Tokenizer:
    """Build a tokenizer like CLIP's: lower-case text, words that end in </w>, and the end token as unknown token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = alphabet + [char + "</w>" for char in alphabet] + ["ca", "cat</w>", STARTOFTEXT, ENDOFTEXT]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={word: i for i, word in enumerate(words)},
            merges=[("c", "a"), ("ca", "t</w>")],
            end_of_word_suffix="</w>",
            unk_token=ENDOFTEXT,
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([STARTOFTEXT, ENDOFTEXT])
    return tokenizer


CONTROL = {
    "byte_level": {"bos": ENDOFTEXT, "eos": ENDOFTEXT, "pad": ENDOFTEXT},
    "byte_fallback": {"bos": "<bos>", "eos": "<eos>", "pad": "<pad>"},
    "word_ends": {"bos": STARTOFTEXT, "eos": ENDOFTEXT, "pad": ENDOFTEXT},
}
MAKE = {"byte_level": byte_level, "byte_fallback": byte_fallback, "word_ends": word_ends}


def published(folder: Path, which: str, **changes: Any) -> JsonTextConfig:
    """Write a tokenizer.json of one kind. Return a text config for the file, in which the fields `changes` are
    changed."""
    path = folder / f"{which}.json"
    MAKE[which]().save(str(path))
    return JsonTextConfig.model_validate(
        {"kind": "json", "path": str(path), "vocab_size": 1600, **CONTROL[which], **changes}
    )

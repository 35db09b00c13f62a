"""Tests of batches: labels, the text shown with a picture, parts of batches, mixes, and order with loader threads."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_runs import global_batches, tiny_model_config, write_shards

from pipelines.config import TextWeights
from pipelines.formats.mixes import ShardFolder, write_mix
from pipelines.formats.shards import Row, Shards
from pipelines.worker.data.batches import Collator, map_ahead, training_batches
from pipelines.worker.data.prefetch import prefetch_to_device
from vlm.batch import IGNORE, Batch
from vlm.text.chars import CharTokenizer

TOKENIZER = CharTokenizer("abcdefghijklmnopqrstuvwxyz \n?")
MODEL = tiny_model_config()
SLOTS = MODEL.num_slots


def row(*texts: tuple[str, str]) -> Row:
    return Row("a/1", np.zeros((16, 16, 3), np.uint8), list(texts))


def collate(*texts: tuple[str, str]) -> Batch:
    return Collator(TOKENIZER, MODEL).collate([row(text) for text in texts], texts)


def single_rank_batches(shards: Shards, batch_size: int, *, steps: int = 3, **settings: Any) -> Iterator[list[Batch]]:
    """Return the batches of a single rank."""
    collator = Collator(TOKENIZER, MODEL)
    return training_batches(
        shards, collator, steps=range(steps), rank=0, world_size=1, batch_size=batch_size, seed=1, **settings
    )


def spell(ids: torch.Tensor) -> str:
    return TOKENIZER.decode(ids[ids != IGNORE].tolist())


def test_only_the_tokens_of_the_answer_and_the_end_token_are_labels() -> None:
    batch = collate(("what?", "a cat"), ("", "dog"))
    labels = batch.labels_BT
    assert [spell(row_T) for row_T in labels] == ["a cat", "dog"]
    ends = [row_T[row_T != IGNORE][-1].item() for row_T in labels]
    assert ends == [TOKENIZER.eos_id, TOKENIZER.eos_id]
    assert batch.prefix_lengths_B.tolist() == [SLOTS + 1 + len("what?\n"), SLOTS + 1]


def test_the_label_at_each_position_is_the_next_token() -> None:
    batch = collate(("", "a cat"), ("", "elephant"))
    for tokens_T, labels_T in zip(batch.tokens_BT, batch.labels_BT, strict=True):
        (positions,) = torch.where(labels_T[:-1] != IGNORE)
        inside = positions[labels_T[positions] != TOKENIZER.eos_id]
        assert (tokens_T[inside + 1] == labels_T[inside]).all()


def test_the_first_answer_token_is_predicted_at_the_last_token_of_the_prefix() -> None:
    batch = collate(("", "cat"))
    (positions,) = torch.where(batch.labels_BT[0] != IGNORE)
    assert positions[0] == SLOTS
    assert batch.tokens_BT[0, SLOTS] == TOKENIZER.bos_id


def test_batches_are_padded_to_a_multiple_of_eight_and_never_beyond_the_context() -> None:
    short, long = collate(("", "cat")), collate(("", "x" * (MODEL.decoder.context - SLOTS - 2)))
    assert short.tokens_BT.shape[1] == 8
    assert long.tokens_BT.shape[1] <= MODEL.decoder.context


@pytest.mark.parametrize("text", [("", "x" * 100), ("y" * 100, "cat")])
def test_a_text_longer_than_the_context_is_truncated_and_counted_and_logged_once(
    text: tuple[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    collator = Collator(TOKENIZER, MODEL)
    with caplog.at_level(logging.WARNING):
        batch = collator.collate([row(text), row(text)], [text, text])
    assert batch.tokens_BT.shape == (2, MODEL.decoder.context)
    assert (batch.labels_BT != IGNORE).any(dim=1).all()
    assert TOKENIZER.eos_id not in batch.labels_BT  # a truncated text has no end token
    assert collator.num_truncated == 2
    assert len(caplog.records) == 1


def test_a_text_that_exactly_fits_the_context_is_not_truncated() -> None:
    text = "x" * (MODEL.decoder.context - SLOTS - 1)
    assert spell(collate(("", text)).labels_BT[0]) == text


def test_a_picture_with_several_texts_is_shown_with_each_text_in_some_epoch(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", rows=4, texts=3)
    shown: dict[bytes, set[str]] = {}
    for (batch,) in single_rank_batches(shards, 4, steps=20):
        for pixels_HWC, labels_T in zip(batch.pixels_PHWC, batch.labels_BT, strict=True):
            shown.setdefault(pixels_HWC.numpy().tobytes(), set()).add(spell(labels_T))
    assert [len(texts) for texts in shown.values()] == [3, 3, 3, 3]


def test_a_repeated_text_is_drawn_more_often_unless_the_weights_are_uniform(tmp_path: Path) -> None:
    """Picture 1 has the texts green, green, green and green x."""
    hashes = set()
    shares: dict[TextWeights, float] = {"frequency": 0.75, "uniform": 0.5}
    for weights, expected in shares.items():
        shards = write_shards(tmp_path / weights, rows=2, texts=2, repeats=2, text_weights=weights)
        said = [spell(row_T) for [batch] in single_rank_batches(shards, 2, steps=100) for row_T in batch.labels_BT]
        green = Counter(text for text in said if text.startswith("green"))
        assert green["green"] / green.total() == pytest.approx(expected, abs=0.1)
        hashes.add(shards.manifest.content_hash)
    assert len(hashes) == 2, "a change of the text weights makes another run"


def test_a_mix_draws_each_source_by_its_share_and_its_order_does_not_depend_on_ranks_or_restarts(
    tmp_path: Path,
) -> None:
    own, other = (write_shards(tmp_path / str(rows), rows=rows, seed=rows) for rows in (12, 4))
    packed = [ShardFolder(shards.folder, shards.manifest, reused=True) for shards in (own, other)]
    shards = Shards.open(write_mix(packed, [0.5], tmp_path).folder)

    def pixels(steps: range, rank: int = 0, world_size: int = 1) -> list[bytes]:
        collator = Collator(TOKENIZER, MODEL)
        batches = training_batches(
            shards, collator, steps=steps, rank=rank, world_size=world_size, batch_size=8, seed=3
        )
        return [pixels_HWC.numpy().tobytes() for (batch,) in batches for pixels_HWC in batch.pixels_PHWC]

    whole = pixels(range(6))
    assert len(whole) == 48, "three epochs of 16 draws"
    assert Counter(Counter(whole)[other.row(n).pixels.tobytes()] for n in range(4)) == {6: 4}
    assert Counter(Counter(whole)[own.row(n).pixels.tobytes()] for n in range(12)) == {2: 12}
    assert pixels(range(2, 6)) == whole[16:]
    halves = [pixels(range(6), rank, 2) for rank in range(2)]
    assert [halves[n // 4 % 2][n // 8 * 4 + n % 4] for n in range(48)] == whole


def test_a_batch_is_sorted_by_length_and_its_parts_are_padded_separately(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", rows=16, texts=20)

    in_parts = single_rank_batches(shards, 16, rows_at_once=6)
    for (whole,), parts in zip(single_rank_batches(shards, 16), in_parts, strict=True):
        assert [len(part.tokens_BT) for part in parts] == [6, 6, 4]
        lengths = [(part.labels_BT != IGNORE).sum(1) for part in parts]
        assert torch.equal(torch.cat(lengths), (whole.labels_BT != IGNORE).sum(1).sort().values)
        widths = [part.tokens_BT.shape[1] for part in parts]
        assert widths == [-(-(SLOTS + int(length.max())) // 8) * 8 for length in lengths]
        assert widths[0] < widths[-1] == whole.tokens_BT.shape[1]
        shown = [
            {
                (pixels.numpy().tobytes(), spell(labels))
                for b in batches
                for pixels, labels in zip(b.pixels_PHWC, b.labels_BT, strict=True)
            }
            for batches in ([whole], parts)
        ]
        assert shown[0] == shown[1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_prefetching_moves_batches_to_the_gpu_and_does_not_change_their_content(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", rows=16)

    copied = prefetch_to_device(single_rank_batches(shards, 8, pinned=True), torch.device("cuda"))
    for (on_gpu,), (on_cpu,) in zip(copied, single_rank_batches(shards, 8), strict=True):
        tensors = list(zip(on_gpu.tensors(), on_cpu.tensors(), strict=True))
        assert all(copy.is_cuda and torch.equal(copy.cpu(), original) for copy, original in tensors)


def test_batches_do_not_depend_on_the_number_of_ranks_or_workers_or_on_the_first_step(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", rows=10, texts=2)

    whole = global_batches(shards, TOKENIZER, range(8))
    assert len({sample for batch in whole for sample in batch}) > 10
    for world_size, workers in itertools.product((1, 2, 4), (0, 1, 3)):
        assert global_batches(shards, TOKENIZER, range(8), world_size=world_size, workers=workers) == whole
    assert global_batches(shards, TOKENIZER, range(5, 8), world_size=2, workers=3) == whole[5:]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_an_error_in_a_loader_thread_is_raised_when_training_needs_its_batch(workers: int) -> None:
    def make(item: int) -> int:
        if item == 3:
            raise RuntimeError("the shard is gone")
        time.sleep(0.01 * (3 - item))  # item 0 takes the longest time
        return item

    fetched = map_ahead(make, range(9), workers)
    assert [next(fetched) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(RuntimeError, match="the shard is gone"):
        next(fetched)


def test_loader_threads_work_a_few_items_ahead_and_stop_when_the_iterator_is_closed() -> None:
    before, made = threading.active_count(), []
    barrier = threading.Barrier(2, timeout=20)

    def make(item: int) -> int:
        if item < 2:
            barrier.wait()  # wait until both loader threads have an item
        made.append(item)
        return item

    fetched = map_ahead(make, range(1000), workers=2)
    assert next(fetched) == 0
    fetched.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before
    assert len(made) <= 5

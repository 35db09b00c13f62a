"""Tests that the attention of a caption is drawn for its first words, and never for another caption."""

from __future__ import annotations

import io
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from PIL import Image
from tiny_models import tiny_model, tiny_pixels
from tiny_runs import tiny_model_config, write_shards

from pipelines.executor.evaluate import ScoreJob, attention_batches, score_batches
from pipelines.formats.shards import Row
from pipelines.worker.attention import MAX_WORDS, SIDE, draw_row_attention
from vlm import text
from vlm.captioner import Captioner
from vlm.checkpoint import save_model
from vlm.factory import build_model
from vlm.generation.generate import Completion


@pytest.mark.parametrize("variant", ["plain", "looking"])  # image slots, and cross-attention with a resampler
def test_the_drawn_attention_of_a_caption_has_a_picture_for_each_of_its_first_words(variant: str) -> None:
    captioner = Captioner(*tiny_model(variant))
    row = Row("x", tiny_pixels(1)[0].numpy(), [("", "a")])
    for seed in range(20):  # at a high temperature, most captions of a random model have words
        settings = captioner.settings(temperature=3.0, seed=seed)
        (answer,) = captioner.complete([row.pixels], [""], settings)
        assert isinstance(answer, Completion)
        drawn = draw_row_attention(captioner, row, "", answer.text, settings)
        words = answer.text.split()[:MAX_WORDS]
        assert [title.rpartition(" ")[0] for title, _ in drawn] == words
        if len({*words}) > 1:
            break
    else:
        pytest.fail("no caption has several words")
    sizes = {Image.open(io.BytesIO(picture)).size for _, picture in drawn}
    assert sizes == {(SIDE, SIDE)}
    assert len({picture for _, picture in drawn}) > 1, "the model looks at different patches for different words"
    assert draw_row_attention(captioner, row, "", f"{answer.text} another", settings) == []


def test_executors_draw_the_attention_of_the_captions_that_they_scored(tmp_path: Path) -> None:
    torch.manual_seed(5)
    config = tiny_model_config()
    tokenizer = text.learn(config.text, [])
    network = build_model(config, tokenizer.vocab_size)
    with torch.no_grad():
        network.decoder.head.weight.mul_(40)
    save_model(tmp_path / "model", network, tokenizer)
    shards = write_shards(tmp_path / "shards", rows=8)
    job = ScoreJob(
        model_folder=tmp_path / "model",
        model_digest="",
        remote=False,
        shards_folder=str(shards.folder),
        threads=torch.get_num_threads(),
        settings=None,
    )
    indexes = pa.RecordBatch.from_pydict({"id": list(range(8))})
    scored = [row for batch in score_batches(job, iter([indexes])) for row in batch.to_pylist()]
    captions = [{name: row[name] for name in ("row", "prompt", "caption")} for row in scored]
    (drawn,) = attention_batches(job, iter([pa.RecordBatch.from_pylist(captions)]))
    for row, item in zip(scored, drawn.to_pylist(), strict=True):
        assert (item["row"], item["prompt"]) == (row["row"], row["prompt"])
        assert [title.rpartition(" ")[0] for title in item["titles"]] == row["caption"].split()[:MAX_WORDS]
        assert len(item["pictures"]) == len(item["titles"])
    assert sum(len(item["titles"]) for item in drawn.to_pylist()) > 8

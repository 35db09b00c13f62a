"""Captions per second of Lakesight compared with a naive loop on the same weights, pictures and cores.

    python tests/benchmarks/bench_caption.py

The naive loop captions one picture at a time and has no KV cache: for each new token, the decoder processes the whole
sequence again. The loop captions only the first tenth of the pictures, because the loop is slow. The benchmark checks
that the loop and our captioner generate the same captions. The benchmark compares the naive loop with our captioner in
a single process, and with a captioning job. In the job, Spark reads a table, executors caption the pictures, and Spark
merges the captions into a Delta table. The model is `nano` with random weights. Because of the random weights, every
caption has the full 40 tokens; the captions of a trained model are shorter.
"""

from __future__ import annotations

import csv
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from measure import make, measured

from pipelines.config import DataConfig, LocalPlatformConfig, load_model
from pipelines.driver.caption.run import CaptionRequest, caption
from pipelines.driver.ingest.run import ingest
from pipelines.driver.model_files import ModelFiles
from pipelines.platform import local
from pipelines.worker.caption import load_captioner
from vlm import text
from vlm.captioner import Captioner
from vlm.checkpoint import save_model
from vlm.factory import build_model
from vlm.image import open_image, picture_bytes, to_pixels
from vlm.text.base import NUM_SPECIAL
from vlm.text.prompt import prefix_ids

ROWS, SIDE = 2000, 64


@torch.inference_mode()
def naive(captioner: Captioner, images: list[bytes]) -> list[str]:
    """Caption one picture at a time without a KV cache."""
    model, tokenizer = captioner.model, captioner.tokenizer
    settings = model.config.generation
    captions = []
    for data in images:
        picture, _ = open_image(data, max_pixels=10**8, min_side=1)
        slots = model.encode(torch.from_numpy(to_pixels(picture, model.config.image))[None])
        tokens = prefix_ids(tokenizer, model.config.num_slots, "")
        start = len(tokens)
        while len(tokens) < start + settings.max_new_tokens:
            hidden = model.decoder(model.embed(torch.tensor([tokens]), slots), mask=None)
            logits = model.decoder.head(hidden[0, -1])
            logits[:NUM_SPECIAL][torch.arange(NUM_SPECIAL) != tokenizer.eos_id] = -torch.inf
            token = int(logits.argmax())
            if token == tokenizer.eos_id:
                break
            tokens.append(token)
        captions.append(tokenizer.decode(tokens[start:]))
    return captions


def main() -> None:
    """Measure the naive loop, the captioner and the captioning job, and print a table."""
    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as home:
        os.environ["LAKESIGHT_HOME"] = home
        path, folder = Path(home) / "made.csv", Path(home) / "model"
        make(path, ROWS, SIDE)
        config = load_model("nano")
        tokenizer = text.learn(config.text, ["a large blue square above a small green star", "a red circle"])
        save_model(folder, build_model(config, tokenizer.vocab_size), tokenizer)
        with path.open(newline="") as file:
            images = [picture_bytes(row["b64string_images"]) for row in csv.DictReader(file)]

        captioner = load_captioner(str(folder))
        few = images[: ROWS // 10]
        expected = naive(captioner, few)
        started = time.monotonic()
        naive(captioner, few)
        naive_rate = len(few) / (time.monotonic() - started)
        found: list[str | None] = []

        def one_process() -> int:
            results = captioner.caption(images, [""] * len(images), **config.generation.model_dump())
            found[:] = [result.caption for result in results]
            return len(results)

        one_process()
        rate, _ = measured(one_process)
        assert found[: len(few)] == expected, "the captions differ"

        platform = local(LocalPlatformConfig())
        spark = platform.open_spark()
        data = DataConfig.model_validate({"source": {"path": str(path)}})
        ingest(spark, platform, "made", data)
        model = ModelFiles(folder=folder, name="nano", version="1", run_id="none")
        caption(spark, platform, model, CaptionRequest(where="split = 'val'"))  # the first job warms up Python workers
        job_rate, job_peak = measured(lambda: caption(spark, platform, model, CaptionRequest()).captioned)
        spark.stop()
    print(f"{ROWS} pictures of {SIDE} px, {threads} cores, {np.mean([len(c) for c in expected]):.0f} characters each")
    print(f"naive loop, no cache         {naive_rate:7.1f} captions/s")
    print(f"captioner in one process     {rate:7.1f} captions/s  ratio {rate / naive_rate:.2f}")
    print(
        f"lakesight caption, on Spark  {job_rate:7.1f} captions/s  ratio {job_rate / naive_rate:.2f}  {job_peak:.0f} MB"
    )


if __name__ == "__main__":
    main()

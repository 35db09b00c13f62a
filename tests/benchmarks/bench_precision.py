"""Model size, captions per second, and difference from the captions in fp32, for each precision.

    pip install 'lakesight[quantize]'
    python tests/benchmarks/bench_precision.py

Speed and size are measured on `base` (214 M weights) with random weights, with one picture at a time and with batches
of sixteen pictures. Each caption is 16 tokens long. The differences between captions are measured with `nano`, trained
on the demo's scenes with the demo's settings. The benchmark compares the captions of each precision word for word with
three lists: the captions in fp32, the true captions, and the captions of the same precision at batch size 1. For each
precision, the benchmark also compares the log-probabilities of the true captions with those in fp32, and prints the
mean absolute difference per token. A time is the minimum of several rounds, in CPU seconds of one thread, so that other
work on the machine has little influence.
"""

from __future__ import annotations

import copy
import io
import time
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from pipelines.config import load_model
from pipelines.formats.shards import Row
from pipelines.scenes import draw, random_scene
from pipelines.worker.data.batches import Collator
from vlm import text
from vlm.batch import Batch
from vlm.captioner import Captioner
from vlm.config import CosineScheduleConfig, ModelConfig, Precision
from vlm.factory import build_model
from vlm.image import to_pixels
from vlm.precision import set_precision
from vlm.text.base import Tokenizer
from vlm.training.loop import fit
from vlm.training.objective import row_losses
from vlm.training.optim import build_adamw, schedule

STEPS, BATCH, LEARNED, HELD_OUT, ALONE, ROUNDS, TOKENS = 1600, 64, 9600, 256, 64, 3, 16


class Scenes:
    """Generated pictures like those of the demo, made without Spark: PNG bytes, pixels and sentences."""

    def __init__(self, config: ModelConfig, count: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        scenes = [random_scene(rng) for _ in range(count)]
        pictures = [draw(scene, rng) for scene in scenes]
        self.texts = [scene.caption for scene in scenes]
        self.files = []
        for picture in pictures:
            buffer = io.BytesIO()
            picture.save(buffer, "PNG")
            self.files.append(buffer.getvalue())
        self.rows = [
            Row(image_id="", pixels=to_pixels(picture, config.image), texts=[("", sentence)])
            for picture, sentence in zip(pictures, self.texts, strict=True)
        ]

    def batch(self, collator: Collator, places: range) -> Batch:
        """Return a batch of the rows at the given indices."""
        return collator.collate([self.rows[i] for i in places], [("", self.texts[i]) for i in places])


def trained(config: ModelConfig) -> Captioner:
    """Train `nano` as the demo does."""
    scenes = Scenes(config, LEARNED, seed=0)
    tokenizer = text.learn(config.text, scenes.texts)
    torch.manual_seed(0)
    model, collator = build_model(config, tokenizer.vocab_size), Collator(tokenizer, config)
    parts = len(scenes.rows) // BATCH
    batches = ([scenes.batch(collator, range(BATCH * (s % parts), BATCH * (s % parts + 1)))] for s in range(STEPS))
    fit(
        model,
        build_adamw(model, lr=2e-3, betas=(0.9, 0.95), weight_decay=0.05),
        batches,
        start=0,
        lr_schedule=lambda step: 2e-3 * schedule(CosineScheduleConfig(), step, steps=STEPS, warmup_steps=60),
        grad_clip=1.0,
        seed=0,
        rank=0,
        device=torch.device("cpu"),
        bf16=False,
        on_step=lambda report: None,
    )
    return Captioner(model.eval(), tokenizer)


def as_precision(captioner: Captioner, precision: Precision) -> Captioner:
    """Return a copy of the model in the given precision."""
    model = copy.deepcopy(captioner.model)
    set_precision(model, precision)
    return Captioner(model, captioner.tokenizer)


def said(captioner: Captioner, files: list[bytes]) -> list[str | None]:
    """Caption the pictures and return the captions."""
    results = captioner.caption(files, [""] * len(files))
    return [result.caption for result in results]


def stored_bytes(captioner: Captioner) -> int:
    """Count the bytes of all stored weights. A weight that several modules share is counted only once."""
    tensors = {t.data_ptr(): t.numel() * t.element_size() for p in captioner.model.parameters() for t in parts(p)}
    return sum(tensors.values())


def parts(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the plain tensors of which a quantized tensor consists. For a plain tensor, yield the tensor itself."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from parts(getattr(tensor, name))
    else:
        yield tensor


def agreement() -> None:
    """For each precision, print how much the captions differ from the captions in fp32."""
    config = load_model("nano")
    exact = trained(config)
    scenes = Scenes(config, HELD_OUT, seed=1)
    batch = scenes.batch(Collator(exact.tokenizer, config), range(HELD_OUT))
    expected, (losses, counts) = said(exact, scenes.files), row_losses(exact.model, batch)
    print(f"{'':6}equal to fp32  right  |difference| of log-probability per token  alone as in a batch")
    for precision in Precision:
        captioner = as_precision(exact, precision)
        captions = said(captioner, scenes.files)
        equal, right = same(captions, expected), same(captions, list(scenes.texts))
        difference = float(((row_losses(captioner.model, batch)[0] - losses).abs() / counts).mean())
        alone = [said(captioner, [file])[0] for file in scenes.files[:ALONE]]
        print(f"{precision:6}{equal:13.3f}  {right:5.3f}  {difference:42.4f}  {same(alone, captions[:ALONE]):19.3f}")


def same(left: list[str | None], right: list[str | None]) -> float:
    """Return the share of captions that are equal in two lists."""
    return float(np.mean([a == b for a, b in zip(left, right, strict=True)]))


def speed() -> None:
    """Print the model size and the captions per CPU second of each precision."""
    config = load_model("base")
    generation = config.generation.model_copy(update={"max_new_tokens": TOKENS})
    config = config.model_copy(update={"generation": generation})
    scenes = Scenes(config, 16, seed=2)
    tokenizer: Tokenizer = text.learn(config.text, scenes.texts)
    torch.manual_seed(0)
    exact = Captioner(build_model(config, config.text.vocab_size).eval(), tokenizer)  # type: ignore[union-attr]
    captioners = {precision: as_precision(exact, precision) for precision in Precision}
    seconds: dict[tuple[Precision, int], list[float]] = {}
    for round_ in range(ROUNDS):
        for precision, captioner in captioners.items():
            for batch in (1, 16) if round_ else (1,):  # the first round only warms up, so it omits batch size 16
                started = time.process_time()
                said(captioner, scenes.files[:batch])
                seconds.setdefault((precision, batch), []).append(time.process_time() - started)
    print(f"{'':6}{'MB':>6}  {'captions/s alone':>18}  {'of sixteen':>18}")
    for precision in Precision:
        line = f"{precision:6}{stored_bytes(captioners[precision]) / 1e6:6.0f}"
        for batch in (1, 16):
            rate = batch / min(seconds[precision, batch])
            ratio = rate / (batch / min(seconds[Precision.FP32, batch]))
            line += f"  {rate:9.3f} ({ratio:5.2f} x)"
        print(line)


if __name__ == "__main__":
    torch.set_num_threads(1)
    agreement()
    speed()

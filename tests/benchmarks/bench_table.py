"""Speed of captioning a table with Lakesight, with a plain loop, and with UDFs that call transformers' `generate`.

    pip install transformers daft
    python tests/benchmarks/bench_table.py

All programs caption the same pictures with the same weights (exported for transformers) and the same limit of tokens.
The benchmark checks that the programs generate equal texts. Each program has one process per core, and each process has
one thread. Before the measurement, each program captions a few pictures. The plain loop decodes and generates in
batches, and neither reads nor writes a table. The other programs read a Delta table. The UDF runs in Spark and in Daft
with batches of 64 pictures. In Spark, the UDF also captions a quarter of the rows one picture at a time (the default of
transformers' pipelines).

The printed ratios compare the CPU time of all processes together, because wall time is meaningful only on an otherwise
idle machine. Lakesight's peaks of resident memory are measured in two further jobs: on a quarter of the rows, and on
all rows.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from deltalake import DeltaTable, write_deltalake
from measure import peak_by_process, processor_seconds
from PIL import Image
from pyspark.sql import DataFrame

from pipelines.config import LocalPlatformConfig, load_model
from pipelines.driver.caption.run import CaptionRequest, caption
from pipelines.driver.model_files import ModelFiles
from pipelines.platform import local
from pipelines.worker.caption import limit_threads, load_captioner
from vlm import text
from vlm.checkpoint import save_model
from vlm.factory import build_model
from vlm.image import open_image, to_pixels
from vlm.text.prompt import prefix_ids
from vlm.weights.export import export_weights

ROWS, SIZE, BATCH = 5000, (320, 240), 64
SHAPE = (
    "model.image.size=64",
    "model.vision.transformer.width=256",
    "model.vision.transformer.depth=4",
    "model.vision.transformer.attention.head_dim=64",
    "model.vision.transformer.mlp.mlp_width=1024",
    "model.decoder.context=128",
    "model.decoder.transformer.width=256",
    "model.decoder.transformer.depth=4",
    "model.decoder.transformer.attention.head_dim=64",
    "model.decoder.transformer.mlp.mlp_width=1024",
    "model.generation.max_new_tokens=24",
)
"""A small PaliGemma with 7 M weights and 64 image slots."""


class Rates(NamedTuple):
    """Captions per wall second and per CPU second."""

    clock: float
    processor: float

    def show(self, name: str, beside: str = "") -> None:
        """Print one line of the table."""
        print(f"{name:<32} {self.clock:7.1f}/s  {self.processor:7.1f} per CPU second  {beside}", flush=True)


def timed(work: Callable[[], int]) -> Rates:
    """Measure the captions per second of a function that generates captions and returns their number."""
    clock, processor = time.monotonic(), processor_seconds()
    count = work()
    return Rates(count / (time.monotonic() - clock), count / (processor_seconds() - processor))


def pictures(count: int) -> list[bytes]:
    """Return JPEG files (as bytes) of smooth colour fields with noise."""
    rng = np.random.default_rng(0)
    files = []
    for _ in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        field = np.asarray(coarse.resize(SIZE, Image.Resampling.BICUBIC)) // 2
        buffer = io.BytesIO()
        Image.fromarray((field + rng.integers(0, 8, field.shape)).astype(np.uint8)).save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    return files


# ------------------------------------------------------------------------------------------------ the plain loop


def loop(folder: str, images: list[bytes], ready: Barrier, answers: Any) -> None:
    """Decode and caption pictures batch by batch in a single process."""
    limit_threads(1)
    captioner = load_captioner(folder)
    settings = captioner.model.config.generation
    captioner.caption(images[:BATCH], [""] * BATCH, **settings.model_dump())
    ready.wait()
    said = []
    for start in range(0, len(images), BATCH):
        few = images[start : start + BATCH]
        said += [result.caption for result in captioner.caption(few, [""] * len(few), **settings.model_dump())]
    answers.put((images[0], said))


def bare(folder: Path, images: list[bytes], processes: int) -> tuple[Rates, list[str]]:
    """Run the loop in `processes` processes, and return the speed and the captions."""
    context = multiprocessing.get_context("spawn")
    ready, answers = context.Barrier(processes + 1), context.SimpleQueue()
    parts = [images[number::processes] for number in range(processes)]
    workers = [context.Process(target=loop, args=(str(folder), part, ready, answers)) for part in parts]
    for worker in workers:
        worker.start()
    ready.wait()
    found: dict[bytes, list[str]] = {}

    def gather() -> int:
        found.update(answers.get() for _ in workers)
        return len(images)

    rates = timed(gather)
    said = [""] * len(images)
    for number, part in enumerate(parts):
        said[number::processes] = found[part[0]]
    return rates, said


# ------------------------------------------------------------------------------------------------ transformers


@lru_cache(maxsize=1)
def theirs(folder: str, exported: str) -> Callable[[list[bytes]], list[str]]:
    """Return a function that captions with transformers and our exported weights. Each process loads the model once."""
    from transformers import PaliGemmaForConditionalGeneration

    torch.set_num_threads(1)
    model: Any = PaliGemmaForConditionalGeneration.from_pretrained(exported)
    tokenizer = text.load(Path(folder) / "tokenizer.json")
    config = load_model("paligemma_tiny", SHAPE)
    mark = model.config.image_token_index
    prefix = [mark if token < 0 else token for token in prefix_ids(tokenizer, config.num_slots, "")]

    @torch.inference_mode()
    def said(images: list[bytes]) -> list[str]:
        decoded = [open_image(image, max_pixels=10**8, min_side=1)[0] for image in images]
        pixels = torch.from_numpy(np.stack([to_pixels(picture, config.image) for picture in decoded]))
        ids = torch.tensor([prefix] * len(images))
        found = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            token_type_ids=torch.zeros_like(ids),
            pixel_values=(pixels.permute(0, 3, 1, 2) / 255 - 0.5) / 0.5,
            max_new_tokens=config.generation.max_new_tokens,
            do_sample=False,
            eos_token_id=tokenizer.eos_id,
            pad_token_id=tokenizer.pad_id,
            suppress_tokens=list(tokenizer.suppressed_ids),
        )
        answers = found[:, ids.shape[1] :].tolist()
        return [tokenizer.decode(row[: [*row, tokenizer.eos_id].index(tokenizer.eos_id)]) for row in answers]

    return said


def their_udf(folder: str, exported: str, batch: int, frames: Iterator[pd.DataFrame]) -> Iterator[pd.DataFrame]:
    """Caption batches of pictures in a Python worker, which loads the model only once."""
    captioned = theirs(folder, exported)
    for frame in frames:
        images = frame["image"].tolist()
        said = [line for start in range(0, len(images), batch) for line in captioned(images[start : start + batch])]
        yield pd.DataFrame({"id": frame["id"], "caption": said})


def route(table: DataFrame, udf: Callable[[Iterator[pd.DataFrame]], Iterator[pd.DataFrame]], out: Path) -> int:
    """Caption a table, write the captions to Parquet, and return the number of rows."""
    table.mapInPandas(udf, "id STRING, caption STRING").write.mode("overwrite").parquet(str(out))
    return len(read(out))


def daft_route(folder: str, exported: str, table: Path, least: str, out: Path, processes: int) -> int:
    """Use Daft to caption the rows of a Delta table with ids below `least`, write Parquet, and return the number of
    rows.
    """
    import daft  # type: ignore[import-not-found]

    @daft.cls(max_concurrency=processes, use_process=True)
    class Captioner:
        def __init__(self) -> None:
            import bench_table

            self.said = bench_table.theirs(folder, exported)

        @daft.method.batch(return_dtype=daft.DataType.string(), batch_size=BATCH)  # type: ignore[untyped-decorator]
        def caption(self, images: Any) -> list[str]:
            return self.said(images.to_pylist())

    rows = daft.read_deltalake(str(table))
    rows = rows.where(rows["id"] < least)
    rows.select(rows["id"], Captioner().caption(rows["image"]).alias("caption")).write_parquet(str(out))
    return len(read(out))


def read(files: Path) -> dict[str, str]:
    """Return a dict from row id to caption."""
    rows = pq.read_table(files).to_pydict()
    return dict(zip(rows["id"], rows["caption"], strict=True))


def main() -> None:
    """Measure all programs and print a table."""
    import bench_table  # import this script as a module, so that Spark's Python workers can import it too

    paths = [str(Path(__file__).parent), str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    torch.manual_seed(0)
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as home:
        os.environ["LAKESIGHT_HOME"] = home
        here, folder, exported = Path(home), Path(home) / "model", Path(home) / "exported"
        config = load_model("paligemma_tiny", SHAPE)
        tokenizer = text.learn(config.text, ["a large blue square above a small green star", "a red circle"])
        model = build_model(config, tokenizer.vocab_size)
        save_model(folder, model, tokenizer)
        export_weights(folder, "model", "paligemma", exported)
        images = pictures(ROWS)
        ids = [f"{number:06}" for number in range(ROWS)]
        write_deltalake(here / "photos", pa.table({"id": ids, "image": images}))

        loops, said = bare(folder, images, cores)
        expected = dict(zip(ids, said, strict=True))
        loops.show(f"bare loop, {cores} processes")

        platform = local(LocalPlatformConfig())
        spark = platform.open_spark()
        files = ModelFiles(folder=folder, name="table", version="1", run_id="none")
        request = CaptionRequest(source_table=f"delta.`{here}/photos`", id_column="id", image_column="image")
        caption(spark, platform, files, request.model_copy(update={"where": f"id < '{4 * BATCH:06}'"}))
        ours = timed(lambda: caption(spark, platform, files, request).captioned)
        rows = DeltaTable(here / "warehouse" / "generated_captions").to_pyarrow_table(columns=["image_id", "caption"])
        assert dict(zip(*rows.to_pydict().values(), strict=True)) == expected, "the captions differ"
        ours.show("lakesight caption, on Spark", f"{ours.processor / loops.processor:.2f} of the loop")
        for count in (ROWS // 4, ROWS):
            with peak_by_process() as peaks:
                few = request.model_copy(update={"where": f"id < '{count:06}'"})
                caption(spark, platform, files.model_copy(update={"version": f"of {count}"}), few)
            of_each = ", ".join(f"{kind} {peak / 1e6:,.0f} MB" for kind, peak in peaks.items())
            print(f"  peak memory captioning {count:,} rows: {of_each}", flush=True)

        for batch, count in ((BATCH, ROWS), (1, ROWS // 4)):
            udf = partial(bench_table.their_udf, str(folder), str(exported), batch)
            out = here / f"theirs-{batch}"
            route(spark.table(f"delta.`{here}/photos`").limit(4 * BATCH).repartition(cores), udf, out)
            table = spark.table(f"delta.`{here}/photos`").where(f"id < '{count:06}'").repartition(cores)
            theirs = timed(partial(route, table, udf, out))
            assert read(out).items() <= expected.items(), "the captions differ"
            beside = f"lakesight is {ours.processor / theirs.processor:.2f} x"
            theirs.show(f"UDF around transformers, by {batch}", beside)
        spark.stop()

        daft = partial(daft_route, str(folder), str(exported), here / "photos", processes=cores)
        daft(f"{4 * BATCH:06}", here / "warm")
        theirs = timed(lambda: daft(f"{ROWS:06}", here / "daft"))
        assert read(here / "daft") == expected, "the captions differ"
        theirs.show(f"the same in Daft, by {BATCH}", f"lakesight is {ours.processor / theirs.processor:.2f} x")


if __name__ == "__main__":
    main()

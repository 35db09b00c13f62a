"""Speed and memory of our training loader compared with mosaicml-streaming, WebDataset and Hugging Face datasets.

    pip install mosaicml-streaming webdataset datasets
    python tests/benchmarks/bench_loader.py

Each loader reads the same pictures of 224 x 224 pixels from files in the loader's own format. The pictures are stored
as JPEG (with the same bytes in each format), and also as raw pixels if the format supports raw pixels. Each loader
yields shuffled batches of 64 uint8 tensors that two workers prepare. The workers are threads in our loader and
processes of torch's DataLoader in the other loaders. Our loader also tokenizes the texts and makes labels, while the
other loaders yield strings. The measured time begins with the first batch, so that the start of processes is not
measured; the start-up time is printed separately. The benchmark then measures the time to the first batch when a run
resumes at sample 10,000,000, and the samples per CPU second with augmentation. At the end, the benchmark measures the
loader's own memory twice: for the normal number of rows, and for four times as many rows. Pages of memory-mapped files
do not count as the loader's own memory, because the kernel can reclaim these pages.
"""

from __future__ import annotations

import io
import os
import re
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import datasets  # type: ignore[import-not-found]
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
import webdataset  # type: ignore[import-not-found]
from measure import in_turn
from PIL import Image
from streaming import MDSWriter, StreamingDataset  # type: ignore[import-not-found]
from torch.utils.data import DataLoader

from pipelines.config import AugmentConfig, load_run
from pipelines.formats.shards import (
    Manifest,
    ShardRequest,
    Shards,
    encode_pixels,
    shard_schema,
    write_manifest,
    write_shard_file,
)
from pipelines.worker.data.augment import Augmenter
from pipelines.worker.data.batches import Collator, training_batches
from vlm import text

ROWS, SIDE, BATCH, WORKERS, ROUNDS = 8192, 224, 64, 2, 3
FAR = 10_000_000
TEXT = "a picture of smooth colours"
Encoding = Literal["raw", "jpeg"]
Pixels = npt.NDArray[np.uint8]


def pictures(rows: int) -> Iterator[Pixels]:
    """Generate smooth colour fields with a little noise."""
    rng = np.random.default_rng(0)
    for _ in range(rows):
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        field = np.asarray(coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC)) // 2
        yield (field + rng.integers(0, 8, field.shape)).astype(np.uint8)


def decoded(data: bytes) -> Pixels:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def write_shards(folder: Path, encoding: Encoding, rows: int = ROWS) -> Path:
    """Write our shards."""
    image = load_run("seemore").model.image.model_copy(update={"size": SIDE})
    request = ShardRequest(
        table="none",
        table_id="none",
        table_version=0,
        source="bench",
        split="train",
        image=image,
        encoding=encoding,
        rows=1024,
        seed=0,
    )
    folder.mkdir()
    schema, files, drawn = shard_schema(request), [], pictures(rows)
    for number in range(-(-rows // 1024)):
        content = [
            {"image_id": str(index), "pixels": encode_pixels(pixels, encoding), "texts": [{"prompt": "", "text": TEXT}]}
            for index, pixels in enumerate(islice(drawn, 1024))
        ]
        files.append(write_shard_file(folder, number, request, [pa.RecordBatch.from_pylist(content, schema)]))
    write_manifest(folder, Manifest(request=request, files=tuple(files)))
    return folder


def ours(
    folder: Path, start: int = 0, *, workers: int = WORKERS, augment: AugmentConfig | None = None
) -> Iterator[torch.Tensor]:
    """Read the shards for one epoch with the loader of a rank."""
    shards, model = Shards.open(folder), load_run("seemore").model
    steps = range(start, start + len(shards) // BATCH)
    batches = training_batches(
        shards,
        Collator(text.learn(model.text, [TEXT]), model),
        steps=steps,
        rank=0,
        world_size=1,
        batch_size=BATCH,
        seed=0,
        workers=workers,
        augmenter=Augmenter(augment, 0) if augment else None,
    )
    return (batch.pixels_PHWC for (batch,) in batches)


class Mosaic(StreamingDataset):  # type: ignore[misc]
    def __getitem__(self, index: int) -> tuple[Pixels, str]:
        row = super().__getitem__(index)
        pixels = row["image"] if isinstance(row["image"], np.ndarray) else decoded(row["image"])
        return pixels, row["text"]


def mosaic(folder: Path, encoding: Encoding) -> Callable[[], Iterator[torch.Tensor]]:
    kind = f"ndarray:uint8:{SIDE},{SIDE},3" if encoding == "raw" else "bytes"
    with MDSWriter(out=str(folder), columns={"image": kind, "text": "str"}) as out:
        for pixels in pictures(ROWS):
            out.write({"image": pixels if encoding == "raw" else encode_pixels(pixels, encoding), "text": TEXT})
    return lambda: loaded(Mosaic(local=str(folder), shuffle=True, batch_size=BATCH))


def tars(folder: Path) -> Callable[[], Iterator[torch.Tensor]]:
    folder.mkdir()
    drawn = pictures(ROWS)
    for number in range(ROWS // 1024):
        with tarfile.open(folder / f"{number:06}.tar", "w") as out:
            for index, pixels in enumerate(islice(drawn, 1024)):
                for name, data in (("jpg", encode_pixels(pixels, "jpeg")), ("txt", TEXT.encode())):
                    entry = tarfile.TarInfo(f"{index:06}.{name}")
                    entry.size = len(data)
                    out.addfile(entry, io.BytesIO(data))
    urls = sorted(map(str, folder.glob("*.tar")))

    def batches() -> Iterator[torch.Tensor]:
        rows = webdataset.WebDataset(urls, shardshuffle=len(urls), seed=0, nodesplitter=None).shuffle(1000)
        return loaded(rows.decode("rgb8").to_tuple("jpg", "txt"))

    return batches


def hugging(folder: Path) -> Callable[[], Iterator[torch.Tensor]]:
    content = [
        {"image": {"bytes": encode_pixels(pixels, "jpeg"), "path": None}, "text": TEXT} for pixels in pictures(ROWS)
    ]
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_list(content, features=features).save_to_disk(str(folder))
    rows = datasets.load_from_disk(str(folder))
    rows = rows.with_transform(
        lambda batch: {"image": [np.asarray(image.convert("RGB")) for image in batch["image"]], "text": batch["text"]}
    )
    return lambda: (batch["image"] for batch in DataLoader(rows, BATCH, shuffle=True, num_workers=WORKERS))


def loaded(rows: Any) -> Iterator[torch.Tensor]:
    return (pixels for pixels, _ in DataLoader(rows, BATCH, num_workers=WORKERS))


def timed(batches: Iterator[torch.Tensor]) -> tuple[float, float]:
    """Return the samples per second after the first batch, and the seconds until the first batch."""
    begun = time.monotonic()
    first = next(batches)
    assert first.shape[1:] == (SIDE, SIDE, 3)
    assert first.dtype == torch.uint8
    there = time.monotonic()
    count = sum(len(batch) for batch in batches)
    return count / (time.monotonic() - there), there - begun


def compare(works: dict[str, Callable[[], Iterator[torch.Tensor]]]) -> None:
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
    for _ in range(ROUNDS):
        for name, work in works.items():
            found[name].append(timed(work()))
    ours = statistics.median(rate for rate, _ in found["ours"])
    for name, measured in found.items():
        rate, start = (statistics.median(values) for values in zip(*measured, strict=True))
        print(f"  {name:22} {rate:8,.0f} samples/s   ours {ours / rate:5.2f} x   first batch after {start:.2f} s")


def augmented(folder: Path) -> None:
    """Measure each augmentation alone, then all augmentations together, and print the speeds."""
    light: dict[str, Any] = {"brightness": 0.3, "contrast": 0.3, "saturation": 0.3}
    kinds: dict[str, dict[str, Any]] = {"crop": {"scale": (0.5, 1.0)}, "mirror": {"flip": 0.5}, "light": light}
    kinds["all three"] = {name: value for kind in kinds.values() for name, value in kind.items()}

    def epoch(augment: AugmentConfig | None) -> int:
        return sum(map(len, ours(folder, workers=0, augment=augment)))

    works: dict[str, Callable[[], int]] = {"as they are": partial(epoch, None)}
    works |= {name: partial(epoch, AugmentConfig.model_validate(kind)) for name, kind in kinds.items()}
    rates = in_turn(works, ROUNDS, time.process_time)
    print("  " + ", ".join(f"{name} {rate:,.0f}" for name, rate in rates.items()))


def own_memory(folder: Path) -> str:
    """Return the anonymous memory of a new process after the process has read every row of the shards once."""
    code = f"from bench_loader import read_all; read_all({str(folder)!r})"
    here = Path(__file__).parent
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=here).stdout


def read_all(folder: str) -> None:
    rows = sum(len(batch) for batch in ours(Path(folder)))
    anonymous = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert anonymous
    print(f"  {rows:7,} rows: {int(anonymous[1]) / 1000:.0f} MB")


def main() -> None:
    torch.set_num_threads(1)
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        print(f"{ROWS} pictures, {SIDE} x {SIDE}, batches of {BATCH}, {WORKERS} workers, the median of {ROUNDS} rounds")
        jpeg, raw = write_shards(folder / "jpeg", "jpeg"), write_shards(folder / "raw", "raw")
        print("JPEG")
        works: dict[str, Callable[[], Iterator[torch.Tensor]]] = {
            "ours": partial(ours, jpeg),
            "mosaicml-streaming": mosaic(folder / "mds-jpeg", "jpeg"),
            "WebDataset": tars(folder / "tars"),
            "Hugging Face datasets": hugging(folder / "hugging"),
        }
        compare(works)
        print("raw pixels")
        compare({"ours": partial(ours, raw), "mosaicml-streaming": mosaic(folder / "mds-raw", "raw")})
        print(f"at sample {FAR:,}")
        for name, shards in (("JPEG", jpeg), ("raw", raw)):
            print(f"  {name:5} first batch after {timed(ours(shards, FAR // BATCH))[1]:.3f} s")
        print("augmentation: samples per CPU second")
        for shards in (raw, jpeg):
            print(f"  {shards.name}", end="")
            augmented(shards)
        print("memory of the loader itself, after every row was read once")
        for rows in (ROWS // 4, ROWS):
            print(own_memory(write_shards(folder / f"memory-{rows}", "raw", rows)), end="")


if __name__ == "__main__":
    main()

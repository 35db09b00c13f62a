"""Start-up time of a Python worker: importing libraries, loading the model, and the first caption.

    python tests/benchmarks/bench_worker_startup.py

The benchmark treats the model's folder as network storage, so the first process on a machine copies the model to a
local disk. For bf16, this process also writes the converted weights to the disk. Each measurement starts a new process
with one thread, as Spark does. The model's files are in fact on this machine and in the page cache. On real network
storage, each machine needs additional time to read the files once.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from pipelines.config import load_model
from vlm import text
from vlm.checkpoint import save_model
from vlm.factory import build_model

ROUNDS = 5
SHAPE = ("model.decoder.transformer.depth=2", "model.vision.transformer.depth=2")
"""Config of the model: about 200 MB in fp32."""
WORKER = """
import json, sys, time
from pathlib import Path
folder, precision, begun = Path(sys.argv[1]), sys.argv[2], time.monotonic()
from PIL import Image
import pipelines.executor.caption, pipelines.worker.caption, vlm.captioner
from pipelines.executor.shared_model import load_shared_captioner
from vlm.config import Precision
times = [begun, time.monotonic()]
captioner = load_shared_captioner(folder, "", remote=True, threads=1, precision=Precision(precision))
times.append(time.monotonic())
for _ in range(2):
    captioner.caption([Image.new("RGB", (256, 256))], max_new_tokens=1)
    times.append(time.monotonic())
print(json.dumps([end - start for start, end in zip(times, times[1:])]))
"""


def main() -> None:
    """Write a model, start workers, and print the table."""
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home) / "model"
        config = load_model("base", SHAPE)
        tokenizer = text.learn(config.text, ["a large blue square above a small green star"])
        save_model(folder, build_model(config, tokenizer.vocab_size), tokenizer)
        size = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
        for precision in ("fp32", "bf16"):
            found = []
            for number in range(ROUNDS):
                for cache in (Path(home) / f"first-{precision}-{number}", Path(home) / "found"):
                    cache.mkdir(exist_ok=True)
                    command = [sys.executable, "-c", WORKER, str(folder), precision]
                    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "TMPDIR": str(cache)}
                    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
                    found.append(json.loads(done.stdout))
            print(f"{precision}, a model of {size:.0f} MB, seconds, median of {ROUNDS}")
            for name, rows in (("first on its machine", found[::2]), ("later process", found[3::2])):
                imports, load, first, second = (statistics.median(column) for column in zip(*rows, strict=True))
                print(
                    f"{name:>22}: imports {imports:5.2f}, load {load:5.2f}, first caption {first:5.2f}, "
                    f"sum {imports + load + first:5.2f}, second caption {second:5.2f}"
                )


if __name__ == "__main__":
    main()

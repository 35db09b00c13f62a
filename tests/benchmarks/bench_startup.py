"""Start-up time of a Python worker: importing libraries, copying remote weights to a local disk, and loading weights.

    python tests/benchmarks/bench_startup.py

Each measurement starts a new process with one thread, as Spark does. In this benchmark, the files are in the page
cache. If the files are on network storage, each machine needs additional time to read the files once.
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
folder, root, begun = Path(sys.argv[1]), Path(sys.argv[2]), time.monotonic()
from pipelines.executor.caption import caption_batches
from pipelines.executor.model_cache import local_copy
from pipelines.worker.caption import limit_threads, load_captioner
limit_threads(1)
imported = time.monotonic()
near = local_copy(folder, root=root)
copied = time.monotonic()
load_captioner(str(near))
print(json.dumps([imported - begun, copied - imported, time.monotonic() - copied]))
"""


def main() -> None:
    """Write a model, start workers, and print the table."""
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home) / "model"
        config = load_model("base", SHAPE)
        tokenizer = text.learn(config.text, ["a large blue square above a small green star"])
        save_model(folder, build_model(config, tokenizer.vocab_size), tokenizer)
        size = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
        found = []
        for number in range(ROUNDS):
            for copies in (Path(home) / f"first-{number}", Path(home) / "found"):
                command = [sys.executable, "-c", WORKER, str(folder), str(copies)]
                environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
                done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
                found.append(json.loads(done.stdout))
    print(f"a model of {size:.0f} MB, seconds, median of {ROUNDS}")
    for name, rows in (("first on its machine", found[::2]), ("copy is there", found[3::2])):
        imports, copy, load = (statistics.median(column) for column in zip(*rows, strict=True))
        print(
            f"{name:<22} libraries {imports:.2f}  copy {copy:.2f}  weights {load:.2f}  all {imports + copy + load:.2f}"
        )


if __name__ == "__main__":
    main()

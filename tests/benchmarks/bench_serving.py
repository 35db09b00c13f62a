"""Latency of a thousand requests to `lakesight serve` over loopback, with one client and with four clients.

    python tests/benchmarks/bench_serving.py

The model is `nano` with random weights, so every caption has the full 40 tokens. Each request contains one to four
rows. One row in five is invalid. The answer to each valid row is compared with the answer to a separate request that
contains only this row.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from pipelines.config import LocalPlatformConfig, load_model
from pipelines.platform import local

sys.path.append(str(Path(__file__).parents[1] / "support"))
from model_server import load, register_random, served
from tiny_runs import tiny_run

REQUESTS = 1000
CLIENTS = (1, 4)


def main() -> None:
    """Start a server, send requests, and print the table."""
    with tempfile.TemporaryDirectory() as home:
        os.environ["LAKESIGHT_HOME"] = home
        platform = local(LocalPlatformConfig())
        version = register_random(platform, Path(home), tiny_run(model=load_model("nano")))
        print(f"{REQUESTS} requests of 1 to 4 rows, a fifth of the rows invalid; seconds")
        started = time.monotonic()
        with served(platform, version, Path(home)) as address:
            print(f"up after {time.monotonic() - started:.1f} s")
            for clients in CLIENTS:
                load(address, 20, clients)
                started = time.monotonic()
                latencies = load(address, REQUESTS, clients)
                rate = REQUESTS / (time.monotonic() - started)
                p50, p95, p99 = np.percentile(latencies, (50, 95, 99))
                print(
                    f"{clients} clients  p50 {p50:.3f}  p95 {p95:.3f}  p99 {p99:.3f}  {rate:.1f} requests/s, no error"
                )


if __name__ == "__main__":
    main()

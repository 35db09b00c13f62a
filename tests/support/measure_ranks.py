"""Rank module that trains a run, and writes how much more memory the rank needed than a rank with a tiny model.

torchrun ... -m measure_ranks --run-dir TINY,DIR

The rank first trains the run TINY, so that torch has loaded all of its modules (among them its compiler, 110 MB). The
rank then trains the run DIR and writes two peaks of resident memory to memory-<rank>.json in this run folder. The peaks
are in bytes, minus the resident memory after the tiny run. `built` is the peak until the model is built, and `trained`
is the peak of the whole run.
"""

from __future__ import annotations

import gc
import json
import re
import sys
from pathlib import Path

import torch
from torch import distributed

from pipelines.formats.run_folder import RunFolder
from pipelines.worker.rank.env import RankEnv
from pipelines.worker.rank.failure import RankMonitor
from pipelines.worker.rank.group import process_group
from pipelines.worker.rank.metrics import open_log
from pipelines.worker.train.trainer import Trainer


def memory(name: str) -> int:
    """Return VmRSS or VmHWM (peak of VmRSS) of this process, in bytes."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def main() -> None:
    env = RankEnv.from_environment()
    tiny, run = (RunFolder(Path(path)) for path in sys.argv[sys.argv.index("--run-dir") + 1].split(","))
    open_log(run, env.rank)
    with process_group(env, torch.device("cpu"), timeout_seconds=300):
        start(tiny, env).train()
        distributed.barrier()
        gc.collect()
        empty = memory("VmRSS")
        reset_peak()
        trainer = start(run, env)
        built = memory("VmHWM") - empty
        reset_peak()
        trainer.train()
        trainer.checkpoints.wait()
        found = {"built": built, "trained": memory("VmHWM") - empty}
        (run.path / f"memory-{env.rank}.json").write_text(json.dumps(found))
        distributed.barrier()


def start(run: RunFolder, env: RankEnv) -> Trainer:
    return Trainer.build(run, run.read_run(), env, RankMonitor(run, env.rank), torch.device("cpu"))


if __name__ == "__main__":
    main()

"""The entry of a rank: `run_rank(run_dir)`, or under plain torchrun, on a machine without Java:

    torchrun --nproc-per-node 2 -m pipelines.worker.main --run-dir DIR

Everything a rank needs is in the run folder and in what torchrun puts into the environment. The watch over the rank
opens before torch is imported, so that a broken installation is on record too.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pipelines.formats.run_folder import RunDir
from pipelines.worker.rank.env import Place
from pipelines.worker.rank.failure import Watch
from pipelines.worker.rank.metrics import open_log


def run_rank(run_dir: str) -> None:
    """Train as one rank of the run in `run_dir`, from its last checkpoint to its end.

    Raises:
        LakesightError, RuntimeError, ...: whatever went wrong, after it is in failures/rank-N.json.
    """
    run, place = RunDir(Path(run_dir)), Place.from_environment()
    open_log(run, place.rank)
    with Watch(run, place.rank) as watch:
        from pipelines.worker.train.learner import train

        train(run, place, watch)


def main() -> None:
    """Parse --run-dir and run."""
    parser = argparse.ArgumentParser(prog="pipelines.worker.main", description=run_rank.__doc__)
    parser.add_argument("--run-dir", required=True, help="the run folder, with run.json and tokenizer.json in it")
    run_rank(parser.parse_args().run_dir)


if __name__ == "__main__":
    main()

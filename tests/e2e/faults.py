"""Ranks that go wrong on request: the fault is in fault.json of the run folder, production code knows nothing of it.

torchrun ... -m faults --run-dir DIR        or, as a launcher's entry:  faulty_rank
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Literal

from pipelines.driver.launch import run_rank
from pipelines.rundir import RunDir, read_json, write_json
from vlm.config import Config


class Fault(Config):
    """What goes wrong, in which rank, once the run has a checkpoint."""

    kind: Literal["raise", "kill", "exit", "leave", "hang"]
    rank: int


def faulty_rank(run_dir: str) -> None:
    """`run_rank`, and the fault if it is this rank's."""
    fault = read_json(Path(run_dir) / "fault.json", Fault)
    if fault.rank == int(os.environ["RANK"]):
        signal.signal(signal.SIGUSR1, lambda *_: time.sleep(3600))
        threading.Thread(target=_strike, args=(fault, RunDir(Path(run_dir))), daemon=True).start()
    run_rank(run_dir)


def _strike(fault: Fault, run: RunDir) -> None:
    while not run.finished_checkpoints():
        time.sleep(0.01)
    write_json(run.path / "struck.json", {"time": time.time()})
    match fault.kind:
        case "raise":
            _raise_in_main_thread(ValueError)
        case "leave":
            _raise_in_main_thread(SystemExit)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "exit":
            os._exit(0)
        case "hang":
            os.kill(os.getpid(), signal.SIGUSR1)


def _raise_in_main_thread(kind: type[BaseException]) -> None:
    thread = ctypes.c_ulong(threading.main_thread().ident or 0)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(kind))


if __name__ == "__main__":
    faulty_rank(sys.argv[sys.argv.index("--run-dir") + 1])

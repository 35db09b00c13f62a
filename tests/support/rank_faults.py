"""Ranks that fail on request of a test. The file fault.json in the run folder describes the fault.

A test runs `torchrun ... -m rank_faults --run-dir DIR`, or passes `faulty_rank` to `launch` as the function of a rank.

The faults are real, not simulated: for example a signal, a kernel limit, or changed bytes in a file. A fault is
triggered immediately before the rank calls a certain function.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from pipelines.driver.train.launch import run_rank
from pipelines.formats.run_folder import RunFolder, read_json, write_json
from vlm.config import Config

Kind = Literal[
    "raise",
    "leave",
    "exit",
    "kill",
    "stop",
    "hang",
    "deaf",
    "nan",
    "inf",
    "out_of_memory",
    "disk_full",
    "shards_cut",
    "shards_garbled",
    "executor_lost",
]


class Fault(Config):
    """A fault that makes one rank fail: when the rank starts, in a step, or while a checkpoint is written.

    Attributes:
        step: number of the step that fails, counted from 0, or None for the first step after a finished checkpoint.
        always: whether the fault is triggered in every attempt of the run; otherwise only in the first attempt.
    """

    kind: Kind
    rank: int
    place: Literal["start", "step", "checkpoint"] = "step"
    step: int | None = None
    always: bool = False


def faulty_rank(run_dir: str) -> None:
    """Call `run_rank`, and trigger the fault in fault.json if the fault is for this rank."""
    import pipelines.worker.train.checkpoints as checkpoints
    import pipelines.worker.train.initial_weights as writing
    import pipelines.worker.train.run as training
    import vlm.training.loop as loop

    run = RunFolder(Path(run_dir))
    fault, rank = read_json(run.path / "fault.json", Fault), int(os.environ["RANK"])
    struck = run.path / "struck.json"
    processes = run.path / "processes" / str(rank)
    processes.parent.mkdir(exist_ok=True)
    processes.write_text(f"{os.getpid()} {os.getppid()}")
    if fault.always or not struck.exists():
        if fault.rank == rank and fault.place == "start":
            before(training, "pick_device", lambda *args: strike(fault, run))
        elif fault.rank == rank == 0 and fault.place == "checkpoint":
            checkpoints.WRITE_SECONDS = 5.0  # a write that hangs counts as progress for an hour
            before(writing, "save_state", lambda *args: strike(fault, run) if run.finished_checkpoints() else None)
        elif fault.rank == rank:
            steps = iter(range(10**9))
            before(
                loop, "token_loss", lambda *args: strike(fault, run, *args) if due(fault, run, next(steps)) else None
            )
        elif rank == 0 and fault.place == "checkpoint":
            # The fault is for a rank other than 0. Rank 0 waits with its checkpoint until the fault is triggered.
            before(writing, "save_state", lambda *args: wait_for(struck.exists) if run.finished_checkpoints() else None)
    run_rank(run_dir)


def slow_rank(run_dir: str) -> None:
    """Call `run_rank`, with a pause of two seconds before the generation of each sample caption."""
    import pipelines.worker.train.validation as validation

    before(validation, "generate", lambda *args: time.sleep(2))
    run_rank(run_dir)


def before(module: ModuleType, name: str, act: Callable[..., object]) -> None:
    """Replace a function of a module by a wrapper that calls an action first."""
    original = getattr(module, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        act(*args)
        return original(*args, **kwargs)

    setattr(module, name, wrapped)


def wait_for(happened: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not happened() and time.monotonic() < deadline:
        time.sleep(0.01)


def due(fault: Fault, run: RunFolder, step: int) -> bool:
    if fault.place == "checkpoint":
        return bool(run.finished_checkpoints()) and any(run.checkpoints.glob(".step_*.tmp"))
    return bool(run.finished_checkpoints()) if fault.step is None else step == fault.step


def strike(fault: Fault, run: RunFolder, *args: Any) -> None:
    write_json(run.path / "struck.json", {"time": time.time(), "pid": os.getpid()})
    match fault.kind:
        case "raise":
            raise ValueError("poison")
        case "leave":
            sys.exit(3)
        case "exit":
            os._exit(0)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "hang":
            time.sleep(3600)
        case "deaf":
            hold_the_interpreter()
        case "nan":
            args[0].data.fill_(float("nan"))
        case "inf":
            answers = args[1].labels_BT[args[1].labels_BT >= 0]
            args[0].data[0, answers[0]] = float("-inf")
        case "out_of_memory":
            import torch

            torch.empty(2**50)
        case "disk_full":
            resource.setrlimit(resource.RLIMIT_FSIZE, (8_000 if fault.rank == 0 else 0, resource.RLIM_INFINITY))
        case "shards_cut" | "shards_garbled":
            for path in Path(run.read_run().train_shards).glob("*.arrow"):
                with path.open("r+b") as file:
                    if fault.kind == "shards_cut":
                        file.truncate(0)
                    else:
                        file.write(b"\xff" * path.stat().st_size)
        case "executor_lost":
            os.kill(executor(), signal.SIGKILL)
            time.sleep(3600)


def hold_the_interpreter() -> None:
    """Block in C code with the interpreter lock held, so that no Python thread and no Python signal handler can run."""
    import ctypes

    library, lock = ctypes.PyDLL(None), ctypes.create_string_buffer(128)
    for _ in range(2):
        library.pthread_mutex_lock(lock)


def executor() -> int:
    """Return the process id of the executor JVM that started this rank's launcher."""
    pid = os.getpid()
    while "CoarseGrainedExecutorBackend" not in Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " "):
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return pid


if __name__ == "__main__":
    faulty_rank(sys.argv[sys.argv.index("--run-dir") + 1])

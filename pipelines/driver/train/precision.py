"""Choice of the number format of a training run with `train.precision: auto`."""

from __future__ import annotations

import json
import logging
import platform as this_machine
import subprocess
import sys
from pathlib import Path

from pipelines.child_process import child_environment
from pipelines.config import RunConfig
from pipelines.errors import UserError
from pipelines.executor.host_info import describe_host
from pipelines.platform import Platform
from vlm.config import Config
from vlm.files import atomic_write, read_json

log = logging.getLogger(__name__)

MIN_RATIO = 1.2
"""`auto` chooses bf16 if the time of a step in fp32 is at least this number of times the time of a step in bf16."""
MEASURE_SECONDS = 300.0
CPU_INFO = Path("/proc/cpuinfo")


class Measured(Config):
    """Seconds that a training step takes in each number format on a device."""

    device: str
    fp32: float
    bf16: float

    @property
    def choice(self) -> str:
        """Number format that `auto` stands for."""
        return "bf16" if self.fp32 >= MIN_RATIO * self.bf16 else "fp32"


def choose_precision(config: RunConfig, platform: Platform) -> RunConfig:
    """Return the config with `bf16` or `fp32` in place of the precision `auto`.

    The first run on a kind of processor or GPU measures both formats. The file precision.json in the home folder keeps
    the result, because another measurement could differ by chance. With a different format, the same command would
    start a different run.

    Raises:
        UserError: the ranks use GPUs, and the driver has no GPU on which to measure.
    """
    if config.train.precision != "auto":
        return config
    path, device = platform.root / "precision.json", _device(platform)
    known = read_json(path) if path.exists() else {}
    if device not in known:
        known[device] = _measure("cuda" if platform.launch.use_gpu else "cpu").model_dump()
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(known, indent=2), encoding="utf-8")
    found = Measured.model_validate(known[device])
    log.info(
        "train.precision auto is %s: on %s, a training step of a small model takes %.0f ms in fp32 and %.0f ms in bf16",
        *(found.choice, device, 1e3 * found.fp32, 1e3 * found.bf16),
    )
    train = config.train.model_copy(update={"precision": found.choice})
    return config.model_copy(update={"train": train})


def _device(platform: Platform) -> str:
    """Return the name of the driver's GPU or processor."""
    if platform.launch.use_gpu:
        gpus = describe_host()["gpus"]
        if not isinstance(gpus, list) or not gpus:
            raise UserError(
                "the number format of training cannot be measured",
                where="train.precision=auto",
                got="the ranks use GPUs, but the driver has no GPU",
                fix="choose the number format, for example with --set train.precision=bf16",
            )
        return str(gpus[0])
    lines = CPU_INFO.read_text(encoding="utf-8").splitlines() if CPU_INFO.exists() else []
    models = [line for line in lines if line.startswith("model name")]
    return models[0].partition(":")[2].strip() if models else f"{this_machine.machine()} {this_machine.processor()}"


def _measure(device: str) -> Measured:
    command = [sys.executable, "-P", "-m", "pipelines.worker.measure_precision", device]
    done = subprocess.run(  # noqa: S603 (our own command)
        command, env=child_environment(), capture_output=True, text=True, timeout=MEASURE_SECONDS, check=False
    )
    if done.returncode:
        raise UserError(
            "the number format of training cannot be measured",
            where="train.precision=auto",
            got=done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit code {done.returncode}",
            fix="choose the number format, for example with --set train.precision=fp32",
        )
    return Measured.model_validate_json(done.stdout.splitlines()[-1])

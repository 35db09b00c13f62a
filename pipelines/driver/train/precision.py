"""Choice of the number format of a training run with `train.precision: auto`."""

from __future__ import annotations

import logging
import platform as this_machine
import subprocess
import sys
from functools import partial
from pathlib import Path

from pydantic import TypeAdapter

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
"""Time, in seconds, after which a measurement counts as failed."""
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


MEASURED = TypeAdapter(dict[str, Measured])
"""Content of precision.json: the measurement of each device, by name of the device."""


def with_each_precision(config: RunConfig) -> list[RunConfig]:
    """Return the config with each of the number formats that `auto` may stand for."""
    return [_with_precision(config, name) for name in ("fp32", "bf16")]


def choose_precision(config: RunConfig, platform: Platform) -> RunConfig:
    """Return the config with `bf16` or `fp32` in place of the precision `auto`.

    The first run on a kind of processor or GPU measures both formats. The file precision.json in the home folder keeps
    the result, because another measurement could differ by chance. With a different format, the same command would
    start a different run.

    Raises:
        UserError: the measurement fails or takes too long, or the ranks use GPUs, and the driver has no GPU on which to
            measure.
    """
    if config.train.precision != "auto":
        return config
    path, device = platform.root / "precision.json", describe_device(platform)
    if (found := _read_measured(path).get(device)) is None:
        measured = _measure("cuda" if platform.launch.use_gpu else "cpu")
        known = _read_measured(path)  # another run may have measured in the meantime
        found = known.setdefault(device, measured)
        with atomic_write(path) as temporary:
            temporary.write_text(MEASURED.dump_json(known, indent=2).decode(), encoding="utf-8")
    log.info(
        "train.precision auto is %s: on %s, a training step of a small model takes %.0f ms in fp32 and %.0f ms in bf16",
        *(found.choice, device, 1e3 * found.fp32, 1e3 * found.bf16),
    )
    return _with_precision(config, found.choice)


def _with_precision(config: RunConfig, name: str) -> RunConfig:
    return config.model_copy(update={"train": config.train.model_copy(update={"precision": name})})


def _read_measured(path: Path) -> dict[str, Measured]:
    """Read the measurements by name of the device. If the file is damaged, log this and return an empty dict."""
    try:
        return MEASURED.validate_python(read_json(path)) if path.exists() else {}
    except ValueError as error:
        log.warning("the number format is measured again, because %s is damaged: %s", path, str(error).splitlines()[0])
        return {}


def describe_device(platform: Platform) -> str:
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
    failed = partial(
        UserError,
        "the number format of training cannot be measured",
        where="train.precision=auto",
        fix="choose the number format, for example with --set train.precision=fp32",
    )
    try:
        done = subprocess.run(  # noqa: S603 (our own command)
            command, env=child_environment(), capture_output=True, text=True, timeout=MEASURE_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise failed(got=f"the measurement took longer than {MEASURE_SECONDS:g} seconds") from None
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise failed(got=said[-1] if said else f"exit code {done.returncode}")
    return Measured.model_validate_json(done.stdout.splitlines()[-1])

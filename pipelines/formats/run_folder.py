"""Layout of a run folder, and functions that read and atomically write its files.

The run folder is the only interface between the driver and the ranks. The driver writes the inputs of the ranks (such
as `run.json`), the launcher's log, and files for later drivers (such as `tracking.json`). Ranks write all other files,
and `result.json` last. A JSON file is written atomically: it is created under a temporary name and then renamed.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from pydantic import Field, ValidationError

from pipelines.config import RunConfig
from pipelines.errors import UserError
from pipelines.formats.training_code import TrainingCode
from vlm.config import Config, read_error_message
from vlm.files import atomic_write

T = TypeVar("T", bound=Config)


class RunFile(Config):
    """run.json: the resolved run and the paths of the shards. The driver writes this file before it starts ranks.

    Attributes:
        train_shards: folder of the training shards, relative to the run folder if both are in the same home folder
            (`RunFolder.shard_folder`).
        validate_shards: folder of the validation shards.
        code_version: release of Lakesight that trains the run.
        code: version of the code that trains the run; null in a run.json that Lakesight 0.1.0 wrote.
        earlier_code: digests of the earlier code versions that trained this run (releases if there is no digest).
    """

    config: RunConfig
    code_version: str
    code: TrainingCode | None = None
    earlier_code: tuple[str, ...] = ()
    train_shards: str
    validate_shards: str
    dataset_version: int
    content_hash: str
    world_size: int

    def code_tags(self) -> dict[str, str]:
        """Return the MLflow tags that identify the training code. Tags without a value are left out."""
        tags = {
            "code_version": self.code_version,
            "code_digest": self.code.digest if self.code else "",
            "code_commit": self.code.commit if self.code else "",
            "code_earlier": ", ".join(self.earlier_code),
        }
        return {name: value for name, value in tags.items() if value}


class RankFile(Config):
    """ranks/rank-N.json: host and process of a rank. The rank writes this file when it starts and when it finishes."""

    rank: int
    host: str
    pid: int
    started_at: float
    start_ticks: int = 0
    """Start time of the process, in clock ticks since the boot of the host; 0 if the start time is not known."""
    ended: bool = False
    """Whether the rank finished normally. A rank that was killed leaves no failure record, either."""


class Host(Config):
    """Hardware and software that a rank's Python interpreter finds on its host. A value that is not known is empty."""

    name: str
    cores: int = 0
    memory_bytes: int = 0
    executable: str = ""
    python: str = ""
    packages: dict[str, str]
    """Version of each Python distribution by name: empty if it is not installed, `unknown` if it has no metadata."""
    cuda: str = ""
    """CUDA version that torch was built with."""
    nccl: str = ""
    driver: str = ""
    """Version of the GPU driver, or the error message of nvidia-smi."""
    gpus: tuple[str, ...] = ()
    """Name of each GPU of the host."""
    code: str = ""
    """Digest of the training code on this host (`TrainingCode.digest`)."""


class HostsFile(Config):
    """hosts.json: hosts of the ranks, one entry per Python interpreter. The file is written before the ranks start."""

    hosts: tuple[Host, ...]


class Heartbeat(NamedTuple):
    """Number of steps that a rank has taken, and the time of the heartbeat in seconds since the epoch."""

    step: int
    time: float


class Failure(Config):
    """failures/rank-N.json: record of a rank that failed or was terminated. The rank itself writes this file."""

    rank: int
    host: str
    pid: int
    exception: str
    message: str
    traceback: str
    step: int
    failed_at: float
    consequence: bool
    """True when another rank, the launcher or an interrupt caused this failure (e.g. lost connection or SIGTERM)."""
    waiting: bool = False
    """True when the rank was terminated while it waited for other ranks."""
    permanent: bool = Field(default=False, alias="lasting")
    """True when a restart would fail in the same way until a setting, folder or file is corrected."""


class Result(Config):
    """result.json: result of a finished run. Rank 0 writes this file last."""

    status: Literal["ok"]
    step: int
    world_size: int
    checkpoint: str
    metrics: dict[str, float]
    seconds: float
    best_checkpoint: str = ""
    """Path of the best checkpoint by `train.best_by`; empty in a result that Lakesight 0.1.0 wrote."""


class Metrics(Config):
    """metrics/<step>.json: metrics logged at one step."""

    step: int
    time: float
    values: dict[str, float]
    expert_load: dict[str, tuple[float, ...]] = Field(default_factory=dict)
    """Share of the step's tokens that each expert received, by layer name; empty for a model without experts."""

    @property
    def points(self) -> dict[str, float]:
        """All values of the step by MLflow metric name, including the share of the tokens that each expert received."""
        load = {
            f"expert_load/{layer}.expert_{expert}": share
            for layer, shares in self.expert_load.items()
            for expert, share in enumerate(shares)
        }
        return self.values | load


class CaptionSample(Config):
    """One captioned picture or continued text: index of its row in the validation data, text of the row, and the text
    of the model."""

    row: int
    image_id: str
    text: str
    caption: str


class CaptionSamples(Config):
    """samples/<step>.json: the model's captions of a few validation pictures, or continuations of validation texts."""

    step: int
    samples: tuple[CaptionSample, ...]


def step_of(checkpoint: Path) -> int:
    """Parse the step from the name of a complete checkpoint folder."""
    return int(checkpoint.name.removeprefix("step_"))


@dataclass(frozen=True)
class RunFolder:
    """Paths of the files in a run folder, and methods that read these files."""

    path: Path

    @property
    def run_file(self) -> Path:
        """Path of run.json, which describes the resolved run (`RunFile`)."""
        return self.path / "run.json"

    @property
    def tokenizer(self) -> Path:
        """Path of tokenizer.json."""
        return self.path / "tokenizer.json"

    @property
    def cider(self) -> Path:
        """Path of cider.json, which exists only in runs with self-critical training."""
        return self.path / "cider.json"

    @property
    def result(self) -> Path:
        """Path of result.json. A run has succeeded only if result.json exists and has the status "ok"."""
        return self.path / "result.json"

    @property
    def tracking(self) -> Path:
        """Path of tracking.json, which names the MLflow run that a resumed training run continues."""
        return self.path / "tracking.json"

    @property
    def unregistered(self) -> Path:
        """Path of the file `unregistered`, which exists from the start of training until the model is registered."""
        return self.path / "unregistered"

    @property
    def launcher(self) -> Path:
        """Path of launcher.json, the lease of the process that trains the run (see `run_owner`)."""
        return self.path / "launcher.json"

    @property
    def owner_lock(self) -> Path:
        """Path of the file whose lock the training process holds. The file is deleted only with the run folder."""
        return self.path / "owner.lock"

    @property
    def hosts(self) -> Path:
        """Path of hosts.json, the hardware and software of the ranks' hosts."""
        return self.path / "hosts.json"

    @property
    def checkpoints(self) -> Path:
        """Folder of all checkpoints, with one subfolder such as step_000100/ for each checkpoint."""
        return self.path / "checkpoints"

    @property
    def failures(self) -> Path:
        """Folder of the failure records."""
        return self.path / "failures"

    @property
    def profile(self) -> Path:
        """Path of the profiler trace that rank 0 writes if `train.profile_steps` is set."""
        return self.path / "profile" / "rank-0.json.gz"

    @property
    def launcher_log(self) -> Path:
        """Path of the launcher's log: output of torchrun, and output of each rank before the rank opens its own log."""
        return self.path / "logs" / "launcher.log"

    def shard_folder(self, stored: str) -> Path:
        """Return the shard folder that run.json names.

        The home folder may have been moved or copied after run.json was written. Shards in the home folder of this run
        are therefore preferred to the path in run.json.
        """
        beside = self.path.parent.parent / "shards" / Path(stored).name
        return beside if beside.is_dir() else self.path / stored

    def metrics(self, step: int) -> Path:
        """Path of the metric file of a step. The step in the file name has ten digits, so file names sort by step."""
        return self.path / "metrics" / f"{step:010d}.json"

    def samples(self, step: int) -> Path:
        """Path of the file with the sample captions of a step after which the model was validated."""
        return self.path / "samples" / f"{step:010d}.json"

    def heartbeat(self, rank: int) -> Path:
        """Path of the rank's heartbeat file, which contains one line: the step, a space and the time."""
        return self.path / "heartbeat" / f"rank-{rank}"

    def rank(self, rank: int) -> Path:
        """Path of the rank's RankFile."""
        return self.path / "ranks" / f"rank-{rank}.json"

    def failure(self, rank: int) -> Path:
        """Path of the rank's failure record."""
        return self.failures / f"rank-{rank}.json"

    def stacks(self, rank: int) -> Path:
        """Path of the file with the stack traces of all threads of a failed rank."""
        return self.failures / f"rank-{rank}.stacks.txt"

    def log(self, rank: int) -> Path:
        """Path of the file with the complete log of a rank."""
        return self.path / "logs" / f"rank-{rank}.log"

    def checkpoint(self, step: int) -> Path:
        """Path of the checkpoint folder of a step."""
        return self.checkpoints / f"step_{step:06d}"

    def finished_checkpoints(self) -> list[Path]:
        """List the folders of complete checkpoints, oldest first. Only a complete folder has the name step_N."""
        found = [p for p in self.checkpoints.glob("step_*") if p.name.removeprefix("step_").isdigit()]
        return sorted(found, key=step_of)

    def last_checkpoint_step(self) -> int:
        """Return the step of the newest complete checkpoint, or 0 if the run has no complete checkpoint."""
        return max(map(step_of, self.finished_checkpoints()), default=0)

    def damaged_checkpoints(self) -> list[Path]:
        """List the checkpoint folders that were renamed because a resuming rank found the checkpoints damaged."""
        return sorted(self.checkpoints.glob("damaged_step_*"))

    def mark_damaged(self, checkpoint: Path) -> None:
        """Rename a damaged checkpoint to damaged_step_N, so that no run resumes from it. The files are not deleted."""
        renamed = checkpoint.with_name(f"damaged_{checkpoint.name}")
        shutil.rmtree(renamed, ignore_errors=True)
        checkpoint.replace(renamed)

    def read_run(self) -> RunFile:
        """Read run.json.

        Raises:
            UserError: the file run.json is missing or does not describe a run.
        """
        return read_json(self.run_file, RunFile)

    def read_failures(self) -> list[Failure]:
        """Read all failure records, earliest first."""
        return sorted((read_json(p, Failure) for p in self.failures.glob("rank-*.json")), key=lambda f: f.failed_at)

    def read_ranks(self) -> list[RankFile]:
        """Read the RankFile of every rank that has started, ordered by rank."""
        return sorted((read_json(p, RankFile) for p in (self.path / "ranks").glob("rank-*.json")), key=lambda r: r.rank)

    def read_heartbeat(self, rank: int) -> Heartbeat | None:
        """Read a rank's heartbeat, or return None if the rank has not written a heartbeat yet."""
        try:
            step, seconds = self.heartbeat(rank).read_text(encoding="ascii").split()
        except FileNotFoundError:
            return None
        return Heartbeat(int(step), float(seconds))

    def archive_attempt(self) -> None:
        """Move the files of the last attempt, such as rank files, logs and failure records, to the folder attempts/N.

        Checkpoints, metrics and sample captions are not moved, because a restarted run continues with these files.
        """
        names = ("failures", "ranks", "heartbeat", "logs", "hosts.json", "result.json")
        found = [path for name in names if (path := self.path / name).exists()]
        if found:
            attempts = self.path / "attempts"
            folder = attempts / str(1 + len(list(attempts.glob("*"))))
            folder.mkdir(parents=True)
            for path in found:
                path.replace(folder / path.name)

    def read_metrics(self, after: int = -1) -> Iterator[Metrics]:
        """Read the metrics of all steps that come after step `after`, in step order."""
        for path in sorted((self.path / "metrics").glob("[0-9]*.json")):
            if int(path.stem) > after:
                yield read_json(path, Metrics)

    def read_samples(self, after: int = -1) -> Iterator[CaptionSamples]:
        """Read the sample captions of all steps that come after step `after`, in step order."""
        for path in sorted((self.path / "samples").glob("[0-9]*.json")):
            if int(path.stem) > after:
                yield read_json(path, CaptionSamples)


def write_json(path: Path, content: Config | dict[str, Any]) -> None:
    """Write a JSON file atomically. Create the folder of the file if the folder does not exist."""
    if isinstance(content, Config):
        text = content.model_dump_json(indent=2, by_alias=True)
    else:
        text = json.dumps(content, indent=2)
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: Path, kind: type[T]) -> T:
    """Read and validate a file written by `write_json`.

    Raises:
        UserError: the file is missing, or its content does not fit `kind`.
    """
    try:
        return kind.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path.name} is missing", where=str(path.parent), fix="give the path of a run folder"
        ) from None
    except ValidationError as error:
        raise UserError(
            f"{path.name} does not contain a valid {kind.__name__}",
            where=str(path),
            got=read_error_message(error, kind),
            fix="restore the file, which somebody edited or another version of Lakesight wrote; or start a new run",
        ) from None


def write_heartbeat(run: RunFolder, rank: int, step: int) -> None:
    """Write the rank's heartbeat: the number of steps taken and the current time."""
    with atomic_write(run.heartbeat(rank), sync=False) as temporary:
        temporary.write_text(f"{step} {time.time():.3f}", encoding="ascii")

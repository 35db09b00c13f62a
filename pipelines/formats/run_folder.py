"""The layout of a run folder, and the atomic write and read of each file in it.

A run leaves the driver as this folder and comes back as this folder: the driver writes `run.json` before launch, ranks
write everything else, `result.json` comes last. Every JSON file appears whole or not at all (temporary name, rename).
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
from vlm.config import Config, read_error_message
from vlm.files import atomic_write

T = TypeVar("T", bound=Config)


class RunFile(Config):
    """run.json: all a rank needs besides the files it names. Written by the driver before launch."""

    config: RunConfig
    code_version: str
    train_shards: str
    validate_shards: str
    dataset_version: int
    content_hash: str
    world_size: int


class RankFile(Config):
    """ranks/rank-N.json: who a rank is, written when it starts, and again when it has done all it had to do."""

    rank: int
    host: str
    pid: int
    started_at: float
    ended: bool = False
    """True after a clean end; a rank that has neither this nor a failure record was killed or left without a word."""


class LauncherFile(Config):
    """launcher.json: the process that is training the run, for as long as it does."""

    host: str
    pid: int


class Host(Config):
    """An interpreter that ranks run in, and its machine. What is not there is empty."""

    name: str
    cores: int = 0
    memory_bytes: int = 0
    executable: str = ""
    python: str = ""
    packages: dict[str, str]
    """Version by distribution; of one that is missing, empty."""
    cuda: str = ""
    """What torch was built with."""
    nccl: str = ""
    driver: str = ""
    """Of the GPUs; its error where it does not answer."""
    gpus: tuple[str, ...] = ()
    """Names of all that the machine has."""


class HostsFile(Config):
    """hosts.json: where the ranks of an attempt run, each interpreter once. Written by the driver before they start."""

    hosts: tuple[Host, ...]


class Heartbeat(NamedTuple):
    """Last sign of life of a rank."""

    step: int
    time: float


class Failure(Config):
    """failures/rank-N.json: how a rank ended that did not end well."""

    rank: int
    host: str
    pid: int
    exception: str
    message: str
    traceback: str
    step: int
    failed_at: float
    consequence: bool
    """True when the rank was only told of another rank's death (lost connection, SIGTERM): not the root."""
    waiting: bool = False
    """True when it was ended from outside while it waited for other ranks."""
    lasting: bool = False
    """True when the same run would end here again: a setting, a folder or a file has to be put right first."""


class Result(Config):
    """result.json: written last, by rank 0."""

    status: Literal["ok"]
    step: int
    world_size: int
    checkpoint: str
    metrics: dict[str, float]
    seconds: float
    best_checkpoint: str = ""
    """The one with the lowest validation loss, of those whose step was validated; results of before do not tell."""


class Metrics(Config):
    """metrics/<step>.json: one log step."""

    step: int
    time: float
    values: dict[str, float]
    expert_load: dict[str, tuple[float, ...]] = Field(default_factory=dict)
    """By layer, the share of each expert in the tokens of the step; empty for a model without experts."""

    @property
    def points(self) -> dict[str, float]:
        """Every number of the step by the name it has in MLflow."""
        load = {
            f"expert_load/{layer}.expert_{expert}": share
            for layer, shares in self.expert_load.items()
            for expert, share in enumerate(shares)
        }
        return self.values | load


class CaptionSample(Config):
    """One picture of a samples file: its row in the validation shards, what it should say, what the model says."""

    row: int
    image_id: str
    text: str
    caption: str


class CaptionSamples(Config):
    """samples/<step>.json: what the model says about a few validation pictures."""

    step: int
    samples: tuple[CaptionSample, ...]


def step_of(checkpoint: Path) -> int:
    """The step of a complete checkpoint folder."""
    return int(checkpoint.name.removeprefix("step_"))


@dataclass(frozen=True)
class RunDir:
    """Paths and files of one run folder."""

    path: Path

    @property
    def run(self) -> Path:
        """The resolved run, written by the driver."""
        return self.path / "run.json"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer, written by the driver."""
        return self.path / "tokenizer.json"

    @property
    def result(self) -> Path:
        """Written last, by rank 0; its presence with status ok is the only proof of success."""
        return self.path / "result.json"

    @property
    def tracking(self) -> Path:
        """Id of the MLflow run, so that a resumed run goes on in it."""
        return self.path / "tracking.json"

    @property
    def launcher(self) -> Path:
        """Who is training the run at the moment."""
        return self.path / "launcher.json"

    @property
    def hosts(self) -> Path:
        """What the hosts of the ranks are and have."""
        return self.path / "hosts.json"

    @property
    def checkpoints(self) -> Path:
        """step_000100/ folders."""
        return self.path / "checkpoints"

    @property
    def failures(self) -> Path:
        """rank-N.json of ranks that failed."""
        return self.path / "failures"

    @property
    def profile(self) -> Path:
        """Trace of some of rank 0's steps, where one was asked for."""
        return self.path / "profile" / "rank-0.json.gz"

    @property
    def launcher_log(self) -> Path:
        """What the launcher printed: torchrun's own words, and a rank's before it opened its log."""
        return self.path / "logs" / "launcher.log"

    def metrics(self, step: int) -> Path:
        """One log step; the names sort by step."""
        return self.path / "metrics" / f"{step:010d}.json"

    def samples(self, step: int) -> Path:
        """Sample captions of one validation."""
        return self.path / "samples" / f"{step:010d}.json"

    def heartbeat(self, rank: int) -> Path:
        """Step and time of the rank's last sign of life."""
        return self.path / "heartbeat" / f"rank-{rank}"

    def rank(self, rank: int) -> Path:
        """Who the rank is."""
        return self.path / "ranks" / f"rank-{rank}.json"

    def failure(self, rank: int) -> Path:
        """How the rank failed."""
        return self.failures / f"rank-{rank}.json"

    def stacks(self, rank: int) -> Path:
        """Where each thread of the rank was when it failed or was ended."""
        return self.failures / f"rank-{rank}.stacks.txt"

    def log(self, rank: int) -> Path:
        """The rank's full log."""
        return self.path / "logs" / f"rank-{rank}.log"

    def checkpoint(self, step: int) -> Path:
        """The checkpoint folder of a step."""
        return self.checkpoints / f"step_{step:06d}"

    def finished_checkpoints(self) -> list[Path]:
        """Complete checkpoint folders, oldest first (a folder gets its name when it is complete)."""
        found = [p for p in self.checkpoints.glob("step_*") if p.name.removeprefix("step_").isdigit()]
        return sorted(found, key=step_of)

    def checkpointed_step(self) -> int:
        """The step of the newest complete checkpoint; 0 where there is none."""
        return max(map(step_of, self.finished_checkpoints()), default=0)

    def damaged_checkpoints(self) -> list[Path]:
        """Folders that a resuming rank has found damaged and put aside."""
        return sorted(self.checkpoints.glob("damaged_step_*"))

    def put_aside(self, checkpoint: Path) -> None:
        """Take a damaged checkpoint out of the finished ones; it stays to be looked at."""
        aside = checkpoint.with_name(f"damaged_{checkpoint.name}")
        shutil.rmtree(aside, ignore_errors=True)
        checkpoint.replace(aside)

    def read_run(self) -> RunFile:
        """run.json.

        Raises:
            UserError: it is missing or not a run.
        """
        return read_json(self.run, RunFile)

    def read_failures(self) -> list[Failure]:
        """Failure records, earliest first."""
        return sorted((read_json(p, Failure) for p in self.failures.glob("rank-*.json")), key=lambda f: f.failed_at)

    def read_ranks(self) -> list[RankFile]:
        """Ranks that have started, by number."""
        return sorted((read_json(p, RankFile) for p in (self.path / "ranks").glob("rank-*.json")), key=lambda r: r.rank)

    def read_heartbeat(self, rank: int) -> Heartbeat | None:
        """Last sign of life of a rank, None before its first."""
        try:
            step, seconds = self.heartbeat(rank).read_text(encoding="ascii").split()
        except FileNotFoundError:
            return None
        return Heartbeat(int(step), float(seconds))

    def set_aside(self) -> None:
        """Move what an earlier attempt left about its ranks to attempts/N, so that a new one starts without a past.

        Checkpoints, metrics and samples stay: they belong to the run, whichever attempt wrote them.
        """
        names = ("failures", "ranks", "heartbeat", "logs", "hosts.json", "result.json")
        left = [path for name in names if (path := self.path / name).exists()]
        if left:
            attempts = self.path / "attempts"
            folder = attempts / str(1 + len(list(attempts.glob("*"))))
            folder.mkdir(parents=True)
            for path in left:
                path.replace(folder / path.name)

    def read_metrics(self, after: int = -1) -> Iterator[Metrics]:
        """Log steps beyond `after`, in order."""
        for path in sorted((self.path / "metrics").glob("[0-9]*.json")):
            if int(path.stem) > after:
                yield read_json(path, Metrics)

    def read_samples(self, after: int = -1) -> Iterator[CaptionSamples]:
        """Sample captions beyond step `after`, in order."""
        for path in sorted((self.path / "samples").glob("[0-9]*.json")):
            if int(path.stem) > after:
                yield read_json(path, CaptionSamples)


def write_json(path: Path, content: Config | dict[str, Any]) -> None:
    """Write a file whole or not at all; the folder is created."""
    text = (
        content.model_dump_json(indent=2, by_alias=True)
        if isinstance(content, Config)
        else json.dumps(content, indent=2)
    )
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: Path, kind: type[T]) -> T:
    """Read a file written by `write_json`.

    Raises:
        UserError: the file is missing or holds something else.
    """
    try:
        return kind.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path.name} is missing", where=str(path.parent), fix="is this a run folder?") from None
    except ValidationError as error:
        raise UserError(
            f"{path.name} is not a {kind.__name__}",
            where=str(path),
            got=read_error_message(error),
            fix="it was written by another version, or by hand",
        ) from None


def touch_heartbeat(run: RunDir, rank: int, step: int) -> None:
    """Say that `rank` is alive and has taken `step` steps."""
    with atomic_write(run.heartbeat(rank), sync=False) as temporary:
        temporary.write_text(f"{step} {time.time():.3f}", encoding="ascii")

"""Tests that run whole pipelines: a demo, the same demo again, and other model families on the demo's pictures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from bundle import job_tasks
from open_sockets import Listener, descendants, listeners

from pipelines.background_thread import in_background

# One process runs all tests of this file, because the tests share a fixture that takes nearly all of the time.
pytestmark = [pytest.mark.xdist_group("pipelines"), pytest.mark.timeout(1500)]

SCENES = 300
PICTURES = ("--set", f"data.source.path=scenes:{SCENES}:0")
"""Command-line options that select the pictures of the demo."""
QUICK = (
    "train.steps=160",
    "train.batch_size=32",
    "train.optimizer.warmup_steps=20",
    "train.validate_every=160",
    "train.checkpoint_every=160",
    "train.score_every=160",
    "train.best_by=cider",
    "train.register=best",
    "gate.baselines=[]",  # after 160 steps, the captions may be worse than one constant caption for all pictures
)
TORCHRUN = ["torchrun", "--nproc-per-node", "2", "-m", "pipelines.worker.main", "--run-dir", "runs/paligemma-*"]
SECRETS = {
    "DATABRICKS_TOKEN": "c4nary-workspace",
    "MLFLOW_TRACKING_TOKEN": "c4nary-tracking",
    "MLFLOW_TRACKING_PASSWORD": "c4nary-password",
    "AWS_SECRET_ACCESS_KEY": "c4nary-storage",
    "PYSPARK_SUBMIT_ARGS": "--conf spark.hadoop.fs.s3a.secret.key=c4nary-spark pyspark-shell",
}

RUN_COMMANDS = """
import json, subprocess, sys
from pathlib import Path
from jobs.cli import app
for command in json.loads(sys.argv[1]):
    if command[0] == "torchrun":
        (folder,) = Path(sys.argv[2]).glob(command.pop())
        done = subprocess.run([sys.executable, "-m", "torch.distributed.run", *command[1:], folder])
        assert not done.returncode
    else:
        app(command, standalone_mode=False)
"""


class Ran(NamedTuple):
    """JSON report of each command of a series, and everything that the commands printed to stdout and stderr."""

    reports: list[dict[str, Any]]
    printed: str
    log: str
    listeners: set[Listener]
    """Sockets that the commands and their child processes listened on."""


def run(home: Path, *commands: list[str], folder: Path | None = None) -> Ran:
    """Run commands in one process, which starts one JVM. Each command has a new Spark session and catalog.

    The working folder is `folder` or, without `folder`, the home folder. As with the installed command, the working
    folder is not in `sys.path`.
    """
    environment = os.environ | {"LAKESIGHT_HOME": str(home), "PYTHONPATH": os.pathsep.join(sys.path)}
    # SQLite ignores the password in the address. The test looks for this password in all files and output.
    environment["MLFLOW_TRACKING_URI"] = f"sqlite:///file:{home}/mlflow.db?uri=true&password=c4nary-address"
    with (
        subprocess.Popen(
            [sys.executable, "-P", "-c", RUN_COMMANDS, json.dumps(commands), str(home)],
            env=environment | SECRETS,
            cwd=folder or home,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process,
        watch_listeners(process) as found,
    ):
        printed, log = process.communicate()
    assert process.returncode == 0, log
    return Ran([json.loads(line) for line in printed.splitlines()], printed, log, found)


@contextmanager
def watch_listeners(process: subprocess.Popen[str]) -> Iterator[set[Listener]]:
    """Collect the sockets that a process and its children listen on, while the block runs (Linux only).

    The processes of torchrun are left out: torchrun's own rendezvous listens on all interfaces.
    """
    found: set[Listener] = set()

    def watch(ended: threading.Event) -> None:
        while Path("/proc/net/tcp").exists() and not ended.wait(0.5):
            found.update(listeners(descendants(process.pid, without="-m torch.distributed.run")))

    with in_background(watch, "listeners"):
        yield found


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pipelines")


@pytest.fixture(scope="module")
def user_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with user modules named like our packages. Importing a user module writes a file."""
    folder = tmp_path_factory.mktemp("user")
    for module in ("vlm/__init__.py", "pipelines/__init__.py", "jobs.py"):
        (folder / module).parent.mkdir(exist_ok=True)
        (folder / module).write_text(
            "import pathlib\npathlib.Path(__file__).with_suffix('.imported').touch()\nraise ImportError(__file__)\n"
        )
    return folder


@pytest.fixture(scope="module")
def demos(home: Path, user_folder: Path) -> Ran:
    """Run a demo twice. Then prepare a run with another seed, whose ranks the user starts with torchrun."""
    quick = [word for value in QUICK for word in ("--set", value)]
    demo = ["demo", "--scenes", str(SCENES), "--json", *quick]
    prepare = ["train", "--run", "demo", "--json", *PICTURES, *quick, "--set", "train.seed=7", "--no-launch"]
    return run(home, demo, demo, prepare, folder=user_folder)


def pipeline(family: str) -> list[str]:
    return ["pipeline", "--run", family, "--json", *PICTURES]


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="the test finds sockets in /proc")
def test_no_process_of_a_demo_listens_beyond_the_loopback_device(demos: Ran) -> None:
    assert [listener for listener in demos.listeners if not listener.is_loopback] == []
    commands = " ".join(listener.command for listener in demos.listeners)
    assert "org.apache.spark.deploy.SparkSubmit" in commands
    assert "import run_rank as entry" in commands


def test_a_demo_runs_every_stage(demos: Ran) -> None:
    report = demos.reports[0]
    assert report["rows_in"] == SCENES == report["samples"] + report["duplicates"] + report["quarantined"]
    assert report["quarantined"] > 0
    assert report["trained"]
    assert report["captions"] > 0 == report["errors"]
    assert report["blind_gap"] > 0.2  # 0.2 is twice the minimum that the promotion gate requires
    assert Path(report["gallery"]).stat().st_size > 10_000


def test_a_second_demo_in_the_same_home_folder_repeats_no_work(demos: Ran) -> None:
    first, second, *_ = demos.reports
    assert second["nothing_new"]
    assert "nothing new: this command ingested no row, trained no step and captioned no picture" in demos.log
    assert (second["samples"], second["quarantined"], second["captions"], second["errors"]) == (0, 0, 0, 0)
    assert second["rows_in"] == second["duplicates"] == 0, "unchanged files are not read"
    assert second["captioned_before"] == first["captions"]
    assert (second["model_version"], second["metrics"]) == (first["model_version"], first["metrics"])


@pytest.mark.matrix
def test_evaluating_the_last_checkpoint_gives_the_metrics_of_the_registered_version(home: Path, demos: Ran) -> None:
    (evaluated,) = run(home, ["evaluate", "--run", "demo", "--json", *PICTURES, "--checkpoint", "160"]).reports
    first = demos.reports[0]
    assert evaluated["model_version"] == first["model_version"], "the checkpoint is registered already"
    assert evaluated["metrics"]["exact_match"]["value"] == first["exact_match"]


def assert_learned(report: dict[str, Any], family: str) -> None:
    assert report["model_name"] == family
    assert report["blind_gap"] > 0.2
    assert report["captions"] > 0 == report["errors"]
    assert Path(report["gallery"]).is_file()


def test_command_train_prepares_a_run_for_ranks_that_another_program_starts(home: Path, demos: Ran) -> None:
    prepared = demos.reports[2]
    assert prepared["ranks"] == 2
    assert (Path(prepared["run_folder"]) / "run.json").is_file()
    assert (home / "runs" / "demo.prepared").read_text() == f"{prepared['run_folder']}\n"


@pytest.mark.matrix
@pytest.mark.usefixtures("demos")
def test_a_training_that_stops_early_registers_its_checkpoint_with_the_best_cider(home: Path) -> None:
    stalled = ["train.optimizer.lr=1e-9", "train.batch_size=8", "train.steps=60", "train.validate_rows=4"]
    chosen = ["train.score_every=10", "train.checkpoint_every=10", "train.best_by=cider", "train.stop=2"]
    settings = [word for value in (*stalled, *chosen) for word in ("--set", value)]
    train = ["train", "--run", "seemoe", "--json", *PICTURES, *settings]
    last, best = run(home, train, [*train, "--set", "train.register=best"]).reports
    assert (last["steps"], last["trained"], best["steps"], best["trained"]) == (30, True, 30, False)
    assert "val/cider" in last["metrics"]
    assert int(best["model_version"]) == int(last["model_version"]) + 1, "step 10 is the best, as no caption changes"


@pytest.mark.matrix
@pytest.mark.usefixtures("demos")
def test_a_job_run_promotes_the_version_that_it_has_trained_and_undoes_no_rollback(home: Path) -> None:
    """The tasks have the parameters of the deployed job, except for the settings of a workspace."""
    values = {"var.catalog": "c"} | {
        f"resources.{kind}": "x" for kind in ("schemas.lakesight.name", "volumes.files.name", "experiments.runs.name")
    }
    seven = ["--set", "train.seed=7", "--set", "train.steps=320"]  # twice the champion's steps, for a better model
    quick = [word for value in (*QUICK, "gate.min_blind_gap=-10") for word in ("--set", value)]
    given = ["--json", *PICTURES, *quick]

    def job(*settings: str) -> list[list[str]]:
        found = job_tasks("pipeline", values, {"run": "demo"})
        wanted = [task for task in found if task[0] in ("train", "evaluate", "promote")]
        local = [[text for text in task if not text.startswith(("--platform", "--set=platform."))] for task in wanted]
        return [[*task, *given, *settings] for task in local]

    scheduled, longer = job(), job(*seven)
    trial = ["train", "--run", "demo", *given, "--set", "train.seed=8", "--set", "train.steps=20"]
    trained, _, evaluated, promoted = run(home, scheduled[0], trial, *scheduled[1:]).reports
    assert not trained["trained"]
    assert [report["model_version"] for report in (evaluated, promoted)] == [trained["model_version"]] * 2
    assert promoted["already"], "the job run ignores the newer version of another command"

    rollback = ["rollback", "--run", "demo", "--json"]
    *_, first, back, _, _, repeated = run(home, *longer, rollback, *job(*seven)).reports
    new, old = first["model_version"], trained["model_version"]
    assert (first["rolled_back"], back["model_version"]) == (False, old)
    assert (repeated["model_version"], repeated["rolled_back"]) == (new, True)
    explicit = ["promote", "--run", "demo", *given, *seven, "--version", new]
    history, chosen = run(home, ["decisions", "--run", "demo", "--json"], explicit).reports
    assert [(row["action"], row["model_version"]) for row in history["decisions"]] == [
        ("promote", old),
        ("promote", new),
        ("rollback", old),
    ]
    assert (chosen["model_version"], chosen["rolled_back"], chosen["already"]) == (new, False, False)


@pytest.mark.matrix
@pytest.mark.usefixtures("demos")
def test_a_pipeline_whose_last_stage_rewards_cider_runs_from_pictures_to_captions(home: Path) -> None:
    stages = (
        "train.stages=[{steps: 200, groups: [{pattern: '.*', lr: 1.0e-3}]}, "
        "{steps: 10, groups: [{pattern: '.*', lr: 1.0e-4}], objective: {kind: cider, samples: 3}}]"
    )
    settings = [word for value in (*QUICK[1:], "train.steps=210", stages) for word in ("--set", value)]
    (report,) = run(home, [*pipeline("demo"), *settings]).reports
    assert report["trained"]
    assert report["blind_gap"] > 0.1
    assert (Path(report["run_folder"]) / "cider.json").is_file()


@pytest.mark.matrix
@pytest.mark.usefixtures("demos")
def test_a_pipeline_with_ranks_started_by_torchrun_runs_from_pictures_to_captions(home: Path) -> None:
    """PaliGemma differs from the demo's model in the token sequence, the attention mask and the decoder."""
    prepare = ["train", "--no-launch", "--run", "paligemma", "--json", *PICTURES]
    prepared, report = run(home, prepare, TORCHRUN, pipeline("paligemma")).reports
    assert_learned(report, "paligemma")
    assert prepared == {"run_folder": report["run_folder"], "ranks": 2}
    assert not report["trained"], "the finished run is found"


def test_a_module_in_the_working_folder_with_the_name_of_a_lakesight_package_is_not_imported(
    demos: Ran, user_folder: Path
) -> None:
    """No process (driver, Spark's Python workers, ranks, smoke test of a version) imports a user module."""
    assert list(user_folder.rglob("*.imported")) == []
    assert "PYTHONSAFEPATH=1 torchrun --nproc-per-node 2 -m pipelines.worker.main --run-dir " in demos.log


@pytest.mark.matrix
@pytest.mark.parametrize("family", ["seemoe", "vit_gpt2"])
@pytest.mark.usefixtures("demos")
def test_the_pipeline_of_every_model_family_runs_from_pictures_to_captions(home: Path, family: str) -> None:
    (report,) = run(home, pipeline(family)).reports
    assert report["trained"]
    assert_learned(report, family)


def test_no_secret_in_environment_variables_is_written_to_a_file_or_printed(demos: Ran, home: Path) -> None:
    """Search for secrets in run folders, MLflow's database and artifacts, model versions, tables, logs and reports."""
    files = [path for path in home.rglob("*") if path.is_file()]
    kinds = {path.relative_to(home).parts[0] for path in files}
    assert kinds >= {"runs", "models", "mlflow.db", "mlartifacts", "warehouse", "logs", "reports"}
    assert [str(path.relative_to(home)) for path in files if b"c4nary" in path.read_bytes()] == []
    assert "c4nary" not in demos.printed + demos.log

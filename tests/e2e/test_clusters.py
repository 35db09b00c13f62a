"""Tests that launch training on a standalone Spark cluster, on executors with GPUs, and for two runs at once."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import is_running
from spark_drivers import driver_environment, placements_of, run_drivers, standalone_cluster, started_processes
from tiny_runs import MakeRun, runs_in

from pipelines.formats.run_folder import Result, RunFolder, read_json

# Each test starts its own Spark sessions and ranks, and this start takes 30 seconds on an idle machine.
pytestmark = [pytest.mark.faults, pytest.mark.matrix, pytest.mark.timeout(1500)]
FEW: dict[str, Any] = {"steps": 4, "validate_every": 4}


@pytest.fixture
def make_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeRun:
    return runs_in(tmp_path, monkeypatch)


def assert_trained_separately(first: RunFolder, second: RunFolder) -> None:
    """Check that two runs, each with two ranks, have separate results and have used different rendezvous."""
    assert [read_json(run.result, Result).world_size for run in (first, second)] == [2, 2]
    met = [{place.rendezvous for place in placements_of(run)} for run in (first, second)]
    assert len(met[0]) == len(met[1]) == len(met[0] | met[1]) - 1 == 1
    losses = [[metrics.values["train/loss"] for metrics in run.read_metrics()] for run in (first, second)]
    assert len(losses[0]) == len(losses[1]) == 2
    assert losses[0] != losses[1]


def test_two_simultaneous_trainings_with_ranks_on_the_driver_do_not_affect_each_other(
    make_run: MakeRun, tmp_path: Path
) -> None:
    runs = [make_run(f"seed-{seed}", seed=seed, **FEW) for seed in range(2)]
    assert run_drivers(tmp_path / "home", "local[1]", *([run] for run in runs)) == [{}, {}]
    assert_trained_separately(*runs)


def test_two_simultaneous_trainings_on_a_standalone_cluster_do_not_affect_each_other(
    make_run: MakeRun, tmp_path: Path
) -> None:
    runs = [make_run(f"seed-{seed}", seed=seed, **FEW) for seed in range(2)]
    with standalone_cluster(tmp_path, workers=2, cores=2, cores_per_application=2) as master:
        assert run_drivers(tmp_path / "home", master, *([run] for run in runs)) == [{}, {}]
    assert_trained_separately(*runs)
    executors = list((tmp_path / "work").glob("app-*/*"))
    assert len({executor.parent for executor in executors}) == 2
    assert all(list(executor.glob("io.delta_delta-spark_*.jar")) for executor in executors)
    assert not any(is_running(place.agent) for run in runs for place in placements_of(run))


def gpu_settings(folder: Path, per_task: str) -> dict[str, str]:
    """Return Spark settings that give each worker two GPUs, and each task the given amount of GPUs."""
    (script := folder / "gpus.sh").write_text("""#!/bin/sh\necho '{"name": "gpu", "addresses": ["0", "1"]}'\n""")
    script.chmod(0o755)
    return {
        "spark.worker.resource.gpu.amount": "2",
        "spark.worker.resource.gpu.discoveryScript": str(script),
        "spark.executor.resource.gpu.amount": "2",
        "spark.task.resource.gpu.amount": per_task,
    }


ONE_EACH = [("0", 0), ("0", 0), ("1", 0), ("1", 0)]
TWO_EACH = [("0,1", 0), ("0,1", 0), ("0,1", 1), ("0,1", 1)]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="training refuses GPUs that torch cannot use")
@pytest.mark.parametrize(
    ("per_task", "expected", "refusal"),
    [
        pytest.param("1", ONE_EACH, "4 task slots, but 6 ranks need 6.*platform.ranks to 4 or", id="one"),
        pytest.param("2", TWO_EACH, "2 task slots, but 6 ranks need 3.*platform.ranks to 4 or", id="two"),
    ],
)
def test_each_of_four_ranks_on_two_executors_has_its_own_gpu(
    make_run: MakeRun, tmp_path: Path, per_task: str, expected: list[tuple[str, int]], refusal: str
) -> None:
    run, larger = make_run("runs/run", ranks=4, **FEW), make_run("refused/larger", ranks=6)
    settings = gpu_settings(tmp_path, per_task)
    (refused,) = run_drivers(tmp_path / "home", "local-cluster[2,4,1024]", [run, larger], settings=settings)
    assert list(refused) == ["larger"], refused
    assert re.search(refusal, refused["larger"])
    assert read_json(run.result, Result).world_size == 4
    places = placements_of(run)
    assert sorted((place.gpus, place.local_rank) for place in places) == expected
    assert len({place.agent for place in places}) == 4 // int(per_task)


def test_a_fraction_of_a_gpu_per_rank_is_refused_and_the_error_names_the_setting(
    make_run: MakeRun, tmp_path: Path
) -> None:
    run = make_run()
    settings = gpu_settings(tmp_path, "0.25")
    ((_, refusal),) = run_drivers(tmp_path / "home", "local-cluster[1,2,1024]", [run], settings=settings)[0].items()
    assert "cannot give each rank its own GPU. Where: platform.ranks=2, spark.task.resource.gpu.amount=0.25" in refusal
    assert "start the training cluster with spark.task.resource.gpu.amount=1" in refusal
    assert not run.result.exists()


CHECK_HOSTS = """
import sys, threading, time
from pathlib import Path
from pipelines.config import LocalPlatformConfig, SparkConfig
from pipelines.driver.train.hosts import check_hosts
from pipelines.errors import StageFailed
from pipelines.platform import local
from pipelines.formats.run_folder import RunFolder

platform = local(LocalPlatformConfig(spark=SparkConfig(master=sys.argv[1]), ranks=2))
context = (spark := platform.open_spark()).sparkContext
jobs = context.statusTracker()
busy = context.parallelize(range(1), 1)
threading.Thread(target=lambda: busy.foreach(lambda _: time.sleep(600)), daemon=True).start()

def waiting():
    while len(jobs.getActiveJobsIds()) < 2:
        time.sleep(0.1)
    print("both jobs run", flush=True)

threading.Thread(target=waiting, daemon=True).start()
try:
    check_hosts(RunFolder(Path(sys.argv[2])), lambda: spark, platform.launch)
except StageFailed as error:
    print(error, flush=True)
"""


def test_a_job_that_waits_for_free_spark_task_slots_fails_when_a_host_is_lost(tmp_path: Path) -> None:
    one_each = standalone_cluster(tmp_path, workers=2, cores=1, cores_per_application=2)
    with one_each as master, started_processes() as start:
        command = [sys.executable, "-c", CHECK_HOSTS, master, str(tmp_path / "run")]
        check = start(command, driver_environment(tmp_path / "home"), subprocess.PIPE)
        assert check.stdout
        assert check.stdout.readline() == b"both jobs run\n"
        worker, _ = subprocess.check_output(["pgrep", "-f", f"deploy.worker.Worker.*{master}"], text=True).split()
        os.killpg(int(worker), signal.SIGKILL)  # kills the worker and its executor, as the loss of a host would
        said = check.stdout.readline().decode()
    assert said.startswith("the executors cannot describe their hosts.")
    assert "executors were lost: 1 of 2 slots are left" in said


INTERRUPTED = """
import os, signal, threading, time
from pipelines.config import LocalPlatformConfig, SparkConfig
from pipelines.platform import cancel_if_slots_are_lost, local

spark = local(LocalPlatformConfig(spark=SparkConfig(master="local[2]"))).open_spark()
jobs = spark.sparkContext.statusTracker()

def interrupt(*_):
    raise KeyboardInterrupt

signal.signal(signal.SIGUSR1, interrupt)

def interrupt_job():
    while not jobs.getActiveJobsIds():
        time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGUSR1)

threading.Thread(target=interrupt_job, daemon=True).start()
try:
    with cancel_if_slots_are_lost(spark, 2):
        spark.sparkContext.parallelize(range(2), 2).barrier().mapPartitions(lambda _: time.sleep(600)).collect()
except KeyboardInterrupt:
    deadline = time.monotonic() + 60
    while jobs.getActiveJobsIds() and time.monotonic() < deadline:
        time.sleep(0.1)
    print("jobs", len(jobs.getActiveJobsIds()), flush=True)
spark.stop()
"""


def test_the_spark_job_of_ranks_is_cancelled_if_another_signal_than_that_of_ctrl_c_interrupts_the_command(
    tmp_path: Path,
) -> None:
    with started_processes() as start:
        command = [sys.executable, "-c", INTERRUPTED]
        process = start(command, driver_environment(tmp_path / "home"), subprocess.PIPE)
        assert process.communicate()[0].decode().splitlines() == ["jobs 0"]


SESSION = """
from pipelines.config import LocalPlatformConfig
from pipelines.platform import local
print(local(LocalPlatformConfig()).open_spark().range(3).count())
"""


def test_spark_sessions_that_start_at_the_same_time_download_missing_jars_one_after_another(tmp_path: Path) -> None:
    (user := tmp_path / "user").mkdir()
    empty = os.environ | {"HOME": str(user), "JAVA_TOOL_OPTIONS": f"-Duser.home={user}", "TMPDIR": str(tmp_path)}
    sessions = [
        subprocess.Popen(
            [sys.executable, "-c", SESSION],
            env=empty | {"LAKESIGHT_HOME": str(tmp_path / str(number))},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(3)
    ]
    ended = [(*session.communicate(timeout=600), session.returncode) for session in sessions]
    assert [(out.strip(), code) for out, _, code in ended] == [("3", 0)] * 3, [err for _, err, _ in ended]

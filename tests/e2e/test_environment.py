"""Tests that the pipeline runs in the restricted environments of job schedulers and shared servers."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from home_commands import NEW_WORK, command, environment

pytestmark = [pytest.mark.faults, pytest.mark.matrix, pytest.mark.timeout(1500)]

SETTINGS = (
    "data.source.path=scenes:40:0",
    "train.steps=10",
    "train.batch_size=16",
    "train.validate_every=10",
    "train.checkpoint_every=10",
    "gate.baselines=[]",  # with these two settings, the gate accepts a model that ignores its pictures
    "gate.min_blind_gap=-10",
)
NOWHERE = "http://127.0.0.1:9"
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
ENVIRONMENTS: dict[str, dict[str, str]] = {
    "cron": {},
    "turkish": {
        "LANG": "tr_TR.UTF-8",
        "LC_ALL": "tr_TR.UTF-8",
        "TZ": "Pacific/Kiritimati",
        # If the locale is not installed, the JVM ignores LC_ALL. These options make the JVM use Turkish in any case.
        "JAVA_TOOL_OPTIONS": "-Duser.language=tr -Duser.country=TR",
    },
    "dead proxy": {"LANG": "C", "LC_ALL": "C", "TZ": "America/St_Johns"} | dict.fromkeys(PROXIES, NOWHERE),
}
OPEN_FILES = 256
OFFLINE = 'hostname lakesight-offline && ip link set lo up || exit 99; exec "$@"'
"""Script of a host that has only the loopback device and whose name no server knows, such as a laptop without Wi-Fi."""


def without_network(*words: str) -> list[str]:
    """Return a command line that runs a command on a host without a network."""
    return ["unshare", "--net", "--uts", "--map-root-user", "sh", "-c", OFFLINE, "sh", *words]


def can_leave_the_network() -> bool:
    """Return whether this user may create namespaces that simulate a host without a network."""
    programs = [shutil.which(name) for name in ("unshare", "ip", "hostname")]
    return all(programs) and not subprocess.run(without_network("true"), capture_output=True, check=False).returncode


def forbid_more_files() -> None:
    """In the child process, set a low limit of open files that the process cannot raise."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES, OPEN_FILES))


def restrict() -> None:
    """In the child process, set a low limit of open files and a private umask, as on a shared server."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES, hard))
    os.umask(0o077)


def run(
    home: Path, command: str, *, environment: Mapping[str, str], prepare: Callable[[], None] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command with few environment variables, as cron does, and without `assert` statements (`python -O`)."""
    java = shutil.which("java")
    assert java
    options = [word for setting in SETTINGS for word in ("--set", setting)]
    return subprocess.run(
        [sys.executable, "-O", "-P", "-c", "from jobs.cli import main; main()", command, "--json", *options],
        env={"PATH": f"{Path(java).parent}:/usr/bin:/bin", "LAKESIGHT_HOME": str(home), **environment},
        cwd=home.parent,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        preexec_fn=prepare,
        check=False,
    )


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_the_pipeline_runs_in_restricted_environments_and_oddly_named_homes_and_keeps_its_files_private(
    tmp_path: Path, name: str
) -> None:
    home = tmp_path / "h\u00f6me %41 #1 [2] &?y=1"
    done = run(home, "pipeline", environment=ENVIRONMENTS[name], prepare=restrict)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["trained"]
    assert report["captions"] > 0
    assert report["errors"] == 0
    assert files_of_others(home) == []
    assert ("-Duser.language=tr" in (home / "logs" / "spark.log").read_text()) is (name == "turkish")


def files_of_others(home: Path) -> list[Path]:
    """List files and folders that give other users any permission, except the source files in model versions: MLflow
    copies the permissions of these files.
    """
    found = [path for path in home.rglob("*") if path.stat().st_mode & 0o077]
    return [path for path in found if not re.search("/artifacts/(code|model.py)", path.as_posix())]


def test_the_error_names_the_open_file_limit_if_spark_needs_more_open_files_than_allowed(tmp_path: Path) -> None:
    done = run(tmp_path / "lakesight", "ingest", environment={}, prepare=forbid_more_files)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("Spark needs more open files than this process may open.")
    assert f"Got: {OPEN_FILES}." in done.stderr


def test_the_next_stage_recreates_removed_shards_runs_or_registry_files_or_names_them_in_its_error(
    tmp_path: Path,
) -> None:
    home = tmp_path / "lakesight"

    def report(command: str) -> dict[str, Any]:
        done = run(home, command, environment={})
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout))

    first = report("pipeline")
    shutil.rmtree(home / "shards")
    report("evaluate")
    shutil.rmtree(home / "runs")
    again = report("train")
    assert again["trained"]
    assert again["model_version"] == str(int(first["model_version"]) + 1)
    (home / "mlflow.db").unlink()
    missing = run(home, "evaluate", environment={})
    assert missing.returncode == 2
    assert "there is no such registered model" in missing.stderr.splitlines()[-1]
    registered = report("train")
    assert not registered["trained"]
    assert registered["model_version"] == "1"
    report("evaluate")


@pytest.mark.xdist_group("finished home")
@pytest.mark.skipif(not can_leave_the_network(), reason="this user may not create a network namespace")
def test_ingest_train_and_caption_work_without_a_network(finished_home: Path) -> None:
    """The test uses a home folder in which Spark has run before, because the first start of Spark downloads jars."""
    done = {}
    for stage in ("ingest", "train", "caption"):
        ran = subprocess.run(
            without_network(*command(*NEW_WORK[stage])),
            env=environment(finished_home),
            capture_output=True,
            text=True,
            check=False,
        )
        assert ran.returncode == 0, ran.stderr
        done[stage] = json.loads(ran.stdout)
    assert done["ingest"]["rows_in"] == 400
    assert done["train"]["trained"]
    assert done["caption"]["captioned"] == done["caption"]["considered"] > 0

"""Tests that both platforms have all fields in the same form, and that a failed start of Spark is explained."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.config import DatabricksPlatformConfig, LocalPlatformConfig, load_run
from pipelines.errors import ConfigError, UserError
from pipelines.platform import Platform, check_java, databricks, local, open_platform
from pipelines.platform.local import session_settings
from vlm.errors.printable import hide_secrets

WORKSPACE = DatabricksPlatformConfig.model_validate(
    {"kind": "databricks", "catalog": "main", "schema": "vision", "volume": "files", "ranks": 4}
)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LAKESIGHT_HOME", str(tmp_path / "home"))
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "home"


@pytest.fixture(params=["local", "databricks"])
def any_platform(request: pytest.FixtureRequest, home: Path) -> Platform:
    return open_platform(LocalPlatformConfig() if request.param == "local" else WORKSPACE)


def test_every_field_of_the_platform_is_set_in_a_workspace_and_on_a_laptop(any_platform: Platform) -> None:
    assert callable(any_platform.open_spark)
    assert any_platform.table("samples") == f"{any_platform.namespace}.samples"
    folders = {any_platform.folder(kind) for kind in ("shards", "runs", "models", "reports", "demo")}
    assert len(folders) == 5
    assert all(folder.is_absolute() and folder.parent == any_platform.root for folder in folders)
    assert any_platform.launch.ranks >= 1
    assert any_platform.tracking_uri
    assert any_platform.registry_uri
    assert any_platform.model_name("demo").endswith("demo")
    assert any_platform.experiment("demo").endswith("lakesight/demo")


def test_all_folders_of_a_laptop_are_under_its_home_folder(home: Path) -> None:
    platform = local(LocalPlatformConfig())
    assert platform.root == home
    assert platform.tables is not None
    assert platform.tables.is_relative_to(home)
    assert platform.tracking_uri == platform.registry_uri == f"sqlite:///{home / 'mlflow.db'}"
    assert list(home.iterdir()) == [], "files exist before they are needed"


def test_all_names_in_a_workspace_contain_catalog_and_schema() -> None:
    platform = databricks(WORKSPACE)
    assert platform.table("samples") == "main.vision.samples"
    assert platform.folder("shards") == Path("/Volumes/main/vision/files/shards")
    assert platform.model_name("demo") == "main.vision.demo"
    assert (platform.tracking_uri, platform.registry_uri) == ("databricks", "databricks-uc")
    assert platform.tables is None


def test_spark_settings_reach_the_session_but_are_neither_stored_nor_printed_nor_hashed(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    given = {"spark.hadoop.fs.s3a.secret.key": "s3cret", "spark.memory.offHeap.size": "2g", "spark.speculation": "true"}
    nested = ["platform.spark.conf.spark.hadoop.fs.s3a.secret.key=s3cret", "platform.spark.conf.spark.speculation=true"]
    nested.append("platform.spark.conf.spark.memory.offHeap.size=2g")
    whole = "platform.spark.conf={spark.hadoop.fs.s3a.secret.key: s3cret, spark.memory.offHeap.size: 2g, " + (
        "spark.speculation: true}"
    )
    for overrides in (nested, [whole]):
        run = load_run("demo", overrides=overrides)
        assert isinstance(run.platform, LocalPlatformConfig)
        settings = session_settings(run.platform, home)
        assert given.items() <= settings.items()
        assert settings["spark.sql.session.timeZone"] == "UTC"
        assert "s3cret" not in f"{run.to_json()} {run!r} {run.platform.hashed_settings()}"
        assert run.to_json() == load_run("demo").to_json()


@pytest.mark.parametrize(("master", "never"), [("local[2]", True), ("local-cluster[2,1,2048]", False)])
def test_spark_never_gives_up_the_executor_that_is_in_the_driver_if_the_clock_jumps(
    home: Path, monkeypatch: pytest.MonkeyPatch, master: str, never: bool
) -> None:
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    settings = session_settings(LocalPlatformConfig.model_validate({"spark": {"master": master}}), home)
    assert ("spark.storage.blockManagerHeartbeatTimeoutMs" in settings) is never


@pytest.mark.parametrize(
    ("name", "master", "reason"),
    [
        ("spark.master", "local[*]", "platform.spark.master"),
        ("spark.jars.packages", "local[*]", "extraClassPath"),
        ("spark.authenticate", "local[*]", "secret"),
        ("spark.sql.session.timeZone", "spark://h:7077", "UTC"),
        ("spark.driver.host", "local[*]", "loopback"),
        ("hadoop.fs.s3a.endpoint", "local[*]", "begin with 'spark.'"),
    ],
)
def test_a_spark_setting_that_lakesight_itself_sets_is_refused_with_the_reason(
    name: str, master: str, reason: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(reason)) as refused:
        load_run("demo", overrides=[f"platform.spark.master={master}", f"platform.spark.conf={{{name}: s3cret}}"])
    assert "s3cret" not in str(refused.value)
    load_run("demo", overrides=["platform.spark.master=spark://h:7077", "platform.spark.conf={spark.driver.host: h}"])


CLUSTERS = ("spark://h:7077", "yarn", "k8s://https://h:6443", "sc://h:15002")


@pytest.mark.parametrize(
    ("master", "local_mode"),
    [("local[2]", True), ("local-cluster[2,1,2048]", False), *((each, False) for each in CLUSTERS)],
)
def test_ranks_run_on_the_drivers_host_unless_spark_has_executors(home: Path, master: str, local_mode: bool) -> None:
    config = LocalPlatformConfig.model_validate({"spark": {"master": master}})
    assert local(config).launch.local_mode is local_mode
    assert local(config).remote is (master in CLUSTERS), "only hosts of a cluster copy files to their own disks"


@pytest.mark.parametrize("master", CLUSTERS[:3])
def test_executors_of_a_cluster_can_reach_the_driver(home: Path, monkeypatch: pytest.MonkeyPatch, master: str) -> None:
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    config = LocalPlatformConfig.model_validate({"spark": {"master": master, "conf": {"spark.driver.host": "h"}}})
    settings = session_settings(config, home)
    assert settings["spark.driver.host"] == "h"
    assert not {"spark.driver.bindAddress", "spark.authenticate"} & settings.keys()


@pytest.mark.parametrize(
    "master", ["sc://127.0.0.1:9", "sc://127.0.0.1:port", "k8s://127.0.0.1:9", "k8s://https://h:x"]
)
def test_a_server_that_does_not_answer_is_reported_without_a_retry(home: Path, master: str) -> None:
    config = LocalPlatformConfig.model_validate({"spark": {"master": master}})
    with pytest.raises(
        UserError, match=r"does not answer\. .*Fix: start the server, or correct platform\.spark\.master"
    ):
        local(config).open_spark()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"master": "sc://h/;token=s3cret"}, "SPARK_CONNECT_AUTHENTICATE_TOKEN"),
        ({"master": "sc://h", "driver_memory": "8g"}, "set the memory of the server"),
    ],
)
def test_settings_that_a_spark_connect_server_cannot_follow_are_refused(settings: dict[str, str], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as refused:
        load_run("demo", overrides=[f"platform.spark.{name}={value}" for name, value in settings.items()])
    assert "s3cret" not in str(refused.value)


@pytest.mark.matrix
def test_the_error_of_a_start_on_yarn_names_the_missing_configuration_of_hadoop(tmp_path: Path) -> None:
    environment = {
        name: value for name, value in os.environ.items() if name not in ("HADOOP_CONF_DIR", "YARN_CONF_DIR")
    }
    done = subprocess.run(
        [sys.executable, "-c", "from jobs.cli import main; main()", "ingest", "--set", "platform.spark.master=yarn"],
        env=environment | {"LAKESIGHT_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "HADOOP_CONF_DIR or YARN_CONF_DIR must be set" in done.stderr.splitlines()[-1]


def test_a_home_folder_that_cannot_be_written_is_a_user_error(home: Path) -> None:
    home.write_text("a file is in the way")
    with pytest.raises(UserError, match="LAKESIGHT_HOME"):
        local(LocalPlatformConfig())


# ------------------------------------------------------------------------------------------------ java


def fake_java(folder: Path, script: str) -> None:
    java = folder / "bin" / "java"
    java.parent.mkdir(parents=True)
    java.write_text(f"#!/bin/sh\n{script}\n")
    java.chmod(java.stat().st_mode | stat.S_IEXEC)


@pytest.mark.parametrize(
    ("script", "got"),
    [
        ("""echo 'openjdk version "1.8.0_402"' >&2""", "1.8.0_402"),
        ("""echo 'openjdk version "11.0.22" 2024-01-16' >&2""", "11.0.22"),
        ("""echo 'Unable to locate a Java Runtime.' >&2; exit 1""", "Unable to locate"),
        ("exit 1", "nothing"),
    ],
)
def test_the_error_for_an_old_or_missing_java_is_one_paragraph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, got: str
) -> None:
    fake_java(tmp_path, script)
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    with pytest.raises(UserError, match="Java 17") as caught:
        check_java()
    assert got in str(caught.value)
    assert "apt install" in str(caught.value)


@pytest.mark.parametrize("version", ["17", "17.0.15", "21.0.2", "25-ea"])
def test_java_17_and_later_are_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    fake_java(tmp_path, f"""echo 'openjdk version "{version}"' >&2""")
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    assert check_java() == int(version[:2])


def test_a_missing_java_is_reported_before_pyspark_prints_a_traceback(tmp_path: Path) -> None:
    code = (
        "from pipelines.platform import local\nfrom pipelines.config import LocalPlatformConfig\n"
        "from pipelines.errors import UserError\n"
        "try:\n    local(LocalPlatformConfig()).open_spark()\nexcept UserError as error:\n    print(error)\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "JAVA_HOME"}
    environment |= {"PATH": str(tmp_path), "LAKESIGHT_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)
    assert run.stdout.startswith("Spark needs Java 17 or later. Where: java on PATH. Got: [Errno 2]")
    assert run.stderr == ""


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("http://host:5000", "http://host:5000"),
        ("https://me:pass@word@host/x", "https://host/x"),
        ("postgresql://host/db?user=me&password=secret", "postgresql://host/db"),
        ("cannot reach //token@host/a?b=c today", "cannot reach //host/a today"),
        ("postgresql+psycopg://me:pass/word@host/db", "postgresql+psycopg://host/db"),
        ("sqlite:////data/me@work/mlflow.db", "sqlite:////data/me@work/mlflow.db"),
    ],
)
def test_a_uri_is_shown_without_its_password(uri: str, shown: str) -> None:
    assert hide_secrets(uri) == shown


@pytest.mark.parametrize("name", ["products", "shop.products"])
def test_the_error_for_a_table_in_the_working_folder_says_how_to_write_its_path(
    name: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    platform = local(LocalPlatformConfig())
    assert platform.tables
    plain = platform.resolve_table(name)
    Path(name, "_delta_log").mkdir(parents=True)
    with pytest.raises(UserError, match=f"there is no table '{name}'") as caught:
        platform.resolve_table(name)
    assert f"write ./{name} for" in caught.value.fix
    assert platform.resolve_table(f"./{name}") == f"delta.`{tmp_path / name}`"
    own = platform.tables / name / "_delta_log"
    if plain == platform.table(name):
        own.mkdir(parents=True)
        assert platform.resolve_table(name) == plain

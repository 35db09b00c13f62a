"""Tests that other users of the machine can read neither Spark's settings nor the JVM's log and crash reports."""

from __future__ import annotations

import os
import shlex
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from open_sockets import descendants

from pipelines.config import LocalPlatformConfig
from pipelines.errors import UserError
from pipelines.platform import local
from pipelines.platform.class_archive import DRIVER_OPTIONS
from pipelines.platform.spark_launch import crash_options, open_log, private_settings

KEY = "spark.hadoop.fs.s3a.secret.key"
SUBMIT = """#!/bin/sh
tr '\\0' '\\n' < /proc/$$/cmdline > {folder}/arguments
cp "$2" {folder}/properties
stat -c '%a' "$2" "$(dirname "$2")" > {folder}/modes
echo 'Picked up JAVA_TOOL_OPTIONS: -Dx.password=c4nary'
exit 1
"""
"""Script that replaces `spark-submit`: it records its arguments and its properties file, and fails."""

WAIT = """class Wait {
    public static void main(String[] arguments) throws Exception {
        System.out.println("ready");
        Thread.sleep(60000);
    }
}
"""
"""Java program that waits for a signal."""


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put the script SUBMIT in place of `spark-submit`, and return the folder to which the script writes."""
    submit = tmp_path / "spark" / "bin" / "spark-submit"
    submit.parent.mkdir(parents=True)
    submit.write_text(SUBMIT.format(folder=tmp_path))
    submit.chmod(0o755)
    monkeypatch.setenv("SPARK_HOME", str(tmp_path / "spark"))
    monkeypatch.setenv("LAKESIGHT_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("PYSPARK_SUBMIT_ARGS", raising=False)
    monkeypatch.setattr("pyspark.SparkContext._gateway", None)
    monkeypatch.setattr("pyspark.SparkContext._active_spark_context", None)
    return tmp_path


def read_properties(file: Path) -> dict[str, str]:
    """Read a Java properties file whose settings have the form `name=value`. The last value of a name counts."""
    lines = [line for line in file.read_text(encoding="ascii").splitlines() if line]
    return dict(line.encode().decode("unicode_escape").split("=", 1) for line in lines)


def file_of_arguments() -> Path:
    """Return the properties file whose path is in PYSPARK_SUBMIT_ARGS."""
    return Path(shlex.split(os.environ["PYSPARK_SUBMIT_ARGS"])[1])


def test_no_spark_setting_is_an_argument_of_spark_submit(recorded: Path) -> None:
    config = LocalPlatformConfig.model_validate({"spark": {"conf": {KEY: "s3cret \u00e9=#"}}})
    with pytest.raises(UserError, match="Spark did not start"):
        local(config).open_spark()
    arguments = (recorded / "arguments").read_text().splitlines()
    file = Path(arguments[arguments.index("--properties-file") + 1])
    assert "spark.hadoop" not in str(arguments)
    assert "s3cret" not in str(arguments)
    assert (recorded / "modes").read_text().split() == ["600", "700"]
    settings = read_properties(recorded / "properties")
    assert settings[KEY] == "s3cret \u00e9=#"
    assert settings["spark.driver.memory"] == "4g"
    assert not file.parent.exists()


def test_arguments_and_properties_file_of_the_user_stay_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = tmp_path / "their file.conf"
    theirs.write_text("spark.a=1\nspark.b=2")
    monkeypatch.delenv("PYSPARK_SUBMIT_ARGS", raising=False)
    with private_settings({"spark.b": "3"}):
        assert os.environ["PYSPARK_SUBMIT_ARGS"].endswith(" --load-spark-defaults pyspark-shell")
        assert read_properties(file_of_arguments()) == {"spark.b": "3"}
    assert "PYSPARK_SUBMIT_ARGS" not in os.environ
    for option in (["--properties-file", str(theirs)], [f"--properties-file={theirs}"]):
        given = shlex.join(["--conf", "spark.c=4 5", *option, "pyspark-shell"])
        monkeypatch.setenv("PYSPARK_SUBMIT_ARGS", given)
        with private_settings({"spark.b": "3"}):
            assert shlex.split(os.environ["PYSPARK_SUBMIT_ARGS"])[2:] == ["--conf", "spark.c=4 5", "pyspark-shell"]
            assert read_properties(file_of_arguments()) == {"spark.a": "1", "spark.b": "3"}
        assert os.environ["PYSPARK_SUBMIT_ARGS"] == given
    monkeypatch.setenv("PYSPARK_SUBMIT_ARGS", "--properties-file no-such-file pyspark-shell")
    with pytest.raises(UserError, match="the properties file of Spark cannot be read"), private_settings({}):
        pytest.fail("the block runs without the settings of the user")


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o600), (0o077, 0o600), (0o002, 0o660)])
def test_only_users_who_may_write_sparks_log_can_read_it(tmp_path: Path, umask: int, mode: int) -> None:
    log = tmp_path / "spark.log"
    log.write_bytes(b"old")
    log.chmod(0o644)
    with open_log(log, umask) as out:
        assert out.tell() == 3
        subprocess.run(["echo", "new"], stdout=out, check=True)
    assert stat.S_IMODE(log.stat().st_mode) == mode
    assert log.read_bytes() == b"oldnew\n"


def test_other_users_cannot_read_what_the_jvm_prints_at_its_start(recorded: Path) -> None:
    before = os.umask(0o022)
    try:
        with pytest.raises(UserError, match="Spark did not start"):
            local(LocalPlatformConfig()).open_spark()
    finally:
        os.umask(before)
    log = recorded / "home" / "logs" / "spark.log"
    assert "c4nary" in log.read_text()
    assert stat.S_IMODE(log.stat().st_mode) == 0o600


@pytest.mark.parametrize("home", ["home", 'a "b\\\\ %p%% \u00e9'])
def test_a_crash_report_of_a_jvm_is_written_to_a_folder_that_only_this_user_can_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: str
) -> None:
    """The JVM gets the options as Spark passes them: split like a shell splits them."""
    folder = tmp_path / home
    folder.mkdir()
    (tmp_path / "Wait.java").write_text(WAIT)
    options = shlex.split(crash_options(folder / "crashes", "-Xmx64m", 0o022))
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-Dx.password=c4nary")
    jvm = subprocess.Popen(
        ["java", *options, "-XX:-CreateCoredumpOnCrash", "Wait.java"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert jvm.stdout is not None
    assert jvm.stdout.readline() == b"ready\n"
    jvm.send_signal(signal.SIGSEGV)
    jvm.stdout.close()
    jvm.wait(60)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["Wait.java", home])
    report = folder / "crashes" / f"hs_err_pid{jvm.pid}.log"
    assert "c4nary" in report.read_text(errors="replace"), "the report has secrets, so its folder must be private"
    assert stat.S_IMODE(report.parent.stat().st_mode) == 0o700


def test_spark_gets_the_option_for_crash_reports_and_options_of_the_user_stay_valid(recorded: Path) -> None:
    folder = recorded / "home" / "logs" / "crashes"
    for given, expected in (("", f"-XX:ErrorFile={folder}/hs_err_pid%p.log"), ("-Xss2m -XX:ErrorFile=mine", "")):
        conf = {DRIVER_OPTIONS: given} if given else {}
        with pytest.raises(UserError, match="Spark did not start"):
            local(LocalPlatformConfig.model_validate({"spark": {"conf": conf}})).open_spark()
        options = read_properties(recorded / "properties")[DRIVER_OPTIONS]
        assert options.startswith(given)
        assert expected in [*shlex.split(options), ""]
        assert options.count("-XX:ErrorFile=") == 1
        assert f"-XX:ReplayDataFile={folder}/replay_pid%p.log" in shlex.split(options)


@pytest.mark.matrix
def test_spark_receives_its_settings_and_no_process_has_them_on_its_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Start Spark in a new process with spark-defaults.conf and arguments of the user, and look at all processes."""
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "spark-defaults.conf").write_text("spark.defaults.are read\n")
    code = f"""
from pipelines.config import LocalPlatformConfig
from pipelines.platform import local
given = {{"spark.driver.extraClassPath": "/a", {KEY!r}: "s3cret \\u00e9=#"}}
config = LocalPlatformConfig.model_validate({{"spark": {{"conf": given, "driver_memory": "777m"}}}})
spark = local(config).open_spark()
lang = spark.sparkContext._jvm.java.lang
print(ascii(spark.sparkContext.getConf().get({KEY!r})))
print(ascii(spark.sparkContext._jsc.hadoopConfiguration().get("fs.s3a.secret.key")))
print(ascii(lang.System.getProperty({KEY!r})))
print(lang.Runtime.getRuntime().maxMemory() // 2**20)
print(lang.System.getProperty("spark.defaults.are"), lang.System.getProperty("spark.user"))
"""
    monkeypatch.setenv("LAKESIGHT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SPARK_CONF_DIR", str(tmp_path / "conf"))
    monkeypatch.setenv("PYSPARK_SUBMIT_ARGS", "--conf spark.user=1 pyspark-shell")
    # The script is in a file, because a child has the command line of the driver until it executes its own program.
    script = tmp_path / "driver.py"
    script.write_text(code)
    driver = subprocess.Popen([sys.executable, "-P", str(script)], stdout=subprocess.PIPE, text=True)
    seen: set[bytes] = set()
    while driver.poll() is None:
        for pid in set(descendants(driver.pid)) - {driver.pid}:
            try:
                seen.add(Path(f"/proc/{pid}/cmdline").read_bytes())
            except OSError:
                continue
        time.sleep(0.02)
    assert driver.stdout is not None
    printed = driver.stdout.read().splitlines()
    assert printed[:3] == [ascii("s3cret \u00e9=#")] * 3
    assert 600 < int(printed[3]) <= 777
    assert printed[4] == "read 1"
    lines = b"\n".join(seen)
    assert b"org.apache.spark.deploy.SparkSubmit" in lines
    assert b"org.apache.spark.launcher.Main" in lines
    assert b"s3cret" not in lines
    assert b"spark.authenticate" not in lines

"""Tests of the command line: help, exit codes, error messages of a single paragraph, and JSON reports on stdout."""

from __future__ import annotations

import contextlib
import errno
import importlib.metadata
import json
import os
import pwd
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import pytest
import torch
import typer
from command_server import assert_user_error, run_command
from open_sockets import free_port
from PIL import Image
from typer.testing import CliRunner

from jobs.cli import COMMANDS as ALL_COMMANDS
from jobs.cli import INTERACTIVE_COMMANDS, STAGE_COMMANDS, WEIGHT_COMMANDS, Commands, app, main, run
from jobs.doctor import check_delta_jar
from jobs.local_server import run_server
from pipelines.config import load_model
from pipelines.errors import StageFailed
from pipelines.platform import user_name
from vlm import text
from vlm.checkpoint import save_model
from vlm.config import CharsConfig
from vlm.factory import build_model

NOW = datetime(2026, 1, 1, tzinfo=UTC)
COMMANDS = [*STAGE_COMMANDS, *INTERACTIVE_COMMANDS]
WEIGHT_COMMAND_NAMES = [*WEIGHT_COMMANDS]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Use a new Lakesight home folder and a new working folder."""
    monkeypatch.setenv("LAKESIGHT_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


def lakesight(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a `lakesight` command in a process that is forked from a process with torch already imported."""
    return run_command(*arguments, environment=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | environment)


def lakesight_in_new_interpreter(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a `lakesight` command in a new process, as the console script does."""
    command = [sys.executable, "-c", "from jobs.cli import main; main()", *arguments]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


# ------------------------------------------------------------------------------------------------ the command line


def test_help_lists_every_command_and_a_first_command_to_run() -> None:
    done = lakesight_in_new_interpreter("--help")
    assert done.returncode == 0
    assert [name for name in COMMANDS + WEIGHT_COMMAND_NAMES if f"\n  {name}" not in done.stdout] == []
    assert "lakesight demo" in done.stdout


@pytest.mark.parametrize("name", [*COMMANDS, *WEIGHT_COMMAND_NAMES])
def test_the_help_of_a_command_fits_into_80_columns_and_begins_like_its_line_in_the_command_list(name: str) -> None:
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    assert command.help.partition("\n")[0] == ALL_COMMANDS[name]
    text = CliRunner().invoke(app, [name, "-h"], terminal_width=80).output
    assert text == CliRunner().invoke(app, [name, "--help"], terminal_width=80).output
    assert [line for line in text.splitlines() if len(line) > 80] == []


def test_option_version_prints_the_package_version_and_the_help_lists_every_command_with_its_text() -> None:
    assert CliRunner().invoke(app, ["--version"]).output == f"lakesight {importlib.metadata.version('lakesight')}\n"
    listed = CliRunner().invoke(app, ["-h"], terminal_width=80).output
    assert [
        name for name, text in ALL_COMMANDS.items() if not re.search(rf"^  {name} +{re.escape(text)}$", listed, re.M)
    ] == []


def test_shell_completion_offers_commands_options_and_runs() -> None:
    completed = {"rol": "rollback", "train --ru": "--run", "train --run pal": "paligemma"}
    for typed, expected in completed.items():
        words = {"COMP_WORDS": f"lakesight {typed}", "COMP_CWORD": str(len(typed.split()))}
        done = lakesight(_LAKESIGHT_COMPLETE="complete_bash", **words)
        assert expected in done.stdout.split(), done


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_the_common_options_and_shows_an_example(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    assert f"\n  lakesight {name}" in command.help
    options = {option for parameter in command.params for option in parameter.opts}
    assert {"--platform", "--set"} <= options
    assert "--run" in options or name == "demo"
    assert "--json" in options or name in ("ui", "review", "serve"), "a server prints no report"


@pytest.mark.parametrize("name", WEIGHT_COMMAND_NAMES)
def test_weight_commands_have_no_run_option_and_show_an_example(name: str) -> None:
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    assert f"\n  lakesight {name}" in command.help
    options = {option for parameter in command.params for option in parameter.opts}
    assert {"--out", "--json"} <= options
    assert "--run" not in options


@pytest.mark.parametrize(
    "arguments", [["no-such-command"], ["train", "--no-such-option"], ["ui", "--port", "70000"], ["rollback", "x"]]
)
def test_a_command_line_that_cannot_be_parsed_ends_with_exit_code_2(arguments: list[str]) -> None:
    done = lakesight(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Usage: " in done.stderr


def test_a_successful_command_returns_without_raising_system_exit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["lakesight", "config"])
    main()


def failing(error: BaseException) -> typer.Typer:
    """Return a command line app whose only command raises the given error."""
    commands = typer.Typer(cls=Commands, pretty_exceptions_enable=False)

    def fail() -> None:
        raise error

    commands.command()(fail)
    commands.callback()(lambda: None)
    return commands


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (KeyboardInterrupt(), 1, "interrupted; run the same command again to resume"),
        (StageFailed("the ranks failed", where="rank 1"), 1, "the ranks failed. Where: rank 1."),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "the disk is full"),
        (RuntimeError("java.io.IOException: No space left on device"), 2, "the disk is full"),
        (PermissionError(errno.EACCES, "Permission denied", "shards"), 2, "Where: shards. Got: Permission denied."),
        (RuntimeError("Py4J:\n: java.io.IOException: x (Permission denied)"), 2, "Got: java.io.IOException: x (Perm"),
        (OSError("delta-rs\n \x1b[31m\u21b3\x1b[0m Read-only file system (os error 30)"), 2, "Got: Read-only file"),
        (OSError("delta-rs\n \x1b[31m\u21b3\x1b[0m No space left on device (os error 28)"), 2, "Got: No space left"),
    ],
)
def test_an_error_is_printed_as_one_paragraph_and_sets_the_exit_code(
    error: BaseException, code: int, expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["lakesight", "fail"])
    with pytest.raises(SystemExit) as end:
        run(failing(error))
    assert end.value.code == code
    shown = capsys.readouterr().err
    assert expected in shown
    assert len(shown.strip().splitlines()) == 1


SLEEP = """
import os, sys, time, typer
from jobs.cli import Commands, run
app = typer.Typer(cls=Commands)
app.callback()(lambda: None)
os.register_at_fork(after_in_child=lambda: time.sleep(0.5))  # the signal arrives before the child has begun to work

@app.command()
def sleep():
    if (child := os.fork()) == 0:
        time.sleep(600)
    try:
        print(child, flush=True)  # from here on the test may send the signal
        time.sleep(600)
    finally:
        os.kill(os.getpid(), 15)  # a scheduler's second SIGTERM does not interrupt the cleanup
        os.kill(child, 15)
        print(os.waitpid(child, 0)[1], flush=True)

run(app)
"""


def test_sigterm_interrupts_a_command_as_ctrl_c_does_and_ends_a_forked_child_at_once() -> None:
    command = [sys.executable, "-c", SLEEP, "sleep"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert int(process.stdout.readline()) > 0
        process.terminate()
        printed, shown = process.communicate(timeout=60)
    assert process.returncode == 1
    assert shown.strip() == "interrupted; run the same command again to resume."
    assert int(printed) == signal.SIGTERM  # exit status of a child process that SIGTERM has ended


def test_commands_succeed_for_a_user_whose_name_and_home_folder_are_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(_: int) -> None:
        raise KeyError("getpwuid(): uid not found")

    monkeypatch.setattr(pwd, "getpwuid", unknown)  # as in a container whose user is not in /etc/passwd
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: contextlib.nullcontext())
    for name in ("HOME", "LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    assert user_name() == f"user {os.getuid()}"
    assert check_delta_jar().status == "ok"


def test_an_unexpected_error_prints_a_traceback_without_passwords_and_the_error_message_as_last_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["lakesight", "fail"])
    with pytest.raises(SystemExit) as end:
        run(failing(ValueError("no answer of http://me:c4nary@host\nsecond line")))
    shown = capsys.readouterr().err
    assert end.value.code == 1
    assert "Traceback" in shown
    assert shown.strip().splitlines()[-1] == "lakesight failed with ValueError: no answer of http://host"
    assert "c4nary" not in shown


def test_a_command_writes_only_its_report_to_stdout_even_if_child_processes_print() -> None:
    code = (
        "import subprocess\nfrom jobs.common import open_output\n"
        "with open_output(as_json=True) as output:\n"
        "    print('python noise')\n    subprocess.run(['echo', 'child noise'])\n"
        "    output.line('stage', 'for people')\n    output.report({'value': float('nan')})\n"
        "print('after')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[3], check=False
    )
    assert done.stdout == '{"value":null}\nafter\n', done.stderr
    assert all(noise in done.stderr for noise in ("python noise", "child noise", "stage       for people"))


# ------------------------------------------------------------------------------------------------ invalid input


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["config", "--run", "demmo"], ["no run is called 'demmo'", "did you mean 'demo'?"]),
        (["train", "--set", "train.stepz=1", "--set", "model.no=1"], ["2 problems", "train.stepz", "model.no"]),
        (["train", "--set", "platform.spark.master=moon"], ["platform.spark.master"]),
        (["ingest", "--platform", "cloud"], ["no platform is called 'cloud'", "databricks, local"]),
        (["show", "samples"], ["no table 'samples'", "no tables at all", "run `lakesight ingest` first"]),
        (["lineage", "x", "--run", "emoji"], ["no table 'generated_captions'", "run `lakesight caption --run emoji`"]),
        (["show", "generated"], ["no table 'generated'", "choose a table, a view or the path of a folder"]),
        (["shard", "--run", "emoji"], ["the train split has no rows", "run `lakesight ingest --run emoji` first"]),
        (["show", "samples", "--platform", "databricks"], ["platform.catalog: missing"]),
        (["ask"], ["there is nothing to ask", "neither a picture nor a prompt"]),
        (["ask", "--prompt", "why?", "--draw", "x.png"], ["--draw can draw only on a single picture", "0 pictures"]),
        (["ask", "a.png", "b.png", "--draw", "x.png"], ["--draw can draw only on a single picture", "2 pictures"]),
        (["ask", "a.png", "--draw", "nowhere/x.png"], ["the drawing cannot be written", "no such folder"]),
        (
            ["ask", "a.png", "--draw", "x.txt"],
            ["the drawing cannot be written", "'.txt' is not the suffix of a picture format"],
        ),
        (["ask", "no-such.png"], ["the picture cannot be read", "no-such.png", "No such file"]),
    ],
)
def test_a_command_with_invalid_input_prints_one_paragraph_and_ends_with_exit_code_2(
    arguments: list[str], expected: list[str]
) -> None:
    assert_user_error(lakesight(*arguments), *expected)


def test_a_home_folder_that_is_not_writable_is_reported_before_work_starts(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file, not a folder")
    done = lakesight("ingest", LAKESIGHT_HOME=str(tmp_path / "file" / "home"))
    assert_user_error(done, "home folder cannot be written", "LAKESIGHT_HOME")


def test_the_error_about_missing_java_says_how_to_install_java(home: Path) -> None:
    done = lakesight("ingest", "--set", "data.source.path=scenes:10:0", JAVA_HOME="/nonexistent")
    assert done.returncode == 2
    assert "Java 17" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (home / "warehouse").exists()


def test_a_port_in_use_is_reported_before_a_server_starts() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert_user_error(lakesight("ui", "--port", str(port)), f"127.0.0.1:{port}", "Address already in use")


def test_the_address_of_a_server_is_announced_only_when_the_server_accepts_connections(tmp_path: Path) -> None:
    code = "import socket, sys, time\ntime.sleep(0.5)\nsocket.create_server(('127.0.0.1', int(sys.argv[1]))).accept()"
    port = free_port()
    answered: list[str] = []
    command = [sys.executable, "-c", code, str(port)]
    ready = partial(answered.append, "ready")
    assert run_server(command, os.environ, tmp_path, port, ready) == 0, "the server ends after the first connection"
    assert answered == ["ready"]
    assert run_server([sys.executable, "-c", "pass"], os.environ, tmp_path, port, ready) == 0
    assert answered == ["ready"], "a server that never listens is not announced"


def test_ui_prints_the_address_of_the_tracking_server_without_the_password() -> None:
    done = lakesight("ui", MLFLOW_TRACKING_URI="https://me:secret@mlflow.example/x?token=secret")
    assert_user_error(done, "https://mlflow.example/x")
    assert "secret" not in done.stderr


def test_doctor_reports_failed_checks_with_fixes_and_ends_with_exit_code_1() -> None:
    done = lakesight("doctor", "--json", JAVA_HOME="/nonexistent")
    report = json.loads(done.stdout)
    checks = {check["name"]: check for check in report["checks"]}
    assert (done.returncode, report["ready"], checks["java"]["status"]) == (1, False, "fail")
    assert "install a JDK" in checks["java"]["fix"]
    assert checks["home"]["status"] in ("ok", "warn")
    assert done.stderr.strip().splitlines()[-1].startswith("this machine is not ready. Got: java")


def test_command_doctor_compares_the_number_of_task_slots_with_the_number_of_ranks() -> None:
    overrides = ["--set", "platform.spark.master=local-cluster[1,1,1024]", "--set", "platform.ranks=3"]
    done = lakesight("doctor", "--json", *overrides)
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert (done.returncode, checks["slots"]["status"]) == (1, "fail")
    assert "--set platform.ranks=1" in checks["slots"]["fix"]


# ------------------------------------------------------------------------------------------------ config


def test_command_config_prints_the_resolved_run_as_a_valid_run_file(tmp_path: Path) -> None:
    import yaml

    done = lakesight("config", "--run", "demo", "--set", "train.steps=5")
    resolved = yaml.safe_load(done.stdout)
    assert resolved["train"]["steps"] == 5
    assert json.loads(lakesight("config", "--set", "train.steps=5", "--json").stdout) == resolved


def test_command_config_models_reports_the_number_of_parameters_of_the_built_model() -> None:
    listed = json.loads(lakesight("config", "models", "--json").stdout)["models"]
    nano = load_model("nano")
    built = build_model(nano, vocab_size=nano.text.vocab_size)  # type: ignore[union-attr]
    (counted,) = [model["parameters"] for model in listed if model["name"] == "nano"]
    assert counted == sum(p.numel() for p in built.parameters())
    shown = lakesight("config", "models").stdout.splitlines()
    assert [line for line in shown if len(line) > 80] == []
    assert next(line for line in shown if line.startswith("nano ")).split()[1:3] == ["1.02", "M"]


# ------------------------------------------------------------------------------------------------ ask


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Save a model with random weights and return its checkpoint folder."""
    tokenizer = text.learn(CharsConfig(kind="chars", alphabet="abc "), ())
    torch.manual_seed(1)
    save_model(tmp_path / "checkpoint", build_model(load_model("nano"), tokenizer.vocab_size), tokenizer)
    return tmp_path / "checkpoint"


def test_ask_answers_from_a_checkpoint_without_spark_or_a_registry(checkpoint: Path, tmp_path: Path) -> None:
    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    streamed = lakesight("ask", "red.png", "--checkpoint", str(checkpoint), JAVA_HOME="/nonexistent")
    assert streamed.returncode == 0, streamed.stderr
    report = json.loads(lakesight("ask", "red.png", "--checkpoint", str(checkpoint), "--json").stdout)
    assert streamed.stdout == report["caption"] + "\n"
    assert report["num_tokens"] > 0


@pytest.mark.matrix
def test_ask_supports_other_precisions_and_refuses_unknown_precisions(checkpoint: Path, tmp_path: Path) -> None:
    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    command = ["ask", "red.png", "--checkpoint", str(checkpoint), "--json", "--precision"]
    quantized = lakesight(*command, "int8")
    assert quantized.returncode == 0, quantized.stderr
    answer = json.loads(quantized.stdout)
    assert (answer["precision"], answer["num_tokens"] > 0) == ("int8", True)
    refused = lakesight(*command, "int3")
    assert (refused.returncode, "int3" in refused.stderr, "int4" in refused.stderr) == (2, True, True)


def test_ask_refuses_a_file_that_is_not_a_picture_and_a_folder_that_is_not_a_checkpoint(
    checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "note.png").write_text("not a picture")
    assert_user_error(lakesight("ask", "note.png", "--checkpoint", str(checkpoint)), "note.png", "not_an_image")
    Image.new("RGB", (32, 32)).save(tmp_path / "black.png")
    done = lakesight("ask", "black.png", "--checkpoint", str(tmp_path / "nowhere"))
    assert_user_error(done, "nowhere", "config.json")

"""Tests of what commands print for people: numbers, lists in 80 columns, and the suggested next command."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from local_platforms import open_local

from jobs.common import Job, open_job
from jobs.output import CommandOutput, format_error, has_colours, number, reserved_stdout
from jobs.promote import advice
from pipelines.config import load_run
from pipelines.errors import StageFailed, UserError


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((-3.47e-18, "0"), (0.0, "0"), (118.04, "118"), (0.0317, "0.0317"), (31.2, "31.2"), (6.0, "6")),
        *((1234.5, "1,234"), (-86.8, "-86.8"), (0.00012345, "0.000123"), (float("nan"), "nan"), (float("inf"), "inf")),
    ],
)
def test_numbers_are_printed_with_few_digits_and_without_an_exponent(value: float, text: str) -> None:
    assert number(value) == text


def test_a_printed_change_has_a_sign_unless_the_change_is_zero() -> None:
    assert [number(value, signed=True) for value in (0.3, -0.3, 1e-18)] == ["+0.3", "-0.3", "0"]


@settings(max_examples=50)
@given(st.floats(-1e12, 1e12))
def test_a_number_is_printed_without_an_exponent_and_with_a_small_rounding_error(value: float) -> None:
    text = number(value)
    assert "e" not in text
    assert float(text.replace(",", "")) == pytest.approx(value, rel=0.006, abs=1e-9)


@settings(max_examples=20)
@given(st.lists(st.text("abcdefgh ", min_size=1, max_size=40).map(str.strip).filter(bool), max_size=30))
def test_lists_are_printed_completely_in_lines_of_at_most_80_columns(items: list[str]) -> None:
    out = io.StringIO()
    CommandOutput(out, as_json=False).items("columns", items)
    lines = out.getvalue().splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert " ".join(line[12:] for line in lines) == ", ".join(items)


def test_the_suggested_next_command_names_the_platform_file_and_no_setting_of_spark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "conf" / "platform").mkdir(parents=True)
    (tmp_path / "conf" / "platform" / "cluster.yml").write_text("kind: local\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    overrides = ("train.steps=9", "platform.spark.conf.spark.hadoop.fs.s3a.secret.key=s3cret")
    config = load_run("demo", platform="cluster", overrides=overrides)
    job = Job(
        config, open_local(monkeypatch, tmp_path / "home"), overrides, CommandOutput(io.StringIO(), as_json=False)
    )
    assert job.command("train") == "lakesight train --run demo --platform cluster --set train.steps=9"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ([], "raise data.split.val and data.split.test"),
        (["data.split={kind: column}"], "the split test has too few pictures (4) to judge a model: give it more rows"),
        (["gate.min_pictures=4"], None),
        (["data.evaluate_on=train"], None),
    ],
)
def test_the_next_step_is_to_use_more_pictures_if_a_model_version_is_refused_after_a_test_on_few_pictures(
    changes: list[str], expected: str | None
) -> None:
    text = advice(load_run("demo", overrides=changes), "3", pictures=4)
    assert "run `lakesight ask PICTURE --version 3`" in text
    assert (expected or "look at the captions in the gallery") in text
    assert ("too few pictures" in text) == bool(expected)


# ------------------------------------------------------------------------------------------------ errors


WORDS = st.lists(st.text("abcdefgh.-", min_size=1, max_size=30), min_size=1, max_size=20).map(" ".join)


@settings(max_examples=30)
@given(WORDS, st.lists(WORDS, min_size=1, max_size=4), WORDS, st.integers(60, 120))
def test_an_error_on_a_terminal_is_wrapped_between_words_and_has_one_line_for_each_problem(
    what: str, problems: list[str], fix: str, width: int
) -> None:
    shown = format_error(StageFailed(what, got=problems, fix=fix), width, colours=False)
    lines = shown.splitlines()
    assert all(len(line) <= width for line in lines)
    starts = [line for line in lines if line[7:].startswith("- ")]
    assert len(problems) == 1 or len(starts) >= len(problems)
    words = " ".join(line[7:] for line in lines).replace("- ", " ").split()
    assert words == " ".join([what, *problems, fix]).replace("- ", " ").split()


def test_an_error_on_a_terminal_does_not_wrap_commands_and_has_colours_only_if_requested() -> None:
    error = UserError("there is no such model", got="birds", fix="train it first: `lakesight pipeline --run birds` now")
    lines = format_error(error, 40, colours=False).splitlines()
    assert lines == [
        "error  there is no such model",
        "got    birds",
        "fix    train it first:",
        "       `lakesight pipeline --run birds`",
        "       now",
    ]
    coloured = format_error(error, 40, colours=True)
    assert coloured != "\n".join(lines)
    assert re.sub(r"\x1b\[\d*m", "", coloured).splitlines() == lines


def test_error_parts_are_coloured_on_a_terminal_unless_the_environment_variable_no_color_is_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [sys.executable, "-c", "from jobs.cli import main; main()", "config", "--set", "train.stepz=1"]
    environment = os.environ | {"NO_COLOR": "", "TERM": "xterm", "COLUMNS": "60", "LAKESIGHT_HOME": str(tmp_path)}
    terminal, stderr = pty.openpty()
    path = {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment | path, stderr=stderr, stdout=subprocess.DEVNULL, check=False)
    shown = os.read(terminal, 65536).decode()
    lines = re.sub(r"\x1b\[\d*m", "", shown).splitlines()
    assert done.returncode == 2
    assert lines[:2] == ["error  the configuration has 1 problem", "where  run demo"]
    assert all(len(line) <= 60 for line in lines)
    assert any(line.endswith("train.stepz: unknown key, did you mean 'steps'?") for line in lines)
    assert "\x1b[" in shown
    with os.fdopen(stderr, "w") as stream:
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.delenv("NO_COLOR", raising=False)
        assert has_colours(stream)
        monkeypatch.setenv("NO_COLOR", "1")
        assert not has_colours(stream)
    os.close(terminal)


@pytest.mark.parametrize(
    ("fix", "shown"),
    [
        ("run `lakesight ingest` first", "run `lakesight ingest --run emoji --set train.seed=1` first"),
        ("`lakesight quarantine replay`", "`lakesight quarantine replay --run emoji --set train.seed=1`"),
        ("try `lakesight demo`", "try `lakesight demo`"),
        ("`lakesight train --run birds`", "`lakesight train --run birds`"),
        ("free disk space", "free disk space"),
    ],
)
def test_the_commands_that_an_error_proposes_name_the_run_of_the_failed_command(
    fix: str, shown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAKESIGHT_HOME", str(tmp_path))
    with pytest.raises(UserError) as raised, open_job("emoji", "local", ["train.seed=1"], False):
        raise UserError("it failed", fix=fix)
    assert str(raised.value) == f"it failed. Fix: {shown}."


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_on_a_terminal_are_wrapped_between_words_but_commands_are_never_wrapped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("NO_COLOR", "1")
    out = Terminal()
    printer = CommandOutput(out, as_json=False)
    printer.line("ingest", "220 rows = 210 new + 10 quarantined")
    printer.next("lakesight pipeline --run birds --set train.steps=150")
    assert out.getvalue().splitlines() == [
        "ingest      220 rows = 210 new + 10",
        "            quarantined",
        "next        lakesight pipeline --run birds --set train.steps=150",
    ]


def test_each_of_several_suggested_next_commands_is_printed_on_a_separate_line() -> None:
    out = io.StringIO()
    CommandOutput(out, as_json=False).next("lakesight ui", "lakesight demo")
    assert out.getvalue() == "next        lakesight ui\nor          lakesight demo\n"


ATTACK = "\x1b[8mA\x1b]0;t\x07B\x00C\rD\x9b2JE\u202eF\u2066G\u2028H\udcffI\nJ"
SHOWN = r"\x1b[8mA\x1b]0;t\x07B\x00C\rD\x9b2JE\u202eF\u2066G\u2028H\udcffI\nJ"


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_no_method_of_the_output_prints_control_characters_of_data(
    stream: type[io.StringIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    out = stream()
    printer = CommandOutput(out, as_json=False)
    printer.line(f"{ATTACK:<12}", ATTACK, mark=ATTACK, colour="red")
    printer.hanging(ATTACK, ATTACK)
    printer.items("ids", [ATTACK, ATTACK])
    printer.next(ATTACK)
    printer.text(ATTACK, end="")
    printed = re.sub("\x1b\\[(0|1|31)m", "", out.getvalue())
    several_lines = SHOWN.replace(r"\n", "\n")
    assert printed.splitlines() == [
        SHOWN * 3,
        SHOWN * 2,
        f"ids         {SHOWN},",
        f"            {SHOWN}",
        *f"next        {several_lines}".splitlines(),
        *several_lines.splitlines(),
    ]
    assert ("\x1b[31m" in out.getvalue()) == (stream is Terminal)


def test_a_json_report_contains_no_control_characters_and_the_unchanged_values() -> None:
    out = io.StringIO()
    attack = ATTACK.replace("\udcff", "\u00e9")
    CommandOutput(out, as_json=True).report({"id": attack})
    [line] = out.getvalue().splitlines()
    assert re.search("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]", line) is None
    assert json.loads(line) == {"id": attack}


class Page(io.StringIO):
    """Stdout of a notebook: texts go to the page, although the stream has the file descriptor of a log."""

    def __init__(self, log: int) -> None:
        super().__init__()
        self._log = log

    def fileno(self) -> int:
        return self._log


def test_a_report_goes_to_the_page_of_a_notebook_and_not_to_the_log_whose_descriptor_stdout_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (tmp_path / "driver.log").open("w") as log:
        page = Page(log.fileno())
        monkeypatch.setattr(sys, "stdout", page)
        with reserved_stdout() as out:
            CommandOutput(out, as_json=False).line("ingest", "nothing new")
            print("noise of a library")
    assert page.getvalue() == "ingest      nothing new\n"
    assert (tmp_path / "driver.log").read_text() == ""

"""Each command either uses the generation settings of `--set`, or refuses them with an error that lists them."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import typer
from generation_cases import CASES

from jobs.cli import COMMANDS, app
from jobs.common import open_job
from jobs.generation_options import GENERATION, GENERATION_COMMANDS
from jobs.settings_of_version import decoding_settings, with_overrides
from pipelines.config import load_run
from pipelines.driver.model_files import ModelFiles
from pipelines.errors import UserError

COMMAND_LINES = {"show": ["samples"], "lineage": ["an-id"], "quarantine": ["show"]}
"""Arguments of the commands that need arguments."""
OTHER_STAGES = ("train.steps=500", "gate.min_blind_gap=0.5", "model.decoder.context=96", "drift.fail=true")
"""Settings of stages that most commands do not run."""


def has_overrides(name: str) -> bool:
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    return any("--set" in parameter.opts for parameter in command.params)


REFUSING = sorted(name for name in COMMANDS if name not in GENERATION_COMMANDS and has_overrides(name))


def run(*words: str) -> None:
    typer.main.get_command(app).main(list(words), standalone_mode=False)


def options(*settings: str) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LAKESIGHT_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_the_commands_that_caption_nothing_are_the_commands_that_refuse_generation_settings() -> None:
    assert set(GENERATION_COMMANDS) <= set(COMMANDS)
    assert [
        *("decisions", "endpoint", "ingest", "lineage", "maintain", "migrate", "quarantine", "review", "rollback"),
        *("shard", "show", "ui"),
    ] == REFUSING


@pytest.mark.parametrize("command", REFUSING)
def test_a_command_that_captions_nothing_refuses_each_generation_setting_and_names_the_command_to_use(
    command: str, home: Path
) -> None:
    for name, (_, value) in CASES.items():
        setting = f"{GENERATION}.{name}={value}"
        with pytest.raises(UserError, match="captions nothing") as refused:
            run(command, *COMMAND_LINES.get(command, []), "--run", "emoji", *options("train.steps=5", setting))
        assert refused.value.where == f"lakesight {command}"
        assert refused.value.got == f"--set {shlex.quote(setting)}"
        assert f"`lakesight caption --run emoji --set {shlex.quote(setting)}`" in refused.value.fix
        assert f"`lakesight train --run emoji --set {shlex.quote(setting)}`" in refused.value.fix
    for setting in (f" {GENERATION} = {{num_beams: 3}}", f"{GENERATION}.no_such_setting=1"):
        with pytest.raises(UserError, match="captions nothing"):
            run(command, *COMMAND_LINES.get(command, []), *options(setting))
    assert not home.exists()


def test_settings_of_other_stages_are_accepted_by_commands_that_caption_nothing(home: Path) -> None:
    with pytest.raises(UserError, match="there is no table 'samples'"):
        run("show", "samples", *options(*OTHER_STAGES))
    with pytest.raises(UserError, match=r"missing\.csv"):
        run("ingest", *options(*OTHER_STAGES, f"data.source.path={home}/missing.csv"))


def test_commands_that_are_printed_keep_generation_settings_only_if_the_printed_command_follows_them() -> None:
    settings = ["train.steps=5", f"{GENERATION}.num_beams=3"]
    with open_job("demo", "local", settings, as_json=False) as job:
        for name in ("train", "evaluate", "compare", "caption", "ask", "serve", "pipeline"):
            assert job.command(name) == f"lakesight {name} --run demo --set train.steps=5 --set {settings[1]}"
        for name in (*REFUSING, "promote"):  # the gate uses the generation settings of the version
            assert job.command(name) == f"lakesight {name} --run demo --set train.steps=5"
        assert job.add_run("run `lakesight ingest` first") == (
            "run `lakesight ingest --run demo --set train.steps=5` first"
        )


@pytest.mark.parametrize(
    ("settings", "changed"),
    [
        (["num_beams=4"], {"num_beams": 4}),
        (["max_new_tokens=5"], {"max_new_tokens": 5}),
        (["temperature=0.7", "max_new_tokens=5"], {"temperature": 0.7, "max_new_tokens": 5}),
        (["temperature=0.7"], {"temperature": 0.7}),
        (["temperature=0"], None),
        ([], None),
    ],
)
def test_an_option_of_an_evaluation_changes_the_settings_at_temperature_0_of_a_version_that_samples(
    tmp_path: Path, settings: list[str], changed: dict[str, float] | None
) -> None:
    config = load_run("demo").model
    own = config.generation.changed({"temperature": 0.7})
    (tmp_path / "config.json").write_text(config.model_copy(update={"generation": own}).model_dump_json())
    version = ModelFiles(folder=tmp_path, name="m", version="1", run_id="r")
    given = [f"{GENERATION}.{setting}" for setting in settings]
    with open_job("demo", "local", given, as_json=False, uses_version=True) as job:
        found = with_overrides(job, version).settings
    assert found == (None if changed is None else own.changed({"temperature": 0.0} | changed))


@pytest.mark.parametrize("tokens", [64, 200])
def test_generation_settings_are_checked_against_the_trained_model_and_not_against_the_model_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokens: int
) -> None:
    small = load_run("demo").model
    assert small.decoder.context - small.num_slots < 64
    settings = small.model_dump(by_alias=True) | {"generation": {"temperature": 0.7, "max_new_tokens": 20}}
    for path, text in {
        "run/small.yml": "{model: sampling, data: demo, train: demo}",
        "model/sampling.yml": json.dumps(settings, default=str),
    }.items():
        (tmp_path / "conf" / path).parent.mkdir(parents=True)
        (tmp_path / "conf" / path).write_text(text)
    monkeypatch.chdir(tmp_path)
    large = small.model_copy(update={"decoder": small.decoder.model_copy(update={"context": 128})})
    given = [f"{GENERATION}.max_new_tokens={tokens}", f"{GENERATION}.num_beams=4"]
    with open_job("small", "local", given, as_json=False, uses_version=True) as job:
        if tokens == 64:
            found = decoding_settings(job, large, "birds/3")
            assert (found.max_new_tokens, found.num_beams, found.temperature) == (64, 4, 0.0)
        else:
            with pytest.raises(UserError, match="do not fit") as refused:
                decoding_settings(job, large, "birds/3")
            assert (refused.value.where, "decoder.context 128" in str(refused.value.got)) == ("birds/3", True)

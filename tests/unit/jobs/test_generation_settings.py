"""Each generation setting changes the captions of commands, of the registered model and of its server in the same way.

Without Spark, the tests call the functions that `caption` and `evaluate` run on executors.
"""

from __future__ import annotations

import base64
import inspect
import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
from generation_cases import CASES, PICTURES, CaptionedPictures, Settings
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import scoring_server

from jobs.ask import ask
from jobs.caption import caption
from jobs.cli import app
from jobs.evaluate import evaluate
from jobs.generation_options import OPTIONS, with_generation_options
from jobs.serve import serve
from pipelines.config import LimitsConfig, load_run
from pipelines.errors import UserError
from pipelines.executor.caption import CaptionJob, caption_batches
from pipelines.executor.evaluate import ScoreJob, score_batches
from pipelines.tracking import logged_model
from pipelines.tracking import model as registered_model
from vlm.config import GenerationConfig, Precision

TEXT_COLUMNS = ["model_name", "model_version", "settings_hash", "settings", "prompt", "source_table", "run_id"]


class World(CaptionedPictures):
    """A model, its pictures, and the folders and files that commands, executors and servers read."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        mlflow.pyfunc.save_model(
            folder / "version",
            python_model=str(Path(str(registered_model.__file__))),
            artifacts={file: str(folder / "checkpoint" / file) for file in logged_model.MODEL_FILES},
            signature=logged_model.signature(self.captioner.model.config.generation),
            pip_requirements=["mlflow"],
        )
        self.version = mlflow.pyfunc.load_model(str(folder / "version"))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def by_ask(world: World, settings: Settings, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Ask about the first picture only, because each command takes time to start a process that decodes its picture."""
    capsys.readouterr()
    ask([world.files[0]], checkpoint=world.folder / "checkpoint", as_json=True, **settings)
    return [json.loads(capsys.readouterr().out)["caption"]]


def by_caption(world: World, settings: Settings, _: object) -> list[str]:
    output = world.folder / "captions"
    output.mkdir(exist_ok=True)
    job = CaptionJob(
        model_folder=world.folder / "checkpoint",
        model_digest="",
        remote=False,
        precision=Precision.FP32,
        prompt="",
        settings=world.captioner.settings(**settings),
        limits=LimitsConfig(min_side=4),
        image_root=None,
        threads=1,
        output_folder=output,
        rows_per_file=PICTURES,
        constants={**dict.fromkeys(TEXT_COLUMNS, ""), "source_version": 0},
        started_at=datetime.now(UTC),
    )
    columns = {"image_id": list("0123"), "image": [file.read_bytes() for file in world.files], "known": [None] * 4}
    columns |= {"known_error": [None] * 4, "source_file": ["file"] * 4}
    texts = ("known", "known_error", "source_file")
    schema = pa.schema([("image_id", pa.string()), ("image", pa.binary()), *((name, pa.string()) for name in texts)])
    before = set(output.iterdir())
    list(caption_batches(job, iter([pa.RecordBatch.from_pydict(columns, schema)])))
    (written,) = set(output.iterdir()) - before
    return [row["caption"] for row in pq.read_table(written).to_pylist()]


def by_evaluate(world: World, settings: Settings, _: object) -> list[str]:
    job = ScoreJob(
        model_folder=world.folder / "checkpoint",
        model_digest="",
        remote=False,
        shards_folder=str(world.shards.folder),
        threads=1,
        settings=world.captioner.settings(**settings) if settings else None,
    )
    (scores,) = score_batches(job, iter([pa.RecordBatch.from_pydict({"id": list(range(PICTURES))})]))
    return list(scores.column("caption").to_pylist())


def by_changed_defaults(world: World, settings: Settings, _: object) -> list[str]:
    """Change the defaults of a copy of the version, as `serve` does, and send the copy a request without settings."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "version"
        shutil.copytree(world.folder / "version", copy)
        logged_model.set_generation_defaults(copy, world.captioner.settings(**settings), where="copy")
        version = mlflow.pyfunc.load_model(str(copy))
        frame = pd.DataFrame({"image": [file.read_bytes() for file in world.files]})
        return list(version.predict(frame)["caption"])


def by_pyfunc(world: World, settings: Settings, _: object) -> list[str]:
    frame = pd.DataFrame({"image": [file.read_bytes() for file in world.files]})
    return list(world.version.predict(frame, params=settings)["caption"])


def by_server(world: World, settings: Settings, _: object) -> list[str]:
    """Send the body of a request to the function with which MLflow's server answers requests."""
    rows = [[base64.b64encode(file.read_bytes()).decode()] for file in world.files]
    body = {"dataframe_split": {"columns": ["image"], "data": rows}, "params": settings}
    schema = world.version.metadata.get_input_schema()
    answer = scoring_server.invocations(  # type: ignore[no-untyped-call]
        json.dumps(body), "application/json", world.version, schema
    )
    assert answer.status == 200
    return [row["caption"] for row in json.loads(answer.response)["predictions"]]


SURFACES: dict[str, Callable[[World, Settings, Any], list[str]]] = {
    "ask": by_ask,
    "caption": by_caption,
    "evaluate": by_evaluate,
    "pyfunc": by_pyfunc,
    "server": by_server,
    "defaults of the server": by_changed_defaults,
}


def test_this_file_tests_every_generation_setting_with_a_value_that_changes_the_captions(world: World) -> None:
    assert set(CASES) == set(OPTIONS) == set(logged_model.PARAMETERS) == set(GenerationConfig.model_fields)
    for name, (needed, value) in CASES.items():
        changed, before = world.expected(needed | {name: value}), world.expected(needed)
        assert changed[0] != before[0], name


@pytest.mark.parametrize("surface", SURFACES)
@pytest.mark.parametrize("name", CASES)
def test_every_generation_setting_is_applied_by_all_commands_and_by_the_registered_model_and_its_server(
    surface: str, name: str, world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAKESIGHT_HOME", str(world.folder / "home"))
    needed, value = CASES[name]
    captions = SURFACES[surface](world, needed | {name: value}, capsys)
    assert captions == world.expected(needed | {name: value})[: len(captions)]


@pytest.mark.parametrize("surface", ["caption", "evaluate", "pyfunc", "server"])
def test_captions_follow_the_generation_settings_in_the_model_config_if_no_settings_are_given(
    surface: str, world: World
) -> None:
    assert SURFACES[surface](world, {}, None) == world.expected({})


@pytest.mark.parametrize("settings", [{"top_p": 2.0}, {"num_beams": 3, "temperature": 1.0}, {"max_new_tokens": 0}])
def test_an_invalid_setting_in_a_request_is_refused_and_the_error_names_the_setting(
    world: World, settings: Settings
) -> None:
    for surface in (by_pyfunc, by_server):
        with pytest.raises(MlflowException, match=next(iter(settings))):
            surface(world, settings, None)


def test_a_generation_option_on_the_command_line_has_the_same_effect_as_the_override_of_its_setting() -> None:
    seen: list[Sequence[str] | None] = []

    def command(*, overrides: list[str] | None = None) -> None:
        seen.append(overrides)

    decorated = with_generation_options(command)
    decorated(stop=["a: b", "\U0001f600", '"'], temperature=1e-7, overrides=["train.steps=1"])
    decorated()
    assert seen[1] == []
    first = list(seen[0] or ())
    assert first[0] == "train.steps=1"
    assert set(inspect.signature(decorated).parameters) == {"overrides", *OPTIONS}
    generation = load_run("demo", overrides=first[1:]).model.generation
    assert (generation.temperature, generation.stop) == (1e-7, ("a: b", "\U0001f600", '"'))


@pytest.mark.parametrize("command", [ask, caption, evaluate, serve])
def test_every_command_that_captions_has_an_option_for_each_generation_setting(command: Callable[..., None]) -> None:
    registered = typer.main.get_command(app).commands[command.__name__]  # type: ignore[attr-defined]
    options = {option for parameter in registered.params for option in parameter.opts}
    assert {f"--{name.replace('_', '-')}" for name in CASES} <= options


def test_an_override_of_a_setting_that_training_has_fixed_is_refused_and_the_error_names_the_train_command(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAKESIGHT_HOME", str(world.folder / "home"))
    for key, value in (("model.decoder.context", 64), ("model.image.size", 64), ("model.mask", "{kind: prefix}")):
        with pytest.raises(UserError, match="lakesight train --run demo --set") as refused:
            ask([world.files[0]], checkpoint=world.folder / "checkpoint", overrides=[f"{key}={value}"])
        assert key in refused.value.got
    accepted = ["train.steps=5", "data.limits.max_pixels=100000", "platform.ranks=3", "gate.min_blind_gap=0.5"]
    ask([world.files[0]], checkpoint=world.folder / "checkpoint", overrides=accepted)

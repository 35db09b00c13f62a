"""Tests of what people see in MLflow: names, descriptions, datasets and figures of runs, models and versions."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from local_platforms import open_local
from mlflow import MlflowClient
from pyspark.sql.types import (
    ArrayType,
    DateType,
    LongType,
    StringType,
    StructField,
    StructType,
    TimestampType,
    VarcharType,
    VariantType,
)
from tiny_runs import finish_run, tiny_run, write_run, write_shards

from pipelines.config import load_run
from pipelines.driver.caption.source_table import arrow_columns
from pipelines.formats.run_folder import Metrics, RunFolder, write_json
from pipelines.formats.shards import MixPart, Shards
from pipelines.platform import Platform
from pipelines.tracking import registry, runs
from pipelines.tracking.describe.datasets import captioned_input
from pipelines.tracking.describe.figures import draw_lengths
from pipelines.tracking.describe.names import MAX_NAME_CHARS, changed_settings, repeat_command, run_name
from pipelines.tracking.describe.notes import EVALUATION, KIND, MAX_NOTE_CHARS, NOTE, put_sections, read_sections
from pipelines.tracking.describe.training import training_text
from pipelines.tracking.server import connect, experiment_id

OVERRIDES = (
    "train.steps=400",
    "train.seed=7",
    "train.optimizer.lr=0.001",
    "train.register=best",
    'model.generation.stop=[".", "a b"]',
    "train.optimizer.schedule={kind: constant}",
    "model.text={kind: chars, alphabet: abc}",
    "model.decoder.transformer.depth=1",
    "data.split={kind: column, column: part}",
    "data.limits.max_bad_share=0.5",
    "data.shards.where=width > 3 AND format = 'PNG'",
    "gate.metric=cider",
    "platform.ranks=1",
)


@pytest.fixture
def platform(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> Platform:
    return open_local(monkeypatch, tmp_path / "home", database=empty_database)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    train, validate = write_shards(tmp_path / "shards", rows=6), write_shards(tmp_path / "val", rows=3)
    return write_run(tmp_path / "runs" / "tiny-0123", tiny_run(), train, validate)


# ------------------------------------------------------------------------------------------------ names


@settings(max_examples=5)
@given(st.lists(st.sampled_from(OVERRIDES), unique=True, min_size=2))
@example(OVERRIDES)
def test_the_command_in_the_description_of_a_run_resolves_to_the_config_of_the_run(overrides: Sequence[str]) -> None:
    config = load_run("demo", overrides=overrides)
    words = shlex.split(repeat_command(config))
    assert words[:4] == ["lakesight", "train", "--run", "demo"]
    assert set(words[4::2]) <= {"--set"}
    assert load_run("demo", overrides=words[5::2]) == config


def test_the_mlflow_name_of_a_run_lists_settings_that_differ_from_the_config_files() -> None:
    assert run_name(load_run("demo")) == "nano on demo, 1,600 steps, seed 0"
    changed = load_run("demo", overrides=["train.steps=400", "train.optimizer.lr=0.001", "platform.ranks=1"])
    assert run_name(changed) == "nano on demo, 400 steps, seed 0, train.optimizer.lr=0.001"
    long = load_run("demo", overrides=[f"data.shards.where=format = '{'x' * 200}'", "train.batch_size=8"])
    assert run_name(long).endswith(" and 2 more")
    assert len(run_name(long)) <= MAX_NAME_CHARS + len(" and 2 more")


def test_a_run_whose_config_files_were_removed_still_gets_its_mlflow_name(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        assert changed_settings(tiny_run()) == {}
    assert any("no run is called 'tiny'" in message for message in caplog.messages)
    assert run_name(tiny_run()) == "tiny on tiny, 12 steps, seed 0"


# ------------------------------------------------------------------------------------------------ texts


def test_the_description_of_a_training_names_the_sources_of_a_mix_and_the_largest_number_of_steps(
    run: RunFolder,
) -> None:
    config, file = tiny_run(), run.read_run()
    manifest = Shards(run.shard_folder(file.train_shards)).manifest
    assert "on 6 pictures of source **tiny** (table" in training_text(config, file, manifest)
    parts = (MixPart(source="birds", rows=4, draws=4), MixPart(source="reviewed", rows=2, draws=3))
    early = config.model_copy(update={"train": config.train.model_copy(update={"stop": 2})})
    text = training_text(early, file, manifest.model_copy(update={"parts": parts}))
    assert "on 6 pictures: 4 of **birds** (4 drawn per epoch), 2 of **reviewed** (3 drawn per epoch) (table" in text
    assert "at most 12 steps" in text


@settings(max_examples=30)
@given(
    st.text("ab #\n", max_size=30), st.dictionaries(st.sampled_from(["A", "B b", "C"]), st.text("xy|\n"), min_size=1)
)
def test_a_stage_replaces_only_its_own_sections_of_an_mlflow_description(own: str, sections: dict[str, str]) -> None:
    note = put_sections(own, {"Other": "kept", "A": "old"})
    changed = put_sections(note, sections)
    assert put_sections(changed, sections) == changed
    found = read_sections(changed)
    assert found["Other"] == "kept"
    assert {heading: found[heading] for heading in sections} == {h: text.strip() for h, text in sections.items()}
    assert changed.startswith(own.strip()[:1])


def test_a_description_is_not_longer_than_the_limit_of_an_mlflow_tag() -> None:
    assert len(put_sections("", {"A": "x" * 9000})) == MAX_NOTE_CHARS


def test_a_long_description_loses_its_oldest_evaluations_and_nothing_else() -> None:
    note = put_sections("written by hand", {"Training": "t" * 900, "Version 1": "link"})
    for number in (*range(1, 8), 2):
        note = put_sections(note, {f"{EVALUATION}{number}": f"{number}" * 1100})
    found = read_sections(note)
    assert list(found) == ["Training", "Version 1", *(f"{EVALUATION}{number}" for number in (6, 7, 2))]
    assert [len(body) for body in found.values()] == [900, 4, 1100, 1100, 1100]
    assert note.startswith("written by hand")


def test_mlflow_opens_an_experiment_in_the_training_view_even_if_an_earlier_lakesight_version_created_it(
    platform: Platform,
) -> None:
    client = connect(platform)
    client.create_experiment(platform.experiment("old"), tags={NOTE: "written by hand"})
    for name in ("old", "new", "caption"):
        tags = client.get_experiment(experiment_id(client, name, platform)).tags
        assert tags[KIND] == "custom_model_development"
        assert (tags[NOTE] == "written by hand") == (name == "old")


def test_the_run_the_model_and_the_model_version_have_descriptions_with_links_to_each_other(
    platform: Platform, run: RunFolder
) -> None:
    for step in (0, 6, 12):
        values = {"train/loss": 2.0 - step / 10, "val/loss": 2.1, "val/blind_gap": 0.1, "val/cider": 0.5}
        load = {"decoder.blocks.0": (0.25, 0.75)}
        write_json(run.metrics(step), Metrics(step=step, time=1_700_000_000, values=values, expert_load=load))
    finish_run(run)
    with runs.follow(run, tiny_run(), platform) as follower:
        pass
    version = registry.register(run, follower.run_id, platform)
    registry.describe_version(platform, version, {"Evaluation": "It is good."})
    client = connect(platform)
    logged = client.get_run(follower.run_id)
    note = logged.data.tags[NOTE]
    assert "on 6 pictures of source **tiny**" in note
    assert "lakesight train --run tiny" in note
    assert f"[{version.name} version 1](#/models/tiny/versions/1?workflowType=machine_learning)" in note
    assert f"get-artifact?path=learning_curve.png&run_uuid={follower.run_id}" in note
    described = str(client.get_model_version(version.name, "1").description)
    assert f"runs/{follower.run_id}?" in described
    assert "lakesight train --run tiny" in described
    assert described.endswith("### Evaluation\n\nIt is good.")
    assert "champion" in str(client.get_registered_model(version.name).description)
    figures = {"learning_curve.png", "blind_gap.png", "expert_load.png", "expert_load_over_time.png"}
    assert figures <= {artifact.path for artifact in client.list_artifacts(follower.run_id)}
    assert len([key for key in logged.data.tags if key.startswith("lakesight.")]) <= 6


def test_a_note_that_a_person_wrote_in_mlflow_is_kept_when_the_run_is_resumed(
    platform: Platform, run: RunFolder
) -> None:
    with runs.follow(run, tiny_run(), platform) as follower:
        pass
    client = connect(platform)
    note = client.get_run(follower.run_id).data.tags[NOTE]
    client.set_tag(follower.run_id, NOTE, f"Use this one.\n\n{note}\n\n### Mine\n\nmy remark")
    with runs.follow(run, tiny_run(), platform) as follower:
        pass
    kept = client.get_run(follower.run_id).data.tags[NOTE]
    assert kept.startswith("Use this one.\n\n### Training")
    assert kept.endswith("### Mine\n\nmy remark")


# ------------------------------------------------------------------------------------------------ datasets


def inputs(client: MlflowClient, run_id: str) -> dict[str, tuple[dict[str, str], dict[str, object]]]:
    """Return a dict from the use of each dataset of an MLflow run, such as `training`, to the dataset's columns and
    profile.
    """
    found, logged = {}, client.get_run(run_id).inputs
    assert logged is not None
    for each in logged.dataset_inputs:
        columns = json.loads(str(each.dataset.schema))["mlflow_colspec"]
        types = {column["name"]: column["type"] for column in columns}
        found[each.tags[0].value] = types, json.loads(str(each.dataset.profile))
    return found


def test_the_mlflow_datasets_of_a_run_have_a_schema_and_a_profile(platform: Platform, run: RunFolder) -> None:
    with runs.follow(run, tiny_run(), platform) as follower:
        pass
    found = inputs(connect(platform), follower.run_id)
    expected = {"image_id": "string", "pixels": "binary", "texts": "array"}
    assert found == {
        "training": (expected, {"num_rows": 6, "source": "tiny", "split": "train"}),
        "validation": (expected, {"num_rows": 3, "source": "tiny", "split": "train"}),
    }


def test_every_logged_column_of_a_captioned_table_has_an_mlflow_type() -> None:
    kinds = {
        "id": pa.int64(),
        "photo": pa.large_binary(),
        "price": pa.decimal128(5, 2),
        "tags": pa.map_(pa.string(), pa.int8()),
        "seen": pa.timestamp("us"),
        "box": pa.struct([("x", pa.int32())]),
        "nothing": pa.null(),
    }
    described = captioned_input(("shop.products", 3), pa.schema(list(kinds.items())), {"considered": 20}).dataset
    columns = {column["name"]: column["type"] for column in json.loads(str(described.schema))["mlflow_colspec"]}
    assert columns == {
        **{"id": "long", "photo": "binary", "price": "any", "tags": "any", "seen": "datetime", "box": "object"},
        "nothing": "any",
    }
    assert json.loads(described.source) == {"delta_table_name": "shop.products", "delta_table_version": 3}


def test_the_logged_columns_of_a_spark_table_have_mlflow_types() -> None:
    spark = StructType(
        [
            *(StructField("image_id", StringType()), StructField("code", VarcharType(9)), StructField("n", LongType())),
            *(StructField("at", TimestampType()), StructField("day", DateType()), StructField("map", VariantType())),
            StructField("texts", ArrayType(StructType([StructField("text", StringType())]))),
        ]
    )
    described = captioned_input(("lakesight.samples", 3), arrow_columns(spark), {}).dataset
    columns = {column["name"]: column["type"] for column in json.loads(str(described.schema))["mlflow_colspec"]}
    assert columns == {
        **{"image_id": "string", "code": "string", "n": "long", "at": "datetime", "day": "datetime", "map": "any"},
        "texts": "array",
    }


def test_the_histogram_of_caption_lengths_counts_all_long_captions_in_its_last_bar() -> None:
    axes = draw_lengths({"human": [1, 2, 2, 3], "model": [3] * 400 + [90]}).axes[0]
    heights = [[bar.get_height() for bar in bars] for bars in axes.containers]
    assert heights[0] == [0, 0.25, 0.5, 0.25]
    assert heights[1] == [0, 0, 0, 1]

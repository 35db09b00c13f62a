"""Tests that a run resolves to one config, or to one error that lists every problem with its path.

The YAML files include those of public reports: snowflakedb/ArcticTraining#85 (a key that occurs twice), yaml/pyyaml#382
and #868 (a date and a number that do not exist), canonical/craft-application#407 (two documents, wrong indentation),
go-to-k/cdk-real-drift#1291 (UTF-16), savbell/whisper-writer#155 (a byte-order mark).
"""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field, ValidationError

from pipelines.config import (
    PICTURE,
    CsvSourceConfig,
    DataConfig,
    HashSplitConfig,
    RunConfig,
    available,
    load_model,
    load_run,
    short_hash,
)
from pipelines.errors import ConfigError
from vlm.config import ADDED_LATER, Config
from vlm.config.yaml_file import YamlProblem, read_mapping

BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
DEPLOYMENT = [
    f"platform.{key}={value}" for key, value in (("catalog", "c"), ("schema", "s"), ("volume", "v"), ("ranks", 2))
]


def problems(*overrides: str, run: str = "demo", platform: str = "local") -> str:
    """Return the problems that the error lists."""
    with pytest.raises(ConfigError) as raised:
        load_run(run, platform=platform, overrides=overrides)
    assert raised.value.exit_code == 2
    return raised.value.got


def test_a_run_config_is_unchanged_after_it_was_written_to_json_and_read_again() -> None:
    for name in available("run"):
        run = load_run(name, overrides=["train.seed=7"])
        assert RunConfig.from_json(run.to_json()) == run
    workspace = load_run("demo", platform="databricks", overrides=DEPLOYMENT)
    assert RunConfig.from_json(workspace.to_json()) == workspace


def test_the_value_of_an_override_gets_the_type_of_its_field() -> None:
    run = load_run(
        "demo",
        overrides=[
            "train.steps=7",
            "train.optimizer.lr=3e-4",
            "data.source.multiline=true",
            "data.source.path=1e3",
            "data.source.columns.id=key",
            "model.vision.stem={kind: patch, patch_size: 16}",
            "train.optimizer.betas=[0.8, 0.9]",
            "data.split={test: 0.2}",
        ],
    )
    assert run.data.split == HashSplitConfig(test=0.2)
    assert isinstance(run.data.source, CsvSourceConfig)
    assert (run.train.steps, run.train.optimizer.lr, run.data.source.multiline) == (7, 3e-4, True)
    assert (run.data.source.path, run.data.source.columns.id) == ("1e3", "key")
    assert run.model.num_slots == 16
    assert run.train.optimizer.betas == (0.8, 0.9)


def test_an_override_with_the_value_null_removes_an_optional_setting() -> None:
    overrides = ["data.source.columns.id=key", "data.source.columns.id=null"]
    assert load_run("demo", overrides=overrides).data.source.columns.id is None


def test_the_last_value_is_used_if_a_key_is_overridden_several_times() -> None:
    assert load_run("demo", overrides=["train.steps=1", "train.steps=2"]).train.steps == 2


def test_the_value_of_an_override_may_contain_an_equals_sign() -> None:
    assert load_run("demo", overrides=["data.source.path=/data/day=1/x.csv"]).data.source.path == "/data/day=1/x.csv"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.stepz=5", "train.stepz: unknown key, did you mean 'steps'?"),
        ("trian.steps=5", "trian.steps: unknown key 'trian', did you mean 'train'?"),
        (
            "train.steps=many",
            "train.steps: Input should be a valid integer, unable to parse string as an integer (got 'many')",
        ),
        ("train.steps=0", "train.steps: Input should be greater than 0 (got '0')"),
        ("train.steps", "--set train.steps: expected KEY=VALUE, such as train.steps=500"),
        (
            "model.vision.stem.kind=pach",
            "model.vision.stem: unknown kind 'pach', did you mean 'patch'? (one of patch, conv)",
        ),
        ("model.decoder.transformer.attention.num_heads=3", "num_heads 3 must be a multiple of num_kv_heads"),
        ("model.decoder.transformer.position={kind: mixed}", "position.kind: mixed is for patch grids only"),
        ("model.vision.transformer.position={kind: rotary}", "position.kind: rotary is for text only"),
        ("model.decoder.transformer.input_norms=false", "input_norms: false needs sandwich: true"),
        ("model.image.size=60", "model: image.size 60 is not a multiple of the stem's stride"),
        ("data.split={kind: hash, val: 0.5, test: 0.5}", "val + test is 1 or more, so no rows are left to train on"),
        ("data.mix={birds: 0.5, cats: 0.5}", "the shares in mix leave no share for `source`"),
        ("data.mix.birds=1.5", "data.mix.birds: Input should be less than 1"),
        (
            "train.register=newest",
            "train.register: expected last, best, or the step of a checkpoint, such as 500 (got 'newest')",
        ),
        (
            "train.register=[8]",
            "train.register: expected last, best, or the step of a checkpoint, such as 500 (got [8])",
        ),
        ("train.best_by=cider", "train: best_by cider needs score_every"),
        ("train.start_state=training", "train: start_state training needs start_from"),
        ("train.adapter.pattern=decoder.*", "train: adapter needs start_from"),
        ("train.adapter.pattern=decoder(", "train.adapter.pattern: the pattern is not a regular expression: missing )"),
        (
            "data.source.delimiter=ab",
            "expected one character that is not a line break (got 'ab')",
        ),
        ('data.source.delimiter="', "quote '\"' is also the delimiter or the escape character"),
        ("data.source={quote: null, multiline: true}", "multiline and escape need quoted fields"),
        ("data.split={column: half}", "data.split.column: unknown key"),
        ("model.projector={hidden: 8}", "model.projector: kind is missing (one of "),
        ("data.source={kind: folder}", "data.source.captions: missing"),
        (
            "data.source={kind: table, table: a, path: b}",
            "table and path are both set: give either table (a name) or path (a folder)",
        ),
        ("data.source={kind: table, table: a;drop}", "data.source.table: String should match pattern"),
        ("data={source: {kind: table}, split: {kind: file}}", "split.kind is file, but a table has no file names"),
        ("model.image={size: ", "model.image: '{size: ' is not a valid YAML list or mapping"),
    ],
)
def test_an_invalid_override_is_reported_with_the_nearest_valid_name(override: str, expected: str) -> None:
    assert expected in problems(override)


def test_a_parallel_block_whose_input_is_not_normalised_is_refused() -> None:
    changes = ("input_norms=false", "sandwich=true", "parallel=true")
    assert "parallel: true needs" in problems(*(f"model.decoder.transformer.{change}" for change in changes))


def test_an_invalid_config_gives_one_error_that_lists_every_problem() -> None:
    listed = problems("train.stepz=5", "data.split.kind=hsh", "platform.ranks=none")
    assert all(path in listed for path in ("train.stepz", "data.split", "platform.ranks"))


@pytest.mark.parametrize(
    ("run", "platform", "expected"),
    [
        ("demmo", "local", "run: no run is called 'demmo', did you mean 'demo'? (available: demo"),
        ("demo", "lokal", "platform: no platform is called 'lokal', did you mean 'local'?"),
        ("DEMO", "local", "no run is called 'DEMO', did you mean 'demo'?"),
        ("zebra", "local", "no run is called 'zebra' (available"),
        ("x" * 300, "local", "no run is called 'xxx"),
        ("../run/demo", "local", "no run is called '../run/demo'"),
    ],
)
def test_an_unknown_name_is_reported_with_the_available_names(run: str, platform: str, expected: str) -> None:
    assert expected in problems(run=run, platform=platform)


def test_a_databricks_config_needs_the_values_that_databricks_yml_holds() -> None:
    listed = problems(platform="databricks")
    assert all(f"platform.{key}: missing" in listed for key in ("catalog", "schema", "volume", "ranks"))


def test_a_name_in_a_config_that_could_inject_sql_is_refused() -> None:
    assert "platform.catalog" in problems(*DEPLOYMENT, "platform.catalog=a;drop", platform="databricks")


def test_conf_in_the_working_folder_takes_precedence_over_conf_in_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = load_model("nano").model_dump(mode="json") | {"generation": {"max_new_tokens": 3}}
    (tmp_path / "conf" / "model").mkdir(parents=True)
    (tmp_path / "conf" / "model" / "nano.yml").write_text(yaml.safe_dump(own))
    monkeypatch.chdir(tmp_path)
    assert load_model("nano").generation.max_new_tokens == 3
    assert load_run("demo").model.generation.max_new_tokens == 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model: [", "own.yml: invalid YAML (line 1, column 9: while parsing a flow node, "),
        ("x: 1\nmodel: caf\udce9", "own.yml: invalid YAML (byte 0xe9 in line 2 is not UTF-8: save the file as UTF-8)"),
        ("on: nano", "own.yml: key True is not a string: write the key in quotes"),
        ("- demo", "own.yml: got a list, expected a mapping"),
        ("demo", "own.yml: got a str, expected a mapping"),
        ("", "own.yml: the file is empty: write the keys model, train and data"),
        ("# nothing\n---\n", "own.yml: the file is empty"),
        ("model: nano\n\ttrain: demo", "own.yml: invalid YAML (line 2, column 1: "),
        ("\tmodel: nano", "cannot start any token: indent with spaces"),
        ("data: demo\nmodel: a\ndata: b", "own.yml: invalid YAML (line 3, column 1: the key 'data' occurs twice)"),
        ("gate: {x: 1, x: 2}", "own.yml: invalid YAML (line 1, column 14: the key 'x' occurs twice)"),
        ("model: na\0no", "own.yml: invalid YAML (the file has NUL bytes: save the file as UTF-8)"),
        ("model: na\x07no", "own.yml: invalid YAML (unacceptable character #x0007"),
        ("model: " + "[" * 1000, "own.yml: invalid YAML (lists or mappings are nested too deeply)"),
        ("data: 0000-00-00", "own.yml: invalid YAML ("),
        ("data: 0b_", "own.yml: invalid YAML ("),
        ("type:\n   - a\n - b", "own.yml: invalid YAML (line 3, column 2: "),
        ("m\0o\0d\0e\0l\0", "own.yml: invalid YAML (the file has NUL bytes: save the file as UTF-8)"),
        ("model: 2026-02-30", "own.yml: invalid YAML (day is out of range for month)"),
        (
            "model: !!python/object:os.system x",
            "own.yml: invalid YAML (line 1, column 8: could not determine a constructor",
        ),
        ("model: *none", "own.yml: invalid YAML (line 1, column 8: found undefined alias 'none')"),
        ("model: nano\n---\nmodel: nano", "own.yml: invalid YAML (line 2, column 1: expected a single document"),
        ("gate: &g [*g]", "own.yml: invalid YAML (more than 50,000 values when aliases are expanded)"),
        (BOMB, "own.yml: invalid YAML (more than 50,000 values when aliases are expanded)"),
        ("#" * 300_000, "own.yml: the file has more than 262,144 bytes, so it is not a config"),
        (
            "data: 1.10\nmodel: nano\ntrain: demo",
            "run.data: got 1.1, which YAML does not read as a name: write the name in quotes",
        ),
        ("model:\ndata: demo\ntrain: demo", "run.model: missing (one of"),
        (
            "{model: nano, data: demo, train: demo, gate: {min_blind_gap: x}}",
            "own.yml: gate.min_blind_gap: Input should",
        ),
        ("{model: nano, data: {source: 7}, train: demo}", "own.yml: data.source: "),
        ("{model: bare, data: demo, train: demo}", "bare.yml: model.vision: missing"),
        (
            "{model: old, data: demo, train: demo}",
            "old.yaml: the file is not read because of its suffix: rename the file to old.yml",
        ),
        ("{model: nano, data: demo}", "run.train: missing (one of"),
        ("{model: nano, data: demo, train: demo, modle: x}", "run.modle: unknown key, did you mean 'model'?"),
    ],
    ids=lambda text: ascii(text)[:40],
)
def test_the_error_for_an_invalid_run_file_states_the_problem(
    text: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("run", "model"):
        (tmp_path / "conf" / folder).mkdir(parents=True)
    (tmp_path / "conf" / "run" / "own.yml").write_bytes(text.encode("utf-8", "surrogateescape"))
    (tmp_path / "conf" / "model" / "bare.yml").touch()
    (tmp_path / "conf" / "model" / "old.yaml").touch()
    monkeypatch.chdir(tmp_path)
    assert expected in problems(run="own")


RUN = "model: nano\ntrain: demo\ndata: demo  # \u6df1\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["birds.v2", "a-b_c.D.1", "7", "x" * 64])
def test_a_run_file_is_read_with_any_file_name_and_with_or_without_a_byte_order_mark(
    encoding: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "conf" / "run").mkdir(parents=True)
    (tmp_path / "conf" / "run" / f"{name}.yml").write_bytes(RUN.replace("\n", "\r\n").encode(encoding))
    monkeypatch.chdir(tmp_path)
    assert load_run(name).name == name
    assert name in available("run")


@pytest.mark.parametrize("name", ["bird's v2", "b\u00fccher", "a b", ".hidden", "", "x" * 65, "a/b", "a\nb"])
def test_an_invalid_run_name_is_reported_with_the_rule_for_valid_names(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "conf" / "run").mkdir(parents=True)
    if "/" not in name and len(name) < 65:
        (tmp_path / "conf" / "run" / f"{name}.yml").write_text(RUN)
    monkeypatch.chdir(tmp_path)
    assert f"no run is called {name!r}, because a name has at most 64 letters, digits" in problems(run=name)
    assert name not in available("run")


def test_the_error_for_a_config_file_that_cannot_be_opened_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "conf" / "run").mkdir(parents=True)
    (tmp_path / "conf" / "run" / "own.yml").write_text(RUN)
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda *_: os.open("/nowhere/x", os.O_RDONLY))
        assert "own.yml: cannot be read: No such file or directory" in problems(run="own")


def test_a_run_with_a_dot_in_its_name_is_refused_on_databricks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "conf" / "run").mkdir(parents=True)
    (tmp_path / "conf" / "run" / "birds.v2.yml").write_text(RUN)
    monkeypatch.chdir(tmp_path)
    assert "Unity Catalog allows no dot" in problems(*DEPLOYMENT, run="birds.v2", platform="databricks")


@settings(max_examples=100)
@given(st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-16", "surrogatepass")))
def test_reading_a_config_file_of_any_bytes_gives_a_mapping_or_a_yaml_problem(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.yml")
        path.write_bytes(content)
        with suppress(YamlProblem):
            assert isinstance(read_mapping(path), dict)


def test_a_run_file_may_contain_the_data_config_instead_of_the_name_of_a_data_config_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "conf" / "run").mkdir(parents=True)
    source = "{kind: folder, path: pictures, captions: captions.csv, columns: {text: title}}"
    (tmp_path / "conf" / "run" / "own.yml").write_text(f"model: nano\ntrain: demo\ndata:\n  source: {source}\n")
    monkeypatch.chdir(tmp_path)
    run = load_run("own", overrides=["data.split.val=0.5", "data.split.kind=hash"])
    assert run.chosen.data == "own"
    assert (run.data.source.path, run.data.source.columns.text) == ("pictures", "title")
    assert run.data.source.columns.image == "file_name", "columns that are not set keep their default values"
    assert RunConfig.from_json(run.to_json()) == run
    assert load_run("own", overrides=["data.source={path: x.csv}"]).data.source == CsvSourceConfig(path="x.csv")


def test_loading_a_run_that_another_lakesight_version_saved_is_an_error() -> None:
    with pytest.raises(ConfigError, match="a saved run"):
        RunConfig.from_json('{"name": "x"}')


@given(st.lists(st.integers() | st.text(), min_size=1))
def test_equal_lists_have_equal_short_hashes_and_a_longer_list_has_another_hash(
    parts: list[int | str],
) -> None:
    assert short_hash(parts) == short_hash(list(parts))
    assert short_hash(parts) != short_hash([*parts, "more"])


class Part(Config):
    """A part of a config, with a field that was added in a later version."""

    old: int = 1
    new: Annotated[tuple[int, ...], ADDED_LATER] = ()


class Whole(Config):
    """A config that has parts at every place at which parts are possible: in a field, a list and a mapping."""

    part: Part = Part()
    parts: tuple[Part, ...] = (Part(), Part(old=2))
    named: dict[str, Part] = Field(default_factory=lambda: {"a": Part()})
    left_out: int = 3
    added: Annotated[Part | None, ADDED_LATER] = None


def test_a_setting_that_an_earlier_version_lacked_changes_the_hash_of_a_config_only_if_it_is_set() -> None:
    unused = {"part": {"old": 1}, "parts": ({"old": 1}, {"old": 2}), "named": {"a": {"old": 1}}}
    assert Whole().hashed_settings(exclude={"left_out"}) == unused
    used = Whole(parts=(Part(), Part(new=(5,))), named={"a": Part(new=(6,))}, added=Part())
    expected = {"part": {"old": 1}, "parts": ({"old": 1}, {"old": 1, "new": (5,)}), "left_out": 3}
    assert used.hashed_settings() == expected | {"named": {"a": {"old": 1, "new": (6,)}}, "added": {"old": 1}}


def test_the_setting_image_root_is_hashed_only_if_set_and_is_refused_for_the_kinds_folder_and_webdataset() -> None:
    plain, named = ({"kind": "jsonl", "path": "x"} | root for root in ({}, {"image_root": "."}))
    configs = [DataConfig.model_validate({"source": source}) for source in (plain, named)]
    assert "image_root" not in configs[0].source.hashed_settings()
    assert [config.source.record_columns.image for config in configs] == ["image", PICTURE]
    for kind in ("folder", "webdataset"):
        with pytest.raises(ValidationError, match="image_root"):
            DataConfig.model_validate({"source": {"kind": kind, "captions": "c.csv", "image_root": "."}})


def test_the_gate_thresholds_are_part_of_the_run_config_and_can_be_overridden() -> None:
    assert load_run("demo").gate.baselines == ("constant", "neighbour")
    assert load_run("seemoe").gate.baselines == ()
    assert load_run("demo", overrides=["gate.min_blind_gap=0.3"]).gate.min_blind_gap == 0.3
    assert load_run("demo", overrides=["drift.fail=true"]).drift.fail
    with pytest.raises(ConfigError, match=r"drift\.bright: unknown key, did you mean 'brightness'"):
        load_run("demo", overrides=["drift.bright=3"])
    said = problems("gate.min_blind_gab=0.3", "gate.metric=word")
    assert "gate.min_blind_gab: unknown key, did you mean 'min_blind_gap'?" in said
    assert "gate.metric: " in said

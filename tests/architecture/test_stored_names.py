"""Tests that the hashes in stored names do not change.

Lakesight finds existing rows, shards, models and captions by these hashes, so data of an earlier version is found only
if the hashes stay the same.

The expected values were computed with an earlier version of the code. Never edit these values to make a test pass. If a
value changes, Lakesight does not find existing rows, shards, models or captions, and computes them again.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from tiny_runs import write_shards

from pipelines.config import DataConfig, available, load_model, load_run, short_hash
from pipelines.driver.evaluate.scores import scores_hash
from pipelines.driver.ingest.ledger import hash_rules
from pipelines.driver.model_files import ModelFiles
from pipelines.driver.shard.run import ShardReport
from pipelines.driver.train.run import prepare
from pipelines.formats.shards import Manifest, ShardFile, ShardRequest
from pipelines.platform import Platform


class StoredNames(NamedTuple):
    """Names and hashes under which a shipped run and its data are stored.

    Attributes:
        run: name of the run folder in Lakesight 0.1.0 if the content hashes of the shards are `training rows` and
            `validation rows`.
        rules: value that an ingest writes to column `rules` of table `ingested`.
        captions: value that a caption job with an empty prompt writes to column `settings_hash` of
            `generated_captions`.
        shards: name of the shard folder for version 3 of a table whose id is `table`.
    """

    run: str
    rules: str
    captions: str
    shards: str


RUNS = {
    "demo": StoredNames(
        run="demo-ec600793099216c0",
        rules="90a38df30c5f0267",
        captions="c0bb22de335e466a",
        shards="demo-train-c07813845d973a28",
    ),
    "emoji": StoredNames(
        run="emoji-f5f6dbc23d24239a",
        rules="b3bd7f50fa692b14",
        captions="ca50eb6db38f06e3",
        shards="emoji-train-f5aff5daac6acc03",
    ),
    "makemore": StoredNames(
        run="makemore-aba1dc0dae7ce352",
        rules="779458cfebab20d9",
        captions="c0bb22de335e466a",
        shards="makemore-train-74cd2ea54c0b4e33",
    ),
    "paligemma": StoredNames(
        run="paligemma-e3c5c1dd86c8c9c9",
        rules="90a38df30c5f0267",
        captions="c0bb22de335e466a",
        shards="demo-train-972d93da37482452",
    ),
    "photo_base": StoredNames(
        run="photo_base-4c738c282a387146",
        rules="bb1e606d3a608607",
        captions="aa30227cc6ded6cd",
        shards="photos-train-853e4943d3e19613",
    ),
    "photo_small": StoredNames(
        run="photo_small-5b2c967389081c7f",
        rules="bb1e606d3a608607",
        captions="4067238b22bf5faa",
        shards="photos-train-2cf22ab7df37b2cd",
    ),
    "reviewed": StoredNames(
        run="reviewed-ec600793099216c0",
        rules="f3ec6cf036376bb9",  # this value changed when the SHA-256 became the id of a picture (decision 0002)
        captions="c0bb22de335e466a",
        shards="reviewed-train-69a66aee9e85c46b",
    ),
    "seemoe": StoredNames(
        run="seemoe-67b7d74d74196b3a",
        rules="90a38df30c5f0267",
        captions="c0bb22de335e466a",
        shards="demo-train-5278808852a5a8db",
    ),
    "seemore": StoredNames(
        run="seemore-f9ad67b9d9cec615",
        rules="1b45035c8432149c",
        captions="74356cb99c78f3a0",
        shards="seemore-train-2aa2b96b579682a6",
    ),
    "seemore_moe": StoredNames(
        run="seemore_moe-7f723db77895c4fb",
        rules="1b45035c8432149c",
        captions="74356cb99c78f3a0",
        shards="seemore-train-2aa2b96b579682a6",
    ),
    "seemore_paligemma": StoredNames(
        run="seemore_paligemma-597f091967060415",
        rules="1b45035c8432149c",
        captions="c0bb22de335e466a",
        shards="seemore-train-62a17b24543bb699",
    ),
    "seemore_vit_gpt2": StoredNames(
        run="seemore_vit_gpt2-13e21b805c485a28",
        rules="1b45035c8432149c",
        captions="c0bb22de335e466a",
        shards="seemore-train-ece1d135023a6581",
    ),
    "staged": StoredNames(
        run="staged-6b2e546b4e59e0eb",
        rules="90a38df30c5f0267",
        captions="c0bb22de335e466a",
        shards="demo-train-79fb83f55fe03999",
    ),
    "vit_gpt2": StoredNames(
        run="vit_gpt2-8881b641e473d034",
        rules="90a38df30c5f0267",
        captions="c0bb22de335e466a",
        shards="demo-train-79fb83f55fe03999",
    ),
}

RULES = {
    "csv": "3226e1fbb837c382",
    "jsonl": "55844b155a8b7a70",
    "parquet": "e51b709c18b901fd",
    "table": "a23e2335327c7ed0",
    "folder": "bb1e606d3a608607",
    "webdataset": "dec60d243b9e5fd9",
    "text": "6c3f7b4b6ed82417",
}
"""Dict from each kind of source to the value of column `rules` in table `ingested`, if only required settings
are set.
"""

MODELS = {
    "base": "ecf4489eaa31cfae",
    "base_tiny": "68d06a54075ef13d",
    "clip_gpt2": "08f810435abd24b8",
    "clip_gpt2_tiny": "ecd3fddc40759f66",
    "emoji": "990f70bcaadac903",
    "flamingo": "a76da37db5033a6d",
    "flamingo_tiny": "0b587473612904b9",
    "makemore": "b3ceb1014071074c",
    "makemore_tiny": "a26382b745137541",
    "nano": "fe59440ea71f581f",
    "nano_tiny": "2d5e8f855b119937",
    "paligemma": "96d31d46b108b5ba",
    "paligemma2": "896e19146dc481d4",
    "paligemma2_tiny": "a55e6edd2bb63abe",
    "paligemma_tiny": "27ef5415893bec24",
    "photo_base": "42bcc1677d871226",
    "photo_small": "6d8ca8a53f2855e0",
    "seemoe": "e0a7fb6e16b96dbf",
    "seemoe_tiny": "b5e22d2fbc0ee019",
    "seemore": "1524c7477ad7c691",
    "seemore_tiny": "8e78c7d372bf0586",
    "vit_gpt2": "ba51d03a81a5bde2",
    "vit_gpt2_tiny": "5ec83f7ebcb9e70d",
}
"""Dict from each shipped model to the hash of all its settings. The name of a run folder depends on this hash."""


def request_of(name: str) -> ShardRequest:
    """Return the request for training shards of a shipped run."""
    config = load_run(name)
    return ShardRequest(
        table="lakesight.samples",
        table_id="table",
        table_version=3,
        source=config.chosen.data,
        split="train",
        image=None if config.model.text_only else config.model.image,
        **config.data.shards.model_dump(),
    )


def test_every_run_and_model_that_lakesight_ships_has_its_hash_listed_in_this_file() -> None:
    assert set(RUNS) == set(available("run"))
    assert set(MODELS) == set(available("model"))


@pytest.mark.parametrize("name", RUNS)
def test_the_name_of_a_run_folder_does_not_change(name: str, platform: Platform, tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", rows=64)

    def report(content_hash: str) -> ShardReport:
        return ShardReport(
            folder=str(shards.folder),
            source="tiny",
            split="train",
            num_rows=64,
            content_hash=content_hash,
            dataset_version=0,
            reused=False,
            seconds=0,
        )

    run = prepare(load_run(name), platform, report("training rows"), report("validation rows"))
    assert run.path.name == RUNS[name].run


@pytest.mark.parametrize("name", RUNS)
def test_the_hash_of_ingest_rules_does_not_change(name: str) -> None:
    assert hash_rules(load_run(name).data) == RUNS[name].rules


@pytest.mark.parametrize("kind", RULES)
def test_the_hash_of_the_default_ingest_rules_of_each_kind_of_source_does_not_change(kind: str) -> None:
    captions = {"captions": "captions.csv"} if kind == "folder" else {}
    config = DataConfig.model_validate({"source": {"kind": kind} | captions})
    assert hash_rules(config) == RULES[kind]


@pytest.mark.parametrize("name", RUNS)
def test_the_hash_of_caption_settings_does_not_change(name: str) -> None:
    """The test in tests/spark/test_caption.py checks the hash that a captioning job writes."""
    settings = load_run(name).model.generation.model_dump() | {"precision": "fp32"}
    assert short_hash("", settings) == RUNS[name].captions


@pytest.mark.parametrize("name", RUNS)
def test_the_name_of_a_shard_folder_does_not_change(name: str) -> None:
    assert request_of(name).folder_name == RUNS[name].shards


@pytest.mark.parametrize("name", MODELS)
def test_the_hash_of_a_model_config_does_not_change(name: str) -> None:
    assert short_hash(load_model(name).hashed_settings()) == MODELS[name]


def test_the_hashes_of_content_and_scores_do_not_change() -> None:
    file = ShardFile(file="shard-00000.arrow", rows=8, bytes=100, sha256="ab" * 32)
    shards: Any = SimpleNamespace(manifest=Manifest(request=request_of("demo"), files=(file,)))
    assert shards.manifest.content_hash == "90dadf2b170ae61d"
    model = ModelFiles(folder=Path("model"), name="demo", version="3", run_id="r")
    assert scores_hash(model, shards, shards) == "fd09e6f6e0efd00d"

"""Tests of the check that decides, without Spark, whether a caption job has nothing to do. If the check is not certain,
the Spark job runs.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pytest
from deltalake import DeltaTable, TableFeatures, write_deltalake
from local_platforms import open_local
from tiny_runs import save_random_model

from pipelines.driver.caption.finished import find_finished
from pipelines.driver.caption.run import CaptionReport, CaptionRequest, caption_key, pending_folder
from pipelines.driver.caption.source_table import hash_columns
from pipelines.driver.model_files import ModelFiles
from pipelines.errors import UserError
from pipelines.formats.tables import GENERATED_CAPTIONS
from pipelines.platform import Platform

NOW = datetime(2026, 1, 1, tzinfo=UTC)
ROWS = {"id": [1, 2, 3], "photo": [b"a", b"b", b"c"]}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_random_model(folder)
    return folder


class Shop(NamedTuple):
    """A table of pictures whose rows have captions."""

    platform: Platform
    model: ModelFiles
    folder: Path

    def request(self, **changes: object) -> CaptionRequest:
        asked = {"source_table": f"delta.`{self.folder}`", "id_column": "id", "image_column": "photo"}
        return CaptionRequest.model_validate(asked | changes)

    def find(self, **changes: object) -> CaptionReport | None:
        return find_finished(self.platform, self.model, self.request(**changes))

    def write(self, rows: Mapping[str, Any], mode: Any = "append") -> None:
        write_deltalake(self.folder, pa.table(dict(rows)), mode=mode)

    @property
    def captions(self) -> Path:
        assert self.platform.tables
        return self.platform.tables / "generated_captions"

    def source_file(self, version: int) -> str:
        """Return the identity of the data file that a commit added, as Spark's columns `_metadata` give it."""
        commit = self.folder / "_delta_log" / f"{version:020}.json"
        (file,) = [json.loads(line)["add"] for line in commit.read_text().splitlines() if '"add":' in line]
        columns = hash_columns(("id", "photo", None), None)
        return f"{file['path']} {file['size']} {file['modificationTime'] * 1000} {columns}"

    def caption(self, ids: list[int], version: int, **changes: object) -> None:
        *_, key = caption_key(self.model, self.request(), self.request().source_table)
        row: dict[str, Any] = dict.fromkeys(GENERATED_CAPTIONS.names, "") | {"read_at": None}
        row |= {"caption": "red", "error": None, "num_tokens": 1} | key
        row |= {"mean_logprob": -1.0, "source_version": version, "captioned_at": NOW, "run_id": "r"}
        row |= {"id_column": "id", "image_column": "photo", "image_root": None}
        row |= {"source_file": self.source_file(version)}
        row |= {"model_digest": "d"} | changes
        rows = [row | {"image_id": str(image_id)} for image_id in ids]
        write_deltalake(self.captions, pa.Table.from_pylist(rows, GENERATED_CAPTIONS.arrow_schema), mode="append")


@pytest.fixture
def shop(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Shop:
    platform = open_local(monkeypatch, tmp_path / "home")
    model = ModelFiles(folder=model_folder, name="m", version="1", run_id="r", digest="d")
    made = Shop(platform, model, tmp_path / "shop")
    made.write(ROWS)
    made.caption([1, 2], 0)
    made.caption([3], 0, caption=None, error="not_an_image")
    return made


def test_a_caption_job_has_nothing_to_do_if_every_row_has_a_caption_or_an_error(shop: Shop) -> None:
    found = shop.find()
    assert found is not None
    assert (found.considered, found.already, found.captioned, found.source_version) == (3, 3, 0, 0)


def test_appending_rows_and_captioning_only_these_rows_leaves_nothing_to_do(shop: Shop) -> None:
    shop.write({"id": [4], "photo": [b"d"]})
    assert shop.find() is None
    shop.caption([4], 1)
    found = shop.find()
    assert found is not None
    assert (found.considered, found.source_version) == (4, 1)


def test_a_row_whose_picture_could_not_be_read_is_not_finished(shop: Shop) -> None:
    shop.write({"id": [4, 5], "photo": [b"d", b"e"]})
    shop.caption([4], 1)
    shop.caption([5], 1, caption=None, error="unreadable_file: https://cdn.example.org/e.png: status 503")
    assert shop.find() is None


def leave_file(shop: Shop) -> None:
    *_, key = caption_key(shop.model, shop.request(), shop.request().source_table)
    folder = pending_folder(shop.platform, key)
    folder.mkdir(parents=True)
    (folder / "a.parquet").touch()


def compact(shop: Shop) -> None:
    shop.write({"id": [4], "photo": [b"d"]})
    shop.caption([4], 1)
    DeltaTable(shop.folder).optimize.compact()


def write_anew(shop: Shop) -> None:
    shutil.rmtree(shop.folder)
    shop.write(ROWS | {"photo": [b"x", b"y", b"z"]})


def forget_files(shop: Shop) -> None:
    """Remove the names of data files, which earlier releases did not store."""
    DeltaTable(shop.captions).update({"source_file": "NULL"})


CHANGES: dict[str, Callable[[Shop], object]] = {
    "a picture was replaced": lambda shop: shop.write(ROWS, "overwrite"),
    "the table was written anew": write_anew,
    "an earlier release captioned the rows": forget_files,
    "files were compacted": lambda shop: (
        shop.write({"id": [4], "photo": [b"d"]}),
        DeltaTable(shop.folder).optimize.compact(),
    ),
    "an id occurs twice": lambda shop: shop.write({"id": [3], "photo": [b"c"]}),
    "an id is missing": lambda shop: shop.write({"id": pa.array([None], pa.int64()), "photo": [b"c"]}),
    "a caption was deleted": lambda shop: DeltaTable(shop.captions).delete("image_id = '2'"),
    "the captions lack a column": lambda shop: write_deltalake(
        shop.captions,
        DeltaTable(shop.captions).to_pyarrow_table().drop(["image_root"]),
        mode="overwrite",
        schema_mode="overwrite",
    ),
    "a killed job left a file": leave_file,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_caption_job_starts_spark_if_its_input_or_output_has_changed(change: str, shop: Shop) -> None:
    CHANGES[change](shop)
    assert shop.find() is None


OTHER: tuple[Mapping[str, object], ...] = (
    *({"where": "id = 1"}, {"retry_errors": True}, {"remove_deleted": True}, {"source_version": 0}),
    *({"prompt": "where"}, {"precision": "bf16"}, {"id_column": "photo"}, {"image_column": "id"}),
    *({"source_table": "delta.`s3a://bucket/shop`"}, {"source_table": "main.shop.products"}),
)


@pytest.mark.parametrize("request_", OTHER, ids=str)
def test_a_caption_job_starts_spark_if_its_options_differ_from_those_of_the_finished_job(
    request_: Mapping[str, object], shop: Shop
) -> None:
    assert shop.find(**request_) is None


def test_a_caption_job_reuses_captions_of_the_first_lakesight_release_but_not_those_of_another_model(
    shop: Shop,
) -> None:
    other = shop._replace(model=shop.model.model_copy(update={"digest": "e", "run_id": "other"}))
    assert other.find() is None
    other.caption([1, 2, 3], 0, model_digest=None, run_id="other")
    assert other.find() is not None
    assert shop._replace(model=shop.model.model_copy(update={"version": "2"})).find() is None


def test_a_caption_job_starts_spark_for_a_table_with_deletion_vectors(shop: Shop) -> None:
    DeltaTable(shop.folder).alter.add_feature(TableFeatures.DeletionVectors, allow_protocol_versions_increase=True)
    assert shop.find() is None


def test_an_invalid_caption_request_is_refused_before_spark_starts(shop: Shop) -> None:
    with pytest.raises(UserError, match="no folder"):
        shop.find(image_root=str(shop.folder / "gone"))
    with pytest.raises(UserError, match="no room for a caption"):
        shop.find(prompt="where " * 50)


def test_a_missing_table_or_a_missing_column_is_refused_without_starting_spark(shop: Shop) -> None:
    with pytest.raises(UserError, match=r"no Delta table in folder .*nowhere"):
        shop.find(source_table=f"delta.`{shop.folder}-nowhere`")
    with pytest.raises(UserError, match=r"no column 'fotos'.*choose one of id, photo"):
        shop.find(image_column="fotos")

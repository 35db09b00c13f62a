"""Tests of verdicts on captions, which are read and written as Delta files, without a server."""

from __future__ import annotations

import base64
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake
from written_rows import write_rows

from jobs.table_files import existing_files, table_relation
from pipelines.errors import UserError
from pipelines.formats.table_schema import Table
from pipelines.formats.tables import DECISIONS, GENERATED_CAPTIONS, SAMPLES, VERDICTS
from pipelines.review.delta_store import DeltaStore
from pipelines.review.verdicts import CaptionVerdict, Review

NOW = datetime(2026, 1, 1, tzinfo=UTC)
SHA256 = sha256(b"png").hexdigest()
SAMPLE: dict[str, Any] = {
    "image_id": "a/0",
    "sha256": SHA256,
    "image": b"png",
    "format": "PNG",
    "width": 8,
    "height": 8,
}
SAMPLE |= {"texts": [], "split": "test", "source": "a", "source_row": "r", "ingest_id": "i", "ingested_at": NOW}
CAPTION: dict[str, Any] = {
    "image_id": "a/0",
    "model_name": "m",
    "model_version": "1",
    "settings_hash": "h",
    "caption": "red",
}
CAPTION |= {"sha256": SHA256, "prompt": "", "settings": "{}", "num_tokens": 3, "mean_logprob": -1.0}
CAPTION |= {"source_table": "samples", "source_version": 1, "run_id": "r", "captioned_at": NOW}
VERDICT: dict[str, Any] = {"image_id": "a/0", "source_table": "samples", "model_name": "m", "model_version": "1"}
VERDICT |= {"settings_hash": "h", "prompt": "", "caption": "red", "verdict": "good", "text": "red", "image": b"png"}
VERDICT |= {"sha256": SHA256, "reviewer": "somebody", "judged_at": NOW}


def write(folder: Path, table: Table, rows: list[dict[str, Any]], without: str = "") -> DeltaTable:
    schema = pa.schema([field for field in table.arrow_schema if field.name != without])
    write_deltalake(folder / table.name, pa.Table.from_pylist(rows, schema))
    return DeltaTable(folder / table.name)


def open_review(captions: DeltaTable, pictures: DeltaTable, verdicts: Path, version: str = "champion") -> Review:
    """Open the captions of model `m` for the pictures of table `samples`."""
    store = DeltaStore(captions, pictures, verdicts, table="samples", model="m", has_texts=True, version=version)
    return Review(store, table="samples", model="m")


def judge(review: Review, verdict: str, digest: str = "") -> None:
    posted = {"image_id": "a/0", "model_version": "1", "settings_hash": "h", "sha256": SHA256, "verdict": verdict}
    review.save_verdict(CaptionVerdict.model_validate(posted | {"model_digest": digest}), "me")


def stored(folder: Path) -> list[tuple[str | None, str]]:
    rows = DeltaTable(folder / "verdicts").to_pyarrow_table().to_pylist()
    return sorted(((row["model_digest"], row["verdict"]) for row in rows), key=str)


def test_verdicts_are_separate_for_model_versions_of_two_registries_with_the_same_name_and_number(
    tmp_path: Path,
) -> None:
    captions = write(tmp_path, GENERATED_CAPTIONS, [CAPTION | {"model_digest": digest} for digest in ("x", "y")])
    pictures = write(tmp_path, SAMPLES, [SAMPLE])
    review = open_review(captions, pictures, tmp_path / "verdicts")
    judge(review, "good", "x")
    assert [row["model_digest"] for row in review.find("open", "")] == ["y"]
    judge(review, "bad", "y")
    judge(review, "bad", "x")
    assert stored(tmp_path) == [("x", "bad"), ("y", "bad")]


@pytest.mark.parametrize("table", [GENERATED_CAPTIONS, VERDICTS])
def test_a_caption_of_the_first_lakesight_release_can_be_reviewed_although_it_has_no_model_digest(
    table: Table, tmp_path: Path
) -> None:
    without = {each.name: "model_digest" if each is table else "" for each in (GENERATED_CAPTIONS, VERDICTS)}
    captions = write(tmp_path, GENERATED_CAPTIONS, [CAPTION], without[GENERATED_CAPTIONS.name])
    write(tmp_path, VERDICTS, [VERDICT], without[VERDICTS.name])
    pictures = write(tmp_path, SAMPLES, [SAMPLE])
    review = open_review(captions, pictures, tmp_path / "verdicts")
    assert [row["caption"] for row in review.find("judged", "")] == ["red"]
    judge(review, "bad")
    assert stored(tmp_path) == [(None, "bad")]


def test_the_captions_of_the_champion_are_reviewed_or_those_of_the_chosen_versions(tmp_path: Path) -> None:
    rows = [CAPTION | {"model_version": version, "caption": f"by {version}"} for version in ("1", "2", "10")]
    captions, pictures = write(tmp_path, GENERATED_CAPTIONS, rows), write(tmp_path, SAMPLES, [SAMPLE])

    def shown(version: str = "champion") -> list[str]:
        review = open_review(captions, pictures, tmp_path / "verdicts", version)
        return sorted(row["caption"] for row in review.captions)

    assert shown() == ["by 1", "by 10", "by 2"], "no version was promoted"
    for day, (action, version) in enumerate((("promote", "10"), ("promote", "2"), ("refuse", "1")), start=1):
        decided = {"model_name": "m", "model_version": version, "action": action, "decided_at": datetime(2026, 1, day)}
        write_rows(tmp_path, DECISIONS, decided)
    assert shown() == ["by 2"]
    assert shown("1") == ["by 1"]
    assert shown("all") == ["by 1", "by 10", "by 2"]


def test_the_champion_of_the_registry_counts_instead_of_the_champion_in_table_decisions(tmp_path: Path) -> None:
    rows = [CAPTION | {"model_version": "1", "caption": "by 1"}]
    rows += [CAPTION | {"model_version": "2", "caption": f"by {digest}", "model_digest": digest} for digest in "xy"]
    captions, pictures = write(tmp_path, GENERATED_CAPTIONS, rows), write(tmp_path, SAMPLES, [SAMPLE])
    decided = {"model_name": "m", "model_version": "1", "action": "promote", "decided_at": NOW}
    write_rows(tmp_path, DECISIONS, decided)
    champions = iter([None, ("2", "y"), ("2", None), ("1", "x")])
    store = DeltaStore(
        captions,
        pictures,
        tmp_path / "verdicts",
        table="samples",
        model="m",
        has_texts=True,
        find_champion=lambda: next(champions),
    )
    shown = [sorted(row["caption"] for row in store.read_captions()) for _ in range(4)]
    assert shown == [["by 1"], ["by y"], ["by x", "by y"], ["by 1"]], "the caption of version 1 has no digest"


def test_captions_that_no_reader_sees_are_not_reviewed(tmp_path: Path) -> None:
    later = {"captioned_at": datetime(2026, 1, 2, tzinfo=UTC)}
    rows = [
        CAPTION | {"caption": "of a replaced picture", "sha256": "0", "captioned_at": datetime(2025, 1, 1, tzinfo=UTC)},
        CAPTION | {"caption": "with earlier settings"},
        CAPTION | {"caption": "newest", "settings_hash": "h2"} | later,
    ]
    captions, pictures = write(tmp_path, GENERATED_CAPTIONS, rows), write(tmp_path, SAMPLES, [SAMPLE])
    review = open_review(captions, pictures, tmp_path / "verdicts")
    assert [row["caption"] for row in review.captions] == ["newest"]
    said = {"image_id": "a/0", "model_version": "1", "settings_hash": "h2", "sha256": SHA256, "verdict": "bad"}
    review.save_verdict(CaptionVerdict.model_validate(said), "me")
    review.refresh()
    assert [row["caption"] for row in review.find("open", "")] == ["with earlier settings"]
    assert [row["caption"] for row in review.find("judged", "")] == ["newest"]


def rewrite_and_vacuum(folder: Path) -> None:
    """Write all rows of a table to new files, and remove the old files."""
    table = DeltaTable(folder)
    write_deltalake(folder, table.to_pyarrow_table(), mode="overwrite")
    DeltaTable(folder).vacuum(retention_hours=0, enforce_retention_duration=False, dry_run=False)


def test_a_running_review_and_command_show_can_read_tables_after_vacuum_of_older_table_versions(tmp_path: Path) -> None:
    captions = write(tmp_path, GENERATED_CAPTIONS, [CAPTION])
    pictures = write(tmp_path, SAMPLES, [SAMPLE])
    review = open_review(captions, pictures, tmp_path / "verdicts")
    rewrite_and_vacuum(tmp_path / "samples")
    assert review.picture("a/0", SHA256) == b"png"
    judge(review, "good")
    rewrite_and_vacuum(tmp_path / "verdicts")
    judge(review, "bad")
    assert stored(tmp_path) == [(None, "bad")]
    newest, oldest = (table_relation(DeltaTable(tmp_path / "samples", version=version)) for version in (None, 0))
    assert (newest.count(), newest.select([], "", "", None).read_all().num_rows) == (1, 1)
    with (
        pytest.raises(UserError, match=r"version 0 .*can no longer be read.*VACUUM has removed files of this version"),
        existing_files("samples", 0),
    ):
        oldest.select([], "", "", None).read_all()


def test_captions_of_a_table_that_no_ingest_has_read_are_reviewed_with_the_pictures_of_the_table(
    tmp_path: Path,
) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "b.png").write_bytes(b"path")
    pictures = {"sku": [1, 2], "photo": [b"bytes", None], "text": [base64.b64encode(b"text").decode(), None]}
    write_deltalake(tmp_path / "shop", pa.table(pictures | {"file": ["b.png", "../b.png"]}))
    columns = {"photo": (None, b"bytes"), "text": (None, b"text"), "file": (str(tmp_path / "files"), b"path")}
    rows = [
        CAPTION
        | {"image_id": image_id, "sha256": sha256(data).hexdigest(), "caption": f"{column} {image_id}"}
        | {"id_column": "sku", "image_column": column, "image_root": root}
        for column, (root, data) in columns.items()
        for image_id in ("1", "2", "3")
    ]
    captions = write(tmp_path, GENERATED_CAPTIONS, rows)
    review = open_review(captions, DeltaTable(tmp_path / "shop"), tmp_path / "verdicts")
    for row, (_, data) in zip(rows[::3], columns.values(), strict=True):
        shown = [review.picture(image_id, row["sha256"]) for image_id in ("1", "2", "3")]
        assert shown == [data, None, None], row["image_column"]
        posted = {name: row[name] for name in ("image_id", "model_version", "settings_hash", "sha256")}
        review.save_verdict(CaptionVerdict.model_validate(posted | {"verdict": "good"}), "me")
    found = DeltaTable(tmp_path / "verdicts").to_pyarrow_table().to_pylist()
    assert sorted((row["text"], row["image"]) for row in found) == [
        (f"{column} 1", data) for column, (_, data) in sorted(columns.items())
    ]


def test_a_caption_is_never_shown_or_judged_beside_a_later_picture_with_the_same_id(tmp_path: Path) -> None:
    captions = write(tmp_path, GENERATED_CAPTIONS, [CAPTION])
    pictures = write(tmp_path, SAMPLES, [SAMPLE])
    review = open_review(captions, pictures, tmp_path / "verdicts")
    judge(review, "good")
    later = pa.Table.from_pylist([SAMPLE | {"image": b"later"}], SAMPLES.arrow_schema)
    write_deltalake(tmp_path / "samples", later, mode="overwrite")
    assert review.picture("a/0", SHA256) is None
    with pytest.raises(UserError, match="the captioned picture does not exist any more"):
        judge(review, "bad")
    assert stored(tmp_path) == [(None, "good")]

    again = CAPTION | {"sha256": sha256(b"later").hexdigest(), "caption": "blue"}
    write_deltalake(
        tmp_path / "generated_captions",
        pa.Table.from_pylist([again], GENERATED_CAPTIONS.arrow_schema),
        mode="overwrite",
    )
    review.refresh()
    assert [row["caption"] for row in review.find("open", "")] == ["blue"], "the verdict was on the earlier picture"

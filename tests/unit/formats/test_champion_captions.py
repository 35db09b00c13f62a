"""Tests of the view champion_captions, which `lakesight show` computes from table files without Spark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake
from deltalake.exceptions import DeltaError
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.formats.champion_captions import COLUMNS, select
from pipelines.formats.delta_files import query
from pipelines.formats.table_schema import Table
from pipelines.formats.tables import DECISIONS, GENERATED_CAPTIONS, VERDICTS

START = datetime(2026, 1, 1, tzinfo=UTC)
LATER = START + timedelta(days=1)
CAPTION: dict[str, Any] = {
    **dict.fromkeys(GENERATED_CAPTIONS.names, ""),
    "image_id": "a",
    "model_name": "m",
    "model_version": "1",
    "caption": "red",
    "error": None,
    "num_tokens": 1,
    "mean_logprob": -1.0,
    "source_version": 0,
    "captioned_at": START,
    "read_at": None,
    "model_digest": "x",
    "sha256": "red",
}


def decision(action: str, version: str, day: int, digest: str | None = "x") -> dict[str, Any]:
    row = dict.fromkeys(DECISIONS.names, "") | {"model_name": "m", "model_version": version, "action": action}
    return row | {"reasons": [], "decided_at": START + timedelta(days=day), "model_digest": digest}


def verdict(judged: str, text: str | None, **key: str) -> dict[str, Any]:
    row = dict.fromkeys(VERDICTS.names, "") | {"image_id": "a", "model_name": "m", "model_version": "1"}
    return (
        row
        | {"model_digest": "x", "verdict": judged, "text": text, "image": b"", "judged_at": START, "sha256": "red"}
        | key
    )


def view(
    folder: Path,
    captions: Sequence[Mapping[str, Any]],
    decisions: Sequence[Mapping[str, Any]],
    verdicts: Sequence[Mapping[str, Any]] = (),
    champions: Mapping[str, tuple[str, str | None]] | None = None,
) -> list[dict[str, Any]]:
    def table(kind: Table, rows: Sequence[Mapping[str, Any]]) -> DeltaTable:
        write_deltalake(folder / kind.name, pa.Table.from_pylist(list(rows), kind.arrow_schema), mode="overwrite")
        return DeltaTable(folder / kind.name)

    found = [(GENERATED_CAPTIONS, captions), (DECISIONS, decisions), (VERDICTS, verdicts)]
    read = query({kind.name: table(kind, rows) for kind, rows in found}, select(champions=champions)).read_all()
    assert read.column_names == list(COLUMNS)
    assert not any(pa.types.is_string_view(field.type) for field in read.schema), "pyarrow's CSV writer refuses views"
    return sorted(read.to_pylist(), key=lambda row: (row["image_id"], row["prompt"]))


def test_the_view_champion_captions_changes_after_a_promotion_or_rollback_but_not_after_a_refused_promotion(
    tmp_path: Path,
) -> None:
    captions = [CAPTION, CAPTION | {"model_version": "2", "caption": "blue"}]
    promoted = [decision("promote", "1", 0), decision("refuse", "2", 1)]
    assert [row["caption"] for row in view(tmp_path, captions, promoted)] == ["red"]
    promoted.append(decision("promote", "2", 2))
    assert [row["caption"] for row in view(tmp_path, captions, promoted)] == ["blue"]
    promoted.append(decision("rollback", "1", 3))
    assert [row["caption"] for row in view(tmp_path, captions, promoted)] == ["red"]
    assert view(tmp_path, captions, []) == []


def test_the_view_champion_captions_shows_captions_of_a_champion_without_a_recorded_decision(tmp_path: Path) -> None:
    captions = [CAPTION, CAPTION | {"model_version": "2", "caption": "blue"}]
    captions += [caption | {"model_name": "it's"} for caption in captions]
    rows = view(tmp_path, captions, [decision("promote", "1", 0)], champions={"it's": ("2", None)})
    assert sorted((row["model_name"], row["caption"]) for row in rows) == [("it's", "blue"), ("m", "red")]


def test_the_champion_of_the_registry_replaces_the_champion_in_table_decisions(tmp_path: Path) -> None:
    captions = [CAPTION, CAPTION | {"model_version": "2", "caption": "blue"}]
    promoted = [decision("promote", "1", 0)]
    assert [row["caption"] for row in view(tmp_path, captions, promoted, champions={"m": ("2", "x")})] == ["blue"]
    assert [row["caption"] for row in view(tmp_path, captions, promoted, champions={"n": ("2", "x")})] == ["red"]


def test_the_view_omits_captions_of_another_registrys_version_that_has_the_number_of_the_champion(
    tmp_path: Path,
) -> None:
    captions = [CAPTION | {"image_id": key, "model_digest": digest} for key, digest in (("a", "x"), ("b", "y"))]
    assert [row["image_id"] for row in view(tmp_path, captions, [], champions={"m": ("1", "x")})] == ["a"]
    assert [row["image_id"] for row in view(tmp_path, captions, [], champions={"m": ("1", None)})] == ["a", "b"]


def test_the_view_champion_captions_omits_errors_and_captions_judged_bad_and_shows_corrected_captions(
    tmp_path: Path,
) -> None:
    newer = CAPTION | {"settings_hash": "new", "caption": "green", "captioned_at": START + timedelta(days=1)}
    failed = CAPTION | {"image_id": "b", "caption": None, "error": "not_an_image"}
    question = CAPTION | {"prompt": "where", "settings_hash": "q", "caption": "left"}
    champion = [decision("promote", "1", 0)]
    rows = view(tmp_path, [CAPTION, newer, failed, question], champion)
    assert [(row["image_id"], row["caption"]) for row in rows] == [("a", "green"), ("a", "left")]
    bad = view(tmp_path, [CAPTION, newer], champion, [verdict("bad", None, settings_hash="new")])
    assert [(row["caption"], row["verdict"]) for row in bad] == [("red", None)]
    corrected = view(tmp_path, [CAPTION, newer], champion, [verdict("corrected", "grey", settings_hash="new")])
    assert [(row["caption"], row["verdict"]) for row in corrected] == [("grey", "corrected")]


def test_a_verdict_on_an_earlier_picture_with_the_same_id_does_not_change_the_view(tmp_path: Path) -> None:
    champion, given = [decision("promote", "1", 0)], verdict("corrected", "grey", sha256="earlier")
    rows = view(tmp_path, [CAPTION], champion, [given])
    assert [(row["caption"], row["verdict"]) for row in rows] == [("red", None)]


def test_the_view_champion_captions_has_a_row_for_each_picture_column_of_a_table(tmp_path: Path) -> None:
    front, back = ({"id_column": "sku", "image_column": name, "sha256": name} for name in ("front", "back"))
    captions = [CAPTION | front, CAPTION | back | {"caption": "blue", "captioned_at": LATER}]
    rows = view(tmp_path, captions, [decision("promote", "1", 0)], [verdict("corrected", "grey", sha256="back")])
    assert sorted((row["image_column"], row["caption"]) for row in rows) == [("back", "grey"), ("front", "red")]


UNNAMED = {"id_column": None, "image_column": None}
NAMED = {"id_column": "sku", "image_column": "photo", "captioned_at": LATER, "settings_hash": "new", "caption": "blue"}


@pytest.mark.parametrize(
    ("later", "expected"),
    [({}, [("blue", "photo")]), ({"sha256": "other picture"}, [("blue", "photo")]), (None, [("red", None)])],
)
def test_a_caption_of_the_first_release_which_names_no_columns_yields_to_a_caption_that_names_columns(
    tmp_path: Path, later: dict[str, str] | None, expected: list[tuple[str, str | None]]
) -> None:
    captions = [CAPTION | UNNAMED, *([] if later is None else [CAPTION | NAMED | later])]
    rows = view(tmp_path, captions, [decision("promote", "1", 0)])
    assert [(row["caption"], row["image_column"]) for row in rows] == expected


REPLACED = CAPTION | {"captioned_at": LATER, "sha256": "blue", "settings_hash": "new", "caption": "blue"}
"""Caption of a later picture with the same id."""


@pytest.mark.parametrize(
    ("later", "verdicts", "expected"),
    [
        ({}, [], ["blue"]),
        ({"model_version": "2"}, [], []),
        ({"model_name": "another model"}, [], []),
        ({"prompt": "where?"}, [], ["blue"]),
        ({"caption": None, "error": "too_large"}, [], []),
        ({}, [verdict("bad", None, sha256="blue", settings_hash="new")], []),
        ({"caption": None, "error": "missing_field", "sha256": None}, [], ["red"]),
        ({"captioned_at": START - timedelta(days=1), "read_at": LATER}, [], ["blue"]),
    ],
)
def test_the_view_champion_captions_never_shows_the_caption_of_an_earlier_picture_with_the_same_id(
    tmp_path: Path, later: dict[str, Any], verdicts: list[dict[str, Any]], expected: list[str]
) -> None:
    rows = view(tmp_path, [CAPTION, REPLACED | later], [decision("promote", "1", 0)], verdicts)
    assert [row["caption"] for row in rows] == expected


def test_the_view_champion_captions_omits_captions_that_belong_to_another_registry(tmp_path: Path) -> None:
    captions = [CAPTION | {"image_id": "a"}, CAPTION | {"image_id": "b", "model_digest": "y"}]
    captions.append(CAPTION | {"image_id": "c", "model_digest": None})
    assert [row["image_id"] for row in view(tmp_path, captions, [decision("promote", "1", 0)])] == ["a", "c"]
    assert len(view(tmp_path, captions, [decision("promote", "1", 0, digest=None)])) == 3


@settings(max_examples=10)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("xyz"), st.integers(0, 3), st.booleans())))
def test_the_view_champion_captions_has_one_row_per_picture_and_prompt_with_the_newest_caption(
    tmp_path_factory: pytest.TempPathFactory, drawn: list[tuple[str, str, int, bool]]
) -> None:
    captions = [
        CAPTION
        | {
            "image_id": image_id,
            "prompt": prompt,
            "settings_hash": f"{number}",
            "caption": f"{number}" if good else None,
        }
        | {"error": None if good else "too_large", "captioned_at": START + timedelta(days=day)}
        for number, (image_id, prompt, day, good) in enumerate(drawn)
    ]
    rows = view(tmp_path_factory.mktemp("view"), captions, [decision("promote", "1", 0)])
    newest: dict[tuple[str, str], datetime] = {}
    for caption in captions:
        if caption["caption"]:
            key = caption["image_id"], caption["prompt"]
            newest[key] = max(newest.get(key, START), caption["captioned_at"])
    assert [(row["image_id"], row["prompt"], row["captioned_at"]) for row in rows] == sorted(
        (*key, time) for key, time in newest.items()
    )


def test_a_query_reads_parquet_files_in_the_given_order_and_refuses_invalid_sql(tmp_path: Path) -> None:
    for number in range(8):
        write_deltalake(tmp_path / "t", pa.table({"Number": [number]}), mode="append")
    table = DeltaTable(tmp_path / "t")
    read = [query({"t": table}, 'SELECT "Number" FROM t LIMIT 3').read_all().to_pylist() for _ in range(5)]
    assert read == [read[0]] * 5
    with pytest.raises(DeltaError):
        query({"t": table}, "SELECT nothing FROM t").read_all()

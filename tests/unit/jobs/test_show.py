"""Tests of `lakesight show`: rows, pages of pictures and files of any table, without a JVM."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command_server import assert_user_error, run_command
from deltalake import DeltaTable, write_deltalake
from open_sockets import free_port
from PIL import Image

from pipelines.formats.tables import DECISIONS, GENERATED_CAPTIONS, VERDICTS

NOW = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Use a new Lakesight home folder and a new working folder."""
    monkeypatch.setenv("LAKESIGHT_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


def lakesight(*arguments: str) -> Any:
    """Run a `lakesight` command in an environment in which starting a JVM fails."""
    return run_command(*arguments, environment=os.environ | {"JAVA_HOME": "/nonexistent"})


@pytest.fixture
def samples(home: Path, tmp_path: Path) -> Callable[..., Any]:
    """Write two versions of table `samples` and return a function that runs `lakesight show samples --json`."""
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "blue.png")
    picture = (tmp_path / "blue.png").read_bytes()
    for name in ("one", "<two>"):
        texts = [[{"prompt": "", "text": f"a square called {name}"}]]
        rows = pa.table({"image_id": [name], "image": [picture], "texts": texts})
        write_deltalake(home / "warehouse" / "samples", rows, mode="append")

    def show(*options: str) -> Any:
        done = lakesight("show", "samples", "--json", *options)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return show


def test_command_show_reads_any_table_version_without_starting_a_jvm(samples: Callable[..., Any]) -> None:
    latest = samples()
    assert (latest["version"], latest["num_rows"], len(latest["rows"])) == (1, 2, 2)
    assert latest["rows"][0]["image"].endswith(" bytes>")
    first = samples("--version", "0", "--rows", "0")
    assert (first["num_rows"], first["rows"]) == (1, [])


def test_command_show_with_gallery_writes_one_html_page_with_escaped_texts(samples: Callable[..., Any]) -> None:
    page = Path(samples("--gallery")["gallery"]).read_text()
    assert page.count("data:image/jpeg;base64,") == 2
    assert "&lt;two&gt;" in page
    assert "<two>" not in page


def test_the_error_of_command_show_lists_existing_tables_and_versions(samples: Callable[..., Any]) -> None:
    assert_user_error(lakesight("show", "sample"), "no table 'sample'", "tables: samples")
    write_deltalake("birds", pa.table({"id": [1]}))
    assert_user_error(lakesight("show", "birds"), "no table 'birds'", "write ./birds")
    assert_user_error(lakesight("show", "samples", "--version", "9"), "no version 9", "the latest version is 1")


@pytest.fixture
def shop(home: Path, tmp_path: Path) -> None:
    """Write a table of pictures that no ingest has read, and captions of its rows by the champion."""
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "blue.png")
    pictures = [(tmp_path / "blue.png").read_bytes(), b"no picture"]
    write_deltalake(tmp_path / "shop" / "products", pa.table({"Sku": [1, 2], "photo": pictures}))
    place = {"id_column": "Sku", "image_column": "photo", "image_root": None, "model_digest": None}
    rows = [
        dict.fromkeys(GENERATED_CAPTIONS.names, "")
        | {"read_at": None}
        | {"image_id": image_id, "caption": caption, "error": None if caption else "not_an_image", "num_tokens": 1}
        | {"source_table": f"delta.`{tmp_path}/shop/products`", "source_version": 0, "captioned_at": NOW}
        | {"model_name": "demo", "model_version": "1", "mean_logprob": -1.0, **place}
        | {"sha256": sha256(picture).hexdigest()}
        for image_id, caption, picture in zip("12", ("a blue square", None), pictures, strict=True)
    ]
    decision: dict[str, Any] = dict.fromkeys(DECISIONS.names, "") | {
        "model_name": "demo",
        "model_version": "1",
        "action": "promote",
    }
    decision |= {"reasons": [], "decided_at": NOW, "model_digest": None}
    for table, found in ((GENERATED_CAPTIONS, rows), (DECISIONS, [decision]), (VERDICTS, [])):
        write_deltalake(home / "warehouse" / table.name, pa.Table.from_pylist(found, table.arrow_schema))


def test_show_reads_the_pictures_beside_captions_from_the_table_that_was_captioned(shop: None, tmp_path: Path) -> None:
    done = lakesight("show", "generated_captions", "--gallery", "--json")
    page = Path(json.loads(done.stdout)["gallery"]).read_text()
    assert page.count("data:image/jpeg;base64,") == 1
    assert page.count("no picture") == 1
    done = lakesight("show", "shop/products", "--gallery", "--id-column", "Sku", "--image-column", "photo", "--json")
    assert Path(json.loads(done.stdout)["gallery"]).read_text().count("data:image/jpeg;base64,") == 1
    assert_user_error(lakesight("show", "shop/products", "--gallery"), "no pictures", "Sku, photo", "--image-column")
    DeltaTable(tmp_path / "shop" / "products").update(updates={"photo": "CAST('later' AS BYTEA)"})
    done = lakesight("show", "generated_captions", "--gallery", "--json")
    page = Path(json.loads(done.stdout)["gallery"]).read_text()
    assert (page.count("data:image/jpeg;base64,"), page.count("no picture")) == (0, 2), "the pictures were replaced"


def test_a_page_with_captions_of_two_picture_columns_names_the_column_and_the_question_of_each_caption(
    shop: None, home: Path, tmp_path: Path
) -> None:
    captions = DeltaTable(home / "warehouse" / GENERATED_CAPTIONS.name)
    row = next(row for row in captions.to_pyarrow_table().to_pylist() if row["caption"])
    back = row | {"image_column": "back", "caption": "two", "prompt": "how many <squares>?", "settings_hash": "asked"}
    write_deltalake(captions, pa.Table.from_pylist([back], GENERATED_CAPTIONS.arrow_schema), mode="append")
    done = lakesight("show", "generated_captions", "--gallery", "--json")
    page = Path(json.loads(done.stdout)["gallery"]).read_text()
    for column in ("photo", "back"):
        assert f"1, column {column} of {tmp_path}/shop/products" in page
    assert "how many &lt;squares&gt;? two" in page


def test_pages_of_two_tables_with_equal_folder_names_and_of_two_selections_do_not_replace_each_other(
    shop: None, tmp_path: Path
) -> None:
    write_deltalake(tmp_path / "old" / "products", pa.table({"Sku": ["old"], "photo": [b"no picture"]}))
    pages = []
    for table, where in (("shop/products", ""), ("old/products", ""), ("shop/products", '"Sku" = 2')):
        options = ("--id-column", "Sku", "--image-column", "photo", "--where", where)
        done = lakesight("show", table, "--gallery", "--json", *options)
        pages.append(Path(json.loads(done.stdout)["gallery"]))
    assert [page.read_text().count("<figure") for page in pages] == [2, 1, 1]
    assert "old/products, version 0" in pages[1].read_text()


def test_command_show_can_filter_and_sort_and_export_the_rows_of_any_table(shop: None, tmp_path: Path) -> None:
    done = lakesight(
        "show", "shop/products", "--columns", "Sku", "--where", '"Sku" > 0', "--order", "Sku DESC", "--json"
    )
    assert [row["Sku"] for row in json.loads(done.stdout)["rows"]] == [2, 1]
    assert json.loads(done.stdout)["columns"] == {"Sku": "long"}
    done = lakesight("show", "generated_captions", "--where", "error IS NOT NULL", "--json")
    assert [row["image_id"] for row in json.loads(done.stdout)["rows"]] == ["2"]
    chosen = ("--columns", "image_id,caption", "--rows", "0", "--output")
    assert lakesight("show", "champion_captions", *chosen, "out.csv").returncode == 0
    assert (tmp_path / "out.csv").read_text() == '"image_id","caption"\n"1","a blue square"\n'
    assert lakesight("show", "champion_captions", *chosen, "out.parquet").returncode == 0
    assert pq.read_table(tmp_path / "out.parquet").to_pylist() == [{"image_id": "1", "caption": "a blue square"}]


def test_an_export_keeps_its_file_if_the_server_that_knows_the_champion_does_not_answer(
    shop: None, tmp_path: Path
) -> None:
    export = ("show", "champion_captions", "--rows", "0", "--output", "captions.parquet")
    assert lakesight(*export).returncode == 0
    server = {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{free_port()}", "JAVA_HOME": "/nonexistent"}
    done = run_command(*export, environment=os.environ | server)
    assert (done.returncode, server["MLFLOW_TRACKING_URI"] in done.stderr) == (1, True), "a retry may help"
    assert pq.read_table(tmp_path / "captions.parquet").num_rows == 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["shop/products", "--where", "size > 3"], ["No field named size", "--where"]),
        (["shop/products", "--output", "rows.txt"], ["rows.txt", ".parquet or .csv"]),
        (["shop/nothing"], ["shop/nothing", "_delta_log"]),
        (["champion_captions", "--version", "1"], ["a view has no versions"]),
    ],
)
def test_command_show_raises_a_user_error_if_the_rows_cannot_be_selected(
    shop: None, arguments: list[str], expected: list[str]
) -> None:
    assert_user_error(lakesight("show", *arguments), *expected)


def test_show_names_the_command_that_upgrades_a_captions_table_of_an_earlier_version(shop: None, home: Path) -> None:
    old = DeltaTable(home / "warehouse" / "generated_captions").to_pyarrow_table().drop(["image_root"])
    write_deltalake(home / "warehouse" / "generated_captions", old, mode="overwrite", schema_mode="overwrite")
    assert_user_error(lakesight("show", "champion_captions"), "no column image_root", "lakesight maintain")


def test_command_show_prints_no_control_characters_of_a_table_and_exports_them_unchanged(tmp_path: Path) -> None:
    attack = "a\x1b[2J\x1b]0;title\x07\x00\r\x9b\u202e\u2066\nrow 2"
    write_deltalake(tmp_path / "shop" / "products", pa.table({"id": [attack], "tags": [[attack]]}))
    done = lakesight("show", "shop/products", "--columns", "id,tags", "--output", "rows.parquet")
    assert set(filter(lambda each: not each.isprintable(), done.stdout)) == {"\n"}
    assert r"  id    a\x1b[2J\x1b]0;title\x07\x00\r\x9b\u202e\u2066\nrow 2" in done.stdout.splitlines()
    assert pq.read_table("rows.parquet")["id"].to_pylist() == [attack]
    done = lakesight("show", "shop/products", "--json")
    assert set(filter(lambda each: not each.isprintable(), done.stdout)) == {"\n"}
    assert json.loads(done.stdout)["rows"] == [{"id": attack, "tags": [attack]}]

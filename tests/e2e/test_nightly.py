"""Tests of docs/nightly.md: the commands and files of the page work, in the order of the page, for a table that no
ingest has read.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from deltalake import DeltaTable, write_deltalake
from local_platforms import open_local
from pictures import as_base64, png, write_csv
from processes import TEST_PATH
from tiny_runs import tiny_run, write_shards
from trained_models import register

from pipelines.driver.evaluate.decisions import record_decision
from pipelines.tracking.aliases import promote
from pipelines.tracking.download import download
from pipelines.tracking.server import connect
from vlm import text
from vlm.factory import build_model

pytestmark = [pytest.mark.matrix, pytest.mark.timeout(1500)]

PAGE = (Path(__file__).parents[2] / "docs" / "nightly.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", PAGE, re.M | re.S)
ELSEWHERE = ("lakesight review",)
"""Commands of the page that this file does not run, because `test_review.py` runs `lakesight review`."""
ROWS = 20


def files() -> dict[str, str]:
    """Return the files that the page shows, as a dict from name to content. The first comment of a file is its name."""
    named = [(re.search(r"^# (\w+\.\w+)", block, re.M), block) for kind, block in BLOCKS if kind in ("python", "sh")]
    return {name[1]: block for name, block in named if name}


def commands() -> list[list[str]]:
    """Return the commands of the page as lists of words, in the order of the page."""
    lines = [line for kind, block in BLOCKS if not kind for line in block.splitlines()]
    return [shlex.split(line) for line in lines if line.startswith("lakesight ") and not line.startswith(ELSEWHERE)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with an export of 20 pictures, a run with two promoted versions, and a Python environment."""
    folder = tmp_path_factory.mktemp("captions")
    pictures = {f"A{number:03}": png(number) for number in range(ROWS)}
    rows = [(sku, as_base64(picture)) for sku, picture in pictures.items()]
    write_csv(folder / "export" / "products.csv", rows, header=("sku", "photo"))
    (folder / "photos").mkdir()
    for sku, picture in pictures.items():
        (folder / "photos" / f"{sku}.png").write_bytes(picture)
    write_deltalake(folder / "shop/files", pa.table({"sku": [*pictures], "file": [f"{sku}.png" for sku in pictures]}))
    for name, content in files().items():
        (folder / name).write_text(content)
    (folder / "nightly.sh").chmod(0o755)
    (folder / "conf" / "run").mkdir(parents=True)
    for name in ("birds", "coast", "lake"):
        (folder / "conf" / "run" / f"{name}.yml").write_text("{model: nano, data: demo, train: demo}")
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "activate").write_text(f"PATH={folder}/.venv/bin:$PATH")
    command = folder / ".venv" / "bin" / "lakesight"
    command.write_text(f"#!/bin/sh\nexec {sys.executable} -P -c 'from jobs.cli import main; main()' \"$@\"\n")
    command.chmod(0o755)
    promote_versions(folder, "birds", 2)
    return folder


def promote_versions(folder: Path, name: str, count: int) -> None:
    """Register models with random weights as versions of a run, and promote one version after the other."""
    with pytest.MonkeyPatch.context() as patch:
        platform = open_local(patch, folder / ".lakesight")
        config = tiny_run(ranks=1).model_copy(update={"name": name})
        shards = write_shards(folder / f"shards-{name}", rows=8)
        for seed in range(count):
            torch.manual_seed(seed)
            model = build_model(config.model, text.learn(config.model.text, []).vocab_size)
            version = register(platform, folder / f"run-{name}-{seed}", config, shards, model)
            digest = download(platform, version).digest
            record_decision(
                platform.open_spark,
                platform,
                model=name,
                version=version.version,
                digest=digest,
                action="promote",
                champion=None,
            )
            promote(platform, version)


def run(folder: Path, words: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("LAKESIGHT_HOME", "JAVA_OPTS")}
    environment |= {"PATH": f"{folder}/.venv/bin:{os.environ['PATH']}", "PYTHONPATH": TEST_PATH}
    environment |= variables
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=300)


def test_the_commands_of_the_nightly_page_succeed_in_the_order_of_the_page(folder: Path) -> None:
    assert run(folder, [sys.executable, "to_delta.py"]).returncode == 0
    printed: dict[str, str] = {}
    for words in commands():
        done = run(folder, words)
        assert done.returncode == 0, (words, done.stderr)
        printed.setdefault(words[1], done.stdout)
    assert f"{ROWS} rows of delta.`{folder}/shop/products` = {ROWS} captioned" in printed["caption"]
    assert "birds version 1 is the champion again" in printed["rollback"]
    pages = [path.read_text() for path in (folder / ".lakesight" / "reports").glob("generated_captions-v1_*.html")]
    pictures = sorted(page.count("data:image/jpeg;base64,") for page in pages)
    assert pictures == [5, ROWS], "the page of `show` and the page of the captioning job"
    forgotten = DeltaTable(folder / ".lakesight" / "warehouse" / "generated_captions").to_pyarrow_table().num_rows
    (folder / "forget.py").write_text(files()["forget.py"].replace("'3'", "'1'"))
    assert run(folder, [sys.executable, "forget.py"]).returncode == 0
    left = DeltaTable(folder / ".lakesight" / "warehouse" / "generated_captions").to_pyarrow_table().num_rows
    assert forgotten - left == 2

    done = run(folder, ["./nightly.sh"])
    assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), (folder / "caption.log").read_text()
    report = json.loads((folder / "caption.jsonl").read_text())
    assert (report["considered"], report["already"], report["captioned"], report["errors"]) == (ROWS, ROWS - 2, 2, 0)
    assert (folder / "captions.parquet").exists()
    again = next(words for words in commands() if words[1] == "caption")
    assert "nothing new" in run(folder, again, JAVA_HOME="/nonexistent").stdout, "without a JVM"


def test_the_caption_function_on_the_nightly_page_captions_pictures_in_an_sql_query(folder: Path) -> None:
    if not (folder / "shop" / "products").exists():
        assert run(folder, [sys.executable, "to_delta.py"]).returncode == 0
    done = run(folder, [sys.executable, "in_sql.py"])
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if "|A0" in line]
    assert len(rows) == 5
    assert all(caption and caption != "NULL" for _, caption in rows), rows


def test_a_job_with_an_empty_home_folder_captions_with_the_champion_of_the_tracking_server(folder: Path) -> None:
    if not (folder / "shop" / "products").exists():
        assert run(folder, [sys.executable, "to_delta.py"]).returncode == 0
    words = [*next(words for words in commands() if words[1] == "caption"), "--json"]
    server = f"sqlite:///{folder}/.lakesight/mlflow.db"
    done = run(folder, words, LAKESIGHT_HOME=str(folder / "elsewhere"), MLFLOW_TRACKING_URI=server)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["captioned"] == ROWS
    exported = [*next(words for words in commands() if "champion_captions" in words), "--json"]
    shown = run(folder, exported, LAKESIGHT_HOME=str(folder / "elsewhere"), MLFLOW_TRACKING_URI=server)
    assert json.loads(shown.stdout)["num_rows"] == ROWS, shown.stderr


def test_the_view_shows_the_champion_of_the_registry_although_this_home_folder_has_promoted_another_version(
    folder: Path,
) -> None:
    if not (folder / "shop" / "products").exists():
        assert run(folder, [sys.executable, "to_delta.py"]).returncode == 0
    promote_versions(folder, "coast", 2)
    caption = next(words for words in commands() if words[1] == "caption" and "shop/products" in words)
    caption = [word.replace("birds", "coast") for word in caption]
    assert run(folder, caption).returncode == 0
    with pytest.MonkeyPatch.context() as patch:
        client = connect(open_local(patch, folder / ".lakesight"))
        newest = client.get_registered_model("coast").aliases["champion"]
        promoted_elsewhere = str(int(newest) - 1)
        client.set_registered_model_alias("coast", "champion", promoted_elsewhere)
    show = ["lakesight", "show", "champion_captions", "--where", "model_name = 'coast'", "--rows", "0", "--json"]
    show += ["--output", "coast.parquet"]
    assert run(folder, show).returncode == 0
    assert pq.read_table(folder / "coast.parquet").num_rows == 0, "the champion has captioned nothing yet"
    assert run(folder, caption).returncode == 0
    assert run(folder, show).returncode == 0
    assert pq.read_table(folder / "coast.parquet")["model_version"].to_pylist() == [promoted_elsewhere] * ROWS
    decisions = json.loads(run(folder, ["lakesight", "decisions", "--run", "coast", "--json"]).stdout)["decisions"]
    assert decisions[-1]["model_version"] == promoted_elsewhere
    assert "the last recorded decision names another version" in decisions[-1]["reasons"][0]


def test_the_change_feed_script_prints_only_new_captions_after_the_whole_table_was_copied_again(folder: Path) -> None:
    rows = [(f"A{number:03}", as_base64(png(number))) for number in range(ROWS)]
    write_csv(folder / "export" / "products.csv", rows, header=("sku", "photo"))
    caption = next(words for words in commands() if words[1] == "caption" and "shop/products" in words)
    for new in ([], [("B001", as_base64(png(ROWS + 7)))]):
        write_csv(folder / "export" / "products.csv", [*rows, *new], header=("sku", "photo"))
        assert run(folder, [sys.executable, "to_delta.py"]).returncode == 0
        before = DeltaTable(folder / ".lakesight" / "warehouse" / "generated_captions").version() if new else 0
        assert run(folder, caption).returncode == 0
    write_csv(folder / "export" / "products.csv", rows, header=("sku", "photo"))
    (folder / "new_captions.py").write_text(files()["new_captions.py"].replace("SINCE = 0", f"SINCE = {before}"))
    done = run(folder, [sys.executable, "new_captions.py"])
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["B001"], done.stderr
    assert run(folder, [sys.executable, "to_delta.py"]).returncode == 0  # the other tests expect ROWS rows
    assert run(folder, [*caption, "--remove-deleted"]).returncode == 0


def test_a_replaced_picture_file_is_captioned_again_only_after_its_row_was_written_again(folder: Path) -> None:
    caption = next(words for words in commands() if "shop/files" in words)
    assert run(folder, caption).returncode == 0
    (folder / "photos" / "A002.png").write_bytes(png(ROWS + 1))
    assert "nothing new" in run(folder, caption).stdout
    assert run(folder, [sys.executable, "read_again.py"]).returncode == 0
    assert "1 changed pictures captioned again" in run(folder, caption).stdout


def test_the_nightly_script_reports_a_failure_and_refuses_to_start_while_an_earlier_job_runs(folder: Path) -> None:
    with (folder / "nightly.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = run(folder, ["./nightly.sh"])
        assert (done.returncode, done.stdout) == (1, "the previous captioning job still runs\n")
    (folder / "nightly.sh").write_text(files()["nightly.sh"].replace("shop/products", "shop/gone"))
    done = run(folder, ["./nightly.sh"])
    assert done.returncode == 2
    assert done.stdout.startswith("captioning failed with exit code 2:\n")
    assert "shop/gone" in done.stdout


def test_a_night_with_too_many_errors_prints_its_report_and_fails_again_when_the_scheduler_repeats_it(
    folder: Path,
) -> None:
    pictures = [png(0), *[b"no picture"] * 9]
    write_deltalake(folder / "shop/broken", pa.table({"sku": [f"B{n}" for n in range(10)], "photo": pictures}))
    [line] = [line for line in files()["captions_dag.py"].splitlines() if line.startswith("CAPTION = ")]
    words = shlex.split(line.removeprefix("CAPTION = ").strip('"').replace("shop/products", "shop/broken"))
    words += ["--max-error-share", "0.1", "--set", "drift.fail=true", "--json"]
    reports = []
    for _ in range(2):
        done = run(folder, words)
        assert (done.returncode, "9 of 10 rows" in done.stderr) == (1, True), done.stderr
        reports.append(json.loads(done.stdout))
    assert [(report["errors"], report["failed_errors"]) for report in reports] == [(9, 0), (0, 9)]


def test_the_nightly_script_exports_one_row_for_each_picture_and_only_after_a_successful_job(folder: Path) -> None:
    if not (folder / "shop" / "products").exists():
        assert run(folder, [sys.executable, "to_delta.py"]).returncode == 0
    caption = next(words for words in commands() if words[1] == "caption" and "shop/products" in words)
    promote_versions(folder, "lake", 1)
    assert run(folder, ["lake" if word == "birds" else word for word in caption]).returncode == 0
    (folder / "nightly.sh").write_text(files()["nightly.sh"])
    done = run(folder, ["./nightly.sh"])
    assert done.returncode == 0, (folder / "caption.log").read_text()
    exported = pq.read_table(folder / "captions.parquet")
    assert exported.num_rows == len(set(exported["image_id"].to_pylist())) == ROWS
    (folder / "captions.parquet").write_bytes(b"earlier captions")
    command = folder / ".venv" / "bin" / "lakesight"
    real = command.read_text()
    command.write_text(real.replace("#!/bin/sh", "#!/bin/sh\n[ $1 = caption ] && exit 124"))
    assert run(folder, ["./nightly.sh"]).returncode == 124
    command.write_text(real)
    assert (folder / "captions.parquet").read_bytes() == b"earlier captions"


METASTORE = """
from pipelines.config import load_run
from pipelines.platform import open_platform

spark = open_platform(load_run("birds", platform="metastore").platform).open_spark()
spark.sql("CREATE SCHEMA shop")
spark.read.format("delta").load("shop/products").write.format("delta").saveAsTable("shop.products")
spark.stop()
"""


def test_a_table_of_a_hive_metastore_is_captioned_and_a_second_home_folder_cannot_use_the_metastore(
    folder: Path,
) -> None:
    if not (folder / "shop" / "products").exists():
        assert run(folder, [sys.executable, "to_delta.py"]).returncode == 0
    (folder / "conf" / "platform").mkdir()
    settings = {"spark.sql.catalogImplementation": "hive"}
    settings["spark.hadoop.javax.jdo.option.ConnectionURL"] = f"jdbc:derby:;databaseName={folder}/metastore;create=true"
    config = {"kind": "local", "spark": {"conf": settings}}
    (folder / "conf" / "platform" / "metastore.yml").write_text(json.dumps(config))
    created = run(folder, [sys.executable, "-c", METASTORE])
    assert created.returncode == 0, created.stderr
    words = [*next(words for words in commands() if words[1] == "caption"), "--platform", "metastore", "--json"]
    words[words.index("--table") + 1] = "shop.products"
    done = run(folder, words)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["captioned"], report["errors"]) == (ROWS, 0)
    server = f"sqlite:///{folder}/.lakesight/mlflow.db"
    refused = run(folder, words, LAKESIGHT_HOME=str(folder / "other home"), MLFLOW_TRACKING_URI=server)
    assert refused.returncode == 2
    assert "schema lakesight of the catalog belongs to another home folder" in refused.stderr


def test_airflow_parses_the_dag_of_the_nightly_page(tmp_path: Path) -> None:
    python = os.environ.get("AIRFLOW_PYTHON")
    if not python:
        pytest.skip("AIRFLOW_PYTHON names no Python with Airflow (see CONTRIBUTING.md)")
    (tmp_path / "dags").mkdir()
    (tmp_path / "dags" / "captions_dag.py").write_text(files()["captions_dag.py"])
    code = (
        "from airflow.models.dagbag import DagBag\n"
        "bag = DagBag('dags', include_examples=False)\n"
        "dag = bag.dags.get('captions')\n"
        "tasks = {task.task_id: sorted(task.downstream_task_ids) for task in dag.tasks} if dag else None\n"
        "print(bag.import_errors, tasks, [task.bash_command for task in dag.tasks] if dag else '')"
    )
    environment = {"AIRFLOW_HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    done = subprocess.run(
        [python, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines()[-1].startswith("{} {'caption': ['export'], 'export': []}"), done
    shown = next(line for line in PAGE.splitlines() if line.startswith("lakesight caption"))
    assert " ".join(shown.split()[:8]) in done.stdout, "the DAG runs the command of the page"

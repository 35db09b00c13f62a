"""Tests of a text-only model, from text files to the registry.

Real ranks train the model. The tests also train a captioner that starts from the decoder of the text-only model.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from deltalake import DeltaTable
from lakesight_command import lakesight
from local_platforms import open_local
from mlflow import MlflowClient
from processes import TEST_PATH
from resumed_runs import require_exact_resume
from text_runs import random_texts, text_run, write_texts

from pipelines.driver.train.run import prepare
from pipelines.formats.run_folder import RunFolder
from pipelines.platform import Platform, sqlite_uri

pytestmark = pytest.mark.matrix  # starting ranks and Spark takes minutes


@pytest.fixture
def laptop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Platform:
    monkeypatch.setenv("PYTHONPATH", TEST_PATH)
    return open_local(monkeypatch, tmp_path / "home")


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_ranks_that_are_killed_and_restarted_learn_a_text_as_uninterrupted_ranks_do(
    laptop: Platform, tmp_path: Path, parallel: str
) -> None:
    report = write_texts(tmp_path / "texts", random_texts(20))
    config = text_run(ranks=2, steps=20, batch_size=4, parallel=parallel)
    whole, broken = (
        RunFolder(prepare(config, laptop, report, report).path.rename(tmp_path / name)) for name in ("whole", "broken")
    )
    require_exact_resume(whole, broken, step=13)


CONFIGS = {
    "train/short.yml": "{steps: 20, batch_size: 4, checkpoint_every: 20, validate_every: 20}",
    "run/words.yml": """
model: makemore_tiny
train: short
data:
  source: {kind: text, path: words.txt, rows: paragraph}
  split: {kind: hash, val: 0.2, test: 0.0}
  validate_on: val
  evaluate_on: val
""",
    "run/pictures.yml": "{model: makemore_tiny, data: demo, train: short}",
}


def test_a_text_only_model_is_trained_and_registered_and_a_captioner_starts_from_its_decoder(tmp_path: Path) -> None:
    home = tmp_path / "home"
    (tmp_path / "words.txt").write_text("\n\n".join(f"{text} {n}." for n, text in enumerate(random_texts(60))))
    for name, content in CONFIGS.items():
        (tmp_path / "conf" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "conf" / name).write_text(content)

    def report(*arguments: str) -> dict[str, Any]:
        done = lakesight(home, *arguments, "--json")
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    run = ("--run", "words")
    first = report("pipeline", *run)
    assert (first["rows_in"], first["texts"], first["trained"], first["model_version"]) == (60, 60, True, "1")
    table = DeltaTable(home / "warehouse" / "evaluations").to_pyarrow_table().to_pylist()
    assert {row["metric"]: row["value"] for row in table}["loss_per_char"] == first["loss_per_char"]
    part = report("evaluate", *run, "--set", "data.shards.where=length(text) > 40")
    assert part["metrics"]["loss_per_char"]["value"] != first["loss_per_char"]
    shutil.rmtree(home / "warehouse" / "evaluations")
    again = report("pipeline", *run)
    figures = DeltaTable(home / "warehouse" / "evaluations").to_pyarrow_table().to_pylist()
    assert {row["metric"]: row["value"] for row in figures}["loss_per_char"] == first["loss_per_char"]
    (version,) = MlflowClient(sqlite_uri(home / "mlflow.db")).search_model_versions()
    assert float(version.tags["lakesight_loss_per_char"]) == pytest.approx(first["loss_per_char"], rel=1e-5)
    assert (again["nothing_new"], again["trained"], again["loss_per_char"]) == (True, False, first["loss_per_char"])
    assert report("ask", *run, "--version", "1", "--prompt", "the")["num_tokens"] > 0
    for command in (("promote", *run), ("caption", *run, "--version", "1"), ("compare", "1", "1", *run)):
        refused = lakesight(home, *command)
        assert refused.returncode == 2, refused.stderr
        assert "needs a model that reads pictures" in refused.stderr

    changed = report("train", *run, "--set", "model.generation.num_beams=2")
    assert (changed["trained"], changed["model_version"], changed["run_folder"]) == (False, "2", first["run_folder"])

    (checkpoint,) = Path(first["run_folder"], "checkpoints").iterdir()
    sets = ("model.text_only=false", "data.source.path=scenes:60:0", f"train.start_from={checkpoint}")
    pictures = ("--run", "pictures", *(word for setting in sets for word in ("--set", setting)))
    report("ingest", *pictures)
    started = report("train", *pictures)
    assert (started["trained"], started["steps"]) == (True, 20)
    assert report("ask", *pictures, "--version", "1", "--prompt", "the")["num_tokens"] > 0

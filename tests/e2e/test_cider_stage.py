"""Test of training that rewards the CIDEr of sampled captions, from pictures to a served model version."""

from __future__ import annotations

import base64
import io
import json
import shutil
from pathlib import Path
from statistics import fmean

import pytest
from lakesight_command import lakesight
from local_platforms import open_local
from model_server import ask, served
from PIL import Image
from processes import TEST_PATH
from resumed_runs import require_exact_resume

from pipelines.formats.run_folder import RunFolder
from pipelines.tracking import registry

STEPS, REWARDED_STEPS = 150, 60
TRAIN = f"""
batch_size: 16
optimizer: {{warmup_steps: 10}}
log_every: 10
validate_every: {STEPS + REWARDED_STEPS}
validate_rows: 8
checkpoint_every: 30
score_every: {STEPS + REWARDED_STEPS}
best_by: cider
stages:
  - {{steps: {STEPS}, groups: [{{pattern: ".*", lr: 5.0e-3}}]}}
  - {{steps: {REWARDED_STEPS}, groups: [{{pattern: ".*", lr: 5.0e-4}}], objective: {{kind: cider}}, warmup_steps: 5}}
"""
CONFIGS = {"train/rewarded.yml": TRAIN, "run/rewarded.yml": "{model: nano_tiny, data: demo, train: rewarded}"}


@pytest.mark.matrix  # trains for a minute, and starts Spark, ranks and a server
@pytest.mark.timeout(1200)
def test_training_on_cider_raises_the_reward_resumes_exactly_and_registers_a_version_that_can_be_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", TEST_PATH)
    for name, content in CONFIGS.items():
        (tmp_path / "conf" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "conf" / name).write_text(content)
    home, options = tmp_path / "home", ("--run", "rewarded", "--json", "--set", "data.source.path=scenes:80:0")
    for command in (("ingest",), ("train", "--no-launch")):
        done = lakesight(home, *command, *options)
        assert done.returncode == 0, done.stderr
    run = RunFolder(Path(json.loads(done.stdout)["run_folder"]))
    whole = RunFolder(Path(shutil.copytree(run.path, home / "copies" / "whole")))
    require_exact_resume(whole, run, step=STEPS + 35)

    rewards = [m.values["train/cider"] for m in run.read_metrics() if "train/cider" in m.values]
    assert len(rewards) == REWARDED_STEPS // 10
    assert fmean(rewards[-2:]) > fmean(rewards[:2])

    done = lakesight(home, "train", *options)
    assert done.returncode == 0, done.stderr
    trained = json.loads(done.stdout)
    assert (trained["trained"], trained["steps"]) == (False, STEPS + REWARDED_STEPS)
    platform = open_local(monkeypatch, home)
    version = registry.resolve(platform, trained["model_name"], trained["model_version"])
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), (200, 30, 30)).save(buffer, "PNG")
    with served(platform, version, tmp_path) as address:
        (answer,) = ask(address, ["image"], [[base64.b64encode(buffer.getvalue()).decode()]])
    assert answer["error"] is None
    assert answer["caption"]

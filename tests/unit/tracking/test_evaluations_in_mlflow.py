"""Test how MLflow stores the evaluations of several model versions that one training run has made."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import pytest
from evaluation_reports import evaluation_report
from local_platforms import open_local
from scored_rows import scored_row
from tiny_runs import finished_run, tiny_run

from jobs.common import Job
from jobs.log_evaluation import log_evaluation, record_evaluation
from jobs.output import CommandOutput
from pipelines.driver.evaluate.bootstrap import measure
from pipelines.driver.evaluate.run import EvaluationReport
from pipelines.driver.evaluate.scores import SCORES, write_scores
from pipelines.tracking import registry, runs
from pipelines.tracking.describe.notes import NOTE
from pipelines.tracking.server import connect


def evaluated(folder: Path, version: registry.ModelVersion, num_right: int) -> EvaluationReport:
    """Write an evaluation of ten rows, of which the first `num_right` rows have the right caption."""
    rows = [scored_row(row, ["a red thing"], "a red thing" if row < num_right else "nothing") for row in range(10)]
    write_scores(folder / SCORES, rows)
    for name in ("gallery.html", "gallery.png", "figures.png"):
        (folder / name).write_text(f"version {version.version}", encoding="utf-8")
    identity = {"model_name": version.name, "model_version": version.version, "run_id": version.run_id}
    return evaluation_report(folder, measure(rows), **identity, scores_hash=version.version)


@pytest.mark.matrix  # registers three versions
def test_a_run_keeps_the_figures_of_its_last_checkpoint_and_the_files_of_each_version(
    tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    platform, config = open_local(monkeypatch, tmp_path / "home", database=empty_database), tiny_run()
    run, shards = finished_run(platform, tmp_path)
    shutil.copytree(run.checkpoint(12), run.checkpoint(4))
    with runs.follow(run, config, platform) as follower:
        pass
    beams = config.model.generation.changed({"num_beams": 3})
    last = registry.register(run, follower.run_id, platform)
    early = registry.register(run, follower.run_id, platform, 4)
    other = registry.register(run, follower.run_id, platform, "last", beams)
    job = Job(config, platform, (), CommandOutput(io.StringIO(), as_json=False))
    client = connect(platform)
    for version, num_right in ((early, 2), (last, 9), (early, 4), (other, 6)):
        log_evaluation(job, evaluated(tmp_path / f"{version.version}-{num_right}", version, num_right), shards)
        shown = client.get_run(follower.run_id).data.metrics["test_exact_match"]
        assert shown == (0.2 if (version, num_right) == (early, 2) else 0.9)
    note = client.get_run(follower.run_id).data.tags[NOTE]
    for version in (last, early, other):
        folder = f"evaluate/version-{version.version}"
        page = Path(client.download_artifacts(follower.run_id, f"{folder}/gallery.html", str(tmp_path)))
        assert page.read_text(encoding="utf-8") == f"version {version.version}"
        assert f"path={folder.replace('/', '%2F')}%2Fgallery.png" in note
        files = {Path(file.path).name for file in client.list_artifacts(follower.run_id, folder)}
        assert {"lengths.png", f"rows-{version.version}.json"} <= files
        assert len([name for name in files if name.startswith(f"figures-{version.version}-")]) == 1
    more = evaluated(tmp_path / "more", last, 9)
    more = more.model_copy(update={"metrics": more.metrics | {"meteor": more.metrics["exact_match"]}})
    log_evaluation(job, more, shards)
    folder = f"evaluate/version-{last.version}"
    tables = [each.path for each in client.list_artifacts(follower.run_id, folder) if "/figures-" in each.path]
    logged = [Path(client.download_artifacts(follower.run_id, table, str(tmp_path))).read_text() for table in tables]
    assert sorted('"meteor"' in text for text in logged) == [False, True]
    client.log_metric(follower.run_id, "train/loss", 1.5, step=8)
    old = early.model_copy(update={"tags": {}})
    assert registry.training_step(platform, early) == 4
    assert registry.training_step(platform, old) == 8


@pytest.mark.matrix  # registers two versions
def test_an_evaluation_of_step_0_is_logged_again_and_an_evaluation_of_other_rows_replaces_nothing(
    tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    platform, config = open_local(monkeypatch, tmp_path / "home", database=empty_database), tiny_run()
    run, shards = finished_run(platform, tmp_path)
    shutil.copytree(run.checkpoint(12), run.checkpoint(4))
    with runs.follow(run, config, platform) as follower:
        pass
    last, early = (registry.register(run, follower.run_id, platform, which) for which in ("last", 4))
    job = Job(config, platform, (), CommandOutput(io.StringIO(), as_json=False))
    client = connect(platform)
    first = evaluated(tmp_path / "last", last, 9).model_copy(update={"reused": True})
    client.log_metric(follower.run_id, "test_exact_match", 0.9, step=0)
    registry.tag(platform, last, {"evaluation": first.scores_hash, "tokenisation": first.tokenisation})
    record_evaluation(job, evaluated(tmp_path / "early", early, 2), shards)
    for _ in range(2):
        record_evaluation(job, first, shards)
    points = client.get_metric_history(follower.run_id, "test_exact_match")
    assert sorted((point.step, point.value) for point in points) == [(0, 0.9), (4, 0.2), (12, 0.9)]
    assert client.get_run(follower.run_id).data.metrics["test_exact_match"] == 0.9
    shards_of_part = config.data.shards.model_copy(update={"where": "width > 9"})
    data = config.data.model_copy(update={"shards": shards_of_part})
    part = Job(config.model_copy(update={"data": data}), platform, (), CommandOutput(io.StringIO(), as_json=False))
    report = evaluated(tmp_path / "part", last, 1).model_copy(update={"scores_hash": "89ab"})
    report.gallery.write_text("a part of the rows", encoding="utf-8")
    record_evaluation(part, report, shards)
    assert client.get_run(follower.run_id).data.metrics["test_exact_match"] == 0.9
    assert registry.resolve(platform, last.name, last.version).tags["evaluation"] == first.scores_hash
    pages = [f"evaluate/version-{last.version}/{name}" for name in ("gallery.html", "89ab/gallery.html")]
    for folder, page in zip((first.folder, tmp_path / "part"), pages, strict=True):
        logged = Path(client.download_artifacts(follower.run_id, page, str(tmp_path)))
        assert logged.read_text(encoding="utf-8") == (folder / "gallery.html").read_text(encoding="utf-8")

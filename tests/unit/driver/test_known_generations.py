"""Tests of the file that holds the generation settings of all runs with the same run name."""

from __future__ import annotations

from pathlib import Path

from file_calls import counted_calls
from tiny_runs import tiny_run, write_run, write_shards

from pipelines.driver.train.known_generations import read_generations
from vlm.config import GenerationConfig


def settings(runs: Path) -> list[int]:
    return [generation.max_new_tokens for generation in read_generations(runs, "tiny")]


def test_the_run_file_of_each_run_is_read_once_and_again_if_the_stored_settings_are_lost(tmp_path: Path) -> None:
    shards, runs = write_shards(tmp_path / "shards", rows=4), tmp_path / "runs"
    assert settings(runs) == []
    for number, (tokens, expected) in enumerate([(16, [16]), (16, [16]), (5, [16, 5])]):
        model = tiny_run().model.model_copy(update={"generation": GenerationConfig(max_new_tokens=tokens)})
        write_run(runs / f"tiny-{number}", tiny_run().model_copy(update={"model": model}), shards, shards)
        with counted_calls(runs) as calls:
            assert settings(runs) == expected
        assert [path for path in calls.opened if path.endswith("run.json")] == [str(runs / f"tiny-{number}/run.json")]
    for content in ("no JSON", "{}", '{"settings": [{"max_new_tokens": 0}]}'):
        (runs / "tiny.generations.json").write_text(content)
        assert settings(runs) == [16, 5]


def test_a_folder_without_a_valid_run_file_is_read_again_until_the_file_is_valid(tmp_path: Path) -> None:
    shards, runs = write_shards(tmp_path / "shards", rows=4), tmp_path / "runs"
    write_run(runs / "tiny-1", tiny_run(), shards, shards)
    valid = (runs / "tiny-1" / "run.json").read_text()
    (runs / "tiny-1" / "run.json").write_text(valid[:-20])
    (runs / "tiny-2").mkdir()
    assert settings(runs) == []
    (runs / "tiny-1" / "run.json").write_text(valid)
    assert settings(runs) == [tiny_run().model.generation.max_new_tokens]

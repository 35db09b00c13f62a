"""A mixture of experts under real ranks: what it learns and reports does not depend on how many there are."""

from __future__ import annotations

from pathlib import Path

import pytest
from processes import torchrun
from safetensors.numpy import load_file
from tiny_runs import tiny_model_config, tiny_run, write_run, write_shards

from pipelines.formats.run_folder import Metrics, RunDir

EXPERTS = {"kind": "moe", "num_experts": 4, "expert": {"kind": "plain", "mlp_width": 16}, "balance_weight": 0.5}


def routed_run(folder: Path, ranks: int) -> RunDir:
    """Six steps of a tiny model with experts, nothing random in a step."""
    model = tiny_model_config().model_dump()
    for part in (model["vision"], model["decoder"]):
        part["transformer"] |= {"mlp": EXPERTS, "dropout": 0.0}
    config = tiny_run(steps=6, ranks=ranks, model=model, log_every=2)
    shards = write_shards(folder / f"shards-{ranks}", rows=12, texts=3)  # texts of unequal length: ranks differ
    run = write_run(folder / f"run-{ranks}", config, shards, shards)
    ended = torchrun(run, ranks)
    assert ended.returncode == 0, ended.stdout
    return run


def test_experts_learn_and_report_the_same_on_one_rank_and_on_two(tmp_path: Path) -> None:
    runs = [routed_run(tmp_path, ranks) for ranks in (1, 2)]
    logged: list[list[Metrics]] = [list(run.read_metrics()) for run in runs]
    assert [step.step for step in logged[0]] == [2, 4, 6]
    for alone, together in zip(*logged, strict=True):
        assert set(alone.expert_load) == {"encoder.blocks.0", "decoder.blocks.0"}
        assert together.expert_load.keys() == alone.expert_load.keys()
        for layer, load in alone.expert_load.items():
            assert sum(load) == pytest.approx(1)
            assert together.expert_load[layer] == pytest.approx(load)
        for name in ("train/loss", "train/router_balance", "train/router_z", "train/grad_norm"):
            assert together.values[name] == pytest.approx(alone.values[name], rel=1e-4), name
    weights = [load_file(run.checkpoint(6) / "model.safetensors") for run in runs]
    for name, expected in weights[0].items():
        assert weights[1][name] == pytest.approx(expected, abs=1e-4), name

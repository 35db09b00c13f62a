"""Tests that the peak memory of ranks that share a sharded model agrees with the formulas in docs/training.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from processes import torchrun
from tiny_runs import runs_in, tiny_run

from vlm.checkpoint import model_weights
from vlm.factory import build_model
from vlm.layers.block import iterate_blocks

pytestmark = [
    pytest.mark.matrix,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs the peak memory of a process (Linux)"),
]

MARGIN = 60e6
"""Memory for activations, threads and the allocator, in bytes. This memory does not depend on the number of weights.
"""
VOCABULARY = 29


def model_config() -> dict[str, Any]:
    """Return the config of a model of 43 M weights in small blocks. Training this model needs no random numbers."""
    config = tiny_run().model.model_dump()
    for part in (config["vision"], config["decoder"]):
        part["transformer"] |= {
            "width": 384,
            "depth": 12,
            "attention": {"num_heads": 6, "num_kv_heads": 6, "head_dim": 64},
            "mlp": {"kind": "plain", "mlp_width": 1536},
            "dropout": 0.0,
            "stochastic_depth": 0.0,
        }
    config["generation"]["max_new_tokens"] = 4
    return config


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_rank_of_a_sharded_model_needs_only_memory_for_its_own_slice_of_the_weights(
    ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Freed memory blocks of a megabyte or more go back to the system at once.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(2**20))
    settings = {"parallel": "fsdp", "steps": 2, "validate_every": 2, "checkpoint_every": 2, "ranks": ranks}
    settings |= {"caption_samples": 1}
    make_run = runs_in(tmp_path, monkeypatch)
    tiny, run = make_run("tiny", **settings), make_run("sharded", model=model_config(), **settings)
    ended = torchrun([tiny, run], ranks, "measure_ranks")
    assert ended.returncode == 0, ended.stdout
    model = build_model(tiny_run(model=model_config()).model, VOCABULARY)
    weights = sum(weight.numel() for weight in model_weights(model).values())
    block = max(sum(p.numel() for p in each.parameters()) for each in iterate_blocks(model))
    rest = weights - sum(p.numel() for each in iterate_blocks(model) for p in each.parameters())
    largest = max(weight.numel() for weight in model_weights(model).values())
    for rank in range(ranks):
        found = json.loads((run.path / f"memory-{rank}.json").read_text())
        built = 4 * weights / ranks + 4 * largest
        trained = (16 + 12) * weights / ranks + 8 * (rest + 2 * block)  # a checkpoint copies 12 bytes per weight
        print(f"{ranks} ranks, rank {rank}: " + ", ".join(f"{k} {v / 1e6:.0f} MB" for k, v in found.items()))
        print(f"by the formulas: built {built / 1e6:.0f} MB, trained {trained / 1e6:.0f} MB")
        assert found["built"] < built + MARGIN
        assert found["trained"] < trained + MARGIN

"""Tests that the figures of the cluster plan in docs/training.md equal the figures computed from model configs."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.config import measure_model
from pipelines.config import load_model

PAGE = (Path(__file__).parents[3] / "docs" / "training.md").read_text()
GPU, GPUS, ROWS, LINK = 400e12, 8, 512, 100e9 / 8
"""Assumptions of the page, namely FLOP/s of a GPU, GPUs per node, rows per GPU, and bytes per second of a link."""


def row_of(name: str) -> list[str]:
    [line] = [row for row in PAGE.splitlines() if row.startswith(f"| {name} |") and row.count("|") > 6]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


@pytest.mark.parametrize("name", ["base", "flamingo", "paligemma"])
def test_the_scaling_page_states_the_bytes_per_training_step_and_per_checkpoint_of_each_model(name: str) -> None:
    weights = measure_model(name, load_model(name)).parameters
    seconds = ", ".join(f"{8 * weights / (rate / 8):.2f}" for rate in (25e9, 100e9, 400e9))
    assert row_of(f"`{name}`") == [
        f"{weights / 1e6:,.0f} M",
        f"{8 * weights / 1e9:.2f} GB",
        f"{seconds} s",
        f"{12 * weights / 1e9:.2f} GB",
        f"{12 * weights / 1e9:.1f} GB",
    ]


@pytest.mark.parametrize("nodes", [1, 2, 4, 8, 16, 32, 64])
def test_the_scaling_figures_on_the_docs_page_follow_from_compute_and_network_bytes(nodes: int) -> None:
    base = measure_model("base", load_model("base"))
    compute = ROWS * 3 * base.flops / GPU
    sending = 8 * base.parameters * (nodes - 1) / nodes / LINK
    batch = nodes * GPUS * ROWS
    assert row_of(str(nodes)) == [
        f"{nodes * GPUS}",
        f"{batch:,}",
        f"{compute:.2f} s",
        f"{sending:.2f} s" if nodes > 1 else "0",
        f"{batch / max(compute, sending):,.0f}",
        f"{batch / (compute + sending):,.0f}",
    ]


def test_the_scaling_page_states_the_smallest_number_of_rows_per_gpu_that_hides_communication() -> None:
    base = measure_model("base", load_model("base"))
    least = 8 * base.parameters / LINK / (3 * base.flops / GPU)
    assert f"With fewer than {least:.0f} rows per GPU" in PAGE

"""The plan in docs/training.md counts what the code sends: its figures are counted again here."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.config import measure
from pipelines.config import load_model

PAGE = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
GPU, GPUS, ROWS, LINE = 400e12, 8, 512, 100e9 / 8
"""What the page assumes: operations a second that a GPU reaches, GPUs a node, rows a GPU, bytes a second of a line."""


def row_of(name: str) -> list[str]:
    [line] = [line for line in PAGE.splitlines() if line.startswith(f"| {name} |")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


@pytest.mark.parametrize("name", ["base", "flamingo", "paligemma"])
def test_bytes_of_a_step_and_of_a_checkpoint_follow_from_the_weights(name: str) -> None:
    weights = measure(name, load_model(name)).parameters
    seconds = ", ".join(f"{8 * weights / (rate / 8):.2f}" for rate in (25e9, 100e9, 400e9))
    assert row_of(f"`{name}`") == [
        f"{weights / 1e6:,.0f} M",
        f"{8 * weights / 1e9:.2f} GB",
        f"{seconds} s",
        f"{12 * weights / 1e9:.2f} GB",
        f"{12 * weights / 1e9:.1f} GB",
    ]


@pytest.mark.parametrize("nodes", [1, 2, 4, 8, 16, 32, 64])
def test_scaling_follows_from_compute_and_bytes(nodes: int) -> None:
    base = measure("base", load_model("base"))
    compute = ROWS * 3 * base.flops / GPU
    sending = 8 * base.parameters * (nodes - 1) / nodes / LINE
    batch = nodes * GPUS * ROWS
    assert row_of(str(nodes)) == [
        f"{nodes * GPUS}",
        f"{batch:,}",
        f"{compute:.2f} s",
        f"{sending:.2f} s" if nodes > 1 else "0",
        f"{batch / max(compute, sending):,.0f}",
        f"{batch / (compute + sending):,.0f}",
    ]


def test_rows_that_cover_the_line_are_counted() -> None:
    base = measure("base", load_model("base"))
    least = 8 * base.parameters / LINE / (3 * base.flops / GPU)
    assert f"Below {least:.0f} rows per GPU" in PAGE
